"""Kinds of services. Each answers a request by what it holds and by the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from outbox.failures import HttpFailure, TransportFailure, UploadFailure

SECOND = 1_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE

DEADLINE_MS = 45 * SECOND
_ANSWER_MS = 100


class Answer(NamedTuple):
    """What becomes of a request, and after how long; without a failure it is accepted."""

    failure: UploadFailure | None = None
    after_ms: int = _ANSWER_MS


class Request(NamedTuple):
    """What a service sees: when, counted from the start of the scenario, and the kinds of events."""

    at_ms: int
    kinds: Sequence[str]
    random: Random


Service = Callable[[Request], Answer]

OK = Answer()


def dice(seed: int) -> Random:
    return Random(seed)  # noqa: S311 - it has to be the same every time


def status(code: int) -> Answer:
    return Answer(HttpFailure(code))


def timed_out() -> Answer:
    failure = TransportFailure(f"no complete answer within {DEADLINE_MS} ms", is_timeout=True)
    return Answer(failure, DEADLINE_MS)


def by_content(**answers: Callable[[], Answer]) -> Service:
    """Answer by the first event whose kind is named; accept a request without any."""

    def service(request: Request) -> Answer:
        return next((answers[kind]() for kind in request.kinds if kind in answers), OK)

    return service


def between(start_ms: int, end_ms: int, trouble: Service, otherwise: Service = lambda _: OK) -> Service:
    """Have trouble for some time."""

    def service(request: Request) -> Answer:
        return (trouble if start_ms <= request.at_ms < end_ms else otherwise)(request)

    return service


def always(answer: Callable[[], Answer]) -> Service:
    return lambda _: answer()


def now_and_then(
    answer: Callable[[], Answer], probability: float = 0.5, otherwise: Service = lambda _: OK
) -> Service:
    """Some servers behind the balancer are old, others new."""
    return lambda request: answer() if request.random.random() < probability else otherwise(request)
