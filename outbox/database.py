"""How databases are opened and how transactions begin."""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

from sqlalchemy import URL, Connection, Engine, PoolProxiedConnection, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry

from outbox.failures import ConfigurationError, StorageError
from outbox.forks import Gate
from outbox.kept import KeptConnection
from outbox.models import MYSQL
from outbox.sqlite import (
    ADVICE,
    BUSY_TIMEOUT_MS,
    Synchronous,
    create_sqlite_engine,
    is_in_transaction,
    sqlite_file,
)

# The drivers that our extras install, for URLs that name none.
_DRIVERS = {
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
}

# How servers say that they gave up a transaction to end a deadlock or a conflict: PostgreSQL's SQLSTATEs, MySQL's
# error numbers.
_GIVEN_UP = frozenset({"40001", "40P01", 1205, 1213})

# The name of the lock under which servers migrate: any number that nobody else uses, here "outbox" in ASCII.
_MIGRATION_LOCK = 0x6F7574626F78
# How long MySQL lets a migration wait for another one; MariaDB can't wait for ever.
_MIGRATION_PATIENCE_S = 3_600

# For how long a connection that worked is taken to work still.
_TRUSTED_S = 0.1
# Bound here: tools that freeze time replace the names in modules.
_monotonic = time.monotonic

_own_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_kept_connections: weakref.WeakSet[KeptConnection] = weakref.WeakSet()

use = Gate()
"""Whoever uses a connection is inside."""


def open_engine(database: str | URL, *, synchronous: Synchronous = "FULL") -> Engine:
    """Return an engine of our own, which the caller disposes of.

    On SQLite: write-ahead log, writing transactions begin with BEGIN IMMEDIATE, and `synchronous` FULL keeps an
    event that enqueue accepted even through a power cut, NORMAL only through a crash of the program. The file
    itself is not created here. On servers transactions are READ COMMITTED. Raises `ConfigurationError` for a URL
    that can't be used.
    """
    url = _parse(database)
    if synchronous not in ("FULL", "NORMAL"):
        raise ConfigurationError(f"synchronous is {synchronous!r}, expected 'FULL' or 'NORMAL'")
    try:
        if url.get_backend_name() == "sqlite":
            engine = create_sqlite_engine(url, synchronous)
        else:
            engine = create_engine(url, hide_parameters=True, isolation_level="READ COMMITTED")
            _ping_after_idling(engine)
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "the database URL names a host or an option that can't be used; expected one such as sqlite:///outbox.db"
        ) from None
    with use.inside():  # a fork goes through them
        _own_engines.add(engine)
    return engine


def default_url() -> URL:
    """Return the URL of the per-user default file; the folder is created, readable by its owner only."""
    from platformdirs import user_data_path  # noqa: PLC0415 - who names a database needs no default

    folder = user_data_path("observation-outbox", appauthor=False)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return URL.create("sqlite", database=str(folder / "outbox.db"))


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that holds the write lock from its start; commit at the end, roll back on an exception.

    On SQLite a transaction that read first fails as soon as it wants to write and another one wrote in between.
    Raises `StorageError` for what the database refuses.
    """
    with use.inside(), translated(engine), engine.begin() as connection:
        if engine.dialect.name == "sqlite" and not is_in_transaction(connection.connection):
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection


@contextmanager
def migrating(engine: Engine) -> Iterator[Connection]:
    """Open a transaction like `writing` that no other migration runs beside, here or on another host."""
    if engine.dialect.name == "sqlite":
        with writing(engine) as connection:
            yield connection
        return
    # A host's engine may commit by itself, or see nothing of what another migration did while this one waited.
    with writing(engine.execution_options(isolation_level="READ COMMITTED")) as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
            yield connection
            return
        lock = f"SELECT GET_LOCK('{_MIGRATION_LOCK}', {_MIGRATION_PATIENCE_S})"
        if connection.exec_driver_sql(lock).scalar() != 1:
            raise StorageError(f"{_shown(engine)}: another migration is still under way")
        try:
            yield connection
            connection.exec_driver_sql("COMMIT")  # before another migration is let in
        finally:
            connection.exec_driver_sql(f"SELECT RELEASE_LOCK('{_MIGRATION_LOCK}')")


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Open a connection that reads one snapshot and waits for no writer. Raises `StorageError` like `writing`."""
    options: dict[str, Any] = {"outbox_reading": True}
    if engine.dialect.name != "sqlite":
        options["isolation_level"] = "REPEATABLE READ"
    with use.inside(), translated(engine), engine.execution_options(**options).connect() as connection:
        yield connection


@contextmanager
def translated(engine: Engine, *others: type[Exception]) -> Iterator[None]:
    """Raise `StorageError` for what the database refuses, in the driver's own words and with advice.

    `others` are the errors of a driver that is not the engine's.
    """
    try:
        yield
    except (*refusals(engine), *others) as error:
        raise StorageError(in_words(engine, error)) from error


def refusals(engine: Engine) -> tuple[type[Exception], ...]:
    """Return the errors by which a database says that it won't or can't."""
    # The driver's own errors come from where SQLAlchemy does not wrap them; the last two from values that the
    # database can't hold.
    driver: type[Exception] = engine.dialect.loaded_dbapi.Error
    return DBAPIError, PoolTimeoutError, driver, OverflowError, UnicodeEncodeError


def in_words(engine: Engine, error: Exception) -> str:
    """Say what a driver's error means: where, its own words, and for SQLite what to do."""
    # Only the driver's own words: SQLAlchemy's would repeat the statement.
    words = " ".join(str(getattr(error, "orig", None) or error).split())
    advice = next((f"; {advice}" for part, advice in ADVICE if part in words), "")
    return f"{_shown(engine)}: {words}{advice}"


def _shown(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=True)


def begin(engine: Engine, connection: PoolProxiedConnection, cursor: Any) -> None:
    """Begin a writing transaction on a driver's connection, where the driver by itself would not do it rightly."""
    if engine.dialect.name == "sqlite":
        if not is_in_transaction(connection):
            cursor.execute("BEGIN IMMEDIATE")
    elif engine not in _own_engines:
        # A host may work at a level at which a claim that waited for another one fails, or may commit by itself.
        if is_mysql(engine):
            cursor.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
            cursor.execute("START TRANSACTION")
        elif getattr(connection.dbapi_connection, "autocommit", False):
            cursor.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
        else:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")


def commits_by_itself(engine: Engine, connection: PoolProxiedConnection) -> bool:
    """Let each statement be a transaction of its own until the connection is given back, and tell whether it is.

    That is for our own engines on PostgreSQL: those of hosts have settings of their own, and to tell MySQL costs
    as much as it saves.
    """
    if engine.dialect.name != "postgresql" or engine not in _own_engines:
        return False
    driver_connection: Any = connection.dbapi_connection
    driver_connection.autocommit = True
    return True


def keep(engine: Engine) -> KeptConnection | None:
    """Return what keeps a connection to the file of SQLite that an engine of ours writes; None for all others."""
    path = sqlite_file(engine.url)
    if engine not in _own_engines or path is None:
        return None
    kept = KeptConnection(engine, path)
    with use.inside():  # a fork opens those that it shut, and no others
        _kept_connections.add(kept)
    return kept


def is_mysql(engine: Engine) -> bool:
    """Tell whether the database is MySQL or MariaDB."""
    return engine.dialect.name in MYSQL


def is_given_up(error: Exception) -> bool:
    """Tell whether a server undid the transaction, to end a deadlock or a conflict: it can be tried again."""
    code = getattr(error, "sqlstate", None) or next(iter(error.args), None)
    return code in _GIVEN_UP


def is_disconnect(engine: Engine, connection: PoolProxiedConnection, error: Any) -> bool:
    """Tell whether the connection to a server is broken."""
    if engine.dialect.name == "sqlite":
        return False
    return bool(engine.dialect.is_disconnect(error, connection.dbapi_connection, None))


def _ping_after_idling(engine: Engine) -> None:
    """Replace a connection that broke while nobody used it. One in steady use is not asked each time."""

    @event.listens_for(engine, "checkin")
    def _note_the_time(connection: Any, record: ConnectionPoolEntry) -> None:
        record.info["idle_since"] = _monotonic()
        if engine.dialect.name == "postgresql" and connection is not None and not connection.closed:
            connection.autocommit = False  # `commits_by_itself` may have set it

    @event.listens_for(engine, "checkout")
    def _ping(connection: Any, record: ConnectionPoolEntry, _proxy: object) -> None:
        if _monotonic() - record.info.get("idle_since", inf) > _TRUSTED_S:
            try:
                is_alive = engine.dialect.do_ping(connection)
            except engine.dialect.loaded_dbapi.Error:
                is_alive = False
            if not is_alive:
                raise DisconnectionError


def _parse(database: str | URL) -> URL:
    # No message repeats the URL: a password may stand in it.
    refusal = ConfigurationError("the database is not an SQLAlchemy URL; expected one such as sqlite:///outbox.db")
    try:
        url = make_url(database)
        url = url.set(drivername=_DRIVERS.get(url.drivername, url.drivername))
        url.render_as_string().encode()  # messages show it, which needs Unicode
        url.get_dialect().import_dbapi()
    except (ArgumentError, ValueError):
        raise refusal from None
    except ImportError as error:
        raise ConfigurationError(f"the database's driver is not installed: {error}") from None
    if "\0" in (url.database or ""):
        raise refusal  # no system has such a name
    return url


def _close_files() -> None:
    use.shut(BUSY_TIMEOUT_MS)
    for kept in list(_kept_connections):
        kept.shut(BUSY_TIMEOUT_MS)
    for engine in list(_own_engines):
        if sqlite_file(engine.url) is not None:
            engine.dispose()


def _go_on() -> None:
    for kept in list(_kept_connections):
        kept.open()
    use.open()


def _forget_connections() -> None:
    for kept in list(_kept_connections):
        kept.open_in_child()
    for engine in list(_own_engines):
        # A connection that parent and child both use would mix their transactions. One to memory is a copy.
        if engine.dialect.name != "sqlite" or sqlite_file(engine.url) is not None:
            engine.dispose(close=False)
    use.open_in_child()


if sys.platform != "win32":
    os.register_at_fork(before=_close_files, after_in_parent=_go_on, after_in_child=_forget_connections)
