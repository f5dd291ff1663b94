"""What keeps the queue in order beside the flushing itself."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from outbox.lifecycle import Status

if TYPE_CHECKING:
    from outbox.policy import Policy
    from outbox.store import Store

log = logging.getLogger("outbox")

Result = TypeVar("Result")


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


def tidy(store: Store, policy: Policy, *, now_ms: int, is_delivering: bool) -> None:
    """Keep the queue in order: bring back parked rows after a success, delete what is too much or too old.

    A failure is logged, for it must not undo what was sent; the next flush tries again.
    """
    chores = attempt("looking after", lambda: store.chores(policy, now_ms=now_ms))
    if chores is None:
        return
    if is_delivering and chores.is_any_parked:
        limit, spread_ms = policy.unpark_limit, policy.unpark_spread_ms
        attempt("unparking", lambda: store.unpark(now_ms=now_ms, limit=limit, spread_ms=spread_ms))
    if chores.may_be_over_cap:
        cap(store, policy, now_ms=now_ms)
    if chores.is_any_expired:
        attempt("expiring", lambda: store.expire(sent_before_ms=now_ms - (policy.keep_sent_ms or 0)))


def cap(store: Store, policy: Policy, *, now_ms: int) -> None:
    """Delete what is over the cap. A failure is logged: the next enqueue or flush tries again."""
    attempt("capping", lambda: store.trim(policy=policy, now_ms=now_ms))


def attempt(what: str, operation: Callable[[], Result]) -> Result | None:
    """Do what must not undo a flush when it fails; a failure is logged, and None returned."""
    try:
        result = operation()
    except Exception as error:  # noqa: BLE001 - whatever it is, what was sent is sent
        log.warning(
            "%s the queue failed, the next one will try again: %s",
            what,
            error,
            extra={"event_name": "outbox.maintenance_failed", "task": what},
        )
        return None
    if isinstance(result, int):
        log.debug(
            "%s the queue: %d events",
            what,
            result,
            extra={"event_name": "outbox.maintenance", "task": what, "events": result},
        )
    return result
