"""Maintenance of the queue: requeue, purge, unpark, and deletion of rows over the cap or past their time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from outbox.destinations import DEFAULT_DESTINATION, Addressed
from outbox.failures import ConfigurationError, OutboxError
from outbox.filters import cutoff_ms
from outbox.lifecycle import Status
from outbox.records import Chores

if TYPE_CHECKING:
    from outbox.policy import Policy
    from outbox.storage.acting import Acted
    from outbox.storage.store import Store

log = logging.getLogger("outbox")

_TIMES_BELOW = 2**53  # a row with a larger time is invalid

Result = TypeVar("Result")


@dataclass(frozen=True)
class RequeueReport:
    """Number of abandoned events that were requeued, or would be in a dry run. `per_type` is sorted by type."""

    total: int = 0
    per_type: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ActionReport:
    """Number of events that were retried, requeued or abandoned, or would be in a dry run."""

    total: int = 0
    in_flight: int = 0
    """Number of matching events that were being sent and were not changed."""
    per_type: dict[str, int] = field(default_factory=dict)
    """The number by event type, sorted by type."""


@dataclass(frozen=True)
class PurgeReport:
    """Number of events that were deleted, or would be in a dry run. `per_type` is sorted by type."""

    total: int = 0
    undelivered: int = 0
    """Number of these events that had not been delivered."""
    in_flight: int = 0
    """Number of matching events that were being sent and were not deleted."""
    per_type: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ReplaceReport:
    """Which events were replaced."""

    replaced: dict[int, int] = field(default_factory=dict)
    """The row id of each new event, by the row id of the old one."""
    refused: dict[int, str] = field(default_factory=dict)
    """Why an event was not replaced, in words, by its row id."""


@dataclass(frozen=True)
class CopyReport:
    """Number of events that were copied to another destination, or would be in a dry run."""

    copied: int = 0
    already_there: int = 0
    """Number of events that the other destination already had."""
    damaged: int = 0
    """Number of events that were not copied, because another program wrote values that no event can have."""


def copy(  # noqa: PLR0913 - the command has as many options
    store: Store,
    policy: Policy,
    *,
    source: str,
    target: str,
    created_from_ms: int | None,
    dry_run: bool,
    progress: Callable[[int], object],
) -> CopyReport:
    """Record the events of a destination, of any status, for another one that does not have them yet.

    A copy has the payload, the ids and the times of the event. It is pending, did not fail, and is due now or at
    its own time. Each transaction inserts up to a thousand rows, fewer if they are large, so after an error some
    may already be there. If there is no room for a slice, this raises `QueueFull`. `progress` gets how many row
    ids each slice covers.
    """
    now = store.now_ms()
    last_id = store.copying.last_id()
    report = CopyReport()
    slices = store.copying.slices(
        source,
        created_from_ms=-(2**63) if created_from_ms is None else created_from_ms,
        last_id=last_id,
        now_ms=now,
    )
    for rows, damaged, walked in slices:
        new = store.copying.missing(target, rows)
        if new and not dry_run:
            store.intake.insert([Addressed((target,), True, new)], policy=policy, now_ms=now)
        report = CopyReport(
            report.copied + len(new),
            report.already_there + len(rows) - len(new),
            report.damaged + damaged,
        )
        progress(walked)
    return report


def requeue_abandoned(
    store: Store, destination: str | None, *, cutoff_ms: int, now_ms: int, dry_run: bool
) -> RequeueReport:
    """Requeue the abandoned events that were created before the cutoff. None means all destinations."""
    per_type = store.revival.requeue(destination, cutoff_ms=cutoff_ms, now_ms=now_ms, dry_run=dry_run)
    return RequeueReport(sum(per_type.values()), per_type)


def report(acted: Acted) -> ActionReport:
    """Return what an action on many events did."""
    return ActionReport(acted.changed.total(), acted.in_flight, _per_type(acted))


def purge_report(acted: Acted) -> PurgeReport:
    """Return what a purge did."""
    undelivered = sum(events for (status, _), events in acted.changed.items() if status != Status.SENT)
    return PurgeReport(acted.changed.total(), undelivered, acted.in_flight, _per_type(acted))


def _per_type(acted: Acted) -> dict[str, int]:
    per_type: Counter[str] = Counter()
    for (_, event_type), events in acted.changed.items():
        per_type[event_type] += events
    return dict(sorted(per_type.items()))


def due_chores(
    store: Store, policy: Policy, destination: str, *, now_ms: int, seen: tuple[Any, ...] | None = None
) -> Chores | None:
    """Return the maintenance that is due for a destination, or None if the database can't be read.

    `seen` is the row of `chores_query`, if a settlement ran that query.
    """
    chores = attempt("looking after", lambda: store.views.chores(policy, destination, now_ms=now_ms, seen=seen))
    if chores is not None:
        store.claims.take_turns(destination, is_any_failed=chores.is_any_failed)
    return chores


def bring_back(store: Store, policy: Policy, chores: Chores, *, now_ms: int, ended_failures: int) -> None:
    """Make waiting and parked rows due, because the service accepted a row.

    `ended_failures` is the number of failures in a row before the acceptance.
    """
    if chores.is_any_failed and not policy.is_original:
        attempt(
            "reviving",
            lambda: store.revival.revive(
                chores.destination, now_ms=now_ms, policy=policy, ended_failures=ended_failures
            ),
        )
    if chores.is_any_parked:
        limit, spread_ms = policy.unpark_limit, policy.unpark_spread_ms
        attempt(
            "unparking",
            lambda: store.revival.unpark(chores.destination, now_ms=now_ms, limit=limit, spread_ms=spread_ms),
        )


def try_parked(store: Store, policy: Policy, chores: Chores, *, now_ms: int) -> None:
    """Make one parked row due, at most once a minute, to find out whether the service works again."""
    if chores.is_any_parked and not policy.is_original:
        spread_ms = policy.unpark_spread_ms
        attempt(
            "unparking",
            lambda: store.revival.unpark_one(chores.destination, now_ms=now_ms, spread_ms=spread_ms),
        )


def delete(store: Store, policy: Policy, chores: Chores, *, now_ms: int) -> None:
    """Delete rows of a destination over the cap, and delivered rows that are old enough."""
    destination = chores.destination
    if chores.may_be_over_cap:
        cap(store, policy, destination, now_ms=now_ms)
    if chores.may_be_over_bounds:
        attempt("trimming", lambda: store.bounds.trim(policy, destination, now_ms=now_ms))
    if chores.is_any_expired:
        sent_before_ms = now_ms - (policy.keep_sent_ms or 0)
        attempt("expiring", lambda: store.deletion.expire(destination, sent_before_ms=sent_before_ms))


def cap(store: Store, policy: Policy, destination: str = DEFAULT_DESTINATION, *, now_ms: int) -> None:
    """Delete the rows over the cap. A failure is only logged; the next enqueue or flush tries again."""
    attempt("capping", lambda: store.deletion.trim(policy, destination, now_ms=now_ms))


def attempt(what: str, operation: Callable[[], Result]) -> Result | None:
    """Run a maintenance task. Log an `OutboxError` and return None, so that it does not fail the flush.

    Any other exception is raised. It may come from another thread or a signal handler, such as the time limit of
    a task queue. The outcomes of the flush are already written then.
    """
    try:
        result = operation()
    except OutboxError as error:
        log.warning(
            "%s the queue failed, the next flush tries again: %s",
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


def earliest_ms(not_before: datetime | int | None) -> int | None:
    """Return when an event may be sent at the earliest. Raises `ConfigurationError` for a time out of range."""
    if not_before is None:
        return None
    earliest = cutoff_ms(not_before, "not_before")
    if 0 <= earliest < _TIMES_BELOW:
        return earliest
    raise ConfigurationError(
        f"not_before is {not_before!r}, expected a time from 1970 on and below {_TIMES_BELOW} ms"
    )
