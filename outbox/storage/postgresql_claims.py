"""How PostgreSQL takes the rows that are due: a claim is one statement, which leaves locked rows to others."""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import CTE, Select, Update, and_, exists, func, or_, select, union_all

from outbox.outcomes import WaitsFor
from outbox.pauses import PROBE_AFTER, SharedPause
from outbox.records import Claim
from outbox.storage.claimed import (
    CLAIM,
    Kind,
    Wanted,
    batch_size,
    claim_of_due,
    claimed_columns,
    claims_alone,
    is_undelivered,
    newest_first,
    waits_for_other,
    waits_for_row,
)
from outbox.storage.holds import IS_HELD
from outbox.storage.sql import (
    columns,
    did_not_fail,
    failed_before,
    has_due_time,
    is_due,
    literal,
    lock,
    move,
    now,
    of_destination,
    oldest_first,
    this_destination,
)
from outbox.storage.tables import destinations
from outbox.storage.transactions import Transaction

_with_others = and_(is_undelivered, is_due, ~claims_alone)
# An index on the due time answers at once. A walk in the order of the claim would pass all waiting rows.
_is_any_due = or_(
    *(
        exists().where(of_destination, is_undelivered, columns.waits_for == literal(one), is_due)
        for one in WaitsFor
        if one is not WaitsFor.ROW
    )
)
_known = destinations.c
_is_unheld = ~exists().where(IS_HELD)
_is_unpaused = and_(
    _is_unheld,
    ~exists().where(
        this_destination,
        or_(_known.failures >= PROBE_AFTER, _known.paused_until_ms > now, _known.probe_until_ms > now),
    ),
)
_seen = select(_known.pauses).where(this_destination).scalar_subquery()


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
    return claimed.returning(*claimed_columns, _seen, chosen.c.next_attempt_at_ms)


def _fresh(*conditions: Any, order: Any = oldest_first) -> Update:
    return _claim(_chosen("fresh", _with_others, did_not_fail, *conditions, order=order))


def _failed(*conditions: Any) -> Update:
    alone = _chosen("alone", claims_alone, is_due, *conditions, at_most=1)
    is_none_alone = ~exists(select(alone.c.id))
    others = _chosen("others", _with_others, waits_for_other, _is_any_due, is_none_alone, *conditions)
    room = batch_size - select(func.count()).select_from(others).scalar_subquery()
    last = _chosen("last", _with_others, waits_for_row, is_none_alone, *conditions, at_most=room)
    return _claim(alone, others, last)


class _Statements(NamedTuple):
    """The claims of one kind: one ignores holds and pauses. The other has no rows then, or if a probe is due."""

    claim: Update
    claim_unless_paused: Update


_CLAIMS = {
    Kind.FRESH: _Statements(_fresh(), _fresh(_is_unpaused)),
    Kind.FAILED: _Statements(_failed(), _failed(_is_unpaused)),
}
CLAIM_NEWEST = _fresh(order=newest_first)
CLAIM_ANY = _claim(
    _chosen("fresh", is_undelivered, is_due, did_not_fail),
    _chosen("others", is_undelivered, is_due, waits_for_other, _is_any_due),
    _chosen("last", is_undelivered, is_due, waits_for_row),
)
CLAIM_NEVER_DUE = _claim(
    _chosen("fresh", is_undelivered, did_not_fail, ~has_due_time, _is_unheld),
    _chosen("failed", is_undelivered, failed_before, ~has_due_time, _is_unheld),
)


def take(transaction: Transaction, kind: Kind, wanted: Wanted) -> Claim:
    """Claim the rows of a kind that are due."""
    if wanted.is_newest:
        statement = CLAIM_NEWEST
    elif kind is Kind.ANY:
        statement = CLAIM_ANY
    else:
        statement = _CLAIMS[kind].claim_unless_paused if wanted.unless_paused else _CLAIMS[kind].claim
    return _claimed(transaction, statement, kind, wanted)


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
