"""How MySQL and MariaDB take the rows that are due.

A claim of fresh rows is first tried with one query, which finds and locks a full batch. Otherwise the rows are
found as on other servers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from sqlalchemy import Select, Update, bindparam, select, tuple_, union_all

from outbox.lifecycle import Status
from outbox.outcomes import WaitsFor
from outbox.pauses import SharedPause
from outbox.records import Claim
from outbox.storage.claimed import (
    CLAIM,
    CLAIM_ROWS,
    MOVE_TO_SENT,
    Kind,
    Part,
    Wanted,
    batch_size,
    claim_of_due,
    claims_alone,
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

# How many batches the query for a full batch looks at: flushers that look at the same time find the same rows.
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

_found = (
    walk(select(columns.id, columns.next_attempt_at_ms), WAITING_INDEX)
    .where(of_destination, is_one_of(columns.status, Status.PENDING), did_not_fail)
    .order_by(*oldest_first)
    .limit(bindparam("look_at"))
    .subquery()
)
_ran_out = (
    walk(select(columns.id), TIMES_INDEX)
    .where(of_destination, is_sending, did_not_fail, is_due)
    .limit(1)
    .scalar_subquery()
)
# The oldest rows are found without a lock, and then looked up in their order until the batch is full. So no other
# row is locked. A row whose lease ran out may be older than these.
LOCK_FRESH_AT_ONCE = walk(
    lock(
        select(*to_claim, SEEN, columns.next_attempt_at_ms)
        .prefix_with("STRAIGHT_JOIN")
        .select_from(_found.join(events, columns.id == _found.c.id))
        .where(
            _found.c.next_attempt_at_ms <= now,
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


def deliver(transaction: Transaction, events: Iterable[tuple[int, int]], *, sent_at_ms: int) -> int:
    """Move rows to sent, by id and creation time; return how many were moved."""
    pairs = [f"({row_id:d},{created:d})" for row_id, created in events]
    return transaction.change_listed(_DELIVER_LISTED, pairs, new_sent_at_ms=sent_at_ms)


def take_at_once(transaction: Transaction, kind: Kind, wanted: Wanted) -> Claim:
    """Claim a full batch of fresh rows. There are none during a hold or a pause, or if a probe is due."""
    if kind is not Kind.FRESH:
        return Claim([])
    rows = transaction.rows(LOCK_FRESH_AT_ONCE, **wanted.due, look_at=wanted.at_most * _BATCHES_READ)
    if len(rows) < wanted.at_most:  # there may be more due rows behind those that were found
        return Claim([])
    claim_rows(transaction, (row[0] for row in rows), wanted)
    *_, seen, _ = rows[0]
    return claim_of_due([(*row[:-2], row[-1]) for row in rows], kind)._replace(pause=SharedPause(number=seen or 0))


def take_never_due(transaction: Transaction, wanted: Wanted) -> Claim:
    """Claim rows whose times are huge, at the end of the index by the due time."""
    found = transaction.rows(NEVER_DUE, destination=wanted.destination, batch_size=wanted.at_most)
    locked = transaction.rows_of(LOCK_ROWS_IF_DUE, [row_id for (row_id,) in found], now=wanted.now_ms)
    transaction.change_rows(CLAIM_ROWS, [row[0] for row in locked], lease_until=wanted.lease_until_ms)
    return claim_of_due(locked, Kind.ANY)
