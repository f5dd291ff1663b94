"""The tables: events, their failed tries, ledgers of deleted events, destinations with their pauses and holds."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Index,
    Integer,
    MetaData,
    Table,
    event,
    insert,
    inspect,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.orm.attributes import set_attribute
from sqlalchemy.sql.functions import FunctionElement

from outbox import outcomes
from outbox.failures import IllegalTransition
from outbox.lifecycle import Status, fire, machine, moves
from outbox.storage.column_types import Id, LongText, Name, ShortText, TextDefault
from outbox.storage.dialects import dialect_of
from outbox.storage.indexes import event_indexes

VERSION_TABLE = "outbox_alembic_version"
"""A version table of our own: the application's Alembic history in the same database stays untouched."""


class _KnownStatus(FunctionElement[Any]):
    """The condition that `status` is one of the machine's, which is asked only when a table is created."""

    inherit_cache = True


@compiles(_KnownStatus)
def _statuses_in_sql(_element: _KnownStatus, _compiler: object, **_: object) -> str:
    return f"status IN ({', '.join(repr(status) for status in machine().states)})"


class Base(DeclarativeBase):
    """The declarative base of the outbox's own tables, apart from those of the application."""


class ObservationEvent(Base):
    """One event on its way. All times are Unix epoch milliseconds, UTC.

    The methods that are named after the moves change `status`; it can't be assigned. They only set attributes of
    this object. Each raises `IllegalTransition` if the move does not start from the row's status. Only the store
    writes `status` to the database: an ORM flush that would write it is refused, because it does not check the
    lease.
    """

    __tablename__ = "observation_events"

    id: Mapped[int] = mapped_column(Id, primary_key=True, autoincrement=True)
    event_type: Mapped[str] = mapped_column(Name)
    rule_id: Mapped[str | None] = mapped_column(LongText)
    rule_ids_json: Mapped[str] = mapped_column(LongText, server_default=TextDefault("'[]'"))
    session_id: Mapped[str] = mapped_column(LongText, server_default=TextDefault("''"))
    file_path: Mapped[str | None] = mapped_column(LongText)
    occurred_at_ms: Mapped[int] = mapped_column(BigInteger)
    payload_json: Mapped[str] = mapped_column(LongText)
    status: Mapped[str] = mapped_column(Name, server_default=text("'pending'"))
    retry_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    """How often the event failed since it was created, unparked or requeued. A 429 is not counted."""
    next_attempt_at_ms: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    """When the row is due; while it is `sending`, when its lease ends."""
    last_error: Mapped[str | None] = mapped_column(LongText)
    created_at_ms: Mapped[int] = mapped_column(BigInteger)
    sent_at_ms: Mapped[int | None] = mapped_column(BigInteger)
    revived_at_ms: Mapped[int | None] = mapped_column(BigInteger)
    """When the row last returned to the queue from parked or abandoned."""
    suspected_at_ms: Mapped[int | None] = mapped_column(BigInteger)
    """When the service first rejected the row alone."""
    waits_for: Mapped[str | None] = mapped_column(ShortText)
    """Why a pending row waits, a value of `WaitsFor`; NULL if it has not failed since its last full new chance."""
    lost_leases: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    """How many leases in a row ran out: how often a flusher died, or was late, since the last outcome."""
    destination: Mapped[str] = mapped_column(Name, server_default=text("''"))
    """The service that the event goes to."""
    event_id: Mapped[str | None] = mapped_column(Name)
    """The caller's own id of the event, unique in its destination; NULL if the caller gave none."""
    not_before_ms: Mapped[int | None] = mapped_column(BigInteger)
    """When the row may be sent at the earliest."""
    trace_context: Mapped[str | None] = mapped_column(LongText)
    """The W3C trace context of the `enqueue`, as JSON."""

    __table_args__ = (
        CheckConstraint(_KnownStatus(), name="observation_events_status_check"),
        *event_indexes(),
    )

    def __init__(self, **columns: Any) -> None:
        status = Status(columns.pop("status", Status.PENDING)).value
        defaults = {
            "rule_ids_json": "[]",
            "session_id": "",
            "retry_count": 0,
            "next_attempt_at_ms": 0,
            "lost_leases": 0,
            "destination": "",
        }
        super().__init__(**{**defaults, **columns})
        set_attribute(self, "status", status)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "status":
            raise IllegalTransition(
                f"status of event {self.id} can't be assigned, it is changed by a move: {', '.join(moves())}"
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"<ObservationEvent {self.id} {self.event_type} {self.status}>"

    @property
    def _machine_status(self) -> str:
        return self.status

    @_machine_status.setter
    def _machine_status(self, status: str) -> None:
        set_attribute(self, "status", status)

    def _move(self, outcome: outcomes.Outcome) -> None:
        fire(self, outcome.trigger)
        for name, value in outcome.values.items():
            is_due_time = name == "next_attempt_at_ms" and outcome.trigger != "claim"
            setattr(self, name, max(value, self.not_before_ms or 0) if is_due_time else value)

    def claim(self, *, now_ms: int, lease_ms: int) -> None:
        """Take the row under a lease that ends at now + `lease_ms`. The row has to be due."""
        if self.next_attempt_at_ms > now_ms:
            raise IllegalTransition(f"event {self.id} is not due before {self.next_attempt_at_ms}, it is {now_ms}")
        lost_leases = self.lost_leases + (self.status == Status.SENDING)
        self._move(outcomes.claim(lease_until_ms=now_ms + lease_ms, lost_leases=lost_leases))

    def deliver(self, *, sent_at_ms: int) -> None:
        """Record that the service accepted the event."""
        self._move(outcomes.deliver(sent_at_ms=sent_at_ms))

    def reschedule(
        self, *, retry_count: int, next_attempt_at_ms: int, error: str, waits_for: outcomes.WaitsFor
    ) -> None:
        """Let the row wait until `next_attempt_at_ms`."""
        self._move(
            outcomes.reschedule(
                retry_count=retry_count,
                next_attempt_at_ms=next_attempt_at_ms,
                last_error=error,
                waits_for=waits_for.value,
                suspected_at_ms=self.suspected_at_ms,
            )
        )

    def park(self, *, error: str) -> None:
        """Stop the row until the service accepts the token again."""
        self._move(outcomes.park(last_error=error))

    def abandon(self, *, error: str) -> None:
        """Give up on the row. It stays in the table, with the reason."""
        self._move(outcomes.abandon(last_error=error))

    def release(self, *, now_ms: int) -> None:
        """Return the row to the queue without a try."""
        self._move(outcomes.release(next_attempt_at_ms=now_ms))

    def unpark(self, *, now_ms: int, spread_ms: int) -> None:
        """Give the row a full new chance, at a time within `spread_ms` that its id decides."""
        self._move(outcomes.unpark(row_id=self.id, now_ms=now_ms, spread_ms=spread_ms))

    def retry_now(self, *, now_ms: int) -> None:
        """Make a waiting or parked row due."""
        if self.status == Status.PENDING and self.next_attempt_at_ms <= now_ms:
            raise IllegalTransition(f"event {self.id} is due already, since {self.next_attempt_at_ms}")
        self._move(outcomes.retry_now(now_ms=now_ms, is_parked=self.status == Status.PARKED))

    def revive(self, *, next_attempt_at_ms: int) -> None:
        """Make a waiting row due earlier."""
        if self.next_attempt_at_ms <= next_attempt_at_ms:
            raise IllegalTransition(f"event {self.id} is due no later, at {self.next_attempt_at_ms}")
        self._move(outcomes.revive(next_attempt_at_ms=next_attempt_at_ms))

    def cancel(self, *, reason: str) -> None:
        """Give up on the row, because its event is no longer wanted."""
        self._move(outcomes.cancel(last_error=reason))

    def requeue(self, *, now_ms: int) -> None:
        """Give an abandoned row a full new chance."""
        self._move(outcomes.requeue(now_ms=now_ms))


ledger = Table(
    "observation_events_ledger",
    Base.metadata,
    Column("status", Name, primary_key=True),  # the status of the events when they were deleted
    Column("event_type", Name, primary_key=True),
    Column("reason", Name, primary_key=True),
    Column("events", BigInteger, nullable=False),
)
"""The number of events of one kind that were deleted for one reason, over the life of the database.

It is written in the transaction that deletes, so rows ever enqueued = rows there + events counted here.
"""

destinations = Table(
    "observation_destinations",
    Base.metadata,
    Column("destination", Name, primary_key=True),
    Column("failures", Integer, nullable=False),
    Column("paused_until_ms", BigInteger, nullable=False),
    Column("probe_until_ms", BigInteger, nullable=False),
    Column("last_error", LongText, nullable=False),
    Column("pauses", Integer, nullable=False, server_default=text("0")),  # `SharedPause.number`
    Column("is_asked", Integer, nullable=False, server_default=text("0")),
    Column("probe_failed_before", Integer, nullable=False, server_default=text("0")),
    # When a parked row was last tried because nothing else was due.
    Column("unparked_at_ms", BigInteger, nullable=False, server_default=text("0")),
)
"""The pauses of destinations that failed, which all flushers share. A row is never deleted.

`SharedPause` explains the columns.
"""

destinations_ledger = Table(
    "observation_destinations_ledger",
    Base.metadata,
    Column("destination", Name, primary_key=True),
    Column("status", ShortText, primary_key=True),
    Column("event_type", Name, primary_key=True),
    Column("reason", Name, primary_key=True),
    Column("events", BigInteger, nullable=False),
)
"""The ledger of all destinations except the default one, whose events `ledger` counts.

Older versions write to `ledger` and name its key, so its key can't get another column.
"""

holds = Table(
    "observation_holds",
    Base.metadata,
    Column("destination", Name, primary_key=True),
    Column("why", LongText, nullable=False),
    Column("since_ms", BigInteger, nullable=False),
    Column("until_ms", BigInteger),  # NULL: until an operator ends the hold
)
"""The destinations that an operator put on hold: nothing is sent to them."""

tries = Table(
    "observation_tries",
    Base.metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("row_id", BigInteger, nullable=False),
    # After a failover that lost rows, a server gives their ids to other events.
    Column("created_at_ms", BigInteger, nullable=False),
    Column("tried_at_ms", BigInteger, nullable=False),
    Column("duration_ms", BigInteger, nullable=False),
    Column("host", Name, nullable=False),
    Column("verdict", ShortText, nullable=False),
    Column("failure", LongText, nullable=False),
    Index("observation_tries_event_idx", "row_id", "created_at_ms", "id", info={"rows": None}),
)
"""The failed tries of events that are still there."""

identity = Table("observation_outbox", Base.metadata, Column("id", Name, primary_key=True))
"""One row: the id of this outbox, a UUID. A restored backup keeps it."""


@event.listens_for(identity, "after_create")
def _give_an_id(table: Table, connection: Connection, **_: object) -> None:
    # For tables that are created from these declarations. The migration inserts an id itself.
    connection.execute(insert(table).values(id=str(uuid4())))


@event.listens_for(Base.metadata, "before_create")
def _add_options(metadata: MetaData, connection: Connection, **_: object) -> None:
    # Not when they are declared: that would load each of their dialects into every program.
    dialect = dialect_of(connection)
    for table in metadata.tables.values():
        table.dialect_kwargs.update(dialect.table_options(table))
        for index in table.indexes:
            index.dialect_kwargs.update(dialect.index_options(index))


@event.listens_for(ObservationEvent, "before_update")
def _refuse_status_change(_mapper: object, _connection: object, row: ObservationEvent) -> None:
    # An UPDATE that the ORM writes compares neither status nor lease, so it could undo what a flusher did.
    if inspect(row).attrs.status.history.has_changes():
        raise IllegalTransition(
            f"status of event {row.id} can't be written by an ORM flush; use the methods of Outbox"
        )
