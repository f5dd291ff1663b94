"""Values that may be secrets: fixed texts, or callables that return the current one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NoReturn

Secret = str | Callable[[], str | None]
"""A text, or a callable that returns it before each request, so that it can change."""

LIKELY_CREDENTIAL = re.compile(r"auth|cookie|credential|key|passw|secret|session|sig|token", re.IGNORECASE)
"""Matches the names of headers and parameters that probably hold credentials."""


class Private:
    """Base class of objects that hold secrets. Their `repr` shows none, and they can't be pickled or copied."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} can't be pickled: it holds a secret")


def current(secret: Secret | None) -> str | None:
    """Return the text. What the callable raises is raised unchanged, because it is no failure of an upload."""
    return secret() if callable(secret) else secret


def texts(*secrets: object) -> tuple[str, ...]:
    """Return the secrets that are fixed texts."""
    return tuple(secret for secret in secrets if isinstance(secret, str))


def problem_of_word(word: object) -> str | None:
    """Return why this can't be sent as one word of a header, or None. The text does not contain it."""
    if not isinstance(word, str):
        return f"got {type(word).__name__}, expected text or None"
    if not re.fullmatch(r"[\x21-\x7e\xa1-\xff]*", word):
        return "it has white space, control characters or characters outside latin-1, expected one word in latin-1"
    return None


def problem_of_value(value: object) -> str | None:
    """Return why this can't be the value of a header, or None. The text does not contain it."""
    if not isinstance(value, str):
        return f"got {type(value).__name__}, expected text"
    if not re.fullmatch(r"(?:[\x21-\x7e\xa1-\xff](?:[\x20-\x7e\xa0-\xff]*[\x21-\x7e\xa1-\xff])?)?", value):
        return "it has blanks at an end, control characters or characters outside latin-1"
    return None
