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
from outbox.storage.indexes import OLDEST_OF_STATUS
from outbox.storage.tables import ObservationEvent, destinations

events: Table = ObservationEvent.__table__  # type: ignore[assignment]  # it is declared with a table, not a join
columns = events.c


class without_index(FunctionElement[Any]):
    """A column that the planner must not use to choose an index, where the dialect has a way to say so.

    In a file that difflore opened, SQLite would read all rows of a status by difflore's index, instead of looking
    up the few ids that are asked for, or taking the partial index that has the wanted order.
    """

    type = Text()
    inherit_cache = True


@compiles(without_index)
def _plain(element: without_index, compiler: Any, **options: Any) -> str:
    return str(compiler.process(element.clauses, **options))


unindexed_status = without_index(columns.status)


class is_delivered(FunctionElement[Any]):
    """The condition that an event was delivered.

    MySQL asks whether there is a time of the delivery, because its index by this time has no status.
    """

    type = Text()  # SQLAlchemy would compare a Boolean with 1, and SQLite would not find the index
    inherit_cache = True

    def __init__(self) -> None:
        super().__init__(unindexed_status, columns.sent_at_ms)


@compiles(is_delivered)
def _was_sent(element: is_delivered, compiler: Any, **options: Any) -> str:
    status, _ = element.clauses
    return str(compiler.process(is_one_of(status, Status.SENT), **options))


class contains_text(FunctionElement[Any]):
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


class has_status(FunctionElement[Any]):
    """The condition that a row of the table of events has one of these statuses, for a query in any order.

    SQLite has no index of all statuses, so it finds the ids in the indexes of these statuses.
    """

    type = Text()  # with a Boolean, SQLAlchemy would compare it with 1, and SQLite would not find the index
    inherit_cache = True

    def __init__(self, *statuses: Status) -> None:
        super().__init__(columns.status, *(literal(one) for one in statuses))


@compiles(has_status)
def _by_status(element: has_status, compiler: Any, **options: Any) -> str:
    status, *values = element.clauses
    return str(compiler.process(status == values[0] if len(values) == 1 else status.in_(values), **options))


class is_source(FunctionElement[Any]):
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


class _Target(FunctionElement[Any]):
    """The status to which a move leads. Like `is_source`, it asks the machine when the statement is compiled."""

    type = Text()
    inherit_cache = True


@compiles(_Target)
def _target(element: _Target, compiler: Any, **options: Any) -> str:
    (trigger,) = element.clauses
    return str(compiler.process(literal(moves()[str(trigger)].target), **options))


def _written(trigger: str, name: str, value: Any) -> Any:
    if value is None:
        return null()
    if name != "next_attempt_at_ms" or trigger == "claim":  # a claim writes its lease there
        return value
    return case((columns.not_before_ms > value, columns.not_before_ms), else_=value)


def move(outcome: Outcome) -> Update:
    """Return the UPDATE of one move: legal sources in its WHERE, target status and columns in its SET."""
    values = [(name, _written(outcome.trigger, name, value)) for name, value in outcome.values.items()]
    moved = update(events).where(is_source(outcome.trigger, unindexed_status))
    # The status last: MySQL sets one column after the other, and another one may be computed from the old status.
    return moved.ordered_values(*values, ("status", _Target(literal_column(outcome.trigger))))


def move_held(outcome: Outcome) -> Update:
    """Return the UPDATE of a fenced move. Its parameters are the row `row_id` and its lease `lease_until`."""
    return by_id(move(outcome).where(this_row, held))


def lock(statement: Select[Any]) -> Select[Any]:
    """Lock the rows of a query. On servers, rows that another transaction has locked are left out."""
    return statement.with_for_update(skip_locked=True)


_Statement = TypeVar("_Statement", Select[Any], Update)

PRIMARY_KEY = "PRIMARY"


def by_id(statement: _Statement) -> _Statement:
    """Make MySQL find the rows by their ids: by the status, it would lock rows that others work on."""
    return statement.execution_options(outbox_index=PRIMARY_KEY)


def in_order(statement: Select[Any], index: str) -> Select[Any]:
    """Tell MySQL which index to read for a query that has an order and a limit.

    Otherwise MySQL would sort and lock all matching rows, and other flushers would find none. It can read an index
    in this order for one status only. With `OLDEST_OF_STATUS` as the index, it reads one part of an index for each
    reason to wait.
    """
    return statement.execution_options(outbox_index=index)


def oldest_of(*kinds: Select[Any], at_most: str) -> CompoundSelect[Any]:
    """Return one query for several that have an order and a limit."""
    union = union_all(*(select(kind.subquery()) for kind in kinds))
    selected = union.selected_columns
    return union.order_by(selected.created_at_ms, selected.id).limit(bindparam(at_most))


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


now = bindparam("now", type_=BigInteger)
lease_until: BindParameter[Any] = bindparam("lease_until")
this_row = columns.id == bindparam("row_id")
held = columns.next_attempt_at_ms == lease_until
oldest_first = (columns.created_at_ms, columns.id)
may_have_tries = or_(columns.last_error.is_not(None), columns.revived_at_ms.is_not(None)).label("may_have_tries")
"""Whether a row may have failed tries: an event that was accepted at its first try has none."""
is_due = columns.next_attempt_at_ms <= now
never_tried = columns.next_attempt_at_ms <= columns.created_at_ms
is_postponed = columns.next_attempt_at_ms > columns.created_at_ms
# On SQLite, text and blobs are larger than every number.
has_creation_time = columns.created_at_ms < literal_column(str(TIMES_BELOW), BigInteger)
has_due_time = columns.next_attempt_at_ms < literal_column(str(TIMES_BELOW), BigInteger)
failed_before = columns.waits_for.is_not(None)
did_not_fail = columns.waits_for.is_(None)
this_destination = destinations.c.destination == bindparam("destination")
of_destination = columns.destination == bindparam("destination")

LAST_ID = select(columns.id).order_by(columns.id.desc()).limit(1)

# A row under an unexpired lease is in flight.
is_in_flight = and_(columns.status == literal(Status.SENDING), columns.next_attempt_at_ms > now).label(
    "is_in_flight"
)
_not_in_flight = or_(columns.status != literal(Status.SENDING), columns.next_attempt_at_ms <= now)


def oldest(
    *statuses: Status,
    only: ColumnElement[bool] | None = None,
    by: ColumnElement[Any] = columns.created_at_ms,
    index: str = OLDEST_OF_STATUS,
) -> Select[Any]:
    """Return the query for the oldest rows of a destination with these statuses, none in flight, to be deleted."""
    found = select(columns.id, columns.status, columns.event_type, columns.destination, by, may_have_tries)
    found = found.where(is_one_of(unindexed_status, *statuses), of_destination).order_by(by, columns.id)
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
