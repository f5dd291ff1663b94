"""The bounds on the delivered and on the undelivered rows: `max_sent` and `max_undelivered` of the policy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Engine, Select

from outbox.destinations import DEFAULT_DESTINATION, of_destination, shown
from outbox.failures import QueueFull
from outbox.policy import Policy
from outbox.storage.counts import Counts, filling, filling_in_words
from outbox.storage.deletion import NOTHING, TRIM_SLICE, Bound, Deletion, Trimmed
from outbox.storage.dialects import dialect_of
from outbox.storage.engines import is_own
from outbox.storage.row_counts import SENT_ROWS, undelivered_rows
from outbox.storage.transactions import Transaction, Writer, read

log = logging.getLogger("outbox")

ValueOf = Callable[..., Any]


class Bounds:
    """Refuses events, warns, or deletes rows when a bound is reached.

    `enqueue` compares with a count of the undelivered rows that is at most 5 s or 1 000 enqueues old.
    """

    def __init__(self, engine: Engine, writer: Writer, deletion: Deletion, counts: Mapping[str, Counts]) -> None:
        self._steps = deletion.steps
        self.undelivered_rows = undelivered_rows(dialect_of(engine))
        """Counts the undelivered rows of a destination."""
        self._is_own = is_own(engine)
        self._writer = writer
        self._deletion = deletion
        self._counts = counts

    def count_undelivered(self, destination: str = DEFAULT_DESTINATION, *, value_of: ValueOf | None = None) -> int:
        """Count the undelivered rows of a destination, and remember how many there are."""
        rows: int = (value_of or self._look)(self.undelivered_rows, destination=destination)
        self._counts[destination].undelivered.set(rows)
        return rows

    def refuse(
        self,
        policy: Policy,
        destination: str = DEFAULT_DESTINATION,
        *,
        own: int,
        value_of: ValueOf | None = None,
    ) -> None:
        """Raise `QueueFull` if there is no room for `own` more rows, and the policy is to reject.

        `value_of` runs a query on the caller's connection. It refreshes a count that is too old if the engine is
        the application's, whose pool may have no other connection left. It is not used for an engine of our own.
        """
        at_most = policy.max_undelivered
        if not at_most:
            return
        undelivered = self._counts[destination].undelivered
        if undelivered.is_stale():
            self.count_undelivered(destination, value_of=None if self._is_own else value_of)
        rows = undelivered.rows
        if rows + own > at_most and policy.when_full == "reject":
            raise queue_full(destination, rows, own, "max_undelivered", at_most)

    def has_room(self, policy: Policy, destination: str) -> bool:
        """Return whether one more row exceeds no bound, as far as is known without a query."""
        undelivered = self._counts[destination].undelivered
        if policy.max_undelivered and (undelivered.rows >= policy.max_undelivered or undelivered.is_stale()):
            return False
        if not policy.max_rows:
            return True
        last_id = self._deletion.last_id + 1
        return policy.when_full == "trim" and not self._deletion.may_be_over(policy, destination, last_id=last_id)

    def enqueued(self, policy: Policy, rows: int, destination: str = DEFAULT_DESTINATION) -> None:
        """Note that rows were inserted. Log a warning when half or nine tenths of the bound are reached."""
        if not policy.max_undelivered:
            return
        counts = self._counts[destination]
        before = counts.undelivered.rows
        counts.undelivered.add(rows)
        undelivered = counts.undelivered.rows
        if not counts.told_of and undelivered * 2 < policy.max_undelivered:  # fast path: most calls
            return
        # It is logged again only after a fifth of the rows has left.
        told_of = min(counts.told_of, filling(before * 5 // 4, policy.max_undelivered))
        counts.told_of = max(told_of, filling(undelivered, policy.max_undelivered))
        if counts.told_of > told_of:
            log.warning(
                "the queue%s is filling up: %s; `outbox status` shows why the events wait",
                of_destination(destination),
                filling_in_words(undelivered, policy.max_undelivered),
                extra={
                    "event_name": "outbox.filling_up",
                    "events": undelivered,
                    "destination": shown(destination),
                },
            )

    def may_be_over(self, policy: Policy, destination: str = DEFAULT_DESTINATION) -> bool:
        """Return whether `trim` may find rows to delete. Otherwise it need not run."""
        counts = self._counts[destination]
        pairs = ((counts.sent, policy.max_sent), (counts.undelivered, _trimmed_to(policy)))
        return any(at_most and (count.is_stale() or count.rows > at_most) for count, at_most in pairs)

    def trim(self, policy: Policy, destination: str = DEFAULT_DESTINATION, *, now_ms: int) -> int:
        """Delete the oldest rows of a destination beyond the bounds, in slices; return how many."""
        deleted = self._trim_sent(policy.max_sent, destination, now_ms=now_ms) if policy.max_sent else 0
        if not _trimmed_to(policy):
            return deleted
        if self._counts[destination].undelivered.is_stale():
            self.count_undelivered(destination)
        while True:
            trimmed = self._writer.run(
                lambda transaction: self.trim_slice(transaction, policy, destination, now_ms=now_ms)
            )
            self._deletion.warn_of_undelivered(trimmed)
            deleted += trimmed.rows
            if not trimmed.is_whole_slice:
                return deleted

    def trim_slice(
        self,
        transaction: Transaction,
        policy: Policy,
        destination: str = DEFAULT_DESTINATION,
        *,
        now_ms: int,
        own: Sequence[int] = (),
    ) -> Trimmed:
        """Delete a slice of the undelivered rows beyond the bound.

        This transaction inserted the rows `own`. The rows are counted again, because another process may have
        deleted the excess already. A large bound may be exceeded by a thousandth, so that not every enqueue
        counts.
        """
        at_most = _trimmed_to(policy)
        undelivered = self._counts[destination].undelivered
        if not at_most or undelivered.rows + len(own) <= at_most + at_most // 1_000:
            return NOTHING
        bound = Bound(destination, self.undelivered_rows, self._steps[1:], at_most, reason="max_undelivered")
        trimmed, rows = self._deletion.delete_excess(transaction, bound, own=own, now_ms=now_ms)
        undelivered.set(rows - len(own))
        return trimmed

    def _trim_sent(self, at_most: int, destination: str, *, now_ms: int) -> int:
        sent = self._counts[destination].sent
        if sent.is_stale():
            sent.set(self._look(SENT_ROWS, destination=destination))
        bound = Bound(destination, SENT_ROWS, self._steps[:1], at_most, reason="max_sent")
        deleted = 0
        while sent.rows > at_most:
            excess = min(sent.rows - at_most, TRIM_SLICE)
            delete = partial(self._deletion.delete_oldest, bound=bound, excess=excess, now_ms=now_ms)
            # If a power cut undoes the deletion, the next flush repeats it.
            trimmed = self._writer.run(delete, survives_power_cut=False)
            deleted += trimmed.rows
            if trimmed.rows < excess:  # other flushers delete, too
                break
        return deleted

    def _look(self, query: Select[Any], **parameters: Any) -> Any:
        return read(self._writer, lambda transaction: transaction.value(query, **parameters))


def queue_full(destination: str, undelivered: int, own: int, bound: str, at_most: int) -> QueueFull:
    """Return the error for too many events. It gives the numbers, and says what to do."""
    events = f"{undelivered} events{of_destination(destination)}"
    return QueueFull(
        f"{events} are not delivered yet, and the policy's {bound} is {at_most}: there is no room for {own}"
        f" more; `outbox status` shows why they wait. Deliver or purge events, or raise {bound}"
    )


def _trimmed_to(policy: Policy) -> int:
    return policy.max_undelivered or 0 if policy.when_full == "trim" else 0
