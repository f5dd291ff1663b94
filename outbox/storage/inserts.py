"""The statements that insert events, and the query that finds events by the ids that callers gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from operator import itemgetter
from typing import Any

from sqlalchemy import ColumnElement, Insert, Select, Table, Text, Update, and_, bindparam, insert, select, update

from outbox.destinations import DEFAULT_DESTINATION
from outbox.storage.indexes import EVENT_ID_INDEX
from outbox.storage.sql import CHUNK, columns, events, in_order
from outbox.storage.transactions import Transaction, left_out

INSERTED = (
    "event_type",
    "rule_id",
    "rule_ids_json",
    "session_id",
    "file_path",
    "occurred_at_ms",
    "payload_json",
    "next_attempt_at_ms",
    "created_at_ms",
)
_NUMBER = len(INSERTED)
_OPTIONAL = ("revived_at_ms", "destination", "event_id", "not_before_ms", "trace_context")
KNOWN = in_order(
    select(columns.event_id, columns.id).where(
        columns.destination == bindparam("destination"),
        columns.event_id.in_([bindparam(f"id_{number}", type_=Text) for number in range(CHUNK)]),
    ),
    EVENT_ID_INDEX,
)

# How many rows one INSERT may have. With only a few sizes, few statements have to be compiled and prepared.
_INSERTED_AT_ONCE = (64, 16, 4, 1)

Rows = Sequence[dict[str, Any]]


def names_of(rows: Rows) -> tuple[str, ...]:
    """Return the columns to insert of rows that have the same ones. A default costs less if it is left out."""
    row = rows[0]
    if len(row) == _NUMBER:
        return INSERTED
    return (*INSERTED, *(name for name in _OPTIONAL if name in row))


@cache
def insert_one(notification: ColumnElement[Any] | None, names: tuple[str, ...]) -> Insert:
    """Return the statement that inserts these columns of a row.

    With a `notification`, it also notifies other processes when the transaction commits.
    """
    one = insert(events).values({name: bindparam(name) for name in names})
    return one if notification is None else one.returning(notification)


INSERT = insert_one(None, INSERTED)


def insert_each(transaction: Transaction, rows: Rows, notification: ColumnElement[Any] | None = None) -> list[int]:
    """Insert rows one by one; return their ids."""
    return transaction.insert(insert_one(notification, names_of(rows)), rows)


def insert_several(transaction: Transaction, rows: Rows, notification: ColumnElement[Any] | None) -> list[int]:
    """Insert rows by statements for several rows; return their ids in the order of the rows."""
    names = names_of(rows)
    ids: list[int] = []
    for several in in_slices(rows):
        if len(several) == 1:
            ids += insert_each(transaction, several, notification)
        else:
            statement = _insert_rows(len(several), names, notification, returns=True)
            returned = transaction.run(statement, *named(several, names)).fetchall()
            if len(returned) < len(several):
                raise left_out(len(several))
            # The ids may be returned in any order, but they grow in the order of the rows.
            ids += sorted(row_id for (row_id,) in returned)
    return ids


def insert_counted(transaction: Transaction, rows: Rows) -> list[int]:
    """Do as `insert_several` does. The ids must be consecutive: they are counted back from the last one."""
    names = names_of(rows)
    ids: list[int] = []
    for several in in_slices(rows):
        statement = _insert_rows(len(several), names, None, returns=False)
        done = transaction.run(statement, *named(several, names))
        if done.rowcount < len(several):
            raise left_out(len(several))
        ids += range(done.lastrowid - len(several) + 1, done.lastrowid + 1)
    return ids


@cache
def _insert_rows(
    number: int, names: tuple[str, ...], notification: ColumnElement[Any] | None, *, returns: bool
) -> Insert:
    """Return the statement that inserts several rows, and may return their ids. `named` gives its parameters."""
    inserted = insert(events).values(_values(number, names))
    return inserted.returning(columns.id if notification is None else notification) if returns else inserted


@cache
def _insert_new(
    insert: Callable[[Table], Any],
    number: int,
    notification: ColumnElement[Any] | None,
    names: tuple[str, ...],
) -> Insert:
    inserted: Insert = insert(events).values(_values(number, names)).on_conflict_do_nothing()
    return inserted.returning(columns.event_id, columns.id if notification is None else notification)


def _values(number: int, names: Sequence[str]) -> list[dict[str, Any]]:
    return [{name: bindparam(f"{name}_{row}") for name in names} for row in range(number)]


@cache
def _bound(number: int, names: Sequence[str]) -> list[str]:
    return [f"{name}_{row}" for row in range(number) for name in names]


def in_slices(rows: Rows) -> Iterator[Rows]:
    """Yield the rows in slices of the sizes for which there are statements, the largest first."""
    start = 0
    while start < len(rows):
        number = next(size for size in _INSERTED_AT_ONCE if size <= len(rows) - start)
        yield rows[start : start + number]
        start += number


def named(rows: Rows, names: tuple[str, ...]) -> tuple[list[str], list[Any]]:
    """Return the names and the values of the parameters of a statement that inserts these rows."""
    return _bound(len(rows), names), list(chain.from_iterable(map(itemgetter(*names), rows)))


def insert_new(
    transaction: Transaction, insert: Callable[[Table], Any], rows: Rows, notification: ColumnElement[Any] | None
) -> dict[str, int]:
    """Insert rows of a destination by INSERT … ON CONFLICT DO NOTHING, as SQLite and PostgreSQL know it.

    `insert` is the function of SQLAlchemy's dialect. Return the row ids of the inserted rows, by event id.
    """
    names = names_of(rows)
    inserted: dict[str, int] = {}
    for several in in_slices(rows):
        statement = _insert_new(insert, len(several), notification, names)
        found = transaction.run(statement, *named(several, names)).fetchall()
        inserted |= dict(found)
    return inserted


def insert_unknown(
    transaction: Transaction, rows: Rows, *, is_duplicate: Callable[[Exception], bool]
) -> dict[str, int]:
    """Insert the rows of a destination whose event ids are new, one by one; return their row ids by event id.

    `is_duplicate` gets the error of a driver. It returns whether the error means that another transaction has
    inserted a row with the same event id.
    """
    destination = rows[0].get("destination", DEFAULT_DESTINATION)
    there = known(transaction, destination, [row["event_id"] for row in rows])
    statement = insert_one(None, names_of(rows))
    inserted = {}
    for row in rows:
        if row["event_id"] not in there:
            try:
                (inserted[row["event_id"]],) = transaction.insert(statement, [row])
            except Exception as error:
                if not is_duplicate(getattr(error, "orig", error)):
                    raise
    return inserted


def insert_or_add(transaction: Transaction, table: Table, adds: str | None, values: dict[str, Any]) -> None:
    """Insert a row. If there is a row with the same key, add to it instead, as `Dialect.insert_or_add` says.

    This runs two statements: an UPDATE, and an INSERT if the UPDATE changed nothing.
    """
    if not transaction.change(_add(table, adds), **{f"new_{name}": value for name, value in values.items()}):
        transaction.change(_insert(table), **values)


@cache
def _add(table: Table, adds: str | None) -> Update:
    key = list(table.primary_key)
    there = and_(*(column == bindparam(f"new_{column.name}") for column in key))
    changed = {key[0]: key[0]} if adds is None else {adds: table.c[adds] + bindparam(f"new_{adds}")}
    return update(table).where(there).values(changed)


@cache
def _insert(table: Table) -> Insert:
    return insert(table).values({column.name: bindparam(column.name) for column in table.c})


def known(
    transaction: Transaction, destination: str, event_ids: Sequence[str], query: Select[Any] = KNOWN
) -> dict[str, int]:
    """Return the row ids of those events of a destination that are in the database, by event id."""
    return dict(transaction.rows_of(query, event_ids, destination=destination))
