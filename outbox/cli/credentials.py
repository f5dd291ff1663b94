"""Credentials from the environment and from files, read again before each request."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from outbox.failures import ConfigurationError

Reader = Callable[[], str | None]
"""A function that returns the current credential, or None."""


def environment_token() -> Reader:
    """Return a function that reads OUTBOX_TOKEN or, if that is empty, the file that OUTBOX_TOKEN_FILE names.

    A relative path of the file is resolved here, once.
    """
    given = os.environ.get("OUTBOX_TOKEN_FILE")
    token = in_variable("OUTBOX_TOKEN", setting="OUTBOX_TOKEN", what="token")
    if not given:
        return token
    path = expanded(given)
    with suppress(OSError):  # there is no current directory; a command that reads the file says so
        path = path.absolute()
    return first_of(token, in_file(path, setting="OUTBOX_TOKEN_FILE", what="token", shown=given))


def expanded(given: str) -> Path:
    """Return the path with the user's home for a leading `~`, or as it is if there is no home."""
    path = Path(given)
    with suppress(RuntimeError):
        path = path.expanduser()
    return path


def first_of(*readers: Reader) -> Reader:
    """Return a function that returns the first text that one of the readers finds."""
    return lambda: next(filter(None, (read() for read in readers)), None)


def in_variable(variable: str, *, setting: str, what: str = "secret", is_word: bool = True) -> Reader:
    """Return a function that reads a secret from an environment variable on each call, None if it is empty.

    With `is_word`, the function raises `ConfigurationError` if the secret contains white space or characters
    outside ASCII. The error names `setting`, and uses `what` as the word for the secret.
    """
    return lambda: _checked(os.environ.get(variable, ""), setting, what, is_word=is_word)


def in_file(
    path: Path, *, setting: str, what: str = "secret", is_word: bool = True, shown: str | None = None
) -> Reader:
    """Return a function that reads a secret from a file on each call, None if it is empty.

    The function also raises `ConfigurationError` if it can't read the file. The error shows the path, or `shown`
    instead: the path as the user wrote it. Otherwise this works like `in_variable`.
    """
    encoding = "ASCII" if is_word else "UTF-8"

    def secret() -> str | None:
        try:
            found = path.read_text(encoding=encoding)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or f"the file is not {encoding} text"
            raise ConfigurationError(
                f"{setting} is {shown or str(path)!r}, expected a file that holds the {what}: {reason}"
            ) from None
        return _checked(found, setting, what, is_word=is_word)

    return secret


def _checked(found: str, setting: str, what: str, *, is_word: bool) -> str | None:
    found = found.strip() if is_word else found.rstrip("\r\n")
    if is_word and not re.fullmatch("[!-~]*", found):
        raise ConfigurationError(
            f"{setting} holds a {what} with blanks or characters outside ASCII, expected one word"
        )
    return found or None


def noticing(read: Reader, on_change: Callable[[], object]) -> Reader:
    """Return a function that calls `on_change` when `read` returns another text than before."""
    known = read()

    def changed() -> str | None:
        nonlocal known
        current = read()
        if current and current != known:
            on_change()
        known = current
        return current

    return changed
