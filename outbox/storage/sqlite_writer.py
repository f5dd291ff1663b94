"""The one connection through which this process writes a SQLite file, and the commits that its threads share.

SQLite lets one transaction write at a time, so threads lose nothing by taking turns with one connection. A pooled
one would cost as much for each event as the INSERT. Threads that enqueue while another one commits are committed
together by the first of them: they wait for the disk once.

An exception can arrive in a thread from outside at any moment: a signal handler raises it, or the time limit of a
task queue. So no step here relies on a later one. Plain assignments and single calls in C change what threads
share; a thread that waits looks again after a bounded time; and the frame of a call tells whether that is over.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine, event

from outbox.clock import monotonic_s
from outbox.failures import OutboxError, StorageError
from outbox.storage import forks, sqlite_file
from outbox.storage.engines import in_words
from outbox.storage.sqlite_calls import NO_ATTEMPT, POLL_MS, Attempt, Call, Group
from outbox.storage.transactions import Transaction, Writer

Result = TypeVar("Result")

_LOOK_AGAIN_S = 0.1
"""How long a thread waits for another thread before it checks whether that thread is gone."""
_LOOK_AT_LOG_S = 1.0
"""How often it is noticed, at most, that the write-ahead log was deleted."""
_NORMAL = 1
"""What PRAGMA synchronous calls NORMAL: a commit does not wait for the disk."""

_commit = methodcaller("commit")

# Kept, for a connection that is collected is closed, and that of a parent must not be.
_of_parents: list[_Seat] = []


class SQLiteWriter(Writer):
    """Runs transactions on the connection that this process keeps to a SQLite file.

    Disposing of the engine closes the connection. The next use opens another one, as it does in a forked child and
    where the file was replaced.
    """

    def __init__(self, engine: Engine, path: Path) -> None:
        super().__init__(engine)
        self._path = path
        self._seat = _Seat()
        self._group = Group()
        self._process = forks.Process(before_fork=self._close_for_fork, in_child=self._begin_in_child)
        event.listen(engine, "engine_disposed", self._close)

    def run(
        self,
        operation: Callable[[Transaction], Result],
        *,
        repeatable: bool = False,  # noqa: ARG002 - no connection to a file breaks
        is_single: bool = False,
        survives_power_cut: bool = True,
        shares_commit: bool = False,
    ) -> Result:
        """Run an operation in a transaction, and return its result.

        One that `is_single` is one query, and needs no transaction. One that need not survive a power cut does not
        wait for the disk. One that `shares_commit` may be run by another thread, in one transaction with those of
        others, and again where that fails.

        Raises `StorageError`, and what the operation raises; nothing is written then. An exception from outside
        leaves it open whether the operation is committed, if it arrives while that may already be under way.
        """
        self._process.check()
        call = Call(operation, is_single=is_single, is_synced=survives_power_cut)
        if not shares_commit:
            while not call.attempt.committed:
                self._try(call)
        elif self._group.calls or not self._try(call, wait_s=0):
            self._share(call)
        if call.failure is not None:
            raise StorageError(call.failure)
        result: Result = call.result
        return result

    def _share(self, call: Call[Any]) -> None:
        """Wait until another thread commits the call, or until it is this one's turn to."""
        group = self._group
        group.calls.append(call)
        try:
            while not call.attempt.committed:
                has_turn = group.turn.acquire(timeout=_LOOK_AGAIN_S)
                try:
                    if not call.attempt.committed:
                        self._try(call, group)
                finally:
                    if has_turn:
                        group.turn.release()
        except BaseException:
            call.is_withdrawn = True
            raise

    def _try(self, own: Call[Any], group: Group | None = None, *, wait_s: float = _LOOK_AGAIN_S) -> bool:
        """Commit a call, and with it the others of its group. Return False where it has to be tried again."""
        seat = self._seat
        attempt = Attempt(inspect.currentframe())
        try:
            forks.enter(attempt)
            if not self._take(seat, wait_s):
                return False
            try:
                is_nested = not seat.attempt.is_over()
                if not is_nested:
                    seat.attempt = attempt
                # Another attempt may have committed the call meanwhile, or still be about to.
                if self._seat is seat and own.is_left():
                    self._commit(seat, attempt, own, group, is_nested=is_nested)
            finally:
                attempt.frame = None
                seat.lock.release()
        finally:
            forks.leave(attempt)
        return bool(own.attempt.committed)

    def _take(self, seat: _Seat, wait_s: float) -> bool:
        """Take the seat; return False if it is not free within that time. Replace it if its last user is gone."""
        last = seat.attempt
        if seat.lock.acquire(timeout=wait_s):
            return True
        if wait_s and seat.attempt is last and last.is_over():
            successor = seat.successor.setdefault("", _Seat())  # the same one for all who come to this
            if self._seat is seat:
                self._seat = successor
            seat.close()
        return False

    def _commit(
        self, seat: _Seat, attempt: Attempt, own: Call[Any], group: Group | None, *, is_nested: bool
    ) -> None:
        calls = [own] if group is None else self._together(own, group)
        for call in calls:
            call.attempt = attempt
        try:
            self._transact(seat, attempt, calls, is_nested=is_nested)
        except _SupersededError:
            pass
        except _LockedError as error:
            if own.waited_too_long():
                for call in calls:
                    call.fail(str(error))
        except OutboxError:
            if self._seat is not seat:
                return  # the thread that replaced it has closed the connection
            if group is None or len(calls) == 1:
                raise
            group.is_split = True  # each by itself, so that only the one to blame is told

    def _together(self, own: Call[Any], group: Group) -> list[Call[Any]]:
        if self._group is group:
            self._group = Group()  # calls that come from now on are committed by the next thread
        if group.is_split:
            return [own]
        return [own, *(call for call in group.calls if call is not own and call.is_left())]

    def _transact(self, seat: _Seat, attempt: Attempt, calls: list[Call[Any]], *, is_nested: bool) -> None:
        own = calls[0]
        try:
            kept, synchronous = self._connected(seat, is_synced=own.is_synced, is_nested=is_nested)
            # Its end would roll back as well, in C: so not even a second interrupt prevents that.
            with kept.connection:
                try:
                    if not own.is_single:
                        kept.cursor.execute("BEGIN IMMEDIATE")
                    for call in calls:
                        call.result = call.operation(kept.transaction)
                    self._check_that_nothing_came_between(seat, kept, synchronous)
                    # A single call in C commits and says so: nothing comes between.
                    attempt.committed.extend(map(_commit, (kept.connection,)))
                except BaseException:
                    kept.connection.rollback()
                    raise
        except self._refusals as error:
            kind = _LockedError if "locked" in str(error) else StorageError
            raise kind(in_words(self._engine, error)) from error

    def _check_that_nothing_came_between(self, seat: _Seat, kept: _Kept, synchronous: list[int]) -> None:
        # A signal handler may have written before BEGIN, or another thread have replaced the seat.
        if self._seat is not seat or seat.kept is not kept or kept.synchronous is not synchronous:
            raise _SupersededError

    def _connected(self, seat: _Seat, *, is_synced: bool, is_nested: bool) -> tuple[_Kept, list[int]]:
        """Return the connection, outside of any transaction, and how it was set to wait for the disk or not."""
        kept = seat.kept
        if kept is not None and not is_nested and self._is_outdated(kept):
            seat.close()
            kept = None
        if kept is None:
            kept = seat.kept = self._connect()
        if kept.connection.in_transaction:
            if is_nested:
                raise StorageError(f"{self._path}: this thread itself holds the write lock, it is interrupted")
            kept.connection.rollback()  # an interrupted call left it
        wanted = kept.own_synchronous if is_synced else min(kept.own_synchronous, _NORMAL)
        synchronous = kept.synchronous
        if synchronous != [wanted]:
            synchronous = kept.synchronous = []
            kept.cursor.execute(f"PRAGMA synchronous = {wanted}")
            synchronous.append(wanted)
        return kept, synchronous

    def _is_outdated(self, kept: _Kept) -> bool:
        if kept.file.is_replaced():
            return True
        now_s = monotonic_s()
        if now_s - kept.looked_at_s < _LOOK_AT_LOG_S:
            return False
        kept.looked_at_s = now_s
        has_lost_log = kept.file.has_lost_log()
        if has_lost_log:
            self._engine.pool.dispose()  # the last connection that is closed brings the log into the file
        return has_lost_log

    def _connect(self) -> _Kept:
        sqlite_file.refuse_inherited(self._path)
        pooled = self._engine.raw_connection()
        connection: Any = pooled.driver_connection
        cursor = connection.cursor()
        synchronous = cursor.execute("PRAGMA synchronous").fetchone()[0]
        kept = _Kept(connection, cursor, self.on(cursor), pooled.info["file"], synchronous)
        pooled.detach()  # before it is set up as none of the pool is
        try:
            cursor.execute(f"PRAGMA busy_timeout = {min(POLL_MS, sqlite_file.BUSY_TIMEOUT_MS)}")
        except BaseException:
            connection.close()  # the pool no longer closes it
            raise
        return kept

    def _close(self, _engine: object) -> None:
        """Close the connection, as soon as no other thread uses it. That of another process is left alone."""
        if not self._process.is_this():
            return
        with forks.held_back():
            while not self._take(seat := self._seat, _LOOK_AGAIN_S):
                pass
            try:
                if seat.attempt.is_over():  # else this thread uses it, and was interrupted
                    seat.close()
            finally:
                seat.lock.release()

    def _close_for_fork(self) -> None:
        if self._seat.attempt.is_over():
            self._seat.close()

    def _begin_in_child(self) -> None:
        _of_parents.append(self._seat)
        self._seat = _Seat()
        self._group = Group()


class _SupersededError(Exception):
    """A signal handler or another thread came in between: the attempt is to be made again."""


class _LockedError(StorageError):
    """Another program holds the write lock."""


class _Kept:
    """An open connection, and how it is set up."""

    __slots__ = ("connection", "cursor", "file", "looked_at_s", "own_synchronous", "synchronous", "transaction")

    def __init__(
        self, connection: Any, cursor: Any, transaction: Transaction, file: sqlite_file.OpenFile, synchronous: int
    ) -> None:
        self.connection = connection
        # One for all: its next statement ends one that was interrupted while it still returned rows.
        self.cursor = cursor
        self.transaction = transaction
        self.file = file
        self.own_synchronous = synchronous
        self.looked_at_s = monotonic_s()
        """When the write-ahead log was looked for."""
        self.synchronous = [synchronous]
        """Replaced by each call that changes it; empty while that is under way."""


class _Seat:
    """Where one thread at a time writes."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.attempt = NO_ATTEMPT
        """The latest one."""
        self.kept: _Kept | None = None
        self.successor: dict[str, _Seat] = {}

    def close(self) -> None:
        kept, self.kept = self.kept, None
        if kept is not None:
            kept.file.is_closed()
            kept.connection.close()
