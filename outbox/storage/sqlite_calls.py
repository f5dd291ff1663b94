"""The calls of threads that share commits on a SQLite file, the attempts to commit them, and the connection.

An exception can arrive in a thread from outside at any moment, as `sqlite_writer` says. So only plain assignments
change what threads share, and the frame of a call shows whether an attempt is over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import chain
from types import FrameType
from typing import Any, Generic, TypeVar

from sqlalchemy import Dialect

from outbox.clock import monotonic_s
from outbox.storage import sqlite_file
from outbox.storage.transactions import Compiled, Returning, Transaction, running_on

Result = TypeVar("Result")

POLL_MS = 100
"""How long SQLite waits for the write lock of the file at a time. Interrupts and forks come in between."""

_HAS_TRIGGERS = """
    SELECT EXISTS (
        SELECT 1 FROM sqlite_master WHERE type = 'trigger' AND lower(tbl_name) = 'observation_events'
    )
"""


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

    is_withdrawn = False
    attempt = NO_ATTEMPT
    """The latest attempt to commit the call."""
    result: Any = None
    """The result of the call, if the attempt is committed."""
    failure: str | None = None
    deadline: float | None = None
    insert: tuple[tuple[str], tuple[Any]] | None = None
    """The text and the parameters of an INSERT, if the call is nothing else. Its result is the row id."""

    def __init__(
        self, operation: Callable[[Transaction], Result], *, is_single: bool = False, is_synced: bool = True
    ) -> None:
        self.operation = operation
        self.is_single = is_single
        self.is_synced = is_synced

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


class CursorTransaction(Transaction):
    """A transaction on a cursor of SQLite's driver; the owner of the cursor begins and ends it."""

    def __init__(self, cursor: Any, dialect: Dialect, compiled: dict[Any, Compiled]) -> None:
        super().__init__(running_on(cursor), dialect, compiled)
        self._cursor = cursor

    def rows(self, statement: Returning, /, **parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement that returns rows.

        This is a single call in C, so no signal handler comes while a query is under way. Once another program has
        written, the connection of such a query can't write.
        """
        compiled = self.compiled(statement)
        arguments = compiled.arguments(parameters)
        return list(chain.from_iterable(map(self._cursor.execute, (compiled.text,), (arguments,))))


class Kept:
    """An open connection, and how it is set up."""

    __slots__ = (
        "connection",
        "cursor",
        "file",
        "has_triggers",
        "looked_at_s",
        "own_synchronous",
        "synchronous",
        "transaction",
    )

    def __init__(
        self, connection: Any, cursor: Any, transaction: Transaction, file: sqlite_file.OpenFile, synchronous: int
    ) -> None:
        self.connection = connection
        # All statements share this cursor, so the next one ends a query that was interrupted.
        self.cursor = cursor
        self.transaction = transaction
        self.file = file
        # If a trigger calls RAISE(FAIL), an INSERT outside of a transaction fails, but its row is committed.
        self.has_triggers: bool = cursor.execute(_HAS_TRIGGERS).fetchone()[0]
        self.own_synchronous = synchronous
        self.looked_at_s = monotonic_s()
        """When the log was last checked."""
        self.synchronous = [synchronous]
        """Replaced by each call that changes it; empty while that is under way."""


class Permit:
    """The right to use the connection. One thread has it at a time."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.attempt = NO_ATTEMPT
        """The latest attempt."""
        self.kept: Kept | None = None
        self.successor: dict[str, Permit] = {}

    def close(self) -> None:
        """Close the connection, if there is one."""
        kept, self.kept = self.kept, None
        if kept is not None:
            kept.file.is_closed()
            kept.connection.close()
