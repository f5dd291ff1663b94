"""A clock that jumps to the next thing that happens, and threads that sleep by it."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable
from itertools import count

NOON_MS = 1_795_521_600_000


class TimeIsUp(BaseException):
    """The run is over; whatever a process was about ends here."""


class VirtualTime:
    """Runs processes, each a thread, one at a time: the one whose sleep ends first goes on.

    The code of a process blocks as it would in real life, so the real flusher can run here as well as a model of it.
    """

    def __init__(self) -> None:
        self.now_ms = NOON_MS
        self._agenda: list[tuple[int, int, Process | Callable[[], None]]] = []
        self._order = count()
        self._until_ms = 0
        self._processes: list[Process] = []
        self._over = threading.Semaphore(0)
        self._is_over = False
        self.failure: BaseException | None = None

    def at(self, time_ms: int, call: Callable[[], None]) -> None:
        """Call at this time, between what the processes do. The call must not sleep."""
        heapq.heappush(self._agenda, (time_ms, next(self._order), call))

    def start(self, name: str, life: Callable[[Process], None]) -> Process:
        process = Process(name, self, life)
        self._processes.append(process)
        self.resume(process, self.now_ms)
        return process

    def resume(self, process: Process, time_ms: int) -> None:
        process.resumes_by = next(self._order)
        heapq.heappush(self._agenda, (time_ms, process.resumes_by, process))

    def run(self, until_ms: int) -> None:
        """Let all processes live until then. Raises what any of them raised."""
        self._until_ms = until_ms
        first = self._next()
        if first is not None:
            first.go()
            self._over.acquire()
        self._is_over = True
        for process in self._processes:
            process.end()
        if self.failure is not None:
            raise self.failure

    def pass_on(self, process: Process) -> None:
        """Let time pass until it is this process again."""
        following = self._next()
        if following is process:
            return
        self._hand_to(following)
        process.stop()
        if self._is_over:
            raise TimeIsUp

    def leave(self) -> None:
        if not self._is_over:
            self._hand_to(self._next())

    def _hand_to(self, process: Process | None) -> None:
        if process is None:
            self._over.release()
        else:
            process.go()

    def _next(self) -> Process | None:
        try:
            while self.failure is None and self._agenda and self._agenda[0][0] <= self._until_ms:
                time_ms, order, what = heapq.heappop(self._agenda)
                self.now_ms = max(self.now_ms, time_ms)
                if not isinstance(what, Process):
                    what()
                elif what.resumes_by == order:
                    return what
        except BaseException as error:
            self.failure = error
        return None


class Process:
    """A thread in virtual time."""

    def __init__(self, name: str, time: VirtualTime, life: Callable[[Process], None]) -> None:
        self._time = time
        self._life = life
        self._baton = threading.Semaphore(0)
        self._is_waiting = False
        self.resumes_by = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def sleep(self, for_ms: int) -> None:
        """Let this much time pass."""
        self._time.resume(self, self._time.now_ms + for_ms)
        self._time.pass_on(self)

    def wait(self, for_ms: int) -> None:
        """Sleep, unless `wake` ends it."""
        self._is_waiting = True
        self.sleep(for_ms)
        self._is_waiting = False

    def wake(self) -> None:
        """End a wait now."""
        if self._is_waiting:
            self._time.resume(self, self._time.now_ms)

    def go(self) -> None:
        self._baton.release()

    def stop(self) -> None:
        self._baton.acquire()

    def end(self) -> None:
        self._baton.release()
        self._thread.join()

    def _run(self) -> None:
        self.stop()
        try:
            if not self._time._is_over:
                self._life(self)
        except TimeIsUp:
            return
        except BaseException as error:
            self._time.failure = error
        self._time.leave()
