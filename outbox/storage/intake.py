"""How events come in: on a connection of the outbox, or in a transaction of the caller."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import ColumnElement, Connection, Dialect, Engine, func, select
from sqlalchemy.orm import Session, scoped_session

from outbox.destinations import DEFAULT_DESTINATION, Addressed
from outbox.event_ids import derived
from outbox.failures import OutboxError, QueueFull
from outbox.policy import Policy
from outbox.storage import callers
from outbox.storage.bounds import Bounds, queue_full
from outbox.storage.deletion import Deletion, Trimmed
from outbox.storage.dialects import dialect_of
from outbox.storage.engines import translated
from outbox.storage.identity import Identity
from outbox.storage.inserts import INSERT, Rows, insert_each, insert_one, known, names_of
from outbox.storage.sql import columns
from outbox.storage.transactions import Transaction, Writer, left_out, read, running_on

log = logging.getLogger("outbox")

# An upper limit for the number of rows. SQLite reads only the ends of the primary key if each end has its own
# query.
ROWS_AT_MOST = select(
    select(func.max(columns.id)).scalar_subquery() - select(func.min(columns.id)).scalar_subquery() + 1
)
# How often to try again when the INSERT finds an event id in use, and the query then finds no row with it: another
# transaction deleted the row in between, or was rolled back.
_TRIES = 10


class Inserted(NamedTuple):
    """The row ids of all events in their order; and by destination, those of the rows that this call inserted."""

    ids: list[int]
    new: dict[str, list[int]]


class Intake:
    """Inserts events, and refuses them or trims the queue where it is full."""

    def __init__(
        self, engine: Engine, writer: Writer, deletion: Deletion, bounds: Bounds, identity: Identity
    ) -> None:
        self._engine = engine
        self._writer = writer
        self._deletion = deletion
        self._bounds = bounds
        self._identity = identity
        self._compiled: WeakKeyDictionary[Dialect, dict[Any, Any]] = WeakKeyDictionary()
        """Compiled statements for callers' connections, which may use other drivers than ours."""
        self._dialect = dialect_of(engine)

    def insert(self, events: Sequence[Addressed], *, policy: Policy, now_ms: int) -> tuple[list[int], list[str]]:
        """Insert a row of each event for each of its destinations, and delete one slice of the rows over the cap.

        This is one transaction, because each costs a disk sync. Return the row ids, in the order of the events and
        of their destinations, and the destinations that may still be over the cap. A row whose event id already
        exists is not inserted; the existing row's id is returned. A trim that fails is logged, and the rows are
        inserted without it. Raises `QueueFull` if the queue is full and the policy is to reject; on a server,
        transactions that have not committed yet do not count.

        On a file of SQLite, threads that insert at the same time share the commit.
        """
        (destination, *_), has_ids, rows = events[0]
        if has_ids or not _is_one_row(events) or not self._bounds.has_room(policy, destination):
            return self._insert_many(events, policy, now_ms)
        own = _for(destination, rows)
        row_id = self._writer.insert(insert_one(self._dialect.notification, names_of(own)), own[0])
        self._deletion.last_id = row_id
        self._bounds.enqueued(policy, 1, destination)
        # Another process may have inserted rows, too.
        is_over = policy.max_rows and self._deletion.may_be_over(policy, destination, last_id=row_id)
        return [row_id], [destination] if is_over else []

    def _insert_many(
        self, events: Sequence[Addressed], policy: Policy, now_ms: int
    ) -> tuple[list[int], list[str]]:
        trims = bool(policy.max_rows) or policy.when_full == "trim"
        trimming = False

        def insert(transaction: Transaction, *, trims: bool = trims) -> tuple[Inserted, dict[str, Trimmed]]:
            nonlocal trimming
            trimming = False
            self._refuse_when_full(transaction, policy, events)
            inserted = self._insert(transaction, events)
            trimmed: dict[str, Trimmed] = {}
            if trims:
                trimming = True
                for destination, new in inserted.new.items():
                    if new:
                        deleted = self._trim_slice(transaction, policy, destination, new, now_ms=now_ms)
                        if deleted.rows:
                            trimmed[destination] = deleted
                trimming = False
            return inserted, trimmed

        if policy.max_undelivered:
            _refuse_new(self._bounds.refuse, policy, events, self._known)
        # If all have ids, a second try writes nothing that the first one wrote.
        repeatable = events[0].has_ids and all(group.has_ids for group in events)
        is_single = self._dialect.is_shared and not trims and not policy.max_rows and _is_one_row(events)
        try:
            inserted, trimmed = self._writer.run(
                insert, repeatable=repeatable, is_single=is_single, shares_commit=True
            )
        except OutboxError as error:
            if not trimming:
                raise
            log.warning(
                "capping the queue failed, the events are kept: %s",
                error,
                extra={"event_name": "outbox.cap_failed"},
            )
            inserted, trimmed = self._writer.run(
                partial(insert, trims=False), repeatable=repeatable, shares_commit=True
            )
        self._note(policy, inserted)
        for one in trimmed.values():
            self._deletion.warn_of_undelivered(one)
        return inserted.ids, [destination for destination, one in trimmed.items() if one.is_whole_slice]

    def insert_in(
        self,
        session: Session | scoped_session[Session],
        events: Sequence[Addressed],
        *,
        policy: Policy,
        after_commit: Callable[[Session], object] | None = None,
    ) -> list[int]:
        """Insert rows on the connection of the caller's session, in its transaction, and do nothing else.

        `after_commit` is called after each commit of the session from now on. Raises `QueueFull` if the queue
        is full and the policy is to reject; rows are counted only for this check.
        """
        with callers.in_words(self._engine):
            ids = self.insert_on(callers.connection_of(session, self._engine, INSERT), events, policy=policy)
        if after_commit is not None:
            callers.call_after_commit(session, after_commit)
        return ids

    def insert_on(self, connection: Any, events: Sequence[Addressed], *, policy: Policy) -> list[int]:
        """Insert rows on the caller's connection, SQLAlchemy's or a driver's, like `insert_in`."""
        dialect, own = callers.dialect_and_connection(connection, self._engine)
        compiled = self._compiled.setdefault(dialect, {})
        is_two_phase = callers.is_two_phase(own, self._dialect)
        if isinstance(own, Connection):
            with callers.in_words(self._engine), self._dialect.unprepared(own.connection.driver_connection):
                transaction = Transaction(own.exec_driver_sql, dialect, compiled)
                return self._insert_beside(transaction, events, policy, is_two_phase=is_two_phase)
        with (
            translated(self._engine, dialect.loaded_dbapi.Error),
            self._dialect.unprepared(own),
            closing(self._dialect.plain_cursor(own, dialect)) as cursor,
        ):
            transaction = Transaction(running_on(cursor), dialect, compiled)
            return self._insert_beside(transaction, events, policy, is_two_phase=is_two_phase)

    def _insert_beside(
        self, transaction: Transaction, events: Sequence[Addressed], policy: Policy, *, is_two_phase: bool
    ) -> list[int]:
        """Insert rows in the caller's transaction."""
        refuse = partial(self._bounds.refuse, value_of=transaction.value)
        _refuse_new(refuse, policy, events, partial(known, transaction))
        self._refuse_when_full(transaction, policy, events)
        # PostgreSQL refuses to prepare a transaction that notified. Without a notification, flushers poll.
        inserted = self._insert(transaction, events, notifies=not is_two_phase)
        self._note(policy, inserted)
        return inserted.ids

    def _known(self, destination: str, event_ids: Sequence[str]) -> dict[str, int]:
        return read(self._writer, lambda transaction: known(transaction, destination, event_ids))

    def _note(self, policy: Policy, inserted: Inserted) -> None:
        for destination, new in inserted.new.items():
            self._bounds.enqueued(policy, len(new), destination)

    def _trim_slice(
        self, transaction: Transaction, policy: Policy, destination: str, new: list[int], *, now_ms: int
    ) -> Trimmed:
        last_id = self._deletion.last_id = max(new)
        if self._deletion.may_be_over(policy, destination, last_id=last_id):
            cap = self._deletion.cap(policy, destination)
            trimmed = self._deletion.trim_slice(transaction, cap, now_ms=now_ms, last_id=last_id, own=new)
            if trimmed.rows:
                return trimmed
        return self._bounds.trim_slice(transaction, policy, destination, now_ms=now_ms, own=new)

    def _insert(self, transaction: Transaction, events: Sequence[Addressed], *, notifies: bool = True) -> Inserted:
        """Insert the rows except those whose event ids are already in the database.

        Within a destination in the given order: events of the same time are sent in the order of their row ids.
        """
        notification = self._dialect.notification if notifies else None
        if len(events) == 1:
            destinations, has_ids, rows = events[0]
            if destinations == (DEFAULT_DESTINATION,) and not has_ids:  # fast path: most calls
                ids = self._insert_all(transaction, rows, notification)
                return Inserted(ids, {DEFAULT_DESTINATION: ids})
        inserted = Inserted([], {})
        for destinations, has_ids, rows in events:
            found: list[list[int]] = []
            for destination in destinations:
                own = _for(destination, rows)
                if has_ids:
                    ids, new = self._insert_or_find(transaction, destination, own, notification)
                else:
                    if found:
                        own = self._with_ids(transaction, own, found[0])
                    ids = new = self._insert_all(transaction, own, notification)
                found.append(ids)
                inserted.new.setdefault(destination, []).extend(new)
            inserted.ids.extend(ids if len(found) == 1 else chain.from_iterable(zip(*found, strict=True)))
        return inserted

    def _with_ids(self, transaction: Transaction, rows: Rows, row_ids: Sequence[int]) -> Rows:
        """Return rows for further destinations with the event ids that the first rows will have in a claim."""
        outbox_id = self._identity.outbox_id(transaction.value)
        return [
            {**row, "event_id": derived(outbox_id, row["created_at_ms"], row_id)}
            for row, row_id in zip(rows, row_ids, strict=True)
        ]

    def _insert_all(
        self, transaction: Transaction, rows: Rows, notification: ColumnElement[Any] | None
    ) -> list[int]:
        """Insert rows, and return their ids in the order of the rows."""
        if len(rows) == 1:
            return insert_each(transaction, rows, notification)
        return self._dialect.insert_several(transaction, rows, notification)

    def _insert_or_find(
        self, transaction: Transaction, destination: str, rows: Rows, notification: ColumnElement[Any] | None
    ) -> tuple[list[int], list[int]]:
        """Insert the rows whose event ids are new, and find the others. Return the ids of all, and of the new."""
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
                found |= self._dialect.known_now(transaction, destination, others)
            if len(found) == len(wanted):
                return [found[row["event_id"]] for row in rows], new
        raise left_out(len(rows))

    def _refuse_when_full(self, transaction: Transaction, policy: Policy, events: Sequence[Addressed]) -> None:
        at_most = policy.max_rows
        if not at_most or policy.when_full != "reject":
            return

        def refuse(_policy: Policy, destination: str, *, own: int) -> None:
            if (transaction.value(ROWS_AT_MOST) or 0) + own > at_most:
                query = self._bounds.undelivered_rows
                undelivered = transaction.value(query, destination=destination)
                if undelivered + own > at_most:
                    raise queue_full(destination, undelivered, own, "max_rows", at_most)

        _refuse_new(refuse, policy, events, partial(known, transaction))


def _is_one_row(events: Sequence[Addressed]) -> bool:
    """Return whether there is a single row to insert. If its event id exists already, only a query follows."""
    destinations, _, rows = events[0]
    return len(events) == len(destinations) == len(rows) == 1


def _for(destination: str, rows: Rows) -> Rows:
    return rows if destination == DEFAULT_DESTINATION else [{**row, "destination": destination} for row in rows]


def _by_destination(events: Sequence[Addressed]) -> Iterable[tuple[str, Rows]]:
    if len(events) == 1:  # fast path: most calls
        destinations, _, rows = events[0]
        return [(destination, rows) for destination in destinations]
    rows_of: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for destinations, _, rows in events:
        for destination in destinations:
            rows_of[destination].extend(rows)
    return rows_of.items()


def _refuse_new(
    refuse: Callable[..., None],
    policy: Policy,
    events: Sequence[Addressed],
    known_of: Callable[[str, Sequence[str]], dict[str, int]],
) -> None:
    """Call `refuse` with the policy, each destination and the number of rows that need room there.

    Events that are already in the database need none.
    """
    for destination, rows in _by_destination(events):
        try:
            refuse(policy, destination, own=len(rows))
        except QueueFull:
            event_ids = {row["event_id"] for row in rows if "event_id" in row}
            others = sum("event_id" not in row for row in rows)
            new = others + len(event_ids.difference(known_of(destination, sorted(event_ids))))
            if new == len(rows):
                raise
            if new:
                refuse(policy, destination, own=new)
