"""Finds the events that meet the conditions of an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    Select,
    bindparam,
    false,
    func,
    select,
    tuple_,
)
from sqlalchemy.orm import Session

from outbox.event_ids import parts_of
from outbox.filters import LARGEST_ID, Progress, Scan, Where
from outbox.lifecycle import Status
from outbox.storage.engines import reading
from outbox.storage.identity import Identity, give_id
from outbox.storage.sql import LAST_ID, columns, contains_text, has_status, without_index
from outbox.storage.tables import ObservationEvent

# How many ids are read at once, and how many rows.
_PAGE = 100_000
SLICE = 1_000

# The next destination that has events with an id of the caller. The index begins with the destination.
_NEXT_DESTINATION = select(func.min(columns.destination)).where(
    columns.event_id.is_not(None), columns.destination > bindparam("seen")
)


class Found(list[ObservationEvent]):
    """One page of the events that `Outbox.find` found."""

    next: int | None = None
    """The `before` of the next call, or its `after` if the oldest events come first. None if there are no more
    events."""
    rows_read: int = 0
    """The number of events that a search for text read; 0 without such a search."""
    is_complete: bool = True
    """False if a search for text ended at its limit. More events may match."""


class EventCount(int):
    """The result of `Outbox.count`: the number of events that match."""

    rows_read: int = 0
    """The number of events that a search for text read; 0 without such a search."""
    is_complete: bool = True
    """False if a search for text ended at its limit. More events may match."""


class _Matches(NamedTuple):
    ids: list[int]
    rows_read: int
    goes_on_at: int | None = None
    """The last id that was read, if the search ended at its limit."""


class Finding:
    """Reads the events that match."""

    def __init__(self, engine: Engine, identity: Identity) -> None:
        self._engine = engine
        self._identity = identity

    def find(  # noqa: PLR0913 - each is one choice of the caller
        self,
        where: Where,
        *,
        limit: int,
        newest_first: bool = False,
        before: int | None = None,
        after: int | None = None,
        scan: Scan,
    ) -> Found:
        """Return the first rows in the order of their ids. They are detached, and each has an event id.

        `before` and `after` bound the ids.
        """
        found = Found()
        with reading(self._engine) as connection, Session(connection, expire_on_commit=False) as session:
            outbox_id = self._identity.outbox_id(connection.scalar)
            conditions = [*self._conditions(connection, where), *_between(before, after)]
            query = select(columns.id).where(*conditions)
            query = query.order_by(columns.id.desc() if newest_first else columns.id)
            ids: Sequence[int]
            if where.has_text:
                ids, found.rows_read, found.next = _with_text(connection, query, where, limit, scan)
                found.is_complete = found.next is None
            else:
                ids = connection.scalars(query.limit(min(limit, LARGEST_ID - 1) + 1)).all()
            if len(ids) > limit > 0:
                found.next = ids[limit - 1]
            for several in _slices(ids[:limit]):
                rows = session.scalars(select(ObservationEvent).where(columns.id.in_(several)))
                by_id = {row.id: give_id(row, outbox_id) for row in rows}
                found.extend(by_id[row_id] for row_id in several)
        return found

    def count(self, where: Where, scan: Scan) -> EventCount:
        """Return the number of rows that match. A search for text reads at most the newest `scan.at_most` rows."""
        with reading(self._engine) as connection:
            conditions = self._conditions(connection, where)
            if where.has_text:
                query = select(columns.id).where(*conditions).order_by(columns.id.desc())
                ids, rows_read, goes_on_at = _with_text(connection, query, where, scan.at_most, scan)
                counted = EventCount(len(ids))
                counted.rows_read, counted.is_complete = rows_read, goes_on_at is None
                return counted
            query = select(func.count()).where(*conditions).select_from(ObservationEvent)
            return EventCount(connection.scalar(query) or 0)

    def tally(self, where: Where, kinds: Select[Any], parameters: dict[str, Any]) -> Sequence[Any]:
        """Return what `kinds` selects of the rows that match, each kind once, with the number of its rows.

        The conditions must have no text.
        """
        with reading(self._engine) as connection:
            # In a subquery, because some drivers make two parameters of one that stands in SELECT and GROUP BY.
            each = kinds.where(*self._conditions(connection, where)).subquery().c
            return connection.execute(select(*each, func.count()).group_by(*each), parameters).all()

    def slices(
        self, where: Where, rows: Select[Any], parameters: dict[str, Any], *, progress: Progress | None
    ) -> Iterator[Sequence[Any]]:
        """Yield what `rows` selects of all rows that match, in slices, oldest first.

        Rows that are inserted meanwhile are left out. Each slice is a snapshot of its own.
        """
        # No index has all statuses in the order of the ids. With the index of a type or destination, SQLite would
        # sort all its rows for each page.
        of = without_index if where.statuses is None else _plain
        with reading(self._engine) as connection:
            conditions = self._conditions(connection, where, of=of)
            last = connection.scalar(LAST_ID) or 0
        seen: int | None = 0
        while seen is not None:
            with reading(self._engine) as connection:
                query = page(conditions).params(seen=seen, last=last)
                ids = connection.scalars(query).all()
            seen = ids[-1] if len(ids) == _PAGE else None
            for several in _slices(ids):
                with reading(self._engine) as connection:
                    these = rows.where(columns.id.in_(several), *_texts(where)).order_by(columns.id)
                    found = connection.execute(these, parameters).all()
                if progress is not None:
                    progress(len(several))
                if found:
                    yield found

    def _conditions(
        self, connection: Connection, where: Where, *, of: Callable[[Any], ColumnElement[Any]] | None = None
    ) -> list[ColumnElement[bool]]:
        """Return the conditions except those on texts."""
        of = of or _plain
        conditions: list[ColumnElement[bool]] = []
        if where.ids is not None:
            conditions.append(_is_among(where.ids))
        if where.event_ids is not None:
            conditions.append(_is_among(self._row_ids(connection, where.event_ids)))
        if where.destination is not None:
            conditions.append(of(columns.destination) == where.stored_destination)
        if where.statuses is not None:
            conditions.append(has_status(*where.statuses) if where.statuses else false())
        if where.event_type is not None:
            conditions.append(of(columns.event_type) == where.event_type)
        if where.older_than is not None:
            conditions.append(columns.created_at_ms < where.older_than)
        if where.newer_than is not None:
            conditions.append(columns.created_at_ms >= where.newer_than)
        if where.due_after is not None:
            conditions += [has_status(Status.PENDING), columns.next_attempt_at_ms > where.due_after]
        return conditions

    def _row_ids(self, connection: Connection, event_ids: Sequence[str]) -> list[int]:
        """Return the row ids of these events, whose ids callers gave or which are derived."""
        outbox_id = self._identity.outbox_id(connection.scalar)
        derived = [parts for one in event_ids if (parts := parts_of(one, outbox_id)) is not None]
        found: list[int] = []
        for several in _slices(derived):
            # By the primary key first: SQLite uses no index for pairs of values.
            these = columns.id.in_([row_id for row_id, _ in several])
            pairs = tuple_(columns.id, columns.created_at_ms).in_(several)
            found += connection.scalars(select(columns.id).where(these, pairs, columns.event_id.is_(None)))
        destination = connection.scalar(_NEXT_DESTINATION, {"seen": ""})
        destinations = [""]
        while destination is not None:
            destinations.append(destination)
            destination = connection.scalar(_NEXT_DESTINATION, {"seen": destination})
        for several in _slices(event_ids):
            of_all = columns.destination.in_(destinations)
            found += connection.scalars(select(columns.id).where(of_all, columns.event_id.in_(several)))
        return found


def page(conditions: Sequence[ColumnElement[bool]]) -> Select[Any]:
    """Return the query for the first ids that match, after the id `seen` and up to the id `last`."""
    between = (
        columns.id > bindparam("seen", type_=BigInteger),
        columns.id <= bindparam("last", type_=BigInteger),
    )
    return select(columns.id).where(*between, *conditions).order_by(columns.id).limit(_PAGE)


def _with_text(connection: Connection, query: Select[Any], where: Where, limit: int, scan: Scan) -> _Matches:
    """Return the ids of the rows of a query that have the texts, up to one more than the limit."""
    ids = connection.scalars(query.limit(scan.at_most + 1)).all()
    matching: list[int] = []
    rows_read = 0
    for several in _slices(ids[: scan.at_most]):
        these = {*connection.scalars(select(columns.id).where(columns.id.in_(several), *_texts(where)))}
        matching += [row_id for row_id in several if row_id in these]
        rows_read += len(several)
        if scan.progress is not None:
            scan.progress(len(several))
        if len(matching) > limit:
            return _Matches(matching, rows_read)
    return _Matches(matching, rows_read, goes_on_at=ids[scan.at_most - 1] if len(ids) > scan.at_most else None)


def _texts(where: Where) -> Iterator[ColumnElement[bool]]:
    if where.failure is not None:
        yield contains_text(columns.last_error, where.failure)
    if where.contains is not None:
        yield contains_text(columns.payload_json, where.contains)


def _between(before: int | None, after: int | None) -> Iterator[ColumnElement[bool]]:
    if before is not None:
        yield columns.id < before
    if after is not None:
        yield columns.id > after


def _is_among(ids: Sequence[int]) -> ColumnElement[bool]:
    # As a part of the text: an event for several destinations has as many rows, and no database takes a parameter
    # for each row of ten thousand such events.
    return columns.id.in_(bindparam(None, ids, BigInteger, expanding=True, literal_execute=True))


def _plain(column: Any) -> ColumnElement[Any]:
    found: ColumnElement[Any] = column
    return found


def _slices(several: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (several[start : start + SLICE] for start in range(0, len(several), SLICE))
