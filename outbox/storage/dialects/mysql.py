"""MySQL and MariaDB, which many hosts share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, TypeVar

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
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
from outbox.lifecycle import Status
from outbox.outcomes import WaitsFor
from outbox.records import Claim
from outbox.storage import galera
from outbox.storage.claimed import CLAIM_ROWS, Kind, Part, Wanted, claim_of_due, claims_alone, waits_for_row
from outbox.storage.column_types import LONGEST_NAME, LongText, Name, ShortText, TextDefault
from outbox.storage.dialects.base import Dialect, Ending
from outbox.storage.due_rows import LOCK_ROWS_IF_DUE, Rows, Search
from outbox.storage.engines import MIGRATION_LOCK, Synchronous, shown_url
from outbox.storage.indexes import QUEUE_INDEX, TIMES_INDEX, WAITING_INDEX
from outbox.storage.inserts import KNOWN, insert_each, known
from outbox.storage.inserts import Rows as NewRows
from outbox.storage.sql import columns, did_not_fail, events, has_due_time, is_one_of, literal, of_destination
from outbox.storage.transactions import Transaction

_NAMES = ("mysql", "mariadb")

# How long a migration waits for another one; MariaDB can't wait for ever.
_MIGRATION_PATIENCE_S = 3_600
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


def _rows(*waits: Any, index: str = WAITING_INDEX) -> Iterator[Rows]:
    """Yield the rows of one reason to wait: pending ones may wait long, those under a lease are few."""
    pending, sending = ((is_one_of(columns.status, one), *waits) for one in (Status.PENDING, Status.SENDING))
    yield Rows(pending, index, by_time=(pending,), time_index=TIMES_INDEX)
    yield Rows(sending, index)


_not_alone = ~claims_alone
_FRESH = [*_rows(did_not_fail, _not_alone)]
_FAILED = {one: columns.waits_for == literal(one) for one in WaitsFor}
# MySQL reads an index in order only for one status and one reason to wait at a time.
SEARCHES = {
    Part.FRESH: Search(*_FRESH, hinted=_walk),
    Part.NEWEST: Search(*_FRESH, is_newest=True, hinted=_walk),
    Part.ALONE: Search(Rows((claims_alone,), QUEUE_INDEX), hinted=_walk),
    Part.OTHERS: Search(
        *(rows for one, waits in _FAILED.items() if one is not WaitsFor.ROW for rows in _rows(waits, _not_alone)),
        hinted=_walk,
    ),
    Part.LAST: Search(*_rows(waits_for_row, _not_alone), hinted=_walk),
    Part.ANY: Search(
        *(rows for waits in (did_not_fail, *_FAILED.values()) for rows in _rows(waits)), hinted=_walk
    ),
}
NEVER_DUE = union_all(
    *(
        select(
            _walk(
                select(columns.id)
                .where(of_destination, is_one_of(columns.status, status), waits, ~has_due_time)
                .limit(bindparam("batch_size")),
                TIMES_INDEX,
            ).subquery()
        )
        for status in (Status.PENDING, Status.SENDING)
        for waits in (did_not_fail, *_FAILED.values())
    )
).limit(bindparam("batch_size"))


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
    # Error numbers. `given_up`: lock timeout, deadlock. `unknown`: a server left the cluster during the COMMIT.
    # `read_only`: the server takes no writes any more.
    code_attributes = ("errno",)
    given_up = frozenset({1205, 1213})
    unknown = frozenset({1180})
    read_only = frozenset({1047, 1290, 1836})
    duplicate = frozenset({1062})
    # There are no partial indexes: one for each order starts with the status.
    indexes = frozenset(
        f"observation_events_{name}_idx" for name in ("event_id", "queue", "waiting", "times", "delivered")
    )
    last_insert_id = select(func.last_insert_id())

    def insert_several(
        self, transaction: Transaction, rows: NewRows, notification: ColumnElement[Any] | None
    ) -> list[int]:
        """Insert one by one: the driver reports the id of a single row only."""
        return insert_each(transaction, rows, notification)

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

    def create_engine(self, url: URL, *, synchronous: Synchronous) -> Engine:
        """Return an engine whose transactions see what other servers of a Galera cluster committed."""
        engine = super().create_engine(url, synchronous=synchronous)
        galera.see_all_commits(engine)
        return engine

    @contextmanager
    def migration_lock(self, connection: Connection) -> Iterator[None]:
        """Hold a named lock, because each statement of a migration commits. Wait for other migrations."""
        lock = f"SELECT GET_LOCK('{MIGRATION_LOCK}', {_MIGRATION_PATIENCE_S})"
        if connection.exec_driver_sql(lock).scalar() != 1:
            where = shown_url(connection.engine)
            raise StorageError(f"{where}: another migration is still under way")
        try:
            with galera.upgrading_alone(connection, patience_s=_MIGRATION_PATIENCE_S):
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
        """Read with a lock, to see what is committed now. A plain read may see older rows."""
        return known(transaction, destination, event_ids, _KNOWN_NOW)

    def lock_part(self, transaction: Transaction, part: Part, wanted: Wanted) -> list[tuple[Any, ...]]:
        """Lock the first due rows of a part that no other transaction has locked, and no other row.

        A query that locks would lock each row that it reads, such as a million waiting rows.
        """
        return SEARCHES[part].lock(transaction, wanted)

    def claim_never_due(self, transaction: Transaction, wanted: Wanted) -> Claim:
        """Find rows with huge times, at the end of the index by the due time."""
        found = transaction.rows(NEVER_DUE, destination=wanted.destination, batch_size=wanted.at_most)
        locked = transaction.rows_of(LOCK_ROWS_IF_DUE, [row_id for (row_id,) in found], now=wanted.now_ms)
        transaction.change_rows(CLAIM_ROWS, [row[0] for row in locked], lease_until=wanted.lease_until_ms)
        return claim_of_due(locked, Kind.ANY)


@cache
def _upsert(table: Table, adds: str | None) -> Insert:
    inserted = mysql.insert(table).values({column.name: bindparam(column.name) for column in table.c})
    if adds is None:
        same = next(column for column in table.c if not column.primary_key)
        return inserted.on_duplicate_key_update({same.name: same})
    return inserted.on_duplicate_key_update({adds: table.c[adds] + inserted.inserted[adds]})


DIALECT = MySQL()
