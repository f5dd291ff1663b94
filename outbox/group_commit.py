"""Threads that write at the same time share a transaction, and so one wait for the disk."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Generic, TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")

_LARGEST_GROUP = 64
"""How many calls share a transaction at most."""


class GroupCommit(Generic[Work, Result]):
    """Lets one thread at a time do its own work and that of those who wait for their turn.

    Who comes alone finds the turn free and does its own work at once. `commit` does several works in one
    transaction: it returns a result for each, or raises and has done none of them.
    """

    def __init__(
        self, turn: Callable[[], AbstractContextManager[object]], commit: Callable[[list[Work]], list[Result]]
    ) -> None:
        self._turn = turn
        self._commit = commit
        self._begin()

    def _begin(self) -> None:
        self._waiting: deque[_Call[Work, Result]] = deque()
        self._process = os.getpid()

    def run(self, work: Work) -> Result:
        """Return the result of the work, or raise why it was not done."""
        if threading.current_thread() is threading.main_thread():
            # Signals interrupt this thread, and must not strike the work of others.
            return self._commit([work])[0]
        if self._process != os.getpid():
            self._begin()  # who waited in the parent is not copied by a fork
        call = _Call[Work, Result](work)
        self._waiting.append(call)
        with self._turn():
            if not call.is_done:
                self._do(self._group(call))
        return call.result()

    def _group(self, own: _Call[Work, Result]) -> list[_Call[Work, Result]]:
        # It is missing where a thread that took it on came to grief before it was done.
        with suppress(ValueError):
            self._waiting.remove(own)
        others = min(len(self._waiting), _LARGEST_GROUP - 1)
        return [own, *(self._waiting.popleft() for _ in range(others))]

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
    """One call of one thread."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.returned: list[Result] = []
        self.error: Exception | None = None
        self.is_done = False

    def result(self) -> Result:
        if self.error is not None:
            raise self.error
        return self.returned[0]
