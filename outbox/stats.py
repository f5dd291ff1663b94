"""What is queued, what is stuck and why, in numbers and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from outbox import capture
from outbox.destinations import DEFAULT_DESTINATION, DEFAULT_NAME, shown
from outbox.holds import Hold, hold_in_words
from outbox.lifecycle import Status
from outbox.outcomes import WaitsFor
from outbox.reasons import in_words, without_body
from outbox.records import Deleted, Due, Overview, Pause, Trouble
from outbox.storage.counts import filling_in_words

if TYPE_CHECKING:
    from outbox.policy import Policy
    from outbox.storage.store import Store

AnyTrouble = TypeVar("AnyTrouble", Trouble, Pause)

CAUSES_JOIN = ". Also: "
"""Stands between the causes in `Stats.likely_cause`."""

_SILENT_MS = 3_600_000
_MOST_NAMED = 10


@dataclass(frozen=True)
class DestinationStats:
    """The events of one destination at one moment. Times are Unix epoch milliseconds."""

    counts: dict[str, int]
    """Number of events by status, including statuses without events."""
    waiting: int
    """Number of pending events that failed."""
    next_due_at_ms: int | None
    """When the next event is due: a pending event, or one whose lease ended before it was settled."""
    overdue_ms: int
    """How long that event has been due; 0 if no event is due."""
    paused_until_ms: int | None
    """When the pause of the destination ends, None if it is not paused."""

    @property
    def undelivered(self) -> int:
        """Number of events that are not sent."""
        return sum(self.counts.values()) - self.counts[Status.SENT]


@dataclass(frozen=True)
class Stats:
    """The queue at one moment. Times are Unix epoch milliseconds."""

    counts: dict[str, int]
    """Number of events by status, including statuses without events."""
    by_type: dict[str, dict[str, int]]
    """Number of events by event type and status, without zeros."""
    by_destination: dict[str, DestinationStats]
    """The destinations that have events, by name."""
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
    holds: list[Hold]
    """The destinations that an operator put on hold: nothing is sent to them."""
    filling: str | None
    """How full the queue is: None below half of the policy's `max_undelivered`."""
    likely_cause: str | None
    """Why events are not being delivered, and what to do; None if nothing is known to be wrong."""


def gather(store: Store, policy: Policy, *, now_ms: int, with_bodies: bool = True) -> Stats:
    """Read the database and return the queue as it is now.

    Without `with_bodies`, no text repeats the body of an answer, which may repeat a payload.
    """
    seen = store.figures.overview(now_ms=now_ms)
    if not with_bodies:
        seen = _without_bodies(seen)
    counts = _no_events()
    by_type: dict[str, dict[str, int]] = {}
    for _, event_type, status, _, count in seen.counts:
        counts[status] = counts.get(status, 0) + count
        of_type = by_type.setdefault(event_type, {})
        of_type[status] = of_type.get(status, 0) + count
    oldest = seen.oldest_pending_ms
    by_destination = _by_destination(seen, now_ms=now_ms)
    due_ms = [one.next_due_at_ms for one in by_destination.values() if one.next_due_at_ms is not None]
    next_due = min(due_ms, default=None)
    return Stats(
        counts=counts,
        by_type=by_type,
        by_destination=by_destination,
        oldest_pending_age_ms=None if oldest is None else max(0, now_ms - oldest),
        next_due_at_ms=next_due,
        overdue_ms=_overdue_ms(next_due, now_ms),
        deleted=seen.deleted,
        left_undelivered=sum(entry.events for entry in seen.deleted if entry.status != Status.SENT),
        waits_for={kind.value: sum(one.events for one in seen.waiting.get(kind, ())) for kind in WaitsFor},
        pauses=[pause._replace(destination=shown(pause.destination)) for pause in seen.pauses],
        holds=seen.holds,
        filling=_filling(by_destination, policy.max_undelivered),
        likely_cause=_likely_cause(
            seen, by_destination, store.login_problems, now_ms=now_ms, lease_ms=policy.lease_ms
        ),
    )


def _without_bodies(seen: Overview) -> Overview:
    def cut(one: AnyTrouble) -> AnyTrouble:
        return one._replace(last_error=without_body(one.last_error))

    return seen._replace(
        parked=seen.parked and cut(seen.parked),
        waiting={kind: [cut(one) for one in troubles] for kind, troubles in seen.waiting.items()},
        pauses=[cut(pause) for pause in seen.pauses],
    )


def _no_events() -> dict[str, int]:
    return dict.fromkeys((status.value for status in Status), 0)


def _by_destination(seen: Overview, *, now_ms: int) -> dict[str, DestinationStats]:
    counts: dict[str, dict[str, int]] = {}
    waiting: Counter[str] = Counter()
    for destination, _, status, has_failed, count in sorted(seen.counts, key=lambda one: str(one.destination)):
        of_destination = counts.setdefault(destination, _no_events())
        of_destination[status] = of_destination.get(status, 0) + count
        if has_failed and status == Status.PENDING:
            waiting[destination] += count
    paused = {pause.destination: pause.until_ms for pause in seen.pauses if pause.until_ms > now_ms}
    due_ms = {destination: due.next_due_at_ms for destination, due in seen.due.items()}
    return {
        shown(destination): DestinationStats(
            counts=of_destination,
            waiting=waiting[destination],
            next_due_at_ms=due_ms.get(destination),
            overdue_ms=_overdue_ms(due_ms.get(destination), now_ms),
            paused_until_ms=paused.get(destination),
        )
        for destination, of_destination in counts.items()
    }


def _overdue_ms(due_ms: int | None, now_ms: int) -> int:
    return 0 if due_ms is None else max(0, now_ms - due_ms)


def _filling(by_destination: dict[str, DestinationStats], at_most: int | None) -> str | None:
    """Return how full the fullest destination is."""
    rows, name = max(((one.undelivered, name) for name, one in by_destination.items()), default=(0, DEFAULT_NAME))
    words = filling_in_words(rows, at_most)
    return words and f"{'' if name == DEFAULT_NAME else f'{name}: '}{words}"


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
    seen: Overview,
    by_destination: dict[str, DestinationStats],
    login_problems: dict[str, str],
    *,
    now_ms: int,
    lease_ms: int,
) -> str | None:
    parked = seen.parked
    causes = [capture.IS_OFF] if capture.is_off() else []
    causes += [
        f"{hold_in_words(hold)}; {_are(undelivered)} waiting"
        for hold in seen.holds
        if (undelivered := _to_send(by_destination, hold.destination))
    ]
    causes += [
        f"{_of(destination)}{problem}; {_are(undelivered)} waiting"
        for destination, problem in sorted(login_problems.items())
        if (undelivered := _to_send(by_destination, shown(destination)))
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
            f"{_of(parked.destination)}the service rejected the token {ago} ago{text};"
            f" {_are(by_destination[shown(parked.destination)].counts['parked'])} parked;"
            " set a new token, then run `outbox retry --all`"
        )
    causes += [
        _why_waiting(seen, waits_for, now_ms=now_ms)
        for waits_for in (WaitsFor.SERVICE, None, WaitsFor.DELAY)
        if waits_for in seen.waiting
    ]
    if WaitsFor.ROW in seen.waiting:
        row = seen.waiting[WaitsFor.ROW][0]
        causes.append(
            f"{_of(row.destination)}{counted(row.events, 'event')} failed alone while the service seemed to work"
            f" ({row.last_error});"
            " each is retried until it is too old; `outbox show ID` shows the answers, and when that is"
        )
    if WaitsFor.PROOF in seen.waiting:
        suspects = seen.waiting[WaitsFor.PROOF][0]
        alone = "alone" if suspects.events == 1 else "one by one"
        causes.append(
            f"{_of(suspects.destination)}the service rejected {counted(suspects.events, 'event')} {alone}"
            f" ({suspects.last_error});"
            " an event is abandoned if it is rejected again later, while the service accepts others;"
            " `outbox show ID` says when"
        )
    abandoned = sum(one.counts["abandoned"] for one in by_destination.values())
    if abandoned:
        causes.append(
            f"{_are(abandoned)} abandoned; `outbox list --status abandoned` shows why,"
            f" and `outbox requeue --all` returns {'the event' if abandoned == 1 else 'the events'} to the queue"
        )
    paused = {shown(pause.destination) for pause in seen.pauses}
    unserved = [name for name in silent(seen.due, seen.holds, now_ms=now_ms) if shown(name) not in paused]
    if unserved and by_destination.keys() != {DEFAULT_NAME}:
        causes.append(silence_in_words(unserved))
    return CAUSES_JOIN.join(causes) or None


def silent(due: Mapping[str, Due], holds: Sequence[Hold], *, now_ms: int) -> list[str]:
    """Return the stored names of destinations with events due for an hour in which none was delivered.

    Destinations on hold are left out.
    """
    before_ms = now_ms - _SILENT_MS
    held = {hold.destination for hold in holds}
    return [
        destination
        for destination, one in sorted(due.items())
        if one.next_due_at_ms is not None
        and one.next_due_at_ms <= before_ms
        and (one.last_accepted_ms is None or one.last_accepted_ms <= before_ms)
        and shown(destination) not in held
    ]


def _to_send(by_destination: dict[str, DestinationStats], name: str) -> int:
    counts = by_destination[name].counts if name in by_destination else _no_events()
    return counts["pending"] + counts["sending"] + counts["parked"]


def silence_in_words(destinations: Sequence[str]) -> str:
    """Return what is wrong with the destinations that `silent` returns."""
    named = [shown(destination) for destination in destinations[:_MOST_NAMED]]
    if destinations[_MOST_NAMED:]:
        named.append(f"{len(destinations) - _MOST_NAMED} more")
    return f"nothing was delivered for an hour to {', '.join(named)}, although events are due"


def _why_waiting(seen: Overview, waits_for: WaitsFor | None, *, now_ms: int) -> str:
    waiting = seen.waiting[waits_for][0]
    pauses = (pause.until_ms for pause in seen.pauses if pause.destination == waiting.destination)
    next_try_ms = max([waiting.next_attempt_at_ms, *pauses])
    next_try = f"in {duration(next_try_ms - now_ms)}" if next_try_ms > now_ms else "due now"
    why = f"{_of(waiting.destination)}{in_words(waiting.last_error)}"
    return f"{why}; {_are(waiting.events)} waiting; the next try is {next_try}"


def _of(destination: str) -> str:
    return "" if destination == DEFAULT_DESTINATION else f"{destination}: "


def _are(count: int) -> str:
    return f"{counted(count, 'event')} {'is' if count == 1 else 'are'}"
