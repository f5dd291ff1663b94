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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from sqlalchemy import Engine, create_engine, event

from outbox import Outbox, clock
from outbox.database import open_engine

from .model import Model, Operation, Violation

NOON_MS = 1_795_521_600_000

BEFORE_UPLOAD, AFTER_UPLOAD = "before upload", "after upload"
BEFORE_COMMIT, AFTER_COMMIT = "before COMMIT", "after COMMIT"

# Nobody waits inside SQLite: who would wait for a lock is not chosen to run until it is free.
_PRAGMAS = {"busy_timeout": "PRAGMA busy_timeout = 0", "synchronous": "PRAGMA synchronous = OFF"}


class ProcessDied(BaseException):
    """The process is no more. Whatever it still tries on its way out, to clean up for example, fails with this too."""


class Director:
    """Decides what happens. This one lets everything go well."""

    stage: Stage

    def choose(self) -> Process | None:
        """Return who goes on, or None to end the run."""
        raise NotImplementedError

    def stops(self, step: str) -> bool:
        """Whether others may go on at this step."""
        return True

    def database_fault(self, process: Process, step: str) -> str | None:
        """Return the message that the statement about to run fails with, if it is to fail."""
        return None

    def loses_commit(self, process: Process) -> bool:
        """Whether the commit happens and is reported as failed, as when a connection breaks."""
        return False


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
        self.connections: list[Connection] = []
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
            raise ProcessDied
        self.stage.note(self.name, step, detail)

    def begin(self, kind: str, **details: Any) -> Operation:
        self.operation = Operation(kind, **details)
        return self.operation

    def rest(self) -> None:
        """Do nothing until time has moved on."""
        self.idle = True
        self.pause("rest")

    def _run(self, life: Callable[[Process], None]) -> None:
        self.baton.acquire()
        try:
            while not self.stage.closing:
                with suppress(ProcessDied):
                    life(self)
                    break
                self._bury()
                self.begin("start")
                self.doomed = False
        except BaseException as error:  # noqa: BLE001 - whatever it is, the main thread raises it
            self.stage.fail(error)
        finally:
            self._bury()
            self._seat.process = None
            self.done = True
            self.stage.leave()

    def _bury(self) -> None:
        # The system closes the files of a dead process; SQLite then rolls back what was open.
        self.waits_for_lock = False
        for connection in self.connections:
            connection.close()
        self.connections.clear()
        self.engine.dispose()


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
        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(logging.getLogger("outbox"), "disabled", new=True))
            for reader in _readers_of_the_clock():
                patches.enter_context(mock.patch.object(reader, "now_ms", self.read_clock))
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
        if self.failure is not None:
            raise self.failure

    def read_clock(self) -> int:
        """Return what the clock of the process that runs shows."""
        process = self.current
        assert process is not None
        reading = self.now_ms + process.clock_offset_ms
        process.operation.readings.append(reading)
        self.furthest_ms = max(self.furthest_ms, reading)
        return reading

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
        except BaseException as error:  # noqa: BLE001 - as above
            self.fail(error)
        self.current = following
        return following


def _readers_of_the_clock() -> list[ModuleType]:
    loaded = [module for name, module in sys.modules.items() if name.partition(".")[0] == "outbox"]
    return [module for module in loaded if vars(module).get("now_ms") is clock.now_ms]


class Connection(sqlite3.Connection):
    """A database connection of a process: it stops at every step, may be told to fail, and knows who writes."""

    process: Process | None = None
    _changes = 0

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
        if wrote and process.stage.director.loses_commit(process):
            process.operation.commit_lost = process.operation.troubled = True
            raise sqlite3.OperationalError("the connection broke while it committed")

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
        message = process.stage.director.database_fault(process, step)
        if message is not None:
            process.operation.troubled = True
            process.stage.note(process.name, "fails", message)
            raise sqlite3.OperationalError(message)

    def _take_lock(self, process: Process) -> None:
        process.waits_for_lock = True
        while process.stage.writer not in (None, self):
            process.pause("waits for the lock")
        process.waits_for_lock = False
        process.stage.writer = self

    def _release_lock(self) -> None:
        if self.process is not None and self.process.stage.writer is self:
            self.process.stage.writer = None


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
        event.listen(engine, "do_connect", self._connect)
        with engine.connect():
            pass  # what SQLAlchemy asks at its first connection belongs to no run
        engine.dispose()

    def _connect(
        self, _dialect: object, _record: object, _arguments: object, options: dict[str, Any]
    ) -> Connection:
        options = {**options, "check_same_thread": False, "factory": Connection}
        connection: Connection = sqlite3.connect(self._theatre.path, **options)
        connection.execute(_PRAGMAS["busy_timeout"])
        connection.execute(_PRAGMAS["synchronous"])
        connection.process = self.process
        if self.process is not None:
            self.process.connections.append(connection)
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
            yield observer
        finally:
            for seat in self._seats.values():
                seat.engine.dispose()
            observer.close()
            for path in self.path.parent.glob(f"{self.path.name}*"):
                path.unlink()
