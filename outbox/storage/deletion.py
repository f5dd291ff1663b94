"""What deletes rows: the cap, and retention of delivered rows. The ledger counts every deleted row."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from math import inf
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy import (
    Engine,
    Select,
    and_,
    bindparam,
    delete,
    literal_column,
    select,
    table,
)

from outbox.clock import monotonic_s
from outbox.destinations import DEFAULT_DESTINATION
from outbox.lifecycle import Status
from outbox.policy import Policy
from outbox.storage.counts import Counts
from outbox.storage.dialects import dialect_of
from outbox.storage.indexes import DELIVERED_INDEX
from outbox.storage.row_counts import all_rows
from outbox.storage.sql import (
    LAST_ID,
    columns,
    events,
    in_order,
    is_one_of,
    lock,
    may_have_tries,
    of_destination,
    oldest,
    these_rows,
    this_row,
    unindexed_status,
)
from outbox.storage.tables import VERSION_TABLE, destinations_ledger, ledger
from outbox.storage.transactions import Transaction, Writer, read
from outbox.storage.tries import forget

log = logging.getLogger("outbox")

TRIM_SLICE = 1_000
"""Number of rows that one transaction deletes at most."""
# Shortest time between two warnings about deleted undelivered events: at the cap each enqueue deletes one.
_QUIET_S = 60.0


class Deletable(NamedTuple):
    """The columns of a row that are needed to delete it in order, and to count it."""

    id: int
    status: str
    event_type: str
    destination: str
    delete_order_ms: int
    """The oldest is deleted first: `sent_at_ms` of a row that was delivered, else `created_at_ms`."""
    may_have_tries: bool


class Trimmed(NamedTuple):
    """How many rows one transaction deleted at the cap, and how many of them had not been delivered."""

    rows: int = 0
    undelivered: int = 0

    @property
    def is_whole_slice(self) -> bool:
        """Whether more rows may be over the cap."""
        return self.rows == TRIM_SLICE


NOTHING = Trimmed()


class _Counted(NamedTuple):
    """The number of rows when the newest id was `last_id`."""

    last_id: int
    rows: int
    left: int = 0
    """The number of rows after the trim."""
    state: object = None
    """The state of the database after the trim, as `Writer.state` returns it."""


Steps: TypeAlias = Sequence[Sequence[Any]]

TRIM_FIRST = ((oldest(Status.SENT, by=columns.sent_at_ms, index=DELIVERED_INDEX),), (oldest(Status.ABANDONED),))
"""The rows that the cap deletes first: delivered rows, then abandoned rows. Undelivered rows are the last.

Each query walks one index in order and stops at the limit.
"""

TRIMMING: Select[Any] = select(literal_column("version_num")).select_from(table(VERSION_TABLE)).with_for_update()
"""A row that always exists: on servers, the transaction that locks it may trim."""

is_expired = and_(is_one_of(unindexed_status, Status.SENT), columns.sent_at_ms < bindparam("sent_before"))
EXPIRED = in_order(
    lock(
        select(
            columns.id, columns.status, columns.event_type, columns.destination, columns.sent_at_ms, may_have_tries
        )
        .where(is_expired, of_destination)
        .order_by(columns.sent_at_ms, columns.id)
        .limit(bindparam("slice_size"))
    ),
    DELIVERED_INDEX,
)

DELETE_ROW = delete(events).where(this_row)
DELETE_ROWS = delete(events).where(these_rows)


class Bound(NamedTuple):
    """How many rows of a kind a destination may have, and which are deleted beyond that."""

    destination: str
    counting: Select[Any]
    """Counts the rows."""
    steps: Steps
    """Find the rows to delete: those of the first queries, oldest first, then those of the next."""
    at_most: int
    reason: str
    """The reason in the ledger."""


class Deletion:
    """Deletes rows, never one in flight, and counts each in the ledger, in the same transaction."""

    def __init__(self, engine: Engine, writer: Writer, counts: Mapping[str, Counts]) -> None:
        self._engine = engine
        self._dialect = dialect_of(engine)
        self._writer = writer
        self._counts = counts
        self.steps: Steps = (*TRIM_FIRST, self._dialect.undelivered_to_trim)
        """The rows to delete while there are too many: those of the first queries, oldest first, and so on."""
        self._all_rows = all_rows(self._dialect)
        self._counted: defaultdict[str, _Counted] = defaultdict(lambda: _Counted(0, 0))
        self.last_id: float = inf
        """The id of the newest row that this process inserted; infinite before the first one."""
        # Undelivered events that were deleted since the last warning, and the earliest time of the next warning.
        self._untold = 0
        self._quiet_until_s = 0.0

    def cap(self, policy: Policy, destination: str) -> Bound:
        """Return the cap of a destination, where the policy has one."""
        steps: Steps = self.steps[:1] if policy.when_full == "reject" else self.steps
        return Bound(destination, self._all_rows, steps, policy.max_rows or 0, reason="cap")

    def may_be_over(self, policy: Policy, destination: str = DEFAULT_DESTINATION, *, last_id: float) -> bool:
        """Return whether there may be more rows than the cap allows, without counting them again.

        `last_id` is the newest id. Each new row has a larger id than all before it.
        """
        if not policy.max_rows:
            return False
        counted = self._counted[destination]
        return last_id < counted.last_id or counted.rows + last_id - counted.last_id > policy.max_rows

    def trim(self, policy: Policy, destination: str = DEFAULT_DESTINATION, *, now_ms: int) -> int:
        """Delete what is over the cap of a destination, never a row in flight, in slices; return how many."""
        last_id = read(self._writer, lambda transaction: transaction.value(LAST_ID)) or 0
        trim_slice = partial(self.trim_slice, cap=self.cap(policy, destination), now_ms=now_ms, last_id=last_id)
        deleted = 0
        while True:
            trimmed = self._writer.run(trim_slice)
            self.warn_of_undelivered(trimmed)
            deleted += trimmed.rows
            if not trimmed.is_whole_slice:
                return deleted

    def trim_slice(
        self, transaction: Transaction, cap: Bound, *, now_ms: int, last_id: int, own: Sequence[int] = ()
    ) -> Trimmed:
        """Delete a slice of what is over the cap. This transaction inserted the rows `own`."""
        counted = self._counted[cap.destination]
        is_known = (
            own
            and own[0] == counted.last_id + 1  # else the latest trim was rolled back, and its ids are given again
            and counted.state is not None
            and counted.state == self._writer.state(transaction, changes=len(own))
        )
        rows = counted.left + len(own) if is_known else None
        trimmed, left = self.delete_excess(transaction, cap, own=own, now_ms=now_ms, rows=rows)
        # Without rows of its own, no id would show later that this trim was rolled back.
        state = self._writer.state(transaction) if own else None
        self._counted[cap.destination] = _Counted(last_id, left + trimmed.rows, left, state)
        return trimmed

    def delete_excess(
        self, transaction: Transaction, bound: Bound, *, own: Sequence[int], now_ms: int, rows: int | None = None
    ) -> tuple[Trimmed, int]:
        """Delete a slice of the rows beyond a bound; return it, and how many rows are left.

        Rows that this transaction inserted stay, however many others are in flight, unless they are too many by
        themselves. `rows` is the number of rows, if it is known.
        """
        if rows is None:
            rows = int(transaction.value(bound.counting, destination=bound.destination))
        if self._dialect.is_shared and rows - bound.at_most > len(own):
            # Otherwise several transactions might count the same excess, and each delete different rows.
            transaction.rows(TRIMMING)
            rows = transaction.value(bound.counting, destination=bound.destination)
        excess = min(rows - bound.at_most, TRIM_SLICE)
        trimmed = self.delete_oldest(
            transaction, bound, excess=excess, now_ms=now_ms, spared=own[-bound.at_most :]
        )
        return trimmed, rows - trimmed.rows

    def delete_oldest(
        self, transaction: Transaction, bound: Bound, *, excess: int, now_ms: int, spared: Sequence[int] = ()
    ) -> Trimmed:
        """Delete rows: the oldest that the first queries find, then the oldest of the next, none in flight."""
        chosen: list[Deletable] = []
        these = {"destination": bound.destination, "now": now_ms}
        for statements in bound.steps:
            missing = excess - len(chosen)
            if missing > 0:
                at_most = missing + len(spared)
                found = [transaction.rows(statement, excess=at_most, **these) for statement in statements]
                oldest = found[0] if len(found) == 1 else sorted(chain(*found), key=_delete_order)
                chosen += [row for row in map(Deletable._make, oldest) if row.id not in spared][:missing]
        undelivered = sum(row.status != Status.SENT for row in chosen)
        return Trimmed(self.delete(transaction, chosen, reason=bound.reason), undelivered)

    def warn_of_undelivered(self, trimmed: Trimmed) -> None:
        """Log that events were deleted that had not been delivered: at once, then at most once a minute."""
        if not trimmed.undelivered:
            return
        self._untold += trimmed.undelivered
        now_s = monotonic_s()
        if now_s < self._quiet_until_s:
            return
        untold, self._untold = self._untold, 0
        self._quiet_until_s = now_s + _QUIET_S
        log.warning(
            "events that were deleted before they were delivered: %d; the queue is over the policy's max_rows or"
            " max_undelivered, `outbox status` counts all deleted events",
            untold,
            extra={"event_name": "outbox.deleted_undelivered", "events": untold},
        )

    def expire(self, destination: str = DEFAULT_DESTINATION, *, sent_before_ms: int) -> int:
        """Delete a slice of the oldest rows of a destination that were delivered before then; return how many."""

        def expire(transaction: Transaction) -> int:
            these = {"destination": destination, "sent_before": sent_before_ms, "slice_size": TRIM_SLICE}
            found = transaction.rows(EXPIRED, **these)
            return self.delete(transaction, [Deletable(*row) for row in found], reason="retention")

        # If a power cut undoes the deletion, the next flush repeats it.
        return self._writer.run(expire, survives_power_cut=False)

    def delete(self, transaction: Transaction, rows: list[Deletable], *, reason: str) -> int:
        """Delete rows and their tries, and count the rows in a ledger; return how many."""
        if len(rows) == 1:  # the usual case at the cap
            transaction.change(DELETE_ROW, row_id=rows[0].id)
        else:
            transaction.change_rows(DELETE_ROWS, [row.id for row in rows])
        if tried := [row.id for row in rows if row.may_have_tries]:
            forget(transaction, tried)
        deleted = Counter((row.destination, row.status, row.event_type) for row in rows)
        # In order, so that no two transactions wait for each other.
        for (destination, status, event_type), number in sorted(deleted.items()):
            counts = self._counts[destination]
            (counts.sent if status == Status.SENT else counts.undelivered).add(-number)
            entry = {"status": status, "event_type": _writable(event_type), "reason": reason, "events": number}
            if destination == DEFAULT_DESTINATION:
                self._dialect.insert_or_add(transaction, ledger, adds="events", **entry)
            else:
                entry["destination"] = _writable(destination)
                self._dialect.insert_or_add(transaction, destinations_ledger, adds="events", **entry)
        return len(rows)


def _writable(found: str) -> str:
    """Replace text that is not UTF-8: it can be read, but not written."""
    return found.encode(errors="surrogateescape").decode(errors="replace")


def _delete_order(row: tuple[Any, ...]) -> tuple[int, int]:
    deletable = Deletable._make(row)
    return deletable.delete_order_ms, deletable.id
