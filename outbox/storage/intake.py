"""How events come in: on a connection of the outbox, or in a transaction of the caller."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import ColumnElement, Connection, Dialect, Engine, func, select
from sqlalchemy.orm import Session, scoped_session

from outbox.destinations import DEFAULT_DESTINATION
from outbox.failures import OutboxError, QueueFull, StorageError
from outbox.policy import Policy
from outbox.storage import callers
from outbox.storage.bounds import Bounds, queue_full
from outbox.storage.deletion import Deletion, Trimmed
from outbox.storage.dialects import dialect_of
from outbox.storage.engines import translated
from outbox.storage.inserts import INSERT, Rows, in_slices, insert_one, insert_rows, known, named
from outbox.storage.sql import columns
from outbox.storage.transactions import Transaction, Writer, look, running_on

log = logging.getLogger("outbox")

# No more rows than this. SQLite looks only at the ends of the primary key, provided each is asked for alone.
ROWS_AT_MOST = select(
    select(func.max(columns.id)).scalar_subquery() - select(func.min(columns.id)).scalar_subquery() + 1
)
# How often to try again when the INSERT finds an event id in use, and the query then finds no row with it: another
# transaction deleted the row in between, or was rolled back.
_TRIES = 10


class Inserted(NamedTuple):
    """The row ids of all events in their order, and the ids of those rows that this call inserted."""

    ids: list[int]
    new: list[int]


class Intake:
    """Inserts events, and refuses them or trims the queue where it is full."""

    def __init__(self, engine: Engine, writer: Writer, deletion: Deletion, bounds: Bounds) -> None:
        self._engine = engine
        self._writer = writer
        self._deletion = deletion
        self._bounds = bounds
        self._compiled: WeakKeyDictionary[Dialect, dict[Any, Any]] = WeakKeyDictionary()
        """What was compiled for the connections of callers, whose drivers may be others than ours."""
        self._dialect = dialect_of(engine)

    def insert(self, rows: Rows, *, policy: Policy, now_ms: int) -> tuple[list[int], bool]:
        """Insert rows and trim one slice of what is over the cap, in one transaction, for it costs one sync.

        Return the row ids in the order of the rows, and whether more may be over the cap. A row whose event id is
        there is not inserted; the id of the first row is returned. A trim that fails is logged, and the rows are
        inserted without it. Raises `QueueFull` where the policy is to reject: on a server only as far as other
        transactions that enqueue right now have committed.

        On a file of SQLite, threads that insert at the same time share the commit.
        """
        cap = self._deletion.cap(policy)
        trimming = False

        def insert(transaction: Transaction, *, trims: bool = False) -> tuple[Inserted, Trimmed]:
            nonlocal trimming
            trimming = False
            self._refuse_when_full(transaction, policy, rows)
            inserted = self._insert(transaction, rows)
            trimmed = Trimmed()
            if trims and inserted.new:
                trimming = True
                trimmed = self._deletion.trim_slice(
                    transaction, cap, now_ms=now_ms, last_id=max(inserted.new), own=inserted.new
                )
                if not trimmed.rows:
                    trimmed = self._bounds.trim_slice(transaction, policy, now_ms=now_ms, own=inserted.new)
                trimming = False
            return inserted, trimmed

        _refuse_new(
            lambda own: self._bounds.refuse(policy, own=own),
            rows,
            lambda event_ids: look(self._writer, lambda transaction: known(transaction, event_ids)),
        )
        # If all have ids, a second try writes nothing that the first one wrote.
        repeatable = _has_ids(rows) and all("event_id" in row for row in rows)
        try:
            inserted, trimmed = self._writer.run(
                partial(insert, trims=True), repeatable=repeatable, shares_commit=True
            )
        except OutboxError as error:
            if not trimming:
                raise
            log.warning(
                "capping the queue failed, the events are kept: %s",
                error,
                extra={"event_name": "outbox.cap_failed"},
            )
            inserted, trimmed = self._writer.run(insert, repeatable=repeatable, shares_commit=True)
        self._bounds.enqueued(policy, len(inserted.new))
        self._deletion.warn_of_undelivered(trimmed)
        return inserted.ids, trimmed.is_whole_slice

    def insert_in(
        self,
        session: Session | scoped_session[Session],
        rows: Rows,
        *,
        policy: Policy,
        after_commit: Callable[[Session], object] | None = None,
    ) -> list[int]:
        """Insert rows on the connection of the caller's session, in its transaction, and do nothing else.

        `after_commit` is called after each commit of the session from now on. Raises `QueueFull` where the policy
        is to reject; only for that it looks at what is there.
        """
        with callers.in_words(self._engine):
            ids = self.insert_on(callers.connection_of(session, self._engine, INSERT), rows, policy=policy)
        if after_commit is not None:
            callers.call_after_commit(session, after_commit)
        return ids

    def insert_on(self, connection: Any, rows: Rows, *, policy: Policy) -> list[int]:
        """Insert rows on the caller's connection, SQLAlchemy's or a driver's, like `insert_in`."""
        dialect, own = callers.dialect_and_connection(connection, self._engine)
        compiled = self._compiled.setdefault(dialect, {})
        is_two_phase = callers.is_two_phase(own, self._dialect)
        if isinstance(own, Connection):
            with callers.in_words(self._engine), self._dialect.unprepared(own.connection.driver_connection):
                transaction = Transaction(own.exec_driver_sql, dialect, compiled)
                return self._insert_beside(transaction, rows, policy, is_two_phase=is_two_phase)
        with (
            translated(self._engine, dialect.loaded_dbapi.Error),
            self._dialect.unprepared(own),
            closing(self._dialect.plain_cursor(own, dialect)) as cursor,
        ):
            transaction = Transaction(running_on(cursor), dialect, compiled)
            return self._insert_beside(transaction, rows, policy, is_two_phase=is_two_phase)

    def _insert_beside(
        self, transaction: Transaction, rows: Rows, policy: Policy, *, is_two_phase: bool
    ) -> list[int]:
        """Insert rows in the caller's transaction."""
        _refuse_new(
            lambda own: self._bounds.refuse(policy, own=own, value_of=transaction.value),
            rows,
            partial(known, transaction),
        )
        self._refuse_when_full(transaction, policy, rows)
        # PostgreSQL can't prepare a transaction that has notified; flushers come upon its rows by polling.
        inserted = self._insert(transaction, rows, notifies=not is_two_phase)
        self._bounds.enqueued(policy, len(inserted.new))
        return inserted.ids

    def _insert(self, transaction: Transaction, rows: Rows, *, notifies: bool = True) -> Inserted:
        """Insert the rows except those whose event ids are already in the database."""
        notification = self._dialect.notification if notifies else None
        if not _has_ids(rows):
            ids = self._insert_all(transaction, rows, notification)
            return Inserted(ids, ids)
        inserted = Inserted([], [])
        # In the given order: events of the same time are sent in the order of their row ids.
        for has_id, group in groupby(rows, key=lambda row: "event_id" in row):
            if has_id:
                part = self._insert_or_find(transaction, list(group), notification)
            else:
                ids = self._insert_all(transaction, list(group), notification)
                part = Inserted(ids, ids)
            inserted.ids.extend(part.ids)
            inserted.new.extend(part.new)
        return inserted

    def _insert_all(
        self, transaction: Transaction, rows: Rows, notification: ColumnElement[Any] | None
    ) -> list[int]:
        """Insert rows, and return their ids in the order of the rows."""
        single = insert_one(notification)
        if len(rows) == 1 or not self._dialect.inserts_several:
            return transaction.insert(single, rows)
        ids: list[int] = []
        for several in in_slices(rows):
            if len(several) == 1:
                ids += transaction.insert(single, several)
            else:
                returned = transaction.rows(insert_rows(len(several), notification), **named(several))
                if len(returned) < len(several):
                    raise _left_out(len(several))
                # In whatever order they are returned, they were given in that of the rows.
                ids += sorted(row_id for row_id, *_ in returned)
        return ids

    def _insert_or_find(
        self, transaction: Transaction, rows: Rows, notification: ColumnElement[Any] | None
    ) -> Inserted:
        """Insert the rows whose event ids are new, and find the others."""
        wanted: dict[str, dict[str, Any]] = {}
        for row in rows:
            wanted.setdefault(row["event_id"], row)
        found: dict[str, int] = {}
        new: list[int] = []
        for _ in range(_TRIES):
            missing = [row for event_id, row in wanted.items() if event_id not in found]
            inserted = self._dialect.insert_new(transaction, missing, notification)
            new += inserted.values()
            found |= inserted
            if len(found) < len(wanted):
                others = [event_id for event_id in wanted if event_id not in found]
                found |= self._dialect.known_now(transaction, others)
            if len(found) == len(wanted):
                return Inserted([found[row["event_id"]] for row in rows], new)
        raise _left_out(len(rows))

    def _refuse_when_full(self, transaction: Transaction, policy: Policy, rows: Rows) -> None:
        at_most = policy.max_rows
        if not at_most or policy.when_full != "reject":
            return

        def refuse(own: int) -> None:
            if (transaction.value(ROWS_AT_MOST) or 0) + own > at_most:
                query = self._bounds.undelivered_rows
                undelivered = transaction.value(query, destination=DEFAULT_DESTINATION)
                if undelivered + own > at_most:
                    raise queue_full(undelivered, own, "max_rows", at_most)

        _refuse_new(refuse, rows, partial(known, transaction))


def _has_ids(rows: Rows) -> bool:
    return any("event_id" in row for row in rows)


def _left_out(number: int) -> StorageError:
    return StorageError(f"a trigger of the database left out some of {number} events")


def _refuse_new(
    refuse: Callable[[int], None], rows: Rows, known_of: Callable[[Sequence[str]], dict[str, int]]
) -> None:
    """Call `refuse` with the number of rows that need room. Events that are already in the database need none."""
    try:
        refuse(len(rows))
    except QueueFull:
        event_ids = {row["event_id"] for row in rows if "event_id" in row}
        others = sum("event_id" not in row for row in rows)
        new = others + len(event_ids.difference(known_of(sorted(event_ids))))
        if new == len(rows):
            raise
        if new:
            refuse(new)
