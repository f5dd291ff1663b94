"""The simulation on a PostgreSQL server.

Transactions are interleaved at every statement, for real: each process has a connection of its own, and only one of
them is given a statement at a time. One that has to wait for a lock does so inside the server, and others go on; it is
chosen again as soon as the server has answered. Before anybody goes on after the end of a transaction, all whom it
held up have either been answered or wait again. What is not interleaved is the inside of a statement: between its
snapshot and its locks nobody commits, unless it waits.

Faults are real too: the server raises them itself, or the connection is closed.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from math import inf
from typing import Any, NoReturn
from uuid import uuid4

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy import create_engine, make_url

from outbox import Outbox
from outbox.storage import pings

from .stage import Fault, ProcessDied, simulated_world
from .theatre import Stopping, Theatre

_DISK_FULL = "53100"

# Who closes a circle of transactions that wait for each other is then always the one that is given up, for the others
# have looked for one before.
_SETTINGS = "-c deadlock_timeout=1ms -c synchronous_commit=off"
_PATIENCE_MS = 5

_PREPARE = """
    CREATE TABLE born (id BIGINT PRIMARY KEY, destination TEXT NOT NULL);
    CREATE FUNCTION note_birth() RETURNS trigger LANGUAGE plpgsql
        AS 'BEGIN INSERT INTO born VALUES (NEW.id, NEW.destination); RETURN NULL; END';
    CREATE TRIGGER born AFTER INSERT ON observation_events FOR EACH ROW EXECUTE FUNCTION note_birth();
    ALTER TABLE observation_events SET (autovacuum_enabled = off);
    ALTER TABLE observation_events_ledger SET (autovacuum_enabled = off);
    ALTER TABLE observation_destinations_ledger SET (autovacuum_enabled = off);
    ALTER TABLE observation_destinations SET (autovacuum_enabled = off);
"""
_EMPTY = """
    TRUNCATE observation_events, observation_events_ledger, observation_destinations_ledger,
        observation_destinations, observation_holds, observation_tries, born RESTART IDENTITY
"""


class Connection(Stopping, psycopg.Connection[Any]):
    """It lets others go on while it waits for a lock."""

    theatre: PostgreSQLTheatre
    _wrote = False
    _looked_at = -1

    def perform(self, sql: str, call: Callable[[], Any]) -> Any:
        process = self.process
        if process is None:
            return call()
        first = sql.split(None, 1)[0].upper()
        statement = {"WITH": "UPDATE"}.get(first, first)
        process.pause(f"before {statement}")
        self.fail_if_told(process, statement)
        is_first = self.info.transaction_status == TransactionStatus.IDLE
        commits_by_itself = is_first and self.autocommit
        if is_first:
            process.stage.model.transaction_begins(process.operation)
        if commits_by_itself:  # its commit is a step of its own here, which shows the model what it did
            self.pgconn.exec_(b"BEGIN")
        result = call()
        self._wrote |= statement in ("INSERT", "UPDATE", "DELETE") and result.rowcount > 0
        if commits_by_itself:
            self.commit_in_steps(process, self._commit, wrote=self._wrote)
            return result
        self.fail_if_told(process, f"the end of {statement}")
        process.pause(f"after {statement}", result.rowcount)
        return result

    def wait(self, gen: Any, interval: float = 0.1) -> Any:
        process = self.process
        if process is None:
            return super().wait(gen, interval)
        try:
            wanted = next(gen)
            while True:
                while not (ready := self._poll(wanted)):
                    if self._waits_for_lock():
                        process.stage.model.seen["wait for a lock"] += 1
                        process.wait_until(self._is_answered)
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value
        except ProcessDied:
            self.close()
            raise

    def commit(self) -> None:
        process = self.process
        if process is None or self.info.transaction_status == TransactionStatus.IDLE:
            super().commit()
            return
        self.commit_in_steps(process, self._commit, wrote=self._wrote)

    def rollback(self) -> None:
        if not self.closed:
            super().rollback()
        self._end()

    def close(self) -> None:
        # The server has to know at once: else what this held would be free some time later.
        if not self.closed:
            if self.info.transaction_status == TransactionStatus.ACTIVE:
                self.theatre.ask("SELECT pg_terminate_backend(%s, 10000)", self.info.backend_pid)
            else:
                self.pgconn.exec_(b"ROLLBACK")
            self.pgconn.finish()
        super().close()
        self._end()

    def fail(self, fault: Fault) -> NoReturn:
        if fault.breaks_connection:
            self.close()
            raise psycopg.OperationalError(fault.message)
        words = f"RAISE EXCEPTION USING ERRCODE = '{fault.sqlstate or _DISK_FULL}', MESSAGE = '{fault.message}'"
        try:
            psycopg.Cursor(self).execute(f"DO $$ BEGIN {words}; END $$")  # type: ignore[arg-type]  # no literal
        finally:
            self._end()
        raise AssertionError("the server raised nothing")

    def _poll(self, wanted: int) -> int:
        """Return for what of the wanted, 1 to read and 2 to write, the connection is ready."""
        poll = select.poll()
        poll.register(self.pgconn.socket, (wanted & 1 and select.POLLIN) | (wanted & 2 and select.POLLOUT))
        found = sum(event for _, event in poll.poll(_PATIENCE_MS))
        return (found & ~select.POLLOUT and 1) | (found & select.POLLOUT and 2)

    def _waits_for_lock(self) -> bool:
        return bool(self.theatre.ask("SELECT pg_blocking_pids(%s)", self.info.backend_pid))

    def _is_answered(self) -> bool:
        if self.process is None or self.process.stage.ended == self._looked_at:
            return False
        while not self._poll(1):
            if self._waits_for_lock():
                self._looked_at = self.process.stage.ended
                return False
        return True

    def _commit(self) -> None:
        super().commit()
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
        url = make_url(server).set(
            drivername="postgresql+psycopg", database=f"simulation_{os.getpid()}_{uuid4().hex[:8]}"
        )
        self._name = url.database
        self._admin = create_engine(
            make_url(server).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT"
        )
        super().__init__(url.render_as_string(hide_password=False))
        self._run(f"CREATE DATABASE {self._name}")
        Outbox.open(self._url).close()
        with closing(self._observe()) as observer:
            observer.execute(_PREPARE)
        self._watcher = self._observe()
        # Whether a connection is asked if it is alive depends on real time.
        self._trusted_s, pings._TRUSTED_S = pings._TRUSTED_S, inf

    def close(self) -> None:
        pings._TRUSTED_S = self._trusted_s
        self._leave_seats()
        self._watcher.close()
        self._run(f"DROP DATABASE {self._name} WITH (FORCE)")
        self._admin.dispose()

    def connect(self, *arguments: Any, **options: Any) -> Connection:
        connection = Connection.connect(*arguments, **options, options=_SETTINGS, cursor_factory=Cursor)
        connection.theatre = self
        return connection

    def ask(self, question: str, backend: int) -> Any:
        """Ask the server something about a connection."""
        return self._watcher.execute(question, [backend]).fetchone()[0]

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
