"""What the pytest plugin gives to tests: a real server with scripted answers, and travel through time.

The fixtures themselves are in `pytest_outbox`, which is loaded in every run of pytest and so loads nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from reprlib import repr as short
from typing import Any

import msgspec
from freezegun import freeze_time

from outbox.clock import now_ms
from outbox.events import Event, encode
from outbox.failures import ConfigurationError
from outbox.receiver import Answer, Drop, Hang, IngestServer, Request

__all__ = ["Answer", "Drop", "Hang", "Received", "Request", "ScriptedServer", "TimeMachine", "time_machine"]

_SHOWN = 20
_SHOWN_CHARACTERS = 200

# What binds the clock when it is loaded, or can't be loaded while the time stands still.
_LOADED_BEFORE = ("outbox.client", "outbox.worker", "psycopg")


@dataclass(frozen=True)
class Received:
    """The answer to whether an event was received. It is true or false; its repr tells why."""

    answer: bool
    why: str

    def __bool__(self) -> bool:
        return self.answer

    def __repr__(self) -> str:
        return f"<{self.why}>"


class ScriptedServer(IngestServer):
    """A real ingest server on this machine, which accepts everything unless a script or a mode says otherwise."""

    @property
    def events(self) -> list[dict[str, Any]]:
        """The different events that were accepted, as they came over the wire, in the order of arrival."""
        return [msgspec.json.decode(text) for text in tuple(self.stored.values())]

    def received(self, event: Event | Mapping[str, Any]) -> Received:
        """Tell whether this event was accepted, or for a mapping, one that has all of these fields.

        Compared is what goes over the wire. Raises `InvalidEvent` for an event that could not be enqueued.
        """
        if isinstance(event, Mapping):
            wanted = {name: _plain(value) for name, value in event.items()}
        else:
            wanted = msgspec.json.decode(encode(event)[1])
        tag, events = wanted.get("event_type"), self.events
        alike = [one for one in events if tag in (None, one.get("event_type"))]
        wrong = [_differences(wanted, one, is_partial=isinstance(event, Mapping)) for one in alike]
        if {} in wrong:
            return Received(answer=True, why="received")
        if not events:
            return _not_received(f"{_count(len(self.requests), 'request')} brought no event")
        if not alike:
            return _not_received(f"no {tag} among {_count(len(events), 'event')}")
        nearest = ", ".join(f"{name} {words}" for name, words in min(wrong, key=len).items())
        return _not_received(f"of {len(alike)} {tag or 'in all'} the nearest has {nearest}")

    def transcript(self) -> str:
        """Return the last requests and the last events accepted, a line each; pytest shows it after a failure."""
        requests = [
            f"POST {request.path}: {_count(request.events, 'event')}, answered {request.status or 'with nothing'}"
            for request in self.requests[-_SHOWN:]
        ]
        events = [f"accepted: {text[:_SHOWN_CHARACTERS]}" for text in tuple(self.stored.values())[-_SHOWN:]]
        return "\n".join([*requests, *events]) or "no request"

    def __repr__(self) -> str:
        return f"<server at {self.url}>"


class TimeMachine:
    """The time of this process, which stands still but for the moves that a test makes."""

    def __init__(self, frozen: Any) -> None:
        self._frozen = frozen

    @property
    def now(self) -> datetime:
        """The time, in UTC."""
        now: datetime = self._frozen().replace(tzinfo=timezone.utc)
        return now

    def travel(
        self,
        *,
        days: float = 0,
        hours: float = 0,
        minutes: float = 0,
        seconds: float = 0,
        milliseconds: float = 0,
    ) -> None:
        """Move the time by all of this together; what is below zero goes back."""
        self._frozen.tick(
            timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds, milliseconds=milliseconds)
        )

    def move_to(self, when: datetime) -> None:
        """Move the time to this one, which has a time zone. Raises `ConfigurationError` where it has none."""
        if when.utcoffset() is None:
            raise ConfigurationError(f"when is {when!r}, expected a datetime with a time zone")
        self._frozen.move_to(when)


@contextmanager
def time_machine() -> Iterator[TimeMachine]:
    """Let the time of this process stand still at the moment, and be moved."""
    for name in _LOADED_BEFORE:
        with suppress(ImportError):
            importlib.import_module(name)
    with freeze_time(datetime.fromtimestamp(now_ms() / 1_000, timezone.utc)) as frozen:
        yield TimeMachine(frozen)


def _not_received(why: str) -> Received:
    return Received(answer=False, why=f"not received: {why}")


def _plain(value: object) -> Any:
    """Return a field as it comes over the wire."""
    if isinstance(value, datetime):
        return value.astimezone(timezone.utc).isoformat().replace("+00:00", "Z")
    return msgspec.to_builtins(value)


def _differences(wanted: dict[str, Any], found: dict[str, Any], *, is_partial: bool) -> dict[str, str]:
    return {
        name: f"{short(found.get(name))} instead of {short(wanted.get(name))}"
        for name in (wanted if is_partial else {**wanted, **found})
        if found.get(name) != wanted.get(name)
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
