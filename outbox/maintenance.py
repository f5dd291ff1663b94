"""What keeps the queue in order beside the flushing itself."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from outbox.lifecycle import Status

if TYPE_CHECKING:
    from outbox.policy import Policy
    from outbox.store import Store

log = logging.getLogger("outbox")


@dataclass(frozen=True)
class RequeueReport:
    """How many abandoned events were brought back, or would be; `per_type` by name, ascending."""

    total: int = 0
    per_type: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PurgeReport:
    """How many events were deleted, or would be; `per_type` by name, ascending."""

    total: int = 0
    undelivered: int = 0
    """How many of them had not been delivered."""
    in_flight: int = 0
    """How many fitted but were being sent, and were left alone."""
    per_type: dict[str, int] = field(default_factory=dict)


def requeue_abandoned(store: Store, *, cutoff_ms: int, now_ms: int, dry_run: bool) -> RequeueReport:
    """Bring back what was abandoned and was created before the cutoff."""
    per_type = store.requeue(cutoff_ms=cutoff_ms, now_ms=now_ms, dry_run=dry_run)
    return RequeueReport(sum(per_type.values()), per_type)


def purge(
    store: Store, *, event_type: str | None, created_before_ms: int | None, now_ms: int, dry_run: bool
) -> PurgeReport:
    """Delete what fits all that is given and is not being sent."""
    purged, in_flight = store.purge(
        event_type=event_type, created_before_ms=created_before_ms, now_ms=now_ms, dry_run=dry_run
    )
    per_type: Counter[str] = Counter()
    for (_, found), events in purged.items():
        per_type[found] += events
    undelivered = sum(events for (status, _), events in purged.items() if status != Status.SENT)
    return PurgeReport(purged.total(), undelivered, in_flight, dict(sorted(per_type.items())))


def unpark(store: Store, policy: Policy, *, now_ms: int) -> None:
    """Bring back parked rows after a success. A failure is logged: it must not undo what was sent."""
    limit, spread_ms = policy.unpark_limit, policy.unpark_spread_ms
    attempt("unparking", lambda: store.unpark(now_ms=now_ms, limit=limit, spread_ms=spread_ms))


def cap(store: Store, policy: Policy, *, now_ms: int) -> None:
    """Delete what is over the cap. A failure is logged: the next enqueue or flush tries again."""
    attempt("capping", lambda: store.trim(policy=policy, now_ms=now_ms))


def expire(store: Store, policy: Policy, *, now_ms: int) -> None:
    """Delete a slice of what was delivered long ago. A failure is logged: the next flush tries again."""
    keep_sent_ms = policy.keep_sent_ms
    if keep_sent_ms:
        attempt("expiring", lambda: store.expire(sent_before_ms=now_ms - keep_sent_ms))


def attempt(what: str, operation: Callable[[], int]) -> None:
    """Do what must not undo a flush when it fails; a failure is logged."""
    try:
        count = operation()
    except Exception as error:  # noqa: BLE001 - whatever it is, what was sent is sent
        log.warning(
            "%s the queue failed, the next one will try again: %s",
            what,
            error,
            extra={"event_name": "outbox.maintenance_failed", "task": what},
        )
    else:
        log.debug(
            "%s the queue: %d events",
            what,
            count,
            extra={"event_name": "outbox.maintenance", "task": what, "events": count},
        )
