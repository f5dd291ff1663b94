"""What is queued, what is stuck and why, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from outbox import capture
from outbox.lifecycle import Status
from outbox.statements import Pause

if TYPE_CHECKING:
    from outbox.store import Deleted, Store, Trouble


@dataclass(frozen=True)
class Stats:
    """The state of the queue at one moment. Times are Unix epoch milliseconds."""

    counts: dict[str, int]
    """Events by status; every status is there."""
    by_type: dict[str, dict[str, int]]
    """The same for each event type."""
    oldest_pending_age_ms: int | None
    """The age of the oldest event that is pending or being sent."""
    next_due_at_ms: int | None
    """When the next event is due: one that is pending, or one whose flusher let its lease run out."""
    overdue_ms: int
    """For how long that one has been due; 0 if it is not."""
    deleted: list[Deleted]
    """What was deleted over the life of the database, by status, event type and reason."""
    left_undelivered: int
    """How many of those had not been delivered."""
    pauses: list[Pause]
    """The services that failed, and are left alone by the flushers of all hosts; on servers only."""
    likely_cause: str | None
    """Why events are not delivered at present, and what to do, in words."""


def gather(store: Store, *, now_ms: int, lease_ms: int) -> Stats:
    """Look at the queue as it is now."""
    seen = store.overview(now_ms=now_ms)
    counts = dict.fromkeys((status.value for status in Status), 0)
    by_type: dict[str, dict[str, int]] = {}
    for event_type, status, count in seen.counts:
        counts[status] = counts.get(status, 0) + count
        by_type.setdefault(event_type, {})[status] = count
    oldest = seen.oldest_pending_ms
    return Stats(
        counts=counts,
        by_type=by_type,
        oldest_pending_age_ms=None if oldest is None else max(0, now_ms - oldest),
        next_due_at_ms=seen.next_due_at_ms,
        overdue_ms=0 if seen.next_due_at_ms is None else max(0, now_ms - seen.next_due_at_ms),
        deleted=seen.deleted,
        left_undelivered=sum(entry.events for entry in seen.deleted if entry.status != Status.SENT),
        pauses=seen.pauses,
        likely_cause=_likely_cause(seen.parked, seen.waiting, counts, now_ms=now_ms, lease_ms=lease_ms),
    )


def duration(ms: int) -> str:
    """Return a time span in words, in its largest whole unit: "12 minutes"."""
    seconds = max(0, ms) // 1_000
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= size:
            return _number(seconds // size, unit)
    return _number(seconds, "second")


def failure_in_words(last_error: str) -> str:
    """Say what a stored failure means; its text follows in brackets."""
    return f"{_meaning(last_error)} ({last_error})"


def _meaning(last_error: str) -> str:
    for start, meaning in _MEANINGS:
        if last_error.startswith(start):
            return meaning
    return "the upload failed"


# By the start of the text, the first that fits.
_MEANINGS = (
    ("transport: ", "the server can't be reached"),
    (
        "permanent: decode observation event: event_type: invalid value ",
        "the payload can't be read: whoever sent it does not know its type; name its module in OUTBOX_TYPES",
    ),
    ("permanent: decode observation event: ", "the payload can't be read"),
    ("permanent: 404", "the server takes no events at this URL; check it"),
    ("permanent: 405", "the server takes no events at this URL; check it"),
    ("permanent: ", "the server rejected this event"),
    ("aged-out", "too old for another try"),
    ("401", "the token was rejected"),
    ("403", "the token was rejected"),
    ("408", "the server was too slow"),
    ("425", "the server was not ready"),
    ("429", "the server asks to slow down"),
    ("3", "the server redirects, which is not followed; check the URL"),
    ("4", "the server rejects whatever is sent; check the URL, and what it accepts"),
    ("5", "the server is in trouble"),
)


def _likely_cause(
    parked: Trouble | None, waiting: Trouble | None, counts: dict[str, int], *, now_ms: int, lease_ms: int
) -> str | None:
    causes = [capture.PAUSED] if capture.is_off() else []
    if parked is not None:
        # A parked row keeps the lease of its last claim, so that tells when it was tried.
        ago = duration(now_ms - (parked.next_attempt_at_ms - lease_ms))
        text = f" ({parked.last_error})" if parked.last_error else ""
        causes.append(
            f"the token was rejected {ago} ago{text}; {_are(counts['parked'])} parked;"
            " run `outbox retry` after logging in"
        )
    if waiting is not None:
        due_in = waiting.next_attempt_at_ms - now_ms
        next_try = f"in {duration(due_in)}" if due_in > 0 else "due now"
        causes.append(
            f"{failure_in_words(waiting.last_error)}; {_are(waiting.events)} waiting; the next try is {next_try}"
        )
    if not causes and counts["abandoned"]:
        causes.append(
            f"{_are(counts['abandoned'])} abandoned; `outbox list --state abandoned` shows why,"
            " `outbox requeue --older-than 0s` brings them back"
        )
    return ". Also: ".join(causes) or None


def _are(count: int) -> str:
    return f"{_number(count, 'event')} {'is' if count == 1 else 'are'}"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
