"""The rows of one claim, from the lease to their outcomes."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from outbox import maintenance, outcomes, reasons, tracing
from outbox.clock import monotonic_s
from outbox.decisions import abandonment
from outbox.destinations import shown
from outbox.events import check_payload, decode
from outbox.failures import ConfigurationError, InvalidEvent, OutboxError, UploadFailure, check_failure
from outbox.hooks import Hooks, Settlement, Upload, tell
from outbox.lifecycle import Status, StatusOnly, fire
from outbox.outcomes import Outcome
from outbox.pauses import ClaimResult, SharedPause
from outbox.policy import Policy, verdict
from outbox.records import LOST_LEASES_ALONE, BatchItem, Claim, FlushReport, UploadClient
from outbox.search import Search
from outbox.storage.claims import SettleResult
from outbox.storage.pauses import Changed
from outbox.storage.store import Store
from outbox.tries import Failed, failed
from outbox.upload.custom import failures_of, requests_failure
from outbox.upload.redaction import client_error, without_credentials

log = logging.getLogger("outbox")


class HeldClaim:
    """The rows of one claim, from the lease to their outcomes.

    This object owns everything that threads share during a flush. One thread flushes, and another may call
    `let_go` at any time. The lock guards the lease, the rows without an outcome, and the counts. It is held while
    outcomes are written. It is reentrant, because an exception from another thread may occur just before the lock
    is released. Only the flushing thread writes the other fields, each with a single assignment, so they need no
    lock. If `let_go` reads `_accepted` too early, the flushing thread still records the delivery, because a
    delivery needs no lease.
    """

    def __init__(
        self, store: Store, policy: Policy, client: UploadClient, claimed: Claim, lease_until_ms: int
    ) -> None:
        self._store, self._policy, self._client = store, policy, client
        self.destination = claimed.destination
        self._rows, self._invalid, self._due_at_ms = claimed.rows, claimed.invalid, claimed.due_at_ms
        self._created_at_ms = {row.id: row.created_at_ms for row in claimed.rows}
        self._pause = claimed.pause
        self._probe_lease_ms = lease_until_ms if claimed.is_probe else None
        self._failed: dict[int, Failed] = {}
        """How the last request with a row failed, by id."""
        self.ended_failures = 0
        """Number of failures in a row of the destination that an acceptance of this claim ended."""
        # The first exception of the client that is no `UploadFailure`.
        self._bug: Exception | None = None
        self._lock, self._lease_until_ms = threading.RLock(), lease_until_ms
        # Rows without an outcome, and rows that the service accepted and the database does not show as sent yet.
        self._open = {row.id for row in claimed.rows}
        self._accepted: list[int] = []
        self._landed: Counter[str] = Counter()
        self._lost_leases = self.sent = 0
        """Number of rows that the service accepted."""
        self.chores_row: tuple[Any, ...] | None = None
        """The row of the query for chores, if the last settlement ran that query."""
        self._news: list[Upload | Settlement] = []

    def take_batch(self, *, one_by_one: bool = False) -> list[BatchItem]:
        """Return the rows of the first request. Abandon invalid rows, and release rows that are not in it.

        With `one_by_one`, each row gets a request of its own, so all fit.
        """
        check = decode if self._policy.is_original else check_payload
        batch = []
        undecodable = dict(self._invalid)
        for row in self._rows:
            if row.id not in undecodable:
                try:
                    check(row.payload_json)
                    batch.append(row)
                except InvalidEvent as error:
                    undecodable[row.id] = str(error)
        found = [(row_id, abandonment(reasons.undecodable(why))) for row_id, why in undecodable.items()]
        if not (one_by_one or self._policy.is_original):
            # A claim finds such a row among others if a program that does not know this column rescheduled it.
            batch.sort(key=lambda row: row.lost_leases < LOST_LEASES_ALONE)
        size = len(batch) if one_by_one else self._fitting(batch)
        found += [(row.id, outcomes.release(next_attempt_at_ms=self._due_at_ms[row.id])) for row in batch[size:]]
        self.settle(found)
        return batch[:size]

    def _fitting(self, batch: list[BatchItem]) -> int:
        """Return how many of the first rows go into one request, by the client's `fit`. If that fails: all."""
        fit = getattr(self._client, "fit", None) or len
        if len(batch) <= 1 or self._policy.is_original:
            return len(batch)
        if batch[0].lost_leases >= LOST_LEASES_ALONE:
            return 1
        try:
            size = fit(tuple(batch))
        except Exception as error:  # noqa: BLE001 - the flush raises it once the rows are settled
            # If one event is the cause, its upload fails, too, and the search finds the event.
            self._bug = error
            return len(batch)
        if not isinstance(size, int) or size < 1:
            self._bug = ConfigurationError(f"fit() returned {size!r}, expected a whole number of at least 1")
            return len(batch)
        return size

    def next_part(self, search: Search[BatchItem]) -> tuple[BatchItem, ...]:
        """Return the rows of the next request. First renew the lease if an eighth of it has passed."""
        now = self._store.now_ms()
        with self._lock:
            if self._lease_until_ms - now < self._policy.lease_ms * 7 // 8 and self._open:
                held, self._lease_until_ms = self._store.claims.renew(
                    self._open, lease_until_ms=self._lease_until_ms, for_ms=self._policy.lease_ms
                )
                self._lost_leases += len(self._open) - len(held)
                self._open = held
            gone = self._created_at_ms.keys() - self._open
        if gone:
            search.drop(gone, now_ms=now)
        return search.next_part()

    def send(self, part: tuple[BatchItem, ...], search: Search[BatchItem]) -> None:
        """Send one request, let the search judge the answer, and settle what it decides."""
        begun_s = monotonic_s()
        with tracing.upload_span(part, self.destination, self._client) as span:
            answer = self._upload(part)
            duration_ms = (monotonic_s() - begun_s) * 1_000
            span.answered(answer, self._policy, partial(without_credentials, client=self._client))
            self._judge(part, answer, search, duration_ms)
            decided = search.take_outcomes()
            span.decided(decided)
        self.settle(decided)

    def _judge(
        self,
        part: tuple[BatchItem, ...],
        answer: UploadFailure | dict[int, UploadFailure],
        search: Search[BatchItem],
        duration_ms: float,
    ) -> None:
        failure = answer if isinstance(answer, UploadFailure) else None
        now = self._store.now_ms()
        judged, why = (None, None) if failure is None else (verdict(failure, self._policy), str(failure))
        self._news.append(Upload(len(part), duration_ms, judged, why, shown(self.destination)))
        if not answer:
            search.accepted(part, now_ms=now)
            return
        ids = [item.id for item in part]
        self._failed |= failed(ids, answer, now_ms=now, duration_ms=duration_ms, policy=self._policy)
        accepted_at_ms = None if self._policy.is_original else self._store.views.last_accepted_ms(self.destination)
        if isinstance(answer, UploadFailure):
            search.rejected(part, answer, now_ms=now, accepted_at_ms=accepted_at_ms)
        else:
            search.answered(part, answer, now_ms=now, accepted_at_ms=accepted_at_ms)

    def _upload(self, part: tuple[BatchItem, ...]) -> UploadFailure | dict[int, UploadFailure]:
        """Upload the part. Return its failure, or failures of single rows by id: none if all were accepted."""
        try:
            try:
                answered = self._client.upload(part)
                failures = failures_of(answered, part)
                for named in failures.values():
                    check_failure(named)  # an invalid failure is a bug, too
            except UploadFailure as failure:
                check_failure(failure)  # an invalid failure is a bug, too
                return failure
        except Exception as error:  # noqa: BLE001 - the flush raises it once the rows are settled
            known = requests_failure(error, self._client)
            if known is not None:
                return known
            self._bug = self._bug or error
            return client_error(error, self._client)
        self._accepted = [item.id for item in part if item.id not in failures]
        return failures

    def settle(self, decided: list[tuple[int, Outcome]]) -> None:
        """Write outcomes in one transaction. Drop and count those of rows that another flusher owns."""
        if not decided:
            return
        with self._lock:
            # A delivery is also recorded for a row that was released meanwhile.
            ours = [settled for settled in decided if settled[1].trigger == "deliver" or settled[0] in self._open]
            row_ids = {row_id for row_id, _ in ours}
            is_troubled = bool(self._failed or self._pause.failures or self._pause.until_ms)
            with_chores = self._open <= row_ids and not is_troubled  # else the pause ends first
            landed, self.chores_row = self._record(ours, with_chores=with_chores)
            self._open -= row_ids
            self._landed += landed
            self._news.append((ours, landed))
            delivered = sum(outcome.trigger == "deliver" for _, outcome in ours)
            self._lost_leases += len(ours) - delivered - (landed.total() - landed["deliver"])
            self.sent += delivered
        self._accepted = []
        if delivered and is_troubled:
            self.end_pause()

    def raise_bug(self, later: BaseException | None = None) -> None:
        """Raise the client's exception, if there was one, unless the later exception is an interrupt."""
        if self._bug is not None and (later is None or isinstance(later, OutboxError)):
            raise self._bug

    def end_pause(self) -> None:
        """End the pause of the destination, because the service accepted a row."""
        if self._policy.is_original:
            return
        changed = self._change_pause("resuming", lambda pause: pause.when_accepted(seen=self._pause.number))
        if changed is not None:
            self.ended_failures = max(self.ended_failures, changed.before.failures)

    def end(self, result: ClaimResult) -> int | None:
        """Share the result of the claim with all flushers. Return when the destination's pause ends, or None."""
        if self._policy.is_original or (result.failure is None and self._probe_lease_ms is None):
            return None
        now = self._store.now_ms()

        def rule(pause: SharedPause) -> SharedPause:
            return pause.trusted(now).when_done(
                result,
                seen=self._pause.number,
                probe_lease_ms=self._probe_lease_ms,
                now_ms=now,
                policy=self._policy,
            )

        changed = self._change_pause("pausing", rule)
        until_ms = 0 if changed is None else changed.after.holds_until_ms
        return until_ms if until_ms > now else None

    def _change_pause(self, what: str, rule: Callable[[SharedPause], SharedPause]) -> Changed | None:
        return maintenance.attempt(what, lambda: self._store.pauses.change(self.destination, rule))

    def report(self, search: Search[BatchItem], paused_until_ms: int | None, *, attempted: int) -> FlushReport:
        """Return the report of the flush."""
        result = search.result
        is_over = search.verdict is not None if self._policy.is_original else result.is_failure
        return FlushReport(
            claimed=len(self._rows) - self._landed["release"],
            attempted=attempted,
            sent=self.sent,
            rescheduled=self._landed["reschedule"],
            parked=self._landed["park"],
            abandoned=self._landed["abandon"],
            lost_leases=self._lost_leases,
            verdict=search.verdict,
            failure=None if result.failure is None else str(result.failure),
            paused_until_ms=paused_until_ms,
            goes_on=paused_until_ms is None and (result.is_lone_failure or not is_over),
        )

    def let_go(self) -> None:
        """Record the accepted rows as sent, and release the others.

        The flushing thread then finds nothing left to send. If its current request is accepted, the delivery is
        still recorded.
        """
        with self._lock:
            given_back, self._open = self._open, set()
            self._give_back(given_back)
        if self._probe_lease_ms is not None:
            self.end(ClaimResult(0, 0, None, is_lone_failure=False))

    def _give_back(self, given_back: set[int]) -> None:
        try:
            now = self._store.now_ms()
            decided = [(row.id, self._last_outcome(row, now)) for row in self._rows if row.id in given_back]
            self._news.append((decided, self._record(decided).landed))
        except OutboxError as error:
            rows = [row for row in self._rows if row.id in given_back]
            log.warning(
                "releasing %d events failed, their lease will run out: %s",
                len(rows),
                error,
                extra={
                    "event_name": "outbox.release_failed",
                    "destination": shown(self.destination),
                    "events": len(rows),
                    "row_ids": [row.id for row in rows],
                    "event_ids": [row.event_id for row in rows],
                },
            )

    def _last_outcome(self, row: BatchItem, now_ms: int) -> Outcome:
        if row.id in self._accepted:
            return outcomes.deliver(sent_at_ms=now_ms)
        return outcomes.release(next_attempt_at_ms=now_ms)

    def _record(self, decided: list[tuple[int, Outcome]], *, with_chores: bool = False) -> SettleResult:
        for _, outcome in decided:
            if outcome.trigger != "deliver":  # the delivered rows of a batch are one UPDATE
                fire(StatusOnly(Status.SENDING), outcome.trigger)
        views, now = self._store.views, self._store.now_ms()
        return self._store.claims.settle(
            decided,
            query=views.chores_query(self._policy, self.destination, now_ms=now) if with_chores else None,
            lease_until_ms=self._lease_until_ms,
            created_at_ms=self._created_at_ms,
            destination=self.destination,
            failed=self._failed,
            # Asked only after a failure, because it looks at every row.
            may_have_tries=bool(self._failed)
            and any(row.waits_for is not None or row.revived_at_ms is not None for row in self._rows),
        )

    def tell(self, hooks: Sequence[Hooks]) -> None:
        """Report the outcomes. Called after the leases, so that a slow hook can't outlast one."""
        with self._lock:
            news, lost_leases = tuple(self._news), self._lost_leases
        tell(hooks, self._rows, news, lost_leases, self.destination)
