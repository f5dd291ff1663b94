"""How databases are opened and how transactions begin."""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    PoolProxiedConnection,
    QueuePool,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry

from outbox.failures import ConfigurationError, StorageError
from outbox.forks import Gate

Synchronous = Literal["FULL", "NORMAL"]

BUSY_TIMEOUT_MS = 30_000
"""How long a writer waits for another one before it gives up."""

# What to do about an error of SQLite, by a part of its text: that is the same in every version of Python.
_ADVICE = (
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

_own_engines: weakref.WeakSet[Engine] = weakref.WeakSet()

use = Gate()
"""Whoever uses a connection is inside."""


def open_engine(database: str | URL, *, synchronous: Synchronous = "FULL") -> Engine:
    """Return an engine of our own, which the caller disposes of.

    On SQLite: write-ahead log, writing transactions begin with BEGIN IMMEDIATE, and `synchronous` FULL keeps an
    event that enqueue accepted even through a power cut, NORMAL only through a crash of the program. The file
    itself is not created here. Raises `ConfigurationError` for a URL that can't be used.
    """
    url = _parse(database)
    if synchronous not in ("FULL", "NORMAL"):
        raise ConfigurationError(f"synchronous is {synchronous!r}, expected 'FULL' or 'NORMAL'")
    if url.get_backend_name() != "sqlite":
        engine = _create_engine(url, pool_pre_ping=True)
    else:
        options: dict[str, Any] = {"poolclass": QueuePool}
        if sqlite_file(url) is None:
            # A database in memory lives in one connection, which the threads share in turns.
            options |= {"pool_size": 1, "max_overflow": 0, "connect_args": {"check_same_thread": False}}
        engine = _create_engine(url, **options)
        _set_up_sqlite(engine, synchronous)
        _watch_file(engine)
    _own_engines.add(engine)
    return engine


def default_url() -> URL:
    """Return the URL of the per-user default file; the folder is created, readable by its owner only."""
    from platformdirs import user_data_path  # noqa: PLC0415 - who names a database needs no default

    folder = user_data_path("observation-outbox", appauthor=False)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return URL.create("sqlite", database=str(folder / "outbox.db"))


def sqlite_file(url: URL) -> Path | None:
    """Return the file of an SQLite database, or None for one in memory and for other databases."""
    name = url.database
    in_memory = not name or name == ":memory:" or "mode=memory" in name or url.query.get("mode") == "memory"
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


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that holds the write lock from its start; commit at the end, roll back on an exception.

    On SQLite a transaction that read first fails as soon as it wants to write and another one wrote in between.
    Raises `StorageError` for what the database refuses.
    """
    with use.inside(), translated(engine), engine.begin() as connection:
        if engine.dialect.name == "sqlite" and not in_transaction(connection.connection):
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Open a connection for reading, which waits for no writer. Raises `StorageError` like `writing`."""
    options = {"outbox_reading": True}
    with use.inside(), translated(engine), engine.execution_options(**options).connect() as connection:
        yield connection


@contextmanager
def translated(engine: Engine) -> Iterator[None]:
    """Raise `StorageError` for what the database refuses, in the driver's own words and with advice."""
    # The driver's own errors come from setting up a connection, where SQLAlchemy does not wrap them; the last two
    # from values that the database can't hold.
    driver = engine.dialect.loaded_dbapi.Error
    try:
        yield
    except (DBAPIError, PoolTimeoutError, driver, OverflowError, UnicodeEncodeError) as error:
        # Only the driver's own words: SQLAlchemy's would repeat the statement.
        words = str(getattr(error, "orig", None) or error)
        advice = next((f"; {advice}" for part, advice in _ADVICE if part in words), "")
        raise StorageError(f"{engine.url.render_as_string(hide_password=True)}: {words}{advice}") from error


def damage(engine: Engine) -> list[str]:
    """Let an SQLite database check itself, which reads all of it; return what it found, nothing if it is sound."""
    with reading(engine) as connection:
        found = list(connection.exec_driver_sql("PRAGMA integrity_check(10)").scalars())
    return [] if found == ["ok"] else found


def journal_mode(engine: Engine) -> str:
    """Return how an SQLite database keeps its journal; `wal` where all is well."""
    with reading(engine) as connection:
        return str(connection.exec_driver_sql("PRAGMA journal_mode").scalar())


def _parse(database: str | URL) -> URL:
    # No message repeats the URL: a password may stand in it.
    try:
        url = make_url(database)
        url.render_as_string()  # messages show it, which needs Unicode
        url.get_dialect().import_dbapi()
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "the database is not an SQLAlchemy URL; expected one such as sqlite:///outbox.db"
        ) from None
    except ImportError as error:
        raise ConfigurationError(f"the database's driver is not installed: {error}") from None
    return url


def _create_engine(url: URL, **options: Any) -> Engine:
    try:
        return create_engine(url, hide_parameters=True, **options)
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "the database URL names a host or an option that can't be used; expected one such as sqlite:///outbox.db"
        ) from None


def _in_words(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _set_up_sqlite(engine: Engine, synchronous: Synchronous) -> None:
    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself
        # Text that is not UTF-8 must spoil its own row, not the claim that comes upon it.
        connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
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
        record.info["file"] = _identity(path)

    @event.listens_for(engine, "checkout")
    def _compare(_connection: object, record: ConnectionPoolEntry, _proxy: object) -> None:
        if record.info["file"] != _identity(path):
            raise DisconnectionError  # the pool connects anew


def _identity(path: Path) -> tuple[int, int] | None:
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


def in_transaction(connection: PoolProxiedConnection) -> bool:
    """Tell whether SQLite's driver has a transaction open: the host may begin them in its own way."""
    dbapi_connection: Any = connection.dbapi_connection
    return bool(dbapi_connection.in_transaction)


def _close_files() -> None:
    use.shut(BUSY_TIMEOUT_MS)
    for engine in list(_own_engines):
        if sqlite_file(engine.url) is not None:
            engine.dispose()


def _forget_connections() -> None:
    for engine in list(_own_engines):
        # A connection that parent and child both use would mix their transactions. One to memory is a copy.
        if engine.dialect.name != "sqlite" or sqlite_file(engine.url) is not None:
            engine.dispose(close=False)
    use.open_in_child()


if sys.platform != "win32":
    os.register_at_fork(before=_close_files, after_in_parent=use.open, after_in_child=_forget_connections)
