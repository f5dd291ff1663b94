"""SQLite: a file or the memory of one process, with one writer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from sqlalchemy import URL, ColumnElement, Connection, Engine, Index, Table, and_, select, text, union_all
from sqlalchemy import Dialect as SQLAlchemyDialect
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.compiler import compiles

from outbox.lifecycle import Status
from outbox.outcomes import WaitsFor
from outbox.records import Claim
from outbox.storage import sqlite_claims, sqlite_file
from outbox.storage.claimed import Kind, Wanted, is_pending, is_sending
from outbox.storage.column_types import Id
from outbox.storage.dialects.base import Dialect
from outbox.storage.engines import Ending, Synchronous, reading
from outbox.storage.inserts import Rows, insert_counted, insert_new
from outbox.storage.sql import (
    columns,
    did_not_fail,
    failed_before,
    has_status,
    is_one_of,
    is_postponed,
    literal,
    never_tried,
    oldest,
    oldest_of,
    unindexed_status,
    upsert,
    without_index,
)
from outbox.storage.sqlite_writer import SQLiteWriter
from outbox.storage.transactions import Transaction, Writer

# For each index of pending rows, the condition of its rows.
_PENDING = (
    and_(is_pending, did_not_fail, never_tried),
    and_(is_pending, did_not_fail, is_postponed),
    and_(is_pending, failed_before),
)
# For each status, the conditions that together select its rows. Each condition is that of an index.
_BY_STATUS = {
    str(literal(status)): _PENDING if status is Status.PENDING else (is_one_of(unindexed_status, status),)
    for status in Status
}


@compiles(Id, "sqlite")
def _integer(_type: Id, _compiler: object, **_: object) -> str:
    return "INTEGER"  # SQLite gives only INTEGER PRIMARY KEY an automatic value


@compiles(without_index, "sqlite")
def _with_plus(element: without_index, compiler: Any, **options: Any) -> str:
    return f"+{compiler.process(element.clauses, **options)}"


@compiles(has_status, "sqlite")
def _in_indexes(element: has_status, compiler: Any, **options: Any) -> str:
    _, *values = element.clauses
    kinds = [kind for value in values for kind in _BY_STATUS[str(value)]]
    ids = union_all(*(select(columns.id).where(kind).correlate(None) for kind in kinds))
    return str(compiler.process(columns.id.in_(ids), **options))


class SQLite(Dialect):
    """SQLite, in a file or in memory."""

    names = ("sqlite",)
    drivers = ("sqlite+pysqlite",)
    connection_classes: ClassVar = {"sqlite3.Connection": "sqlite+pysqlite"}
    libraries = ("sqlite3",)
    begins_at_head = False
    code_attributes = ("sqlite_errorcode",)
    given_up = frozenset({517})  # SQLITE_BUSY_SNAPSHOT
    # By a part of its text, which is the same in every version of Python.
    advice = (
        ("locked", "another program holds the write lock; end it or wait for it, then try again"),
        ("full", "make room on the disk, then try again"),
        ("readonly", "let this user write the file and its folder"),
        ("unable to open", "let this user read and write the file and its folder"),
        ("disk I/O error", "look at the disk and its free space, then try again"),
        (
            "malformed",
            "the file is damaged; `outbox doctor` tells more; restore a backup or use .recover of sqlite3",
        ),
        ("not a database", "name the right file; this one is left as it is"),
        ("no such table", "`outbox upgrade` creates what is missing"),
        ("no such column", "`outbox upgrade` creates what is missing"),
    )
    indexes = frozenset(
        f"observation_events_{name}_idx"
        for name in (
            "event_id",
            "fresh",
            "tried",
            "due",
            "failed",
            "retry",
            "sending",
            "sent",
            "parked",
            "abandoned",
        )
    )
    pending = (*_PENDING, is_sending)
    # In one query, for which SQLite sorts the few rows that are being sent.
    undelivered_to_trim = (
        oldest_of(
            oldest(Status.PENDING, only=and_(did_not_fail, never_tried)),
            oldest(Status.PENDING, only=and_(did_not_fail, is_postponed)),
            *(oldest(Status.PENDING, only=columns.waits_for == literal(one)) for one in WaitsFor),
            oldest(Status.SENDING),
            oldest(Status.PARKED),
            at_most="excess",
        ),
    )

    def create_engine(self, url: URL, *, synchronous: Synchronous) -> Engine:
        """Return an engine in WAL mode whose writing transactions begin with BEGIN IMMEDIATE; create no file."""
        return sqlite_file.create_sqlite_engine(url, synchronous)

    def writer(self, engine: Engine, *, is_own: bool) -> Writer:
        """Return the writer: on a file of ours the one connection of this process."""
        path = self.file_of(engine.url)
        return SQLiteWriter(engine, path) if path is not None and is_own else Writer(engine)

    def plain_cursor(self, connection: Any, driver: SQLAlchemyDialect) -> Any:  # noqa: ARG002 - SQLite has one driver
        """Return a cursor without the caller's row factory."""
        cursor = connection.cursor()
        cursor.row_factory = None
        return cursor

    def file_of(self, url: URL) -> Path | None:
        """Return None for a database in memory."""
        return sqlite_file.file_of(url)

    def absolute(self, url: URL) -> URL:
        """Return the URL with the path of the file made absolute."""
        return sqlite_file.absolute(url)

    def is_in_memory(self, url: URL) -> bool:
        """Return whether the database is in memory."""
        return sqlite_file.file_of(url) is None

    def missing_file(self, url: URL) -> Path | None:
        """Return the file if it is not there."""
        path = self.file_of(url)
        return None if path is None or sqlite_file.is_there(path) else path

    def create_file(self, url: URL) -> None:
        """Create the file, readable by its owner only."""
        sqlite_file.create_file(url)

    def begin(self, connection: Connection, *, writes: bool, is_own: bool) -> Ending:  # noqa: ARG002 - all engines take the same lock
        """Take the write lock at the start: a transaction that reads first fails if another writes meanwhile."""
        driver: Any = connection.connection.dbapi_connection
        run = connection.exec_driver_sql
        # True or False from Python 3.12 on, if the application says so.
        autocommit = getattr(driver, "autocommit", None)
        if autocommit is False and writes:
            run("COMMIT")  # the driver began a transaction that takes the write lock too late
        by_statement = autocommit is True
        if not driver.in_transaction:
            run("BEGIN IMMEDIATE" if writes else "BEGIN")
            by_statement = autocommit is not False
        return Ending(commit=by_statement, rollback=by_statement)

    def tolerant_text(self, connection: Any) -> AbstractContextManager[None]:
        """Read a text that is not UTF-8: only its own row must fail, not the whole claim."""
        return sqlite_file.tolerant_text(connection)

    def table_options(self, table: Table) -> dict[str, Any]:
        """Never reuse an id."""
        return {} if table.autoincrement_column is None else {"sqlite_autoincrement": True}

    def index_options(self, index: Index) -> dict[str, Any]:
        """Return the condition of the rows in the index.

        The plus keeps the planner from difflore's index by status, which it would always take if it is there.
        """
        rows = index.info["rows"]
        return {} if rows is None else {"sqlite_where": text(rows.replace("status = ", "+status = "))}

    def insert_or_add(self, transaction: Transaction, table: Table, *, adds: str | None, **values: Any) -> None:
        """Insert or add in one statement."""
        transaction.change(upsert(sqlite.insert, table, adds), **values)

    def insert_several(
        self,
        transaction: Transaction,
        rows: Rows,
        notification: ColumnElement[Any] | None,  # noqa: ARG002 - the base's signature; SQLite can't notify
    ) -> list[int]:
        """Insert without asking for each id: no other transaction writes, so they follow each other."""
        return insert_counted(transaction, rows)

    def insert_new(
        self, transaction: Transaction, rows: Rows, notification: ColumnElement[Any] | None
    ) -> dict[str, int]:
        """Insert first: an INSERT waits for the write lock. A query would begin a transaction that only reads."""
        return insert_new(transaction, sqlite.insert, rows, notification)

    def claim(self, transaction: Transaction, kind: Kind, wanted: Wanted) -> Claim:
        """Look up the places of the rows in the indexes, then move these rows.

        No other transaction writes in between, so no row has to be locked.
        """
        return sqlite_claims.take(transaction, kind, wanted)

    def checks(self, engine: Engine) -> Mapping[str, Callable[[], Iterator[tuple[bool, str]]]]:
        """Check the file."""
        return sqlite_file.checks(engine, reading)


DIALECT = SQLite()
