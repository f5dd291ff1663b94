"""The indexes of the table of events: one for each order in which rows are taken. A dialect lists its own.

Each starts with the destination, because claims and chores belong to one. Where the database has partial indexes,
each holds only the rows of its order.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Dialect, Index

from outbox.lifecycle import Status
from outbox.storage.dialects import dialect_of

EVENT_ID_INDEX = "observation_events_event_id_idx"
QUEUE_INDEX = "observation_events_queue_idx"
WAITING_INDEX = "observation_events_waiting_idx"
TIMES_INDEX = "observation_events_times_idx"
DELIVERED_INDEX = "observation_events_delivered_idx"

OLDEST_OF_STATUS = "the oldest of a status"
"""The `outbox_index` of queries for the oldest rows of a status. No index of MySQL has this order, so it merges
parts of `waiting`: one for each value of `waits_for`."""

_PENDING = "status = 'pending' AND waits_for IS"
_FRESH = f"{_PENDING} NULL AND next_attempt_at_ms <= created_at_ms"
_POSTPONED = f"{_PENDING} NULL AND next_attempt_at_ms > created_at_ms"
"""Rows that are due later than their creation, but not because they failed: scheduled, requeued or released."""
_FAILED = f"{_PENDING} NOT NULL"
_TIMED = f"waits_for IS NULL AND (status = 'sending' OR ({_POSTPONED}))"
"""Postponed rows, and rows under a lease that did not fail before."""
_UNDELIVERED = "status IN ('pending', 'sending') AND waits_for"

_IN_ORDER = ("created_at_ms", "id", "next_attempt_at_ms", "status")
_BY_DUE_TIME = ("next_attempt_at_ms", "created_at_ms", "id", "status")


def _index(name: str, *columns: str, rows: str | None = None, unique: bool = False) -> Index:
    index = Index(f"observation_events_{name}_idx", *columns, unique=unique, info={"rows": rows})

    def is_meant(*_: Any, dialect: Dialect, **__: Any) -> bool:
        return index.name in dialect_of(dialect).indexes

    return index.ddl_if(callable_=is_meant)


def event_indexes() -> list[Index]:
    """Return the indexes of all dialects."""
    orders = [
        # SQLite: in the order of a claim, which serves while its head is due, and by the due time, which serves
        # while few are due.
        ("fresh", (*_IN_ORDER, "waits_for"), _FRESH),
        ("tried", (*_IN_ORDER, "waits_for"), _POSTPONED),
        ("due", (*_BY_DUE_TIME, "waits_for"), _POSTPONED),
        ("failed", ("waits_for", *_IN_ORDER), _FAILED),
        ("retry", ("waits_for", *_BY_DUE_TIME, "suspected_at_ms"), _FAILED),
        ("sending", (*_BY_DUE_TIME, "waits_for"), "status = 'sending'"),
        # PostgreSQL: the same orders. An enqueue writes one of them, and so does a claim.
        ("untried", _IN_ORDER, _FRESH),
        ("again", _IN_ORDER, _POSTPONED),
        ("timed", ("status", *_BY_DUE_TIME[:-1]), _TIMED),
        ("others", (*_IN_ORDER, "waits_for"), f"{_UNDELIVERED} <> 'row'"),
        ("later", ("waits_for", *_BY_DUE_TIME), f"{_UNDELIVERED} IS NOT NULL"),
        ("lost", ("created_at_ms", "id"), "lost_leases > 0"),
        *(
            (status.value, (time, "id", "status"), f"status = '{status.value}'")
            for status, time in (
                (Status.SENT, "sent_at_ms"),
                (Status.PARKED, "created_at_ms"),
                (Status.ABANDONED, "created_at_ms"),
            )
        ),
        # Where there are no partial indexes.
        ("queue", ("lost_leases", "created_at_ms", "id"), None),  # finds rows whose senders died
        ("waiting", ("status", "waits_for", "created_at_ms", "id", "next_attempt_at_ms"), None),
        ("times", ("status", "waits_for", "next_attempt_at_ms", "created_at_ms", "id"), None),
        ("delivered", ("sent_at_ms", "id"), None),  # without the status, so a claim does not write to it
    ]
    return [
        # A caller's ids are unique in each destination.
        _index("event_id", "destination", "event_id", rows="event_id IS NOT NULL", unique=True),
        *(_index(name, "destination", *columns, rows=rows) for name, columns, rows in orders),
    ]
