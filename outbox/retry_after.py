"""The delay that a service asks for: `retryAfterSec` in the body of its answer, or the header `Retry-After`."""

from __future__ import annotations

import re
from datetime import timezone
from email.utils import parsedate_to_datetime

import msgspec

from outbox.clock import epoch_ms

MIN_MS, MAX_MS = 1_000, 300_000
"""The delay is clamped to this range."""


def in_body(body: str) -> int | None:
    """Return the delay in ms that a response body asks for, clamped to 1 000 … 300 000, or None.

    In a JSON body, this is the integer `retryAfterSec` of the outermost object that has one. In any other body,
    such as a cut one, it is the digits after the first `"retryAfterSec"` and a colon.
    """
    try:
        seconds = _outermost_retry_after(msgspec.json.decode(body))
    except (ValueError, RecursionError):
        seconds = _textual_retry_after(body)
    return None if seconds is None else clamp(seconds * 1_000)


def clamp(delay_ms: int) -> int:
    """Clamp a delay to 1 000 … 300 000 ms."""
    return min(max(delay_ms, MIN_MS), MAX_MS)


def _outermost_retry_after(document: object) -> int | None:
    level = [document]
    while level:
        for value in level:
            if isinstance(value, dict) and type(value.get("retryAfterSec")) is int:
                return int(value["retryAfterSec"])
        level = [inner for value in level for inner in _children(value)]
    return None


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _textual_retry_after(body: str) -> int | None:
    _, found, rest = body.partition('"retryAfterSec"')
    # Eighteen digits already exceed the clamp, and a limit keeps an endless number cheap.
    digits = re.match(r"\s*:\s*([0-9]{1,18})", rest) if found else None
    return int(digits.group(1)) if digits else None


def in_header(value: str, *, now_ms: int) -> int | None:
    """Return the delay in ms that the value of a `Retry-After` header asks for, clamped, or None."""
    # A repeated header is a list; its first value counts. Eighteen digits already exceed the clamp.
    seconds = re.match(r"\s*([0-9]{1,18})[0-9]*\s*(?:,|$)", value)
    if seconds:
        return clamp(int(seconds.group(1)) * 1_000)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return clamp(epoch_ms(date) - now_ms)
