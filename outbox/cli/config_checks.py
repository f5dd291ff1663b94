"""Checks of the tables of `outbox.toml`: known names, values of the right kind, and no secrets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from outbox.failures import ConfigurationError


class Kind(NamedTuple):
    """What a setting accepts."""

    accepts: Callable[[Any], bool]
    words: str
    is_shown: bool = True
    """Whether an error may show the value."""


def one_of(*choices: str) -> Kind:
    """Return the kind of a setting with these choices."""
    return Kind(lambda value: value in choices, f"one of {', '.join(map(repr, choices))}")


def is_text(value: object) -> bool:
    """Return whether the value is a text."""
    return isinstance(value, str)


TEXT = Kind(is_text, "a text")
HIDDEN_TEXT = TEXT._replace(is_shown=False)
FLAG = Kind(lambda value: isinstance(value, bool), "true or false")
NUMBER = Kind(lambda value: type(value) is int, "a whole number")
TABLE = Kind(lambda value: isinstance(value, dict), "a table", is_shown=False)
ANYTHING = Kind(lambda _: True, "")
"""Something else checks the value."""
FILE = Kind(lambda value: is_text(value) and value != "", "the path of a file")
FILES = Kind(
    lambda value: is_text(value) or (isinstance(value, list) and list(map(type, value)) == [str, str]),
    "the path of a file, or an array of two paths",
)
VARIABLE = Kind(
    lambda value: is_text(value) and bool(re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", value)),
    "the name of an environment variable",
    is_shown=False,
)


def sources(secret: str) -> dict[str, Kind]:
    """Return the settings that say where a secret is."""
    return {f"{secret}_env": VARIABLE, f"{secret}_file": FILE}


def check(table: Mapping[str, Any], known: Mapping[str, Kind], where: str, *, secrets: Iterable[str] = ()) -> None:
    """Refuse the first setting that is a secret, is unknown or has a wrong value. `where` precedes its name."""
    for name, value in table.items():
        if name in secrets:
            raise ConfigurationError(f"{where}{name} is a secret, {elsewhere(name)}")
        if name not in known:
            (nearest,) = get_close_matches(name, known, n=1, cutoff=0)
            raise ConfigurationError(f"{where}{name} is unknown; the nearest setting is {where}{nearest}")
        kind = known[name]
        if not kind.accepts(value):
            shown = repr(value) if kind.is_shown else "(not shown)"
            raise ConfigurationError(f"{where}{name} is {shown}, expected {kind.words}")


def at_most_one(table: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Refuse a table that has several of these settings."""
    given = [f"{where}{name}" for name in names if name in table]
    if len(given) > 1:
        raise ConfigurationError(f"{' and '.join(given)} are set, expected one of them")


def elsewhere(name: str) -> str:
    """Return in words where a secret may be."""
    return (
        f"and the file holds no secrets; expected {name}_env, the name of an environment variable,"
        f" or {name}_file, the path of a file"
    )
