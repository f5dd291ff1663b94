"""How MySQL and MariaDB take the rows that are due.

A claim first tries one query, which finds and locks a batch of fresh rows. If this query may have missed due rows,
the claim searches for rows as on other servers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, Update, bindparam, func, or_, select, tuple_, union_all

from outbox.lifecycle import Status
from outbox.outcomes import WaitsFor
from outbox.pauses import SharedPause
from outbox.records import Claim
from outbox.storage.claimed import (
    CLAIM,
    CLAIM_ROWS,
    MOVE_TO_SENT,
    Delivery,
    Kind,
    Part,
    Wanted,
    batch_size,
    claim_of_due,
    claims_alone,
    is_due_or_never,
    is_sending,
    to_claim,
    waits_for_row,
)
from outbox.storage.due_rows import LOCK_ROWS_IF_DUE, Rows, Search
from outbox.storage.indexes import QUEUE_INDEX, TIMES_INDEX, WAITING_INDEX
from outbox.storage.pauses import IS_UNPAUSED, SEEN
from outbox.storage.sql import (
    LISTED,
    PRIMARY_KEY,
    by_id,
    columns,
    did_not_fail,
    events,
    has_due_time,
    is_due,
    is_one_of,
    is_source,
    literal,
    lock,
    move,
    now,
    of_destination,
    oldest_first,
)
from outbox.storage.transactions import Transaction

# The query reads four batches of rows. Otherwise, flushers that run it at the same time would find too few rows.
_BATCHES_READ = 4

_Statement = TypeVar("_Statement", Select[Any], Update)


def walk(statement: _Statement, index: str) -> _Statement:
    """Let MySQL and MariaDB read the events by an index."""
    # Without the hint, MySQL may choose another index, and it locks each row that it reads, even if it does not
    # return or change the row.
    return statement.with_hint(selectable=events, text=f"FORCE INDEX ({index})")


def _rows(*waits: Any, index: str = WAITING_INDEX) -> Iterator[Rows]:
    """Yield the rows of one reason to wait: pending ones may wait long, those under a lease are few."""
    pending, sending = ((is_one_of(columns.status, one), *waits) for one in (Status.PENDING, Status.SENDING))
    yield Rows(pending, index, by_time=(pending,), time_index=TIMES_INDEX)
    yield Rows(sending, index)


def oldest_of_each_reason(statement: Select[Any]) -> Select[Any]:
    """Return a query for the same rows: the oldest ones of a status.

    The index has their order only within each reason to wait, so the query takes the oldest rows of each reason,
    and of these the oldest ones.
    """
    order = (columns.created_at_ms.label("by_created"), columns.id.label("by_id"))
    several = (statement.add_columns(*order).where(waits) for waits in (did_not_fail, *_FAILED.values()))
    found = union_all(*(select(walk(one, WAITING_INDEX).subquery()) for one in several)).subquery()
    *wanted, by_created, by_row_id = found.c
    limit = statement._limit_clause  # noqa: SLF001 - SQLAlchemy tells the limit of a query in no other way
    return select(*wanted).order_by(by_created, by_row_id).limit(limit)


_not_alone = ~claims_alone
_FRESH = [*_rows(did_not_fail, _not_alone)]
_FAILED = {one: columns.waits_for == literal(one) for one in WaitsFor}
# MySQL reads an index in order only for one status and one reason to wait at a time.
SEARCHES = {
    Part.FRESH: Search(*_FRESH, hinted=walk),
    Part.NEWEST: Search(*_FRESH, is_newest=True, hinted=walk),
    Part.ALONE: Search(Rows((claims_alone,), QUEUE_INDEX), hinted=walk),
    Part.OTHERS: Search(
        *(rows for one, waits in _FAILED.items() if one is not WaitsFor.ROW for rows in _rows(waits, _not_alone)),
        hinted=walk,
    ),
    Part.LAST: Search(*_rows(waits_for_row, _not_alone), hinted=walk),
    Part.ANY: Search(*(rows for waits in (did_not_fail, *_FAILED.values()) for rows in _rows(waits)), hinted=walk),
}

_oldest_fresh = (
    walk(select(columns.id, columns.next_attempt_at_ms), WAITING_INDEX)
    .where(of_destination, is_one_of(columns.status, Status.PENDING), did_not_fail)
    .order_by(*oldest_first)
    .limit(bindparam("look_at"))
    .subquery()
)
COUNT_READ = select(func.count()).select_from(_oldest_fresh)
_ran_out = (
    walk(select(func.max(columns.next_attempt_at_ms)), TIMES_INDEX)
    .where(of_destination, is_sending, did_not_fail, is_due)
    .scalar_subquery()
)


def _due_or_never(*conditions: ColumnElement[bool]) -> Iterator[ColumnElement[bool]]:
    """Yield two conditions: the first of these rows is due, and the last one has an invalid due time."""
    for end, condition in ((func.min, is_due), (func.max, ~has_due_time)):
        rows = walk(select(end(columns.next_attempt_at_ms)), TIMES_INDEX).where(of_destination, *conditions)
        yield rows.where(condition).scalar_subquery().is_not(None)


# Whatever such a row waits for. There are few.
_alone_due = walk(select(columns.id), QUEUE_INDEX).where(of_destination, claims_alone, is_due_or_never).limit(1)
# MIN and MAX each read one entry at an end of the index.
IS_ANY_DUE = or_(
    _alone_due.scalar_subquery().is_not(None),
    *chain.from_iterable(
        _due_or_never(is_one_of(columns.status, status), waits)
        for status in (Status.PENDING, Status.SENDING)
        for waits in (did_not_fail, *_FAILED.values())
    ),
)
# The oldest rows are found without a lock, and then looked up in their order until the batch is full. So no other
# row is locked. A row whose lease ran out may be older than these.
LOCK_FRESH_AT_ONCE = walk(
    lock(
        select(*to_claim, SEEN, columns.next_attempt_at_ms)
        .prefix_with("STRAIGHT_JOIN")
        .select_from(_oldest_fresh.join(events, columns.id == _oldest_fresh.c.id))
        .where(
            _oldest_fresh.c.next_attempt_at_ms <= now,
            is_source("claim", columns.status),
            is_due,
            IS_UNPAUSED,
            _ran_out.is_(None),
        )
        .limit(batch_size)
    ),
    PRIMARY_KEY,
)
NEVER_DUE = union_all(
    *(
        select(
            walk(
                select(columns.id)
                .where(of_destination, is_one_of(columns.status, status), waits, ~has_due_time)
                .limit(bindparam("batch_size")),
                TIMES_INDEX,
            ).subquery()
        )
        for status in (Status.PENDING, Status.SENDING)
        for waits in (did_not_fail, *_FAILED.values())
    )
).limit(bindparam("batch_size"))


_CLAIM_LISTED = by_id(move(CLAIM).where(columns.id.op("IN")(LISTED)))
_DELIVER_LISTED = by_id(MOVE_TO_SENT.where(tuple_(columns.id, columns.created_at_ms).op("IN")(LISTED)))


def claim_rows(transaction: Transaction, row_ids: Iterable[int], wanted: Wanted) -> None:
    """Move locked rows to sending."""
    ids = [f"{row_id:d}" for row_id in row_ids]
    transaction.change_listed(_CLAIM_LISTED, ids, lease_until=wanted.lease_until_ms)


def deliver(transaction: Transaction, delivery: Delivery) -> int:
    """Mark the rows of a delivery as sent. Return the number of rows that changed."""
    events = zip(delivery.row_ids, delivery.created_at_ms, strict=True)
    pairs = [f"({row_id:d},{created:d})" for row_id, created in events]
    return transaction.change_listed(_DELIVER_LISTED, pairs, new_sent_at_ms=delivery.sent_at_ms)


def take_at_once(transaction: Transaction, kind: Kind, wanted: Wanted) -> Claim:
    """Claim fresh rows.

    Claim none during a hold or a pause, if a probe is due, or if a lease ran out. Also claim none if fewer rows
    than wanted were found, and more of them may be due.
    """
    if kind is not Kind.FRESH:
        return Claim([])
    look_at = wanted.at_most * _BATCHES_READ
    rows = transaction.rows(LOCK_FRESH_AT_ONCE, **wanted.due, look_at=look_at)
    if not rows:
        return Claim([])
    if len(rows) < wanted.at_most:
        rows_read = transaction.value(COUNT_READ, destination=wanted.destination, look_at=look_at)
        if rows_read == look_at:  # more rows may be due behind these
            return Claim([])
    claim_rows(transaction, (row[0] for row in rows), wanted)
    *_, seen, _ = rows[0]
    claimed = claim_of_due([(*row[:-2], row[-1]) for row in rows], kind, wanted.outbox_id)
    return claimed._replace(pause=SharedPause(number=seen or 0))


def take_never_due(transaction: Transaction, wanted: Wanted) -> Claim:
    """Claim rows whose times are huge, at the end of the index by the due time."""
    found = transaction.rows(NEVER_DUE, destination=wanted.destination, batch_size=wanted.at_most)
    locked = transaction.rows_of(LOCK_ROWS_IF_DUE, [row_id for (row_id,) in found], now=wanted.now_ms)
    transaction.change_rows(CLAIM_ROWS, [row[0] for row in locked], lease_until=wanted.lease_until_ms)
    return claim_of_due(locked, Kind.ANY, wanted.outbox_id)
