"""What the statements of several operations share: moves and their fence, conditions, locks, and lists of ids."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import (
    BigInteger,
    BindParameter,
    Boolean,
    ColumnElement,
    CompoundSelect,
    Insert,
    Select,
    Table,
    Text,
    Update,
    and_,
    bindparam,
    case,
    func,
    literal_column,
    null,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from outbox.lifecycle import Status, moves
from outbox.outcomes import Outcome, WaitsFor
from outbox.storage.column_types import TIMES_BELOW
from outbox.storage.indexes import QUEUE_INDEX
from outbox.storage.tables import ObservationEvent, destinations

events: Table = ObservationEvent.__table__  # type: ignore[assignment]  # it is declared with a table, not a join
columns = events.c


class without_index(FunctionElement[Any]):  # noqa: N801 - it reads as a function, like SQLAlchemy's own
    """A column that the planner must not use to choose an index, where the dialect has a way to say so.

    For a condition on the status, SQLite would walk the baseline's index through all rows of that status. It must
    look up the few ids that are asked for, or take the partial index that has the wanted order.
    """

    type = Text()
    inherit_cache = True


@compiles(without_index)
def _plain(element: without_index, compiler: Any, **options: Any) -> str:
    return str(compiler.process(element.clauses, **options))


unindexed_status = without_index(columns.status)


class contains_text(FunctionElement[Any]):  # noqa: N801 - it reads as a function, like SQLAlchemy's own
    """The condition that a column contains a text. It has no wildcards, and case counts on every database."""

    type = Boolean()
    inherit_cache = True


@compiles(contains_text)
def _in_string(element: contains_text, compiler: Any, **options: Any) -> str:
    return f"(instr({compiler.process(element.clauses, **options)}) > 0)"


def literal(word: Status | WaitsFor) -> ColumnElement[str]:
    """Return a word as a part of the statement's text: the planner must see it to choose a partial index."""
    return literal_column(f"'{word.value}'", Text)


def is_one_of(status: ColumnElement[str], *statuses: Status) -> ColumnElement[bool]:
    """Return the condition that the column `status` has one of these values."""
    if len(statuses) == 1:
        return status == literal(statuses[0])
    return status.in_([literal(one) for one in statuses])


class is_source(FunctionElement[Any]):  # noqa: N801 - as above
    """The condition that a move starts from this status.

    The machine is asked when a statement is compiled, so a program that only enqueues never loads it.
    """

    type = Text()
    inherit_cache = True

    def __init__(self, trigger: str, status: ColumnElement[str]) -> None:
        super().__init__(literal_column(trigger), status)


@compiles(is_source)
def _sources(element: is_source, compiler: Any, **options: Any) -> str:
    trigger, status = element.clauses
    return str(compiler.process(is_one_of(status, *moves()[str(trigger)].sources), **options))


class _Destination(FunctionElement[Any]):
    """The status to which a move leads. The machine is asked as above."""

    type = Text()
    inherit_cache = True


@compiles(_Destination)
def _destination(element: _Destination, compiler: Any, **options: Any) -> str:
    (trigger,) = element.clauses
    return str(compiler.process(literal(moves()[str(trigger)].target), **options))


def _written(trigger: str, name: str, value: Any) -> Any:
    if value is None:
        return null()
    if name != "next_attempt_at_ms" or trigger == "claim":  # a claim writes its lease there
        return value
    return case((columns.not_before_ms > value, columns.not_before_ms), else_=value)


def move(outcome: Outcome, *, status: ColumnElement[str] = unindexed_status) -> Update:
    """Return the UPDATE of one move: legal sources in its WHERE, destination and columns in its SET."""
    values = [(name, _written(outcome.trigger, name, value)) for name, value in outcome.values.items()]
    moved = update(events).where(is_source(outcome.trigger, status))
    # The status last: MySQL sets one column after the other, and another one may be computed from the old status.
    return moved.ordered_values(*values, ("status", _Destination(literal_column(outcome.trigger))))


def move_held(outcome: Outcome) -> Update:
    """Return the UPDATE of a fenced move. Its parameters are the row `row_id` and its lease `lease_until`."""
    return by_id(move(outcome).where(this_row, held))


# Locks and indexes


def lock(statement: Select[Any]) -> Select[Any]:
    """Lock the rows of a query. On servers, rows that another transaction has locked are left out."""
    return statement.with_for_update(skip_locked=True)


_Statement = TypeVar("_Statement", Select[Any], Update)

PRIMARY_KEY = "PRIMARY"


def by_id(statement: _Statement) -> _Statement:
    """Make MySQL find the rows by their ids: by the status, it would lock rows that others work on."""
    return statement.execution_options(outbox_index=PRIMARY_KEY)


def in_order(statement: Select[Any], index: str) -> Select[Any]:
    """Name the index that has the order of a query with a limit.

    Otherwise MySQL would sort and lock all matching rows, and other flushers would find none. It reads such an
    index in order only for one status at a time.
    """
    return statement.execution_options(outbox_index=index)


def oldest_of(*kinds: Select[Any], at_most: str) -> CompoundSelect[Any]:
    """Return one query for several that have an order and a limit."""
    union = union_all(*(select(kind.subquery()) for kind in kinds))
    selected = union.selected_columns
    return union.order_by(selected.created_at_ms, selected.id).limit(bindparam(at_most))


# Lists of ids

CHUNK = 64
"""Number of rows that a statement for several rows names. It is fixed, so the statement is compiled only once."""

chunk_ids: list[BindParameter[Any]] = [bindparam(f"id_{number}", type_=BigInteger) for number in range(CHUNK)]
_created_at = [bindparam(f"created_at_ms_{number}", type_=BigInteger) for number in range(CHUNK)]
LISTED_TEXT = "/* listed */"
LISTED: ColumnElement[Any] = literal_column(f"({LISTED_TEXT})")
"""The place of a list of integers in the text of a statement, as `Transaction.change_listed` fills it in."""
these_rows = columns.id.in_(chunk_ids)
these_events = or_(
    *(
        and_(columns.id == row_id, columns.created_at_ms == created)
        for row_id, created in zip(chunk_ids, _created_at, strict=True)
    )
)
"""By id and creation time: after a failover that lost rows, a server gives their ids to other events."""


# Conditions

now = bindparam("now", type_=BigInteger)
lease_until: BindParameter[Any] = bindparam("lease_until")
this_row = columns.id == bindparam("row_id")
held = columns.next_attempt_at_ms == lease_until
oldest_first = (columns.created_at_ms, columns.id)
may_have_tries = or_(columns.last_error.is_not(None), columns.revived_at_ms.is_not(None)).label("may_have_tries")
"""Whether a row may have failed tries: an event that was accepted at its first try has none."""
is_due = columns.next_attempt_at_ms <= now
never_tried = columns.next_attempt_at_ms <= columns.created_at_ms
was_tried = columns.next_attempt_at_ms > columns.created_at_ms
# On SQLite, text and blobs are larger than every number.
has_creation_time = columns.created_at_ms < literal_column(str(TIMES_BELOW), BigInteger)
has_due_time = columns.next_attempt_at_ms < literal_column(str(TIMES_BELOW), BigInteger)
failed_before = columns.waits_for.is_not(None)
did_not_fail = columns.waits_for.is_(None)
this_destination = destinations.c.destination == bindparam("destination")
of_destination = columns.destination == bindparam("destination")

LAST_ID = select(func.max(columns.id))

# A row under an unexpired lease is in flight.
is_in_flight = and_(columns.status == literal(Status.SENDING), columns.next_attempt_at_ms > now).label(
    "is_in_flight"
)
_not_in_flight = or_(columns.status != literal(Status.SENDING), columns.next_attempt_at_ms <= now)


def oldest(
    *statuses: Status,
    status: ColumnElement[str] = unindexed_status,
    only: ColumnElement[bool] | None = None,
    by: ColumnElement[Any] = columns.created_at_ms,
    index: str = QUEUE_INDEX,
) -> Select[Any]:
    """Return the query for the oldest rows of a destination with these statuses, none in flight, to be deleted."""
    found = select(columns.id, columns.status, columns.event_type, columns.destination, by, may_have_tries)
    found = found.where(is_one_of(status, *statuses), of_destination).order_by(by, columns.id)
    if only is not None:
        found = found.where(only)
    if Status.SENDING in statuses:
        found = found.where(_not_in_flight)
    return in_order(lock(found.limit(bindparam("excess"))), index)


@cache
def upsert(insert: Callable[[Table], Any], table: Table, adds: str | None) -> Insert:
    """Return an INSERT … ON CONFLICT by the table's primary key, as SQLite and PostgreSQL know it.

    `insert` is the function of SQLAlchemy's dialect. An existing row stays as it is, or its column `adds` grows by
    the value.
    """
    inserted = insert(table).values({column.name: bindparam(column.name) for column in table.c})
    if adds is None:
        there: Insert = inserted.on_conflict_do_nothing()
    else:
        there = inserted.on_conflict_do_update(
            index_elements=list(table.primary_key), set_={adds: table.c[adds] + inserted.excluded[adds]}
        )
    return there
