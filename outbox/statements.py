"""The SQL statements. What each is for stands at the method of the store that runs it."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    CompoundSelect,
    Insert,
    Select,
    Table,
    Text,
    Update,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal_column,
    null,
    or_,
    select,
    table,
    union_all,
    update,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from outbox.lifecycle import MOVES, Status
from outbox.models import (
    DELIVERED_ON_MYSQL,
    MYSQL,
    QUEUE_ON_MYSQL,
    VERSION_TABLE,
    ObservationEvent,
    destinations,
    ledger,
)

events: Table = ObservationEvent.__table__  # type: ignore[assignment]  # it is declared with a table, not a join
_c = events.c


class ClaimedRow(NamedTuple):
    """What a flusher has to know of a row that it holds."""

    id: int
    event_type: str
    payload_json: str
    retry_count: int
    created_at_ms: int
    revived_at_ms: int | None


class _Unindexed(FunctionElement[Any]):
    """A column where SQLite's planner must not choose an index by it; elsewhere just the column.

    By the status it would rather walk the baseline's index through all rows of a state than look up the few ids
    that are asked for, or take the partial index that has the wanted order.
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
    return statement.where(_this_row, _held) if declared.fenced else statement


def _lock(statement: Select[Any]) -> Select[Any]:
    # On servers, rows that another transaction works on are left to it; SQLite has one writer at a time.
    return statement.with_for_update(skip_locked=True)


def _in_order(statement: Select[Any], index: str) -> Select[Any]:
    # MySQL locks what it sorts, everything that fits, and others would find nothing. So it has to walk an index
    # that has the order, which it does only for one status at a time.
    for dialect in MYSQL:
        statement = statement.with_hint(events, f"FORCE INDEX ({index})", dialect)
    return statement


CHUNK = 64
"""How many rows a statement for several names: always as many, so that it is compiled, and prepared, only once."""

_this_row = _c.id == bindparam("row_id")
_these_rows = _c.id.in_([bindparam(f"id_{number}", type_=BigInteger) for number in range(CHUNK)])
_held = _c.next_attempt_at_ms == bindparam("lease")
_now = bindparam("now", type_=BigInteger)
_oldest_first = (_c.created_at_ms, _c.id)

INSERTED = (
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
INSERT = insert(events).values({name: bindparam(name) for name in INSERTED})
INSERT_IN_SESSION = insert(events).returning(_c.id, sort_by_parameter_order=True)

CHANNEL = "observation_events"
"""What PostgreSQL notifies of at the commit of new events.

Outboxes in other schemas of a database share it; a flusher that is woken for one of theirs finds nothing.
"""
# In the statement itself it needs no further round trip. Equal ones of a transaction are sent once.
_notify: ColumnElement[Any] = literal_column(f"pg_notify('{CHANNEL}', '')")
INSERT_AND_NOTIFY = INSERT.returning(_c.id, _notify)


@cache
def insert_rows(number: int, *, notify: bool) -> Insert:
    """Return the statement that inserts several rows and returns their ids, bound by the names below."""
    names = iter(inserted_names(number))
    rows: list[dict[str, Any]] = [{name: bindparam(next(names)) for name in INSERTED} for _ in range(number)]
    inserted = insert(events).values(rows).returning(_c.id)
    return inserted.returning(_notify) if notify else inserted


@cache
def inserted_names(number: int) -> list[str]:
    """Return the names by which the columns of several rows are bound, row after row."""
    return [f"{name}_{row}" for row in range(number) for name in INSERTED]


INSERT_AND_NOTIFY_IN_SESSION = insert(events).returning(_c.id, _notify, sort_by_parameter_order=True)


def _due_in(*statuses: Status) -> Select[Any]:
    return (
        select(*(_c[name] for name in ClaimedRow._fields))
        .where(_in(_unindexed_status, *statuses), _c.next_attempt_at_ms <= _now)
        .order_by(*_oldest_first)
        .limit(bindparam("batch_size"))
    )


_due = _due_in(*MOVES["claim"].sources)


class Place(NamedTuple):
    """Where a row stands in the order of the claim, and when it is due."""

    created_at_ms: int
    id: int
    next_attempt_at_ms: int


def _places(*conditions: ColumnElement[bool], order: tuple[Any, ...] = _oldest_first) -> Select[Any]:
    places = select(*(_c[name] for name in Place._fields)).where(*conditions)
    return places.order_by(*order).limit(bindparam("batch_size"))


_is_due = _c.next_attempt_at_ms <= _now
_is_pending = _in(_unindexed_status, Status.PENDING)
_never_tried = _c.next_attempt_at_ms <= _c.created_at_ms
_was_tried = _c.next_attempt_at_ms > _c.created_at_ms
# On SQLite, each finds the oldest of its kind in an index of theirs.
DUE_NEVER_TRIED = _places(_is_pending, _never_tried, _is_due)
OLDEST_TRIED = _places(_is_pending, _was_tried)
DUE_TRIED = _places(_is_pending, _was_tried, _is_due, order=(_Unindexed(_c.created_at_ms), _c.id))
LEASES_RUN_OUT = _places(_in(_c.status, Status.SENDING), _is_due)


def _claim_on_postgresql(due: Select[Any]) -> Update:
    # Materialised, or PostgreSQL might run the sub-select again for each row and lock more than a batch.
    chosen = _lock(due.with_only_columns(_c.id)).cte("chosen").prefix_with("MATERIALIZED", dialect="postgresql")
    return (
        move("claim")
        .where(_c.id == chosen.c.id)
        .values(next_attempt_at_ms=bindparam("lease"))
        .returning(*(_c[name] for name in ClaimedRow._fields))
    )


_this_destination = destinations.c.destination == bindparam("destination")
CLAIM_POSTGRESQL = _claim_on_postgresql(_due)
CLAIM_UNPAUSED_POSTGRESQL = _claim_on_postgresql(_due.where(~exists().where(_this_destination)))
LOCK_DUE = tuple(_in_order(_lock(_due_in(status)), QUEUE_ON_MYSQL) for status in MOVES["claim"].sources)
"""The oldest due rows of each status, on MySQL."""

CLAIM_ROWS = move("claim").where(_these_rows).values(next_attempt_at_ms=bindparam("lease"))
CLAIM_ROWS_ON_SQLITE = CLAIM_ROWS.returning(*(_c[name] for name in ClaimedRow._fields))

RENEW = (
    update(events)
    .where(_this_row, _in(_unindexed_status, Status.SENDING), _held)
    .values(next_attempt_at_ms=bindparam("new_lease"))
)

DELIVER = move("deliver").where(_these_rows).values(sent_at_ms=bindparam("new_sent_at_ms"))
SETTLE = {
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

_parked = (
    select(_c.id)
    .where(_in(_unindexed_status, Status.PARKED))
    .order_by(*_oldest_first)
    .limit(bindparam("unpark_limit"))
)
LOCK_PARKED = _in_order(_lock(_parked), QUEUE_ON_MYSQL)
UNPARK_ROWS = (
    move("unpark").where(_these_rows).values(next_attempt_at_ms=_now + _c.id % bindparam("spread"), **_REVIVED)
)

# Two statements, for in one with a CASE on the status MySQL would look at the status that it has just set.
RETRY_PARKED = (
    move("retry_now", status=_c.status)
    .where(_in(_c.status, Status.PARKED))
    .values(next_attempt_at_ms=_now, revived_at_ms=_now)
)
RETRY_WAITING = (
    move("retry_now", status=_c.status)
    .where(_in(_c.status, Status.PENDING), _c.next_attempt_at_ms > _now)
    .values(next_attempt_at_ms=_now)
)

OLD_ABANDONED = (
    select(_c.id, _c.event_type)
    .where(_in(_unindexed_status, Status.ABANDONED), _c.created_at_ms < bindparam("cutoff"))
    .order_by(_c.id)
)
LOCK_OLD_ABANDONED = OLD_ABANDONED.with_for_update()
REQUEUE_ROWS = move("requeue").where(_these_rows).values(next_attempt_at_ms=_now, **_REVIVED)


# What the cap deletes


class Deletable(NamedTuple):
    """What has to be known of a row to delete it in its turn, and to count it."""

    id: int
    status: str
    event_type: str
    age_ms: int
    """When it was created, or sent."""


# A row under a lease that runs is in flight.
_not_in_flight = or_(_c.status != _literal(Status.SENDING), _c.next_attempt_at_ms <= _now)


def _oldest(
    *statuses: Status,
    status: ColumnElement[str] = _unindexed_status,
    only: ColumnElement[bool] | None = None,
    by: ColumnElement[Any] = _c.created_at_ms,
    index: str = QUEUE_ON_MYSQL,
) -> Select[Any]:
    found = select(_c.id, _c.status, _c.event_type, by).where(_in(status, *statuses)).order_by(by, _c.id)
    if only is not None:
        found = found.where(only)
    if Status.SENDING in statuses:
        found = found.where(_not_in_flight)
    return _in_order(_lock(found.limit(bindparam("excess"))), index)


def _oldest_of(*kinds: Select[Any]) -> CompoundSelect[Any]:
    """Return one query for several: on SQLite it is the number of queries that costs."""
    union = union_all(*(select(kind.subquery()) for kind in kinds))
    columns = union.selected_columns
    return union.order_by(columns.created_at_ms, columns.id).limit(bindparam("excess"))


_trim_first = (
    (_oldest(Status.SENT, by=_c.sent_at_ms, index=DELIVERED_ON_MYSQL),),
    (_oldest(Status.ABANDONED),),
)
_trim_last: dict[str, tuple[Select[Any] | CompoundSelect[Any], ...]] = {
    "postgresql": (_oldest(Status.PENDING, Status.SENDING), _oldest(Status.PARKED)),
    "sqlite": (
        _oldest_of(
            _oldest(Status.PENDING, only=_never_tried),
            _oldest(Status.PENDING, only=_was_tried),
            _oldest(Status.SENDING, status=_c.status),
            _oldest(Status.PARKED),
        ),
    ),
    **{name: tuple(_oldest(one) for one in (Status.PENDING, Status.SENDING, Status.PARKED)) for name in MYSQL},
}
TRIM = {dialect: (*_trim_first, last) for dialect, last in _trim_last.items()}
"""The rows to delete while there are too many: first those of the first queries, oldest first, and so on.

Each query walks one index in order and stops at the limit, but for the few rows that are being sent on SQLite.
"""

_expired = and_(_in(_unindexed_status, Status.SENT), _c.sent_at_ms < bindparam("sent_before"))
EXPIRED = _in_order(
    _lock(
        select(_c.id, _c.status, _c.event_type, _c.sent_at_ms)
        .where(_expired)
        .order_by(_c.sent_at_ms, _c.id)
        .limit(bindparam("slice_size"))
    ),
    DELIVERED_ON_MYSQL,
)

DELETE_ROW = delete(events).where(_this_row)
DELETE_ROWS = delete(events).where(_these_rows)

LAST_ID = select(func.max(_c.id))
# Each in its order, or SQLite would rather walk the whole table until it comes upon one.
CHORES = select(
    _parked.limit(1).scalar_subquery(),
    select(_c.id).where(_expired).order_by(_c.sent_at_ms, _c.id).limit(1).scalar_subquery(),
    LAST_ID.scalar_subquery(),
)
ROWS = select(func.count()).select_from(events)
UNDELIVERED_ROWS = select(func.count()).where(
    _in(_c.status, *(status for status in Status if status != Status.SENT))
)
TRIMMING: Select[Any] = select(literal_column("version_num")).select_from(table(VERSION_TABLE)).with_for_update()
"""A row that is always there: on servers, who locks it trims."""
# No more rows than this. SQLite looks only at the ends of the primary key, provided each is asked for alone.
ROWS_AT_MOST = select(select(func.max(_c.id)).scalar_subquery() - select(func.min(_c.id)).scalar_subquery() + 1)


# What an operator deletes

_for_purge = (
    *(_c[name] for name in ("id", "status", "event_type", "created_at_ms")),
    and_(_c.status == _literal(Status.SENDING), _c.next_attempt_at_ms > _now).label("is_in_flight"),
)
LOCK_ROWS_TO_PURGE = select(*_for_purge).where(_these_rows).order_by(_c.id).with_for_update()


def to_purge(*, event_type: str | None, created_before_ms: int | None) -> Select[Any]:
    """Return the query for a slice of the rows that fit, with the ids after `seen`, up to `last`.

    No index has the order of all states by type or creation, so all slices together walk the primary key once. On
    SQLite the plus keeps each of them from sorting all rows of the type, by the baseline's index.
    """
    statement = (
        select(*_for_purge)
        .where(_c.id > bindparam("seen"), _c.id <= bindparam("last"))
        .order_by(_c.id)
        .limit(bindparam("slice_size"))
    )
    if event_type is not None:
        statement = statement.where(_Unindexed(_c.event_type) == event_type)
    if created_before_ms is not None:
        statement = statement.where(_c.created_at_ms < created_before_ms)
    return statement


@cache
def count_deleted(dialect: str) -> Insert:
    """Return the statement that adds to an entry of the ledger, or begins it; each dialect has its own."""
    values: dict[str, Any] = {column.name: bindparam(column.name) for column in ledger.c}
    if dialect in MYSQL:
        from sqlalchemy.dialects import mysql  # noqa: PLC0415 - a dialect is loaded only where it is used

        counted: Any = mysql.insert(ledger).values(values)
        added: Insert = counted.on_duplicate_key_update(events=ledger.c.events + counted.inserted.events)
    else:
        from sqlalchemy.dialects import postgresql, sqlite  # noqa: PLC0415 - as above

        counted = (postgresql if dialect == "postgresql" else sqlite).insert(ledger).values(values)
        added = counted.on_conflict_do_update(
            index_elements=list(ledger.primary_key), set_={"events": ledger.c.events + counted.excluded.events}
        )
    return added


# What is left alone


class Pause(NamedTuple):
    """A service that failed, and is left alone."""

    destination: str
    failures: int
    paused_until_ms: int
    probe_until_ms: int
    last_error: str

    @property
    def until_ms(self) -> int:
        """When the next flusher may try, as a probe."""
        return max(self.paused_until_ms, self.probe_until_ms)


_seen = destinations.c.failures == bindparam("seen")
PAUSES = select(*(destinations.c[name] for name in Pause._fields)).order_by(destinations.c.destination)
PAUSE = PAUSES.where(_this_destination)
LOCK_PAUSE = PAUSE.with_for_update()
CHANGE_PAUSE = (
    update(destinations)
    .where(_this_destination)
    .values({name: bindparam(f"new_{name}") for name in Pause._fields[1:]})
)
BEGIN_PROBE = (
    update(destinations)
    .where(_this_destination, _seen, destinations.c.paused_until_ms <= _now, destinations.c.probe_until_ms <= _now)
    .values(probe_until_ms=bindparam("lease"))
)
END_PROBE = (
    update(destinations)
    .where(_this_destination, destinations.c.probe_until_ms == bindparam("lease"))
    .values(probe_until_ms=0)
)
RESUME = delete(destinations).where(_this_destination, _seen)
RESUME_ALL = delete(destinations)


@cache
def new_destination(dialect: str) -> Insert:
    """Return the statement that makes a destination known, if it is not; each dialect has its own."""
    values: dict[str, Any] = {
        "destination": bindparam("destination"),
        "failures": 0,
        "paused_until_ms": 0,
        "probe_until_ms": 0,
        "last_error": "",
    }
    if dialect in MYSQL:
        from sqlalchemy.dialects import mysql  # noqa: PLC0415 - as above

        there: Insert = (
            mysql.insert(destinations).values(values).on_duplicate_key_update(failures=destinations.c.failures)
        )
    else:
        from sqlalchemy.dialects import postgresql  # noqa: PLC0415 - as above

        there = postgresql.insert(destinations).values(values).on_conflict_do_nothing()
    return there


# What is there


@cache
def now(dialect: str) -> Select[Any]:
    """Return the query for the server's clock, in ms."""
    if dialect == "postgresql":
        return select(literal_column("CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)"))
    # From UTC: a time of the session's zone is ambiguous for an hour when summer ends.
    return select(literal_column("timestampdiff(MICROSECOND, '1970-01-01', utc_timestamp(6)) DIV 1000"))


_undelivered = _in(_c.status, Status.PENDING, Status.SENDING)
PENDING_COUNT = select(func.count()).where(_undelivered)
COUNTS = select(_c.event_type, _c.status, func.count()).group_by(_c.event_type, _c.status).order_by(_c.event_type)
OLDEST_PENDING = select(func.min(_c.created_at_ms)).where(_undelivered)
# By one look-up for each state: over both at once the index would not be in the order of the times.
_due_by_state = union_all(
    *(
        select(func.min(_c.next_attempt_at_ms).label("due")).where(condition)
        for condition in (
            _in(_c.status, Status.PENDING),
            # Whoever holds it has died, or will come late.
            and_(_in(_c.status, Status.SENDING), _c.next_attempt_at_ms <= _now),
        )
    )
).subquery()
NEXT_DUE = select(func.min(_due_by_state.c.due))
LAST_PARKED = (
    select(_c.last_error, _c.next_attempt_at_ms)
    .where(_in(_c.status, Status.PARKED))
    .order_by(_c.next_attempt_at_ms.desc(), _c.id.desc())
    .limit(1)
)
MOST_WAITING = (
    select(_c.last_error, func.min(_c.next_attempt_at_ms), func.count())
    .where(_in(_c.status, Status.PENDING), _c.last_error.is_not(None))
    .group_by(_c.last_error)
    .order_by(func.count().desc())
    .limit(1)
)
DELETED = select(ledger).order_by(*ledger.primary_key)
ODDITIES = select(
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


def find(*, status: str | None, event_type: str | None, created_before_ms: int | None, limit: int) -> Select[Any]:
    """Return the query for the oldest rows that fit all that is given."""
    statement = select(ObservationEvent).order_by(*_oldest_first).limit(limit)
    if status is not None:
        statement = statement.where(_c.status == status)
    if event_type is not None:
        statement = statement.where(_c.event_type == event_type)
    if created_before_ms is not None:
        statement = statement.where(_c.created_at_ms < created_before_ms)
    return statement
