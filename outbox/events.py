"""Payload types, and the JSON that goes on the wire.

An application adds a type of its own by defining a subclass:

    class OrderShipped(Event, tag="order_shipped"):
        order_id: str
        occurred_at: Instant
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Annotated, Any, ClassVar, TypeVar, Union

import msgspec

from outbox.clock import epoch_ms
from outbox.failures import ConfigurationError, InvalidEvent

MAX_PAYLOAD_BYTES = 256 * 1024
"""How large one event may be as JSON."""

Instant = Annotated[datetime, msgspec.Meta(tz=True)]
"""A time with an offset. On the wire it is RFC 3339 in UTC."""

_INSTANT_IN_WORDS = "an RFC 3339 time with an offset, such as 2026-11-24T12:00:00Z"


log = logging.getLogger("outbox")

_AnyEvent = TypeVar("_AnyEvent", bound="Event")


class _Registry:
    """The event types by tag, and the decoder of their union. Any thread may define a type while others decode."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._types: dict[str, type[Event]] = {}
        self._decoder: msgspec.json.Decoder[Event] | None = None

    def add(self, known: type[Event]) -> None:
        tag = known.__struct_config__.tag
        if not isinstance(tag, str) or not tag:
            raise ConfigurationError(f"{known.__qualname__} has the tag {tag!r}, expected a text")
        with self._lock:
            other = self._types.get(tag)
            if other is not None and other.__module__ == __name__:
                raise ConfigurationError(
                    f"{known.__qualname__} has the tag {tag!r} of {other.__qualname__}, expected one of its own"
                )
            if other is not None and not _is_redefined(known, other):
                log.warning(
                    "events with the tag %r are now of the type %r, no longer of %r",
                    tag,
                    known,
                    other,
                    extra={"event_name": "outbox.event_type_replaced", "event_type": tag},
                )
            self._types = {**self._types, tag: known}
            self._decoder = None

    def types(self) -> dict[str, type[Event]]:
        return self._types

    def decoder(self) -> msgspec.json.Decoder[Event]:
        decoder = self._decoder
        if decoder is None:
            with self._lock:
                decoder = self._decoder = _union_decoder(list(self._types.values()))
        return decoder

    def unlock(self) -> None:
        """Forget who holds the lock: a thread that a fork has not copied would hold it for ever."""
        self._lock = threading.Lock()


def _is_redefined(known: type[Event], other: type[Event]) -> bool:
    # In a notebook a type is defined again and again, and one inside a function whenever that is called.
    same = (known.__module__, known.__qualname__) == (other.__module__, other.__qualname__)
    return same or "<locals>" in other.__qualname__


def _union_decoder(types: list[type[Event]]) -> msgspec.json.Decoder[Event]:
    try:
        return msgspec.json.Decoder(Union[tuple(types)])  # noqa: UP007 - of types known only at run time
    except (TypeError, NameError) as error:
        names = ", ".join(known.__qualname__ for known in types if not _is_decodable(known))
        raise ConfigurationError(f"the event type {names} can't be decoded: {error}") from None


def _is_decodable(known: type[Event]) -> bool:
    try:
        msgspec.json.Decoder(known)
    except (TypeError, NameError):
        return False
    return True


_registry = _Registry()

if sys.platform != "win32":
    os.register_at_fork(after_in_child=_registry.unlock)


class _EventMeta(msgspec.StructMeta):
    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **config: Any) -> Any:
        defined: Any = super().__new__(mcs, name, bases, namespace, **config)
        if bases != (msgspec.Struct,):
            _registry.add(defined)
        return defined


class Event(msgspec.Struct, metaclass=_EventMeta, frozen=True, tag_field="event_type", tag=str.lower):
    """The base of all payload types; a subclass is registered by being defined.

    `tag` names the type on the wire and in the table. Fields named `rule_id`, `rule_ids`, `session_id` and
    `file_path` are also written to the columns of that name. `occurred_at_field` names the field that tells when
    it happened; a type without that field happened when it was enqueued.

    Defining a type raises `ConfigurationError` when one of the types below has its tag. Of an application's own
    types with one tag the last one counts.
    """

    occurred_at_field: ClassVar[str] = "occurred_at"


class RuleFired(Event, tag="rule_fired", frozen=True, kw_only=True, omit_defaults=True):
    """Rules matched and were brought up."""

    occurred_at_field = "fired_at"

    rule_ids: list[str]
    file_path: str | None = None
    intent: str | None = None
    session_id: str
    fired_at: Instant


class McpRuleServed(Event, tag="mcp_rule_served", frozen=True, kw_only=True, omit_defaults=True):
    """Rules were served to a tool over MCP."""

    occurred_at_field = "served_at"

    tool: str
    session_id: str
    repo_full_name: str | None = None
    file_path: str | None = None
    query_hash: str
    rule_ids: list[str]
    top_k: int
    was_empty: bool
    strict_match_count: int
    estimated_tokens: int
    served_at: Instant


class RuleCitedInEdit(Event, tag="rule_cited_in_edit", frozen=True, kw_only=True, omit_defaults=True):
    """An edit cites a rule."""

    occurred_at_field = "cited_at"

    rule_id: str
    session_id: str
    file_path: str
    diff_excerpt: str
    cited_at: Instant


class RuleActuallyCited(Event, tag="rule_actually_cited", frozen=True, kw_only=True, omit_defaults=True):
    """An answer cites a rule."""

    occurred_at_field = "cited_at"

    rule_id: str
    session_id: str
    file_path: str | None = None
    citation_excerpt: str
    cited_at: Instant


class FixOutcome(Event, tag="fix_outcome", frozen=True, kw_only=True, omit_defaults=True):
    """A proposed fix was taken or turned down."""

    rule_id: str
    session_id: str
    file_path: str | None = None
    accepted: bool
    occurred_at: Instant
    mcp_serve_event_ids: list[str | int] = msgspec.field(default_factory=list)


def event_types() -> dict[str, type[Event]]:
    """Return the registered types by tag."""
    return dict(_registry.types())


def check_types() -> None:
    """Raise `ConfigurationError` when a registered type can't be decoded: the program is wrong, not its rows."""
    _registry.decoder()


def encode(event: Event | Mapping[str, Any]) -> tuple[Event, str]:
    """Return the event, validated, and the JSON text that is stored and sent.

    A mapping names its type as `event_type`; keys that the type does not know are kept. Times are turned to UTC.
    Raises `InvalidEvent`, naming the field and what it should be.
    """
    known = _type_of(event)
    name = known.__struct_config__.tag
    try:
        raw = _encoder.encode(event)
        if b"null" in raw:
            _refuse_not_finite(event)
        typed = _in_utc(msgspec.json.decode(raw, type=known))
        document: Any = typed
        if isinstance(event, Mapping):
            others = {key: event[key] for key in event if key not in known.__struct_fields__}
            document = {**msgspec.to_builtins(typed), **others}
        raw = _encoder.encode(document)
        if len(raw) > MAX_PAYLOAD_BYTES:
            raise InvalidEvent(f"{len(raw)} bytes as JSON, at most {MAX_PAYLOAD_BYTES} are accepted")
        return typed, raw.decode()
    except UnicodeEncodeError as error:
        raise InvalidEvent(f"{name}: {error.object!a} is not valid Unicode text") from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidEvent(f"{name}: {_in_words(str(error), known)}") from None


Redact = Callable[[Event], Event | Mapping[str, Any]]
"""Gets a validated event, and returns what is to be stored in its place."""


def redacted(event: Event, redact: Redact) -> tuple[Event, str]:
    """Return what `encode` does for that which is to be stored in place of a validated event.

    Raises `InvalidEvent` where that is invalid, and where `redact` fails, whose own exception is the cause.
    """
    name = type(event).__struct_config__.tag
    try:
        found = redact(event)
    except Exception as error:
        # Without its text, which may quote what was to be redacted.
        raise InvalidEvent(f"{name}: redact failed with {type(error).__name__}") from error
    try:
        return encode(found)
    except InvalidEvent as error:
        raise InvalidEvent(f"{name}: what redact returned is invalid: {error}") from None


def decode(payload_json: str) -> Event:
    """Return the event that a stored payload holds; fields that its type does not know are left out.

    Raises `InvalidEvent` for anything that is not the JSON of a registered type, and `ConfigurationError` like
    `check_types`.
    """
    decoder = _registry.decoder()
    if not isinstance(payload_json, str):
        raise InvalidEvent(f"the payload is {type(payload_json).__name__}, expected text")
    try:
        return decoder.decode(payload_json)
    except Exception as error:  # noqa: BLE001 - a type's own checks raise what they like, and spoil their row only
        raise InvalidEvent(_in_words(str(error) or type(error).__name__)) from None


def content_hash(payload_json: str) -> str:
    """Return what the server tells events apart by: the first 16 hex digits of the payload's SHA-256."""
    return hashlib.sha256(payload_json.encode()).hexdigest()[:16]


def columns(event: Event, *, now_ms: int) -> dict[str, Any]:
    """Return the columns that repeat parts of the payload, for look-ups."""
    rule_id = _text_or_none(event, "rule_id")
    rule_ids = getattr(event, "rule_ids", None)
    if not isinstance(rule_ids, list):
        rule_ids = [] if rule_id is None else [rule_id]
    happened = getattr(event, type(event).occurred_at_field, None)
    return {
        "event_type": type(event).__struct_config__.tag,
        "rule_id": rule_id,
        "rule_ids_json": msgspec.json.encode(rule_ids).decode(),
        "session_id": _text_or_none(event, "session_id") or "",
        "file_path": _text_or_none(event, "file_path"),
        "occurred_at_ms": epoch_ms(happened) if isinstance(happened, datetime) else now_ms,
    }


def _text_or_none(event: Event, name: str) -> str | None:
    value = getattr(event, name, None)
    return value if isinstance(value, str) else None


def _type_of(event: object) -> type[Event]:
    if isinstance(event, Event):
        return type(event)
    if not isinstance(event, Mapping):
        raise InvalidEvent(f"expected an Event or a mapping with event_type, got {type(event).__name__}")
    strange = [key for key in event if not isinstance(key, str)]
    if strange:
        raise InvalidEvent(f"the key {strange[0]!a} is {type(strange[0]).__name__}, expected text")
    tag = event.get("event_type")
    known = _registry.types()
    if not isinstance(tag, str) or tag not in known:
        raise InvalidEvent(f"event_type is {tag!a}, expected one of {', '.join(sorted(known))}")
    return known[tag]


def _plain(value: object) -> str:
    # The encoder knows no subclass of datetime, such as other libraries and frozen times bring along.
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"objects of type {type(value).__name__} can't be JSON")


_encoder = msgspec.json.Encoder(enc_hook=_plain)


def _in_utc(event: _AnyEvent) -> _AnyEvent:
    changed = {}
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if isinstance(value, datetime) and value.tzinfo is not timezone.utc and value.utcoffset() is not None:
            changed[name] = value.astimezone(timezone.utc)
    return msgspec.structs.replace(event, **changed) if changed else event


def _refuse_not_finite(document: object) -> None:
    # JSON has no such numbers, and the encoder would silently write null for them.
    stack: list[tuple[str, object]] = [("", document)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidEvent(f"{path}: {value!r} is not a number that JSON can hold")
        if isinstance(value, msgspec.Struct):
            value = {field: getattr(value, field) for field in value.__struct_fields__}
        if isinstance(value, Mapping):
            stack += [(f"{path}.{key}" if path else str(key), inner) for key, inner in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            stack += [(f"{path}[{index}]", inner) for index, inner in enumerate(value)]


def _in_words(message: str, known: type[Event] | None = None) -> str:
    """Put the field first: "Expected `str`, got `int` - at `$.tool`" becomes "tool: expected `str`, got `int`"."""
    what, _, path = message.partition(" - at `$")
    where = path.rstrip("`").lstrip(".")
    missing = re.fullmatch(r"Object missing required field `(.+)`", what)
    if missing:
        what = "missing" + _expectation(known, missing.group(1))
        where = f"{where}.{missing.group(1)}".lstrip(".")
    elif "timezone component" in what or "RFC3339" in what:
        what = f"expected {_INSTANT_IN_WORDS}"
    what = re.sub(r"^(Expected|Invalid|Encoding)", lambda first: first.group().lower(), what)
    return f"{where}: {what}" if where else what


def _expectation(known: type[Event] | None, name: str) -> str:
    kinds = {field.name: field.type for field in msgspec.structs.fields(known)} if known else {}
    if name not in kinds:
        return ""
    kind = kinds[name]
    words = _INSTANT_IN_WORDS if kind == Instant else f"`{kind.__name__ if isinstance(kind, type) else kind}`"
    return f", expected {words}"
