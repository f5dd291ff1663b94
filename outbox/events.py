"""The base of all event types, and their JSON on the wire.

To add an event type, define a subclass:

    class OrderShipped(Event, tag="order_shipped"):
        order_id: str
        occurred_at: Instant
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import lru_cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import msgspec

from outbox.failures import InvalidEvent
from outbox.models import Model, mapping_of
from outbox.registry import Registry

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_settings: object) -> Callable[[type], type]:
        """Do nothing: only type checkers need the decorator, and Python 3.10 lacks it."""
        return lambda decorated: decorated


MAX_PAYLOAD_BYTES = 256 * 1024
"""Maximum size of one event as JSON, in bytes."""

MAX_TYPE_LENGTH = 191
"""Maximum length of `event_type`, in characters."""

Instant = Annotated[datetime, msgspec.Meta(tz=True)]
"""A datetime with a UTC offset. On the wire it is RFC 3339 in UTC."""

_INSTANT_IN_WORDS = "an RFC 3339 time with an offset, such as 2026-11-24T12:00:00Z"

_AnyEvent = TypeVar("_AnyEvent", bound="Event")
_Decoded = TypeVar("_Decoded")

# `Raw` checks the values without building objects.
_object_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


_registry: Registry[Event] = Registry()


class _EventMeta(msgspec.StructMeta):
    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **config: Any) -> Any:
        defined: Any = super().__new__(mcs, name, bases, namespace, **config)
        if bases != (msgspec.Struct,):
            _registry.add(defined)
        return defined


@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class Event(msgspec.Struct, metaclass=_EventMeta, frozen=True, tag_field="event_type", tag=str.lower):
    """The base of event types that are checked. Defining a subclass registers it.

    `tag` names the type on the wire and in the table. The fields `rule_id`, `rule_ids`, `session_id` and
    `file_path` are also written to columns: `rule_ids_json` for `rule_ids`, otherwise the column of the same name.
    `occurred_at_field` names the field with the time of the event. Without this field, the time of the enqueue is
    used.

    Defining a type with the tag of one of this package's types raises `ConfigurationError`. If several types of an
    application have the same tag, the last one is used.
    """

    occurred_at_field: ClassVar[str] = "occurred_at"


AnyEvent = Event | Mapping[str, Any] | Model
"""What can be enqueued."""


def event_types() -> dict[str, type[Event]]:
    """Return the registered types by tag."""
    return _registry.types()


def check_types() -> None:
    """Raise `ConfigurationError` if a registered type can't be decoded: a bug of the program, not of a row."""
    _registry.decoder()


def encode(event: AnyEvent, *, strict: bool = False) -> tuple[Event | dict[str, Any], str]:
    """Validate the event. Return it, and the JSON text that is stored and sent.

    Any event but an `Event` names its type in the key or attribute `event_type`. If the type is registered, the
    fields are checked; keys that are not fields of the type are kept, and times are converted to UTC. An event of
    another type is refused with `strict`, and otherwise returned as a mapping. Raises `InvalidEvent`, which names
    the field and what is accepted.
    """
    given: Event | Mapping[str, Any]
    known: type[Event] | None
    if isinstance(event, Event):
        given, known = event, type(event)
    else:
        given, known = _given(event, strict=strict)
    try:
        raw = _encoder.encode(given)
        if b"null" in raw:
            _refuse_not_finite(given)
        typed: Event | dict[str, Any]
        if known is None:
            typed = msgspec.json.decode(raw)
        else:
            typed = _in_utc(msgspec.json.decode(raw, type=known))
            document: Any = typed
            if not isinstance(given, Event):
                others = {key: given[key] for key in given if key not in known.__struct_fields__}
                document = {**msgspec.to_builtins(typed), **others}
            raw = _encoder.encode(document)
        if len(raw) > MAX_PAYLOAD_BYTES:
            raise InvalidEvent(f"{len(raw)} bytes as JSON, at most {MAX_PAYLOAD_BYTES} are accepted")
        return typed, raw.decode()
    except UnicodeEncodeError as error:
        raise InvalidEvent(f"{name_of(given)}: {error.object!a} is not valid Unicode text") from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidEvent(f"{name_of(given)}: {_in_words(str(error), known)}") from None


def with_type(event: AnyEvent, event_type: str) -> Event | Mapping[str, Any]:
    """Return the event with this type. Raises `InvalidEvent` if the event itself names another type."""
    given = event if isinstance(event, (Event, Mapping)) else mapping_of(event)
    named = given.__struct_config__.tag if isinstance(given, Event) else given.get("event_type", event_type)
    if named != event_type:
        raise InvalidEvent(f"event_type is {event_type!a}, but the event itself says {named!a}")
    return given if isinstance(given, Event) else {"event_type": event_type, **given}


def name_of(event: Event | Mapping[str, Any]) -> Any:
    """Return the name of the type: the `tag` of the class, or the key `event_type` of a mapping."""
    return type(event).__struct_config__.tag if isinstance(event, Event) else event["event_type"]


def check_payload(payload_json: str) -> None:
    """Raise `InvalidEvent` unless a stored payload is one JSON object. Its event type need not be known."""
    _decoded(payload_json, _object_decoder)


def decode(payload_json: str) -> Event:
    """Decode a stored payload. Keys that are not fields of the event type are left out.

    Raises `InvalidEvent` unless the text is the JSON of a registered type, and `ConfigurationError` as
    `check_types` does.
    """
    return _decoded(payload_json, _registry.decoder())


def _decoded(payload_json: str, decoder: msgspec.json.Decoder[_Decoded]) -> _Decoded:
    if not isinstance(payload_json, str):
        raise InvalidEvent(f"the payload is {type(payload_json).__name__}, expected text")
    try:
        return decoder.decode(payload_json)
    except Exception as error:  # noqa: BLE001 - a type's checks may raise anything; only this row fails
        raise InvalidEvent(_in_words(str(error) or type(error).__name__)) from None


def content_hash(payload_json: str) -> str:
    """Return the first 16 hex digits of the payload's SHA-256, by which the service recognises duplicates."""
    return hashlib.sha256(payload_json.encode()).hexdigest()[:16]


def _given(event: Mapping[str, Any] | Model, *, strict: bool) -> tuple[Mapping[str, Any], type[Event] | None]:
    """Return the event as a mapping, and the class of its type if it is registered."""
    given = event if isinstance(event, Mapping) else mapping_of(event)
    strange = [key for key in given if not isinstance(key, str)]
    if strange:
        raise InvalidEvent(f"the key {strange[0]!a} is {type(strange[0]).__name__}, expected text")
    name = given.get("event_type")
    known = _registry.types().get(name) if isinstance(name, str) else None
    found = f"event_type is {name!a}" if "event_type" in given else "the event has no event_type"
    if strict and known is None:
        raise InvalidEvent(f"{found}, expected one of {', '.join(sorted(_registry.types()))}")
    if known is None and not _is_name(name):
        raise InvalidEvent(f"{found}, expected a printable text of 1 to {MAX_TYPE_LENGTH} characters")
    return given, known


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= MAX_TYPE_LENGTH


def _plain(value: object) -> str | dict[Any, Any]:
    # The encoder does not handle subclasses of datetime, as other libraries and freezegun define them.
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"objects of type {type(value).__name__} can't be JSON")


_encoder = msgspec.json.Encoder(enc_hook=_plain)


def _in_utc(event: _AnyEvent) -> _AnyEvent:
    changed = {}
    for name in _fields_for_times(type(event)):
        value = getattr(event, name)
        if isinstance(value, datetime) and value.tzinfo is not timezone.utc and value.utcoffset() is not None:
            changed[name] = value.astimezone(timezone.utc)
    return msgspec.structs.replace(event, **changed) if changed else event


@lru_cache  # with a limit: a program may define types again and again
def _fields_for_times(known: type[Event]) -> list[str]:
    """Return the names of the fields whose values may be times."""
    return [field.name for field in msgspec.structs.fields(known) if not _holds_no_time(field.type)]


def _holds_no_time(kind: Any) -> bool:
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return all(map(_holds_no_time, get_args(kind)))
    return (origin or kind) in (str, int, float, bool, NoneType, list, dict)


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
