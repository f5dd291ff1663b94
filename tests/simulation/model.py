"""What is promised, held against every committed transaction.

Nothing here calls the rules of the package: what a row may become is told again from the outside, from what the
server answered and what the clock showed. Only the table of moves is taken from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from outbox import FlushReport, HttpFailure, Policy, UploadFailure
from outbox.lifecycle import MOVES

if TYPE_CHECKING:
    from .server import Server
    from .stage import Process, Stage

WEEK_MS = 7 * 24 * 60 * 60 * 1_000

MOVE, EXCLUSION, ACCEPTANCE, CONSERVATION, LOSS, LIVENESS, ABANDONMENT, ATOMICITY, REPORT, PAUSE = (
    "1 only moves of the table",
    "2 one owner under valid leases",
    "3 sent means accepted",
    "4 conservation",
    "5 nothing delivered is lost",
    "6 everything deliverable is delivered",
    "7 given up for a reason",
    "8 one answer, one transaction",
    "9 reports tell the truth",
    "10 a service that failed is left alone",
)


class Violation(Exception):  # noqa: N818 - it is what was found, not what went wrong with the simulation
    """A promise that was broken."""

    def __init__(self, invariant: str, message: str) -> None:
        super().__init__(f"{invariant}: {message}")
        self.invariant = invariant


class Row(NamedTuple):
    id: int
    event_type: str
    payload_json: str
    status: str
    retry_count: int
    next_attempt_at_ms: int
    last_error: str | None
    created_at_ms: int
    sent_at_ms: int | None
    revived_at_ms: int | None

    @property
    def age(self) -> tuple[int, int]:
        return self.created_at_ms, self.id

    @property
    def decodable(self) -> bool:
        return "spoilt" not in self.payload_json

    @property
    def poison(self) -> bool:
        return "poison" in self.payload_json

    def gave_chance_at(self) -> int:
        return max(self.created_at_ms, self.revived_at_ms or 0)


class Pause(NamedTuple):
    destination: str
    failures: int = 0
    paused_until_ms: int = 0
    probe_until_ms: int = 0
    last_error: str = ""

    @property
    def until_ms(self) -> int:
        return max(self.paused_until_ms, self.probe_until_ms)


DESTINATION = "https://ingest.example.com"
PROBE_SIZE = 8

_ROWS = f"SELECT {', '.join(Row._fields)} FROM observation_events ORDER BY id"
_LEDGER = "SELECT reason, status, event_type, events FROM observation_events_ledger"
_PAUSES = f"SELECT {', '.join(Pause._fields)} FROM observation_destinations"
_LAST_ID = "SELECT max(seq) FROM sqlite_sequence WHERE name = 'observation_events'"
_BORN = "SELECT id FROM born"


@dataclass
class Request:
    ids: tuple[int, ...]
    on_its_way: str = ""
    """The answer as the server gave it; the client learns of it one step later."""
    failure: UploadFailure | None = None
    accepted: bool = False


@dataclass
class Operation:
    """What one process is about, and what it has learnt meanwhile."""

    kind: str
    cutoff_ms: int = 0
    readings: list[int] = field(default_factory=list)
    results: list[object] = field(default_factory=list)
    claim: dict[int, Row] = field(default_factory=dict)
    lease_ms: int = 0
    unpaused: bool = True
    """Whether at some moment of its transaction there was no pause."""
    probe: Pause | None = None
    """The pause after which its claim is a probe, and until when it keeps others away."""
    probe_until_ms: int = 0
    requests: list[Request] = field(default_factory=list)
    uploading: bool = False
    settlements: int = 0
    by_chance: bool = False
    """Whether a row that it had lost came under the very lease that it had."""
    troubled: bool = False
    commit_lost: bool = False
    inserted: int = 0
    moved: Counter[str] = field(default_factory=Counter)

    @property
    def now_ms(self) -> int:
        return self.readings[-1]

    @property
    def last_failure(self) -> UploadFailure | None:
        return self.requests[-1].failure if self.requests else None

    def accepted(self) -> set[int]:
        return {row_id for request in self.requests if request.accepted for row_id in request.ids}

    def rejected_alone(self, row_id: int) -> list[HttpFailure]:
        """Return the permanent failures of requests that held this row and no other."""
        return [
            request.failure
            for request in self.requests
            if request.ids == (row_id,)
            and isinstance(request.failure, HttpFailure)
            and is_permanent(request.failure)
        ]


def is_permanent(failure: UploadFailure | None) -> bool:
    status = failure.status if isinstance(failure, HttpFailure) else 0
    return 400 <= status <= 499 and status not in (401, 403, 408, 425, 429)


def is_auth(failure: UploadFailure | None) -> bool:
    return isinstance(failure, HttpFailure) and failure.status in (401, 403)


def is_rate_limit(failure: UploadFailure | None) -> bool:
    return isinstance(failure, HttpFailure) and failure.status == 429


def is_transient(failure: UploadFailure | None) -> bool:
    return failure is not None and not (is_permanent(failure) or is_auth(failure) or is_rate_limit(failure))


class Model:
    """The table as it was after the last commit, and who holds which row."""

    def __init__(
        self, observer: Any, policy: Policy, server: Server, *, equal_clocks: bool, shared: bool = False
    ) -> None:
        self._observer = observer
        self.shared = shared
        """Whether transactions run at once, as on a server."""
        self.policy = policy
        self.server = server
        self.equal_clocks = equal_clocks
        self.rows: dict[int, Row] = {}
        self.rows, self.deleted, self.ever_inserted = self.read()
        self.pause = self.read_pause()
        self.holders: dict[int, Operation] = {}
        self.commits = 0
        self.seen: Counter[str] = Counter()

    def read(self) -> tuple[dict[int, Row], Counter[tuple[str, str, str]], set[int]]:
        # A row that is as it was stays the same object.
        known = self.rows
        rows = {
            row[0]: old if (old := known.get(row[0])) == row else Row._make(row)
            for row in self._observer.execute(_ROWS)
        }
        deleted = Counter({entry[:3]: entry[3] for entry in self._observer.execute(_LEDGER)})
        if self.shared:
            return rows, deleted, {row_id for (row_id,) in self._observer.execute(_BORN)}
        return rows, deleted, set(range(1, (self._observer.execute(_LAST_ID).fetchone()[0] or 0) + 1))

    def read_pause(self) -> Pause | None:
        found = [Pause._make(row) for row in self._observer.execute(_PAUSES)]
        return found[0] if found else None

    def observe(self, process: Process, stage: Stage) -> None:
        """Check what the process has just committed."""
        before, deleted, ever_inserted, pause = self.rows, self.deleted, self.ever_inserted, self.pause
        self.rows, self.deleted, self.ever_inserted = self.read()
        self.pause = self.read_pause()
        self.commits += 1
        operation = process.operation
        born = sorted(self.ever_inserted - ever_inserted)
        operation.inserted += len(born)
        gone = [before[row_id] for row_id in before.keys() - self.rows.keys()]
        self._check_conservation()
        if born:
            self._check_born(operation, born)
        if gone or self.deleted != deleted:
            self._check_deleted(operation, gone, born, self.deleted - deleted)
        for row in gone:
            self.holders.pop(row.id, None)
        both = ((old, self.rows.get(row_id)) for row_id, old in before.items())
        changed = [(old, new) for old, new in both if new is not None and new is not old]
        moves = self._check_changed(process, stage, before, changed) if changed else {}
        self._check_pause(process, stage, pause, claimed=len(moves.get("claim", ())))

    # Conservation, and what is deleted

    def _check_conservation(self) -> None:
        there, counted = len(self.rows), self.deleted.total()
        if len(self.ever_inserted) != there + counted:
            raise Violation(
                CONSERVATION,
                f"{len(self.ever_inserted)} were enqueued, {there} are there and {counted} are counted",
            )

    def _check_born(self, operation: Operation, born: list[int]) -> None:
        if operation.kind not in ("enqueue", "session", "foreign"):
            raise Violation(MOVE, f"{operation.kind} inserted rows")
        for row_id in born:
            row = self.rows.get(row_id)
            if row is not None and operation.kind != "foreign":
                expected = row._replace(
                    status="pending", retry_count=0, last_error=None, sent_at_ms=None, revived_at_ms=None,
                    next_attempt_at_ms=row.created_at_ms,
                )  # fmt: skip
                if row != expected or row.created_at_ms not in operation.readings:
                    raise Violation(MOVE, f"enqueue wrote {row}")

    def _check_deleted(
        self, operation: Operation, gone: list[Row], born: list[int], entries: Counter[tuple[str, str, str]]
    ) -> None:
        # Rows that came and went in one transaction were never seen; they are counted as pending.
        unseen = sum(row_id not in self.rows for row_id in born)
        reason = next(iter(entries))[0] if entries else "none"
        seen = Counter((row.status, row.event_type) for row in gone)
        counted = Counter({entry[1:]: events for entry, events in entries.items()})
        if not seen <= counted or counted.total() != seen.total() + unseen:
            raise Violation(CONSERVATION, f"deleted {dict(seen)} and {unseen} new ones, counted {dict(counted)}")
        if operation.kind not in ("enqueue", "flush"):
            raise Violation(MOVE, f"{operation.kind} deleted rows")
        now = operation.now_ms
        for row in gone:
            if row.status == "sending" and row.next_attempt_at_ms > now:
                raise Violation(EXCLUSION, f"at {now} the cap deleted a row in flight: {row}")
        if reason == "retention":
            early = [row for row in gone if row.status != "sent" or (row.sent_at_ms or 0) >= now - WEEK_MS]
            if early or not self.shared:
                raise Violation(CONSERVATION, f"at {now} {early} did not stay for a week")
        elif not self.shared:  # where several are trimmed at once, each leaves what another one holds
            self._check_order_of_cap(gone, now=now, unseen=unseen)
        self.seen.update(f"{reason} {row.status}" for row in gone)

    def _check_order_of_cap(self, gone: list[Row], *, now: int, unseen: int) -> None:
        def deletable(row: Row) -> bool:
            return row.status != "sending" or row.next_attempt_at_ms <= now

        kept = [row for row in self.rows.values() if deletable(row)]
        if len(self.rows) < self.policy.max_rows or (len(self.rows) > self.policy.max_rows and kept):
            raise Violation(CONSERVATION, f"the cap left {len(self.rows)} rows, {len(kept)} of them deletable")

        def place(row: Row) -> tuple[int, int, int]:
            if row.status == "sent":
                return 0, row.sent_at_ms or 0, row.id
            return (1 if row.status == "abandoned" else 2), *row.age

        last = max((place(row) for row in gone), default=(2, 0, 0) if unseen else (0, 0, 0))
        early = [row for row in kept if place(row) < last]
        if early:
            raise Violation(CONSERVATION, f"the cap should have deleted {early[0]} before {gone}")

    # Moves

    def _check_changed(
        self, process: Process, stage: Stage, before: dict[int, Row], changed: list[tuple[Row, Row]]
    ) -> dict[str, set[int]]:
        operation = process.operation
        moves: dict[str, set[int]] = {}
        for old, new in changed:
            found = [trigger for trigger, leads in self._explanations(operation, old) if leads == new]
            if not found:
                self._say_why_not(operation, old, new)
            moves.setdefault(found[0], set()).add(old.id)
            if found[0] in MOVES:
                self._check_against_table(found[0], old, new)
        self._check_choice(operation, before, moves)
        if "claim" in moves:
            operation.claim = {row_id: before[row_id] for row_id in moves["claim"]}
            operation.requests = []
            operation.settlements = 0
        for trigger, ids in moves.items():
            if trigger in ("claim", "renew"):
                operation.lease_ms = self.rows[min(ids)].next_attempt_at_ms
                self.holders.update(dict.fromkeys(ids, operation))
            else:
                for row_id in ids:
                    self.holders.pop(row_id, None)
        self._check_settled_at_once(operation, moves)
        self.seen.update(moves.keys())
        operation.moved.update({trigger: len(ids) for trigger, ids in moves.items()})
        reasons = [(self.rows[row_id].last_error or "").partition(":")[0] for row_id in moves.get("abandon", ())]
        self.seen.update(f"abandon {reason}" for reason in reasons)
        self.seen["take over"] += sum(before[row_id].status == "sending" for row_id in moves.get("claim", ()))
        stage.note(
            process.name, "commits", ", ".join(f"{trigger} {sorted(ids)}" for trigger, ids in moves.items())
        )
        return moves

    def _explanations(self, operation: Operation, old: Row) -> Iterator[tuple[str, Row]]:
        """Yield every trigger that this operation may pull on this row, with what the row must then be."""
        if operation.kind == "flush":
            yield from self._of_flusher(operation, old)
            yield from self._of_owner(operation, old)
        elif operation.kind == "retry_now" and operation.readings:
            now = operation.now_ms
            if old.status == "parked":
                yield "retry_now", old._replace(status="pending", next_attempt_at_ms=now, revived_at_ms=now)
            elif old.status == "pending" and old.next_attempt_at_ms > now:
                yield "retry_now", old._replace(next_attempt_at_ms=now)
        elif operation.kind == "requeue" and old.status == "abandoned" and old.created_at_ms < operation.cutoff_ms:
            now = operation.now_ms
            yield "requeue", _revived(old, now=now, due=now)

    def _of_flusher(self, operation: Operation, old: Row) -> Iterator[tuple[str, Row]]:
        now = operation.now_ms
        lease = now + self.policy.lease_ms
        if self._holds(operation, old):
            yield "renew", old._replace(next_attempt_at_ms=lease)
        if old.status in ("pending", "sending") and old.next_attempt_at_ms <= now:
            yield "claim", old._replace(status="sending", next_attempt_at_ms=lease)
        if old.id in operation.accepted() and old.id in self.server.stored:
            yield "deliver", old._replace(status="sent", sent_at_ms=now)
        if old.status == "parked" and operation.accepted():
            yield "unpark", _revived(old, now=now, due=now + old.id % self.policy.unpark_spread_ms)

    def _of_owner(self, operation: Operation, old: Row) -> Iterator[tuple[str, Row]]:
        """Yield the fenced moves: only who holds the row makes them, with the reason that it was given."""
        if not self._holds(operation, old):
            return
        if operation.troubled:
            yield "release", old._replace(status="pending", next_attempt_at_ms=operation.now_ms)
        abandoned = old._replace(status="abandoned")
        # Where it holds the row by chance only, another one may have counted a failure meanwhile.
        retries = operation.claim[old.id].retry_count if old.id in operation.claim else old.retry_count
        shared = operation.last_failure
        alone = operation.rejected_alone(old.id)
        # The verdict is formed at one reading of the clock; another one may follow before it is written.
        for now in operation.readings[-2:]:
            yield from self._of_shared_failure(old, shared, now, retries)
            for failure in alone:
                if not operation.accepted():
                    yield from self._put_off(old, failure, now, retry_count=retries + 1)
        if is_auth(shared):
            yield "park", old._replace(status="parked", last_error=str(shared))
        if not old.decodable:
            yield "abandon", abandoned._replace(last_error=self.rows[old.id].last_error)
        decodable = [row for row in operation.claim.values() if row.decodable]
        if operation.accepted() or len(decodable) == 1:
            for failure in alone:
                yield "abandon", abandoned._replace(last_error=f"permanent: {failure}")

    def _holds(self, operation: Operation, row: Row) -> bool:
        if row.status != "sending":
            return False
        if self.holders.get(row.id) is operation:
            return True
        # The lease is a time. Where clocks differ, a row may pass through other hands and come under the very
        # lease of who lost it; where they agree, it can't, for each taker's lease lies behind the last one.
        by_chance = not self.equal_clocks and row.id in operation.claim
        by_chance = by_chance and row.next_attempt_at_ms == operation.lease_ms
        self.seen["same lease twice"] += by_chance
        operation.by_chance |= by_chance
        return by_chance

    def _of_shared_failure(
        self, old: Row, failure: UploadFailure | None, now: int, retries: int
    ) -> Iterator[tuple[str, Row]]:
        if is_transient(failure):
            yield from self._put_off(old, failure, now, retry_count=retries + 1)
        elif is_rate_limit(failure):
            yield from self._put_off(old, failure, now, retry_count=retries)

    def _put_off(
        self, old: Row, failure: UploadFailure | None, now: int, *, retry_count: int
    ) -> Iterator[tuple[str, Row]]:
        asked_ms = getattr(failure, "retry_after_ms", None)
        limited = is_rate_limit(failure)
        if now - old.gave_chance_at() > WEEK_MS:
            aged_out = "aged-out (rate-limited)" if limited else "aged-out"
            yield "abandon", old._replace(status="abandoned", last_error=f"{aged_out}: {failure}")
            return
        delay = asked_ms or 60_000 if limited else 60_000 << min(retry_count, 5)
        if not limited and getattr(failure, "status", None) == 503:
            delay = max(delay, asked_ms or 0)
        due = now + delay + (now ^ old.id) % max(1, delay // 4)
        yield (
            "reschedule",
            old._replace(
                status="pending", retry_count=retry_count, next_attempt_at_ms=due, last_error=str(failure)
            ),
        )

    def _check_against_table(self, trigger: str, old: Row, new: Row) -> None:
        move = MOVES[trigger]
        if old.status not in move.sources or new.status != move.destination:
            raise Violation(MOVE, f"{trigger} is no move from {old.status} to {new.status}")

    def _check_choice(self, operation: Operation, before: dict[int, Row], moves: dict[str, set[int]]) -> None:
        """Check that a move that chooses its rows chose the right ones, and all of them."""
        expected: dict[str, list[Row]] = {}
        if "claim" in moves:
            now = operation.now_ms
            due = [
                r for r in before.values() if r.status in ("pending", "sending") and r.next_attempt_at_ms <= now
            ]
            expected["claim"] = sorted(due, key=lambda row: row.age)[: self.policy.batch_size]
        if "unpark" in moves:
            parked = [row for row in before.values() if row.status == "parked"]
            expected["unpark"] = sorted(parked, key=lambda row: row.age)[: self.policy.unpark_limit]
        if {"retry_now", "requeue"} & moves.keys():
            (trigger,) = moves
            expected[trigger] = [row for row in before.values() if any(self._explanations(operation, row))]
        if self.shared:
            # Each leaves what others hold, and does not see what they will commit.
            if len(moves.get("claim", ())) > self.policy.batch_size:
                raise Violation(MOVE, f"claimed {sorted(moves['claim'])}, more than a batch")
            return
        for trigger, rows in expected.items():
            if moves[trigger] != {row.id for row in rows}:
                raise Violation(
                    MOVE, f"{trigger} took {sorted(moves[trigger])}, due were {[row.id for row in rows]}"
                )

    def _check_settled_at_once(self, operation: Operation, moves: dict[str, set[int]]) -> None:
        settled = {trigger for trigger in moves if trigger in ("deliver", "reschedule", "park", "abandon")}
        undecodable = any(not self.rows[row_id].decodable for row_id in moves.get("abandon", ()))
        if settled and not undecodable:
            operation.settlements += 1
            # What is repeated, for its commit was lost, lands again only on a row that it holds by chance.
            if operation.settlements > 1 and not operation.by_chance:
                raise Violation(ATOMICITY, f"a second transaction for one answer: {moves}")

    def _say_why_not(self, operation: Operation, old: Row, new: Row) -> None:
        what = (
            f"{operation.kind} turned {old} into {new} with {operation.requests}, clock {operation.readings[-2:]}"
        )
        if new.status == "sent" and old.status != "sent":
            raise Violation(ACCEPTANCE, what)
        if old.status == "sending" and not self._holds(operation, old):
            raise Violation(EXCLUSION, what)
        if new.status == "abandoned":
            raise Violation(ABANDONMENT, what)
        raise Violation(MOVE, what)

    # Pauses

    def transaction_begins(self, operation: Operation) -> None:
        operation.unpaused = self.pause is None

    def _check_pause(self, process: Process, stage: Stage, old: Pause | None, *, claimed: int) -> None:
        operation = process.operation
        new = self.pause
        if claimed:
            operation.probe, operation.probe_until_ms = None, 0
        if new != old:
            told = Pause(DESTINATION) if old is None else old
            found = [name for name, leads in self._explanations_of_pause(operation, told, claimed) if leads == new]
            if not found:
                raise Violation(
                    PAUSE, f"{operation.kind} turned {old} into {new}, clock {operation.readings[-2:]}"
                )
            if found[0] == "probe":
                operation.probe, operation.probe_until_ms = old, operation.now_ms + self.policy.lease_ms
            self.seen[found[0]] += 1
            stage.note(process.name, f"commits {found[0]}", new or "")
            if new is None:
                for one in stage.processes:
                    one.operation.unpaused = True
        if claimed and not operation.unpaused and operation.probe is None:
            raise Violation(PAUSE, f"{process.name} claimed {claimed} rows in spite of {old}")
        if operation.probe is not None and claimed > PROBE_SIZE:
            raise Violation(PAUSE, f"{process.name} probes with {claimed} rows")

    def _explanations_of_pause(
        self, operation: Operation, old: Pause, claimed: int
    ) -> Iterator[tuple[str, Pause | None]]:
        if operation.kind == "retry_now":
            yield "end of all pauses", None
        if operation.kind != "flush":
            return
        now = operation.now_ms
        if old.failures and old.until_ms <= now:
            # One that finds nothing to send ends in the same transaction.
            yield ("probe", old._replace(probe_until_ms=now + self.policy.lease_ms if claimed else 0))
        if old.probe_until_ms == operation.probe_until_ms and (operation.troubled or not operation.requests):
            yield "end of probe", old._replace(probe_until_ms=0)
        if not operation.requests:
            return
        failure = operation.last_failure
        seen = operation.probe.failures if operation.probe else 0
        is_latest = old.failures == seen
        if not (is_transient(failure) or is_rate_limit(failure)):
            if operation.probe and is_latest:
                yield "resume", None
            return
        asked_ms = getattr(failure, "retry_after_ms", None) or 0
        if is_rate_limit(failure):
            delay = asked_ms or 60_000
        else:
            delay = max(1_000 << min(seen, 6), asked_ms if getattr(failure, "status", None) == 503 else 0)
        yield (
            "pause" if is_latest else "late pause",
            old._replace(
                failures=max(old.failures + is_latest, 1),
                paused_until_ms=max(old.paused_until_ms, now + delay),
                probe_until_ms=0 if is_latest else old.probe_until_ms,
                last_error=str(failure),
            ),
        )

    # Beside the table

    def upload_starts(self, process: Process, stage: Stage) -> None:
        """Check that nobody else is uploading the same rows under a lease that still runs."""
        mine = process.operation
        if not self.equal_clocks or mine.lease_ms <= stage.now_ms:
            return
        for other in stage.processes:
            theirs = other.operation
            probing = mine.probe_until_ms > stage.now_ms < theirs.probe_until_ms
            if other is not process and theirs.uploading and probing and not other.doomed:
                raise Violation(PAUSE, f"{process.name} and {other.name} both probe")
            if other is not process and theirs.uploading and theirs.lease_ms > stage.now_ms and not other.doomed:
                shared = set(mine.requests[-1].ids) & set(theirs.requests[-1].ids)
                if shared:
                    raise Violation(EXCLUSION, f"{process.name} and {other.name} both upload {sorted(shared)}")

    def flushed(self, operation: Operation, report: FlushReport) -> None:
        """Check what a flush reports, and that it recorded what it saw accepted."""
        self.seen["lost lease"] += report.lost_leases
        outcomes = report.sent + report.rescheduled + report.parked + report.abandoned + report.lost_leases
        if outcomes != report.claimed:
            raise Violation(REPORT, f"{report.claimed} were claimed, {outcomes} have an outcome")
        if report.paused_until_ms is not None and report.paused_until_ms <= operation.now_ms:
            raise Violation(REPORT, f"at {operation.now_ms} it is paused until {report.paused_until_ms}")
        told = {"reschedule": report.rescheduled, "park": report.parked, "abandon": report.abandoned}
        for trigger, count in told.items():
            self.moved(operation, trigger, count)
        forgotten = [
            row_id for row_id in operation.accepted() if row_id in self.rows and self.rows[row_id].status != "sent"
        ]
        if forgotten:
            raise Violation(ACCEPTANCE, f"{forgotten} were accepted, and are not sent")

    def moved(self, operation: Operation, trigger: str, count: int) -> None:
        """Check how many rows an operation says that it moved."""
        # Nobody who did not learn of a commit can tell what it did.
        if operation.moved[trigger] != count and not operation.commit_lost:
            raise Violation(
                REPORT, f"{trigger} of {count} rows is reported, of {operation.moved[trigger]} was done"
            )

    def enqueued(self, ids: list[int]) -> None:
        """Check that what enqueue returned is durable."""
        for row_id in ids:
            if row_id not in self.ever_inserted:
                raise Violation(LOSS, f"enqueue returned {row_id}, which was not committed")

    def undelivered(self) -> list[Row]:
        """Return the rows that ought to be delivered once nothing fails."""
        waiting = ("pending", "sending", "parked")
        return [row for row in self.rows.values() if row.status in waiting and not row.poison and row.decodable]


def _revived(old: Row, *, now: int, due: int) -> Row:
    return old._replace(
        status="pending", retry_count=0, last_error=None, next_attempt_at_ms=due, revived_at_ms=now
    )
