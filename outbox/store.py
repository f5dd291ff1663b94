"""Every operation on the database, one named method each. Only this module knows how dialects differ."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import chain, islice
from math import inf
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy import Engine, Select, TwoPhaseTransaction
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session, scoped_session

from outbox import statements as sql
from outbox.clock import SharedClock, now_ms
from outbox.database import is_mysql, reading, translated
from outbox.failures import QueueFull, StorageError
from outbox.group_commit import GroupCommit
from outbox.models import ObservationEvent
from outbox.policy import Outcome, Policy
from outbox.statements import ClaimedRow, Pause
from outbox.transaction import NotBegunError, Result, Transaction, Writer, without_nul

log = logging.getLogger("outbox")

_TRIM_SLICE = 1_000
# How many rows one INSERT holds: a few sizes, so that few statements are compiled, and prepared.
_INSERTED_AT_ONCE = (64, 16, 4, 1)
_PURGE_SLICE = 1_000


class Trouble(NamedTuple):
    """A failure that keeps rows back: its text, a time that belongs to it, and how many rows have it."""

    last_error: str
    next_attempt_at_ms: int
    events: int


class Oddities(NamedTuple):
    """How many rows have times that no healthy queue has."""

    leases_run_out: int
    leases_too_long: int
    created_in_future: int
    due_too_late: int


class Deleted(NamedTuple):
    """How many events of one kind were deleted for one reason."""

    status: str
    event_type: str
    reason: str
    events: int


class Overview(NamedTuple):
    """What `Store.overview` sees, in one snapshot."""

    counts: list[tuple[str, str, int]]
    oldest_pending_ms: int | None
    next_due_at_ms: int | None
    parked: Trouble | None
    waiting: Trouble | None
    deleted: list[Deleted]
    pauses: list[Pause]


class Claim(NamedTuple):
    """The rows that a flusher got, oldest first, and the pause of their destination, if it has one.

    Rows under a pause are a probe; without rows, a pause that is not over is the reason.
    """

    rows: list[ClaimedRow]
    pause: Pause | None = None


class Chores(NamedTuple):
    """What there is to do beside delivery."""

    is_any_parked: bool
    is_any_expired: bool
    may_be_over_cap: bool


class _Insertion(NamedTuple):
    """What one call wants inserted."""

    rows: Sequence[dict[str, Any]]
    policy: Policy
    now_ms: int


_Inserted: TypeAlias = tuple[list[int], bool]


class _Counted(NamedTuple):
    """How many rows there were when the last id was this one."""

    last_id: int
    rows: int

    def rows_at_most(self, last_id: int) -> float:
        """Return how many there are now, and what was deleted: a new row has a larger id than all before."""
        return self.rows + last_id - self.last_id if last_id >= self.last_id else inf


class Store:
    """The table of events in one database. Every method is one transaction; times are handed in, in ms.

    On SQLite what flushers write does not wait for the disk: should a power cut undo a claim or an outcome, its
    events are sent again, and no event is lost. Whatever later waits for the disk makes that last, too.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._writer = Writer(engine)
        self._insertions = GroupCommit(self._insert_all, everyones=NotBegunError) if self._writer.kept else None
        self._counted = _Counted(0, 0)
        self._is_mysql = is_mysql(engine)
        self._is_postgresql = engine.dialect.name == "postgresql"
        self.is_shared = self._is_mysql or self._is_postgresql
        """Whether this is a server, on which many hosts work."""
        self.now_ms = SharedClock(self._read_clock).now_ms if self.is_shared else now_ms
        """Tells the time by which rows are due: the server's where hosts share one, else this machine's."""

    def insert(self, rows: Sequence[dict[str, Any]], *, policy: Policy, now_ms: int) -> tuple[list[int], bool]:
        """Insert rows and trim one slice of what is over the cap, in one transaction, for it costs one sync.

        Return the ids in the order of the rows, and whether more may be over the cap. A trim that fails is logged,
        and the rows are inserted without it. Raises `QueueFull` where the policy is to reject: on a server only as
        far as other transactions that enqueue right now have committed.

        On a file of SQLite, threads that insert at the same time share the transaction.
        """
        insertion = _Insertion(rows, policy, now_ms)
        return self._insertions.run(insertion) if self._insertions else self._insert_all([insertion])[0]

    def insert_in(
        self, session: Session | scoped_session[Session], rows: Sequence[dict[str, Any]], *, policy: Policy
    ) -> list[int]:
        """Insert rows on the connection of the caller's session, in its transaction, and do nothing else.

        Raises `QueueFull` where the policy is to reject; only for that it looks at what is there.
        """
        with translated(self.engine):
            try:
                connection = session.connection(bind_arguments={"mapper": ObservationEvent})
            except UnboundExecutionError:  # a session that is bound by the host's own models
                connection = session.connection(bind_arguments={"bind": self.engine})
            _refuse_when_full(connection.scalar, policy, own=len(rows))
            if self._is_mysql:  # it returns no rows from an INSERT, only the id of a single one
                return [connection.execute(sql.INSERT, row).lastrowid for row in rows]
            if self._is_postgresql:
                rows = [without_nul(row) for row in rows]
                # PostgreSQL can't prepare a transaction that has notified; flushers come upon its rows by polling.
                if not isinstance(connection.get_transaction(), TwoPhaseTransaction):
                    return list(connection.scalars(sql.INSERT_AND_NOTIFY_IN_SESSION, rows))
            return list(connection.scalars(sql.INSERT_IN_SESSION, rows))

    def insert_on(self, connection: Any, rows: Sequence[dict[str, Any]], *, policy: Policy) -> list[int]:
        """Insert rows on the caller's own connection of a driver, like `insert_in`."""
        with translated(self.engine, connection.Error), closing(connection.cursor()) as cursor:
            transaction = self._writer.on(cursor)
            _refuse_when_full(transaction.value, policy, own=len(rows))
            return self._insert(transaction, rows)

    def claim(
        self, *, now_ms: int, lease_ms: int, batch_size: int, destination: str | None = None, probe_size: int = 1
    ) -> Claim:
        """Move the oldest due rows to sending, under the lease.

        On a server, while the destination is paused, there are none; after the pause one flusher gets a probe, and
        no other one any rows before its outcome is known or its lease has run out.
        """
        due = {"now": now_ms, "lease": lease_ms, "batch_size": batch_size}
        # A single statement is repeatable: should it have landed unseen, its rows are due again when their lease
        # has run out.
        is_single = self._is_postgresql
        how: dict[str, Any] = {"repeatable": is_single, "is_single": is_single, "survives_power_cut": False}
        if not self.is_shared or destination is None:
            return Claim(self._writer.run(lambda transaction: self._claim(transaction, **due), **how))
        if self._is_postgresql:
            unpaused = {"destination": destination, **due}
            found = self._writer.run(
                lambda transaction: transaction.rows(sql.CLAIM_UNPAUSED_POSTGRESQL, **unpaused), **how
            )
            if found:
                return Claim(_oldest_first(found))
        return self._writer.run(
            lambda transaction: self._claim_unless_paused(transaction, destination, probe_size, **due)
        )

    def pause(self, destination: str, *, seen: int, until_ms: int, last_error: str) -> int:
        """Let all flushers leave the destination alone until then, at least; return 1.

        `seen` is how many pauses in a row the failed upload knew of. One that knew of fewer than there are by now
        began before the latest, so it can only prolong that, and ends no probe. Does nothing but on a server.
        """

        def pause(transaction: Transaction) -> int:
            transaction.change(sql.new_destination(self.engine.dialect.name), destination=destination)
            there = Pause._make(transaction.rows(sql.LOCK_PAUSE, destination=destination)[0])
            is_latest = there.failures == seen
            return transaction.change(
                sql.CHANGE_PAUSE,
                destination=destination,
                # At least one, though the pause that it knew of is over: who saw no pause knows of none.
                new_failures=max(there.failures + is_latest, 1),
                new_paused_until_ms=max(there.paused_until_ms, until_ms),
                new_probe_until_ms=0 if is_latest else there.probe_until_ms,
                new_last_error=last_error,
            )

        return self._writer.run(pause) if self.is_shared else 0

    def resume(self, destination: str, *, seen: int) -> int:
        """End the pause of a destination, unless it failed again; return how many were ended."""
        return self._writer.run(
            lambda transaction: transaction.change(sql.RESUME, destination=destination, seen=seen)
        )

    def end_probe(self, destination: str, *, lease_ms: int) -> int:
        """Let another flusher probe: this one tried nothing. Return how many probes were ended."""
        return self._writer.run(
            lambda transaction: transaction.change(sql.END_PROBE, destination=destination, lease=lease_ms)
        )

    def renew(self, row_ids: Iterable[int], *, lease_ms: int, for_ms: int) -> tuple[set[int], int]:
        """Let a lease end `for_ms` from now; return the ids of the rows that were still held, and the new lease.

        Now is when the database is locked: until then this may have waited for another writer.
        """

        def renew(transaction: Transaction) -> tuple[set[int], int]:
            new_lease_ms = self.now_ms() + for_ms
            held = {
                row_id
                for row_id in sorted(row_ids)
                if transaction.change(sql.RENEW, row_id=row_id, lease=lease_ms, new_lease=new_lease_ms)
            }
            return held, new_lease_ms

        return self._writer.run(renew, survives_power_cut=False)

    def settle(self, outcomes: Iterable[tuple[int, Outcome]], *, lease_ms: int) -> Counter[str]:
        """Make the move of each row, one statement a trigger; return how many landed, by trigger.

        A fenced move that finds its row with another owner is left out; `deliver` needs no lease.
        """
        delivered: dict[int, list[int]] = defaultdict(list)
        by_trigger: dict[str, list[dict[str, Any]]] = defaultdict(list)
        # In the order of the ids, so that no two settlements wait for each other.
        for row_id, outcome in sorted(outcomes, key=lambda settled: settled[0]):
            if outcome.trigger == "deliver":
                delivered[outcome.values["sent_at_ms"]].append(row_id)
            else:
                values = {f"new_{name}": value for name, value in outcome.values.items()}
                by_trigger[outcome.trigger].append({"row_id": row_id, "lease": lease_ms, **values})
        if not delivered and not by_trigger:
            return Counter()

        def settle(transaction: Transaction) -> Counter[str]:
            landed = Counter(
                {
                    trigger: transaction.change_many(sql.SETTLE[trigger], rows)
                    for trigger, rows in by_trigger.items()
                }
            )
            for sent_at_ms, row_ids in delivered.items():
                landed["deliver"] += transaction.change_rows(sql.DELIVER, row_ids, new_sent_at_ms=sent_at_ms)
            return landed

        is_single = (
            self._is_postgresql
            and not by_trigger
            and [len(row_ids) <= sql.CHUNK for row_ids in delivered.values()] == [True]
        )
        # Repeatable: the fence lets no outcome land twice, and a delivery is a fact.
        return self._writer.run(settle, repeatable=True, is_single=is_single, survives_power_cut=False)

    def chores(self, policy: Policy, *, now_ms: int) -> Chores:
        """Tell what there is to do beside delivery: mostly nothing, and then this one query is all it costs."""
        sent_before_ms = now_ms - policy.keep_sent_ms if policy.keep_sent_ms else 0
        parked, expired, last_id = self._look(
            lambda transaction: transaction.rows(sql.CHORES, sent_before=sent_before_ms)
        )[0]
        is_over = 0 < (policy.max_rows or 0) < self._counted.rows_at_most(last_id or 0)
        return Chores(
            is_any_parked=parked is not None, is_any_expired=expired is not None, may_be_over_cap=is_over
        )

    def unpark(self, *, now_ms: int, limit: int, spread_ms: int) -> int:
        """Bring back the oldest parked rows; return how many."""

        def unpark(transaction: Transaction) -> int:
            parked = [row_id for (row_id,) in transaction.rows(sql.LOCK_PARKED, unpark_limit=limit)]
            return transaction.change_rows(sql.UNPARK_ROWS, parked, now=now_ms, spread=spread_ms)

        return self._writer.run(unpark, survives_power_cut=False)

    def retry_now(self, *, now_ms: int) -> int:
        """Make every row due that is parked or waits, and end every pause; return how many rows."""

        def retry_now(transaction: Transaction) -> int:
            transaction.change(sql.RESUME_ALL)
            return transaction.change(sql.RETRY_PARKED, now=now_ms) + transaction.change(
                sql.RETRY_WAITING, now=now_ms
            )

        return self._writer.run(retry_now)

    def requeue(self, *, cutoff_ms: int, now_ms: int, dry_run: bool) -> dict[str, int]:
        """Bring back the abandoned rows created before the cutoff; return how many by event type, by name."""

        def requeue(transaction: Transaction) -> list[tuple[Any, ...]]:
            if dry_run:
                return transaction.rows(sql.OLD_ABANDONED, cutoff=cutoff_ms)
            rows = transaction.rows(sql.LOCK_OLD_ABANDONED, cutoff=cutoff_ms)
            transaction.change_rows(sql.REQUEUE_ROWS, [row_id for row_id, _ in rows], now=now_ms)
            return rows

        per_type = Counter(event_type for _, event_type in self._writer.run(requeue))
        return dict(sorted(per_type.items()))

    def trim(self, *, policy: Policy, now_ms: int) -> int:
        """Delete what is over the cap, never a row in flight, in slices; return how many."""
        last_id = self._look(lambda transaction: transaction.value(sql.LAST_ID)) or 0
        deleted = 0
        while self._counted.rows_at_most(last_id) > (policy.max_rows or inf):
            in_slice = self._writer.run(
                lambda transaction: self._trim(transaction, policy=policy, now_ms=now_ms, last_id=last_id)
            )
            deleted += in_slice
            if in_slice < _TRIM_SLICE:
                break
        return deleted

    def expire(self, *, sent_before_ms: int) -> int:
        """Delete a slice of the rows that were delivered before then, the oldest; return how many."""

        def expire(transaction: Transaction) -> int:
            found = transaction.rows(sql.EXPIRED, sent_before=sent_before_ms, slice_size=_TRIM_SLICE)
            return self._delete(transaction, [sql.Deletable(*row) for row in found], reason="retention")

        return self._writer.run(expire)

    def purge(
        self, *, event_type: str | None, created_before_ms: int | None, now_ms: int, dry_run: bool
    ) -> tuple[Counter[tuple[str, str]], int]:
        """Delete the rows that fit all that is given, but none in flight, and none that is inserted meanwhile.

        Return how many by status and event type, and how many are left because they are in flight. Rows are looked
        for without a lock, and deleted in slices, each a transaction.
        """
        query = sql.to_purge(event_type=event_type, created_before_ms=created_before_ms)
        purged: Counter[tuple[str, str]] = Counter()
        in_flight = 0
        for found in self._slices_to_purge(query, now_ms=now_ms):
            rows = found if dry_run else self._purge([row[0] for row in found], now_ms=now_ms)
            for _, status, type_of_row, _, is_in_flight in rows:
                in_flight += is_in_flight
                purged[status, type_of_row] += not is_in_flight
        return +purged, in_flight

    def pending_count(self) -> int:
        """Return how many rows are pending or sending."""
        with reading(self.engine) as connection:
            return connection.scalar(sql.PENDING_COUNT) or 0

    def next_due_ms(self, *, now_ms: int) -> int | None:
        """Return when the next row is due: one that is pending, or one whose flusher let its lease run out."""
        with reading(self.engine) as connection:
            due_ms: int | None = connection.scalar(sql.NEXT_DUE, {"now": now_ms})
            return due_ms

    def overview(self, *, now_ms: int) -> Overview:
        """Count the rows and find what keeps them back."""
        with reading(self.engine) as connection:
            parked = connection.execute(sql.LAST_PARKED).first()
            waiting = connection.execute(sql.MOST_WAITING).first()
            return Overview(
                counts=[(row[0], row[1], row[2]) for row in connection.execute(sql.COUNTS)],
                oldest_pending_ms=connection.scalar(sql.OLDEST_PENDING),
                next_due_at_ms=connection.scalar(sql.NEXT_DUE, {"now": now_ms}),
                parked=None if parked is None else Trouble(parked[0] or "", parked[1], 0),
                waiting=None if waiting is None else Trouble(*waiting),
                deleted=[Deleted(*row) for row in connection.execute(sql.DELETED)],
                pauses=[Pause(*row) for row in connection.execute(sql.PAUSES)],
            )

    def oddities(self, *, now_ms: int, longest_lease_ms: int, soon_ms: int, latest_due_ms: int) -> Oddities:
        """Count rows whose times lie where they should not."""
        limits = {"now": now_ms, "longest_lease": longest_lease_ms, "soon": soon_ms, "latest_due": latest_due_ms}
        with reading(self.engine) as connection:
            return Oddities(*connection.execute(sql.ODDITIES, limits).one())

    def get(self, row_id: int) -> ObservationEvent | None:
        """Return one row, detached, or None."""
        with reading(self.engine) as connection, Session(connection, expire_on_commit=False) as session:
            return session.get(ObservationEvent, row_id)

    def find(
        self, *, status: str | None, event_type: str | None, created_before_ms: int | None, limit: int
    ) -> list[ObservationEvent]:
        """Return the oldest rows that fit all that is given, detached."""
        statement = sql.find(
            status=status, event_type=event_type, created_before_ms=created_before_ms, limit=limit
        )
        with reading(self.engine) as connection, Session(connection, expire_on_commit=False) as session:
            return list(session.scalars(statement))

    def _read_clock(self) -> int:
        # As a writer, which tries again where the connection was broken.
        return int(self._writer.run(lambda transaction: transaction.value(sql.now(self.engine.dialect.name))))

    def _look(self, query: Callable[[Transaction], Result]) -> Result:
        """Run a single query outside of any transaction."""
        return self._writer.run(query, repeatable=True, is_single=True, survives_power_cut=False)

    def _claim(self, transaction: Transaction, *, now: int, lease: int, batch_size: int) -> list[ClaimedRow]:
        due = {"now": now, "batch_size": batch_size}
        if self._is_mysql:
            found = [row for statement in sql.LOCK_DUE for row in transaction.rows(statement, **due)]
            chosen = _oldest_first(found)[:batch_size]
            transaction.change_rows(sql.CLAIM_ROWS, [row.id for row in chosen], lease=lease)
            return chosen
        if self._is_postgresql:
            return _oldest_first(transaction.rows(sql.CLAIM_POSTGRESQL, lease=lease, **due))
        ids = _find_due_on_sqlite(transaction, **due)
        return _oldest_first(transaction.rows_of(sql.CLAIM_ROWS_ON_SQLITE, ids, lease=lease))

    def _claim_unless_paused(  # noqa: PLR0913 - bound by name
        self,
        transaction: Transaction,
        destination: str,
        probe_size: int,
        *,
        now: int,
        lease: int,
        batch_size: int,
    ) -> Claim:
        this = {"destination": destination, "lease": lease}
        while True:
            found = transaction.rows(sql.PAUSE, destination=destination)
            if not found:
                return Claim(self._claim(transaction, now=now, lease=lease, batch_size=batch_size))
            pause = Pause._make(found[0])
            if pause.until_ms > now:
                return Claim([], pause)
            if transaction.change(sql.BEGIN_PROBE, seen=pause.failures, now=now, **this):
                break  # else another flusher was faster, so look again
        rows = self._claim(transaction, now=now, lease=lease, batch_size=min(probe_size, batch_size))
        if not rows:
            transaction.change(sql.END_PROBE, **this)
        return Claim(rows, pause)

    def _insert_all(
        self, insertions: Sequence[_Insertion], committed: Callable[[list[_Inserted]], object] = list
    ) -> list[_Inserted]:
        """Insert what several calls want, and trim once; return the ids of each, and whether that is not over.

        On the kept connection `committed` gets the same, as `Writer.run` tells.
        """
        rows = [row for insertion in insertions for row in insertion.rows]
        _, policy, now_ms = insertions[-1]
        trimming = False

        def insert(transaction: Transaction, *, trims: bool = False) -> list[_Inserted]:
            nonlocal trimming
            trimming = False
            _refuse_when_full(transaction.value, policy, own=len(rows))
            ids = self._insert(transaction, rows)
            deleted = 0
            if trims:
                trimming = True
                deleted = self._trim(transaction, policy=policy, now_ms=now_ms, last_id=max(ids), own=len(rows))
                trimming = False
            these = iter(ids)
            return [(list(islice(these, len(one.rows))), deleted == _TRIM_SLICE) for one in insertions]

        try:
            return self._writer.run(partial(insert, trims=True), committed=committed)
        except Exception as error:
            if not trimming:
                raise
            log.warning(
                "capping the queue failed, the events are kept: %s",
                error,
                extra={"event_name": "outbox.cap_failed"},
            )
            return self._writer.run(insert, committed=committed)

    def _insert(self, transaction: Transaction, rows: Sequence[dict[str, Any]]) -> list[int]:
        """Insert rows, and return their ids in the order of the rows."""
        single = sql.INSERT_AND_NOTIFY if self._is_postgresql else sql.INSERT
        if len(rows) == 1 or self._is_mysql:  # which tells the id of a single row only
            return transaction.insert(single, rows)
        ids: list[int] = []
        while len(ids) < len(rows):
            left = len(rows) - len(ids)
            number = next(size for size in _INSERTED_AT_ONCE if size <= left)
            several = rows[len(ids) : len(ids) + number]
            if number == 1:
                ids += transaction.insert(single, several)
            else:
                values = [row[name] for row in several for name in sql.INSERTED]
                named = dict(zip(sql.inserted_names(number), values, strict=True))
                returned = transaction.rows(sql.insert_rows(number, notify=self._is_postgresql), **named)
                if len(returned) < number:
                    raise StorageError(f"a trigger of the database left out some of {number} events")
                # In whatever order they are returned, they were given in that of the rows.
                ids += sorted(row_id for row_id, *_ in returned)
        return ids

    def _trim(self, transaction: Transaction, *, policy: Policy, now_ms: int, last_id: int, own: int = 0) -> int:
        """Delete a slice of what is over the cap, `own` rows of which this transaction inserted."""
        max_rows = policy.max_rows
        if not max_rows or self._counted.rows_at_most(last_id) <= max_rows:
            return 0
        rows = transaction.value(sql.ROWS)
        self._counted = _Counted(last_id, rows)
        excess = rows - max_rows
        if self.is_shared and excess > own:
            # Several might count the same rows as too many, and each delete others.
            transaction.rows(sql.TRIMMING)
            excess = transaction.value(sql.ROWS) - max_rows
        excess = min(excess, _TRIM_SLICE)
        steps = sql.TRIM[self.engine.dialect.name]
        chosen: list[sql.Deletable] = []
        for statements in steps[:1] if policy.when_full == "reject" else steps:
            missing = excess - len(chosen)
            if missing > 0:
                found = [transaction.rows(statement, excess=missing, now=now_ms) for statement in statements]
                oldest = found[0] if len(found) == 1 else sorted(chain(*found), key=_age)
                chosen += map(sql.Deletable._make, oldest[:missing])
        return self._delete(transaction, chosen, reason="cap")

    def _slices_to_purge(self, query: Select[Any], *, now_ms: int) -> Iterator[Sequence[Sequence[Any]]]:
        with reading(self.engine) as connection:
            last = connection.scalar(sql.LAST_ID)
        seen = 0
        while True:
            where = {"seen": seen, "last": last, "slice_size": _PURGE_SLICE, "now": now_ms}
            with reading(self.engine) as connection:
                rows = connection.execute(query, where).all()
            if rows:
                yield rows
            if len(rows) < _PURGE_SLICE:
                break
            seen = rows[-1][0]

    def _purge(self, row_ids: Sequence[int], *, now_ms: int) -> Sequence[Sequence[Any]]:
        """Delete a slice of rows but those in flight; return all that were there."""

        def purge(transaction: Transaction) -> Sequence[Sequence[Any]]:
            rows = transaction.rows_of(sql.LOCK_ROWS_TO_PURGE, row_ids, now=now_ms)
            deletable = [sql.Deletable(*row[:-1]) for row in rows if not row[-1]]
            self._delete(transaction, deletable, reason="purge")
            return rows

        return self._writer.run(purge)

    def _delete(self, transaction: Transaction, rows: list[sql.Deletable], *, reason: str) -> int:
        """Delete rows and count them in the ledger; return how many."""
        if len(rows) == 1:  # mostly, at the cap
            transaction.change(sql.DELETE_ROW, row_id=rows[0].id)
        else:
            transaction.change_rows(sql.DELETE_ROWS, [row.id for row in rows])
        deleted = Counter((row.status, row.event_type) for row in rows)
        # In order, so that no two transactions wait for each other.
        for (status, found), events in sorted(deleted.items()):
            # What is not UTF-8 can be read as it is, but not written.
            event_type = found.encode(errors="surrogateescape").decode(errors="replace")
            transaction.change(
                sql.count_deleted(self.engine.dialect.name),
                status=status,
                event_type=event_type,
                reason=reason,
                events=events,
            )
        return len(rows)


def _refuse_when_full(value_of: Callable[[Select[Any]], Any], policy: Policy, *, own: int) -> None:
    room = (policy.max_rows or 0) - own
    if policy.max_rows and policy.when_full == "reject" and (value_of(sql.ROWS_AT_MOST) or 0) > room:
        undelivered = value_of(sql.UNDELIVERED_ROWS) or 0
        if undelivered > room:
            raise QueueFull(
                f"{undelivered} events are not delivered yet, and the policy's max_rows is {policy.max_rows}:"
                f" there is no room for {own} more"
            )


def _find_due_on_sqlite(transaction: Transaction, *, now: int, batch_size: int) -> list[int]:
    """Return the ids of the oldest rows that are due, without a walk past those that are not."""

    def found(statement: Select[Any], **parameters: int) -> list[sql.Place]:
        return list(map(sql.Place._make, transaction.rows(statement, batch_size=batch_size, **parameters)))

    others = found(sql.DUE_NEVER_TRIED, now=now) + found(sql.LEASES_RUN_OUT, now=now)
    # Of what was tried before, mostly the oldest are due, or nothing is there.
    head = found(sql.OLDEST_TRIED)
    due = sorted([*others, *(place for place in head if place.next_attempt_at_ms <= now)])[:batch_size]
    is_whole = len(head) < batch_size or (len(due) == batch_size and due[-1] <= head[-1])
    if not is_whole:  # some that are due may be behind those of the head that are not
        due = sorted([*others, *found(sql.DUE_TRIED, now=now)])[:batch_size]
    return [place.id for place in due]


def _age(row: tuple[Any, ...]) -> tuple[int, int]:
    deletable = sql.Deletable._make(row)
    return deletable.age_ms, deletable.id


def _oldest_first(rows: Iterable[tuple[Any, ...]]) -> list[ClaimedRow]:
    return sorted((ClaimedRow(*row) for row in rows), key=lambda row: (row.created_at_ms, row.id))
