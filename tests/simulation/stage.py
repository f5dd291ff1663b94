"""Processes that run one at a time, and the clock and the database that they see.

A process is a thread with a database engine of its own. Only the one that holds the baton runs. It stops before and
after every statement, commit and upload, and there the director decides who goes on, so the whole run follows from
what the director decides.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from sqlalchemy import Engine, create_engine, event

from outbox import Outbox, clock, transaction
from outbox.database import open_engine

from .model import Model, Operation, Violation

NOON_MS = 1_795_521_600_000

BEFORE_UPLOAD, AFTER_UPLOAD = "before upload", "after upload"
BEFORE_COMMIT, AFTER_COMMIT = "before COMMIT", "after COMMIT"

# Nobody waits inside SQLite: who would wait for a lock is not chosen to run until it is free.
_PRAGMAS = {"busy_timeout": "PRAGMA busy_timeout = 0", "synchronous": "PRAGMA synchronous = OFF"}

_really_sleep = time.sleep


class _Here(threading.local):
    """Which process this thread is."""

    process: Process | None = None


_here = _Here()


class ProcessDied(BaseException):
    """The process is no more. Whatever it still tries on its way out, to clean up for example, fails with this too."""


class DatabaseFault(sqlite3.OperationalError):
    """An error of the database; `sqlstate` and `breaks_connection` are what servers add to it."""

    def __init__(self, message: str, *, sqlstate: str | None = None, breaks_connection: bool = False) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.breaks_connection = breaks_connection


class Director:
    """Decides what happens. This one lets everything go well."""

    stage: Stage

    def choose(self) -> Process | None:
        """Return who goes on, or None to end the run."""
        raise NotImplementedError

    def stops(self, step: str) -> bool:
        """Whether others may go on at this step."""
        return True

    def database_fault(self, process: Process, step: str) -> DatabaseFault | None:
        """Return what the statement about to run fails with, if it is to fail."""
        return None

    def lost_commit(self, process: Process) -> DatabaseFault | None:
        """Return what a commit that has just happened is reported with, if it is to look like a failure."""
        return None


class Process:
    """One program that uses the outbox. When it dies, it starts again as another life of the same."""

    def __init__(self, name: str, seat: Seat, life: Callable[[Process], None]) -> None:
        self.name = name
        self.stage: Stage = None  # type: ignore[assignment]  # it enters one before it runs
        self.engine = seat.engine
        self._seat = seat
        self.at = "start"
        self.doomed = self.idle = self.done = False
        self.waits_for_lock = False
        self.clock_offset_ms = 0
        self.operation = Operation("start")
        self.baton = threading.Lock()
        self.baton.acquire()
        self.thread = threading.Thread(target=self._run, args=(life,), name=name, daemon=True)
        seat.process = self

    def pause(self, step: str, detail: object = "") -> None:
        """Let the director decide who goes on; come back when it is this process again."""
        if self.doomed:
            raise ProcessDied
        self.at = step
        if self.stage.director.stops(step):
            self.stage.pass_on(self)
        if self.doomed:
            self.stage.note(self.name, "dies", step)
            if not self.stage.closing:
                self.stage.model.seen[f"death {step}"] += 1
            raise ProcessDied
        self.stage.note(self.name, step, detail)

    def read_clock(self) -> int:
        """Return what the clock of this process shows."""
        reading = self.stage.now_ms + self.clock_offset_ms
        self.operation.readings.append(reading)
        self.stage.furthest_ms = max(self.stage.furthest_ms, reading)
        return reading

    def begin(self, kind: str, **details: Any) -> Operation:
        self.operation = Operation(kind, **details)
        return self.operation

    def leave_seat(self) -> None:
        self._seat.process = None

    def rest(self) -> None:
        """Do nothing until time has moved on."""
        self.idle = True
        self.pause("rest")

    def _run(self, life: Callable[[Process], None]) -> None:
        _here.process = self
        self.baton.acquire()
        try:
            while not self.stage.closing:
                with suppress(ProcessDied):
                    life(self)
                    break
                if not self.stage.closing:
                    self._rise_again()
        except BaseException as error:
            self.stage.fail(error)
        finally:
            self.done = True
            self.stage.leave()

    def _rise_again(self) -> None:
        # The system closes the files of a dead process; SQLite then rolls back what was open.
        self._seat.close_connections()
        self.begin("start")
        self.doomed = self.waits_for_lock = False


class Stage:
    """Where the processes run, one at a time."""

    def __init__(self, director: Director, model: Model) -> None:
        self.director = director
        self.model = model
        self.processes: list[Process] = []
        self.now_ms = self.furthest_ms = NOON_MS
        self.current: Process | None = None
        self.writer: Connection | None = None
        self.closing = False
        self.failure: BaseException | None = None
        self.ticks = 0
        self.trace: list[str] = []
        self._over = threading.Lock()
        self._over.acquire()
        director.stage = self

    def play(self, processes: Sequence[Process]) -> None:
        """Run until the director ends it; raise what went wrong."""
        self.processes = list(processes)
        for process in processes:
            process.stage = self
        for process in processes:
            process.thread.start()
        following = self._choose()
        if following is not None:
            following.baton.release()
            self._over.acquire()
        self.closing = True
        for process in processes:
            process.doomed = True
            if not process.done:
                process.baton.release()
            process.thread.join()
            process.leave_seat()
        if self.failure is not None:
            raise self.failure

    def runnable(self) -> list[Process]:
        # Who waits for the lock can go on once the writer is done, be it by dying.
        free = self.writer is None
        return [
            one for one in self.processes if not one.done and not one.idle and (free or not one.waits_for_lock)
        ]

    def wake(self) -> None:
        for process in self.processes:
            process.idle = False

    def note(self, who: str, what: str, detail: object = "") -> None:
        self.trace.append(f"{self.ticks} {who}: {what} {detail}".rstrip())

    def fail(self, error: BaseException) -> None:
        self.failure = self.failure or error

    def pass_on(self, process: Process) -> None:
        """Hand the baton to whom the director chooses; return when `process` has it again."""
        following = self._choose()
        if following is not process:
            (self._over if following is None else following.baton).release()
            process.baton.acquire()
        self.current = process

    def leave(self) -> None:
        """Hand the baton on for good."""
        if not self.closing:
            following = self._choose()
            (self._over if following is None else following.baton).release()

    def _choose(self) -> Process | None:
        following = None
        try:
            following = None if self.failure else self.director.choose()
        except BaseException as error:
            self.fail(error)
        self.current = following
        return following


@contextmanager
def simulated_world() -> Iterator[None]:
    """Let the package see the clock of the process that runs, and let it take faults of SQLite for a server's."""
    with ExitStack() as patches:
        for module in [module for name, module in sys.modules.items() if name.startswith("outbox")]:
            if vars(module).get("now_ms") is clock.now_ms and module is not clock:
                patches.enter_context(mock.patch.object(module, "now_ms", _read_clock))
        patches.enter_context(mock.patch.object(time, "sleep", _sleep))
        patches.enter_context(mock.patch.object(transaction, "is_disconnect", _is_disconnect))
        patches.enter_context(mock.patch.object(logging.getLogger("outbox"), "disabled", new=True))
        yield


def _read_clock() -> int:
    return NOON_MS if _here.process is None else _here.process.read_clock()


def _sleep(seconds: float) -> None:
    if _here.process is None:
        _really_sleep(seconds)
    else:
        _here.process.pause("sleeps", seconds)


def _is_disconnect(_engine: object, _connection: object, error: object) -> bool:
    return isinstance(error, DatabaseFault) and error.breaks_connection


class Connection(sqlite3.Connection):
    """A database connection of a process: it stops at every step, may be told to fail, and knows who writes."""

    seat: Seat | None = None
    _changes = 0

    @property
    def process(self) -> Process | None:
        return self.seat.process if self.seat else None

    def cursor(self, factory: type[sqlite3.Cursor] | None = None) -> sqlite3.Cursor:
        return super().cursor(Cursor)

    def perform(self, sql: str, call: Callable[[str, Any], Any], parameters: Any) -> Any:
        words = sql.split(None, 2)
        if words[0] == "PRAGMA":
            return call(_PRAGMAS.get(words[1], sql), parameters)
        process = self.process
        if process is None:
            return call(sql, parameters)
        statement = " ".join(words[:2]) if words[0] == "BEGIN" else words[0]
        process.pause(f"before {statement}")
        self._fail_if_told(process, statement)
        writes = statement in ("BEGIN IMMEDIATE", "INSERT", "UPDATE", "DELETE")
        if writes:
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
        process.pause(BEFORE_COMMIT)
        self._fail_if_told(process, "COMMIT")
        wrote = self.total_changes != self._changes
        self._changes = self.total_changes
        super().commit()
        self._release_lock()
        if wrote:
            try:
                process.stage.model.observe(process, process.stage)
            except Violation as violation:
                process.stage.fail(violation)
        process.pause(AFTER_COMMIT)
        fault = process.stage.director.lost_commit(process) if wrote else None
        if fault is not None:
            process.operation.commit_lost = True
            self._fail(process, fault)

    def rollback(self) -> None:
        super().rollback()
        self._changes = self.total_changes
        self._release_lock()

    def close(self) -> None:
        with suppress(sqlite3.ProgrammingError):  # it is closed already
            super().rollback()
        super().close()
        self._release_lock()

    def _fail_if_told(self, process: Process, step: str) -> None:
        fault = process.stage.director.database_fault(process, step)
        if fault is not None:
            self._fail(process, fault)

    def _fail(self, process: Process, fault: DatabaseFault) -> None:
        process.operation.troubled = True
        process.stage.note(process.name, "fails", fault)
        raise fault

    def _take_lock(self, process: Process) -> None:
        process.waits_for_lock = True
        while process.stage.writer not in (None, self):
            process.pause("waits for the lock")
        process.waits_for_lock = False
        process.stage.writer = self

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


class Seat:
    """An engine that outlives the runs, for its statements are compiled once only."""

    def __init__(self, theatre: Theatre, engine: Engine) -> None:
        self._theatre = theatre
        self.engine = engine
        self.process: Process | None = None
        self._connections: list[Connection] = []
        event.listen(engine, "do_connect", self._connect)
        with engine.connect():
            pass  # what SQLAlchemy asks at its first connection belongs to no run
        self.close_connections()

    def close_connections(self) -> None:
        if self._connections:
            for connection in self._connections:
                connection.close()
            self._connections.clear()
            self.engine.dispose()

    def _connect(
        self, _dialect: object, _record: object, _arguments: object, options: dict[str, Any]
    ) -> Connection:
        options = {**options, "check_same_thread": False, "factory": Connection}
        connection: Connection = sqlite3.connect(self._theatre.path, **options)
        connection.execute(_PRAGMAS["busy_timeout"])
        connection.execute(_PRAGMAS["synchronous"])
        connection.seat = self
        self._connections.append(connection)
        return connection


class Theatre:
    """Where the database files are, and the seats at them, used again and again."""

    def __init__(self, folder: Path) -> None:
        self._template = folder / "template.db"
        Outbox.open(f"sqlite:///{self._template}").close()
        self.path = self._template
        self._seats: dict[str, Seat] = {}
        self._runs = 0

    def seat(self, name: str, *, of_host: bool = False) -> Seat:
        """Return the seat of that name; a host's engine has SQLAlchemy's settings, not ours."""
        if name not in self._seats:
            url = f"sqlite:///{self._template}"
            self._seats[name] = Seat(self, create_engine(url) if of_host else open_engine(url))
        return self._seats[name]

    @contextmanager
    def empty_database(self) -> Iterator[sqlite3.Connection]:
        """Put an empty database in place; yield a connection that watches it."""
        # A file of its own: SQLite keeps one open while some cursor of a dead process is not yet collected.
        self._runs += 1
        self.path = self._template.with_name(f"{self._runs}.db")
        shutil.copyfile(self._template, self.path)
        observer = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            with simulated_world():
                yield observer
        finally:
            for seat in self._seats.values():
                seat.close_connections()
            observer.close()
            for path in self.path.parent.glob(f"{self.path.name}*"):
                with suppress(PermissionError):  # Windows keeps a file that is open still
                    path.unlink()
