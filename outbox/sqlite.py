"""What SQLite needs: its file, how its connections are set up, and its own check."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import URL, Connection, Dialect, Engine, PoolProxiedConnection, QueuePool, create_engine, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry

from outbox.failures import StorageError

Synchronous = Literal["FULL", "NORMAL"]

BUSY_TIMEOUT_MS = 30_000
"""How long a writer waits for another one before it gives up."""

# What to do about an error of SQLite, by a part of its text: that is the same in every version of Python.
ADVICE = (
    ("locked", "another program holds the write lock; end it or wait for it, then try again"),
    ("full", "make room on the disk, then try again"),
    ("readonly", "let this user write the file and its folder"),
    ("unable to open", "let this user read and write the file and its folder"),
    ("disk I/O error", "look at the disk and its free space, then try again"),
    ("malformed", "the file is damaged; `outbox doctor` tells more; restore a backup or use .recover of sqlite3"),
    ("not a database", "name the right file; this one is left as it is"),
    ("no such table", "`outbox upgrade` creates what is missing"),
    ("no such column", "`outbox upgrade` creates what is missing"),
)


def create_sqlite_engine(url: URL, synchronous: Synchronous) -> Engine:
    """Return an engine in WAL mode whose writing transactions begin with BEGIN IMMEDIATE. It creates no file."""
    if "uri" in url.query and not url.database:
        raise ValueError("no name at all; SQLAlchemy would hand that on to the driver")
    options: dict[str, Any] = {"poolclass": QueuePool}
    if sqlite_file(url) is None:
        # A database in memory lives in one connection, which the threads share in turns.
        options |= {"pool_size": 1, "max_overflow": 0, "connect_args": {"check_same_thread": False}}
    engine = create_engine(url, hide_parameters=True, **options)
    _set_up(engine, synchronous)
    _watch_file(engine)
    return engine


def sqlite_file(url: URL) -> Path | None:
    """Return the file of an SQLite database, or None for one in memory and for other databases."""
    name = url.database
    # Without uri=true SQLAlchemy drops the other options.
    asks_for_memory = url.query.get("mode") == "memory" and "uri" in url.query
    in_memory = not name or name == ":memory:" or "mode=memory" in name or asks_for_memory
    if url.get_backend_name() != "sqlite" or in_memory:
        return None
    return Path(str(name).removeprefix("file:").partition("?")[0])


def create_file(url: URL) -> None:
    """Create the file of an SQLite database, readable by its owner only, unless it is there already.

    SQLite gives the files of the write-ahead log the same mode. Raises `StorageError` where it can't be created.
    """
    path = sqlite_file(url)
    if path is None:
        return
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        pass
    except (OSError, ValueError) as error:
        raise StorageError(f"can't create the database {path}: {_in_words(error)}") from error


def is_there(path: Path) -> bool:
    """Tell whether there is such a file. Raises `StorageError` where that can't be told."""
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        raise StorageError(f"can't look for the database {path}: {_in_words(error)}") from error


def _in_words(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _set_up(engine: Engine, synchronous: Synchronous) -> None:
    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself
        connection.text_factory = _tolerant_text
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        _enter_wal(connection)
        connection.execute(f"PRAGMA synchronous = {synchronous}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        reading = connection.get_execution_options().get("outbox_reading")
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def _watch_file(engine: Engine) -> None:
    """Notice that the file was deleted or replaced: SQLite would go on writing to the one that has no name."""
    path = sqlite_file(engine.url)
    if path is None:
        return

    @event.listens_for(engine, "do_connect")
    def _refuse_missing(*_: object) -> None:
        if not is_there(path):  # SQLite would create it, empty and readable by all
            raise StorageError(f"there is no database {path}; restore it, or `outbox upgrade` creates a new one")

    @event.listens_for(engine, "connect")
    def _remember(_connection: object, record: ConnectionPoolEntry) -> None:
        record.info["file"] = identity(path)

    @event.listens_for(engine, "checkout")
    def _compare(_connection: object, record: ConnectionPoolEntry, _proxy: object) -> None:
        if record.info["file"] != identity(path):
            raise DisconnectionError  # the pool connects anew


def identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from another one of the same name; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _enter_wal(connection: Any) -> None:
    # Of several processes that open a new file, SQLite refuses some at once, without the busy time-out.
    tries_left = BUSY_TIMEOUT_MS // 10
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except connection.OperationalError as error:
            if "locked" not in str(error) or not tries_left:
                raise
        tries_left -= 1
        time.sleep(0.01)


def _tolerant_text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


@contextmanager
def tolerant_text(cursor: Any, dialect: Dialect) -> Iterator[None]:
    """Read a text that is not UTF-8: it must spoil its own row, not the claim that comes upon it.

    A host's connection gets its own way to read back.
    """
    connection = cursor.connection if dialect.name == "sqlite" else None
    if connection is None or connection.text_factory is _tolerant_text:
        yield
        return
    before = connection.text_factory
    connection.text_factory = _tolerant_text
    try:
        yield
    finally:
        connection.text_factory = before


def is_in_transaction(connection: PoolProxiedConnection) -> bool:
    """Tell whether the driver has a transaction open: a host may begin them in a way of its own."""
    dbapi_connection: Any = connection.dbapi_connection
    return bool(dbapi_connection.in_transaction)


def damage(connection: Connection) -> list[str]:
    """Let the database check itself, which reads all of it; return what it found, nothing if it is sound."""
    found = list(connection.exec_driver_sql("PRAGMA integrity_check(10)").scalars())
    return [] if found == ["ok"] else found


def journal_mode(connection: Connection) -> str:
    """Return how the database keeps its journal; `wal` where all is well."""
    return str(connection.exec_driver_sql("PRAGMA journal_mode").scalar())
