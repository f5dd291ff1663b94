"""Threads in the background that deliver what is enqueued."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import TYPE_CHECKING

from outbox import capture
from outbox.clock import now_ms
from outbox.failures import ConfigurationError, OutboxError, without_answer
from outbox.flusher import FlushReport, UploadClient, flush
from outbox.outbox import Outbox
from outbox.policy import Verdict, jitter
from outbox.wakeup import Wakeup

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger("outbox")

_SHORTEST_POLL_MS = 100
_SHORTEST_PAUSE_MS = 1_000
_LONGEST_PAUSE_MS = 60_000
# So much of the time that a stop may take is kept for giving back what is held then.
_RELEASE_SHARE = 0.2

_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


def wait_ms(report: FlushReport | None, rounds: int, *, poll_interval_ms: int, now_ms: int) -> int:
    """Return how long to wait after a look at the queue, in ms.

    So many `rounds` before it came out the same way; None stands for one that failed. Nothing due: 100 ms,
    doubled up to the poll interval. A failure, or a verdict that holds for all: one second, doubled up to a
    minute, and up to a quarter more, decided by the time. A pause that all hosts share: until it is over, but no
    longer than the poll interval, for somebody may end it.
    """
    doubled = 1 << min(rounds, 20)
    if report is not None and report.paused_until_ms is not None:
        return min(max(report.paused_until_ms - now_ms, _SHORTEST_POLL_MS), poll_interval_ms)
    if report is None or report.verdict is not None:
        pause_ms = min(_SHORTEST_PAUSE_MS * doubled, _LONGEST_PAUSE_MS)
        return pause_ms + jitter(pause_ms, now_ms)
    return 0 if report.claimed else min(_SHORTEST_POLL_MS * doubled, poll_interval_ms)


class Worker:
    """Delivers events in the background, in threads of this process.

    It wakes at once when this `Outbox` enqueues, and on PostgreSQL when anybody does; elsewhere it looks at least
    every `poll_interval_ms`. `concurrency` is the number of batches that may be under way at once.

    The threads are daemons: they never keep the interpreter from ending, and what they held then is delivered by
    others when its lease has run out. `stop`, or the end of a `with` block, gives it back at once. No exception
    ends them. They do not survive a fork, but in the child the worker starts anew as soon as that enqueues.
    """

    def __init__(
        self, outbox: Outbox, client: UploadClient, *, concurrency: int = 1, poll_interval_ms: int = 5_000
    ) -> None:
        for name, value in (("concurrency", concurrency), ("poll_interval_ms", poll_interval_ms)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"{name} is {value!r}, expected a whole number above 0")
        self._outbox = outbox
        self._client = client
        self._concurrency = concurrency
        self._poll_interval_ms = poll_interval_ms
        self._lock = threading.Lock()
        self._run: _Run | None = None
        self._starts_when_woken = False
        _workers.add(self)

    def start(self) -> None:
        """Start the threads, unless they run already."""
        self._outbox.wakers.add(self._wake)
        with self._lock:
            self._starts_when_woken = False
            if self._run is None:
                self._run = _Run(self._outbox, self._client, self._concurrency, self._poll_interval_ms)

    def stop(self, timeout: float = 5.0) -> None:
        """End the threads; return within `timeout` seconds.

        What is being sent is finished, if that takes at most four fifths of the time; else it is given back, for
        others or a later start to deliver.
        """
        self._outbox.wakers.discard(self._wake)
        with self._lock:
            self._starts_when_woken = False
            run, self._run = self._run, None
        if run is not None:
            run.stop(timeout)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wake(self) -> None:
        if self._starts_when_woken:
            try:
                self.start()
            except RuntimeError as error:  # no thread can be started any more when the interpreter ends
                log.warning(
                    "the worker can't start in this process, events are left to others: %s",
                    error,
                    extra={"event_name": "outbox.worker_not_started"},
                )
        run = self._run
        if run is not None:
            run.wakeup.ring()

    def _begin_child(self) -> None:
        self._lock = threading.Lock()
        run, self._run = self._run, None
        if run is not None:
            run.wakeup.leave_to_parent()
            self._starts_when_woken = True


class _StoppedError(BaseException):
    """A claim came when the worker was to end."""


class _Run:
    """The threads of a worker, from a start to a stop.

    One at a time has the turn: it sleeps and looks. With something to send it leaves the turn to the next one, but
    while nothing can be delivered it tries alone.
    """

    # Bound in the class: tools that freeze time replace the names in modules.
    _clock = staticmethod(time.monotonic)

    def __init__(self, outbox: Outbox, client: UploadClient, concurrency: int, poll_interval_ms: int) -> None:
        self._store = outbox._store  # noqa: SLF001 - a second one would read the server's clock a little differently
        self._policy = outbox.policy
        self._hooks = outbox.hooks
        self._client = client
        self._poll_interval_ms = poll_interval_ms
        self.wakeup = Wakeup(outbox.engine)
        self._stopping = threading.Event()
        self._turn = threading.Lock()
        # What releases the claims under way, by thread.
        self._held: dict[int, Callable[[], None]] = {}
        self._next_look = self._not_before = self._clock()
        self._idle_rounds = self._failed_rounds = 0
        self._trouble: object = None
        self._threads: list[threading.Thread] = []
        self._left = concurrency
        try:
            for _ in range(concurrency):
                thread = threading.Thread(target=self._work, name="outbox-worker", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError:
            self._stopping.set()
            self.wakeup.ring()
            self._leave(concurrency - len(self._threads))
            raise

    def stop(self, timeout: float) -> None:
        end = self._clock() + timeout
        self._stopping.set()
        self.wakeup.ring()
        for thread in self._threads:
            self._join(thread, end - timeout * _RELEASE_SHARE)
        if self._held:
            # In a thread, for the database may take longer than there is time.
            releasing = threading.Thread(target=self._release, name="outbox-release", daemon=True)
            with suppress(RuntimeError):  # at the end of the interpreter the leases have to run out
                releasing.start()
                self._join(releasing, end)

    def _join(self, thread: threading.Thread, end: float) -> None:
        thread.join(max(0.0, end - self._clock()))

    def _release(self) -> None:
        for let_go in tuple(self._held.values()):
            let_go()

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                self._take_turn()
            except _StoppedError:
                break
            except BaseException as error:  # noqa: BLE001 - SystemExit, too, would end the thread without a word
                self._say_trouble(type(error), error, with_traceback=not isinstance(error, OutboxError))
                self._plan(None, now_ms())
        self._leave(1)

    def _leave(self, threads: int) -> None:
        with self._turn:
            self._left -= threads
            if self._left == 0:
                self.wakeup.close()

    def _take_turn(self) -> None:
        with ExitStack() as turn:
            turn.enter_context(self._turn)
            self._wait()
            if not self._stopping.is_set():
                self._look(turn)

    def _wait(self) -> None:
        self._pause()
        if not self._stopping.is_set() and self.wakeup.sleep(self._next_look - self._clock()):
            # By this host's reading of the server's clock the event may be due only in a few milliseconds.
            self._idle_rounds = 0
        self._pause()  # another thread may have come upon trouble

    def _pause(self) -> None:
        self._stopping.wait(max(0.0, self._not_before - self._clock()))

    def _look(self, turn: ExitStack) -> None:
        if capture.is_off():
            self._say_trouble(capture.PAUSED, capture.PAUSED)
            self._plan(FlushReport(), now_ms())
            return
        if not self._client.logged_in:
            self._say_trouble(Verdict.AUTH_BLOCKED, "not logged in, the client has no token")
            self._plan(FlushReport(), now_ms())
            return
        try:
            report = flush(
                self._store,
                self._policy,
                self._client,
                lambda let_go: self._hold(let_go, turn),
                hooks=self._hooks,
            )
        finally:
            self._held.pop(threading.get_ident(), None)
        if report.paused_until_ms is not None:
            self._say_trouble(Verdict.TRANSIENT, without_answer(report.failure))
        elif report.verdict is not None:
            is_login = report.verdict is Verdict.AUTH_BLOCKED
            kind = Verdict.AUTH_BLOCKED if is_login else Verdict.TRANSIENT
            self._say_trouble(kind, without_answer(report.failure))
        # After a failed upload only one that succeeds shows that the server is back.
        elif report.sent or isinstance(self._trouble, type) or self._trouble == capture.PAUSED:
            self._say_recovery()
        self._plan(report, self._store.now_ms())

    def _hold(self, let_go: Callable[[], None], turn: ExitStack) -> None:
        self._held[threading.get_ident()] = let_go
        if self._stopping.is_set():
            raise _StoppedError
        if self._trouble is None:
            self._next_look = self._clock()
            turn.close()

    def _plan(self, report: FlushReport | None, now_ms: int) -> None:
        is_paused = report is not None and report.paused_until_ms is not None
        has_failed = report is None or report.verdict is not None or is_paused
        rounds = self._failed_rounds if has_failed else self._idle_rounds
        pause_ms = wait_ms(report, rounds, poll_interval_ms=self._poll_interval_ms, now_ms=now_ms)
        self._next_look = self._clock() + pause_ms / 1_000
        if has_failed:
            self._not_before = self._next_look
            self._failed_rounds += 1
            return
        self._failed_rounds = 0
        self._idle_rounds += 1
        if report is not None and report.claimed:
            self._idle_rounds = 0

    def _say_trouble(self, kind: object, why: object, *, with_traceback: bool = False) -> None:
        if kind != self._trouble:
            self._trouble = kind
            log.warning(
                "can't deliver: %s", why, exc_info=with_traceback, extra={"event_name": "outbox.cannot_deliver"}
            )

    def _say_recovery(self) -> None:
        if self._trouble is not None:
            self._trouble = None
            # A warning, too: who reads of the trouble has to read that it is over.
            log.warning("delivering again", extra={"event_name": "outbox.delivering_again"})


def _begin_child() -> None:
    for worker in list(_workers):
        worker._begin_child()  # noqa: SLF001 - our own


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_begin_child)
