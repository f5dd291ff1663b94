"""How databases are opened and how transactions begin."""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import (
    URL,
    Connection,
    Dialect,
    Engine,
    PoolProxiedConnection,
    QueuePool,
    Select,
    UpdateBase,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from outbox.failures import ConfigurationError, StorageError

Synchronous = Literal["FULL", "NORMAL"]

BUSY_TIMEOUT_MS = 30_000
"""How long a writer waits for another one before it gives up."""

_own_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def open_engine(database: str | URL, *, synchronous: Synchronous = "FULL") -> Engine:
    """Return an engine of our own, which the caller disposes of.

    On SQLite: write-ahead log, writing transactions begin with BEGIN IMMEDIATE, and `synchronous` FULL keeps an
    event that enqueue accepted even through a power cut, NORMAL only through a crash of the program. The file
    itself is not created here. Raises `ConfigurationError` for what is no SQLAlchemy URL.
    """
    url = _parse(database)
    if synchronous not in ("FULL", "NORMAL"):
        raise ConfigurationError(f"synchronous is {synchronous!r}, expected 'FULL' or 'NORMAL'")
    if url.get_backend_name() != "sqlite":
        engine = create_engine(url, hide_parameters=True, pool_pre_ping=True)
    else:
        options: dict[str, Any] = {"poolclass": QueuePool}
        if sqlite_file(url) is None:
            # A database in memory lives in one connection, which the threads share in turns.
            options |= {"pool_size": 1, "max_overflow": 0, "connect_args": {"check_same_thread": False}}
        engine = create_engine(url, hide_parameters=True, **options)
        _set_up_sqlite(engine, synchronous)
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
    except OSError as error:
        raise StorageError(f"can't create the database {path}: {error.strerror}") from error


class Transaction:
    """A writing transaction on the driver's own cursor.

    It runs SQLAlchemy's statements, but each is compiled only once: SQLAlchemy's own way to run one costs several
    times what SQLite needs for it.
    """

    def __init__(self, cursor: Any, dialect: Dialect, compiled: dict[Any, _Compiled]) -> None:
        self._cursor = cursor
        self._dialect = dialect
        self._compiled = compiled

    def rows(self, statement: UpdateBase | Select[Any], /, **parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement that returns rows."""
        compiled = self._of(statement)
        self._cursor.execute(compiled.text, compiled.arguments(parameters))
        return list(self._cursor.fetchall())

    def value(self, statement: Select[Any], /, **parameters: Any) -> Any:
        """Run a query for one value; None where there is no row."""
        rows = self.rows(statement, **parameters)
        return rows[0][0] if rows else None

    def change(self, statement: UpdateBase, /, **parameters: Any) -> int:
        """Run a statement and return how many rows it changed."""
        compiled = self._of(statement)
        self._cursor.execute(compiled.text, compiled.arguments(parameters))
        return int(self._cursor.rowcount)

    def change_many(self, statement: UpdateBase, several: list[dict[str, Any]], /) -> int:
        """Run a statement once for each set of parameters; return how many rows were changed in all."""
        compiled = self._of(statement)
        self._cursor.executemany(compiled.text, [compiled.arguments(parameters) for parameters in several])
        return int(self._cursor.rowcount)

    def insert(self, statement: UpdateBase, rows: Iterable[dict[str, Any]], /) -> list[int]:
        """Insert rows one by one, and return their ids."""
        compiled = self._of(statement)
        ids = []
        for row in rows:
            self._cursor.execute(compiled.text, compiled.arguments(row))
            ids.append(int(self._cursor.lastrowid))
        return ids

    def _of(self, statement: UpdateBase | Select[Any]) -> _Compiled:
        compiled = self._compiled.get(statement)
        if compiled is None:
            compiled = self._compiled[statement] = _Compiled(statement, self._dialect)
        return compiled


class _Compiled:
    """The text of a statement for one driver, and where its parameters go."""

    def __init__(self, statement: UpdateBase | Select[Any], dialect: Dialect) -> None:
        compiled: Any = statement.compile(dialect=dialect)
        self.text = str(compiled)
        self._fixed = {name: bind.value for name, bind in compiled.binds.items() if not bind.required}
        self._positions = compiled.positiontup

    def arguments(self, parameters: dict[str, Any]) -> Any:
        values = self._fixed | parameters
        return values if self._positions is None else [values[name] for name in self._positions]


class Writer:
    """Opens writing transactions on one engine, and keeps what they compiled: once for each statement."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._compiled: dict[Any, _Compiled] = {}

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Like `writing`, on the driver's own cursor."""
        with _translated(self.engine):
            connection = self.engine.raw_connection()
            try:
                cursor = connection.cursor()
                if self.engine.dialect.name == "sqlite" and not _in_transaction(connection):
                    cursor.execute("BEGIN IMMEDIATE")
                yield Transaction(cursor, self.engine.dialect, self._compiled)
                connection.commit()
            except BaseException:
                connection.rollback()
                raise
            finally:
                connection.close()


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that holds the write lock from its start; commit at the end, roll back on an exception.

    On SQLite a transaction that read first fails as soon as it wants to write and another one wrote in between.
    Raises `StorageError` for what the database refuses.
    """
    with _translated(engine), engine.begin() as connection:
        if engine.dialect.name == "sqlite" and not _in_transaction(connection.connection):
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Open a connection for reading, which waits for no writer. Raises `StorageError` like `writing`."""
    with _translated(engine), engine.execution_options(outbox_reading=True).connect() as connection:
        yield connection


@contextmanager
def _translated(engine: Engine) -> Iterator[None]:
    # The driver's own errors come from setting up a connection, where SQLAlchemy does not wrap them.
    try:
        yield
    except (DBAPIError, PoolTimeoutError, engine.dialect.loaded_dbapi.Error) as error:
        # Only the driver's own words: SQLAlchemy's would repeat the statement.
        words = getattr(error, "orig", None) or error
        raise StorageError(f"{engine.url.render_as_string(hide_password=True)}: {words}") from error


def _parse(database: str | URL) -> URL:
    # No message repeats the URL: a password may stand in it.
    try:
        url = make_url(database)
        url.get_dialect().import_dbapi()
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "the database is not an SQLAlchemy URL; expected one such as sqlite:///outbox.db"
        ) from None
    except ImportError as error:
        raise ConfigurationError(f"the database's driver is not installed: {error}") from None
    return url


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


def _in_transaction(connection: PoolProxiedConnection) -> bool:
    dbapi_connection: Any = connection.dbapi_connection
    return bool(dbapi_connection.in_transaction)


def _forget_connections() -> None:
    # A connection that parent and child both use would mix their transactions.
    for engine in list(_own_engines):
        engine.dispose(close=False)


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget_connections)
