"""Worlds: events, bad rows and a service with troubles, drawn from a seed or named; and what is promised in them."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from outbox.failures import HttpFailure

from .play import Arrival, Case, Event, History
from .services import (
    HOUR,
    MINUTE,
    SECOND,
    Answer,
    Service,
    always,
    between,
    by_content,
    dice,
    now_and_then,
    status,
    timed_out,
)

BLAME, LOSS, RECOVERY = (
    "no event that the service would accept is abandoned, unless it is too old",
    "nothing undelivered is deleted",
    "the backlog recovers within a bound",
)

RECOVERY_MS = 15 * MINUTE
"""How long after the last trouble an event is delivered, at the latest."""

RECOVERY_ALONE_MS = 45 * MINUTE
"""The same, for an event that failed alone: its longest backoff, with jitter, is 40 minutes."""

BAD: dict[str, Callable[[], Answer]] = {
    "rejected": lambda: status(422),
    "malformed": lambda: status(400),
    "crashing": lambda: status(500),
    "forbidden": lambda: status(403),
    "slow": timed_out,
}
"""Kinds of events that the service never accepts."""


class World(NamedTuple):
    """A case, and when its last trouble is over."""

    case: Case
    quiet_at_ms: int


class Violation(Exception):  # noqa: N818 - it is what was found
    """A promise that was broken."""

    def __init__(self, promise: str, event: Event) -> None:
        super().__init__(f"{promise}: {event}")
        self.promise = promise


def _rolling_deploy(random: Random) -> Service:
    return lambda request: status(random.choice((404, 422, 500))) if random.random() < 0.3 else _usual(request)


_usual = by_content(**BAD)

NAMED: dict[str, Callable[[], World]] = {
    "a missing route": lambda: _named(between(5 * MINUTE, 20 * MINUTE, always(lambda: status(404)), _usual), 20),
    "a rolling deploy": lambda: _named(between(5 * MINUTE, 15 * MINUTE, _rolling_deploy(dice(1)), _usual), 15),
    "a schema change": lambda: _named(between(5 * MINUTE, 65 * MINUTE, always(lambda: status(422)), _usual), 65),
    "a firewall and a row that times out": lambda: _named(_usual, 0, "forbidden", "slow"),
}
"""Each brings one row that is rejected for ever, and where it says so, others that the service never accepts."""


def _named(service: Service, quiet_at_minutes: int, *bad: str) -> World:
    """Return a world with an event each minute, and a hundred when the trouble begins."""
    quiet_at_ms = quiet_at_minutes * MINUTE
    until_ms = quiet_at_ms + HOUR // 2
    arrivals = [Arrival(at_ms, "good") for at_ms in range(0, until_ms - RECOVERY_MS, MINUTE)]
    arrivals += [Arrival(number * MINUTE, kind) for number, kind in enumerate(("rejected", *bad), start=2)]
    arrivals.append(Arrival(6 * MINUTE, "good", 100))
    return World(Case(arrivals, service, until_ms, poll_interval_ms=20 * SECOND), quiet_at_ms)


def draw(seed: int) -> World:
    """Return the world of a seed: an hour of events and a trickle afterwards, up to three troubles, up to 31 bad rows."""
    random = dice(seed)
    interval_ms = random.choice((300, 2 * SECOND, 10 * SECOND, MINUTE))
    arrivals = [Arrival(at_ms, "good") for at_ms in range(0, HOUR, interval_ms)]
    arrivals.append(Arrival(random.randrange(HOUR), "good", random.choice((1, 20, 64, 500))))
    bad = [kind for kind in BAD if kind != "slow"]
    arrivals += [
        Arrival(random.randrange(HOUR), random.choice(bad)) for _ in range(random.choice((0, 1, 1, 3, 30)))
    ]
    if random.random() < 0.3:
        arrivals.append(Arrival(random.randrange(HOUR), "slow"))
    service: Service = by_content(**BAD)
    quiet_at_ms = 0
    for _ in range(random.choice((1, 1, 2, 3))):
        begin_ms = quiet_at_ms + random.randrange(20 * MINUTE)
        trouble, longest_ms = _trouble(random, service)
        quiet_at_ms = begin_ms + random.randrange(longest_ms)
        service = between(begin_ms, quiet_at_ms, trouble, service)
    until_ms = max(quiet_at_ms, HOUR) + RECOVERY_ALONE_MS
    # Without any other event nothing shows that the service works again, and rows wait for their backoff.
    arrivals += [Arrival(at_ms, "good") for at_ms in range(HOUR, until_ms - RECOVERY_ALONE_MS // 3, MINUTE)]
    deaths = random.choice((0, 0, 0.02))
    return World(Case(arrivals, service, until_ms, seed=seed, deaths=deaths), quiet_at_ms)


def _trouble(random: Random, usual: Service) -> tuple[Service, int]:
    """Return a trouble and how long it may last."""
    code = random.choice((404, 405, 410, 500, 502, 503))
    share = random.choice((0.2, 0.5, 0.8))
    return random.choice(
        (
            (always(lambda: status(code)), HOUR),
            (always(lambda: status(401)), HOUR),
            (always(timed_out), HOUR),
            (always(lambda: status(422)), HOUR),
            (always(lambda: Answer(HttpFailure(429, retry_after_ms=30 * SECOND))), 10 * MINUTE),
            (always(lambda: Answer(HttpFailure(503, retry_after_ms=5 * SECOND))), 10 * MINUTE),
            (now_and_then(lambda: status(code), share, usual), 30 * MINUTE),
            # Any longer and no policy can tell the rows from the service.
            (now_and_then(lambda: status(422), share, usual), 10 * MINUTE),
        )
    )


def check(world: World, history: History) -> None:
    """Raise `Violation` if a promise was broken."""
    failed_alone = {request.keys[0] for request in history.requests if request.failure and len(request.keys) == 1}
    for event in history.events.values():
        acceptable = event.kind not in BAD
        if event.status == "deleted" and event.accepted_at_ms is None:
            raise Violation(LOSS, event)
        if acceptable and event.status == "abandoned" and not (event.last_error or "").startswith("aged-out"):
            raise Violation(BLAME, event)
        if event.status == "sent" and event.accepted_at_ms is None:
            raise Violation(LOSS, event)
        since_ms = max(event.enqueued_at_ms, world.quiet_at_ms)
        late_ms = since_ms + (RECOVERY_ALONE_MS if event.key in failed_alone else RECOVERY_MS)
        if acceptable and (event.accepted_at_ms is None or event.accepted_at_ms > late_ms):
            raise Violation(RECOVERY, event)
