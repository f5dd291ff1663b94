"""The life of a claim in the database: take rows under a lease, renew the lease, settle the outcomes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from types import MappingProxyType
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Engine, bindparam, update

from outbox import outcomes
from outbox.destinations import DEFAULT_DESTINATION
from outbox.failures import OutcomeUnknown, StorageError
from outbox.lifecycle import Status
from outbox.outcomes import Outcome
from outbox.pauses import SharedPause
from outbox.records import Claim
from outbox.storage.claimed import Delivery, Kind, OneRowQuery, Wanted
from outbox.storage.counts import Counts
from outbox.storage.dialects import dialect_of
from outbox.storage.holds import hold_of
from outbox.storage.identity import Identity
from outbox.storage.pauses import begin_probe, pause_and_hold, write_pause
from outbox.storage.sql import (
    by_id,
    events,
    held,
    is_one_of,
    move_held,
    this_row,
    unindexed_status,
)
from outbox.storage.transactions import OutOfPatienceError, Transaction, Writer, read
from outbox.storage.tries import record
from outbox.tries import Failed

RENEW = by_id(
    update(events)
    .where(this_row, is_one_of(unindexed_status, Status.SENDING), held)
    .values(next_attempt_at_ms=bindparam("new_lease_until"))
)

_new: dict[str, Any] = {
    name: bindparam(f"new_{name}")
    for name in ("retry_count", "next_attempt_at_ms", "last_error", "waits_for", "suspected_at_ms")
}
SETTLE = {
    outcome.trigger: move_held(outcome)
    for outcome in (
        outcomes.reschedule(**_new),
        outcomes.park(last_error=_new["last_error"]),
        outcomes.abandon(last_error=_new["last_error"]),
        outcomes.release(next_attempt_at_ms=_new["next_attempt_at_ms"]),
    )
}


class _Turn:
    """Whether the last claim of a destination took rows that failed before, and whether there are any."""

    took_failed = True
    is_any_failed = True


class SettleResult(NamedTuple):
    """What a settlement did."""

    landed: Counter[str]
    """How many moves were made, by trigger."""
    seen: tuple[Any, ...] | None = None
    """The row of the query that was run with it, or None."""


class Claims:
    """Takes rows for one flusher at a time, and writes what became of them.

    On SQLite none of this waits for the disk. If a power cut undoes a claim or an outcome, its events are sent
    again, and no event is lost. The next commit that waits for the disk makes these changes durable, too.

    The turn of a destination (rows that failed before, or others) is known to this process alone. Threads
    share it without a lock: a race only makes two claims in a row of the same kind.
    """

    def __init__(
        self,
        engine: Engine,
        writer: Writer,
        now_ms: Callable[[], int],
        counts: Mapping[str, Counts],
        identity: Identity,
    ) -> None:
        self._writer = writer
        self._counts = counts
        self._identity = identity
        self._now_ms = now_ms
        self._dialect = dialect_of(engine)
        self._turns: defaultdict[str, _Turn] = defaultdict(_Turn)

    def claim(
        self,
        *,
        now_ms: int,
        lease_until_ms: int,
        batch_size: int,
        destination: str = DEFAULT_DESTINATION,
        is_original: bool = False,
    ) -> Claim:
        """Move due rows to sending, under the lease. Claims alternate between rows that failed before and others.

        While the destination is on hold or paused, the claim has no rows. After three failures in a row, one
        flusher gets one row as a probe. The other flushers get no rows until the outcome of the probe is known or
        its lease ends. Claims of `Policy.original()` ignore pauses, but not holds, and do not alternate.
        """
        # Before the claim: if this fails, no row waits for the end of a lease.
        outbox_id = self._identity.outbox_id(lambda query: read(self._writer, lambda found: found.value(query)))
        wanted = Wanted(destination, now_ms, lease_until_ms, batch_size, outbox_id)
        claimed = Claim([])
        if is_original:
            claimed = self._run(lambda transaction: self._claim_any(transaction, wanted))
        elif (is_any_due := self._dialect.is_any_due) is not None:
            kind, unless_paused = self._kinds_in_turn(destination)[0], wanted._replace(unless_paused=True)
            claimed = self._run(lambda alone: self._dialect.claim(alone, kind, unless_paused), is_single=True)
            if not claimed.rows:
                empty = read(self._writer, lambda found: _empty_claim(found, wanted, is_any_due))
                if empty is not None:
                    return empty
        if not claimed.rows and not is_original:
            claimed = self._run(lambda transaction: self._claim_unless_paused(transaction, wanted))
        if not claimed.rows and claimed.hold is None and claimed.pause.holds_until_ms <= now_ms:
            claimed = self._run(lambda transaction: self._dialect.claim_never_due(transaction, wanted))
        if claimed.rows and not claimed.is_probe:
            self._turns[destination].took_failed = claimed.failed_before
        return claimed._replace(destination=destination)

    def take_turns(self, destination: str = DEFAULT_DESTINATION, *, is_any_failed: bool) -> None:
        """Note whether there are rows that failed before. Without any, no claim looks for them first."""
        self._turns[destination].is_any_failed = is_any_failed

    def renew(self, row_ids: Iterable[int], *, lease_until_ms: int, for_ms: int) -> tuple[set[int], int]:
        """Extend a lease to `for_ms` from now. Return the ids of the rows that were still held, and the new end.

        The time is read after the database is locked, because this may wait for another writer.
        """

        def renew(transaction: Transaction) -> tuple[set[int], int]:
            new = self._now_ms() + for_ms
            still_held = {
                row_id
                for row_id in sorted(row_ids)
                if transaction.change(RENEW, row_id=row_id, lease_until=lease_until_ms, new_lease_until=new)
            }
            return still_held, new

        return self._writer.run(renew, survives_power_cut=False)

    def settle(  # noqa: PLR0913 - the fence, the record of failures and the chores each need a value
        self,
        decided: Iterable[tuple[int, Outcome]],
        *,
        lease_until_ms: int,
        created_at_ms: Mapping[int, int],
        destination: str = DEFAULT_DESTINATION,
        failed: Mapping[int, Failed] = MappingProxyType({}),
        may_have_tries: bool = True,
        query: OneRowQuery | None = None,
    ) -> SettleResult:
        """Make the move of each row, with one statement per trigger.

        A fenced move is dropped if another flusher owns the row. `deliver` needs no lease. It is dropped if the
        row's creation time differs from that in `created_at_ms`, by id: then another event has the id.

        `failed` says, by row id, how rows failed, and these tries are kept. If the move of a row is dropped, no
        try of a row with the same trigger is kept. `may_have_tries` is false if no row of the claim failed before.

        If all outcomes are deliveries at one time, `query` is run in their transaction, which saves one. If it
        fails, the rows are delivered without it.
        """
        delivered: dict[int, list[int]] = defaultdict(list)
        by_trigger: dict[str, list[dict[str, Any]]] = defaultdict(list)
        # In the order of the ids, so that no two settlements wait for each other.
        for row_id, outcome in sorted(decided, key=itemgetter(0)):
            if outcome.trigger == "deliver":
                delivered[outcome.values["sent_at_ms"]].append(row_id)
            else:
                values = {f"new_{name}": value for name, value in outcome.values.items()}
                by_trigger[outcome.trigger].append({"row_id": row_id, "lease_until": lease_until_ms, **values})
        if not delivered and not by_trigger:
            return SettleResult(Counter())
        deliveries = [
            Delivery(row_ids, [created_at_ms[row_id] for row_id in row_ids], sent_at_ms)
            for sent_at_ms, row_ids in delivered.items()
        ]

        def settle(transaction: Transaction) -> SettleResult:
            landed: Counter[str] = Counter()
            tried: dict[int, Failed] = {}
            for trigger, rows in by_trigger.items():
                landed[trigger] = transaction.change_many(SETTLE[trigger], rows)
                if trigger != "release" and landed[trigger] == len(rows):
                    tried |= {row["row_id"]: failed[row["row_id"]] for row in rows if row["row_id"] in failed}
            if tried:
                record(transaction, tried, may_have_tries=may_have_tries)
            for delivery in deliveries:
                landed["deliver"] += self._dialect.deliver(transaction, delivery)
            return SettleResult(landed)

        is_one_delivery = not by_trigger and len(deliveries) == 1
        settled = self._deliver_and_query(deliveries[0], query) if is_one_delivery else None
        if settled is None:
            settled = self._write(settle, is_single=is_one_delivery and self._dialect.delivers_at_once)
        self._counts[destination].delivered(settled.landed["deliver"])
        return settled

    def _deliver_and_query(self, delivery: Delivery, query: OneRowQuery | None) -> SettleResult | None:
        if query is None:
            return None

        def settle(transaction: Transaction) -> SettleResult:
            moved, seen = self._dialect.deliver_and_query(transaction, delivery, query)
            return SettleResult(Counter(deliver=moved), seen)

        try:
            return self._write(settle, is_single=self._dialect.delivers_at_once)
        except (OutcomeUnknown, OutOfPatienceError):
            raise
        except StorageError:
            return None

    def _write(self, settle: Callable[[Transaction], SettleResult], *, is_single: bool) -> SettleResult:
        # Repeatable: the fence stops a second write of an outcome, and a second delivery changes nothing.
        return self._writer.run(settle, repeatable=True, is_single=is_single, survives_power_cut=False)

    def _kinds_in_turn(self, destination: str) -> tuple[Kind, Kind]:
        turn = self._turns[destination]
        if turn.is_any_failed and not turn.took_failed:
            return Kind.FAILED, Kind.FRESH
        return Kind.FRESH, Kind.FAILED

    def _claim_any(self, transaction: Transaction, wanted: Wanted) -> Claim:
        hold = hold_of(transaction, wanted.destination, now_ms=wanted.now_ms)
        return Claim([], hold=hold) if hold is not None else self._dialect.claim(transaction, Kind.ANY, wanted)

    def _claim_unless_paused(self, transaction: Transaction, wanted: Wanted) -> Claim:
        destination, now_ms, lease_until_ms = wanted.destination, wanted.now_ms, wanted.lease_until_ms
        while True:
            pause, hold, _ = pause_and_hold(transaction, destination, now_ms=now_ms)
            if hold is not None:
                return Claim([], pause, hold=hold)
            if pause.holds_until_ms > now_ms:
                return Claim([], pause)
            if not pause.needs_probe:
                break
            if begin_probe(
                transaction, destination, seen=pause.number, now_ms=now_ms, lease_until_ms=lease_until_ms
            ):
                return self._probe(transaction, pause, wanted)
            # Another flusher was faster, so look again.
        for kind in self._kinds_in_turn(destination):
            claimed = self._dialect.claim(transaction, kind, wanted)
            if claimed.rows:
                return claimed._replace(pause=pause)
        return Claim([], pause)

    def _probe(self, transaction: Transaction, pause: SharedPause, wanted: Wanted) -> Claim:
        for failed_before in (pause.next_probe_failed_before, not pause.next_probe_failed_before):
            kind = Kind.FAILED if failed_before else Kind.FRESH
            one = wanted._replace(at_most=1, is_newest=not failed_before)
            claimed = self._dialect.claim(transaction, kind, one)
            if claimed.rows:
                probed = pause.when_probed(lease_until_ms=wanted.lease_until_ms, failed_before=failed_before)
                write_pause(transaction, wanted.destination, probed)
                return claimed._replace(pause=pause, is_probe=True)
        write_pause(transaction, wanted.destination, pause)
        return Claim([], pause)

    def _run(self, operation: Callable[[Transaction], Claim], *, is_single: bool = False) -> Claim:
        # Repeatable: the rows of a claim that was committed unnoticed are due again when its lease has run out.
        return self._writer.run(operation, repeatable=True, is_single=is_single, survives_power_cut=False)


def _empty_claim(transaction: Transaction, wanted: Wanted, is_any_due: ColumnElement[bool]) -> Claim | None:
    """Return a claim without rows during a hold or a pause, or if nothing is due. Otherwise return None."""
    destination, now_ms = wanted.destination, wanted.now_ms
    pause, hold, is_true = pause_and_hold(transaction, destination, now_ms=now_ms, condition=is_any_due)
    if hold is None and pause.holds_until_ms <= now_ms and is_true:
        return None
    return Claim([], pause, hold=hold, destination=destination)
