"""Reads the conditions for events from the URL of a page, and writes them into URLs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from werkzeug.datastructures import MultiDict

from outbox.failures import ConfigurationError
from outbox.filters import Where
from outbox.words import MOMENTS, exact, moment_ms

# In a browser, a field that is named like a property of its form, such as `id`, `action` or `contains`, would hide
# that property from scripts.
TEXTS = ("destination", "event_type", "failure", "payload")
TIMES = ("older_than", "newer_than", "due_after")
LISTS = ("ids", "event_ids")
MAY_SHOW_PAYLOADS = ("failure", "payload")
"""The conditions with which somebody could find out what a hidden payload contains."""


@dataclass(frozen=True)
class Filters:
    """The conditions: as the form gave them, and as `Where`."""

    given: dict[str, str]
    statuses: Sequence[str]
    where: Where

    @property
    def is_everything(self) -> bool:
        """Whether every event matches."""
        return not self.given and not self.statuses

    @property
    def has_more(self) -> bool:
        """Whether there is a condition that the form shows only under "More conditions"."""
        return not self.given.keys().isdisjoint((*TIMES, *LISTS))

    def as_given(self) -> Iterator[tuple[str, str]]:
        """Yield the fields as they were given, for a form or URL. Ages count from the time of its request."""
        yield from self.given.items()
        yield from (("status", status) for status in self.statuses)

    def as_meant(self) -> Iterator[tuple[str, str]]:
        """Yield the fields with times in place of ages, so that they mean the same later."""
        for name, value in self.as_given():
            yield name, exact(getattr(self.where, name)) if name in TIMES else value


def read(fields: MultiDict[str, str], *, now_ms: int, hide_payloads: bool) -> Filters:
    """Read the conditions of a form or URL.

    Raises `ConfigurationError` for an invalid condition, and for one that could reveal hidden payloads.
    """
    given = {name: text for name in (*TEXTS, *TIMES, *LISTS) if (text := fields.get(name, "").strip())}
    statuses = [status for status in fields.getlist("status") if status]
    conditions: dict[str, Any] = {name: given[name] for name in TEXTS if name in given}
    if "payload" in conditions:
        conditions["contains"] = conditions.pop("payload")
    hidden = [name for name in MAY_SHOW_PAYLOADS if name in given] if hide_payloads else []
    if hidden:
        raise ConfigurationError(f"this console hides payloads, so no event can be found by {hidden[0]}")
    for name in TIMES:
        if name in given:
            conditions[name] = moment(name, given[name], now_ms)
    for name in LISTS:
        if name in given:
            conditions[name] = _words(given[name])
    if "ids" in conditions:
        conditions["ids"] = [row_id(word) for word in conditions["ids"]]
    return Filters(given, statuses, Where(status=statuses or None, **conditions))


def unread(fields: MultiDict[str, str]) -> Filters:
    """Return invalid conditions, for the form that shows them again. No event matches."""
    given = {name: fields[name] for name in (*TEXTS, *TIMES, *LISTS) if name in fields}
    return Filters(given, fields.getlist("status"), Where(ids=()))


def moment(name: str, text: str, now_ms: int) -> int:
    """Return the time that a form or URL names. Raises `ConfigurationError` if it is none."""
    found = moment_ms(text, now_ms=now_ms)
    if found is None:
        raise ConfigurationError(f"{name} is {text!r}, expected {MOMENTS}")
    return found


def _words(text: str) -> list[str]:
    return re.split(r"[\s,]+", text.strip(" ,"))


def row_id(word: str) -> int:
    """Return the row id that a form or URL names. Raises `ConfigurationError` for anything else."""
    if not re.fullmatch(r"[0-9]{1,19}", word):
        raise ConfigurationError(f"ids has the entry {word!r}, expected row ids, which are whole numbers")
    return int(word)
