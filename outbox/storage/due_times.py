"""When the next row of a destination is due, and when the destination last accepted one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Connection,
    ScalarSelect,
    Select,
    cast,
    func,
    literal_column,
    select,
    union,
    union_all,
)

from outbox.lifecycle import Status
from outbox.outcomes import WaitsFor
from outbox.records import Due
from outbox.storage.column_types import TIMES_BELOW
from outbox.storage.dialects import dialect_of
from outbox.storage.dialects.base import Dialect
from outbox.storage.indexes import TIMES_INDEX, WAITING_INDEX
from outbox.storage.sql import (
    columns,
    did_not_fail,
    has_creation_time,
    has_due_time,
    in_order,
    is_delivered,
    is_one_of,
    is_postponed,
    literal,
    never_tried,
    now,
    of_destination,
    oldest_first,
    unindexed_status,
)

_waits = [columns.waits_for == literal(one) for one in WaitsFor]
_pending = is_one_of(unindexed_status, Status.PENDING)


def _last_accepted(of: ColumnElement[bool]) -> Select[Any]:
    return (
        select(columns.sent_at_ms)
        .where(
            of,
            is_delivered(),
            columns.sent_at_ms < literal_column(str(TIMES_BELOW), BigInteger),
        )
        .order_by(columns.sent_at_ms.desc())
        .limit(1)
    )


def _due(of: ColumnElement[bool], dialect: Dialect) -> Iterator[ScalarSelect[Any]]:
    # One look-up for each status and each reason to wait: no index has the order of the times over several.
    groups: list[tuple[ColumnElement[bool], ...]] = [(_pending, waits) for waits in _waits]
    # Rows whose lease ran out: their flusher died, or is late.
    groups += [
        (is_one_of(unindexed_status, Status.SENDING), columns.next_attempt_at_ms <= now, waits)
        for waits in (did_not_fail, *_waits)
    ]
    if TIMES_INDEX in dialect.indexes:
        # Without the name of the index, MariaDB would read all rows of the destination for each look-up.
        for conditions in ((_pending, did_not_fail), *groups):
            first = select(columns.next_attempt_at_ms).where(of, has_due_time, *conditions)
            first = in_order(first.order_by(columns.next_attempt_at_ms).limit(1), TIMES_INDEX)
            yield dialect.adapted(first).scalar_subquery()
        return
    # Rows that were never tried are due from their creation on, so the oldest one is due first.
    yield (
        select(columns.next_attempt_at_ms)
        .where(of, _pending, did_not_fail, never_tried, has_creation_time, has_due_time)
        .order_by(*oldest_first)
        .limit(1)
        .scalar_subquery()
    )
    for conditions in ((_pending, did_not_fail, is_postponed), *groups):
        yield select(func.min(columns.next_attempt_at_ms)).where(of, has_due_time, *conditions).scalar_subquery()


LAST_ACCEPTED = _last_accepted(of_destination)


@cache
def next_due(dialect: Dialect) -> Select[Any]:
    """Return the query for the earliest due time of a destination."""
    times = union_all(*(select(one.label("due")) for one in _due(of_destination, dialect))).subquery()
    return select(cast(func.min(times.c.due), BigInteger))


@cache
def due_everywhere(dialect: Dialect) -> Select[Any]:
    """Return the query for all destinations that may have pending or sending rows.

    It finds the name of each, when it last accepted a row, and the due times of its rows.
    """
    if WAITING_INDEX in dialect.indexes:  # it has all rows, and MySQL skips in it from one destination to the next
        names = select(columns.destination.label("name")).distinct().subquery("named")
    else:
        names = union(*(select(found.c.name) for found in map(_names, dialect.pending))).subquery("named")
    this = columns.destination == names.c.name
    return select(
        names.c.name,
        cast(_last_accepted(this).scalar_subquery(), BigInteger),
        *(cast(one, BigInteger) for one in _due(this, dialect)),
    ).where(names.c.name.is_not(None))


def due(connection: Connection, *, now_ms: int) -> dict[str, Due]:
    """Return the destinations that may have pending or sending rows."""
    query = due_everywhere(dialect_of(connection))
    return {
        name: Due(min((one for one in times_ms if one is not None), default=None), accepted_ms)
        for name, accepted_ms, *times_ms in connection.execute(query, {"now": now_ms})
    }


def _names(kind: ColumnElement[bool]) -> CTE:
    """Return the destinations of these rows. Each is looked up in an index after the one before it."""
    first = select(func.min(columns.destination).label("name")).where(kind).cte(recursive=True)
    following = select(func.min(columns.destination)).where(kind, columns.destination > first.c.name)
    return first.union_all(select(following.correlate(first).scalar_subquery()).where(first.c.name.is_not(None)))
