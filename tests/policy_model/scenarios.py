"""What is promised of delivery, as figures: each scenario with what must be reached.

A scenario is data: it knows neither the table nor the flusher, so the model and the real outbox play the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

from .play import Arrival, Case, Event, History, Tried
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

NEVER = 10**12


class Bound(NamedTuple):
    """What a figure must be."""

    at_most: float
    at_least: float = 0
    unit: float = 1

    def holds(self, figure: float) -> bool:
        return self.at_least <= figure <= self.at_most


@dataclass(frozen=True)
class Scenario:
    """One line of the table: its cases, and the figures that each of them must reach."""

    name: str
    cases: Mapping[str, Case]
    measure: Callable[[History], Mapping[str, float]]
    bounds: Mapping[str, Bound]


def every(interval_ms: int, until_ms: int, kind: str = "other", *, first_ms: int | None = None) -> list[Arrival]:
    first_ms = interval_ms // 2 if first_ms is None else first_ms
    return [Arrival(at_ms, kind) for at_ms in range(first_ms, until_ms, interval_ms)]


def one_a_minute(until_ms: int, *, first_ms: int = 30 * SECOND) -> list[Arrival]:
    return every(MINUTE, until_ms, first_ms=first_ms)


def latest_latency(events: Iterable[Event]) -> float:
    return max((NEVER if event.latency_ms is None else event.latency_ms for event in events), default=0)


def last_acceptance(events: Iterable[Event]) -> float:
    return max((NEVER if event.accepted_at_ms is None else event.accepted_at_ms for event in events), default=0)


def abandoned(events: Iterable[Event]) -> int:
    return sum(event.status == "abandoned" for event in events)


def undelivered(events: Iterable[Event]) -> int:
    return sum(event.status != "sent" for event in events)


# A good row behind thousands of bad ones


def _behind_many() -> Scenario:
    cases = {}
    for kind, code, waits_for in (("bad422", 422, "proof"), ("bad500", 500, "row")):
        service = by_content(**{kind: lambda code=code: status(code)})
        fresh = [Arrival(0, kind, 9_900)]
        tried = {
            f"waiting for {waits_for}": [Tried(kind, 9_900, 5, waits_for, suspected=waits_for == "proof")],
            "waiting for the service": [Tried(kind, 9_900, 5, "service")],
            "tried by the original": [Tried(kind, 9_900, 5, None)],
        }
        for at_ms in (SECOND, 10 * SECOND, 10 * MINUTE, 12 * MINUTE + 29 * SECOND):
            until_ms = at_ms + 5 * MINUTE
            others = one_a_minute(until_ms)
            good = Arrival(at_ms, "good")
            when = f"after {at_ms // SECOND} s"
            cases[f"{code}, fresh, {when}"] = Case([*fresh, good, *others], service, until_ms)
            for how, rows in tried.items():
                cases[f"{code}, {how}, {when}"] = Case([good, *others], service, until_ms, rows)
    return Scenario(
        "one new good row behind 9,900 rows that are answered 422 or 500 for ever",
        cases,
        lambda history: {
            "sent after": latest_latency(history.of("good")),
            # Abandoning a proven row takes a request of its own.
            "requests a minute": (len(history.requests) - abandoned(history.events.values()))
            * MINUTE
            / history.requests[-1].ended_at_ms,
        },
        {"sent after": Bound(1 * MINUTE, unit=SECOND), "requests a minute": Bound(100)},
    )


# Neighbours of bad rows


def _claim_of(size: int, bad: Mapping[int, str]) -> list[Arrival]:
    return [Arrival(0, bad.get(place, "good")) for place in range(size)]


def _places(size: int, count: int) -> dict[str, list[int]]:
    return {
        "first": list(range(count)),
        "last": list(range(size - count, size)),
        "middle": list(range(size // 2, size // 2 + count)),
        "spread": [(number + 1) * size // (count + 1) for number in range(count)],
        "anywhere": dice(count).sample(range(size), count),
    }


def _neighbours(name: str, size: int, kind: str, code: int, counts: Sequence[int], at_most_ms: int) -> Scenario:
    cases = {}
    until_ms = 15 * MINUTE
    for count in counts:
        for where, places in _places(size, count).items():
            for first_ms in (0, 10 * SECOND, 30 * SECOND, 59 * SECOND):
                events = [
                    *_claim_of(size, dict.fromkeys(places, kind)),
                    *one_a_minute(until_ms, first_ms=first_ms),
                ]
                service = by_content(**{kind: lambda: status(code)})
                cases[f"{count} {where}, others from {first_ms // SECOND} s"] = Case(events, service, until_ms)
    return Scenario(
        name,
        cases,
        lambda history: {
            "delivered after": last_acceptance(history.of("good")),
            "others after": latest_latency(history.of("other")),
        },
        {"delivered after": Bound(at_most_ms, unit=SECOND), "others after": Bound(at_most_ms, unit=SECOND)},
    )


def _two_kinds() -> Scenario:
    until_ms = 15 * MINUTE
    service = by_content(bad422=lambda: status(422), bad500=lambda: status(500))
    cases = {}
    for order in (("bad422", "bad500"), ("bad500", "bad422")):
        for where, places in _places(64, 2).items():
            for first_ms in (0, 30 * SECOND, 59 * SECOND):
                bad = dict(zip(sorted(places), order, strict=True))
                events = [*_claim_of(64, bad), *one_a_minute(until_ms, first_ms=first_ms)]
                cases[f"{order[0]} first, {where}, others from {first_ms // SECOND} s"] = Case(
                    events, service, until_ms
                )
    return Scenario(
        "one row answered 422 and one answered 500 in one claim",
        cases,
        lambda history: {"delivered after": last_acceptance(history.of("good"))},
        {"delivered after": Bound(5 * MINUTE, unit=SECOND)},
    )


# Deploys


def _missing_route() -> Scenario:
    end_ms = 10 * MINUTE
    until_ms = 13 * MINUTE
    return Scenario(
        "a route that is missing for 10 minutes, 10 events a second",
        {
            f"{code}": Case(
                every(100, end_ms), between(0, end_ms, always(lambda code=code: status(code))), until_ms
            )
            for code in (404, 405, 410)
        },
        lambda history: {
            "abandoned": abandoned(history.of("other")),
            "delivered after": last_acceptance(history.of("other")) - end_ms,
        },
        {"abandoned": Bound(0), "delivered after": Bound(1 * MINUTE, -NEVER, unit=SECOND)},
    )


def _rolling_deploy() -> Scenario:
    end_ms = 10 * MINUTE
    until_ms = HOUR
    cases = {}
    for code in (422, 404, 500):
        for seed in range(3):
            flaky = between(0, end_ms, now_and_then(lambda code=code: status(code)))
            cases[f"{code}, seed {seed}"] = Case(every(100, 15 * MINUTE), flaky, until_ms, seed=seed)
    return Scenario(
        "a rolling deploy of 10 minutes: each answer is 422 (404, 500) with probability 1/2, 10 events a second",
        cases,
        lambda history: {
            "abandoned": abandoned(history.of("other")),
            "undelivered": undelivered(history.of("other")),
            "delivered after": last_acceptance(e for e in history.of("other") if e.enqueued_at_ms < end_ms)
            - end_ms,
        },
        {
            "abandoned": Bound(0),
            "undelivered": Bound(0),
            # The longest backoff with its jitter.
            "delivered after": Bound(40 * MINUTE, -NEVER, unit=SECOND),
        },
    )


# One row that is always rejected


def _always_rejected(
    name: str, interval_ms: int, until_ms: int, bound: Bound, offsets_ms: Sequence[int]
) -> Scenario:
    def measure(history: History) -> Mapping[str, float]:
        tries = history.requests_with("bad")
        (bad,) = history.of("bad")
        return {
            "abandoned after": tries[-1].ended_at_ms if bad.status == "abandoned" else NEVER,
            "requests": len(tries),
        }

    cases = {}
    for first_ms in offsets_ms:
        events = [Arrival(0, "bad"), *every(interval_ms, until_ms, first_ms=first_ms)]
        cases[f"others from {first_ms // SECOND} s"] = Case(events, by_content(bad=lambda: status(422)), until_ms)
    return Scenario(name, cases, measure, {"abandoned after": bound, "requests": Bound(10)})


# Rows that fail among many


def _latencies(history: History) -> Mapping[str, float]:
    latencies = sorted(NEVER if event.latency_ms is None else event.latency_ms for event in history.of("other"))
    return {
        "median": median(latencies),
        "p99": latencies[len(latencies) * 99 // 100],
        "longest": latencies[-1],
    }


def _fifty_of_500() -> Scenario:
    until_ms = HOUR
    others = every(100, until_ms - 10 * SECOND)
    service = by_content(bad=lambda: status(500))
    at_random = [Arrival(dice(number).randrange(HOUR), "bad") for number in range(50)]
    return Scenario(
        "50 rows answered 500 among 10 events a second",
        {
            "all at the start": Case([Arrival(0, "bad", 50), *others], service, until_ms),
            "in the first 5 seconds": Case([*every(100, 5 * SECOND, "bad"), *others], service, until_ms),
            "at any time": Case([*at_random, *others], service, until_ms),
        },
        lambda history: {
            "p99": _latencies(history)["p99"],
            "requests with them": len(history.requests_with("bad")),
        },
        {"p99": Bound(5 * SECOND, unit=SECOND), "requests with them": Bound(1_000)},
    )


def _one_times_out() -> Scenario:
    until_ms = HOUR
    others = every(600, until_ms - 2 * MINUTE)
    cases = {
        f"at {at_ms} ms": Case([Arrival(at_ms, "slow"), *others], by_content(slow=timed_out), until_ms)
        for at_ms in (0, 250, 10 * SECOND, 10 * SECOND + 100, 10 * MINUTE + 450)
    }
    return Scenario(
        "one row that times out (45 s) among 100 events a minute",
        cases,
        lambda history: {name: _latencies(history)[name] for name in ("median", "longest")},
        {"median": Bound(1 * SECOND, unit=SECOND), "longest": Bound(60 * SECOND, unit=SECOND)},
    )


# Outages


def _outage(name: str, answers: Mapping[str, Callable[[], Answer]], requests: int, at_most_ms: int) -> Scenario:
    until_ms = HOUR + 6 * MINUTE
    events = [Arrival(0, "good", 10_000), *one_a_minute(until_ms - MINUTE)]

    def measure(history: History) -> Mapping[str, float]:
        before = [event for event in history.of("good", "other") if event.enqueued_at_ms < HOUR]
        return {
            "requests": sum(request.begun_at_ms < HOUR for request in history.requests),
            "abandoned": abandoned(history.events.values()),
            "delivered after": last_acceptance(before) - HOUR,
        }

    return Scenario(
        name,
        {kind: Case(events, between(0, HOUR, always(answer)), until_ms) for kind, answer in answers.items()},
        measure,
        {
            "requests": Bound(requests),
            "abandoned": Bound(0),
            "delivered after": Bound(at_most_ms, -NEVER, unit=SECOND),
        },
    )


def _no_new_event() -> Scenario:
    cases = {}
    for count in (1, 100, 1_000):
        for code in (401, 403):
            events = [Arrival(0, "good", count)]
            service: Service = between(0, HOUR, always(lambda code=code: status(code)))
            case = Case(events, service, HOUR + 5 * MINUTE)
            cases[f"{code}, {count} events at the start"] = case
            minutely = replace(case, events=[*events, *one_a_minute(HOUR)])
            cases[f"{code}, {count} events, then one a minute"] = minutely
    return Scenario(
        "an hour of 401 and no new event afterwards",
        cases,
        lambda history: {
            "delivered after": last_acceptance(history.of("good", "other")) - HOUR,
        },
        {"delivered after": Bound(2 * MINUTE, -NEVER, unit=SECOND)},
    )


def _forty_first() -> Scenario:
    until_ms = 20 * MINUTE
    cases = {}
    for first_ms in (0, 10 * SECOND, 30 * SECOND, 59 * SECOND):
        events = [
            Arrival(0, "bad", 40),
            Arrival(0, "good"),
            Arrival(0, "bad", 9_900),
            *one_a_minute(until_ms, first_ms=first_ms),
        ]
        cases[f"others from {first_ms // SECOND} s"] = Case(events, by_content(bad=lambda: status(500)), until_ms)
    return Scenario(
        "a good row 41st behind 40 that are answered 500, 9,900 more behind it, one other event a minute",
        cases,
        lambda history: {"sent after": latest_latency(history.of("good"))},
        {"sent after": Bound(10 * MINUTE, unit=SECOND)},
    )


SCENARIOS: Sequence[Scenario] = (
    _behind_many(),
    _neighbours("neighbours of one row (three rows) answered 500", 64, "bad", 500, (1, 3), 5 * MINUTE),
    _neighbours("20 neighbours of one row that a firewall answers with 403", 21, "bad", 403, (1,), 2 * MINUTE),
    _two_kinds(),
    _missing_route(),
    _rolling_deploy(),
    _always_rejected(
        "one row that is always answered 422",
        MINUTE,
        40 * MINUTE,
        Bound(20 * MINUTE, 10 * MINUTE, unit=SECOND),
        (0, 10 * SECOND, 30 * SECOND, 59 * SECOND),
    ),
    _always_rejected(
        "the same, with one other event an hour",
        HOUR,
        3 * HOUR,
        Bound(2 * HOUR, unit=SECOND),
        (0, 10 * SECOND, 5 * MINUTE, 30 * MINUTE, HOUR - SECOND),
    ),
    _fifty_of_500(),
    _one_times_out(),
    _outage(
        "10,000 rows, an hour of 503 (or 404, 401, time-outs)",
        {
            "503": lambda: status(503),
            "404": lambda: status(404),
            "401": lambda: status(401),
            "time-outs": timed_out,
        },
        300,
        2 * MINUTE,
    ),
    _outage("10,000 rows, an hour of 422 for everything", {"422": lambda: status(422)}, 1_000, 3 * MINUTE),
    _no_new_event(),
    _forty_first(),
)
