"""The threads of a worker: they take turns to wait for due events, and deliver what they claim."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from outbox.clock import monotonic_s, now_ms
from outbox.failures import ConfigurationError, OutboxError
from outbox.flusher import flush
from outbox.outbox import Outbox
from outbox.policy import Verdict
from outbox.reasons import without_answer
from outbox.records import FlushReport, UploadClient
from outbox.waits import Look, wait_ms
from outbox.wakeup import Wakeup

log = logging.getLogger("outbox")

# This share of a stop's timeout is reserved for releasing claims.
_RELEASE_SHARE = 0.2
# A waiting worker gives a sign of life this often, and touches the heartbeat file no more often.
_BEAT_S = 10.0

# An exception of the application's log filter or handler must neither stop the delivery nor fail an enqueue.
unbroken = suppress(Exception)


class _StoppedError(BaseException):
    """The thread claimed rows although the worker is stopping."""


class Threads:
    """The threads of a worker, from a start to a stop, and the only owner of what they share.

    One thread, the holder of `_turn`, waits for work. On claiming a batch it passes `_turn` on, unless delivery is
    failing: then it tries alone.

    The other fields need no lock. Each is written by single assignments, and a count that two threads change at
    the same moment only changes the length of one wait.

    An exception may occur anywhere in a thread, because another thread can raise one in it. It is logged, and the
    thread continues.
    """

    def __init__(
        self,
        outbox: Outbox,
        client: UploadClient,
        concurrency: int,
        poll_interval_ms: int,
        heartbeat: Path | None,
    ) -> None:
        self._store = outbox.store  # a second store would estimate the server's clock differently
        self._policy = outbox.policy
        self._hooks = outbox.hooks
        self._client = client
        self._poll_interval_ms = poll_interval_ms
        self._heartbeat = heartbeat
        self._touch_at = self._seen_at = monotonic_s()
        self._beat(is_first=True)
        self.wakeup = Wakeup(outbox.engine)
        self._stopping = threading.Event()
        # An RLock knows its owner, so after any exception a thread can tell whether it still holds the turn.
        self._turn = threading.RLock()
        # By thread id: the function that releases the claim that the thread holds.
        self._held: dict[int, Callable[[], None]] = {}
        self._next_look = self._not_before = monotonic_s()
        self._idle_rounds = self._failed_rounds = 0
        self._trouble: object = None
        self._is_trouble_until_sent = False
        self._threads: list[threading.Thread] = []
        self._left: set[int | None] = set()
        try:
            for _ in range(concurrency):
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
            self._give_up_turn()
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
        self._give_up_turn()
        had_claimed = self._drop_claim()
        self._plan(Look(has_failed=True), now_ms())
        bug = None if isinstance(failure, OutboxError) else failure
        self._say_trouble(type(failure), failure, until_sent=had_claimed, bug=bug)

    def _give_up_turn(self) -> None:
        with suppress(RuntimeError):  # this thread does not hold the turn, or no longer
            while True:
                self._turn.release()

    def _drop_claim(self) -> bool:
        """Forget the claim of this thread. Return whether it had one."""
        return self._held.pop(threading.get_ident(), None) is not None

    def _take_turn(self) -> None:
        self._turn.acquire()
        try:
            self._wait()
            if not self._stopping.is_set():
                self._look()
        finally:
            self._give_up_turn()

    def _wait(self) -> None:
        self._wait_after_failure()
        while not self._stopping.is_set():
            self._beat()
            left_s = self._next_look - monotonic_s()
            if self.wakeup.sleep(min(left_s, _BEAT_S)):
                # By this host's estimate of the server's clock, the event may be due in a few milliseconds.
                self._idle_rounds = 0
                break
            if left_s <= _BEAT_S:
                break
        self._wait_after_failure()  # another thread may have failed meanwhile

    def _wait_after_failure(self) -> None:
        while (left_s := self._not_before - monotonic_s()) > 0 and not self._stopping.wait(min(left_s, _BEAT_S)):
            self._beat()

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

    def _look(self) -> None:
        report = flush(
            self._store, self._policy, self._client, self._hold, hooks=self._hooks, before_upload=self._beat
        )
        self._drop_claim()
        is_paused = report.paused_until_ms is not None
        if report.skipped is not None and not is_paused:
            self._say_trouble(report.skipped, report.skipped, until_sent=False)
        elif report.verdict is not None or (is_paused and not self._is_trouble_until_sent):
            is_login = report.verdict is Verdict.AUTH_BLOCKED
            kind = Verdict.AUTH_BLOCKED if is_login else Verdict.TRANSIENT
            self._say_trouble(kind, without_answer(report.failure), until_sent=True)
        # After a failed upload, only a successful one shows that the service is back.
        elif report.sent or not (is_paused or self._is_trouble_until_sent):
            self._say_recovery()
        self._plan(self._seen_in(report), now_ms() if report.skipped and not is_paused else self._store.now_ms())

    def _seen_in(self, report: FlushReport) -> Look:
        next_due_ms = None
        if not report.claimed and report.skipped is None:
            next_due_ms = self._store.views.next_due_ms(now_ms=self._store.now_ms())
        return Look(report.goes_on, report.paused_until_ms, next_due_ms, has_failed=report.verdict is not None)

    def _hold(self, let_go: Callable[[], None]) -> None:
        self._held[threading.get_ident()] = let_go
        if self._stopping.is_set():
            raise _StoppedError
        if self._trouble is None:
            self._next_look = monotonic_s()
            self._turn.release()

    def _plan(self, seen: Look, now_ms: int) -> None:
        has_failed = seen.has_failed and not seen.goes_on
        rounds = self._failed_rounds if has_failed else self._idle_rounds
        longest_ms = wait_ms(seen, rounds=rounds, poll_interval_ms=self._poll_interval_ms, now_ms=now_ms)
        self._next_look = monotonic_s() + longest_ms / 1_000
        if has_failed or seen.paused_until_ms is not None:
            self._not_before = self._next_look
        self._failed_rounds = self._failed_rounds + 1 if has_failed else 0
        self._idle_rounds = 0 if seen.goes_on or has_failed else self._idle_rounds + 1

    def _say_trouble(
        self, kind: object, why: object, *, until_sent: bool, bug: BaseException | None = None
    ) -> None:
        self._is_trouble_until_sent = until_sent
        if kind != self._trouble:
            self._trouble = kind
            with unbroken:
                log.warning(
                    "can't deliver: %s",
                    why,
                    exc_info=bug,
                    extra={"event_name": "outbox.cannot_deliver"},
                )

    def _say_recovery(self) -> None:
        if self._trouble is not None:
            self._trouble = None
            # Also a warning: whoever logs the trouble must also log its end.
            with unbroken:
                log.warning("delivering again", extra={"event_name": "outbox.delivering_again"})
