"""MySQL and MariaDB, which many hosts share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, TypeVar

from sqlalchemy import (
    Connection,
    Insert,
    Select,
    Table,
    Update,
    bindparam,
    func,
    literal_column,
    select,
    union_all,
)
from sqlalchemy import Dialect as SQLAlchemyDialect
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.compiler import compiles

from outbox.failures import StorageError
from outbox.lifecycle import moves
from outbox.outcomes import WaitsFor
from outbox.storage.claimed import (
    Part,
    Wanted,
    claims_alone,
    is_due_or_never,
    newest_first,
    to_claim,
    waits_for_row,
)
from outbox.storage.column_types import LONGEST_NAME, LongText, Name, ShortText, TextDefault
from outbox.storage.dialects.base import Dialect, Ending
from outbox.storage.engines import MIGRATION_LOCK
from outbox.storage.indexes import QUEUE_INDEX, WAITING_INDEX
from outbox.storage.inserts import KNOWN, known
from outbox.storage.sql import (
    by_id,
    columns,
    did_not_fail,
    events,
    is_one_of,
    is_source,
    literal,
    lock,
    of_destination,
    oldest_first,
    these_rows,
)
from outbox.storage.transactions import Transaction

_NAMES = ("mysql", "mariadb")

# How long a migration waits for another one; MariaDB can't wait for ever.
_MIGRATION_PATIENCE_S = 3_600
# How many batches a claim looks at first.
_BATCHES_READ = 4
_KNOWN_NOW = KNOWN.with_for_update(read=True)


@compiles(Name, *_NAMES)
def _varchar(_type: Name, _compiler: object, **_: object) -> str:
    return f"VARCHAR({LONGEST_NAME})"  # it can't index a TEXT


@compiles(ShortText, *_NAMES)
def _short_varchar(_type: ShortText, _compiler: object, **_: object) -> str:
    return "VARCHAR(16)"  # as above


@compiles(LongText, *_NAMES)
def _mediumtext(_type: LongText, _compiler: object, **_: object) -> str:
    return "MEDIUMTEXT"  # up to 16 MiB: TEXT ends at 64 KiB, below the largest payload


@compiles(TextDefault, *_NAMES)
def _in_parentheses(default: TextDefault, _compiler: object, **_: object) -> str:
    return f"({default.text})"  # the default of a long text has to be an expression


_Statement = TypeVar("_Statement", Select[Any], Update)


def _walk(statement: _Statement, index: str) -> _Statement:
    # Without the hint, MySQL may choose another index, and it locks each row that it reads, even if it does not
    # return or change the row.
    for name in _NAMES:
        statement = statement.with_hint(selectable=events, text=f"FORCE INDEX ({index})", dialect_name=name)
    return statement


# Locking the due rows in this query would lock every row that it reads, such as a million waiting rows.
@cache
def read_due(part: Part) -> Any:
    """Return the query for the ids of the first rows of a part that are due, or whose due time is invalid.

    It walks an index in order, for each status and each reason to wait.
    """
    walks = [
        (index, is_one_of(columns.status, status), *conditions)
        for status in moves()["claim"].sources
        for index, *conditions in _walks(part)
    ]
    order = newest_first if part is Part.NEWEST else oldest_first
    rows = [
        _walk(
            select(columns.id, columns.created_at_ms)
            .where(of_destination, *conditions, *_apart_from_alone(part), is_due_or_never)
            .order_by(*order)
            .limit(bindparam("at_most")),
            index,
        )
        for index, *conditions in walks
    ]
    union = union_all(*(select(one.subquery()) for one in rows))
    found = (union.selected_columns.created_at_ms, union.selected_columns.id)
    ordered = union.order_by(*(column.desc() if part is Part.NEWEST else column for column in found))
    return ordered.limit(bindparam("at_most"))


def _walks(part: Part) -> list[tuple[Any, ...]]:
    if part in {Part.ANY, Part.ALONE}:
        return [(QUEUE_INDEX,)]
    if part is Part.OTHERS:
        others = [one for one in WaitsFor if one is not WaitsFor.ROW]
        return [(WAITING_INDEX, columns.waits_for == literal(one)) for one in others]
    return [(WAITING_INDEX, waits_for_row if part is Part.LAST else did_not_fail)]


def _apart_from_alone(part: Part) -> list[Any]:
    if part is Part.ANY:
        return []
    return [claims_alone if part is Part.ALONE else ~claims_alone]


LOCK_ROWS_IF_DUE = by_id(
    lock(
        select(*to_claim, columns.next_attempt_at_ms).where(
            these_rows, is_source("claim", columns.status), is_due_or_never
        )
    )
)


def _lock_due(transaction: Transaction, part: Part, wanted: Wanted) -> list[tuple[Any, ...]]:
    """Lock the first due rows of a part that no other transaction has locked, and no other row.

    Flushers that read at the same time find the same ids. So this reads more ids than one batch, and then still
    more, until it has locked a batch or has tried all due rows.
    """
    locked: list[tuple[Any, ...]] = []
    tried: set[int] = set()
    now, at_most = wanted.now_ms, wanted.at_most
    look_at = at_most * _BATCHES_READ
    while True:
        these_due = {"destination": wanted.destination, "now": now, "at_most": look_at}
        found = [row_id for row_id, _ in transaction.rows(read_due(part), **these_due)]
        untried = [row_id for row_id in found if row_id not in tried]
        while untried and len(locked) < at_most:
            missing = at_most - len(locked)
            these, untried = untried[:missing], untried[missing:]
            tried.update(these)
            locked += transaction.rows_of(LOCK_ROWS_IF_DUE, these, now=now)
        if len(locked) == at_most or len(found) < look_at:
            return locked
        look_at *= 2


class MySQL(Dialect):
    """MySQL and MariaDB."""

    names = _NAMES
    drivers = tuple(
        f"{name}+{driver}"
        for name in _NAMES
        for driver in ("pymysql", "mysqldb", "mysqlconnector", "mariadbconnector")
    )
    default_drivers: ClassVar = {name: f"{name}+pymysql" for name in _NAMES}
    connection_classes: ClassVar = {
        "pymysql.connections.Connection": "mysql+pymysql",
        "MySQLdb.connections.Connection": "mysql+mysqldb",
        "mysql.connector.abstracts.MySQLConnectionAbstract": "mysql+mysqlconnector",
        "mysql.connector.pooling.PooledMySQLConnection": "mysql+mysqlconnector",
        "mariadb.connections.Connection": "mysql+mariadbconnector",
    }
    libraries = ("PyMySQL", "mysqlclient", "mysql-connector", "mariadb")
    begins_at_head = False
    # From UTC: a time of the session's zone is ambiguous for an hour when summer ends.
    clock = select(literal_column("timestampdiff(MICROSECOND, '1970-01-01', utc_timestamp(6)) DIV 1000"))
    # Error numbers. `given_up`: lock timeout, deadlock. `read_only`: the server takes no writes any more.
    code_attributes = ("errno",)
    given_up = frozenset({1205, 1213})
    read_only = frozenset({1047, 1290, 1836})
    duplicate = frozenset({1062})
    # There are no partial indexes: one for each order starts with the status.
    indexes = frozenset(f"observation_events_{name}_idx" for name in ("event_id", "queue", "waiting", "delivered"))
    inserts_several = False  # the driver reports the id of a single row only
    last_insert_id = select(func.last_insert_id())

    def plain_cursor(self, connection: Any, driver: SQLAlchemyDialect) -> Any:
        """Return a cursor of the driver's plain class."""
        if driver.driver in {"pymysql", "mysqldb"}:
            return connection.cursor(import_module(f"{driver.loaded_dbapi.__name__}.cursors").Cursor)
        return connection.cursor()

    def begin(self, connection: Connection, *, writes: bool, is_own: bool) -> Ending:
        """Begin with a statement, because the driver may commit each one. All drivers send `COMMIT`."""
        if writes and is_own:
            return Ending()
        super().begin(connection, writes=writes, is_own=is_own)
        connection.exec_driver_sql("START TRANSACTION")
        return Ending(rollback=True)

    @contextmanager
    def migration_lock(self, connection: Connection) -> Iterator[None]:
        """Hold a named lock, because each statement of a migration commits. Wait for other migrations."""
        lock = f"SELECT GET_LOCK('{MIGRATION_LOCK}', {_MIGRATION_PATIENCE_S})"
        if connection.exec_driver_sql(lock).scalar() != 1:
            where = connection.engine.url.render_as_string(hide_password=True)
            raise StorageError(f"{where}: another migration is still under way")
        try:
            yield
            connection.exec_driver_sql("COMMIT")  # before another migration is let in
        finally:
            connection.exec_driver_sql(f"SELECT RELEASE_LOCK('{MIGRATION_LOCK}')")

    def table_options(self, table: Table) -> dict[str, Any]:  # noqa: ARG002 - every table has the same options
        """Let texts be equal only if they are the same: the default collations treat "A" and "a" as equal."""
        options = {"engine": "InnoDB", "charset": "utf8mb4", "collate": "utf8mb4_bin"}
        return {f"{name}_{option}": value for name in _NAMES for option, value in options.items()}

    def adapted(self, statement: Any) -> Any:
        """Force the index that a statement names."""
        index = statement.get_execution_options().get("outbox_index")
        return statement if index is None else _walk(statement, index)

    def insert_or_add(self, transaction: Transaction, table: Table, *, adds: str | None, **values: Any) -> None:
        """Insert or add in one statement, so that no other transaction comes in between."""
        transaction.change(_upsert(table, adds), **values)

    def known_now(self, transaction: Transaction, destination: str, event_ids: Sequence[str]) -> dict[str, int]:
        """Read with a lock, to see what is committed now. A plain read may see an older state."""
        return known(transaction, destination, event_ids, _KNOWN_NOW)

    def lock_part(self, transaction: Transaction, part: Part, wanted: Wanted) -> list[tuple[Any, ...]]:
        """Lock the first due rows of a part that no other transaction has locked, and no other row."""
        return _lock_due(transaction, part, wanted)


@cache
def _upsert(table: Table, adds: str | None) -> Insert:
    inserted = mysql.insert(table).values({column.name: bindparam(column.name) for column in table.c})
    if adds is None:
        same = next(column for column in table.c if not column.primary_key)
        return inserted.on_duplicate_key_update({same.name: same})
    return inserted.on_duplicate_key_update({adds: table.c[adds] + inserted.inserted[adds]})


DIALECT = MySQL()
