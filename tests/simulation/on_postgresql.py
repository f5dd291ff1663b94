"""The simulation on a PostgreSQL server.

Transactions are interleaved at every statement, for real: each process has a connection of its own, and only one of
them runs a statement at a time. One that meets a lock is undone and tried again as soon as some other transaction has
ended. So what a statement does that waits *inside* the server is not simulated: there it goes on with the newest
version of the row it waited for, here it begins anew. When all wait for each other, one of them is given up as the
server would do it. A savepoint is set before what may have to wait, else the whole transaction would be undone.

Faults are real too: the server raises them itself, or the connection is closed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NoReturn
from uuid import uuid4

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy import create_engine, make_url

from outbox import Outbox

from .stage import Fault, Process, simulated_world
from .theatre import Stopping, Theatre

_DISK_FULL, _DEADLOCK = "53100", "40P01"

# A lock is only waited for while its holder stands still, so the shortest wait tells as much as a long one.
_SETTINGS = "-c lock_timeout=1 -c synchronous_commit=off"

# Ids leave gaps here and are committed in any order, so what was ever inserted is written down.
_PREPARE = """
    CREATE TABLE born (id BIGINT PRIMARY KEY);
    CREATE FUNCTION note_birth() RETURNS trigger LANGUAGE plpgsql
        AS 'BEGIN INSERT INTO born VALUES (NEW.id); RETURN NULL; END';
    CREATE TRIGGER born AFTER INSERT ON observation_events FOR EACH ROW EXECUTE FUNCTION note_birth();
    ALTER TABLE observation_events SET (autovacuum_enabled = off);
"""
_EMPTY = """
    TRUNCATE observation_events, observation_events_ledger, observation_destinations, born RESTART IDENTITY
"""


class Connection(Stopping, psycopg.Connection[Any]):
    """It tries what meets a lock again later."""

    _wrote = False

    def perform(self, sql: str, call: Callable[[], Any]) -> Any:
        process = self.process
        if process is None:
            return call()
        first = sql.split(None, 1)[0].upper()
        statement = {"WITH": "UPDATE", ";": "ping"}.get(first, first)
        process.pause(f"before {statement}")
        self.fail_if_told(process, statement)
        may_wait = statement not in ("SELECT", "ping") or "FOR UPDATE" in sql
        result = self._run(process, call) if may_wait else self._try(process, call)
        self._wrote |= statement in ("INSERT", "UPDATE", "DELETE") and result.rowcount > 0
        self.fail_if_told(process, f"the end of {statement}")
        process.pause(f"after {statement}", result.rowcount)
        return result

    def commit(self) -> None:
        process = self.process
        if process is None or self.info.transaction_status == TransactionStatus.IDLE:
            super().commit()
            return
        self.commit_in_steps(process, self._commit, wrote=self._wrote)

    def rollback(self) -> None:
        super().rollback()
        self._end()

    def close(self) -> None:
        self._undo()
        super().close()

    def fail(self, fault: Fault) -> NoReturn:
        if fault.breaks_connection:
            self._undo()
            self.pgconn.finish()
            raise psycopg.OperationalError(fault.message)
        words = f"RAISE EXCEPTION USING ERRCODE = '{fault.sqlstate or _DISK_FULL}', MESSAGE = '{fault.message}'"
        try:
            psycopg.Cursor(self).execute(f"DO $$ BEGIN {words}; END $$")  # type: ignore[arg-type]  # no literal
        finally:
            self._end()
        raise AssertionError("the server raised nothing")

    def _run(self, process: Process, call: Callable[[], Any]) -> Any:
        while True:
            goes_on = self.info.transaction_status == TransactionStatus.INTRANS
            if goes_on:
                self.pgconn.exec_(b"SAVEPOINT before_step")
            try:
                return self._try(process, call)
            except psycopg.errors.LockNotAvailable:
                if goes_on:
                    self.pgconn.exec_(b"ROLLBACK TO SAVEPOINT before_step")
                else:
                    super().rollback()
            stage = process.stage
            before = stage.ended
            if process.wait_until(lambda: stage.ended != before) is False:
                stage.model.seen["deadlock"] += 1
                self._note_and_fail(process, Fault("deadlock detected", sqlstate=_DEADLOCK))

    def _try(self, process: Process, call: Callable[[], Any]) -> Any:
        if self.info.transaction_status == TransactionStatus.IDLE:
            process.stage.model.transaction_begins(process.operation)
        return call()

    def _commit(self) -> None:
        super().commit()
        self._end()

    def _undo(self) -> None:
        # At once, or what this held would be free only when the server notices that the client is gone.
        if not self.closed:
            self.pgconn.exec_(b"ROLLBACK")
        self._end()

    def _end(self) -> None:
        self._wrote = False
        if self.process is not None:
            self.process.stage.ended += 1


class Cursor(psycopg.Cursor[Any]):
    def execute(self, query: Any, *arguments: Any, **options: Any) -> Any:
        run = super().execute
        return self.connection.perform(query, lambda: run(query, *arguments, **options))

    def executemany(self, query: Any, *arguments: Any, **options: Any) -> Any:
        run = super().executemany

        def call() -> Cursor:
            run(query, *arguments, **options)
            return self

        self.connection.perform(query, call)


class PostgreSQLTheatre(Theatre):
    """Has a database of its own on a server, that of an administrator's URL."""

    is_shared = True

    def __init__(self, server: str) -> None:
        url = make_url(server).set(drivername="postgresql+psycopg", database=f"simulation_{os.getpid()}_{uuid4().hex[:8]}")
        self._name = url.database
        self._admin = create_engine(make_url(server).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
        super().__init__(url.render_as_string(hide_password=False))
        self._run(f"CREATE DATABASE {self._name}")
        Outbox.open(self._url).close()
        with closing(self._observe()) as observer:
            observer.execute(_PREPARE)

    def close(self) -> None:
        self._leave_seats()
        self._run(f"DROP DATABASE {self._name} WITH (FORCE)")
        self._admin.dispose()

    def connect(self, *arguments: Any, **options: Any) -> Connection:
        return Connection.connect(*arguments, **options, options=_SETTINGS, cursor_factory=Cursor)

    @contextmanager
    def empty_database(self) -> Iterator[psycopg.Connection[Any]]:
        with closing(self._observe()) as observer:
            observer.execute(_EMPTY)
            try:
                with simulated_world():
                    yield observer
            finally:
                self._leave_seats()

    def _observe(self) -> psycopg.Connection[Any]:
        url = make_url(self._url).set(drivername="postgresql").render_as_string(hide_password=False)
        return psycopg.connect(url, autocommit=True)

    def _run(self, statement: str) -> None:
        with self._admin.connect() as connection:
            connection.exec_driver_sql(statement)
