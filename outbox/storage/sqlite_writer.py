"""The one connection through which this process writes a SQLite file, and the commits that its threads share.

SQLite lets one transaction write at a time, so threads lose nothing by taking turns with one connection. A pooled
one would cost as much for each event as the INSERT. Threads that enqueue while another one commits are committed
together by the first of them: they wait for the disk once. A lone row needs no transaction: its INSERT commits it.

An exception can arrive in a thread from outside at any moment: a signal handler raises it, or the time limit of a
task queue. So no step relies on a later step. Only plain assignments and single calls in C change shared fields. A
waiting thread checks again after a limited time. A call's stack frame shows whether the call has ended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine, Insert, event, literal_column, select, table

from outbox.clock import monotonic_s
from outbox.failures import OutboxError, StorageError
from outbox.storage import forks, sqlite_file
from outbox.storage.engines import in_words
from outbox.storage.sqlite_calls import POLL_MS, Attempt, Call, CursorTransaction, Group, Kept, Permit
from outbox.storage.transactions import OutOfPatienceError, Transaction, Writer, left_out

Result = TypeVar("Result")

_LOOK_AGAIN_S = 0.1
"""How long a thread waits for another thread before it checks whether that thread is gone."""
_LOOK_AT_LOG_S = 1.0
"""Minimum time between two checks whether the write-ahead log was deleted."""
_NORMAL = 1
"""What PRAGMA synchronous calls NORMAL: a commit does not wait for the disk."""

# The number of rows that this connection changed, and a number that each commit of another connection changes.
_READ_STATE: Any = select(literal_column("total_changes()"), literal_column("data_version")).select_from(
    table("pragma_data_version")
)

_commit = methodcaller("execute", "COMMIT")

# Keeps the parent's connections alive in the child: collecting one would close it and drop the parent's locks.
_of_parents: list[Permit] = []


class SQLiteWriter(Writer):
    """Runs transactions on the connection that this process keeps to a SQLite file.

    Disposing of the engine closes the connection. The next use opens another one, as it does in a forked child and
    where the file was replaced.
    """

    def __init__(self, engine: Engine, path: Path) -> None:
        super().__init__(engine)
        self._path = path
        self._permit = Permit()
        self._group = Group()
        self._statements = self._on(None)
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

        An `is_single` operation is one query, and needs no transaction. Without `survives_power_cut`, the commit
        does not wait for the disk. With `shares_commit`, another thread may run the operation in one transaction
        with other operations, and run it again if that transaction fails.

        Raises `StorageError`, and what the operation raises; nothing is written then. An exception from outside
        leaves unknown whether the operation is committed, if it arrives while the commit may be under way.
        """
        call = Call(operation, is_single=is_single, is_synced=survives_power_cut)
        result: Result = self._finish(call, shares_commit=shares_commit)
        return result

    def insert(self, statement: Insert, row: dict[str, Any]) -> int:
        """Insert a row and return its id. Threads share the commit, as with `shares_commit` of `run`."""
        call = Call(lambda transaction: transaction.insert(statement, [row])[0])
        compiled = self._statements.compiled(statement)
        call.insert = (compiled.text,), (compiled.arguments(row),)
        row_id: int = self._finish(call, shares_commit=True)
        if not row_id:
            raise left_out(1)
        return row_id

    def _finish(self, call: Call[Any], *, shares_commit: bool) -> Any:
        self._process.check()
        if not shares_commit:
            while not call.attempt.committed:
                self._try(call)
        elif self._group.calls or not self._try(call, wait_s=0):
            self._share(call)
        if call.failure is not None:
            raise OutOfPatienceError(call.failure)
        return call.result

    def state(self, transaction: Transaction, *, changes: int = 0) -> object:
        """Return a value that differs after every change of a row, through this connection or another one."""
        own_changes, version_of_others = transaction.rows(_READ_STATE)[0]
        return self._permit.kept, version_of_others, own_changes - changes

    def _on(self, cursor: Any) -> Transaction:
        return CursorTransaction(cursor, self._engine.dialect, self._compiled)

    def _share(self, call: Call[Any]) -> None:
        """Wait until another thread commits the call, or until this thread may commit it."""
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
        """Commit a call, and with it the others of its group. Return False if the caller must try again."""
        permit = self._permit
        attempt = Attempt(sys._getframe())  # noqa: SLF001 - `inspect.currentframe` costs more
        try:
            forks.enter(attempt)
            if not permit.lock.acquire(blocking=False) and not self._take(permit, wait_s):
                return False
            try:
                last = permit.attempt
                is_nested = last.frame is not None and not last.is_over()
                if not is_nested:
                    permit.attempt = attempt
                # Another attempt may have committed the call meanwhile, or still be about to.
                if self._permit is permit and (group is None or own.is_left()):
                    self._commit(permit, attempt, own, group, is_nested=is_nested)
            finally:
                attempt.frame = None
                permit.lock.release()
        finally:
            forks.leave(attempt)
        return bool(own.attempt.committed)

    def _take(self, permit: Permit, wait_s: float) -> bool:
        """Take the permit; return False if it isn't free within that time. Replace it if its last user is gone."""
        last = permit.attempt
        if permit.lock.acquire(timeout=wait_s):
            return True
        if wait_s and permit.attempt is last and last.is_over():
            successor = permit.successor.setdefault("", Permit())  # atomic: all threads get the same successor
            if self._permit is permit:
                self._permit = successor
            permit.close()
        return False

    def _commit(
        self, permit: Permit, attempt: Attempt, own: Call[Any], group: Group | None, *, is_nested: bool
    ) -> None:
        calls = [own] if group is None else self._together(own, group)
        for call in calls:
            call.attempt = attempt
        try:
            self._transact(permit, attempt, calls, is_nested=is_nested)
        except _SupersededError:
            pass
        except _LockedError as error:
            if own.waited_too_long():
                for call in calls:
                    call.fail(str(error))
        except OutboxError:
            if self._permit is not permit:
                return  # the thread that replaced it has closed the connection
            if group is None or len(calls) == 1:
                raise
            group.is_split = True  # run each call alone, so that only the failing call gets the error

    def _together(self, own: Call[Any], group: Group) -> list[Call[Any]]:
        if self._group is group:
            self._group = Group()  # calls that come from now on are committed by the next thread
        if group.is_split:
            return [own]
        return [own, *(call for call in group.calls if call is not own and call.is_left())]

    def _transact(self, permit: Permit, attempt: Attempt, calls: list[Call[Any]], *, is_nested: bool) -> None:
        own = calls[0]
        try:
            kept, synchronous = self._connected(permit, is_synced=own.is_synced, is_nested=is_nested)
            cursor, transaction = kept.cursor, kept.transaction
            if is_nested:  # the interrupted call may be about to read what its own statement returned
                cursor = kept.connection.cursor()
                transaction = self._on(cursor)
            insert = None if kept.has_triggers or len(calls) > 1 else own.insert
            commit: Iterable[object]
            # The end of this block also rolls back, in C, so a second interrupt can't prevent the rollback.
            with kept.connection:
                try:
                    if insert is not None:
                        # Outside of a transaction, a statement commits itself.
                        commit = map(cursor.execute, *insert)
                    else:
                        if not own.is_single:
                            cursor.execute("BEGIN IMMEDIATE")
                        for call in calls:
                            call.result = call.operation(transaction)
                        commit = (None,) if own.is_single else map(_commit, (cursor,))
                    # Meanwhile a signal handler may have written, or another thread have replaced the permit.
                    if (
                        self._permit is not permit
                        or permit.kept is not kept
                        or kept.synchronous is not synchronous
                    ):
                        raise _SupersededError  # noqa: TRY301 - a function would be one call more for each enqueue
                    # A single call in C commits and says so: nothing comes between.
                    attempt.committed.extend(commit)
                    if insert is not None:
                        # If a trigger left out the row, `rowcount` is 0, and `lastrowid` is the id of another row.
                        own.result = cursor.rowcount and cursor.lastrowid
                except BaseException:
                    kept.connection.rollback()
                    raise
        except self._refusals as error:
            kind = _LockedError if "locked" in str(error) else StorageError
            raise kind(in_words(self._engine, error)) from error

    def _connected(self, permit: Permit, *, is_synced: bool, is_nested: bool) -> tuple[Kept, list[int]]:
        """Return the connection, outside of any transaction, and how it was set to wait for the disk or not."""
        kept = permit.kept
        if kept is not None and not is_nested and (kept.file.is_replaced() or self._has_lost_log(kept)):
            permit.close()
            kept = None
        if kept is None:
            kept = permit.kept = self._connect()
        if kept.connection.in_transaction:
            if is_nested:
                raise StorageError(f"{self._path}: this thread itself holds the write lock, it is interrupted")
            kept.connection.rollback()  # an interrupted call left it
        # A call that interrupts another one always waits for the disk: the other one may be about to commit.
        wanted = kept.own_synchronous if is_synced or is_nested else min(kept.own_synchronous, _NORMAL)
        synchronous = kept.synchronous
        if synchronous != [wanted]:
            synchronous = kept.synchronous = []
            kept.cursor.execute(f"PRAGMA synchronous = {wanted}")
            synchronous.append(wanted)
        return kept, synchronous

    def _has_lost_log(self, kept: Kept) -> bool:
        now_s = monotonic_s()
        if now_s - kept.looked_at_s < _LOOK_AT_LOG_S:
            return False
        kept.looked_at_s = now_s
        has_lost_log = kept.file.has_lost_log()
        if has_lost_log:
            self._engine.pool.dispose()  # closing the last connection writes the log into the file
        return has_lost_log

    def _connect(self) -> Kept:
        sqlite_file.refuse_inherited(self._path)
        pooled = self._engine.raw_connection()
        connection: Any = pooled.driver_connection
        cursor = connection.cursor()
        synchronous = cursor.execute("PRAGMA synchronous").fetchone()[0]
        kept = Kept(connection, cursor, self._on(cursor), pooled.info["file"], synchronous)
        pooled.detach()  # before its settings are changed, because pooled connections must not have them
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
            while not self._take(permit := self._permit, _LOOK_AGAIN_S):
                pass
            try:
                if permit.attempt.is_over():  # else this thread uses it, and was interrupted
                    permit.close()
            finally:
                permit.lock.release()

    def _close_for_fork(self) -> None:
        if self._permit.attempt.is_over():
            self._permit.close()

    def _begin_in_child(self) -> None:
        _of_parents.append(self._permit)
        self._permit = Permit()
        self._group = Group()


class _SupersededError(Exception):
    """A signal handler or another thread interfered. Try again."""


class _LockedError(OutOfPatienceError):
    """Another program holds the write lock."""
