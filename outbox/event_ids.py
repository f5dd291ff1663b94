"""The ids of events: ids that callers give, and derived ids for the events without one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from reprlib import repr as short
from typing import Any

from outbox.failures import ConfigurationError, InvalidEvent

EXPECTED = "1 to 191 printable ASCII characters without blanks"
"""Which ids callers may give, in words. MySQL can index 191 characters; a header can hold printable ASCII."""

_VALID = re.compile("[!-~]{1,191}")


def is_valid(event_id: object) -> bool:
    """Return whether a caller may give this id."""
    return isinstance(event_id, str) and _VALID.fullmatch(event_id) is not None


def add_event_ids(rows: Sequence[dict[str, Any]], event_ids: Iterable[str | None]) -> None:
    """Add the ids that the caller gave to the columns of the rows.

    `event_ids` has an id or None for each row. Raises `InvalidEvent` for an invalid id, and `ConfigurationError`
    if the numbers of ids and rows differ.
    """
    given = list(event_ids)
    if isinstance(event_ids, str) or len(given) != len(rows):
        raise ConfigurationError(
            f"event_ids is {short(event_ids)}, expected a list with an id or None for each of {len(rows)} events"
        )
    for row, event_id in zip(rows, given, strict=True):
        if event_id is not None:
            if not is_valid(event_id):
                raise InvalidEvent(f"event_id is {short(event_id)}, expected {EXPECTED}")
            row["event_id"] = event_id


def derived(outbox_id: str, created_at_ms: int, row_id: int) -> str:
    """Return the id of an event to which the caller gave no id.

    A server that lost rows in a failover reuses their row ids. The creation time keeps the event ids different.
    """
    return f"{outbox_id}-{created_at_ms}-{row_id}"


def parts_of(event_id: str, outbox_id: str) -> tuple[int, int] | None:
    """Return the row id and the creation time in a derived id, None if it is not one of this outbox."""
    found = re.fullmatch(f"{re.escape(outbox_id)}-([0-9]{{1,16}})-([0-9]{{1,19}})", event_id)
    if found is None or int(found.group(2)) >= 2**63:  # no database has such a row id, or compares with it
        return None
    return int(found.group(2)), int(found.group(1))
