"""A table in memory and a flusher, both as small as they can be. Every rule comes from the package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest

from outbox.isolation import isolate
from outbox.outcomes import Outcome, WaitsFor
from outbox.pauses import SharedPause
from outbox.policy import Policy
from outbox.records import LOST_LEASES_ALONE
from outbox.revival import ROWS_REVIVED_AFTER, DueRange, due_range, is_young
from outbox.waits import Look

from .play import Final, Tried, Upload
from .services import HOUR, MINUTE
from .virtual_time import VirtualTime

_IDLE_UNPARK_EVERY_MS = MINUTE


@dataclass
class Row:
    """One row, with the columns that rules read or write."""

    id: int
    key: str
    created_at_ms: int
    next_attempt_at_ms: int
    status: str = "pending"
    retry_count: int = 0
    last_error: str | None = None
    sent_at_ms: int | None = None
    revived_at_ms: int | None = None
    suspected_at_ms: int | None = None
    waits_for: str | None = None
    lost_leases: int = 0

    @property
    def failed_before(self) -> bool:
        return self.waits_for is not None or self.is_claimed_alone

    @property
    def is_claimed_alone(self) -> bool:
        """A row whose senders died is claimed alone: it may have killed them."""
        return self.lost_leases + (self.status == "sending") >= LOST_LEASES_ALONE

    @property
    def age_order(self) -> tuple[int, int]:
        return self.created_at_ms, self.id

    @property
    def claim_order(self) -> tuple[bool, bool, int, int]:
        """Rows that wait for `row` come after the others that failed before."""
        return not self.is_claimed_alone, self.waits_for == WaitsFor.ROW, *self.age_order


@dataclass
class Turn:
    """Whose turn it is in one process: rows that failed before, or rows that did not."""

    failed_before: bool = False


@dataclass(frozen=True)
class Claim:
    rows: Sequence[Row] = ()
    lease_until_ms: int = 0
    seen_pause: int = 0
    is_probe: bool = False
    paused_until_ms: int | None = None


class Table:
    """The rows of one destination and its pause. Each public method is one transaction."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.pause = SharedPause()
        self.accepted_at_ms: int | None = None
        self.rows: dict[int, Row] = {}
        # What is pending or sending, and what is parked; the rest is settled for good.
        self._queued: dict[int, Row] = {}
        self._parked: dict[int, Row] = {}
        self._unparked_at_ms = 0

    def insert(self, key: str, *, now_ms: int) -> Row:
        row = Row(len(self.rows) + 1, key, now_ms, now_ms)
        self.rows[row.id] = self._queued[row.id] = row
        return row

    def claim(self, *, now_ms: int, turn: Turn) -> Claim:
        """Take the rows that are due, unless the destination is paused; a probe is one row."""
        policy, pause = self.policy, self.pause
        lease_until_ms = now_ms + policy.lease_ms
        if not policy.is_original and pause.holds_until_ms > now_ms:
            return Claim(paused_until_ms=pause.holds_until_ms)
        due = [row for row in self._queued.values() if row.next_attempt_at_ms <= now_ms]
        if policy.is_original:
            rows = nsmallest(policy.batch_size, due, key=_age_order)
            return Claim(self._take(rows, lease_until_ms), lease_until_ms)
        if not due:
            return Claim()
        kinds = _kinds(due)
        wanted = pause.next_probe_failed_before if pause.needs_probe else turn.failed_before
        failed_before = wanted if kinds[wanted] else not wanted
        if pause.needs_probe:
            row = min(kinds[1], key=_claim_order) if failed_before else max(kinds[0], key=_age_order)
            self.pause = pause.when_probed(lease_until_ms=lease_until_ms, failed_before=failed_before)
            rows = [row]
        else:
            rows = _batch(nsmallest(policy.batch_size, kinds[failed_before], key=_claim_order))
            turn.failed_before = not failed_before
        return Claim(self._take(rows, lease_until_ms), lease_until_ms, pause.number, pause.needs_probe)

    def renew(self, row_ids: Iterable[int], *, lease_ms: int, new_lease_ms: int) -> set[int]:
        held = {row_id for row_id in row_ids if self._holds(row_id, lease_ms)}
        for row_id in held:
            self.rows[row_id].next_attempt_at_ms = new_lease_ms
        return held

    def settle(self, outcomes: Iterable[tuple[int, Outcome]], *, lease_ms: int, seen_pause: int) -> int:
        """Write outcomes. An acceptance ends the pause; return how many failures in a row it ended."""
        failures = 0
        for row_id, outcome in outcomes:
            if outcome.trigger == "deliver":
                self._deliver(self.rows[row_id], outcome.values["sent_at_ms"])
                failures = max(failures, self.pause.failures)
                self.pause = self.pause.when_accepted(seen=seen_pause)
            elif self._holds(row_id, lease_ms):
                self._move(self.rows[row_id], outcome)
        return failures

    def end_claim(self, pause_after: Callable[[SharedPause], SharedPause]) -> SharedPause:
        self.pause = pause_after(self.pause)
        return self.pause

    def revive(self, *, now_ms: int, ended_failures: int) -> None:
        """Bring rows back because the destination accepted another row."""
        policy = self.policy
        if not policy.is_original:
            waiting = [row for row in self._queued.values() if row.status == "pending" and row.failed_before]
            kinds = [
                WaitsFor.SERVICE,
                WaitsFor.PROOF,
                *([WaitsFor.ROW] if ended_failures >= ROWS_REVIVED_AFTER else []),
            ]
            for kind in kinds:
                self._make_due([row for row in waiting if row.waits_for == kind], now_ms)
        for row in nsmallest(policy.unpark_limit, self._parked.values(), key=_age_order):
            self._unpark(row, now_ms)

    def unpark_one(self, *, now_ms: int) -> None:
        """Try a parked row, at most once a minute, because nothing else is due that could show a recovery."""
        if self.policy.is_original or now_ms - self._unparked_at_ms < _IDLE_UNPARK_EVERY_MS:
            return
        if self._parked:
            self._unparked_at_ms = now_ms
            longest_parked = min(self._parked.values(), key=lambda row: (row.revived_at_ms or 0, *row.age_order))
            self._unpark(longest_parked, now_ms)

    def next_due_ms(self) -> int | None:
        return min((row.next_attempt_at_ms for row in self._queued.values()), default=None)

    def _take(self, rows: Sequence[Row], lease_until_ms: int) -> Sequence[Row]:
        for row in rows:
            row.lost_leases += row.status == "sending"
            row.status = "sending"
            row.next_attempt_at_ms = lease_until_ms
        return [replace(row) for row in rows]

    def _holds(self, row_id: int, lease_ms: int) -> bool:
        row = self.rows[row_id]
        return row.status == "sending" and row.next_attempt_at_ms == lease_ms

    def _deliver(self, row: Row, sent_at_ms: int) -> None:
        row.status, row.sent_at_ms, row.lost_leases = "sent", sent_at_ms, 0
        self._queued.pop(row.id, None)
        self._parked.pop(row.id, None)
        self.accepted_at_ms = max(self.accepted_at_ms or 0, sent_at_ms)

    def _move(self, row: Row, outcome: Outcome) -> None:
        row.status = {"reschedule": "pending", "park": "parked", "abandon": "abandoned"}[outcome.trigger]
        row.lost_leases = 0
        for column, value in outcome.values.items():
            setattr(row, column, value)
        if row.status != "pending":
            del self._queued[row.id]
        if row.status == "parked":
            self._parked[row.id] = row

    def _make_due(self, rows: Sequence[Row], now_ms: int) -> None:
        late = [row for row in rows if row.next_attempt_at_ms > self._due_range(row, now_ms).end_ms]
        for row in nsmallest(self.policy.revive_limit, late, key=_age_order):
            row.next_attempt_at_ms = self._due_range(row, now_ms).due_ms(row.id)

    def _due_range(self, row: Row, now_ms: int) -> DueRange:
        return due_range(now_ms=now_ms, policy=self.policy, is_young=self._is_young(row, now_ms))

    def _is_young(self, row: Row, now_ms: int) -> bool:
        is_suspect = row.waits_for == WaitsFor.PROOF and row.suspected_at_ms is not None
        return is_suspect and is_young(row.suspected_at_ms, now_ms=now_ms, policy=self.policy)

    def _unpark(self, row: Row, now_ms: int) -> None:
        self._queued[row.id] = self._parked.pop(row.id)
        row.status, row.retry_count, row.revived_at_ms = "pending", 0, now_ms
        row.last_error = row.waits_for = row.suspected_at_ms = None
        row.next_attempt_at_ms = due_range(now_ms=now_ms, policy=self.policy).due_ms(row.id)


class ModelFlusher:
    """The life of one claim: claim, upload, settle."""

    def __init__(self, table: Table, time: VirtualTime, upload: Upload) -> None:
        self._table = table
        self._time = time
        self._upload = upload
        self._turn = Turn()

    def look(self) -> Look:
        """Deliver one batch, if something is due."""
        table, policy = self._table, self._table.policy
        claim = table.claim(now_ms=self._time.now_ms, turn=self._turn)
        if claim.paused_until_ms is not None:
            return Look(paused_until_ms=claim.paused_until_ms)
        if not claim.rows:
            table.unpark_one(now_ms=self._time.now_ms)
            return Look(next_due_ms=table.next_due_ms())
        lease_ms, open_ids, ended_failures = claim.lease_until_ms, {row.id for row in claim.rows}, 0
        search = isolate(claim.rows, policy)
        while part := search.next_part():
            now_ms = self._time.now_ms
            if lease_ms - now_ms < policy.lease_ms * 7 // 8:
                held = table.renew(open_ids, lease_ms=lease_ms, new_lease_ms=now_ms + policy.lease_ms)
                lease_ms = now_ms + policy.lease_ms
                if held != open_ids:
                    search.drop(open_ids - held, now_ms=now_ms)
                    open_ids = held
                    continue
            failure = self._upload([row.key for row in part])
            now_ms = self._time.now_ms
            if failure is None:
                search.accepted(part, now_ms=now_ms)
            else:
                search.rejected(part, failure, now_ms=now_ms, accepted_at_ms=table.accepted_at_ms)
            outcomes = search.take_outcomes()
            open_ids -= {row_id for row_id, _ in outcomes}
            ended = table.settle(outcomes, lease_ms=lease_ms, seen_pause=claim.seen_pause)
            ended_failures = max(ended_failures, ended)
        result, now_ms = search.result, self._time.now_ms
        if result.accepted:
            table.revive(now_ms=now_ms, ended_failures=ended_failures)
        if policy.is_original:
            has_failed = result.failure is not None and not result.accepted and not result.proven
            return Look(goes_on=not has_failed, has_failed=has_failed)
        pause = table.end_claim(
            lambda pause: pause.when_done(
                result,
                seen=claim.seen_pause,
                probe_lease_ms=claim.lease_until_ms if claim.is_probe else None,
                now_ms=now_ms,
                policy=policy,
            )
        )
        paused_until_ms = pause.holds_until_ms if pause.holds_until_ms > now_ms else None
        goes_on = bool(result.accepted or result.proven or result.is_lone_failure)
        return Look(goes_on=goes_on and paused_until_ms is None, paused_until_ms=paused_until_ms)


class ModelPlace:
    """The table and its flushers, for scenarios."""

    def __init__(self, time: VirtualTime, policy: Policy) -> None:
        self._time = time
        self.table = Table(policy)

    def enqueue(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.table.insert(key, now_ms=self._time.now_ms)

    def add_tried(self, keys: Sequence[str], tried: Tried) -> None:
        for key in keys:
            row = self.table.insert(key, now_ms=self._time.now_ms - HOUR)
            row.next_attempt_at_ms = self._time.now_ms
            row.retry_count, row.waits_for = tried.retry_count, tried.waits_for
            row.suspected_at_ms = row.created_at_ms if tried.suspected else None

    def flusher(self, name: str, upload: Upload) -> ModelFlusher:
        return ModelFlusher(self.table, self._time, upload)

    def read(self) -> Mapping[str, Final]:
        return {row.key: Final(row.status, row.last_error) for row in self.table.rows.values()}


def _age_order(row: Row) -> tuple[int, int]:
    return row.age_order


def _claim_order(row: Row) -> tuple[bool, int, int]:
    return row.claim_order


def _kinds(due: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return the rows that did not fail before, and those that did."""
    return [row for row in due if not row.failed_before], [row for row in due if row.failed_before]


def _batch(rows: Sequence[Row]) -> Sequence[Row]:
    return rows[:1] if rows[0].is_claimed_alone else rows
