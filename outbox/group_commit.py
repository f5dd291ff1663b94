"""Threads that write at the same time share a transaction, and so one wait for the disk."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Generic, TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")

_LARGEST_GROUP = 64
"""How many calls share a transaction at most."""


class GroupCommit(Generic[Work, Result]):
    """Lets one thread at a time commit, its own work and that of those who came while the one before it did.

    Who comes alone commits its own work at once. `commit` does several works in one transaction: it returns a
    result for each, or raises and has done none of them.
    """

    def __init__(self, commit: Callable[[list[Work]], list[Result]]) -> None:
        self._commit = commit
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._waiting: deque[_Call[Work, Result]] = deque()
        self._is_led = False

    def run(self, work: Work) -> Result:
        """Return the result of the work, or raise why it was not done."""
        if threading.current_thread() is threading.main_thread():
            # Signals interrupt this thread, and must not strike the work of others.
            return self._commit([work])[0]
        if self._process != os.getpid():
            self._begin()  # who waited in the parent is not copied by a fork
        call = _Call[Work, Result](work)
        with self._lock:
            self._waiting.append(call)
            leads, self._is_led = not self._is_led, True
        if not leads:
            call.sleep()
        if not call.is_done:
            self._lead(call)
        return call.result()

    def _lead(self, own: _Call[Work, Result]) -> None:
        with self._lock:
            self._waiting.remove(own)
            calls = [own]
            while self._waiting and len(calls) < _LARGEST_GROUP:
                calls.append(self._waiting.popleft())
        try:
            self._do(calls)
        finally:
            with self._lock:
                # Not done are those of a leader that was interrupted.
                self._waiting.extendleft(call for call in reversed(calls[1:]) if not call.is_done)
                following = self._waiting[0] if self._waiting else None
                self._is_led = following is not None
            if following is not None:
                following.wake()
            done = [call for call in calls[1:] if call.is_done]
            for call, after in pairwise(done):
                call.after = after
            if done:
                done[0].wake()

    def _do(self, calls: list[_Call[Work, Result]]) -> None:
        try:
            results = self._commit([call.work for call in calls])
        except Exception as error:  # noqa: BLE001 - whatever it is, it reaches the one whose work it is about
            if len(calls) == 1:
                calls[0].error = error
                calls[0].is_done = True
            else:
                for call in calls:
                    self._do([call])
        else:
            for call, result in zip(calls, results, strict=True):
                call.returned.append(result)
                call.is_done = True


class _Call(Generic[Work, Result]):
    """One call of one thread, which sleeps until it is done or to lead."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.returned: list[Result] = []
        self.error: Exception | None = None
        self.is_done = False
        self.after: _Call[Work, Result] | None = None
        self._alarm = threading.Lock()
        self._alarm.acquire()

    def sleep(self) -> None:
        self._alarm.acquire()
        # One after the other: woken all at once, they would be in the way of each other, and of who leads now.
        if self.after is not None:
            self.after.wake()

    def wake(self) -> None:
        self._alarm.release()

    def result(self) -> Result:
        if self.error is not None:
            raise self.error
        return self.returned[0]
