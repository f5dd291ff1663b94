"""MySQL and MariaDB, which many hosts share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    Insert,
    Table,
    bindparam,
    func,
    literal_column,
    select,
)
from sqlalchemy import Dialect as SQLAlchemyDialect
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.compiler import compiles

from outbox.failures import StorageError
from outbox.records import Claim
from outbox.storage import galera, mysql_chores, mysql_claims
from outbox.storage.claimed import Delivery, Kind, Part, Wanted
from outbox.storage.column_types import LONGEST_NAME, LongText, Name, ShortText, TextDefault
from outbox.storage.dialects.base import Dialect
from outbox.storage.engines import MIGRATION_LOCK, Ending, Synchronous, shown_url
from outbox.storage.indexes import DELIVERED_INDEX, OLDEST_OF_STATUS
from outbox.storage.inserts import KNOWN, in_slices, insert_each, insert_several, known
from outbox.storage.inserts import Rows as NewRows
from outbox.storage.sql import columns, is_delivered
from outbox.storage.transactions import Transaction

_NAMES = ("mysql", "mariadb")

# How long a migration waits for another one; MariaDB can't wait for ever.
_MIGRATION_PATIENCE_S = 3_600
_CONNECT_TIMEOUT_S = 10
# The privilege to read a table, or a column of it, is missing.
_DENIED = frozenset({1142, 1143})
# How many characters of payloads an INSERT of several rows may have: a server limits the length of a statement.
_PAYLOADS_AT_ONCE = 2**18
_KNOWN_NOW = KNOWN.with_for_update(read=True)


@compiles(Name, *_NAMES)
def _varchar(_type: Name, _compiler: object, **_: object) -> str:
    return f"VARCHAR({LONGEST_NAME})"  # it can't index a TEXT


@compiles(ShortText, *_NAMES)
def _short_varchar(_type: ShortText, _compiler: object, **_: object) -> str:
    return "VARCHAR(16)"  # it can't index a TEXT


@compiles(LongText, *_NAMES)
def _mediumtext(_type: LongText, _compiler: object, **_: object) -> str:
    return "MEDIUMTEXT"  # up to 16 MiB: TEXT ends at 64 KiB, below the largest payload


@compiles(TextDefault, *_NAMES)
def _in_parentheses(default: TextDefault, _compiler: object, **_: object) -> str:
    return f"({default.text})"  # the default of a long text has to be an expression


@compiles(is_delivered, *_NAMES)
def _has_time(element: is_delivered, compiler: Any, **options: Any) -> str:
    _, sent_at_ms = element.clauses
    return f"{compiler.process(sent_at_ms, **options)} IS NOT NULL"


class MySQL(Dialect):
    """MySQL and MariaDB, with one of four drivers."""

    names = _NAMES
    drivers = tuple(
        f"{name}+{driver}"
        for name in _NAMES
        for driver in ("pymysql", "mysqldb", "mysqlconnector", "mariadbconnector")
    )
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
    # Error numbers. `given_up`: deadlock. `unknown`: a server left the cluster during the COMMIT.
    # `outdated`: the server takes no writes any more.
    code_attributes = ("errno",)
    given_up = frozenset({1213})
    timed_out = frozenset({1205})
    unknown = frozenset({1180})
    outdated = frozenset({1047, 1290, 1836})
    duplicate = frozenset({1062})
    # There are no partial indexes: one for each order starts with the status.
    indexes = frozenset(
        f"observation_events_{name}_idx" for name in ("event_id", "queue", "waiting", "times", "delivered")
    )
    last_insert_id = select(func.last_insert_id())

    def insert_several(
        self, transaction: Transaction, rows: NewRows, notification: ColumnElement[Any] | None
    ) -> list[int]:
        """Insert several rows by one statement on MariaDB. MySQL tells the id of a single row only.

        Large rows are inserted one by one, too, and all rows if the user may not read the table.
        """
        ids: list[int] = []
        returns_ids = transaction.returns_inserted
        for several in in_slices(rows):
            if returns_ids and sum(len(row["payload_json"]) for row in several) <= _PAYLOADS_AT_ONCE:
                try:
                    ids += insert_several(transaction, several, notification)
                    continue
                except Exception as error:
                    if _DENIED.isdisjoint(self.codes(getattr(error, "orig", error))):
                        raise
                    returns_ids = False
            ids += insert_each(transaction, several, notification)
        return ids

    def with_driver(self, url: URL) -> URL:
        """Choose mysqlclient, which is faster, or else PyMySQL, which our extra installs."""
        if url.drivername not in _NAMES:
            return url
        if find_spec("MySQLdb") is None:
            return url.set(drivername=f"{url.drivername}+pymysql")
        # mysqlclient takes localhost for a socket, and ignores the port: that may be another server.
        is_local = url.host in {None, "localhost"} and "unix_socket" not in url.query
        return url.set(drivername=f"{url.drivername}+mysqldb", host="127.0.0.1" if is_local else url.host)

    def driver_options(self, url: URL) -> tuple[URL, dict[str, Any]]:
        """Let mysqlclient give up connecting as soon as PyMySQL does. By itself it waits for the system."""
        waits = url.get_driver_name() == "mysqldb" and "connect_timeout" not in url.query
        return url, {"connect_timeout": _CONNECT_TIMEOUT_S} if waits else {}

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
            if not connection.invalidated:  # else the server has released the lock
                connection.exec_driver_sql(f"SELECT RELEASE_LOCK('{MIGRATION_LOCK}')")

    def table_options(self, table: Table) -> dict[str, Any]:  # noqa: ARG002 - every table has the same options
        """Let texts be equal only if they are the same: the default collations treat "A" and "a" as equal."""
        options = {"engine": "InnoDB", "charset": "utf8mb4", "collate": "utf8mb4_bin"}
        return {f"{name}_{option}": value for name in _NAMES for option, value in options.items()}

    def adapted(self, statement: Any) -> Any:
        """Force the index that a statement names, or the indexes that have the order it names."""
        index = statement.get_execution_options().get("outbox_index")
        if index is None:
            return statement
        if index == OLDEST_OF_STATUS:
            return mysql_claims.oldest_of_each_reason(statement)
        if index == DELIVERED_INDEX:  # it begins with the undelivered rows, which may be many
            statement = statement.where(columns.sent_at_ms.is_not(None))
        return mysql_claims.walk(statement, index)

    def insert_or_add(self, transaction: Transaction, table: Table, *, adds: str | None, **values: Any) -> None:
        """Insert or add in one statement, so that no other transaction comes in between."""
        transaction.change(_upsert(table, adds), **values)

    def known_now(self, transaction: Transaction, destination: str, event_ids: Sequence[str]) -> dict[str, int]:
        """Read with a lock, to see what is committed now. A plain read may see older rows."""
        return known(transaction, destination, event_ids, _KNOWN_NOW)

    is_any_due = mysql_claims.IS_ANY_DUE

    def claim(self, transaction: Transaction, kind: Kind, wanted: Wanted) -> Claim:
        """With `unless_paused`, claim only fresh rows, by one query. Otherwise, claim as other servers do."""
        if wanted.unless_paused:
            return mysql_claims.take_at_once(transaction, kind, wanted)
        return super().claim(transaction, kind, wanted)

    def lock_part(self, transaction: Transaction, part: Part, wanted: Wanted) -> list[tuple[Any, ...]]:
        """Lock the first due rows of a part that no other transaction has locked, and no other row.

        A query that locks would lock each row that it reads, such as a million waiting rows.
        """
        return mysql_claims.SEARCHES[part].lock(transaction, wanted)

    def deliver(self, transaction: Transaction, delivery: Delivery) -> int:
        """Move rows to sent by one statement."""
        return mysql_claims.deliver(transaction, delivery)

    chores = mysql_chores.CHORES

    def claim_never_due(self, transaction: Transaction, wanted: Wanted) -> Claim:
        """Find rows with huge times, at the end of the index by the due time."""
        return mysql_claims.take_never_due(transaction, wanted)


@cache
def _upsert(table: Table, adds: str | None) -> Insert:
    inserted = mysql.insert(table).values({column.name: bindparam(column.name) for column in table.c})
    if adds is None:
        same = next(column for column in table.c if not column.primary_key)
        return inserted.on_duplicate_key_update({same.name: same})
    return inserted.on_duplicate_key_update({adds: table.c[adds] + inserted.inserted[adds]})


DIALECT = MySQL()
