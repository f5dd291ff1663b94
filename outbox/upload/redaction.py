"""Removes credentials from texts and tracebacks."""

from __future__ import annotations

import re
import sys
import traceback
from contextlib import contextmanager
from html.entities import html5
from typing import TYPE_CHECKING

from outbox import reasons
from outbox.failures import ClientError, UploadFailure

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

REDACTED = "[REDACTED-TOKEN]"
"""The text that replaces a credential."""

_SHORTEST_CREDENTIAL = 8
_MOST_OF_A_MESSAGE = 10_000  # characters of an exception's text that are searched; far more than is stored
_LONGEST_SPELLING = 12  # of one character: four percent-encoded bytes
_SURROGATES = 0xD800  # the first surrogate; credentials have smaller code points only
_DEEPEST = 5  # how often a text may be escaped, such as JSON inside JSON

_ESCAPED = re.compile(
    r"""
    \\+(?:u([0-9a-f]{4})|x([0-9a-f]{2}))  # JSON, Python
    | ((?:%[0-9a-f]{2})+)  # URL, in bytes
    | &\#0*([0-9]{1,7});  # HTML
    | &\#x0*([0-9a-f]{1,6});
    | &([a-z][a-z0-9]{1,31});
    | \\+  # \/ in JSON
    | \0+  # UTF-16 that was decoded as UTF-8
    """,
    re.IGNORECASE | re.VERBOSE,
)


def redact(text: str, credentials: Iterable[str]) -> str:
    """Replace the credentials that have 8 characters or more, the longest first: one may begin with another.

    Also finds a credential that is escaped as in JSON, Python, HTML or a URL, up to five times. Then the returned
    text has no escapes.
    """
    longest_first = sorted(
        (credential for credential in credentials if len(credential) >= _SHORTEST_CREDENTIAL),
        key=len,
        reverse=True,
    )
    readings = [reading for credential in longest_first for reading in _readings(credential)]
    text = _replaced(text, readings)
    plain = _unescaped(text)
    redacted = _replaced(plain, [_unescaped(reading) for reading in readings])
    return text if redacted == plain else redacted


# Names have a maximum length. Otherwise the search takes quadratic time in a long text.
_NAMES = r"(?:token|secret|passw|pwd|api[_-]?key|signature|credential|authorization)[\w.-]{0,40}"
# Applied in this order. The first group of each pattern is the text before a credential, which is kept.
_LIKELY = (
    re.compile(r"(://)[^/?#\s@]+(?=@)"),
    re.compile(r"([?&](?:key|sig|code)=)[^&#\s\"']+", re.IGNORECASE),
    re.compile(rf"({_NAMES}=[\"']?)[^&#\s,;\"']+", re.IGNORECASE),
    re.compile(rf"([\"'][\w.-]{{0,40}}{_NAMES}[\"']\s*:\s*[\"'])[^\"']+", re.IGNORECASE),
    re.compile(r"(\bauthorization:\s*)[^\r\n\"']+", re.IGNORECASE),
    re.compile(r"(\b(?:bearer|basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE),
)


def redact_likely(text: str) -> str:
    """Replace text that looks like a credential. Use it if the credentials are not known.

    This covers the user and password in a URL, the value of a parameter, field or header with a name such as
    `token`, and the word after `Bearer` or `Basic`.
    """
    for pattern in _LIKELY:
        text = pattern.sub(rf"\1{REDACTED}", text)
    return text


def client_error(error: Exception, client: object) -> UploadFailure:
    """Return the failure that is stored for a client's exception. Its text holds no credentials."""
    return ClientError(reasons.client_error(type(error).__name__, without_credentials(error, client)))


def without_credentials(text: object, client: object) -> str:
    """Return the text as one line without credentials, by `client.redact(text)` if there is one.

    If the text can't be read, or `redact` fails, the result is empty.
    """
    try:
        shown = str(text)[:_MOST_OF_A_MESSAGE]
        redact_known = getattr(client, "redact", str)
        return " ".join(redact_likely(redact_known(shown)).split())
    except Exception:  # noqa: BLE001 - both are the application's code
        return ""


def without_end(text: str, credentials: Iterable[str]) -> str:
    """Remove the end of a cut text: it may be the beginning of a credential, which `redact` would not find."""
    longest = _LONGEST_SPELLING * max(map(len, credentials), default=0)
    return text[: max(len(text) - longest, 0)]


@contextmanager
def private_locals() -> Iterator[None]:
    """Clear the local variables in the traceback of an error that is raised in this context.

    Crash reports show local variables. The files and lines of the traceback stay, and so do errors that were being
    handled before.
    """
    before = sys.exc_info()[1]
    try:
        yield
    except BaseException as error:
        left: list[BaseException | None] = [error]
        seen = {id(before)}  # errors can refer to each other in a circle
        while left:
            current = left.pop()
            if current is not None and id(current) not in seen:
                seen.add(id(current))
                traceback.clear_frames(current.__traceback__)
                left += [current.__context__, current.__cause__]
        raise


def _readings(credential: str) -> set[str]:
    # Outside ASCII, the service's encoding may differ from the one that we decode with.
    latin_as_utf8 = credential.encode("latin-1", "replace").decode(errors="replace")
    utf8_as_latin = credential.encode(errors="replace").decode("latin-1")
    return {credential, latin_as_utf8, utf8_as_latin}


def _replaced(text: str, credentials: Iterable[str]) -> str:
    for credential in credentials:
        if len(credential) >= _SHORTEST_CREDENTIAL:
            text = re.sub(re.escape(credential), REDACTED, text, flags=re.IGNORECASE)
    return text


def _unescaped(text: str) -> str:
    for _ in range(_DEEPEST):
        before, text = text, _ESCAPED.sub(_character, text)
        if text == before:
            break
    return text


def _character(escaped: re.Match[str]) -> str:
    json, python, url, decimal, hexadecimal, name = escaped.groups()
    if url:
        data = bytes.fromhex(url.replace("%", ""))
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data.decode("latin-1")
    if name:
        return html5.get(f"{name};", escaped[0])
    digits = json or python or hexadecimal
    code = int(digits, 16) if digits else int(decimal or 0)
    return chr(code) if 0 < code < _SURROGATES else ""
