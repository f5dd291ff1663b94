"""Where events go: the names of destinations, and the routes from event types to destinations. Pure.

Callers and operators call the default destination `default`. The database stores an empty text for it, as programs
do that know no destinations. The functions below `stored` pass names as they are stored.
"""

from __future__ import annotations

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
