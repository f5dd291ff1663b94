"""The numbers of `stats` and `doctor`."""

from __future__ import annotations

from collections import defaultdict

from sqlalchemy import (
    BigInteger,
    Engine,
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

from outbox.destinations import DEFAULT_DESTINATION
from outbox.lifecycle import Status
from outbox.records import Counted, Deleted, Oddities, Overview, Pause, Trouble
from outbox.storage.column_types import INTEGERS
from outbox.storage.dialects import dialect_of
from outbox.storage.due_times import due
from outbox.storage.engines import reading
from outbox.storage.holds import lasting
from outbox.storage.pauses import PAUSED
from outbox.storage.sql import columns, failed_before, has_creation_time, has_due_time, has_status, literal, now
from outbox.storage.tables import destinations_ledger, ledger

_queued = has_status(Status.PENDING, Status.SENDING)
_kinds_of_rows = (columns.destination, columns.event_type, columns.status, failed_before)
COUNTS = (
    select(*_kinds_of_rows, func.count())
    .group_by(*_kinds_of_rows)
    .order_by(columns.event_type, columns.destination)
)
_age_begins = case(
    (columns.not_before_ms > columns.created_at_ms, columns.not_before_ms), else_=columns.created_at_ms
)
OLDEST_PENDING = select(cast(func.min(_age_begins), BigInteger)).where(_queued, has_creation_time)
LAST_PARKED = (
    select(columns.last_error, cast(columns.next_attempt_at_ms, BigInteger), columns.destination)
    .where(has_status(Status.PARKED), has_due_time)
    .order_by(columns.next_attempt_at_ms.desc(), columns.id.desc())
    .limit(1)
)
_by_error = (
    select(
        columns.waits_for,
        columns.last_error,
        columns.destination,
        func.min(columns.next_attempt_at_ms).label("due"),
        func.count().label("events"),
    )
    .where(has_status(Status.PENDING), columns.last_error.is_not(None), has_due_time)
    .group_by(columns.waits_for, columns.last_error, columns.destination)
    .subquery()
)
_apart = (_by_error.c.waits_for, _by_error.c.destination)
_kinds = select(
    *_apart,
    _by_error.c.last_error,
    func.min(_by_error.c.due).over(partition_by=_apart).label("due"),
    func.sum(_by_error.c.events).over(partition_by=_apart).label("events"),
    func.row_number().over(partition_by=_apart, order_by=_by_error.c.events.desc()).label("place"),
).subquery()
WAITING = (
    select(
        _kinds.c.waits_for,
        _kinds.c.last_error,
        cast(_kinds.c.due, BigInteger),
        cast(_kinds.c.events, BigInteger),
        _kinds.c.destination,
    )
    .where(_kinds.c.place == 1)
    .order_by(_kinds.c.events.desc())
)
"""For each thing that rows of a destination wait for: their most frequent failure, when the first is due, and how
many they are."""
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
_is_sending = has_status(Status.SENDING)
_is_pending = has_status(Status.PENDING)
ODDITIES = select(
    *(
        select(func.count()).where(condition).scalar_subquery()
        for condition in (
            and_(_is_sending, columns.next_attempt_at_ms <= now),
            and_(_is_sending, columns.next_attempt_at_ms > bindparam("latest_lease_until"), has_due_time),
            and_(columns.created_at_ms > bindparam("soon"), has_creation_time),
            and_(_is_pending, columns.next_attempt_at_ms > bindparam("latest_due"), has_due_time),
            and_(_queued, _is_invalid),
        )
    )
)


class Figures:
    """Counts and sums over the whole table. Each method sees one snapshot, and waits for no writer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def overview(self, *, now_ms: int) -> Overview:
        """Count the rows of all destinations, and find why they wait."""
        with reading(self._engine) as connection:
            parked = connection.execute(LAST_PARKED).first()
            waiting: defaultdict[str | None, list[Trouble]] = defaultdict(list)
            for waits_for, *trouble in connection.execute(WAITING):
                waiting[waits_for].append(Trouble(*trouble))
            return Overview(
                counts=[Counted(*row) for row in connection.execute(COUNTS)],
                oldest_pending_ms=connection.scalar(OLDEST_PENDING),
                due=due(connection, now_ms=now_ms),
                parked=None if parked is None else Trouble(parked[0] or "", parked[1], 0, parked[2]),
                waiting=dict(waiting),
                deleted=[Deleted(*row) for row in connection.execute(DELETED)],
                pauses=[Pause(*row) for row in connection.execute(PAUSED, {"now": now_ms})],
                holds=lasting(connection, now_ms=now_ms),
                without_policy=dialect_of(self._engine).hidden_commands(connection),
            )

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
