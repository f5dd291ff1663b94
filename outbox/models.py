"""The tables: events, the ledger of those that were deleted, and the services that are paused."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Dialect,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TextClause,
    event,
    inspect,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.orm.attributes import set_attribute

from outbox.failures import IllegalTransition
from outbox.lifecycle import MOVES, Status, fire

MYSQL = ("mysql", "mariadb")
"""SQLAlchemy's names for what is one dialect to us."""

VERSION_TABLE = "outbox_alembic_version"
"""A version table of our own: a host's Alembic history in the same database stays untouched."""

QUEUE_ON_MYSQL = "observation_events_queue_idx"
DELIVERED_ON_MYSQL = "observation_events_delivered_idx"


class _MediumText(Text):
    """MySQL's text of up to 16 MiB: its TEXT ends at 64 KiB, below the largest payload."""

    __visit_name__ = "MEDIUMTEXT"


class _TextDefault(TextClause):
    """The default of a text; MySQL takes one for a long text only as an expression, in parentheses."""

    inherit_cache = True


@compiles(_TextDefault, *MYSQL)
def _in_parentheses(default: _TextDefault, _compiler: object, **_: object) -> str:
    return f"({default.text})"


def _index(name: str, *columns: str, on: tuple[str, ...], **options: Any) -> Index:
    # Alembic does not ask an index whether it is meant for the database; our env.py looks into `info`.
    index = Index(name, *columns, info={"on": on, "options": options})

    def is_meant(*_: Any, dialect: Dialect, **__: Any) -> bool:
        return dialect.name in on

    return index.ddl_if(callable_=is_meant)


# SQLite gives only INTEGER PRIMARY KEY an automatic value.
_ID = BigInteger().with_variant(Integer, "sqlite")
LONGEST_NAME = 191
"""How many characters of a name MySQL can index; it can't index a TEXT at all."""

_NAME = Text().with_variant(String(LONGEST_NAME), *MYSQL)
_TEXT = Text().with_variant(_MediumText(), *MYSQL)

# Texts are equal only if they are the same: its own collations take "A" for "a".
_ON_MYSQL = {
    f"{dialect}_{option}": value
    for dialect in MYSQL
    for option, value in (("engine", "InnoDB"), ("charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
}

STATUSES_IN_SQL = ", ".join(f"'{status.value}'" for status in Status)
UNDELIVERED = "status IN ('pending', 'sending')"
NEVER_TRIED = "status = 'pending' AND next_attempt_at_ms <= created_at_ms"
TRIED = "status = 'pending' AND next_attempt_at_ms > created_at_ms"
"""Or brought back: at any rate it was to wait for something."""


class Base(DeclarativeBase):
    """The declarative base of the outbox's own tables, apart from any of the host's."""


class ObservationEvent(Base):
    """One event on its way. All times are Unix epoch milliseconds, UTC.

    `status` is changed by the methods that are named after the moves, never by assignment, and only the store
    writes it: an ORM flush that would is refused, for it knows no lease. The methods of a row set its attributes
    alone, they write nothing. Each raises `IllegalTransition` when the move does not start from the row's status.
    """

    __tablename__ = "observation_events"

    id: Mapped[int] = mapped_column(_ID, primary_key=True, autoincrement=True)
    event_type: Mapped[str] = mapped_column(_NAME)
    rule_id: Mapped[str | None] = mapped_column(_TEXT)
    rule_ids_json: Mapped[str] = mapped_column(_TEXT, server_default=_TextDefault("'[]'"))
    session_id: Mapped[str] = mapped_column(_TEXT, server_default=_TextDefault("''"))
    file_path: Mapped[str | None] = mapped_column(_TEXT)
    occurred_at_ms: Mapped[int] = mapped_column(BigInteger)
    payload_json: Mapped[str] = mapped_column(_TEXT)
    status: Mapped[str] = mapped_column(_NAME, server_default=text("'pending'"))
    retry_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    next_attempt_at_ms: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    """When the row is due; while it is `sending`, the lease."""
    last_error: Mapped[str | None] = mapped_column(_TEXT)
    created_at_ms: Mapped[int] = mapped_column(BigInteger)
    sent_at_ms: Mapped[int | None] = mapped_column(BigInteger)
    revived_at_ms: Mapped[int | None] = mapped_column(BigInteger)
    """When an operator, or a recovered server, last gave the row a full new chance."""

    __table_args__ = (
        CheckConstraint(f"status IN ({STATUSES_IN_SQL})", name="observation_events_status_check"),
        # Those of difflore, for its file. On servers the first one leads planners astray, and the second one can't
        # hold a long session.
        _index("observation_events_pending_idx", "status", "next_attempt_at_ms", "created_at_ms", on=("sqlite",)),
        _index("observation_events_recent_idx", "event_type", "session_id", "occurred_at_ms", on=("sqlite",)),
        # One index for each order in which rows are taken; each holds only the rows of its states. On SQLite the
        # plus keeps the planner from the baseline's status index, which it would otherwise always take.
        _index(
            "observation_events_claim_idx",
            "created_at_ms",
            "id",
            "next_attempt_at_ms",
            "status",
            on=("postgresql",),
            postgresql_where=text(UNDELIVERED),
        ),
        *(
            _index(f"observation_events_{name}_idx", *columns, on=("sqlite",), sqlite_where=text(f"+{rows}"))
            for name, rows, columns in (
                ("fresh", NEVER_TRIED, ("created_at_ms", "id", "next_attempt_at_ms", "status")),
                ("tried", TRIED, ("created_at_ms", "id", "next_attempt_at_ms", "status")),
                ("due", TRIED, ("next_attempt_at_ms", "created_at_ms", "id", "status")),
            )
        ),
        *(
            _index(
                f"observation_events_{status.value}_idx",
                time,
                "id",
                on=("sqlite", "postgresql"),
                sqlite_where=text(f"+status = '{status.value}'"),
                postgresql_where=text(f"status = '{status.value}'"),
            )
            for status, time in (
                (Status.SENT, "sent_at_ms"),
                (Status.PARKED, "created_at_ms"),
                (Status.ABANDONED, "created_at_ms"),
            )
        ),
        # MySQL has no partial indexes; one for each order starts with the status.
        _index(QUEUE_ON_MYSQL, "status", "created_at_ms", "id", "next_attempt_at_ms", on=MYSQL),
        _index(DELIVERED_ON_MYSQL, "status", "sent_at_ms", "id", on=MYSQL),
        {"info": {"options": {"sqlite_autoincrement": True, **_ON_MYSQL}}},
    )

    def __init__(self, **columns: Any) -> None:
        status = Status(columns.pop("status", Status.PENDING)).value
        defaults = {"rule_ids_json": "[]", "session_id": "", "retry_count": 0, "next_attempt_at_ms": 0}
        super().__init__(**{**defaults, **columns})
        set_attribute(self, "status", status)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "status":
            raise IllegalTransition(
                f"status of event {self.id} can't be assigned, it is changed by a move: {', '.join(MOVES)}"
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

    def _move(self, trigger: str, **columns: object) -> None:
        fire(self, trigger)
        for name, value in columns.items():
            setattr(self, name, value)

    def claim(self, *, now_ms: int, lease_ms: int) -> None:
        """Take the row under a lease that ends at now + `lease_ms`; it has to be due."""
        if self.next_attempt_at_ms > now_ms:
            raise IllegalTransition(f"event {self.id} is not due before {self.next_attempt_at_ms}, it is {now_ms}")
        self._move("claim", next_attempt_at_ms=now_ms + lease_ms)

    def deliver(self, *, sent_at_ms: int) -> None:
        """Record that the server accepted the event."""
        self._move("deliver", sent_at_ms=sent_at_ms)

    def reschedule(self, *, retry_count: int, next_attempt_at_ms: int, error: str) -> None:
        """Let the row wait until `next_attempt_at_ms`."""
        self._move("reschedule", retry_count=retry_count, next_attempt_at_ms=next_attempt_at_ms, last_error=error)

    def park(self, *, error: str) -> None:
        """Stop the row until the server accepts the token again."""
        self._move("park", last_error=error)

    def abandon(self, *, error: str) -> None:
        """Give the row up; it stays, with its reason."""
        self._move("abandon", last_error=error)

    def release(self, *, now_ms: int) -> None:
        """Give the row back untried."""
        self._move("release", next_attempt_at_ms=now_ms)

    def unpark(self, *, now_ms: int, spread_ms: int) -> None:
        """Give the row a full new chance, at a time within `spread_ms` that its id decides."""
        self._move(
            "unpark",
            retry_count=0,
            last_error=None,
            next_attempt_at_ms=now_ms + self.id % spread_ms,
            revived_at_ms=now_ms,
        )

    def retry_now(self, *, now_ms: int) -> None:
        """Make a row due that is parked or waits."""
        if self.status == Status.PENDING and self.next_attempt_at_ms <= now_ms:
            raise IllegalTransition(f"event {self.id} is due already, since {self.next_attempt_at_ms}")
        revived_at_ms = now_ms if self.status == Status.PARKED else self.revived_at_ms
        self._move("retry_now", next_attempt_at_ms=now_ms, revived_at_ms=revived_at_ms)

    def requeue(self, *, now_ms: int) -> None:
        """Give an abandoned row a full new chance."""
        self._move("requeue", retry_count=0, last_error=None, next_attempt_at_ms=now_ms, revived_at_ms=now_ms)


ledger = Table(
    "observation_events_ledger",
    Base.metadata,
    Column("status", _NAME, primary_key=True),  # where the events stood when they were deleted
    Column("event_type", _NAME, primary_key=True),
    Column("reason", _NAME, primary_key=True),
    Column("events", BigInteger, nullable=False),
    info={"options": _ON_MYSQL},
)
"""How many events of one kind were deleted for one reason, over the life of the database.

It is written in the transaction that deletes, so rows ever enqueued = rows there + events counted here.
"""

destinations = Table(
    "observation_destinations",
    Base.metadata,
    Column("destination", _NAME, primary_key=True),
    # Pauses in a row. A flusher that saw another number reports on a time before this pause.
    Column("failures", Integer, nullable=False),
    Column("paused_until_ms", BigInteger, nullable=False),
    # Until then one flusher finds out whether the service works again, and the others wait.
    Column("probe_until_ms", BigInteger, nullable=False),
    Column("last_error", _TEXT, nullable=False),
    info={"options": _ON_MYSQL},
)
"""The services that are left alone for a while, by the flushers of all hosts; no row while all is well."""


@event.listens_for(Base.metadata, "before_create")
def _add_options(metadata: MetaData, connection: Connection, **_: object) -> None:
    # Not when they are declared: that would load each of their dialects into every program.
    for table in metadata.tables.values():
        described: list[Table | Index] = [table, *table.indexes]
        for item in described:
            options = item.info.get("options", {}).items()
            of_dialect = {name: value for name, value in options if name.startswith(connection.dialect.name)}
            item.dialect_kwargs.update(of_dialect)


@event.listens_for(ObservationEvent, "before_update")
def _refuse_status_change(_mapper: object, _connection: object, row: ObservationEvent) -> None:
    # An UPDATE that the ORM writes compares neither status nor lease, so it could undo what a flusher did.
    if inspect(row).attrs.status.history.has_changes():
        raise IllegalTransition(
            f"status of event {row.id} can't be written by an ORM flush; use the methods of Outbox"
        )
