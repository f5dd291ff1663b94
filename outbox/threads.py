"""The threads of a worker: they take turns to wait for due events, and deliver what they claim."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from operator import attrgetter
from pathlib import Path

from outbox.clock import monotonic_s, now_ms
from outbox.failures import ConfigurationError, OutboxError
from outbox.flusher import flush
from outbox.lanes import Lane
from outbox.outbox import Outbox
from outbox.records import FlushReport, UploadClient
from outbox.waits import Look
from outbox.wakeup import Wakeup

log = logging.getLogger("outbox")

# This share of a stop's timeout is reserved for releasing claims.
_RELEASE_SHARE = 0.2
# A waiting worker gives a sign of life this often, and touches the heartbeat file no more often.
_BEAT_S = 10.0
# How long a thread waits for the turn of its lane. Another thread has it while it claims, or while delivery fails.
_CLAIM_S = 0.1


class _StoppedError(BaseException):
    """The thread claimed rows although the worker is stopping."""


class Threads:
    """The threads of a worker, from a start to a stop, and the only owner of what they share.

    There is one lane for each destination. Two locks give turns. The holder of `_turn` waits for a lane in which
    there may be work, takes the turn of this lane, and releases `_turn`. The holder of a lane's turn claims a
    batch, then releases the turn so that another thread can claim. While delivery fails, it keeps the turn, so
    only one thread tries. A thread stays in its lane while there is work.

    There are at least as many threads as lanes, and no lane gets a further thread that another lane may need. So
    however long the uploads to one destination take, each other one has a thread.

    An exception may occur anywhere in a thread, because another thread can raise one in it. It is logged, and the
    thread continues.
    """

    def __init__(
        self,
        outbox: Outbox,
        clients: Mapping[str, UploadClient],
        concurrency: int,
        poll_interval_ms: int,
        heartbeat: Path | None,
    ) -> None:
        self._store = outbox.store  # a second store would estimate the server's clock differently
        self._policy = outbox.policy
        self._hooks = outbox.hooks
        self._lanes = [Lane(to, client, poll_interval_ms) for to, client in clients.items()]
        self._size = max(concurrency, len(self._lanes))
        self._heartbeat = heartbeat
        self._touch_at = self._seen_at = monotonic_s()
        self._beat(is_first=True)
        self.wakeup = Wakeup(outbox.engine)
        self._stopping = threading.Event()
        # An RLock knows its owner, so after any exception a thread can tell whether it still holds the turn.
        self._turn = threading.RLock()
        # By thread id: the function that releases the claim that the thread holds.
        self._held: dict[int, Callable[[], None]] = {}
        # By thread id: the lane in which the thread looks or delivers.
        self._working: dict[int, Lane] = {}
        self._threads: list[threading.Thread] = []
        self._left: set[int | None] = set()
        try:
            for _ in range(self._size):
                thread = threading.Thread(target=self._work, name="outbox-worker", daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.retire()
            raise

    def is_alive(self) -> bool:
        """Return whether all threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def silent_ms(self) -> int:
        """Return the time since any thread last gave a sign of life, in ms."""
        return int((monotonic_s() - self._seen_at) * 1_000)

    def retire(self) -> None:
        """Tell the threads to end after their current work. Does not wait."""
        self._stopping.set()
        self.wakeup.ring()
        self._close_if_all_left()

    def stop(self, timeout: float) -> None:
        """End the threads, and release what they still hold, within `timeout` seconds."""
        end = monotonic_s() + timeout
        self.retire()
        for thread in self._threads:
            self._join(thread, end - timeout * _RELEASE_SHARE)
        if self._held:
            # In a thread, because the database may need more time than is left.
            releasing = threading.Thread(target=self._release, name="outbox-release", daemon=True)
            # No thread can start while the interpreter exits; then the leases run out.
            with suppress(RuntimeError):
                releasing.start()
                self._join(releasing, end)
        self._close_if_all_left()

    def _join(self, thread: threading.Thread, end: float) -> None:
        thread.join(max(0.0, end - monotonic_s()))

    def _release(self) -> None:
        for let_go in tuple(self._held.values()):
            let_go()

    def _close_if_all_left(self) -> None:
        if all(thread.ident in self._left or not thread.is_alive() for thread in self._threads):
            self.wakeup.close()

    def _work(self) -> None:
        try:
            self._take_turns()
        finally:
            self._give_up_lane()
            self._drop_claim()
            self._left.add(threading.get_ident())
            if self._stopping.is_set():
                self._close_if_all_left()

    def _take_turns(self) -> None:
        failure: BaseException | None = None
        while True:
            try:
                while not self._stopping.is_set():
                    if failure is not None:
                        told, failure = failure, None
                        self._recover_from(told)
                    self._take_turn()
                return
            except BaseException as error:  # noqa: BLE001 - SystemExit, too, would end the thread without a word
                # Handled inside the try, because another exception may occur here too.
                failure = error

    def _recover_from(self, failure: BaseException) -> None:
        lane = self._give_up_lane()
        had_claimed = self._drop_claim()
        bug = None if isinstance(failure, OutboxError) else failure
        for failed in self._lanes if lane is None else (lane,):
            failed.plan(Look(has_failed=True), now_ms())
            failed.say_trouble(type(failure), failure, until_sent=had_claimed, bug=bug)

    def _give_up_lane(self) -> Lane | None:
        """Give up all turns of this thread. Return the lane in which it worked."""
        with suppress(RuntimeError):  # this thread does not hold the turn, or no longer
            while True:
                self._turn.release()
        for lane in self._lanes:
            lane.give_up_turn()
        left = self._working.pop(threading.get_ident(), None)
        self._nudge()
        return left

    def _drop_claim(self) -> bool:
        """Forget the claim of this thread. Return whether it had one."""
        return self._held.pop(threading.get_ident(), None) is not None

    def _take_turn(self) -> None:
        lane = self._wait()
        self._turn.release()
        while lane is not None:
            self._look(lane)
            # The other destinations have threads, so this one may go on.
            if not self._stays_in(lane):
                break
        self._give_up_lane()

    def _stays_in(self, lane: Lane) -> bool:
        """Take the turn of the lane again. Return False if there is no work, or if delivery is failing."""

        def has_work() -> bool:
            return not self._stopping.is_set() and lane.left_s <= 0

        # Checked again, because the claim of the other thread may have found nothing.
        return has_work() and lane.turn.acquire(timeout=_CLAIM_S) and has_work()

    def _wait(self) -> Lane | None:
        """Take the turn, and wait for a lane in which to look. Return None if the worker stops."""
        self._turn.acquire()
        while not self._stopping.is_set():
            self._beat()
            wait_s = _BEAT_S
            for lane in sorted(self._lanes, key=attrgetter("left_s")):
                left_s = lane.left_s
                if left_s > 0:
                    wait_s = min(left_s, wait_s)
                    break
                if self._may_work_in(lane) and lane.turn.acquire(blocking=False):
                    self._working[threading.get_ident()] = lane
                    return lane
            if self.wakeup.sleep(wait_s):
                for lane in self._lanes:
                    lane.wake()
        return None

    def _may_work_in(self, lane: Lane) -> bool:
        """Return whether a thread is left for each other lane that has none, however long this one takes."""
        working = [*self._working.values()]
        if lane not in working:
            return True
        idle = self._size - len(working)
        return idle > sum(other not in working for other in self._lanes)

    def _nudge(self) -> None:
        """Let the thread that waits look again for what it may do."""
        if self._size > 1:
            self.wakeup.nudge()

    def _beat(self, *, is_first: bool = False) -> None:
        """Give a sign of life."""
        self._seen_at = monotonic_s()
        if self._heartbeat is None or self._seen_at < self._touch_at:
            return
        self._touch_at = self._seen_at + _BEAT_S
        now_ns = now_ms() * 1_000_000
        try:
            self._heartbeat.touch()
            os.utime(self._heartbeat, ns=(now_ns, now_ns))
        except OSError as error:
            words = f"heartbeat is {str(self._heartbeat)!r}, expected a file that can be written: {error.strerror}"
            if is_first:
                raise ConfigurationError(words) from None
            log.debug("%s", words, extra={"event_name": "outbox.heartbeat_failed"})

    def _look(self, lane: Lane) -> None:
        lane.begin_look()
        report = flush(
            self._store,
            self._policy,
            lane.client,
            partial(self._hold, lane),
            destination=lane.destination,
            hooks=self._hooks,
            before_upload=self._beat,
        )
        self._drop_claim()
        lane.report(report)
        is_paused = report.paused_until_ms is not None or report.hold is not None
        now = now_ms() if report.skipped and not is_paused else self._store.now_ms()
        lane.plan(self._seen_in(report, lane.destination), now)

    def _seen_in(self, report: FlushReport, destination: str) -> Look:
        next_due_ms = None
        if not report.claimed and report.skipped is None:
            next_due_ms = self._store.views.next_due_ms(destination, now_ms=self._store.now_ms())
        paused_until_ms = report.paused_until_ms if report.hold is None else report.hold.ends_ms
        return Look(report.goes_on, paused_until_ms, next_due_ms, has_failed=report.verdict is not None)

    def _hold(self, lane: Lane, let_go: Callable[[], None]) -> None:
        self._held[threading.get_ident()] = let_go
        if self._stopping.is_set():
            raise _StoppedError
        if lane.pass_turn_on():
            self._nudge()
