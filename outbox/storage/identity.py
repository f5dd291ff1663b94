"""The id of the outbox, and the ids of events to which the caller gave none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm.attributes import set_committed_value

from outbox.event_ids import derived
from outbox.failures import StorageError
from outbox.storage.tables import ObservationEvent, identity

OUTBOX_ID = select(identity.c.id)


class Identity:
    """Keeps the id of the outbox. The id never changes, so threads and forked children share it."""

    def __init__(self) -> None:
        self._outbox_id: str | None = None

    def outbox_id(self, value_of: Callable[[Select[Any]], Any]) -> str:
        """Return the id of the outbox. `value_of` runs a query for one value."""
        if self._outbox_id is None:
            self._outbox_id = value_of(OUTBOX_ID)
        if self._outbox_id is None:
            words = "restore its only row from a backup, or insert a UUID"
            raise StorageError(f"the table {identity.name} is empty, but events need its id: {words}")
        return self._outbox_id


def give_id(row: ObservationEvent, outbox_id: str) -> ObservationEvent:
    """Set the derived event id of a detached row that has none. The database is not changed."""
    if row.event_id is None:
        set_committed_value(row, "event_id", derived(outbox_id, row.created_at_ms, row.id))
    return row
