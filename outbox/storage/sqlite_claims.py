"""How SQLite takes the rows that are due, without a walk past those that are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy import Select, bindparam, case, or_, select, union_all

from outbox.outcomes import WaitsFor
from outbox.records import Claim
from outbox.storage.claimed import (
    CLAIM_ROWS,
    Kind,
    Wanted,
    batch_size,
    claim_of,
    claimed_columns,
    claims_alone,
    is_pending,
    is_sending,
    lost_some,
    newest_first,
    waits_for_row,
)
from outbox.storage.sql import (
    columns,
    did_not_fail,
    failed_before,
    has_creation_time,
    has_due_time,
    is_due,
    is_source,
    literal,
    never_tried,
    now,
    of_destination,
    oldest_first,
    was_tried,
    without_index,
)
from outbox.storage.transactions import Transaction

Place = tuple[Any, ...]
"""The place of a row: its rank in its kind, its creation time, its id, and its due time."""

_ALONE, _NORMAL, _LAST = range(3)


def places(*conditions: Any) -> Any:
    """Return a query for the places of rows, without the rank."""
    place = (columns.created_at_ms, columns.id, columns.next_attempt_at_ms)
    return select(*place).where(of_destination, *conditions)


def _oldest(*conditions: Any, order: Any = oldest_first) -> Select[Any]:
    found: Select[Any] = places(*conditions, has_creation_time).order_by(*order).limit(batch_size)
    return found


class _Part(NamedTuple):
    """Pending rows that may wait for something: how to find the oldest ones that are due."""

    head: Select[Any]
    """The oldest rows, due or not, by an index in the order of a claim. Usually they are due, or no rows are."""
    due: Select[Any]
    """The oldest that are due, by an index of the due time."""
    newest: Select[Any]
    """The same in the opposite order."""
    newest_due: Select[Any]


def _part(*conditions: Any) -> _Part:
    created_at_ms = without_index(columns.created_at_ms)
    return _Part(
        head=_oldest(is_pending, *conditions, has_due_time),
        due=_oldest(is_pending, *conditions, is_due, order=(created_at_ms, columns.id)),
        newest=_oldest(is_pending, *conditions, has_due_time, order=newest_first),
        newest_due=_oldest(is_pending, *conditions, is_due, order=(created_at_ms.desc(), columns.id.desc())),
    )


# Each finds the oldest rows of its kind in an index for that kind.
DUE_NEVER_TRIED = _oldest(is_pending, did_not_fail, never_tried, is_due)
NEWEST_NEVER_TRIED = _oldest(is_pending, did_not_fail, never_tried, is_due, order=newest_first)
BROUGHT_BACK = _part(did_not_fail, was_tried)
FAILED = _part(columns.waits_for == bindparam("waits_for"))
_SENDING = (is_sending, is_due)
_rank = case((claims_alone, _ALONE), (waits_for_row, _LAST), else_=_NORMAL)
LEASES_RUN_OUT = {
    Kind.FRESH: _oldest(*_SENDING, did_not_fail, ~lost_some),
    Kind.FAILED: _oldest(*_SENDING, or_(failed_before, lost_some), order=(_rank, *oldest_first)).add_columns(
        _rank
    ),
    Kind.ANY: _oldest(*_SENDING),
}
# Rows whose times are invalid. They are claimed to be abandoned; the queries above would never find them.
NEVER_DUE = union_all(
    places(is_source("claim", columns.status), ~has_due_time),  # by the baseline's index
    places(is_pending, did_not_fail, never_tried, is_due, ~has_creation_time),
    # By the index in the order of the creation time: nearly all rows may be due.
    *(
        places(
            is_pending,
            columns.waits_for == literal(one),
            without_index(columns.next_attempt_at_ms) <= now,
            ~has_creation_time,
        )
        for one in WaitsFor
    ),
    places(is_sending, is_due, ~has_creation_time),
).limit(batch_size)

CLAIM_AND_RETURN = CLAIM_ROWS.returning(*claimed_columns)


def take(transaction: Transaction, kind: Kind, wanted: Wanted) -> Claim:
    """Claim the rows of a kind that are due."""
    found = _newest(transaction, wanted) if wanted.is_newest else _due(transaction, kind, wanted)
    return _claimed(transaction, found, kind, wanted)


def _claimed(transaction: Transaction, found: list[Place], kind: Kind, wanted: Wanted) -> Claim:
    row_ids = [row_id for _, _, row_id, _ in found]
    rows = transaction.rows_of(CLAIM_AND_RETURN, row_ids, lease_until=wanted.lease_until_ms)
    return claim_of(rows, kind, due={row_id: due_ms for _, _, row_id, due_ms in found})


def _due(transaction: Transaction, kind: Kind, wanted: Wanted) -> list[Place]:
    now_ms, at_most, this = wanted.now_ms, wanted.at_most, wanted.due
    head_of_this = {"destination": wanted.destination, "batch_size": at_most}
    sure: list[Place] = []
    for created, row_id, due_ms, *rank in transaction.rows(LEASES_RUN_OUT[kind], **this):
        sure.append((rank[0] if rank else _NORMAL, created, row_id, due_ms))
    if kind is not Kind.FAILED:
        sure += _ranked(_NORMAL, transaction.rows(DUE_NEVER_TRIED, **this))
    parts = list(_parts(kind))
    heads = [
        list(_ranked(rank, transaction.rows(part.head, **head_of_this, **waits_for)))
        for rank, part, waits_for in parts
    ]
    due = sorted([*sure, *(place for head in heads for place in head if place[-1] <= now_ms)])[:at_most]
    if not all(len(head) < at_most or (len(due) == at_most and due[-1] <= head[-1]) for head in heads):
        # Some due rows may be behind rows of the head that are not due.
        others = [
            place
            for rank, part, waits_for in parts
            for place in _ranked(rank, transaction.rows(part.due, **this, **waits_for))
        ]
        due = sorted([*sure, *others])[:at_most]
    if due and due[0][0] == _ALONE:
        return due[:1]
    if kind is not Kind.FAILED and len(due) < at_most:
        due += _ranked(_NORMAL, transaction.rows(NEVER_DUE, **this)[: at_most - len(due)])
    return due


def _parts(kind: Kind) -> Iterator[tuple[int, _Part, dict[str, str]]]:
    """Yield the parts of a kind: rank, queries, and what these need to know."""
    if kind is not Kind.FAILED:
        yield _NORMAL, BROUGHT_BACK, {}
    if kind is not Kind.FRESH:
        for one in WaitsFor:
            is_last = one is WaitsFor.ROW and kind is Kind.FAILED
            yield _LAST if is_last else _NORMAL, FAILED, {"waits_for": one.value}


def _newest(transaction: Transaction, wanted: Wanted) -> list[Place]:
    this = {**wanted.due, "batch_size": 1}
    found = transaction.rows(NEWEST_NEVER_TRIED, **this)
    brought_back = transaction.rows(BROUGHT_BACK.newest, destination=wanted.destination, batch_size=1)
    if brought_back and brought_back[0][-1] > wanted.now_ms:
        brought_back = transaction.rows(BROUGHT_BACK.newest_due, **this)
    found += brought_back
    if not found:
        found = transaction.rows(LEASES_RUN_OUT[Kind.FRESH], **this)
    return list(_ranked(_NORMAL, [max(found)] if found else []))


def _ranked(rank: int, found: list[tuple[Any, ...]]) -> Iterator[Place]:
    for created, row_id, due_ms in found:
        yield rank, created, row_id, due_ms
