"""Deletes the events that an operator chooses by type or age."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Engine, Select, and_, bindparam, select

from outbox.lifecycle import Status
from outbox.storage.deletion import Deletable, Deletion
from outbox.storage.engines import reading
from outbox.storage.sql import LAST_ID, by_id, columns, literal, now, these_rows, without_index
from outbox.storage.transactions import Transaction, Writer

_SLICE = 1_000

_for_purge = (
    *(columns[name] for name in ("id", "status", "event_type", "destination", "created_at_ms")),
    and_(columns.status == literal(Status.SENDING), columns.next_attempt_at_ms > now).label("is_in_flight"),
)
LOCK_ROWS_TO_PURGE = by_id(select(*_for_purge).where(these_rows).order_by(columns.id).with_for_update())


def to_purge(
    *, event_type: str | None, created_before_ms: int | None, destination: str | None = None
) -> Select[Any]:
    """Return the query for a slice of the rows that fit, with the ids after `seen`, up to `last`.

    No index has the order of all statuses by type or creation, so all slices together walk the primary key once.
    On SQLite the plus keeps each of them from sorting all rows of the type, by the baseline's index.
    """
    statement = (
        select(*_for_purge)
        .where(columns.id > bindparam("seen"), columns.id <= bindparam("last"))
        .order_by(columns.id)
        .limit(bindparam("slice_size"))
    )
    if event_type is not None:
        statement = statement.where(without_index(columns.event_type) == event_type)
    if destination is not None:
        statement = statement.where(without_index(columns.destination) == destination)
    if created_before_ms is not None:
        statement = statement.where(columns.created_at_ms < created_before_ms)
    return statement


class Purge:
    """Deletes the events that an operator names, but none in flight."""

    def __init__(self, engine: Engine, writer: Writer, deletion: Deletion) -> None:
        self._engine = engine
        self._writer = writer
        self._deletion = deletion

    def purge(
        self,
        *,
        event_type: str | None,
        created_before_ms: int | None,
        destination: str | None = None,
        now_ms: int,
        dry_run: bool,
    ) -> tuple[Counter[tuple[str, str]], int]:
        """Delete the rows that match all conditions. Rows in flight and rows inserted during the purge stay.

        Return how many by status and event type, and how many stay because they are in flight. Rows are searched
        without a lock, and deleted in slices. Each slice is a transaction.
        """
        query = to_purge(event_type=event_type, created_before_ms=created_before_ms, destination=destination)
        purged: Counter[tuple[str, str]] = Counter()
        in_flight = 0
        for found in self._slices(query, now_ms=now_ms):
            rows = found if dry_run else self._purge([row[0] for row in found], now_ms=now_ms)
            for _, status, type_of_row, *_, is_in_flight in rows:
                in_flight += is_in_flight
                purged[status, type_of_row] += not is_in_flight
        return +purged, in_flight

    def _slices(self, query: Select[Any], *, now_ms: int) -> Iterator[Sequence[Sequence[Any]]]:
        with reading(self._engine) as connection:
            last = connection.scalar(LAST_ID)
        seen = 0
        while True:
            where = {"seen": seen, "last": last, "slice_size": _SLICE, "now": now_ms}
            with reading(self._engine) as connection:
                rows = connection.execute(query, where).all()
            if rows:
                yield rows
            if len(rows) < _SLICE:
                break
            seen = rows[-1][0]

    def _purge(self, row_ids: Sequence[int], *, now_ms: int) -> Sequence[Sequence[Any]]:
        """Delete these rows, except those in flight. Return all of them that existed."""

        def purge(transaction: Transaction) -> Sequence[Sequence[Any]]:
            rows = transaction.rows_of(LOCK_ROWS_TO_PURGE, row_ids, now=now_ms)
            deletable = [Deletable(*row[:-1]) for row in rows if not row[-1]]
            self._deletion.delete(transaction, deletable, reason="purge")
            return rows

        return self._writer.run(purge)
