"""What SQLite needs: its file, how its connections are set up, and its own check."""

from __future__ import annotations

import os
import stat
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from sqlalchemy import URL, Connection, Engine, QueuePool, create_engine, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry

from outbox.clock import monotonic_s
from outbox.failures import StorageError
from outbox.storage import forks

Check = Callable[[], Iterator[tuple[bool, str]]]

BUSY_TIMEOUT_MS = 30_000
"""How long a writer waits for another writer before it gives up."""


def create_sqlite_engine(url: URL, synchronous: str) -> Engine:
    """Return an engine in WAL mode whose writing transactions begin with BEGIN IMMEDIATE. It creates no file."""
    if "uri" in url.query and not url.database:
        raise ValueError("no name at all; SQLAlchemy would hand that on to the driver")
    options: dict[str, Any] = {"poolclass": QueuePool}
    if file_of(url) is None:
        # A database in memory lives in one connection, which the threads share in turns.
        options |= {"pool_size": 1, "max_overflow": 0, "connect_args": {"check_same_thread": False}}
    else:
        options["poolclass"] = forks.OwnPool
    engine = create_engine(url, hide_parameters=True, **options)
    _set_up(engine, synchronous)
    _watch_file(engine)
    return engine


def absolute(url: URL) -> URL:
    """Return the URL of an SQLite file with its path made absolute.

    Raises `OSError` if the path is relative and the current directory was deleted.
    """
    path = file_of(url)
    if path is None or path.is_absolute():
        return url
    name, here = str(url.database), Path.cwd()
    if _is_uri(url):
        return url.set(database=f"file:{quote(str(here))}/{name.removeprefix('file:')}")
    return url.set(database=str(here / name))


def file_of(url: URL) -> Path | None:
    """Return the file of an SQLite database, or None for one in memory."""
    name = url.database or ""
    # Without uri=true, SQLAlchemy drops the options of SQLite.
    if _has_uri_option(url) and (url.query.get("mode") == "memory" or url.query.get("vfs") == "memdb"):
        return None
    if _is_uri(url):
        name, _, options = name.removeprefix("file:").partition("?")
        name = "" if "mode=memory" in options else unquote(name)
    return None if name in ("", ":memory:") else Path(name)


def _is_uri(url: URL) -> bool:
    """Return whether SQLite reads the name of the database as a URI, such as `file:outbox.db?mode=ro`."""
    return _has_uri_option(url) and str(url.database).startswith("file:")


def _has_uri_option(url: URL) -> bool:
    return str(url.query.get("uri")).lower() in ("true", "t", "yes", "y", "on", "1")


def create_file(url: URL) -> None:
    """Create the file of an SQLite database, readable by its owner only, unless it is there already.

    SQLite gives the files of the write-ahead log the same mode. Raises `StorageError` if it can't be created.
    """
    path = file_of(url)
    if path is None:
        return
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        pass
    except (OSError, ValueError) as error:
        raise StorageError(f"can't create the database {path}: {_in_words(error)}") from error


def is_there(path: Path) -> bool:
    """Return whether there is such a file. Raises `StorageError` if that can't be found out."""
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        raise StorageError(f"can't look for the database {path}: {_in_words(error)}") from error


def _in_words(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _set_up(engine: Engine, synchronous: str) -> None:
    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself
        connection.text_factory = _tolerant_text
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        _enter_wal(connection)
        connection.execute(f"PRAGMA synchronous = {synchronous}")

    path = file_of(engine.url)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        if connection.get_execution_options().get("outbox_reading"):
            connection.exec_driver_sql("BEGIN")
            return
        if path is not None:
            refuse_inherited(path)
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _watch_file(engine: Engine) -> None:
    """Notice that the file was deleted or replaced: SQLite would continue to write to the old file."""
    path = file_of(engine.url)
    if path is None:
        return

    @event.listens_for(engine, "do_connect")
    def _refuse_missing(_dialect: object, record: ConnectionPoolEntry, *_: object) -> None:
        if not is_there(path):  # SQLite would create it, empty and readable by all
            raise StorageError(f"there is no database {path}; restore it, or `outbox upgrade` creates a new one")
        record.info["identity"] = identity(path)  # if the file is replaced right now, the next use notices

    @event.listens_for(engine, "connect")
    def _remember(_connection: object, record: ConnectionPoolEntry) -> None:
        record.info["file"] = OpenFile(path, record.info["identity"])

    @event.listens_for(engine, "checkout")
    def _compare(_connection: object, record: ConnectionPoolEntry, _proxy: object) -> None:
        file: OpenFile = record.info["file"]
        if file.is_replaced() or file.has_lost_log():
            raise DisconnectionError  # the pool connects anew

    @event.listens_for(engine, "close")
    def _forget(_connection: object, record: ConnectionPoolEntry) -> None:
        record.info["file"].is_closed()


_open_files: weakref.WeakValueDictionary[int, OpenFile] = weakref.WeakValueDictionary()


class OpenFile:
    """The file of an open connection, and the process that opened it."""

    def __init__(self, path: Path, identity: object) -> None:
        self.path = str(path)
        self.identity = identity
        self.process_id = os.getpid()
        self._log = self._find_log()
        _open_files[id(self)] = self

    def is_replaced(self) -> bool:
        """Return whether another file, or no file, has the name now."""
        return identity(self.path) != self.identity

    def has_lost_log(self) -> bool:
        """Return whether the write-ahead log or its index was deleted.

        SQLite continues with the deleted files, which no other process sees. When all connections are closed
        normally, SQLite writes the contents of the log to the file.
        """
        return self._find_log() != self._log

    def is_closed(self) -> None:
        """Let forked processes open the file again, because its connection is closed."""
        _open_files.pop(id(self), None)

    def _find_log(self) -> object:
        return identity(f"{self.path}-wal"), identity(f"{self.path}-shm")


def refuse_inherited(path: Path) -> None:
    """Raise `StorageError` in a forked process that inherited an open connection to the file: it must not write.

    SQLite would take no locks for this process, and what is committed here could be lost.
    """
    this = identity(path)
    for found in _open_files.valuerefs():
        file = found()
        if file is not None and file.process_id != os.getpid() and file.identity == this:
            raise StorageError(
                f"{path}: process {file.process_id} had this file open when it forked this process, {os.getpid()};"
                " SQLite could lose what is written here. Open the file after the fork only: in uWSGI set"
                " `lazy-apps = true`"
            )


def identity(path: Path | str) -> tuple[int, int] | None:
    """Return a value that differs between two files of the same name; None if there is no file."""
    try:
        found = os.stat(path)  # noqa: PTH116 - at each enqueue: `Path.stat` takes half a microsecond more
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _enter_wal(connection: Any) -> None:
    # Of several processes that open a new file, SQLite refuses some at once. While another program reads a file
    # that is not in WAL mode yet, each try takes the busy time-out.
    deadline = monotonic_s() + BUSY_TIMEOUT_MS / 1_000
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except connection.OperationalError as error:
            if "locked" not in str(error) or monotonic_s() >= deadline:
                raise
        time.sleep(0.01)


def _tolerant_text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


@contextmanager
def tolerant_text(connection: Any) -> Iterator[None]:
    """Read a text that is not UTF-8: only its own row must fail, not the whole claim.

    A connection of the application gets its own setting back.
    """
    before = connection.text_factory
    connection.text_factory = _tolerant_text
    try:
        yield
    finally:
        connection.text_factory = before


def checks(engine: Engine, reading: Callable[[Engine], AbstractContextManager[Connection]]) -> dict[str, Check]:
    """Return what `outbox doctor` checks about the database, and about its file if it has one."""
    path = file_of(engine.url)

    def integrity() -> Iterator[tuple[bool, str]]:
        with reading(engine) as connection:
            found = list(connection.exec_driver_sql("PRAGMA integrity_check(10)").scalars())
        if found == ["ok"]:
            yield True, "the file is not damaged"
        else:
            words = "; ".join(found)
            yield False, f"the file is damaged; restore a backup, or use .recover of sqlite3: {words}"

    def journal() -> Iterator[tuple[bool, str]]:
        with reading(engine) as connection:
            mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
        if mode == "wal":
            yield True, "the journal mode is 'wal'"
        else:
            yield False, f"the journal mode is {mode!r}, expected 'wal'; is the file on a local disk?"

    if path is None:
        return {"integrity": integrity}
    return {"integrity": integrity, "journal": journal, "permissions": partial(_permissions, path)}


def _permissions(path: Path) -> Iterator[tuple[bool, str]]:
    open_to_others = [
        f"{found} has mode {mode:04o}, so users other than its owner can open it; run `chmod 600` on it"
        for suffix in ("", "-wal", "-shm")
        if (found := path.with_name(path.name + suffix)).exists()
        and (mode := stat.S_IMODE(found.stat().st_mode)) & 0o077
    ]
    for words in open_to_others:
        yield False, words
    if not open_to_others:
        yield True, "only their owner can open the files"
