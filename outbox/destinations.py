"""Where events go: the names of destinations, and the routes from event types to destinations.

This module does no I/O and reads no clock.

Callers and operators call the default destination `default`. The database stores an empty text for it, like
programs that know no destinations. All code below the facade uses stored names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from reprlib import repr as short
from typing import Any, NamedTuple

from outbox.event_ids import EXPECTED, is_valid
from outbox.failures import ConfigurationError

DEFAULT_DESTINATION = ""
"""The name in the database of the destination that events go to if nothing names another one."""

DEFAULT_NAME = "default"
"""The name of the same destination for callers and operators."""


def stored(name: object) -> str:
    """Return a destination's name as the database stores it; None means the default destination.

    Raises `ConfigurationError` for a name that no destination can have.
    """
    if name is None or name == DEFAULT_NAME:
        return DEFAULT_DESTINATION
    if not isinstance(name, str) or not is_valid(name):
        raise ConfigurationError(f"the destination is {name!r}, expected a name: {EXPECTED}")
    return name


def shown(destination: str) -> str:
    """Return a stored name as callers and operators see it."""
    return destination or DEFAULT_NAME


def of_destination(destination: str) -> str:
    """Return " of billing" for messages, and nothing for the default destination."""
    return "" if destination == DEFAULT_DESTINATION else f" of {destination}"


def stored_names(named: object, what: str) -> tuple[str, ...]:
    """Return the stored names for the name of one destination, or for a list or tuple of different names.

    `what` says in the error where they come from. Raises `ConfigurationError` for anything else.
    """
    if isinstance(named, str):
        return (stored(named),)
    if not isinstance(named, list | tuple) or not named or None in named:
        raise ConfigurationError(f"{what} is {short(named)}, expected a destination, or a list of destinations")
    destinations = tuple(map(stored, named))
    if len({*destinations}) < len(destinations):
        raise ConfigurationError(f"{what} is {short(named)}, expected different destinations")
    return destinations


class Addressed(NamedTuple):
    """Consecutive events for the same destinations, all with an id of the caller or all without one."""

    destinations: tuple[str, ...]
    has_ids: bool
    rows: Sequence[dict[str, Any]]
    """The columns of each event, the same for every destination."""


class Routes:
    """Which destinations the events of a type go to.

    `routes` maps an event type to a destination or a list of destinations. `*` stands for all other types; without
    it, they go to the default destination. Raises `ConfigurationError` for anything else.
    """

    def __init__(self, routes: Mapping[str, object] | None = None) -> None:
        if routes is not None and not isinstance(routes, Mapping):
            raise ConfigurationError(
                f"routes is {short(routes)}, expected a mapping from event types to destinations"
            )
        self._by_type: dict[str, tuple[str, ...]] = {}
        for event_type, named in (routes or {}).items():
            if not isinstance(event_type, str) or not event_type:
                raise ConfigurationError(f"routes has the key {event_type!r}, expected an event type or '*'")
            self._by_type[event_type] = stored_names(named, f"routes[{event_type!r}]")
        self._others = self._by_type.pop("*", (DEFAULT_DESTINATION,))

    def address(
        self, rows: Sequence[dict[str, Any]], to: object = None, *, may_have_ids: bool = True
    ) -> list[Addressed]:
        """Group events by their destinations, in order. `to` names those of all events, instead of the routes."""
        everyones = self._others if to is None else stored_names(to, "to")
        by_type = self._by_type if to is None else {}
        if not may_have_ids and not by_type:  # fast path: most calls
            return [Addressed(everyones, False, rows)]

        def kind(row: dict[str, Any]) -> tuple[tuple[str, ...], bool]:
            return by_type.get(row["event_type"], everyones), "event_id" in row

        return [Addressed(*of, list(group)) for of, group in groupby(rows, key=kind)]
