"""The one connection through which a program writes a file of SQLite."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from outbox.failures import StorageError
from outbox.sqlite import identity

# What PRAGMA synchronous calls NORMAL: a commit does not wait for the disk.
_NORMAL = 1

# Kept, for a connection that is collected is closed, and that of a parent must not be.
_of_parents: list[Any] = []


class KeptConnection:
    """Keeps a connection between its uses, which take turns.

    SQLite lets one write at a time, so threads lose nothing by taking turns here. They gain, for a turn is passed
    on at once, while who finds the file locked sleeps until it looks again. And for each use the pool would do as
    much as SQLite does for an INSERT.

    Disposing of the engine closes the connection, too; the next use opens another one, as it does in a forked
    child and where the file was replaced.
    """

    def __init__(self, engine: Engine, path: Path) -> None:
        self.turn = threading.RLock()
        """To be held while the connection is used."""
        self.is_in_use = False
        """Whether who has the turn is using it."""
        self._engine = engine
        self._path = path
        self._is_stuck = False
        self._connection: Any = None
        self._identity: object = None
        self._own_synchronous = _NORMAL
        self._synchronous: int | None = None
        event.listen(engine, "engine_disposed", self._close)

    def get(self, *, is_nested: bool, survives_power_cut: bool) -> Any:
        """Return the driver's connection, outside of any transaction.

        What is committed survives a power cut if the engine's connections are set up for that, and only then.
        Raises `StorageError` for a use that `is_nested` in one amid a transaction: that was interrupted
        there, by a signal say, and what the handler does would become a part of it.
        """
        if self._connection is None or identity(self._path) != self._identity:
            self._close()
            self._open()
        if self._connection.in_transaction:
            if is_nested:
                raise StorageError(f"{self._path}: this thread itself holds the write lock, it is interrupted")
            self._connection.rollback()  # left by one that was interrupted while it rolled back
        synchronous = self._own_synchronous if survives_power_cut else min(self._own_synchronous, _NORMAL)
        if synchronous != self._synchronous:
            self._synchronous = None  # should an interrupt strike, it is not known
            self._connection.execute(f"PRAGMA synchronous = {synchronous}")
            self._synchronous = synchronous
        return self._connection

    def _open(self) -> None:
        self._identity = identity(self._path)  # should it be replaced just now, the next use notices
        pooled = self._engine.raw_connection()
        connection: Any = pooled.driver_connection
        self._own_synchronous = self._synchronous = connection.execute("PRAGMA synchronous").fetchone()[0]
        pooled.detach()
        self._connection = connection

    def _close(self, _engine: object = None) -> None:
        if self._is_stuck:
            return
        with self.turn:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    # Around forks

    def shut(self, patience_ms: int) -> None:
        """Close the connection and let nobody use it any more; leave it alone if somebody uses it that long."""
        self._is_stuck = not self.turn.acquire(timeout=patience_ms / 1_000)
        self._close()

    def open(self) -> None:
        """Let it be used again."""
        if not self._is_stuck:
            self.turn.release()
        self._is_stuck = False

    def open_in_child(self) -> None:
        """Let it be used again, where the other threads are gone."""
        if self._is_stuck:  # the turn is that of a thread which the fork has not copied
            _of_parents.append(self._connection)
            self._connection = None
            self.turn = threading.RLock()
            self.turn.acquire()
            self._is_stuck = False
        self.open()
