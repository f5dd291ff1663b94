"""How PostgreSQL claims the rows that are due.

A claim of fresh rows is first tried as one statement, which leaves locked rows to others. This statement claims
nothing if a row is due that was brought back, or whose lease ran out. Then the rows are found as on other servers.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import CTE, Select, Update, and_, func, literal_column, or_, select, union_all

from outbox.outcomes import WaitsFor
from outbox.pauses import SharedPause
from outbox.records import Claim
from outbox.storage.claimed import (
    CLAIM,
    Kind,
    Part,
    Wanted,
    batch_size,
    claim_of_due,
    claimed_columns,
    claims_alone,
    is_pending,
    is_sending,
    is_undelivered,
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
    literal,
    lock,
    move,
    never_tried,
    of_destination,
    oldest_first,
    was_tried,
)
from outbox.storage.transactions import Transaction

# The rows of each index, in the terms that let the planner choose it.
_untried = (is_pending, did_not_fail, never_tried)
_brought_back = (is_pending, did_not_fail, was_tried)
_leased = (is_sending, did_not_fail)
# The same rows in the terms of the index by the due time. So the planner can't use the other index.
_brought_back_by_time = (is_pending, did_not_fail, or_(is_sending, and_(*_brought_back)))
_others = (is_undelivered, waits_for_other)
_last = (is_undelivered, waits_for_row)

_UNTRIED = Rows(_untried)
_BROUGHT_BACK = Rows(_brought_back, by_time=(_brought_back_by_time,))
_OTHERS = tuple((is_undelivered, columns.waits_for == literal(one)) for one in WaitsFor if one is not WaitsFor.ROW)
SEARCHES = {
    Part.FRESH: Search(_UNTRIED, _BROUGHT_BACK, Rows((*_leased, ~lost_some))),
    Part.NEWEST: Search(_UNTRIED, _BROUGHT_BACK, Rows((*_leased, ~lost_some)), is_newest=True),
    Part.ALONE: Search(Rows((claims_alone,))),
    Part.OTHERS: Search(Rows((*_others, ~claims_alone), by_time=tuple((*one, ~claims_alone) for one in _OTHERS))),
    Part.LAST: Search(Rows((*_last, ~claims_alone))),
    Part.ANY: Search(_UNTRIED, _BROUGHT_BACK, Rows(_leased), Rows(_others, by_time=_OTHERS), Rows(_last)),
}


def _none_due(*conditions: Any) -> Any:
    """Return the condition that no such row is due. It needs an index in the order of the due time."""
    due = select(columns.next_attempt_at_ms).where(of_destination, *conditions, is_due)
    return due.order_by(columns.next_attempt_at_ms).limit(1).scalar_subquery().is_(None)


def _chosen(name: str, *conditions: Any, order: Any = oldest_first, at_most: Any = batch_size) -> CTE:
    """Return the part of a claim that locks rows. MATERIALIZED keeps the planner from running it again."""
    due: Select[Any] = select(columns.id, columns.created_at_ms, columns.next_attempt_at_ms)
    due = due.where(of_destination, *conditions)
    return lock(due.order_by(*order).limit(at_most)).cte(name).prefix_with("MATERIALIZED")


def _claim(*parts: CTE) -> Update:
    chosen: Any = parts[0]
    if len(parts) > 1:
        chosen = union_all(*(select(part) for part in parts))
        chosen = chosen.order_by(*(chosen.selected_columns[name] for name in ("created_at_ms", "id")))
        chosen = chosen.limit(batch_size).cte("chosen").prefix_with("MATERIALIZED")
    claimed = move(CLAIM).where(columns.id == chosen.c.id)
    return claimed.returning(*claimed_columns, SEEN, chosen.c.next_attempt_at_ms)


CLAIM_FRESH_AT_ONCE = _claim(
    _chosen("fresh", *_untried, is_due, IS_UNPAUSED, _none_due(*_brought_back_by_time), _none_due(*_leased))
)

# Where a sort can't be avoided, the planner adds so much to its cost that it would compile the query, for 0.2 s.
_NEVER_SORT = select(
    *(func.set_config(name, "off", literal_column("true")).label(name) for name in ("enable_sort", "jit"))
)
_by_due_time = (columns.next_attempt_at_ms,)
CLAIM_NEVER_DUE = _claim(
    _chosen("fresh", *_untried, ~has_due_time, ~has_creation_time, IS_NOT_ON_HOLD),
    _chosen("again", *_brought_back_by_time, ~has_due_time, IS_NOT_ON_HOLD, order=_by_due_time),
    _chosen("leased", *_leased, ~has_due_time, IS_NOT_ON_HOLD, order=_by_due_time),
    _chosen(
        "failed",
        is_undelivered,
        columns.waits_for.in_([literal(one) for one in WaitsFor]),
        ~has_due_time,
        IS_NOT_ON_HOLD,
    ),
)


def take_at_once(transaction: Transaction, kind: Kind, wanted: Wanted) -> Claim:
    """Claim fresh rows by one statement. It claims none during a hold or a pause, or if a probe is due."""
    if kind is not Kind.FRESH or wanted.is_newest:
        return Claim([])
    return _claimed(transaction, CLAIM_FRESH_AT_ONCE, kind, wanted)


def read_in_order(transaction: Transaction) -> None:
    """Keep the planner from sorting, until the transaction ends.

    While its statistics are old, it expects few rows, and so it would read and sort all of them.
    """
    transaction.rows(_NEVER_SORT)


def take_never_due(transaction: Transaction, wanted: Wanted) -> Claim:
    """Claim rows whose times are invalid."""
    return _claimed(transaction, CLAIM_NEVER_DUE, Kind.ANY, wanted)


def _claimed(transaction: Transaction, statement: Update, kind: Kind, wanted: Wanted) -> Claim:
    rows = transaction.rows(statement, **wanted.due, lease_until=wanted.lease_until_ms)
    if not rows:
        return Claim([])
    *_, seen, _ = rows[0]
    claimed = claim_of_due([(*row[:-2], row[-1]) for row in rows], kind)
    return claimed._replace(pause=SharedPause(number=seen or 0))
