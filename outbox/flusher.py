"""Claim, upload, settle; and the isolation of what the server rejects. Rules are in policy, SQL is in store."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from outbox import capture, maintenance
from outbox.events import Event, check_types, decode
from outbox.failures import ConfigurationError, InvalidEvent, OutboxError, UploadFailure
from outbox.hooks import Hooks, Settlement, Upload, tell
from outbox.models import LONGEST_NAME
from outbox.policy import Outcome, Policy, Verdict, abandonment, as_last_error, decide, pause_ms, verdict
from outbox.store import Claim, Store

log = logging.getLogger("outbox")

_ONE_BY_ONE = 8
"""A claim of up to this many rows is isolated row by row to its end."""

_PROBE_SIZE = 8
"""How many rows are sent to see whether a paused destination works again."""


class BatchItem(NamedTuple):
    """One event of an upload."""

    id: int
    event_type: str
    payload_json: str
    retry_count: int
    created_at_ms: int
    revived_at_ms: int | None
    event: Event


class UploadClient(Protocol):
    """What takes events to the server.

    A client that can bound its uploads says so in an attribute `deadline_ms`, at most three quarters of the lease.
    One that names the service in an attribute `destination` shares its pauses: on a database server, what one
    flusher learns of a service that is down or asks to slow down holds for the flushers of all hosts.
    """

    @property
    def logged_in(self) -> bool:
        """Whether it makes sense to try; a flush without leaves everything as it is."""
        ...

    def upload(self, batch: tuple[BatchItem, ...], /) -> None:
        """Deliver the whole batch or raise an `UploadFailure`. Anything else that it raises is taken for a bug."""
        ...


@dataclass(frozen=True)
class FlushReport:
    """What one flush did, in numbers of events; reports add up."""

    claimed: int = 0
    attempted: int = 0
    """Claimed, and their payload could be decoded."""
    sent: int = 0
    rescheduled: int = 0
    parked: int = 0
    abandoned: int = 0
    lost_leases: int = 0
    """Rows that had another owner when their outcome was to be written; it was dropped."""
    verdict: Verdict | None = None
    """The verdict that held for the whole batch, where one did: no use in flushing on at once."""
    failure: str | None = None
    """The text of the last failure, or of the one that a pause is for."""
    paused_until_ms: int | None = None
    """Until then nothing is sent: the service failed, or asked to slow down, and this holds for all hosts."""

    def __add__(self, other: FlushReport) -> FlushReport:
        return FlushReport(
            self.claimed + other.claimed,
            self.attempted + other.attempted,
            self.sent + other.sent,
            self.rescheduled + other.rescheduled,
            self.parked + other.parked,
            self.abandoned + other.abandoned,
            self.lost_leases + other.lost_leases,
            other.verdict,
            other.failure or self.failure,
            other.paused_until_ms,
        )


def flush(
    store: Store,
    policy: Policy,
    client: UploadClient,
    on_claim: Callable[[Callable[[], None]], object] | None = None,
    *,
    hooks: Sequence[Hooks] = (),
) -> FlushReport:
    """Send one batch.

    An exception that is no `UploadFailure`, KeyboardInterrupt too, releases the rows and reaches the caller.
    `on_claim` is given what releases them early, which another thread may call at any time.
    """
    if capture.is_off() or not client.logged_in:
        return FlushReport()
    _refuse_long_deadline(policy, client)
    check_types()
    now = store.now_ms()
    lease_ms = now + policy.lease_ms
    claimed = store.claim(
        now_ms=now,
        lease_ms=lease_ms,
        batch_size=policy.batch_size,
        destination=_destination(client),
        probe_size=_PROBE_SIZE,
    )
    if not claimed.rows:
        maintenance.tidy(store, policy, now_ms=now, is_delivering=False)
        if claimed.pause is not None and claimed.pause.until_ms > now:
            return FlushReport(failure=claimed.pause.last_error, paused_until_ms=claimed.pause.until_ms)
        return FlushReport()
    claim = _Claim(store, policy, client, claimed, lease_ms)
    try:
        if on_claim is not None:
            on_claim(claim.let_go)
        return claim.work_off()
    except BaseException:
        claim.let_go()
        raise
    finally:
        claim.tell(hooks)


def flush_all(
    store: Store,
    policy: Policy,
    client: UploadClient,
    progress: Callable[[FlushReport], object] | None,
    *,
    hooks: Sequence[Hooks] = (),
) -> FlushReport:
    """Flush batch after batch until nothing is due or a verdict holds for all; call `progress` after each."""
    total = FlushReport()
    while True:
        report = flush(store, policy, client, hooks=hooks)
        total += report
        if report.claimed == 0:
            return total
        if progress is not None:
            progress(report)
        if report.verdict is not None:
            return total


def _refuse_long_deadline(policy: Policy, client: UploadClient) -> None:
    deadline_ms = getattr(client, "deadline_ms", None)
    at_most = policy.lease_ms * 3 // 4
    if isinstance(deadline_ms, int) and deadline_ms > at_most:
        raise ConfigurationError(
            f"the client's deadline_ms is {deadline_ms}, expected at most {at_most}:"
            f" three quarters of the policy's lease_ms {policy.lease_ms}, or an upload could outlast its lease"
        )


def _destination(client: UploadClient) -> str | None:
    destination = getattr(client, "destination", None)
    return None if destination is None else str(destination)[:LONGEST_NAME]


class _Claim:
    """The rows of one claim, from the lease to their outcomes."""

    # Bound in the class: tools that freeze time replace the names in modules.
    _clock = staticmethod(time.monotonic)

    def __init__(self, store: Store, policy: Policy, client: UploadClient, claimed: Claim, lease_ms: int) -> None:
        self._store = store
        self._policy = policy
        self._client = client
        self._rows = claimed.rows
        self._pause = claimed.pause
        self._destination = _destination(client)
        self._tried = False
        self._lease_ms = self._first_lease_ms = lease_ms
        # Rows without an outcome; and what the server took and the database does not know yet.
        self._open = {row.id for row in claimed.rows}
        self._accepted: list[int] = []
        self._sent = 0
        self._landed: Counter[str] = Counter()
        self._lost_leases = 0
        self._news: list[Upload | Settlement] = []

    def work_off(self) -> FlushReport:
        batch = self._decode()
        judged, failure = self._deliver(batch)
        self._pass_on(failure)
        now = self._store.now_ms()
        maintenance.tidy(self._store, self._policy, now_ms=now, is_delivering=self._sent > 0)
        return FlushReport(
            claimed=len(self._rows),
            attempted=len(batch),
            sent=self._sent,
            rescheduled=self._landed["reschedule"],
            parked=self._landed["park"],
            abandoned=self._landed["abandon"],
            lost_leases=self._lost_leases,
            verdict=judged,
            failure=None if failure is None else str(failure),
        )

    def let_go(self) -> None:
        """Record what the server took, for that is a fact, and give back the rest.

        Whoever works on the claim finds nothing left to send; what is being sent meanwhile is still recorded.
        """
        given_back, self._open = self._open, set()
        try:
            now = self._store.now_ms()
            released = Outcome("release", {"next_attempt_at_ms": now})
            delivered = Outcome("deliver", {"sent_at_ms": now})
            outcomes = [(row_id, delivered if row_id in self._accepted else released) for row_id in given_back]
            self._news.append((outcomes, self._store.settle(outcomes, lease_ms=self._lease_ms)))
        except OutboxError as error:
            log.warning(
                "releasing %d events failed, their lease will run out: %s",
                len(given_back),
                error,
                extra={
                    "event_name": "outbox.release_failed",
                    "events": len(given_back),
                    "event_ids": sorted(given_back),
                },
            )
        self._end_probe()

    def tell(self, hooks: Sequence[Hooks]) -> None:
        """Tell what became of the rows, when no lease runs any more that a slow hook could outlast."""
        tell(hooks, self._rows, self._news, self._lost_leases)

    def _decode(self) -> list[BatchItem]:
        batch = []
        undecodable = []
        for row in self._rows:
            try:
                batch.append(BatchItem(*row, decode(row.payload_json)))
            except InvalidEvent as error:
                undecodable.append((row.id, abandonment(f"permanent: decode observation event: {error}")))
        self._settle(undecodable)
        return batch

    def _deliver(self, batch: list[BatchItem]) -> tuple[Verdict | None, UploadFailure | None]:
        """Upload the batch and settle it; return the last failure, and its verdict if that held for all rows."""
        held = self._keep(batch)
        if not held:
            return None, None
        failure = self._upload(held)
        if failure is None:
            self._settle_accepted()
            return None, None
        judged = verdict(failure)
        if judged is Verdict.PERMANENT:
            return self._isolate(batch)
        self._settle(self._judge(judged, ((item, failure) for item in batch)))
        return judged, failure

    def _isolate(self, batch: list[BatchItem]) -> tuple[Verdict | None, UploadFailure | None]:
        """Find the rows that the server rejects: one by one until it accepts something, then by halving.

        A rejection counts against a row only once the server was seen to accept another one of the claim. Until
        then the row is a candidate; if nothing is accepted, the route or the schema drifted, not the rows.
        """
        parts = [[item] for item in reversed(batch)]  # a stack: the next part is the last
        candidates: list[tuple[BatchItem, UploadFailure]] = []
        failure: UploadFailure | None = None
        while parts:
            part = self._keep(parts.pop())
            if not part:
                continue
            failed = self._upload(part)
            if failed is None:
                if not self._sent and len(batch) > _ONE_BY_ONE:
                    parts = [[item for single in reversed(parts) for item in single]]
                self._settle_accepted(self._judge(Verdict.PERMANENT, candidates))
                candidates = []
                continue
            failure = failed
            judged = verdict(failure)
            if judged is not Verdict.PERMANENT:
                self._settle(self._judge(judged, [(item, failure) for item in batch]))
                return judged, failure
            if len(part) > 1:
                half = len(part) // 2
                parts += [part[half:], part[:half]]
            elif self._sent or len(batch) == 1:
                self._settle(self._judge(Verdict.PERMANENT, [(part[0], failure)]))
            else:
                candidates.append((part[0], failure))
        if not candidates:
            return None, failure
        self._settle(self._judge(Verdict.TRANSIENT, candidates))
        return Verdict.TRANSIENT, failure

    def _keep(self, items: list[BatchItem]) -> list[BatchItem]:
        """Renew the lease where an eighth of it is gone; return the items that are still ours."""
        now = self._store.now_ms()
        if self._lease_ms - now < self._policy.lease_ms * 7 // 8 and self._open:
            held, self._lease_ms = self._store.renew(
                self._open, lease_ms=self._lease_ms, for_ms=self._policy.lease_ms
            )
            self._count_lost(len(self._open) - len(held))
            self._open = held
        return [item for item in items if item.id in self._open]

    def _pass_on(self, failure: UploadFailure | None) -> None:
        """Let the flushers of all hosts know how the destination does."""
        destination, known = self._destination, self._pause
        if destination is None:
            return
        if not self._tried:
            self._end_probe()
            return
        seen = 0 if known is None else known.failures
        duration_ms = None if failure is None else pause_ms(failure, seen, self._policy)
        if duration_ms is not None:
            until_ms, last_error = self._store.now_ms() + duration_ms, as_last_error(str(failure))
            maintenance.attempt(
                "pausing",
                lambda: self._store.pause(destination, seen=seen, until_ms=until_ms, last_error=last_error),
            )
        elif known is not None:
            maintenance.attempt("resuming", lambda: self._store.resume(destination, seen=seen))

    def _end_probe(self) -> None:
        known = self._pause
        if known is not None:
            maintenance.attempt(
                "ending the probe of",
                lambda: self._store.end_probe(known.destination, lease_ms=self._first_lease_ms),
            )

    def _upload(self, batch: list[BatchItem]) -> UploadFailure | None:
        begun_s = self._clock()
        failure = self._send(batch)
        duration_ms = (self._clock() - begun_s) * 1_000
        judged, text = (None, None) if failure is None else (verdict(failure), str(failure))
        self._news.append(Upload(len(batch), duration_ms, judged, text))
        return failure

    def _send(self, batch: list[BatchItem]) -> UploadFailure | None:
        self._tried = True
        try:
            self._client.upload(tuple(batch))
        except UploadFailure as failure:
            return failure
        self._accepted = [item.id for item in batch]
        return None

    def _judge(
        self, judged: Verdict, failed: Iterable[tuple[BatchItem, UploadFailure]]
    ) -> list[tuple[int, Outcome]]:
        now = self._store.now_ms()
        return [
            (item.id, decide(judged, failure, item, now_ms=now, policy=self._policy))
            for item, failure in failed
            if item.id in self._open
        ]

    def _settle_accepted(self, others: Iterable[tuple[int, Outcome]] = ()) -> None:
        delivered = Outcome("deliver", {"sent_at_ms": self._store.now_ms()})
        self._settle([*((row_id, delivered) for row_id in self._accepted), *others])
        self._sent += len(self._accepted)
        self._accepted = []

    def _settle(self, outcomes: list[tuple[int, Outcome]]) -> None:
        """Write outcomes in one transaction. Those of rows with another owner are dropped, and counted."""
        landed = self._store.settle(outcomes, lease_ms=self._lease_ms)
        self._open -= {row_id for row_id, _ in outcomes}
        self._landed += landed
        self._news.append((outcomes, landed))
        fenced = sum(outcome.trigger != "deliver" for _, outcome in outcomes)
        self._count_lost(fenced - (landed.total() - landed["deliver"]))

    def _count_lost(self, lost: int) -> None:
        self._lost_leases += lost
