"""Claims and deliveries on every database: which rows a claim takes, what it returns, and shared statements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum, auto
from operator import attrgetter
from types import NoneType
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, ColumnElement, Select, and_, bindparam, case, literal_column, or_, select

from outbox import outcomes
from outbox.event_ids import EXPECTED, derived, is_valid
from outbox.lifecycle import Status
from outbox.outcomes import WaitsFor
from outbox.records import BatchItem, Claim, ClaimedRow
from outbox.storage.column_types import INTEGERS, invalid_column
from outbox.storage.sql import (
    by_id,
    columns,
    did_not_fail,
    has_due_time,
    is_due,
    is_one_of,
    is_source,
    lease_until,
    literal,
    move,
    of_destination,
    oldest_first,
    these_events,
    these_rows,
    unindexed_status,
)


class Kind(Enum):
    """Which rows a claim may take, in which order."""

    FRESH = auto()
    """Rows that did not fail before, oldest first."""
    FAILED = auto()
    """Rows that failed before, oldest first; those that wait for `row` come last. If a row's senders died twice,
    it comes first, and alone: it may have killed them."""
    ANY = auto()
    """All rows, oldest first."""


class Part(Enum):
    """Rows that one query finds. A kind consists of these."""

    FRESH = auto()
    NEWEST = auto()
    """The same as `FRESH`, newest first."""
    ALONE = auto()
    OTHERS = auto()
    LAST = auto()
    ANY = auto()


class Wanted(NamedTuple):
    """What a claim asks for, besides the kind."""

    destination: str
    now_ms: int
    lease_until_ms: int
    at_most: int
    outbox_id: str
    is_newest: bool = False
    """Whether it asks for the newest rows of the kind `FRESH`."""
    unless_paused: bool = False
    """Claim by one fast query or not at all, and claim nothing during a hold, a pause or a probe.

    Only the `claim` of a dialect that has `is_any_due` is called with this flag.
    """

    @property
    def due(self) -> dict[str, Any]:
        """The parameters of queries for due rows."""
        return {"destination": self.destination, "now": self.now_ms, "batch_size": self.at_most}


class Delivery(NamedTuple):
    """Rows to move to sent. The ids and the creation times are in the same order."""

    row_ids: Sequence[int]
    created_at_ms: Sequence[int]
    sent_at_ms: int


class OneRowQuery(NamedTuple):
    """A query that always returns one row, and its parameters."""

    statement: Select[Any]
    parameters: Mapping[str, Any]


CLAIMED = (*ClaimedRow._fields, "sent_at_ms")
"""The columns that a claim returns of each row."""
claimed_columns = [columns[name] for name in CLAIMED]

is_pending = is_one_of(unindexed_status, Status.PENDING)
is_sending = is_one_of(unindexed_status, Status.SENDING)
is_queued = is_source("claim", unindexed_status)
waits_for_row = columns.waits_for == literal(WaitsFor.ROW)
waits_for_other = columns.waits_for != literal(WaitsFor.ROW)
lost_some = columns.lost_leases > literal_column("0")
claims_alone = and_(is_sending, lost_some)
"""The condition that the last two leases on a due row ran out."""
batch_size: Any = bindparam("batch_size", type_=BigInteger)
newest_first = [column.desc() for column in oldest_first]

_lost_leases = case((is_sending, columns.lost_leases + 1), else_=columns.lost_leases)
CLAIM = outcomes.claim(lease_until_ms=lease_until, lost_leases=_lost_leases)
CLAIM_ROWS = by_id(move(CLAIM).where(these_rows))
# The columns of rows that are read before they are claimed.
to_claim = [_lost_leases.label(name) if name == "lost_leases" else columns[name] for name in CLAIMED]
is_due_or_never = or_(is_due, ~has_due_time)

CONDITIONS: dict[Part, ColumnElement[bool]] = {
    Part.FRESH: and_(is_queued, did_not_fail, ~claims_alone),
    Part.NEWEST: and_(is_queued, did_not_fail, ~claims_alone),
    Part.ALONE: claims_alone,
    Part.OTHERS: and_(is_queued, waits_for_other, ~claims_alone),
    Part.LAST: and_(is_queued, waits_for_row, ~claims_alone),
    Part.ANY: is_queued,
}
"""The condition of each part, without the destination and the due time."""


def due(part: Part) -> Select[Any]:
    """Return the query for the first rows of a part that are due, or whose due time is invalid."""
    order = newest_first if part is Part.NEWEST else oldest_first
    rows = select(*to_claim, columns.next_attempt_at_ms).where(of_destination, CONDITIONS[part], is_due_or_never)
    return rows.order_by(*order).limit(batch_size)


def lock_kind(
    lock_part: Callable[[Part, Wanted], list[tuple[Any, ...]]], kind: Kind, wanted: Wanted
) -> list[tuple[Any, ...]]:
    """Lock the first rows of a kind, part after part."""
    if kind is Kind.ANY:
        return lock_part(Part.ANY, wanted)
    if kind is Kind.FRESH:
        return lock_part(Part.NEWEST if wanted.is_newest else Part.FRESH, wanted)
    rows = lock_part(Part.ALONE, wanted._replace(at_most=1))
    if not rows:
        rows = lock_part(Part.OTHERS, wanted)
        if room := wanted.at_most - len(rows):
            rows += lock_part(Part.LAST, wanted._replace(at_most=room))
    return rows


MOVE_TO_SENT = move(outcomes.deliver(sent_at_ms=bindparam("new_sent_at_ms")))
DELIVER = by_id(MOVE_TO_SENT.where(these_events))


def claim_of_due(rows: Iterable[Sequence[Any]], kind: Kind, outbox_id: str) -> Claim:
    """Return a claim of rows with the columns `CLAIMED`, then the time when each was due."""
    several = list(rows)
    return claim_of([row[:-1] for row in several], kind, outbox_id, due={row[0]: row[-1] for row in several})


def claim_of(rows: Sequence[Sequence[Any]], kind: Kind, outbox_id: str, *, due: Mapping[int, Any]) -> Claim:
    """Return a claim of rows with the columns `CLAIMED`; `due` is, by id, when each was due.

    An event without an id of the caller gets its derived id.
    """
    if not rows:
        return Claim([])
    # By column, which is fast.
    values: dict[str, Sequence[Any]] = dict(zip(CLAIMED, zip(*rows, strict=True), strict=True))
    given = values["event_id"]
    values["event_id"] = [
        derived(outbox_id, created_at_ms, row_id) if event_id is None else event_id
        for event_id, created_at_ms, row_id in zip(given, values["created_at_ms"], values["id"], strict=True)
    ]
    items = list(map(BatchItem._make, zip(*(values[name] for name in ClaimedRow._fields), strict=True)))
    values["next_attempt_at_ms"] = [*due.values()]
    in_order: Callable[[BatchItem], tuple[int, ...]] = _failed_order if kind is Kind.FAILED else _age_order
    are_ids = all(is_valid(one) for one in given if one is not None)
    if are_ids and all(_are_valid(values[name], below) for name, below in INTEGERS.items()):  # fast path
        items.sort(key=in_order)
        return Claim(items, due_at_ms=due)
    invalid = {}
    for row in rows:
        this = dict(zip(CLAIMED, row, strict=True), next_attempt_at_ms=due[row[0]])
        if why := invalid_column(this.items()):
            invalid[row[0]] = why
        elif this["event_id"] is not None and not is_valid(this["event_id"]):
            invalid[row[0]] = f"the column event_id is {this['event_id']!a}, expected {EXPECTED}"
    # An invalid row may have no time to sort by.
    items.sort(key=lambda item: (-1, item.id) if item.id in invalid else in_order(item))
    return Claim(items, invalid=invalid, due_at_ms=due)


_age_order = attrgetter("created_at_ms", "id")


def _failed_order(item: BatchItem) -> tuple[bool, int, int]:
    return item.waits_for == WaitsFor.ROW, item.created_at_ms, item.id


def _are_valid(numbers: Iterable[Any], below: int) -> bool:
    distinct = {*numbers}  # in many columns all are equal
    return {int, NoneType}.issuperset(map(type, distinct)) and max(filter(None, distinct), default=0) < below
