"""Which events an operator means.

This module does no I/O and reads no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, NamedTuple

from outbox.clock import epoch_ms
from outbox.destinations import shown, stored
from outbox.failures import ConfigurationError
from outbox.lifecycle import Status

LARGEST_ID = 2**63 - 1
"""The largest row id, and the largest integer that the databases hold."""

Progress = Callable[[int], object]
"""A function that is called from time to time, with the number of events that were read since its last call."""

_MOST = 10_000
_OF_UNICODE = ", in valid Unicode and without NUL"


@dataclass(frozen=True, kw_only=True)
class Where:
    """The events that meet all given conditions. `Where()` matches every event.

    A time is a datetime with a time zone, or epoch milliseconds. Raises `ConfigurationError` for a value that no
    event can have.
    """

    ids: Sequence[int] | None = None
    """Row ids, at most 10,000. An empty list matches no event."""
    event_ids: Sequence[str] | None = None
    """Event ids, of callers or derived, at most 10,000. An empty list matches no event."""
    destination: str | None = None
    """The name of the destination; `default` is the default one."""
    status: Status | str | Sequence[Status | str] | None = None
    """One status, or several. An empty list matches no event."""
    event_type: str | None = None
    """The name of the event type."""
    failure: str | None = None
    """Text that `last_error` contains. Case-sensitive on every database."""
    contains: str | None = None
    """Text that the payload contains, as it is stored: JSON without blanks between its parts. Case-sensitive on
    every database."""
    older_than: datetime | int | None = None
    """The events were created before this time."""
    newer_than: datetime | int | None = None
    """The events were created at this time or later."""
    due_after: datetime | int | None = None
    """The events are pending, and due later than this time."""

    def __post_init__(self) -> None:
        for name, text in (("failure", self.failure), ("contains", self.contains)):
            if text is not None and not (_is_text(text) and text):
                raise ConfigurationError(f"{name} is {text!r}, expected a text that is not empty{_OF_UNICODE}")
        if self.event_type is not None and not _is_text(self.event_type):
            raise ConfigurationError(
                f"event_type is {self.event_type!r}, expected the name of a type, a text{_OF_UNICODE}"
            )
        valid: dict[str, Any] = {
            "ids": _list("ids", self.ids, is_row_id, f"row ids from 1 to {LARGEST_ID}"),
            "event_ids": _list("event_ids", self.event_ids, _is_text, f"texts{_OF_UNICODE}"),
            "status": self._statuses(),
        }
        if self.destination is not None:
            valid["destination"] = shown(stored(self.destination))
        for name in ("older_than", "newer_than", "due_after"):
            moment = getattr(self, name)
            valid[name] = None if moment is None else cutoff_ms(moment, name)
        for name, value in valid.items():
            object.__setattr__(self, name, value)

    def _statuses(self) -> tuple[Status, ...] | None:
        known = [one.value for one in Status]
        given = (self.status,) if isinstance(self.status, str) else _list("status", self.status)
        for one in given or ():
            if one not in known:
                raise ConfigurationError(f"status is {one!r}, expected one of {', '.join(known)}")
        return None if given is None else tuple(map(Status, given))

    @property
    def is_everything(self) -> bool:
        """Whether this matches every event."""
        return not self._given

    @property
    def is_whole_destination(self) -> bool:
        """Whether this matches every event, or every event of a destination."""
        return self._given <= {"destination"}

    @property
    def has_text(self) -> bool:
        """Whether the text of each event must be read to find out whether it matches."""
        return self.contains is not None or self.failure is not None

    @property
    def stored_destination(self) -> str | None:
        """The destination as the database stores it. None means all."""
        return None if self.destination is None else stored(self.destination)

    @property
    def statuses(self) -> tuple[Status, ...] | None:
        """The statuses, None if any will do."""
        given: Any = self.status
        found: tuple[Status, ...] | None = given
        return found

    @property
    def _given(self) -> set[str]:
        return {field.name for field in fields(self) if getattr(self, field.name) is not None}


class Scan(NamedTuple):
    """How far a search for text goes."""

    at_most: int
    """It reads at most this many rows that meet the other conditions."""
    progress: Progress | None = None


def valid(where: Where | None, **conditions: Any) -> Where:
    """Return `where` if it is given, else a `Where` with those conditions that are not None.

    Raises `ConfigurationError` if `where` is no `Where`, or if both are given.
    """
    given = {name: value for name, value in conditions.items() if value is not None}
    if where is None and conditions:
        return Where(**given)
    if not isinstance(where, Where):
        raise ConfigurationError(f"where is {where!r}, expected a Where")
    if given:
        raise ConfigurationError(f"where and {next(iter(given))} are both given, expected one of them")
    return where


def _list(
    name: str, given: Any, is_valid: Callable[[object], bool] = lambda _: True, expected: str = ""
) -> tuple[Any, ...] | None:
    if given is None:
        return None
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise ConfigurationError(f"{name} is {given!r}, expected a list")
    several = tuple(given)
    if len(several) > _MOST:
        raise ConfigurationError(f"{name} has {len(several)} entries, expected at most {_MOST}")
    for one in several:
        if not is_valid(one):
            raise ConfigurationError(f"{name} has the entry {one!r}, expected {expected}")
    return several


def _is_text(value: object) -> bool:
    """Return whether every database can compare a text with this value. No column holds another one."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_row_id(value: object) -> bool:
    """Return whether an event can have this row id."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_ID


def cutoff_ms(moment: datetime | int, name: str = "older_than") -> int:
    """Return a time of the caller in epoch milliseconds. Raises `ConfigurationError` for anything else."""
    if isinstance(moment, datetime) and moment.utcoffset() is not None:
        return epoch_ms(moment)
    if isinstance(moment, int) and abs(moment) < 2**63:
        return moment
    raise ConfigurationError(f"{name} is {moment!r}, expected a datetime with a time zone or epoch milliseconds")
