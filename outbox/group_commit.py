"""Threads that write at the same time share a transaction, and so one wait for the disk."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Generic, TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")

_LARGEST_GROUP = 64
"""How many calls share a transaction at most."""

_all: weakref.WeakSet[GroupCommit[Any, Any]] = weakref.WeakSet()


class GroupCommit(Generic[Work, Result]):
    """Lets one thread at a time commit, its own work and that of those who came while the one before it did.

    Who comes alone commits its own work at once. `commit` does several works in one transaction: as soon as they
    are committed it hands a result for each to the function that it gets, or it raises and has done none of them.
    Where it raises `everyones`, none of the works is to blame, and none is tried by itself.

    Another thread may raise an exception in one that is here, as time limits of task queues do. That strikes
    nobody else: neither is their work done twice, nor do they wait for ever.
    """

    def __init__(
        self,
        commit: Callable[[list[Work], Callable[[list[Result]], None]], object],
        *,
        everyones: type[Exception],
    ) -> None:
        self._commit = commit
        self._everyones = everyones
        self.begin()
        _all.add(self)

    def begin(self) -> None:
        """Forget all who wait: a fork does not copy them."""
        self._lock = threading.Lock()
        self._waiting: list[_Call[Work, Result]] = []
        self._is_led = False

    def run(self, work: Work) -> Result:
        """Return the result of the work, or raise why it was not done."""
        if threading.current_thread() is threading.main_thread():
            # Signals interrupt this thread, and must not strike the work of others.
            returned: list[Result] = []
            self._commit([work], returned.extend)
            return returned[0]
        call = _Call[Work, Result](work)
        try:
            with self._lock:
                # Without any call, at whose end it could be struck.
                call.has_come, call.leads = True, not self._is_led
                self._is_led, self._waiting = True, [*self._waiting, call]
            if not call.leads:
                call.sleep()
            if call.leads:
                self._lead(call)
        finally:
            self._leave(call)
        return call.result()

    def _lead(self, own: _Call[Work, Result]) -> None:
        with self._lock:  # who leads waited longest, and so is the first
            own.led, self._waiting = self._waiting[:_LARGEST_GROUP], self._waiting[_LARGEST_GROUP:]
        self._do(own.led)

    def _leave(self, call: _Call[Work, Result]) -> None:
        """Do what others wait for, whatever struck this thread."""
        if not call.has_come:
            return
        if not call.is_awake and not call.leads:
            with self._lock:
                if not call.leads and call in self._waiting:
                    self._waiting.remove(call)
                    return
            call.sleep()  # another thread is about to wake it
        if call.leads:
            self._hand_on(call)
        elif call.after is not None:
            call.after.wake()

    def _hand_on(self, own: _Call[Work, Result]) -> None:
        with self._lock:
            # Not done are those of a leader that was interrupted.
            not_done = [call for call in own.led if not call.is_done]
            self._waiting = [call for call in not_done + self._waiting if call is not own]
            following = self._waiting[0] if self._waiting else None
            self._is_led = following is not None
            if following is not None:
                following.leads = True
        if following is not None:
            following.wake()
        # One after the other: woken all at once, they would be in the way of each other, and of who leads now.
        done = [call for call in own.led if call.is_done and call is not own]
        for call, after in pairwise(done):
            call.after = after
        if done:
            done[0].wake()

    def _do(self, calls: list[_Call[Work, Result]]) -> None:
        def committed(results: list[Result]) -> None:
            for call, result in zip(calls, results, strict=True):
                call.returned = [result]
                call.is_done = True

        try:
            self._commit([call.work for call in calls], committed)
        except Exception as error:
            if calls[0].is_done:
                raise  # whatever struck this thread, it came after the commit
            if len(calls) == 1 or isinstance(error, self._everyones):
                for call in calls:
                    call.error = error
                    call.is_done = True
            else:
                for call in calls:
                    self._do([call])


class _Call(Generic[Work, Result]):
    """One call of one thread, which sleeps until it is done or to lead."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.returned: list[Result] = []
        self.error: Exception | None = None
        self.is_done = False
        self.has_come = False
        self.leads = False
        self.led: list[_Call[Work, Result]] = []
        self.after: _Call[Work, Result] | None = None
        self.is_awake = False
        self._alarm = threading.Lock()
        self._alarm.acquire()

    def sleep(self) -> None:
        while not self.is_awake:
            self._alarm.acquire()

    def wake(self) -> None:
        self.is_awake = True
        self._alarm.release()

    def result(self) -> Result:
        if self.error is not None:
            raise self.error
        return self.returned[0]


def _begin_in_child() -> None:
    for group in list(_all):
        group.begin()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_begin_in_child)
