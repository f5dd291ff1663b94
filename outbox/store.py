"""Every SQL statement, one named method an operation."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Engine,
    Select,
    Table,
    Text,
    Update,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal_column,
    null,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.sql.functions import FunctionElement

from outbox.database import reading
from outbox.lifecycle import MOVES, Status
from outbox.models import LedgerEntry, ObservationEvent
from outbox.policy import Outcome
from outbox.transaction import Transaction, Writer

log = logging.getLogger("outbox")

events: Table = ObservationEvent.__table__  # type: ignore[assignment]  # it is declared with a table, not a join
_c = events.c
ledger: Table = LedgerEntry.__table__  # type: ignore[assignment]  # as above


class ClaimedRow(NamedTuple):
    """What a flusher has to know of a row that it holds."""

    id: int
    event_type: str
    payload_json: str
    retry_count: int
    created_at_ms: int
    revived_at_ms: int | None


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


class _Unindexed(FunctionElement[str]):
    """The status where SQLite's planner must not choose an index by it; elsewhere just the column.

    It would rather walk the baseline's status index through all rows of a state than look up the few ids that are
    asked for, or take the partial index that has the wanted order.
    """

    type = Text()
    inherit_cache = True


@compiles(_Unindexed)
def _plain(element: _Unindexed, compiler: Any, **options: Any) -> str:
    return str(compiler.process(element.clauses, **options))


@compiles(_Unindexed, "sqlite")
def _with_plus(element: _Unindexed, compiler: Any, **options: Any) -> str:
    return f"+{compiler.process(element.clauses, **options)}"


_unindexed_status = _Unindexed(_c.status)


def _literal(status: Status) -> ColumnElement[str]:
    # Part of the text rather than bound: the planner must see it to choose a partial index.
    return literal_column(f"'{status.value}'", Text)


def _in(status: ColumnElement[str], *statuses: Status) -> ColumnElement[bool]:
    if len(statuses) == 1:
        return status == _literal(statuses[0])
    return status.in_([_literal(one) for one in statuses])


def move(trigger: str, *, status: ColumnElement[str] = _unindexed_status) -> Update:
    """Return the UPDATE of one move: legal sources in its WHERE, destination in its SET.

    A fenced move lands only on the row `row_id` under the lease `lease`, both to be bound.
    """
    declared = MOVES[trigger]
    statement = update(events).where(_in(status, *declared.sources)).values(status=_literal(declared.destination))
    return statement.where(_held, _c.id == bindparam("row_id")) if declared.fenced else statement


_held = _c.next_attempt_at_ms == bindparam("lease")
_now = bindparam("now", type_=BigInteger)
_oldest_first = (_c.created_at_ms, _c.id)

_INSERT = insert(events).values(
    {
        name: bindparam(name)
        for name in (
            "event_type",
            "rule_id",
            "rule_ids_json",
            "session_id",
            "file_path",
            "occurred_at_ms",
            "payload_json",
            "next_attempt_at_ms",
            "created_at_ms",
        )
    }
)
_INSERT_IN_SESSION = insert(events).returning(_c.id, sort_by_parameter_order=True)

_CLAIM = (
    move("claim")
    .where(
        _c.id.in_(
            select(_c.id)
            .where(_in(_unindexed_status, *MOVES["claim"].sources), _c.next_attempt_at_ms <= _now)
            .order_by(*_oldest_first)
            .limit(bindparam("batch_size"))
        )
    )
    .values(next_attempt_at_ms=bindparam("lease"))
    .returning(*(_c[name] for name in ClaimedRow._fields))
)

_RENEW = (
    update(events)
    .where(_c.id == bindparam("row_id"), _in(_unindexed_status, Status.SENDING), _held)
    .values(next_attempt_at_ms=bindparam("new_lease"))
)

_SETTLE = {
    "deliver": move("deliver").where(_c.id == bindparam("row_id")).values(sent_at_ms=bindparam("new_sent_at_ms")),
    "reschedule": move("reschedule").values(
        retry_count=bindparam("new_retry_count"),
        next_attempt_at_ms=bindparam("new_next_attempt_at_ms"),
        last_error=bindparam("new_last_error"),
    ),
    "park": move("park").values(last_error=bindparam("new_last_error")),
    "abandon": move("abandon").values(last_error=bindparam("new_last_error")),
    "release": move("release").values(next_attempt_at_ms=bindparam("new_next_attempt_at_ms")),
}

_REVIVED: dict[str, Any] = {"retry_count": 0, "last_error": null(), "revived_at_ms": _now}

_UNPARK = (
    move("unpark")
    .where(
        _c.id.in_(
            select(_c.id)
            .where(_in(_unindexed_status, Status.PARKED))
            .order_by(*_oldest_first)
            .limit(bindparam("unpark_limit"))
        )
    )
    .values(next_attempt_at_ms=_now + _c.id % bindparam("spread"), **_REVIVED)
)

_RETRY_NOW = (
    move("retry_now", status=_c.status)
    .where(or_(_in(_c.status, Status.PARKED), _c.next_attempt_at_ms > _now))
    .values(
        next_attempt_at_ms=_now,
        revived_at_ms=case((_in(_c.status, Status.PARKED), _now), else_=_c.revived_at_ms),
    )
)

_old_abandoned = and_(_in(_unindexed_status, Status.ABANDONED), _c.created_at_ms < bindparam("cutoff"))
_COUNT_ABANDONED = (
    select(_c.event_type, func.count()).where(_old_abandoned).group_by(_c.event_type).order_by(_c.event_type)
)
_REQUEUE = move("requeue").where(_old_abandoned).values(next_attempt_at_ms=_now, **_REVIVED)


def _first(condition: ColumnElement[bool], *order: ColumnElement[Any]) -> Select[tuple[int, int]]:
    return select(_c.id, _c.created_at_ms).where(condition).order_by(*order).limit(bindparam("excess"))


def _oldest_undelivered() -> Select[tuple[int]]:
    # Each half walks its own index in order and stops at the limit. A row under a lease that runs is in flight.
    not_in_flight = or_(_c.status != _literal(Status.SENDING), _c.next_attempt_at_ms <= _now)
    waiting = _first(and_(_in(_unindexed_status, Status.PENDING, Status.SENDING), not_in_flight), *_oldest_first)
    parked = _first(_in(_unindexed_status, Status.PARKED), *_oldest_first)
    both = union_all(select(waiting.subquery()), select(parked.subquery())).subquery()
    return select(both.c.id).order_by(both.c.created_at_ms, both.c.id).limit(bindparam("excess"))


_undelivered = _in(_c.status, Status.PENDING, Status.SENDING)
_PENDING_COUNT = select(func.count()).where(_undelivered)
_COUNTS = select(_c.event_type, _c.status, func.count()).group_by(_c.event_type, _c.status).order_by(_c.event_type)
_OLDEST_PENDING = select(func.min(_c.created_at_ms)).where(_undelivered)
_NEXT_DUE = select(func.min(_c.next_attempt_at_ms)).where(_in(_c.status, Status.PENDING))
_LAST_PARKED = (
    select(_c.last_error, _c.next_attempt_at_ms)
    .where(_in(_c.status, Status.PARKED))
    .order_by(_c.next_attempt_at_ms.desc(), _c.id.desc())
    .limit(1)
)
_MOST_WAITING = (
    select(_c.last_error, func.min(_c.next_attempt_at_ms), func.count())
    .where(_in(_c.status, Status.PENDING), _c.last_error.is_not(None))
    .group_by(_c.last_error)
    .order_by(func.count().desc())
    .limit(1)
)

_ODDITIES = select(
    *(
        select(func.count()).where(condition).scalar_subquery()
        for condition in (
            and_(_in(_c.status, Status.SENDING), _c.next_attempt_at_ms <= _now),
            and_(_in(_c.status, Status.SENDING), _c.next_attempt_at_ms > bindparam("longest_lease")),
            _c.created_at_ms > bindparam("soon"),
            and_(_in(_c.status, Status.PENDING), _c.next_attempt_at_ms > bindparam("latest_due")),
        )
    )
)

_ROWS = select(func.count()).select_from(events)
# No more rows than this. SQLite looks only at the ends of the primary key, provided each is asked for alone.
_ROWS_AT_MOST = select(select(func.max(_c.id)).scalar_subquery() - select(func.min(_c.id)).scalar_subquery() + 1)

# What the cap deletes, in this order.
_TRIM = tuple(
    delete(events).where(_c.id.in_(chosen)).returning(_c.status, _c.event_type)
    for chosen in (
        select(_first(_in(_unindexed_status, Status.SENT), _c.sent_at_ms, _c.id).subquery().c.id),
        select(_first(_in(_unindexed_status, Status.ABANDONED), *_oldest_first).subquery().c.id),
        _oldest_undelivered(),
    )
)

_TRIM_SLICE = 1_000

_COUNT_DELETED = (
    update(ledger)
    .where(*(column == bindparam(f"the_{column.name}") for column in ledger.primary_key))
    .values(events=ledger.c.events + bindparam("more"))
)
_FIRST_DELETED = insert(ledger).values({column.name: bindparam(column.name) for column in ledger.c})
_DELETED = select(ledger).order_by(*ledger.primary_key)


class Store:
    """The table of events in one database. Every method is one transaction; times are handed in, in ms."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._writer = Writer(engine)

    def insert(self, rows: Sequence[dict[str, Any]], *, max_rows: int, now_ms: int) -> tuple[list[int], bool]:
        """Insert rows and trim one slice of what is over the cap, in one transaction, for it costs one sync.

        Return the ids in the order of the rows, and whether more may be over the cap. A trim that fails is logged,
        and the rows are inserted without it.
        """
        trimming = False
        try:
            with self._writer.transaction() as transaction:
                ids = transaction.insert(_INSERT, rows)
                trimming = True
                deleted = _trim(transaction, max_rows=max_rows, now_ms=now_ms)
                trimming = False
            return ids, deleted == _TRIM_SLICE
        except Exception as error:
            if not trimming:
                raise
            log.warning("capping the queue failed, the events are kept: %s", error)
        with self._writer.transaction() as transaction:
            return transaction.insert(_INSERT, rows), False

    def insert_in(self, session: Session | scoped_session[Session], rows: Sequence[dict[str, Any]]) -> list[int]:
        """Insert rows on the connection of the caller's session, in its transaction, and do nothing else."""
        try:
            connection = session.connection(bind_arguments={"mapper": ObservationEvent})
        except UnboundExecutionError:  # a session that is bound by the host's own models
            connection = session.connection(bind_arguments={"bind": self.engine})
        return list(connection.scalars(_INSERT_IN_SESSION, rows))

    def claim(self, *, now_ms: int, lease_ms: int, batch_size: int) -> list[ClaimedRow]:
        """Move the oldest due rows to sending, under the lease; return them, oldest first."""
        with self._writer.transaction() as transaction:
            found = transaction.rows(_CLAIM, now=now_ms, lease=lease_ms, batch_size=batch_size)
        return sorted((ClaimedRow(*row) for row in found), key=lambda row: (row.created_at_ms, row.id))

    def renew(self, row_ids: Iterable[int], *, lease_ms: int, new_lease_ms: int) -> set[int]:
        """Put off the end of a lease; return the ids of the rows that were still held under it."""
        with self._writer.transaction() as transaction:
            return {
                row_id
                for row_id in row_ids
                if transaction.change(_RENEW, row_id=row_id, lease=lease_ms, new_lease=new_lease_ms)
            }

    def settle(self, outcomes: Iterable[tuple[int, Outcome]], *, lease_ms: int) -> Counter[str]:
        """Make the move of each row, one statement a trigger; return how many landed, by trigger.

        A fenced move that finds its row with another owner is left out; `deliver` needs no lease.
        """
        by_trigger: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row_id, outcome in outcomes:
            values = {f"new_{name}": value for name, value in outcome.values.items()}
            by_trigger[outcome.trigger].append({"row_id": row_id, "lease": lease_ms, **values})
        landed: Counter[str] = Counter()
        if by_trigger:
            with self._writer.transaction() as transaction:
                for trigger, rows in by_trigger.items():
                    landed[trigger] = transaction.change_many(_SETTLE[trigger], rows)
        return landed

    def unpark(self, *, now_ms: int, limit: int, spread_ms: int) -> int:
        """Bring back the oldest parked rows; return how many."""
        with self._writer.transaction() as transaction:
            return transaction.change(_UNPARK, now=now_ms, unpark_limit=limit, spread=spread_ms)

    def retry_now(self, *, now_ms: int) -> int:
        """Make every row due that is parked or waits; return how many."""
        with self._writer.transaction() as transaction:
            return transaction.change(_RETRY_NOW, now=now_ms)

    def requeue(self, *, cutoff_ms: int, now_ms: int, dry_run: bool) -> dict[str, int]:
        """Bring back the abandoned rows created before the cutoff; return how many by event type, by name."""
        with self._writer.transaction() as transaction:
            per_type = dict(transaction.rows(_COUNT_ABANDONED, cutoff=cutoff_ms))
            if per_type and not dry_run:
                transaction.change(_REQUEUE, cutoff=cutoff_ms, now=now_ms)
        return per_type

    def trim(self, *, max_rows: int, now_ms: int) -> int:
        """Delete what is over the cap, never a row in flight, in slices; return how many."""
        deleted = 0
        while True:
            with self._writer.transaction() as transaction:
                in_slice = _trim(transaction, max_rows=max_rows, now_ms=now_ms)
            deleted += in_slice
            if in_slice < _TRIM_SLICE:
                return deleted

    def pending_count(self) -> int:
        """Return how many rows are pending or sending."""
        with reading(self.engine) as connection:
            return connection.scalar(_PENDING_COUNT) or 0

    def overview(self) -> Overview:
        """Count the rows and find what keeps them back."""
        with reading(self.engine) as connection:
            parked = connection.execute(_LAST_PARKED).first()
            waiting = connection.execute(_MOST_WAITING).first()
            return Overview(
                counts=[(row[0], row[1], row[2]) for row in connection.execute(_COUNTS)],
                oldest_pending_ms=connection.scalar(_OLDEST_PENDING),
                next_due_at_ms=connection.scalar(_NEXT_DUE),
                parked=None if parked is None else Trouble(parked[0] or "", parked[1], 0),
                waiting=None if waiting is None else Trouble(*waiting),
                deleted=[Deleted(*row) for row in connection.execute(_DELETED)],
            )

    def oddities(self, *, now_ms: int, longest_lease_ms: int, soon_ms: int, latest_due_ms: int) -> Oddities:
        """Count rows whose times lie where they should not."""
        limits = {"now": now_ms, "longest_lease": longest_lease_ms, "soon": soon_ms, "latest_due": latest_due_ms}
        with reading(self.engine) as connection:
            return Oddities(*connection.execute(_ODDITIES, limits).one())

    def get(self, row_id: int) -> ObservationEvent | None:
        """Return one row, detached, or None."""
        with reading(self.engine) as connection, Session(connection, expire_on_commit=False) as session:
            return session.get(ObservationEvent, row_id)

    def find(
        self, *, status: str | None, event_type: str | None, created_before_ms: int | None, limit: int
    ) -> list[ObservationEvent]:
        """Return the oldest rows that fit all that is given, detached."""
        statement = select(ObservationEvent).order_by(*_oldest_first).limit(limit)
        if status is not None:
            statement = statement.where(_c.status == status)
        if event_type is not None:
            statement = statement.where(_c.event_type == event_type)
        if created_before_ms is not None:
            statement = statement.where(_c.created_at_ms < created_before_ms)
        with reading(self.engine) as connection, Session(connection, expire_on_commit=False) as session:
            return list(session.scalars(statement))


def _trim(transaction: Transaction, *, max_rows: int, now_ms: int) -> int:
    if (transaction.value(_ROWS_AT_MOST) or 0) <= max_rows:
        return 0
    excess = min(transaction.value(_ROWS) - max_rows, _TRIM_SLICE)
    deleted: Counter[tuple[Any, ...]] = Counter()
    for statement in _TRIM:
        missing = excess - deleted.total()
        if missing > 0:
            deleted.update(transaction.rows(statement, excess=missing, now=now_ms))
    _count_deleted(transaction, deleted, reason="cap")
    return deleted.total()


def _count_deleted(transaction: Transaction, deleted: Counter[tuple[Any, ...]], *, reason: str) -> None:
    for (status, found), number in deleted.items():
        # What is not UTF-8 can be read as it is, but not written.
        event_type = found.encode(errors="surrogateescape").decode(errors="replace")
        if not transaction.change(
            _COUNT_DELETED, the_status=status, the_event_type=event_type, the_reason=reason, more=number
        ):
            transaction.change(_FIRST_DELETED, status=status, event_type=event_type, reason=reason, events=number)
