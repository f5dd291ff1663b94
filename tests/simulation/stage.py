"""Processes that run one at a time, and the clock and the database that they see.

A process is a thread with a database engine of its own. Only the one that holds the baton runs. It stops before and
after every statement, commit and upload, and there the director decides who goes on, so the whole run follows from
what the director decides.
"""

from __future__ import annotations

import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from outbox import clock

from .facts import Operation
from .model import Model

if TYPE_CHECKING:
    from .theatre import Seat

NOON_MS = 1_795_521_600_000

BEFORE_UPLOAD, AFTER_UPLOAD = "before upload", "after upload"
BEFORE_COMMIT, AFTER_COMMIT = "before COMMIT", "after COMMIT"

_really_sleep = time.sleep


class _Here(threading.local):
    """Which process this thread is."""

    process: Process | None = None


_here = _Here()


class ProcessDied(BaseException):
    """The process is no more. Whatever it still tries on its way out, to clean up for example, fails with this too."""


@dataclass(frozen=True)
class Fault:
    """What a statement or a commit fails with. What is not the message only servers know."""

    message: str
    sqlstate: str | None = None
    breaks_connection: bool = False


class Director:
    """Decides what happens. This one lets everything go well."""

    stage: Stage

    def choose(self) -> Process | None:
        """Return who goes on, or None to end the run."""
        raise NotImplementedError

    def stops(self, step: str) -> bool:
        """Whether others may go on at this step."""
        return True

    def database_fault(self, process: Process, step: str) -> Fault | None:
        """Return what the statement about to run fails with, if it is to fail."""
        return None

    def lost_commit(self, process: Process) -> Fault | None:
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
        self.waits_for: Callable[[], bool] | None = None
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

    def wait_until(self, is_free: Callable[[], bool]) -> None:
        """Let others go on until a lock is free."""
        self.waits_for = is_free
        self.pause("waits for the lock")
        self.waits_for = None

    def read_clock(self, *, shared: bool = False) -> int:
        """Return what the clock of this process shows, or the one that all share."""
        reading = self.stage.now_ms + (0 if shared else self.clock_offset_ms)
        # On a server only that one counts, whichever was read.
        self.operation.readings.append(self.stage.now_ms if self.stage.model.shared else reading)
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
        self.doomed = False
        self.waits_for = None


class Stage:
    """Where the processes run, one at a time."""

    def __init__(self, director: Director, model: Model) -> None:
        self.director = director
        self.model = model
        self.processes: list[Process] = []
        self.now_ms = self.furthest_ms = NOON_MS
        self.current: Process | None = None
        self.writer: object = None
        """The connection that holds SQLite's lock."""
        self.ended = 0
        """How many transactions have ended on a server, and gave back their locks."""
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
        # Who waits for a lock can go on once its holder is done, be it by dying.
        alive = [one for one in self.processes if not one.done and not one.idle]
        able: list[Process] = []
        while alive and not able:
            able = [one for one in alive if one.waits_for is None or one.waits_for()]
            self.ended += not able  # all wait for each other, until a server notices
        return able

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
    """Let the package see the clock of the process that runs, and on a server the one that all share."""
    with ExitStack() as patches:
        for module in [module for name, module in sys.modules.items() if name.startswith("outbox")]:
            if vars(module).get("now_ms") is clock.now_ms and module is not clock:
                patches.enter_context(mock.patch.object(module, "now_ms", _read_clock))
            if vars(module).get("monotonic_s") is clock.monotonic_s and module is not clock:
                patches.enter_context(mock.patch.object(module, "monotonic_s", _read_monotonic_clock))
        patches.enter_context(mock.patch.object(time, "sleep", _sleep))
        patches.enter_context(mock.patch.object(random, "uniform", lambda low, high: (low + high) / 2))
        patches.enter_context(mock.patch.object(clock.SharedClock, "now_ms", _read_shared_clock))
        patches.enter_context(mock.patch.object(logging.getLogger("outbox"), "disabled", new=True))
        yield


def _read_clock() -> int:
    return NOON_MS if _here.process is None else _here.process.read_clock()


def _read_monotonic_clock() -> float:
    return (NOON_MS if _here.process is None else _here.process.stage.now_ms) / 1_000


def _read_shared_clock(_: clock.SharedClock) -> int:
    return NOON_MS if _here.process is None else _here.process.read_clock(shared=True)


def _sleep(seconds: float) -> None:
    if _here.process is None:
        _really_sleep(seconds)
    else:
        _here.process.pause("sleeps", seconds)
