"""The row that records an event."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from operator import attrgetter
from typing import Any

import msgspec

from outbox.clock import epoch_ms
from outbox.events import AnyEvent, Event, Instant, encode, name_of
from outbox.failures import InvalidEvent

_COPIED = ("rule_id", "rule_ids", "session_id", "file_path")
_NO_FIELD = "__class__"  # an attribute of each event whose value fits no column

Redact = Callable[[Any], AnyEvent]
"""A function that gets a validated event and returns the event to store instead.

It gets an `Event` if the type is registered, otherwise a dict.
"""


def new_row(
    event: AnyEvent, redact: Redact | None, *, strict: bool, now_ms: int, not_before_ms: int | None = None
) -> dict[str, Any]:
    """Return the columns of the row that records the event. Raises `InvalidEvent` like `encode` and `redacted`."""
    valid, payload_json = encode(event, strict=strict)
    if redact is not None:
        valid, payload_json = redacted(valid, redact, strict=strict)
    row = columns(valid, now_ms=now_ms)
    row["payload_json"] = payload_json
    row["next_attempt_at_ms"] = row["created_at_ms"] = now_ms
    if not_before_ms is not None:
        row |= {"next_attempt_at_ms": max(now_ms, not_before_ms), "not_before_ms": not_before_ms}
    return row


def redacted(event: Event | dict[str, Any], redact: Redact, *, strict: bool) -> tuple[Event | dict[str, Any], str]:
    """Call `redact` with the event, and `encode` with its result.

    Raises `InvalidEvent` if the result is invalid or `redact` fails. The exception of `redact` is the cause.
    """
    name = name_of(event)
    try:
        found = redact(event)
    except Exception as error:
        # The text of the exception is left out: it may quote what `redact` should remove.
        raise InvalidEvent(f"{name}: redact failed with {type(error).__name__}") from error
    try:
        return encode(found, strict=strict)
    except InvalidEvent as error:
        raise InvalidEvent(f"{name}: what redact returned is invalid: {error}") from None


def columns(event: Event | Mapping[str, Any], *, now_ms: int) -> dict[str, Any]:
    """Return the columns that repeat parts of the payload, so that queries can use them."""
    if isinstance(event, Event):
        event_type, values_of = _prepared(type(event))
        rule_id, rule_ids, session_id, file_path, happened = values_of(event)
    else:
        event_type = event["event_type"]
        rule_id, rule_ids, session_id, file_path = map(event.get, _COPIED)
        happened = _instant_or_none(event.get("occurred_at"))
    if not isinstance(rule_id, str):
        rule_id = None
    if not isinstance(rule_ids, list):
        rule_ids = [] if rule_id is None else [rule_id]
    return {
        "event_type": event_type,
        "rule_id": rule_id,
        "rule_ids_json": msgspec.json.encode(rule_ids).decode(),
        "session_id": session_id if isinstance(session_id, str) else "",
        "file_path": file_path if isinstance(file_path, str) else None,
        "occurred_at_ms": epoch_ms(happened) if isinstance(happened, datetime) else now_ms,
    }


@lru_cache  # with a limit: a program may define types again and again
def _prepared(known: type[Event]) -> tuple[Any, Callable[[Event], tuple[Any, ...]]]:
    """Return the name of the type, and a function that returns the values of an event that columns repeat."""
    names = (*_COPIED, known.occurred_at_field)
    return known.__struct_config__.tag, attrgetter(
        *(name if hasattr(known, name) else _NO_FIELD for name in names)
    )


def _instant_or_none(value: object) -> datetime | None:
    try:
        return msgspec.convert(value, Instant)
    except msgspec.ValidationError:
        return None
