"""Test helpers: a real server with scripted answers, and control of the clock.

The fixtures are in `pytest_outbox`. Every run of pytest loads that module, so it imports nothing of this one.
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

from outbox.clock import now_ms
from outbox.events import AnyEvent, encode
from outbox.failures import ConfigurationError, InvalidEvent
from outbox.testing.answers import Answer, Drop, Hang, Request
from outbox.testing.receiver import IngestServer

__all__ = ["Answer", "Drop", "Hang", "Received", "Request", "ScriptedServer", "TimeMachine", "time_machine"]

_SHOWN = 20
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Received:
    """Whether an event was received. It is true or false, and its repr says why."""

    answer: bool
    why: str

    def __bool__(self) -> bool:
        return self.answer

    def __repr__(self) -> str:
        return f"<{self.why}>"


class ScriptedServer(IngestServer):
    """A real HTTP server on this machine. It accepts every event unless a script or a mode says otherwise."""

    @property
    def events(self) -> list[dict[str, Any]]:
        """The accepted events as decoded JSON, each once, in the order of arrival."""
        return [msgspec.json.decode(text) for text in tuple(self.stored.values())]

    def received(self, event: AnyEvent) -> Received:
        """Return whether this event was accepted. For a mapping: whether an event with all these fields was.

        Compares the JSON on the wire. Raises `InvalidEvent` if the event or a field can't be encoded.
        """
        if isinstance(event, Mapping):
            wanted = {name: _plain(name, value) for name, value in event.items()}
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
        """Return the last requests and accepted events, one a line. Pytest shows this text after a failure."""
        requests = [
            f"POST {request.path}: {_count(request.events, 'event')}, answered {request.status or 'with nothing'}"
            for request in self.requests[-_SHOWN:]
        ]
        events = [f"accepted: {text[:_SHOWN_CHARACTERS]}" for text in tuple(self.stored.values())[-_SHOWN:]]
        return "\n".join([*requests, *events]) or "no request"

    def __repr__(self) -> str:
        return f"<server at {self.url}>"


class TimeMachine:
    """The frozen time of this process. Only the test moves it."""

    def __init__(self, frozen: Any) -> None:
        self._frozen = frozen

    @property
    def now(self) -> datetime:
        """The current frozen time, in UTC."""
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
        """Move the time by the sum of the arguments. A negative sum moves it back."""
        self._frozen.tick(
            timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds, milliseconds=milliseconds)
        )

    def move_to(self, when: datetime) -> None:
        """Move the time to `when`. Raises `ConfigurationError` if `when` has no time zone."""
        if when.utcoffset() is None:
            raise ConfigurationError(f"when is {when!r}, expected a datetime with a time zone")
        self._frozen.move_to(when)


@contextmanager
def time_machine() -> Iterator[TimeMachine]:
    """Freeze the time of this process at the current moment, and let the test move it.

    Raises `ConfigurationError` if freezegun is not installed.
    """
    try:
        from freezegun import freeze_time  # noqa: PLC0415 - the server alone works without it
    except ImportError as error:
        raise ConfigurationError(
            "time_machine needs freezegun: pip install 'observation-outbox[testing]'"
        ) from error
    with suppress(ImportError):
        importlib.import_module("psycopg")  # its C part can't be imported in frozen time
    with freeze_time(datetime.fromtimestamp(now_ms() / 1_000, timezone.utc)) as frozen:
        yield TimeMachine(frozen)


def _not_received(why: str) -> Received:
    return Received(answer=False, why=f"not received: {why}")


def _plain(name: object, value: object) -> Any:
    """Return a field's value in the form of the decoded JSON."""
    if isinstance(value, datetime) and value.utcoffset() is not None:
        return value.astimezone(timezone.utc).isoformat().replace("+00:00", "Z")
    try:
        return msgspec.to_builtins(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidEvent(f"{name} is {short(value)}, expected a value that JSON can hold: {error}") from None


def _differences(wanted: dict[str, Any], found: dict[str, Any], *, is_partial: bool) -> dict[str, str]:
    return {
        name: f"{short(found.get(name))} instead of {short(wanted.get(name))}"
        for name in (wanted if is_partial else {**wanted, **found})
        if found.get(name) != wanted.get(name)
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
