"""How PostgreSQL claims the rows that are due.

A claim of fresh rows is first tried as one statement, which leaves locked rows to others. This statement claims
nothing if another row is due: one that was scheduled, requeued, unparked or released, or whose lease ran out. In
that case the claim searches as on other servers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from sqlalchemy import (
    ARRAY,
    CTE,
    BigInteger,
    ColumnElement,
    Select,
    Text,
    Update,
    and_,
    any_,
    bindparam,
    cast,
    func,
    literal_column,
    or_,
    select,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB

from outbox.outcomes import WaitsFor
from outbox.pauses import SharedPause
from outbox.records import Claim
from outbox.storage.claimed import (
    CLAIM,
    CLAIMED,
    MOVE_TO_SENT,
    Delivery,
    Kind,
    OneRowQuery,
    Part,
    Wanted,
    batch_size,
    claim_of,
    claim_of_due,
    claimed_columns,
    claims_alone,
    is_due_or_never,
    is_pending,
    is_queued,
    is_sending,
    lost_some,
    waits_for_other,
    waits_for_row,
)
from outbox.storage.due_rows import Rows, Search
from outbox.storage.holds import IS_NOT_ON_HOLD
from outbox.storage.pauses import IS_UNPAUSED, SEEN
from outbox.storage.sql import (
    columns,
    did_not_fail,
    has_creation_time,
    has_due_time,
    is_due,
    is_postponed,
    literal,
    lock,
    move,
    never_tried,
    of_destination,
    oldest_first,
)
from outbox.storage.transactions import Transaction

_CREATED_AT = CLAIMED.index("created_at_ms")
_PLACE: ColumnElement[Any] = literal_column("observation_events.ctid")

# The rows of each index, in the terms that let the planner choose it.
_untried = (is_pending, did_not_fail, never_tried)
_postponed = (is_pending, did_not_fail, is_postponed)
_leased = (is_sending, did_not_fail)
# The same rows in the terms of the index by the due time. So the planner can't use the other index.
_postponed_by_time = (is_pending, did_not_fail, or_(is_sending, and_(*_postponed)))
_others = (is_queued, waits_for_other)
_last = (is_queued, waits_for_row)

_UNTRIED = Rows(_untried)
_POSTPONED = Rows(_postponed, by_time=(_postponed_by_time,))
_OTHERS = tuple((is_queued, columns.waits_for == literal(one)) for one in WaitsFor if one is not WaitsFor.ROW)
SEARCHES = {
    Part.FRESH: Search(_UNTRIED, _POSTPONED, Rows((*_leased, ~lost_some))),
    Part.NEWEST: Search(_UNTRIED, _POSTPONED, Rows((*_leased, ~lost_some)), is_newest=True),
    Part.ALONE: Search(Rows((claims_alone,))),
    Part.OTHERS: Search(Rows((*_others, ~claims_alone), by_time=tuple((*one, ~claims_alone) for one in _OTHERS))),
    Part.LAST: Search(Rows((*_last, ~claims_alone))),
    Part.ANY: Search(_UNTRIED, _POSTPONED, Rows(_leased), Rows(_others, by_time=_OTHERS), Rows(_last)),
}


def _first_due_ms(*conditions: Any, order: Sequence[Any] = (columns.next_attempt_at_ms,)) -> ColumnElement[Any]:
    """Return the due time of the first such row, or NULL. It needs an index in this order."""
    found = select(columns.next_attempt_at_ms).where(of_destination, *conditions)
    return found.order_by(*order).limit(literal_column("1")).scalar_subquery()


_postponed_due = _first_due_ms(*_postponed_by_time, is_due)
_lease_ran_out = _first_due_ms(*_leased, is_due)
_latest_first = (columns.next_attempt_at_ms.desc(),)
_by_reason = (columns.waits_for, columns.next_attempt_at_ms)


def _chosen(name: str, *conditions: Any, order: Any = oldest_first, at_most: Any = batch_size) -> CTE:
    """Return the part of a claim that locks rows. MATERIALIZED keeps the planner from running it again."""
    due: Select[Any] = select(_PLACE.label("place"), columns.id, columns.created_at_ms, columns.next_attempt_at_ms)
    due = due.where(of_destination, *conditions)
    return lock(due.order_by(*order).limit(at_most)).cte(name).prefix_with("MATERIALIZED")


@cache
def _claim_fresh(at_most: int) -> Update:
    """Return the statement that claims fresh rows. Its plan is the same however many rows there are.

    The limit is a part of the text, because the planner has to know it. The rows are found by their places in the
    table: they were locked there, and no index is read again.
    """
    conditions = (*_untried, is_due, IS_UNPAUSED, _postponed_due.is_(None), _lease_ran_out.is_(None))
    fresh = _chosen("fresh", *conditions, at_most=literal_column(str(at_most)))
    claimed = move(CLAIM).where(any_(func.array(select(fresh.c.place).scalar_subquery())) == _PLACE)
    # Nearly all rows are due from their creation on. Only the times of the others are returned.
    due_earlier = select(cast(func.json_object_agg(fresh.c.id, fresh.c.next_attempt_at_ms), Text)).where(
        fresh.c.next_attempt_at_ms < fresh.c.created_at_ms
    )
    return claimed.returning(*claimed_columns, SEEN, due_earlier.scalar_subquery())


def _claim(*parts: CTE) -> Update:
    chosen: Any = union_all(
        *(select(part.c.id, part.c.created_at_ms, part.c.next_attempt_at_ms) for part in parts)
    )
    chosen = chosen.order_by(*(chosen.selected_columns[name] for name in ("created_at_ms", "id")))
    chosen = chosen.limit(batch_size).cte("chosen").prefix_with("MATERIALIZED")
    return move(CLAIM).where(columns.id == chosen.c.id).returning(*claimed_columns, chosen.c.next_attempt_at_ms)


def _reason(one: WaitsFor) -> ColumnElement[str]:
    """Return the reason as a parameter, so that no kept plan uses the index that leaves out the reason `row`.

    That index is in another order. While the planner expects few rows, it would read all of the index and sort.
    """
    return bindparam(None, one.value, type_=Text)


def _unknown_reasons() -> Iterator[ColumnElement[bool]]:
    """Yield ranges of values of `waits_for` that only a later version knows. They lie between the known values."""
    known = [_reason(one) for one in sorted(WaitsFor)]
    yield columns.waits_for < known[0]
    for one, following in pairwise(known):
        yield and_(columns.waits_for > one, columns.waits_for < following)
    yield columns.waits_for > known[-1]


# The rows that have an index in the order of the due time.
_timed = (
    _postponed_by_time,
    _leased,
    *((is_queued, columns.waits_for == _reason(one)) for one in WaitsFor),
)
# Each row that a claim would take matches one of these conditions.
IS_ANY_DUE = or_(
    *(
        found.is_not(None)
        for found in (
            _first_due_ms(*_untried, is_due_or_never, order=oldest_first),
            *(_first_due_ms(*rows, is_due) for rows in _timed),
            *(_first_due_ms(*rows, ~has_due_time, order=_latest_first) for rows in _timed),
            *(_first_due_ms(is_queued, unknown, order=_by_reason) for unknown in _unknown_reasons()),
        )
    )
)

# Where a sort can't be avoided, the planner adds so much to its cost that it would compile the query, for 0.2 s.
_NEVER_SORT = select(
    *(func.set_config(name, "off", literal_column("true")).label(name) for name in ("enable_sort", "jit"))
)
_by_due_time = (columns.next_attempt_at_ms,)
CLAIM_NEVER_DUE = _claim(
    _chosen("fresh", *_untried, ~has_due_time, ~has_creation_time, IS_NOT_ON_HOLD),
    _chosen("again", *_postponed_by_time, ~has_due_time, IS_NOT_ON_HOLD, order=_by_due_time),
    _chosen("leased", *_leased, ~has_due_time, IS_NOT_ON_HOLD, order=_by_due_time),
    _chosen(
        "failed",
        is_queued,
        columns.waits_for.in_([literal(one) for one in WaitsFor]),
        ~has_due_time,
        IS_NOT_ON_HOLD,
    ),
)

# The condition on the id makes every plan look rows up by their ids. A join would read a small table whole.
_ids = cast(bindparam("ids", type_=ARRAY(BigInteger)), ARRAY(BigInteger))
_created = cast(bindparam("created_at_ms", type_=JSONB), JSONB)
DELIVER = MOVE_TO_SENT.where(
    columns.id == any_(_ids),
    columns.created_at_ms == cast(_created.op("->>")(cast(columns.id, Text)), BigInteger),
)


def take_at_once(transaction: Transaction, kind: Kind, wanted: Wanted) -> Claim:
    """Claim fresh rows by one statement. It claims none during a hold or a pause, or if a probe is due."""
    if kind is not Kind.FRESH or wanted.is_newest:
        return Claim([])
    statement = _claim_fresh(wanted.at_most)
    rows = transaction.rows(
        statement, destination=wanted.destination, now=wanted.now_ms, lease_until=wanted.lease_until_ms
    )
    if not rows:
        return Claim([])
    *_, seen, due_earlier = rows[0]
    due = {row[0]: row[_CREATED_AT] for row in rows}
    if due_earlier is not None:
        due |= {int(row_id): due_ms for row_id, due_ms in json.loads(due_earlier).items()}
    claimed = claim_of([row[:-2] for row in rows], kind, wanted.outbox_id, due=due)
    return claimed._replace(pause=SharedPause(number=seen or 0))


def read_in_order(transaction: Transaction) -> None:
    """Keep the planner from sorting, until the transaction ends.

    While its statistics are old, it expects few rows, and so it would read and sort all of them.
    """
    transaction.rows(_NEVER_SORT)


def take_never_due(transaction: Transaction, wanted: Wanted) -> Claim:
    """Claim rows whose times are invalid."""
    rows = transaction.rows(CLAIM_NEVER_DUE, **wanted.due, lease_until=wanted.lease_until_ms)
    return claim_of_due(rows, Kind.ANY, wanted.outbox_id)


def deliver(transaction: Transaction, delivery: Delivery) -> int:
    """Mark the rows of a delivery as sent. Return the number of rows that changed."""
    return transaction.change(DELIVER, **_parameters_of(delivery))


def deliver_and_query(
    transaction: Transaction, delivery: Delivery, query: OneRowQuery
) -> tuple[int, tuple[Any, ...]]:
    """Deliver the rows, and run a query. Return the number of rows, and the row of the query."""
    ((*seen, moved),) = transaction.rows(
        _deliver_and(query.statement), **_parameters_of(delivery), **query.parameters
    )
    return moved, tuple(seen)


@cache
def _deliver_and(query: Select[Any]) -> Select[Any]:
    delivered = DELIVER.returning(columns.id).cte("delivered")
    return query.add_columns(select(func.count()).select_from(delivered).scalar_subquery())


def _parameters_of(delivery: Delivery) -> dict[str, Any]:
    """Return the parameters of a delivery. Lists are texts, because the drivers make arrays of lists slowly."""
    ids = ",".join(map(str, delivery.row_ids))
    created = json.dumps(dict(zip(delivery.row_ids, delivery.created_at_ms, strict=True)))
    return {"ids": f"{{{ids}}}", "created_at_ms": created, "new_sent_at_ms": delivery.sent_at_ms}
