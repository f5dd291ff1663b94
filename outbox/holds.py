"""The holds of destinations, which an operator begins and ends.

This module does no I/O and reads no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from outbox.clock import LATEST_MS, utc
from outbox.failures import ConfigurationError
from outbox.outcomes import as_last_error

LONGEST_WHY = 500
"""Maximum length of the reason for a hold, in characters."""


@dataclass(frozen=True)
class Hold:
    """An operator's decision to send nothing to a destination. Times are Unix epoch milliseconds.

    Unlike a pause, it does not end with a retry, an acceptance or an upgrade.
    """

    destination: str
    """The name of the destination."""
    why: str
    """The operator's reason."""
    since_ms: int
    """When the operator put the destination on hold."""
    until_ms: int | None
    """When the hold ends by itself; None if it lasts until an operator ends it."""

    @property
    def ends_ms(self) -> int:
        """When the hold ends by itself, or a time that never comes."""
        return LATEST_MS if self.until_ms is None else self.until_ms


def hold_in_words(hold: Hold) -> str:
    """Return what a hold means and what ends it. The text stays the same while the hold stays the same."""
    until = "" if hold.until_ms is None else f" until {utc(hold.until_ms)}"
    name = hold.destination
    return f"an operator put {name} on hold at {utc(hold.since_ms)}{until}: {hold.why}; {way_out(name)}"


def way_out(destination: str) -> str:
    """Return what ends the hold of a destination."""
    return f"`outbox resume {destination}` ends the hold"


def checked_why(why: object) -> str:
    """Return the reason as it is stored. Raises `ConfigurationError` if it is blank or too long."""
    if not isinstance(why, str) or not why.strip():
        raise ConfigurationError(f"why is {why!r}, expected a text that says why nothing may be sent")
    if len(why) > LONGEST_WHY:
        raise ConfigurationError(f"why has {len(why)} characters, expected at most {LONGEST_WHY}")
    return as_last_error(why)  # without characters that a database refuses


def checked_end_ms(until_ms: int, *, now_ms: int) -> int:
    """Return the end of a hold. Raises `ConfigurationError` if it is not in the future, or after the year 9999."""
    if now_ms < until_ms <= LATEST_MS:
        return until_ms
    raise ConfigurationError(
        f"the hold would end at {utc(until_ms)}, expected a time after {utc(now_ms)} and before the year 10000"
    )
