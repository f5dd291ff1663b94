"""How database servers find the rows of a claim at the same cost, however many rows wait.

A claim takes the oldest due rows. A search in the order of the creation time would read all older rows that are
not due. So rows that may wait are read in two orders:

- by creation time: usually, either the oldest rows are due, or no row is;
- by due time: if the oldest rows are not due, few rows are due.

Only the rows of the batch are locked, by their ids, so that other flushers can take the rows behind them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    CompoundSelect,
    Select,
    bindparam,
    literal_column,
    select,
    union_all,
)

from outbox.storage.claimed import Wanted, is_due_or_never, newest_first, to_claim
from outbox.storage.sql import (
    by_id,
    columns,
    is_due,
    is_source,
    lock,
    of_destination,
    oldest_first,
    these_rows,
)
from outbox.storage.transactions import Transaction

# How many batches a claim reads at first: flushers that read at the same time find the same rows.
_BATCHES_READ = 4

LOCK_ROWS_IF_DUE = by_id(
    lock(
        select(*to_claim, columns.next_attempt_at_ms).where(
            these_rows, is_source("claim", columns.status), is_due_or_never
        )
    )
)

_Place = tuple[int, int, int]
"""The place of a row: its creation time, its id, and its due time. In a search for the newest rows, the first two
are negative."""


class Rows(NamedTuple):
    """Rows that have an index in the order of a claim."""

    conditions: tuple[ColumnElement[bool], ...]
    in_order: str | None = None
    """The name of that index, if statements have to name it."""
    by_time: tuple[tuple[ColumnElement[bool], ...], ...] = ()
    """Conditions that each have an index in the order of the due time. Together they match these rows. Empty:
    nearly all of these rows are due."""
    time_index: str | None = None


class Search:
    """Finds the first due rows of a part of a claim."""

    def __init__(
        self,
        *kinds: Rows,
        is_newest: bool = False,
        hinted: Callable[[Select[Any], str], Select[Any]] | None = None,
    ) -> None:
        order = newest_first if is_newest else oldest_first
        self._sign = -1 if is_newest else 1
        self._sure = [number for number, rows in enumerate(kinds) if not rows.by_time]

        def places(number: int, conditions: Iterable[Any], by: Sequence[Any], index: str | None) -> Select[Any]:
            kind = literal_column(str(number), BigInteger).label("kind")
            place = (columns.created_at_ms, columns.id, columns.next_attempt_at_ms)
            found = select(kind, *place).where(of_destination, *conditions).order_by(*by)
            found = found.limit(bindparam("look_at", type_=BigInteger))
            return found if index is None or hinted is None else hinted(found, index)

        # A planner that expects many due rows may choose any index, because it expects a due row soon in each. So
        # a query has `is_due` only if its rows are in the order of the due time, or nearly all of them are due.
        self._oldest = _union(
            places(number, rows.conditions if rows.by_time else (*rows.conditions, is_due), order, rows.in_order)
            for number, rows in enumerate(kinds)
        )
        several = [(one, rows.time_index) for rows in kinds for one in rows.by_time]
        self._first_due = _union(
            places(number, (*one, is_due), (columns.next_attempt_at_ms,), index)
            for number, (one, index) in enumerate(several)
        )
        self._oldest_due = _union(
            places(number, (*rows.conditions, is_due), order, rows.in_order)
            for number, rows in enumerate(kinds)
            if rows.by_time
        )

    def lock(self, transaction: Transaction, wanted: Wanted) -> list[tuple[Any, ...]]:
        """Lock the first due rows that no other transaction has locked, and no other row.

        If others have locked some of the rows that were found, this looks at more, until it has locked a batch or
        has tried all due rows.
        """
        locked: list[tuple[Any, ...]] = []
        tried: set[int] = set()
        look_at = wanted.at_most * _BATCHES_READ
        while True:
            found, are_all = self._find(transaction, wanted, look_at)
            untried = iter([row_id for row_id in found if row_id not in tried])
            while these := list(islice(untried, wanted.at_most - len(locked))):
                tried.update(these)
                locked += transaction.rows_of(LOCK_ROWS_IF_DUE, these, now=wanted.now_ms)
            if are_all or len(locked) == wanted.at_most:
                return locked
            look_at *= 2

    def _find(self, transaction: Transaction, wanted: Wanted, look_at: int) -> tuple[list[int], bool]:
        """Return the ids of the first due rows, at least a batch of them or all, and whether these are all."""
        this = {"destination": wanted.destination, "now": wanted.now_ms, "look_at": look_at}
        oldest = self._read(transaction, self._oldest, this)
        certain, are_all = _certain(oldest, wanted.now_ms, look_at)
        if are_all or len(certain) >= wanted.at_most:
            return certain, are_all
        # Some due rows may be behind those of the oldest that are not due.
        waiting = self._read(transaction, self._first_due, this)
        if any(len(found) == look_at for found in waiting.values()):
            waiting = self._read(transaction, self._oldest_due, this)
        sure = {("sure", number): oldest[number] for number in self._sure}
        return _certain({**sure, **waiting}, wanted.now_ms, look_at)

    def _read(self, transaction: Transaction, query: Any, this: Mapping[str, Any]) -> dict[int, list[_Place]]:
        found: dict[int, list[_Place]] = defaultdict(list)
        for kind, created, row_id, due_ms in transaction.rows(query, **this):
            found[kind].append((self._sign * created, self._sign * row_id, due_ms))
        return found


def _certain(lists: Mapping[Any, list[_Place]], now_ms: int, look_at: int) -> tuple[list[int], bool]:
    """Return the ids of the due rows that come before every row that was not read, and whether all were read."""
    ends = [max(found) for found in lists.values() if len(found) == look_at]
    due = sorted(place for place in chain.from_iterable(lists.values()) if place[-1] <= now_ms)
    if ends:
        end = min(ends)
        due = [place for place in due if place <= end]
    return [abs(row_id) for _, row_id, _ in due], not ends


def _union(several: Iterable[Select[Any]]) -> CompoundSelect[Any] | Select[Any] | None:
    each = [select(one.subquery()) for one in several]
    return union_all(*each) if len(each) > 1 else next(iter(each), None)
