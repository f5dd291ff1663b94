"""How databases are opened and how transactions begin."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from sqlalchemy import URL, Connection, Dialect, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from outbox.failures import ConfigurationError, StorageError
from outbox.storage import forks
from outbox.storage.dialects import dialect_named, dialect_of
from outbox.storage.pings import note_the_end

Synchronous = Literal["FULL", "NORMAL"]
"""Whether a commit on our own SQLite engine waits for the disk. Servers have settings of their own."""

# The search path selects the schema. The host's `schema_translate_map` would apply to some statements only.
_UNTRANSLATED = {"schema_translate_map": None}
MIGRATION_LOCK = 0x6F7574626F78
"""The name of the lock under which servers migrate, a number that no other program uses: "outbox" in ASCII."""

_own_engines: weakref.WeakKeyDictionary[Engine, forks.Process] = weakref.WeakKeyDictionary()


def open_engine(database: str | URL, *, synchronous: Synchronous = "FULL") -> Engine:
    """Return an engine of our own, which the caller disposes of.

    On SQLite: write-ahead log, writing transactions begin with BEGIN IMMEDIATE, and `synchronous` FULL keeps an
    event that enqueue accepted even through a power cut, NORMAL only through a crash of the program. The file
    itself is not created here. A relative path is made absolute here, so that it names the same file after the
    program changes its directory. On servers transactions are READ COMMITTED. psycopg prepares nothing where a
    pooler may stand in between. Raises `ConfigurationError` for a URL that can't be used.
    """
    url = parse_url(database)
    if synchronous not in ("FULL", "NORMAL"):
        raise ConfigurationError(f"synchronous is {synchronous!r}, expected 'FULL' or 'NORMAL'")
    try:
        engine = dialect_named(url.get_backend_name()).create_engine(url, synchronous=synchronous)
    except ConfigurationError:
        raise
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "the database URL names a host or an option that can't be used; expected one such as sqlite:///outbox.db"
        ) from None
    _own_engines[engine] = _process_of(engine)
    return engine


def is_own(engine: Engine) -> bool:
    """Return whether `open_engine` made the engine."""
    return engine in _own_engines


def engine_of(database: str | URL | Engine, *, synchronous: Synchronous) -> Engine:
    """Return the application's engine, or one of our own for a URL. Raises what `open_engine` raises."""
    if not isinstance(database, Engine):
        return open_engine(database, synchronous=synchronous)
    _refuse_unsupported(database.dialect)
    return database


def _refuse_unsupported(driver: Dialect | type[Dialect]) -> None:
    supported = dialect_named(driver.name).drivers
    name = f"{driver.name}+{driver.driver}"
    if driver.is_async:
        name += " (asynchronous)"
    if name not in supported:
        raise ConfigurationError(f"the database's driver is {name}, expected one of {', '.join(supported)}")


def file_of(engine: Engine) -> Path | None:
    """Return the file of the database; None for one in memory, and for servers."""
    return dialect_of(engine).file_of(engine.url)


def default_url() -> URL:
    """Return the URL of the per-user default file; the folder is created, readable by its owner only."""
    from platformdirs import user_data_path  # noqa: PLC0415 - a caller that names a database needs no default

    folder = user_data_path("observation-outbox", appauthor=False)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return URL.create("sqlite", database=str(folder / "outbox.db"))


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that holds the write lock from its start; commit at the end, roll back on an exception.

    On SQLite, a transaction that reads first fails at its first write if another one wrote in between.
    Raises `StorageError` for what the database refuses.
    """
    with (
        forks.held_back(),
        translated(engine),
        engine.execution_options(**_UNTRANSLATED).connect() as connection,
        begun(engine, connection, writes=True),
    ):
        yield connection


@contextmanager
def migrating(engine: Engine) -> Iterator[Connection]:
    """Open a transaction like `writing`, and keep other migrations out, here and on other hosts."""
    with writing(engine) as connection, dialect_of(engine).migration_lock(connection):
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Open a connection that reads one snapshot and waits for no writer. Raises `StorageError` like `writing`."""
    with (
        forks.held_back(),
        translated(engine),
        engine.execution_options(outbox_reading=True, **_UNTRANSLATED).connect() as connection,
        begun(engine, connection, writes=False),
    ):
        yield connection


class Ending(NamedTuple):
    """Which ends of a transaction need a statement, because the driver ignores the call."""

    commit: bool = False
    rollback: bool = False


@contextmanager
def begun(engine: Engine, connection: Connection, *, writes: bool) -> Iterator[None]:
    """Hold the last transaction of a connection; commit at the end, roll back on an exception.

    SQLAlchemy begins and ends it, except where the driver commits each statement by itself: some drivers then
    ignore `commit()` and `rollback()`. In that case, statements begin and end the transaction. The connection
    keeps the application's settings.
    """
    dialect, is_ours = dialect_of(engine), is_own(engine)
    unprepared = nullcontext() if is_ours else dialect.unprepared(connection.connection.driver_connection)
    with unprepared, connection.begin():
        by_statement = dialect.begin(connection, writes=writes, is_own=is_ours)
        try:
            yield
            if by_statement.commit:
                connection.exec_driver_sql("COMMIT")
        except BaseException:
            if by_statement.rollback and not connection.invalidated:
                with suppress(DBAPIError):  # the connection broke: the first error says why
                    connection.exec_driver_sql("ROLLBACK")
            raise
    if is_ours:
        note_the_end(connection)


@contextmanager
def translated(engine: Engine, *others: type[Exception]) -> Iterator[None]:
    """Raise `StorageError` for what the database refuses, in the driver's own words and with advice.

    `others` are the errors of a driver that is not the engine's.
    """
    try:
        yield
    except (*refusals(engine), *others) as error:
        # SQLAlchemy's own error would show the statement and the values in a traceback.
        raise StorageError(in_words(engine, error)) from (getattr(error, "orig", None) or error)


def refusals(engine: Engine) -> tuple[type[Exception], ...]:
    """Return the exceptions that mean that the database refused or failed."""
    # The driver's own errors come from where SQLAlchemy does not wrap them; the last two from values that the
    # database can't hold.
    driver: type[Exception] = engine.dialect.loaded_dbapi.Error
    return DBAPIError, PoolTimeoutError, driver, OverflowError, UnicodeEncodeError


def in_words(engine: Engine, error: Exception) -> str:
    """Return a driver's error as text: the database, the driver's message, and for SQLite advice."""
    # Only the driver's own words: SQLAlchemy's would repeat the statement.
    words = " ".join(str(getattr(error, "orig", None) or error).split())
    advice = next((f"; {advice}" for part, advice in dialect_of(engine).advice if part in words), "")
    return f"{shown_url(engine)}: {words}{advice}"


def shown_url(engine: Engine) -> str:
    """Return the URL of a database for people, without passwords. Some drivers take them as options, too."""
    options = [name for name in engine.url.query if "passw" in name.lower()]
    return engine.url.difference_update_query(options).render_as_string(hide_password=True)


def parse_url(database: str | URL) -> URL:
    """Return the URL with the path of an SQLite file made absolute, and with a driver.

    Raises `ConfigurationError` for a URL that can't be used.
    """
    # No message repeats the URL: a password may stand in it.
    refusal = ConfigurationError("the database is not an SQLAlchemy URL; expected one such as sqlite:///outbox.db")
    try:
        url = make_url(database)
        url.render_as_string().encode()  # messages show it, which needs Unicode
    except (ArgumentError, ValueError):
        raise refusal from None
    dialect = dialect_named(url.get_backend_name())
    url = dialect.with_driver(url)
    try:
        driver = url.get_dialect()
    except (ArgumentError, ValueError):
        raise refusal from None
    _refuse_unsupported(driver)
    try:
        driver.import_dbapi()
    except ImportError as error:
        raise ConfigurationError(f"the database's driver is not installed: {error}") from None
    if "\0" in (url.database or ""):
        raise refusal  # no system has such a name
    try:
        return dialect.absolute(url)
    except OSError as error:
        raise ConfigurationError(
            "the database URL has a relative path, and there is no current directory; expected an absolute path,"
            f" such as sqlite:////srv/outbox.db: {error.strerror}"
        ) from None


def _process_of(engine: Engine) -> forks.Process:
    this = weakref.ref(engine)
    is_file = file_of(engine) is not None
    is_in_memory = dialect_of(engine).is_in_memory(engine.url)

    def close_file() -> None:
        if is_file and (engine := this()) is not None:
            engine.pool.dispose()

    def forget_connections() -> None:
        # If parent and child shared a connection, their transactions would mix. A connection to an in-memory
        # database is a copy and needs nothing.
        if not is_in_memory and (engine := this()) is not None:
            engine.dispose(close=False)

    return forks.Process(before_fork=close_file, in_child=forget_connections)
