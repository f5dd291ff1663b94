"""The calls of threads that share commits on a SQLite file, and the attempts to commit them.

An exception can arrive in a thread from outside at any moment, as `sqlite_writer` says. So only plain assignments
change what threads share, and the frame of a call shows whether an attempt is over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Generic, TypeVar

from outbox.clock import monotonic_s
from outbox.storage import sqlite_file
from outbox.storage.transactions import Transaction

Result = TypeVar("Result")

POLL_MS = 100
"""How long SQLite waits for the write lock of the file at a time. Interrupts and forks come in between."""


class Attempt:
    """One thread's attempt to commit calls: under way as long as the call of its frame."""

    __slots__ = ("committed", "frame")

    def __init__(self, frame: FrameType | None, *committed: object) -> None:
        self.frame = frame
        self.committed: list[object] = [*committed]
        """Not empty as soon as the calls are committed."""

    def is_over(self) -> bool:
        """Return whether the attempt ended, even if an exception ended it before it could record that."""
        frame = self.frame
        if frame is None:
            return True
        try:
            frame.clear()
        except RuntimeError:  # it is still being executed
            return False
        return True


NO_ATTEMPT = Attempt(None)
_FAILED = Attempt(None, None)


class Group:
    """Calls that wait to be committed together."""

    __slots__ = ("calls", "is_split", "turn")

    def __init__(self) -> None:
        self.turn = threading.RLock()
        """Held by the call that commits. The others wait for it: then they are committed, or it is their turn."""
        self.calls: list[Call[Any]] = []
        self.is_split = False


class Call(Generic[Result]):
    """One call of `run`, which any thread may commit."""

    __slots__ = (
        "attempt",
        "deadline",
        "failure",
        "is_single",
        "is_synced",
        "is_withdrawn",
        "operation",
        "result",
    )

    def __init__(self, operation: Callable[[Transaction], Result], *, is_single: bool, is_synced: bool) -> None:
        self.operation = operation
        self.is_single = is_single
        self.is_synced = is_synced
        self.is_withdrawn = False
        self.attempt = NO_ATTEMPT
        """The latest attempt to commit the call."""
        self.result: Any = None
        """The result of the call, if the attempt is committed."""
        self.failure: str | None = None
        self.deadline: float | None = None

    def is_left(self) -> bool:
        """Return whether no thread committed the call or is about to."""
        return not self.attempt.committed and not self.is_withdrawn and self.attempt.is_over()

    def fail(self, failure: str) -> None:
        """End the call with an error."""
        self.failure = failure
        self.attempt = _FAILED

    def waited_too_long(self) -> bool:
        """Return, after another wait for the write lock, whether the call has waited long enough."""
        if self.deadline is None:
            self.deadline = monotonic_s() + (sqlite_file.BUSY_TIMEOUT_MS - POLL_MS) / 1_000
        return monotonic_s() >= self.deadline
