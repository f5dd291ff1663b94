"""Puts edited events in the place of stored ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Engine, select

from outbox.lifecycle import Status
from outbox.policy import Policy
from outbox.records import Replaced, Replacement
from outbox.storage.bounds import Bounds
from outbox.storage.column_types import TIMES_BELOW
from outbox.storage.deletion import Deletable, Deletion
from outbox.storage.dialects import dialect_of
from outbox.storage.inserts import insert_one, names_of
from outbox.storage.sql import by_id, columns, is_in_flight, may_have_tries, these_rows
from outbox.storage.transactions import Transaction, Writer

_SLICE = 100

LOCK_TO_REPLACE = by_id(
    select(
        *(
            columns[name]
            for name in ("id", "status", "event_type", "destination", "created_at_ms", "not_before_ms")
        ),
        is_in_flight,
        may_have_tries,
    )
    .where(these_rows)
    .order_by(columns.id)
    .with_for_update()
)


class _Old(NamedTuple):
    id: int
    status: str
    event_type: str
    destination: str
    created_at_ms: int
    not_before_ms: object
    is_in_flight: bool
    may_have_tries: bool

    def why_not(self, replacement: Replacement) -> str | None:
        """Return why the row must stay, in words, or None."""
        if replacement.created_at_ms not in (None, self.created_at_ms):
            return "it was created at another time, so it is another event"
        if self.is_in_flight:
            return "it is being sent"
        return "it is sent" if self.status == Status.SENT else None


class Replacing:
    """Replaces rows, and counts the old ones in the ledger."""

    def __init__(self, engine: Engine, writer: Writer, deletion: Deletion, bounds: Bounds) -> None:
        self._writer = writer
        self._deletion = deletion
        self._bounds = bounds
        self._notification = dialect_of(engine).notification

    def replace(self, replacements: Sequence[Replacement], *, policy: Policy, now_ms: int) -> Replaced:
        """Delete the old rows and insert the new ones for the same destinations, a hundred in each transaction.

        A row that is scheduled for later stays so. Rows that are sent or in flight stay, and nothing is inserted
        for them, nor for rows that are gone.
        """
        replaced = Replaced({}, {})
        for start in range(0, len(replacements), _SLICE):
            several = {one.row_id: one for one in replacements[start : start + _SLICE]}
            done, destinations = self._writer.run(partial(self._replace, several, now_ms))
            replaced.ids.update(done.ids)
            replaced.refused.update(done.refused)
            for destination, rows in destinations.items():
                self._bounds.enqueued(policy, rows, destination)
        return replaced

    def _replace(
        self, wanted: dict[int, Replacement], now_ms: int, transaction: Transaction
    ) -> tuple[Replaced, Counter[str]]:
        """Replace a slice of rows. Return also how many rows each destination got."""
        locked = [_Old._make(row) for row in transaction.rows_of(LOCK_TO_REPLACE, [*wanted], now=now_ms)]
        refused = dict.fromkeys(wanted, "it was deleted, or never enqueued here")
        replaced = []
        for old in locked:
            why = old.why_not(wanted[old.id])
            if why is None:
                replaced.append(old)
                del refused[old.id]
            else:
                refused[old.id] = why
        deleted = [
            Deletable(old.id, old.status, old.event_type, old.destination, old.created_at_ms, old.may_have_tries)
            for old in replaced
        ]
        if deleted:
            self._deletion.delete(transaction, deleted, reason="replaced")
        ids = {}
        for old in replaced:
            new = _new_row(old, wanted[old.id].row, now_ms=now_ms)
            (ids[old.id],) = transaction.insert(insert_one(self._notification, names_of([new])), [new])
        return Replaced(ids, refused), Counter(old.destination for old in replaced)


def _new_row(old: _Old, row: dict[str, Any], *, now_ms: int) -> dict[str, Any]:
    new = {**row, "destination": old.destination}
    not_before_ms = old.not_before_ms
    if isinstance(not_before_ms, int) and now_ms < not_before_ms < TIMES_BELOW:
        new |= {"not_before_ms": not_before_ms, "next_attempt_at_ms": not_before_ms}
    return new
