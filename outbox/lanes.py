"""When a worker looks at one of its destinations, and what it logs about trouble there."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress

from outbox.clock import monotonic_s
from outbox.destinations import DEFAULT_DESTINATION, shown
from outbox.policy import Verdict
from outbox.reasons import without_answer
from outbox.records import FlushReport, UploadClient
from outbox.waits import Look, wait_ms

log = logging.getLogger("outbox")

# An exception of the application's log filter or handler must neither stop the delivery nor fail an enqueue.
unbroken = suppress(Exception)


class Lane:
    """One destination of a worker: its client, the time of the next look, and the trouble that was logged.

    The thread that holds `turn` looks for due events of the destination. An RLock knows its owner, so after any
    exception a thread can tell whether it still holds the turn.

    The other fields need no lock. Each is written by single assignments, and a count that two threads change at
    the same moment only changes the length of one wait.
    """

    def __init__(self, destination: str, client: UploadClient, poll_interval_ms: int) -> None:
        self.destination = destination
        self.client = client
        self.turn = threading.RLock()
        self._poll_interval_ms = poll_interval_ms
        self._next_look_s = self._not_before_s = monotonic_s()
        self._is_woken = False
        self._idle_rounds = self._failed_rounds = 0
        self._trouble: object = None
        self._is_trouble_until_sent = False

    @property
    def left_s(self) -> float:
        """Time until the next look, in seconds; negative if it is late."""
        return max(self._next_look_s, self._not_before_s) - monotonic_s()

    def wake(self) -> None:
        """Look as soon as no failure forbids it, because an event may be due."""
        self._is_woken = True
        # By this host's estimate of the server's clock, the event may be due in a few milliseconds.
        self._idle_rounds = 0
        self._next_look_s = monotonic_s()

    def begin_look(self) -> None:
        """Forget earlier wake-ups: the look that begins now sees their events."""
        self._is_woken = False

    def pass_turn_on(self) -> bool:
        """Let another thread look while this one delivers. Return False if delivery is failing: it tries alone."""
        if self._trouble is not None:
            return False
        self._next_look_s = monotonic_s()
        self.give_up_turn()  # a thread that stayed in the lane has taken it several times
        return True

    def give_up_turn(self) -> None:
        """Release the turn, if this thread holds it."""
        with suppress(RuntimeError):  # this thread does not hold the turn, or no longer
            while True:
                self.turn.release()

    def plan(self, seen: Look, now_ms: int) -> None:
        """Decide when to look next, after a look."""
        has_failed = seen.has_failed and not seen.goes_on
        rounds = self._failed_rounds if has_failed else self._idle_rounds
        longest_ms = wait_ms(seen, rounds=rounds, poll_interval_ms=self._poll_interval_ms, now_ms=now_ms)
        next_look_s = monotonic_s() + longest_ms / 1_000
        if has_failed or seen.paused_until_ms is not None:
            self._not_before_s = next_look_s
        self._failed_rounds = self._failed_rounds + 1 if has_failed else 0
        self._idle_rounds = 0 if seen.goes_on or has_failed else self._idle_rounds + 1
        self._next_look_s = next_look_s
        if self._is_woken:  # an event came during the look
            self.wake()

    def report(self, report: FlushReport) -> None:
        """Log a new kind of trouble, or its end."""
        is_paused = report.paused_until_ms is not None
        if report.skipped is not None and not is_paused:
            self.say_trouble(report.skipped, report.skipped, until_sent=False)
        elif report.verdict is not None or (is_paused and not self._is_trouble_until_sent):
            is_login = report.verdict is Verdict.AUTH_BLOCKED
            kind = Verdict.AUTH_BLOCKED if is_login else Verdict.TRANSIENT
            self.say_trouble(kind, without_answer(report.failure), until_sent=True)
        # After a failed upload, only a successful one shows that the service is back.
        elif report.sent or not (is_paused or self._is_trouble_until_sent):
            self._say_recovery()

    def say_trouble(
        self, kind: object, why: object, *, until_sent: bool, bug: BaseException | None = None
    ) -> None:
        """Log why nothing can be delivered, once for each kind. `until_sent`: only a delivery ends the trouble."""
        self._is_trouble_until_sent = until_sent
        if kind != self._trouble:
            self._trouble = kind
            with unbroken:
                log.warning(
                    "can't deliver%s: %s",
                    self._to,
                    why,
                    exc_info=bug,
                    extra={"event_name": "outbox.cannot_deliver", "destination": shown(self.destination)},
                )

    def _say_recovery(self) -> None:
        if self._trouble is not None:
            self._trouble = None
            # Also a warning: whoever logs the trouble must also log its end.
            with unbroken:
                log.warning(
                    "delivering%s again",
                    self._to,
                    extra={"event_name": "outbox.delivering_again", "destination": shown(self.destination)},
                )

    @property
    def _to(self) -> str:
        return "" if self.destination == DEFAULT_DESTINATION else f" to {self.destination}"
