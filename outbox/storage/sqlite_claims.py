"""How SQLite takes the rows that are due, without a walk past those that are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Integer, Select, bindparam, case, or_, select, union_all

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
    is_due_or_never,
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
    is_postponed,
    literal,
    never_tried,
    now,
    of_destination,
    oldest_first,
    without_index,
)
from outbox.storage.transactions import Transaction

Place = tuple[Any, ...]
"""The place of a row: its rank in its kind, its creation time, its id, and its due time."""

_ALONE, _NORMAL, _LAST = range(3)
_rank: ColumnElement[int] = bindparam("rank", _NORMAL, Integer)
_rank_under_lease = case((claims_alone, _ALONE), (waits_for_row, _LAST), else_=_NORMAL)


def places(*conditions: Any, rank: ColumnElement[int] = _rank) -> Select[Any]:
    """Return a query for the places of the destination's rows that meet the conditions."""
    place = (rank, columns.created_at_ms, columns.id, columns.next_attempt_at_ms)
    return select(*place).where(of_destination, *conditions)


def _oldest(*conditions: Any, order: Any = oldest_first, rank: ColumnElement[int] = _rank) -> Select[Any]:
    return places(*conditions, has_creation_time, rank=rank).order_by(*order).limit(batch_size)


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
POSTPONED = _part(did_not_fail, is_postponed)
FAILED = _part(columns.waits_for == bindparam("waits_for"))
_SENDING = (is_sending, is_due)
LEASES_RUN_OUT = {
    Kind.FRESH: _oldest(*_SENDING, did_not_fail, ~lost_some),
    Kind.FAILED: _oldest(
        *_SENDING,
        or_(failed_before, lost_some),
        order=(_rank_under_lease, *oldest_first),
        rank=_rank_under_lease,
    ),
    Kind.ANY: _oldest(*_SENDING),
}
_waits_for_any = columns.waits_for.in_([literal(one) for one in WaitsFor])
# Rows whose times are invalid. They are claimed to be abandoned; the queries above would never find them.
NEVER_DUE = union_all(
    places(is_pending, did_not_fail, never_tried, is_due_or_never, ~has_creation_time),
    places(is_pending, did_not_fail, is_postponed, ~has_due_time),
    places(is_pending, _waits_for_any, ~has_due_time),
    # By the index in the order of the creation time: nearly all rows may be due.
    places(is_pending, _waits_for_any, without_index(columns.next_attempt_at_ms) <= now, ~has_creation_time),
    places(is_sending, ~has_due_time),
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
    return claim_of(rows, kind, wanted.outbox_id, due={row_id: due_ms for _, _, row_id, due_ms in found})


def _due(transaction: Transaction, kind: Kind, wanted: Wanted) -> list[Place]:
    now_ms, at_most, this = wanted.now_ms, wanted.at_most, wanted.due
    head_of_this = {"destination": wanted.destination, "batch_size": at_most}
    sure: list[Place] = transaction.rows(LEASES_RUN_OUT[kind], **this)
    if kind is not Kind.FAILED:
        sure += transaction.rows(DUE_NEVER_TRIED, **this)
    parts = list(_parts(kind))
    heads = [transaction.rows(part.head, **head_of_this, **these) for part, these in parts]
    due = sorted([*sure, *(place for head in heads for place in head if place[-1] <= now_ms)])[:at_most]
    if not all(len(head) < at_most or (len(due) == at_most and due[-1] <= head[-1]) for head in heads):
        # Some due rows may be behind rows of the head that are not due.
        others = [place for part, these in parts for place in transaction.rows(part.due, **this, **these)]
        due = sorted([*sure, *others])[:at_most]
    if due and due[0][0] == _ALONE:
        return due[:1]
    if kind is not Kind.FAILED and len(due) < at_most:
        due += transaction.rows(NEVER_DUE, **this)[: at_most - len(due)]
    return due


def _parts(kind: Kind) -> Iterator[tuple[_Part, dict[str, Any]]]:
    """Yield the parts of a kind: the queries of each, and their parameters."""
    if kind is not Kind.FAILED:
        yield POSTPONED, {}
    if kind is not Kind.FRESH:
        for one in WaitsFor:
            is_last = one is WaitsFor.ROW and kind is Kind.FAILED
            yield FAILED, {"waits_for": one.value, "rank": _LAST if is_last else _NORMAL}


def _newest(transaction: Transaction, wanted: Wanted) -> list[Place]:
    this = {**wanted.due, "batch_size": 1}
    found = transaction.rows(NEWEST_NEVER_TRIED, **this)
    postponed = transaction.rows(POSTPONED.newest, destination=wanted.destination, batch_size=1)
    if postponed and postponed[0][-1] > wanted.now_ms:
        postponed = transaction.rows(POSTPONED.newest_due, **this)
    found += postponed
    if not found:
        found = transaction.rows(LEASES_RUN_OUT[Kind.FRESH], **this)
    return [max(found)] if found else []
