"""What only reads: the look for chores, the times of a destination, and single events."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from outbox.destinations import DEFAULT_DESTINATION
from outbox.lifecycle import Status
from outbox.policy import Policy
from outbox.records import Chores, Due, Pause
from outbox.storage.bounds import Bounds
from outbox.storage.claimed import OneRowQuery
from outbox.storage.deletion import Deletion, is_expired
from outbox.storage.dialects import dialect_of
from outbox.storage.due_times import LAST_ACCEPTED, due, next_due
from outbox.storage.engines import reading
from outbox.storage.identity import Identity, give_id
from outbox.storage.pauses import IS_TROUBLED, PAUSED
from outbox.storage.revival import PARKED
from outbox.storage.row_counts import pending_everywhere, pending_rows
from outbox.storage.sql import (
    LAST_ID,
    columns,
    failed_before,
    is_one_of,
    of_destination,
    unindexed_status,
)
from outbox.storage.tables import ObservationEvent
from outbox.storage.transactions import Writer, read

# The first two have an order. Without it, SQLite would scan the table until it finds a row.
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
        dialect = dialect_of(engine)
        self._chores = CHORES if dialect.chores is None else dialect.chores
        self._next_due = next_due(dialect)

    def chores_query(self, policy: Policy, destination: str, *, now_ms: int) -> OneRowQuery:
        """Return the query that finds out which maintenance is due."""
        sent_before_ms = now_ms - policy.keep_sent_ms if policy.keep_sent_ms else 0
        return OneRowQuery(self._chores, {"destination": destination, "sent_before": sent_before_ms})

    def chores(
        self,
        policy: Policy,
        destination: str = DEFAULT_DESTINATION,
        *,
        now_ms: int,
        seen: tuple[Any, ...] | None = None,
    ) -> Chores:
        """Return the maintenance that is due. Usually there is none.

        `seen` is the row of `chores_query`. Without it, this runs that query.
        """
        if seen is None:
            query, this = self.chores_query(policy, destination, now_ms=now_ms)
            seen = read(self._writer, lambda transaction: transaction.rows(query, **this))[0]
        parked, expired, failed, troubled, last_id = seen
        return Chores(
            destination,
            is_any_parked=parked is not None,
            is_any_expired=expired is not None,
            is_any_failed=failed is not None,
            is_troubled=troubled is not None,
            may_be_over_cap=self._deletion.may_be_over(policy, destination, last_id=last_id or 0),
            may_be_over_bounds=self._bounds.may_be_over(policy, destination),
        )

    def last_accepted_ms(self, destination: str = DEFAULT_DESTINATION) -> int | None:
        """Return when a destination last accepted a row, as far as the rows tell."""
        found: int | None = read(
            self._writer, lambda transaction: transaction.value(LAST_ACCEPTED, destination=destination)
        )
        return found

    def pending_count(self, destination: str | None = None) -> int:
        """Return how many rows of a destination, or of all, are pending or sending."""
        with reading(self._engine) as connection:
            dialect = dialect_of(self._engine)
            if destination is None:
                return connection.scalar(pending_everywhere(dialect)) or 0
            return connection.scalar(pending_rows(dialect), {"destination": destination}) or 0

    def next_due_ms(self, destination: str = DEFAULT_DESTINATION, *, now_ms: int) -> int | None:
        """Return when the next row is due: one that is pending, or one whose flusher let its lease run out."""
        # On the writer's connection, because a worker asks, and there may be no file descriptor for another one.
        this = {"destination": destination, "now": now_ms}
        due_ms: int | None = read(self._writer, lambda transaction: transaction.value(self._next_due, **this))
        return due_ms

    def due(self, *, now_ms: int) -> dict[str, Due]:
        """Return when the next row of each destination is due, and when each last accepted one."""
        with reading(self._engine) as connection:
            return due(connection, now_ms=now_ms)

    def pauses(self, *, now_ms: int) -> list[Pause]:
        """Return the destinations that failed and have accepted nothing since; their pause may be over."""
        with reading(self._engine) as connection:
            return [Pause(*row) for row in connection.execute(PAUSED, {"now": now_ms})]

    def outbox_id(self) -> str:
        """Return the id of the outbox."""
        with reading(self._engine) as connection:
            return self._identity.outbox_id(connection.scalar)

    def get(self, row_id: int) -> ObservationEvent | None:
        """Return one row, detached and with an event id, or None."""
        with reading(self._engine) as connection, Session(connection, expire_on_commit=False) as session:
            row = session.get(ObservationEvent, row_id)
            return None if row is None else give_id(row, self._identity.outbox_id(connection.scalar))
