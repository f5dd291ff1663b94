"""The simulation on an SQLite file.

Nobody waits inside SQLite: who would wait for the lock is not chosen to run until it is free.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

from outbox import Outbox

from .stage import Fault, Process, simulated_world
from .theatre import Stopping, Theatre

_PRAGMAS = {"busy_timeout": "PRAGMA busy_timeout = 0", "synchronous": "PRAGMA synchronous = OFF"}
_PREPARE = """
    CREATE TABLE born (id INTEGER PRIMARY KEY, destination TEXT NOT NULL);
    CREATE TRIGGER born AFTER INSERT ON observation_events
        BEGIN INSERT INTO born VALUES (NEW.id, NEW.destination); END;
"""
_WRITING = ("BEGIN IMMEDIATE", "INSERT", "UPDATE", "DELETE")


class DatabaseFault(sqlite3.OperationalError):
    """An error that may carry what only servers tell."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.sqlstate = fault.sqlstate
        self.breaks_connection = fault.breaks_connection


class Connection(Stopping, sqlite3.Connection):
    """It knows who writes."""

    _changes = 0

    def cursor(self, factory: type[sqlite3.Cursor] | None = None) -> sqlite3.Cursor:
        return super().cursor(Cursor)

    def perform(self, sql: str, call: Callable[[str, Any], Any], parameters: Any) -> Any:
        words = sql.split(None, 2)
        if words[0] == "PRAGMA":
            return call(_PRAGMAS.get(words[1], sql) if "=" in sql else sql, parameters)
        if sql in ("COMMIT", "ROLLBACK"):
            return self.commit() if sql == "COMMIT" else self.rollback()
        process = self.process
        if process is None:
            return call(sql, parameters)
        statement = " ".join(words[:2]) if words[0] == "BEGIN" else words[0]
        is_alone = self.isolation_level is None and not self.in_transaction
        if statement == "INSERT" and is_alone:  # in the steps in which SQLite commits it
            self.perform("BEGIN IMMEDIATE", call, ())
            inserted = self.perform(sql, call, parameters)
            self.commit()
            return inserted
        process.pause(f"before {statement}")
        self.fail_if_told(process, statement)
        if statement in _WRITING:
            self._take_lock(process)
        result = call(sql, parameters)
        if words[0] != "BEGIN":
            process.operation.results.append(result.rowcount)
        process.pause(f"after {statement}", result.rowcount)
        return result

    def commit(self) -> None:
        process = self.process
        if process is None or not self.in_transaction:
            super().commit()
            return
        wrote = self.total_changes != self._changes
        self.commit_in_steps(process, self._commit, wrote=wrote)

    def rollback(self) -> None:
        super().rollback()
        self._changes = self.total_changes
        self._release_lock()

    def close(self) -> None:
        with suppress(sqlite3.ProgrammingError):  # it is closed already
            super().rollback()
        super().close()
        self._release_lock()

    def fail(self, fault: Fault) -> None:
        raise DatabaseFault(fault)

    def _commit(self) -> None:
        self._changes = self.total_changes
        super().commit()
        self._release_lock()

    def _take_lock(self, process: Process) -> None:
        stage = process.stage
        while stage.writer not in (None, self):
            process.wait_until(lambda: stage.writer is None)
        stage.writer = self

    def _release_lock(self) -> None:
        process = self.process
        if process is not None and process.stage.writer is self:
            process.stage.writer = None


class Cursor(sqlite3.Cursor):
    connection: Connection

    def execute(self, sql: str, parameters: Any = ()) -> Any:
        return self.connection.perform(sql, super().execute, parameters)

    def executemany(self, sql: str, parameters: Any) -> Any:
        return self.connection.perform(sql, super().executemany, parameters)

    def fetchall(self) -> list[Any]:
        rows = super().fetchall()
        process = self.connection.process
        if process is not None:
            process.operation.results += rows
        return rows


class SQLiteTheatre(Theatre):
    """Each run has a file of its own, copied from a template."""

    def __init__(self, folder: Path) -> None:
        self._template = folder / "template.db"
        super().__init__(f"sqlite:///{self._template}")
        Outbox.open(self._url).close()
        with closing(sqlite3.connect(self._template)) as observer:
            observer.executescript(_PREPARE)
        self._path = self._template
        self._runs = 0

    def connect(self, *_: Any, **options: Any) -> Connection:
        options |= {"check_same_thread": False, "factory": Connection}
        connection: Connection = sqlite3.connect(self._path, **options)
        for pragma in _PRAGMAS.values():
            connection.execute(pragma)
        return connection

    @contextmanager
    def empty_database(self) -> Iterator[sqlite3.Connection]:
        # A file of its own: SQLite keeps one open while some cursor of a dead process is not yet collected.
        self._runs += 1
        self._path = self._template.with_name(f"{self._runs}.db")
        shutil.copyfile(self._template, self._path)
        observer = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        # Faults of a server happen here too.
        servers_faults = mock.patch.object(SQLiteDialect_pysqlite, "is_disconnect", _is_disconnect)
        try:
            with simulated_world(), servers_faults:
                yield observer
        finally:
            self._leave_seats()
            observer.close()
            for path in self._path.parent.glob(f"{self._path.name}*"):
                with suppress(PermissionError):  # Windows keeps a file that is open still
                    path.unlink()


def _is_disconnect(_dialect: object, error: object, _connection: object, _cursor: object) -> bool:
    return isinstance(error, DatabaseFault) and error.breaks_connection
