"""What only reads: the look for chores, the numbers of `stats` and `doctor`, and single events."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Engine,
    Select,
    and_,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    or_,
    select,
    union_all,
)
from sqlalchemy.orm import Session

from outbox.destinations import DEFAULT_DESTINATION
from outbox.lifecycle import Status
from outbox.outcomes import WaitsFor
from outbox.policy import Policy
from outbox.records import Chores, Deleted, Oddities, Overview, Pause, Trouble
from outbox.storage.bounds import Bounds
from outbox.storage.column_types import INTEGERS, TIMES_BELOW
from outbox.storage.deletion import Deletion, is_expired
from outbox.storage.dialects import dialect_of
from outbox.storage.engines import reading
from outbox.storage.identity import Identity, give_id
from outbox.storage.pauses import IS_TROUBLED, PAUSED
from outbox.storage.revival import PARKED
from outbox.storage.row_counts import pending_rows
from outbox.storage.sql import (
    LAST_ID,
    columns,
    did_not_fail,
    failed_before,
    has_creation_time,
    has_due_time,
    is_one_of,
    literal,
    never_tried,
    now,
    of_destination,
    oldest_first,
    unindexed_status,
    was_tried,
)
from outbox.storage.tables import ObservationEvent, destinations_ledger, ledger
from outbox.storage.transactions import Writer, look

# Each has an order. Otherwise SQLite would scan the table until it finds a row.
CHORES = select(
    PARKED.limit(1).scalar_subquery(),
    select(columns.id)
    .where(is_expired, of_destination)
    .order_by(columns.sent_at_ms, columns.id)
    .limit(1)
    .scalar_subquery(),
    select(columns.id)
    .where(is_one_of(unindexed_status, Status.PENDING), failed_before, of_destination)
    .limit(1)
    .scalar_subquery(),
    IS_TROUBLED.scalar_subquery(),
    LAST_ID.scalar_subquery(),
)
LAST_ACCEPTED = (
    select(columns.sent_at_ms)
    .where(
        of_destination,
        is_one_of(unindexed_status, Status.SENT),
        columns.sent_at_ms < literal_column(str(TIMES_BELOW), BigInteger),
    )
    .order_by(columns.sent_at_ms.desc())
    .limit(1)
)

_undelivered = is_one_of(columns.status, Status.PENDING, Status.SENDING)
COUNTS = (
    select(columns.event_type, columns.status, func.count())
    .group_by(columns.event_type, columns.status)
    .order_by(columns.event_type)
)
_age_begins = case(
    (columns.not_before_ms > columns.created_at_ms, columns.not_before_ms), else_=columns.created_at_ms
)
OLDEST_PENDING = select(cast(func.min(_age_begins), BigInteger)).where(_undelivered, has_creation_time)
_waits = [columns.waits_for == literal(one) for one in WaitsFor]
_pending = is_one_of(unindexed_status, Status.PENDING)
# One look-up for each status and each reason to wait: no index has the order of the times over several of them.
_due_by_status = union_all(
    # These are due since they were created, so the oldest one was due first.
    select(
        select(columns.next_attempt_at_ms)
        .where(of_destination, _pending, did_not_fail, never_tried, has_creation_time, has_due_time)
        .order_by(*oldest_first)
        .limit(1)
        .scalar_subquery()
        .label("due")
    ),
    *(
        select(func.min(columns.next_attempt_at_ms)).where(of_destination, has_due_time, *conditions)
        for conditions in (
            (_pending, did_not_fail, was_tried),
            *((_pending, waits) for waits in _waits),
            # Its flusher died, or will be late.
            *(
                (is_one_of(columns.status, Status.SENDING), columns.next_attempt_at_ms <= now, waits)
                for waits in (did_not_fail, *_waits)
            ),
        )
    ),
).subquery()
NEXT_DUE = select(cast(func.min(_due_by_status.c.due), BigInteger))
LAST_PARKED = (
    select(columns.last_error, cast(columns.next_attempt_at_ms, BigInteger))
    .where(is_one_of(columns.status, Status.PARKED), has_due_time)
    .order_by(columns.next_attempt_at_ms.desc(), columns.id.desc())
    .limit(1)
)
_by_error = (
    select(
        columns.waits_for,
        columns.last_error,
        func.min(columns.next_attempt_at_ms).label("due"),
        func.count().label("events"),
    )
    .where(is_one_of(columns.status, Status.PENDING), columns.last_error.is_not(None), has_due_time)
    .group_by(columns.waits_for, columns.last_error)
    .subquery()
)
_kind = _by_error.c.waits_for
_kinds = select(
    _kind,
    _by_error.c.last_error,
    func.min(_by_error.c.due).over(partition_by=_kind).label("due"),
    func.sum(_by_error.c.events).over(partition_by=_kind).label("events"),
    func.row_number().over(partition_by=_kind, order_by=_by_error.c.events.desc()).label("place"),
).subquery()
WAITING = select(
    _kinds.c.waits_for, _kinds.c.last_error, cast(_kinds.c.due, BigInteger), cast(_kinds.c.events, BigInteger)
).where(_kinds.c.place == 1)
"""For each thing that rows wait for: their most frequent failure, when the first is due, and how many they are."""
_ledgers = union_all(
    *(select(*(one.c[name] for name in Deleted._fields)) for one in (ledger, destinations_ledger))
)
_counted = _ledgers.subquery().c
_kept_apart = (_counted.status, _counted.event_type, _counted.reason)
DELETED = (
    select(*_kept_apart, cast(func.sum(_counted.events), BigInteger)).group_by(*_kept_apart).order_by(*_kept_apart)
)
OTHER_DESTINATIONS = select(func.count(columns.destination.distinct())).where(
    columns.destination != literal_column(f"'{DEFAULT_DESTINATION}'"),
    columns.status != literal(Status.SENT),
)
_is_invalid = or_(
    *(
        or_(columns[name] >= below, columns[name] != cast(columns[name], BigInteger))
        for name, below in INTEGERS.items()
    )
)
_is_sending = is_one_of(columns.status, Status.SENDING)
_is_pending = is_one_of(columns.status, Status.PENDING)
ODDITIES = select(
    *(
        select(func.count()).where(condition).scalar_subquery()
        for condition in (
            and_(_is_sending, columns.next_attempt_at_ms <= now),
            and_(_is_sending, columns.next_attempt_at_ms > bindparam("latest_lease_until"), has_due_time),
            and_(columns.created_at_ms > bindparam("soon"), has_creation_time),
            and_(_is_pending, columns.next_attempt_at_ms > bindparam("latest_due"), has_due_time),
            and_(_undelivered, _is_invalid),
        )
    )
)


def _find(
    *,
    status: str | None,
    event_type: str | None,
    created_before_ms: int | None,
    due_after_ms: int | None,
    limit: int,
) -> Select[Any]:
    statement = select(ObservationEvent).order_by(*oldest_first).limit(limit)
    if status is not None:
        statement = statement.where(columns.status == status)
    if event_type is not None:
        statement = statement.where(columns.event_type == event_type)
    if created_before_ms is not None:
        statement = statement.where(columns.created_at_ms < created_before_ms)
    if due_after_ms is not None:
        statement = statement.where(_is_pending, columns.next_attempt_at_ms > due_after_ms)
    return statement


class Views:
    """Reads the queue. Each method sees one snapshot, and waits for no writer."""

    def __init__(
        self, engine: Engine, writer: Writer, deletion: Deletion, bounds: Bounds, identity: Identity
    ) -> None:
        self._engine = engine
        self._writer = writer
        self._deletion = deletion
        self._bounds = bounds
        self._identity = identity

    def chores(self, policy: Policy, destination: str = DEFAULT_DESTINATION, *, now_ms: int) -> Chores:
        """Return the maintenance that is due. Usually there is none, and this costs one query."""
        sent_before_ms = now_ms - policy.keep_sent_ms if policy.keep_sent_ms else 0
        parked, expired, failed, troubled, last_id = look(
            self._writer,
            lambda transaction: transaction.rows(CHORES, sent_before=sent_before_ms, destination=destination),
        )[0]
        return Chores(
            destination,
            is_any_parked=parked is not None,
            is_any_expired=expired is not None,
            is_any_failed=failed is not None,
            is_troubled=troubled is not None,
            may_be_over_cap=self._deletion.may_be_over(
                self._deletion.cap(policy, destination), last_id=last_id or 0
            ),
            may_be_over_bounds=self._bounds.may_be_over(policy, destination),
        )

    def last_accepted_ms(self, destination: str = DEFAULT_DESTINATION) -> int | None:
        """Return when a destination last accepted a row, as far as the rows tell."""
        found: int | None = look(
            self._writer, lambda transaction: transaction.value(LAST_ACCEPTED, destination=destination)
        )
        return found

    def pending_count(self, destination: str = DEFAULT_DESTINATION) -> int:
        """Return how many rows of a destination are pending or sending."""
        query = pending_rows(dialect_of(self._engine))
        with reading(self._engine) as connection:
            return connection.scalar(query, {"destination": destination}) or 0

    def next_due_ms(self, destination: str = DEFAULT_DESTINATION, *, now_ms: int) -> int | None:
        """Return when the next row is due: one that is pending, or one whose flusher let its lease run out."""
        # On the writer's connection, because a worker asks, and there may be no file descriptor for another one.
        this = {"destination": destination, "now": now_ms}
        due_ms: int | None = look(self._writer, lambda transaction: transaction.value(NEXT_DUE, **this))
        return due_ms

    def overview(self, destination: str = DEFAULT_DESTINATION, *, now_ms: int) -> Overview:
        """Count the rows of all destinations, and find why they wait. `next_due_at_ms` is for one destination."""
        with reading(self._engine) as connection:
            parked = connection.execute(LAST_PARKED).first()
            waiting = connection.execute(WAITING).all()
            return Overview(
                counts=[(row[0], row[1], row[2]) for row in connection.execute(COUNTS)],
                oldest_pending_ms=connection.scalar(OLDEST_PENDING),
                next_due_at_ms=connection.scalar(NEXT_DUE, {"destination": destination, "now": now_ms}),
                parked=None if parked is None else Trouble(parked[0] or "", parked[1], 0),
                waiting={waits_for: Trouble(*trouble) for waits_for, *trouble in waiting},
                deleted=[Deleted(*row) for row in connection.execute(DELETED)],
                pauses=[Pause(*row) for row in connection.execute(PAUSED, {"now": now_ms})],
                without_policy=dialect_of(self._engine).hidden_commands(connection),
            )

    def pauses(self, *, now_ms: int) -> list[Pause]:
        """Return the destinations that failed and have accepted nothing since; their pause may be over."""
        with reading(self._engine) as connection:
            return [Pause(*row) for row in connection.execute(PAUSED, {"now": now_ms})]

    def other_destinations(self) -> int:
        """Count the destinations beside the default one that have undelivered rows. It reads the whole table."""
        with reading(self._engine) as connection:
            return connection.scalar(OTHER_DESTINATIONS) or 0

    def oddities(self, *, now_ms: int, latest_lease_until_ms: int, soon_ms: int, latest_due_ms: int) -> Oddities:
        """Count rows whose times or numbers are implausible."""
        limits = {
            "now": now_ms,
            "latest_lease_until": latest_lease_until_ms,
            "soon": soon_ms,
            "latest_due": latest_due_ms,
        }
        with reading(self._engine) as connection:
            return Oddities(*connection.execute(ODDITIES, limits).one())

    def outbox_id(self) -> str:
        """Return the id of the outbox."""
        with reading(self._engine) as connection:
            return self._identity.outbox_id(connection.scalar)

    def get(self, row_id: int) -> ObservationEvent | None:
        """Return one row, detached and with an event id, or None."""
        with reading(self._engine) as connection, Session(connection, expire_on_commit=False) as session:
            row = session.get(ObservationEvent, row_id)
            return None if row is None else give_id(row, self._identity.outbox_id(connection.scalar))

    def find(
        self,
        *,
        status: str | None,
        event_type: str | None,
        created_before_ms: int | None,
        due_after_ms: int | None,
        limit: int,
    ) -> list[ObservationEvent]:
        """Return the oldest rows that meet all given conditions. They are detached, and each has an event id."""
        statement = _find(
            status=status,
            event_type=event_type,
            created_before_ms=created_before_ms,
            due_after_ms=due_after_ms,
            limit=limit,
        )
        with reading(self._engine) as connection, Session(connection, expire_on_commit=False) as session:
            outbox_id = self._identity.outbox_id(connection.scalar)
            return [give_id(row, outbox_id) for row in session.scalars(statement)]
