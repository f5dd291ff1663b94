"""The outcomes of a row: one constructor for each move, with the columns that the move writes beside the status.

Policy, the methods of a row and the UPDATE statements use these constructors. A value is a number or a text, or
the SQL expression for one.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

MAX_ERROR_LENGTH = 2_048
"""Maximum length of `last_error`, in characters."""


class WaitsFor(str, Enum):
    """Why a pending row waits. The column is NULL for a row that has not failed since it last got a new chance."""

    SERVICE = "service"
    """The last failure was probably the service's."""
    DELAY = "delay"
    """The service named a delay."""
    PROOF = "proof"
    """The row was rejected alone; it is abandoned once another row shows that the service works."""
    ROW = "row"
    """The row failed alone while the service worked."""


class Outcome(NamedTuple):
    """The outcome of one row: the trigger of its move, and the columns that the move writes."""

    trigger: str
    values: dict[str, Any]


# The flusher is alive, so this row did not kill it.
_SETTLED = {"lost_leases": 0}
_UNSUSPECTED = {"waits_for": None, "suspected_at_ms": None}


def claim(*, lease_until_ms: Any, lost_leases: Any) -> Outcome:
    """Hold the row under a lease until `lease_until_ms`.

    `lost_leases` counts the leases that ran out on the row.
    """
    return Outcome("claim", {"next_attempt_at_ms": lease_until_ms, "lost_leases": lost_leases})


def deliver(*, sent_at_ms: Any) -> Outcome:
    """Record that the service accepted the event."""
    return Outcome("deliver", {"sent_at_ms": sent_at_ms, **_SETTLED})


def reschedule(
    *, retry_count: Any, next_attempt_at_ms: Any, last_error: Any, waits_for: Any, suspected_at_ms: Any
) -> Outcome:
    """Try the row again at `next_attempt_at_ms`, after this failure."""
    values = {
        "retry_count": retry_count,
        "next_attempt_at_ms": next_attempt_at_ms,
        "last_error": last_error,
        "waits_for": waits_for,
        "suspected_at_ms": suspected_at_ms,
    }
    return Outcome("reschedule", {**values, **_SETTLED})


def park(*, last_error: Any) -> Outcome:
    """Stop the row until the service accepts the token again."""
    return Outcome("park", {"last_error": last_error, **_SETTLED})


def abandon(*, last_error: Any) -> Outcome:
    """Give up on the row. It stays in the table, with the reason."""
    return Outcome("abandon", {"last_error": last_error, **_SETTLED})


def cancel(*, last_error: Any) -> Outcome:
    """Give up on a row that nobody is sending, because its event is no longer wanted."""
    return Outcome("cancel", {"last_error": last_error})


def release(*, next_attempt_at_ms: Any) -> Outcome:
    """Return the row to the queue without a try."""
    return Outcome("release", {"next_attempt_at_ms": next_attempt_at_ms, **_SETTLED})


def unpark(*, row_id: Any, now_ms: Any, spread_ms: Any) -> Outcome:
    """Return a parked row to the queue as if it were new. Its id decides when within `spread_ms` it is due."""
    return Outcome("unpark", _revived(now_ms, next_attempt_at_ms=now_ms + row_id % spread_ms))


def retry_now(*, now_ms: Any, is_parked: bool) -> Outcome:
    """Make a row due. If it was parked, its age starts again. Its failures stay."""
    revived = {"revived_at_ms": now_ms, **_UNSUSPECTED} if is_parked else {}
    return Outcome("retry_now", {"next_attempt_at_ms": now_ms, **revived})


def revive(*, next_attempt_at_ms: Any) -> Outcome:
    """Make a waiting row due earlier. Its failures stay."""
    return Outcome("revive", {"next_attempt_at_ms": next_attempt_at_ms})


def requeue(*, now_ms: Any) -> Outcome:
    """Return an abandoned row to the queue as if it were new."""
    return Outcome("requeue", _revived(now_ms, next_attempt_at_ms=now_ms))


def _revived(now_ms: Any, *, next_attempt_at_ms: Any) -> dict[str, Any]:
    return {
        "retry_count": 0,
        "last_error": None,
        "next_attempt_at_ms": next_attempt_at_ms,
        "revived_at_ms": now_ms,
        **_UNSUSPECTED,
    }


def as_last_error(text: str) -> str:
    """Return a failure's text as stored in `last_error`: cut, without characters that a database refuses."""
    # With such a character, the outcome of the row could never be written.
    return text[:MAX_ERROR_LENGTH].replace("\0", "\ufffd").encode(errors="replace").decode()
