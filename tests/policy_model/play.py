"""Runs a scenario at a place, and tells what happened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from outbox.failures import UploadFailure
from outbox.waits import Look, wait_ms

from .services import Request, Service, dice
from .virtual_time import NOON_MS, Process, VirtualTime

_RESTART_MS = 10_000


class Arrival(NamedTuple):
    """Events of one kind that are enqueued at once, so long after the start."""

    at_ms: int
    kind: str
    count: int = 1


class Tried(NamedTuple):
    """Rows that are there at the start, due now, and failed before for hours."""

    kind: str
    count: int
    retry_count: int
    waits_for: str | None
    suspected: bool = False


@dataclass(frozen=True)
class Case:
    """One run: what is enqueued, how the service answers, for how long."""

    events: Sequence[Arrival]
    service: Service
    until_ms: int
    tried: Sequence[Tried] = ()
    seed: int = 1
    poll_interval_ms: int = 5_000
    deaths: float = 0.0
    """How often a flusher dies right after a request was answered; another one starts ten seconds later."""


class Sent(NamedTuple):
    """One request of a run. Times count from the start."""

    flusher: str
    begun_at_ms: int
    ended_at_ms: int
    keys: tuple[str, ...]
    failure: UploadFailure | None


@dataclass
class Event:
    """One event of a run. Times count from the start."""

    key: str
    kind: str
    enqueued_at_ms: int
    accepted_at_ms: int | None = None
    status: str = "pending"
    last_error: str | None = None

    @property
    def latency_ms(self) -> int | None:
        return None if self.accepted_at_ms is None else self.accepted_at_ms - self.enqueued_at_ms


@dataclass
class History:
    """What happened in a run."""

    events: dict[str, Event] = field(default_factory=dict)
    requests: list[Sent] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Event]:
        return [event for event in self.events.values() if event.kind in kinds]

    def requests_with(self, kind: str) -> list[Sent]:
        return [request for request in self.requests if any(self.events[key].kind == kind for key in request.keys)]


class Died(BaseException):
    """A flusher died: what it knew is lost, and its rows stay as they are in the table."""


class Final(NamedTuple):
    """How the table shows an event at the end."""

    status: str
    last_error: str | None


Upload = Callable[[Sequence[str]], UploadFailure | None]
"""Sends the events with these keys; takes the time that the service takes."""


class Flusher(Protocol):
    """One flusher: it looks at the queue and delivers a batch."""

    def look(self) -> Look: ...


class Place(Protocol):
    """A table and the flushers that work on it. An event's key comes back in each upload."""

    def enqueue(self, keys: Sequence[str]) -> object: ...

    def add_tried(self, keys: Sequence[str], tried: Tried) -> None:
        """Add rows that failed before; they were created an hour ago and are due now."""
        ...

    def flusher(self, name: str, upload: Upload) -> Flusher: ...

    def read(self) -> Mapping[str, Final]: ...


def play(case: Case, build: Callable[[VirtualTime], Place], flushers: int) -> History:
    """Run a case. Flushers are processes of their own; the first one is that of the program that enqueues."""
    time = VirtualTime()
    place = build(time)
    history = History()
    random = dice(case.seed)
    processes: list[Process] = []

    def keys_of(kind: str, count: int) -> list[str]:
        keys = [f"{kind}-{len(history.events) + number}" for number in range(count)]
        history.events |= {key: Event(key, kind, time.now_ms - NOON_MS) for key in keys}
        return keys

    def arrive(arrival: Arrival) -> None:
        place.enqueue(keys_of(arrival.kind, arrival.count))
        processes[0].wake()

    def live(process: Process, name: str) -> None:
        def upload(keys: Sequence[str]) -> UploadFailure | None:
            begun_at_ms = time.now_ms - NOON_MS
            kinds = [history.events[key].kind for key in keys]
            answer = case.service(Request(begun_at_ms, kinds, random))
            process.sleep(answer.after_ms)
            ended_at_ms = time.now_ms - NOON_MS
            history.requests.append(Sent(name, begun_at_ms, ended_at_ms, tuple(keys), answer.failure))
            if answer.failure is None:
                for key in keys:
                    history.events[key].accepted_at_ms = ended_at_ms
            if random.random() < case.deaths:
                raise Died
            return answer.failure

        while True:
            with suppress(Died):
                work(process, place.flusher(name, upload), time, case.poll_interval_ms)
            process.sleep(_RESTART_MS)

    for tried in case.tried:
        place.add_tried(keys_of(tried.kind, tried.count), tried)
    for arrival in _in_order(case.events):
        time.at(NOON_MS + arrival.at_ms, lambda arrival=arrival: arrive(arrival))
    for number in range(flushers):
        name = f"flusher{number}"
        processes.append(time.start(name, lambda process, name=name: live(process, name)))
    time.run(NOON_MS + case.until_ms)
    table = place.read()
    for key, event in history.events.items():
        event.status, event.last_error = table.get(key, Final("deleted", None))
    return history


def work(process: Process, flusher: Flusher, time: VirtualTime, poll_interval_ms: int) -> None:
    """Look at the queue again and again, and wait in between as the worker does."""
    rounds, before = 0, None
    while True:
        look = flusher.look()
        kind = (look.goes_on, look.has_failed, look.paused_until_ms is not None)
        rounds = rounds + 1 if kind == before else 0
        before = kind
        wait = wait_ms(look, rounds=rounds, poll_interval_ms=poll_interval_ms, now_ms=time.now_ms)
        if wait:
            process.wait(wait)


def _in_order(arrivals: Iterable[Arrival]) -> list[Arrival]:
    return sorted(arrivals, key=lambda arrival: arrival.at_ms)
