"""What is queued, what is stuck and why, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from outbox import capture
from outbox.destinations import DEFAULT_DESTINATION
from outbox.lifecycle import Status
from outbox.outcomes import WaitsFor
from outbox.reasons import in_words
from outbox.records import Deleted, Overview, Pause
from outbox.storage.counts import filling_in_words

if TYPE_CHECKING:
    from outbox.policy import Policy
    from outbox.storage.store import Store


@dataclass(frozen=True)
class Stats:
    """The queue at one moment. Times are Unix epoch milliseconds."""

    counts: dict[str, int]
    """Number of events by status, including statuses without events."""
    by_type: dict[str, dict[str, int]]
    """Number of events by event type and status, without zeros."""
    oldest_pending_age_ms: int | None
    """Age of the oldest pending or sending event."""
    next_due_at_ms: int | None
    """When the next event is due: a pending event, or one whose lease ended before it was settled."""
    overdue_ms: int
    """How long that event has been due; 0 if no event is due."""
    deleted: list[Deleted]
    """Number of events deleted over the life of the database, by status, event type and reason."""
    left_undelivered: int
    """How many of the deleted events were undelivered."""
    waits_for: dict[str, int]
    """Number of pending events that failed, by what they wait for: `service`, `delay`, `proof` or `row`."""
    pauses: list[Pause]
    """The destinations that failed and have accepted nothing since. A pause holds for all flushers of the database
    until its `until_ms`."""
    filling: str | None
    """How full the queue is: None below half of the policy's `max_undelivered`."""
    likely_cause: str | None
    """Why events are not being delivered, and what to do; None if nothing is known to be wrong."""


def gather(store: Store, policy: Policy, *, now_ms: int) -> Stats:
    """Read the database and return the queue as it is now."""
    seen = store.figures.overview(now_ms=now_ms)
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
        waits_for={kind.value: seen.waiting[kind].events if kind in seen.waiting else 0 for kind in WaitsFor},
        pauses=seen.pauses,
        filling=filling_in_words(sum(counts.values()) - counts[Status.SENT], policy.max_undelivered),
        likely_cause=_likely_cause(seen, counts, store.login_problems, now_ms=now_ms, lease_ms=policy.lease_ms),
    )


def duration(ms: int) -> str:
    """Return a time span in its largest whole unit: "12 minutes"."""
    seconds = max(0, ms) // 1_000
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= size:
            return counted(seconds // size, unit)
    return counted(seconds, "second")


def counted(count: int, noun: str) -> str:
    """Return "1 event" or "2 events"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _likely_cause(
    seen: Overview, counts: dict[str, int], login_problems: dict[str, str], *, now_ms: int, lease_ms: int
) -> str | None:
    parked = seen.parked
    causes = [capture.IS_OFF] if capture.is_off() else []
    undelivered = counts["pending"] + counts["sending"] + counts["parked"]
    if undelivered:
        causes += [
            f"{_of(destination)}{problem}; {_are(undelivered)} waiting"
            for destination, problem in sorted(login_problems.items())
        ]
    if seen.without_policy:
        causes.append(
            "row-level security hides events from this database user: the table observation_events has no policy"
            f" for {', '.join(seen.without_policy)}; add one with CREATE POLICY, or use a user with BYPASSRLS"
        )
    if parked is not None:
        # A parked row keeps the end of its last lease, which shows when it was tried.
        ago = duration(now_ms - (parked.next_attempt_at_ms - lease_ms))
        text = f" ({parked.last_error})" if parked.last_error else ""
        causes.append(
            f"the service rejected the token {ago} ago{text}; {_are(counts['parked'])} parked;"
            " set a new token, then run `outbox retry`"
        )
    causes += [
        _why_waiting(seen, waits_for, now_ms=now_ms)
        for waits_for in (WaitsFor.SERVICE, None, WaitsFor.DELAY)
        if waits_for in seen.waiting
    ]
    if WaitsFor.ROW in seen.waiting:
        row = seen.waiting[WaitsFor.ROW]
        causes.append(
            f"{counted(row.events, 'event')} failed alone while the service accepted others ({row.last_error});"
            " they are tried until they are too old; find out what the service can't handle in them"
        )
    if WaitsFor.PROOF in seen.waiting:
        suspects = seen.waiting[WaitsFor.PROOF]
        alone = "alone" if suspects.events == 1 else "one by one"
        causes.append(
            f"the service rejected {counted(suspects.events, 'event')} {alone} ({suspects.last_error});"
            " an event is abandoned if it is rejected again later, while the service accepts others;"
            " `outbox show ID` says when"
        )
    if counts["abandoned"]:
        causes.append(
            f"{_are(counts['abandoned'])} abandoned; `outbox list --status abandoned` shows why,"
            " and `outbox requeue --older-than 0s` returns them to the queue"
        )
    return ". Also: ".join(causes) or None


def _why_waiting(seen: Overview, waits_for: WaitsFor | None, *, now_ms: int) -> str:
    waiting = seen.waiting[waits_for]
    next_try_ms = max([waiting.next_attempt_at_ms, *(pause.until_ms for pause in seen.pauses)])
    next_try = f"in {duration(next_try_ms - now_ms)}" if next_try_ms > now_ms else "due now"
    return f"{in_words(waiting.last_error)}; {_are(waiting.events)} waiting; the next try is {next_try}"


def _of(destination: str) -> str:
    return "" if destination == DEFAULT_DESTINATION else f"{destination}: "


def _are(count: int) -> str:
    return f"{counted(count, 'event')} {'is' if count == 1 else 'are'}"
