"""The shapes of a request's body, and how many events fit in one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from difflib import SequenceMatcher
from functools import partial
from typing import Any, Protocol

import msgspec

from outbox.failures import ConfigurationError


class Item(Protocol):
    """The part of an event that the client needs."""

    @property
    def id(self) -> int:
        """The row's id."""
        ...

    @property
    def event_id(self) -> str:
        """The event's id. The ids of a batch make its `Idempotency-Key`."""
        ...

    @property
    def payload_json(self) -> str:
        """The JSON text, which is sent unchanged."""
        ...


class Format:
    """The shape of a request's body. This class is the format `json`: an array of the stored payloads.

    A subclass, or any object with the same names, is a format of its own. `item` is a `BatchItem`.
    """

    content_type: str = "application/json"
    one_event_per_request: bool = False

    def part(self, item: Any, /) -> bytes:
        """Return the text of one event."""
        payload: str = item.payload_json
        return payload.encode()

    def body(self, parts: Sequence[bytes], /) -> bytes:
        """Return the body of a request with these events, in their order."""
        return b"[" + b",".join(parts) + b"]"


class KeyedArray(Format):
    """An object with one key, whose value is the array of payloads."""

    def __init__(self, key: str) -> None:
        self._before = b"{" + msgspec.json.encode(key) + b":"

    def body(self, parts: Sequence[bytes], /) -> bytes:
        """Return the object."""
        return self._before + super().body(parts) + b"}"


class Lines(Format):
    """One payload a line. A payload that has line breaks is sent without white space."""

    content_type = "application/x-ndjson"

    def part(self, item: Any, /) -> bytes:
        """Return the payload as one line."""
        payload = super().part(item)
        # Inside the strings of JSON, line breaks are escaped. So these stand between its tokens.
        return msgspec.json.format(payload, indent=-1) if b"\n" in payload or b"\r" in payload else payload

    def body(self, parts: Sequence[bytes], /) -> bytes:
        """Return the lines. The last one ends with a line break, too."""
        return b"".join(part + b"\n" for part in parts)


class Single(Format):
    """One event a request. Its payload is the body."""

    one_event_per_request = True

    def body(self, parts: Sequence[bytes], /) -> bytes:
        """Return the only part."""
        (part,) = parts
        return part


_NO_BLANKS = re.compile("[!-~]+")
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


class CloudEvents(Format):
    """CloudEvents 1.0 in structured mode: one event a request, or with `batch` an array.

    `source` is a URI reference that names your program. Source and id together identify an event, so programs that
    may give equal ids need different sources. `subject` names a field of the payload: if the field holds a text,
    this is the subject of the event.

    Raises `ConfigurationError` for an invalid setting.
    """

    def __init__(self, source: str = "/outbox", *, subject: str | None = None, batch: bool = False) -> None:
        if not isinstance(source, str) or not _NO_BLANKS.fullmatch(source):
            raise ConfigurationError(f"source is {source!r}, expected a URI reference")
        if subject is not None and not isinstance(subject, str):
            raise ConfigurationError(f"subject is {subject!r}, expected the name of a field")
        self._source = source
        self._subject = subject
        self.one_event_per_request = not batch
        self.content_type = f"application/cloudevents{'-batch' if batch else ''}+json"

    def part(self, item: Any, /) -> bytes:
        """Return the event with its payload, unchanged, as `data`."""
        payload = super().part(item)
        attributes = {
            "specversion": "1.0",
            "id": item.event_id,
            "source": self._source,
            "type": item.event_type,
            "time": _rfc_3339(item.occurred_at_ms),
            "subject": None if self._subject is None else _text_in(payload, self._subject),
            "datacontenttype": "application/json",
            "data": msgspec.Raw(payload),
        }
        return msgspec.json.encode({name: value for name, value in attributes.items() if value is not None})

    def body(self, parts: Sequence[bytes], /) -> bytes:
        """Return the only event, or the array."""
        if not self.one_event_per_request:
            return super().body(parts)
        (part,) = parts
        return part


def _rfc_3339(time_ms: int) -> str | None:
    try:
        moment = _EPOCH + timedelta(milliseconds=time_ms)
    except OverflowError:  # after the year 9999
        return None
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _text_in(payload: bytes, field: str) -> str | None:
    # The other fields are not decoded: one may hold a number that is too large.
    found = _fields.decode(payload).get(field)
    try:
        return None if found is None else msgspec.json.decode(found, type=str) or None
    except msgspec.ValidationError:  # no text
        return None


_BY_NAME: Mapping[str, Callable[[], Format]] = {
    "json": Format,
    "ndjson": Lines,
    "single": Single,
    "cloudevents": CloudEvents,
    "cloudevents-batch": partial(CloudEvents, batch=True),
}
_KEYED = "json:"


def format_of(given: Format | str) -> Format:
    """Return the format with this name, or the given object. Raises `ConfigurationError` for anything else."""
    if not isinstance(given, str):
        methods = (getattr(given, name, None) for name in ("part", "body"))
        has_all = all(map(callable, methods)) and isinstance(getattr(given, "content_type", None), str)
        if not has_all or isinstance(given, type):
            raise ConfigurationError(
                f"format is {given!r}, expected a name, or an object with content_type, part and body"
            )
        return given
    if given.startswith(_KEYED) and given != _KEYED:
        return KeyedArray(given.removeprefix(_KEYED))
    if given not in _BY_NAME:
        raise ConfigurationError(f"{unknown_format(given, _BY_NAME)}, or an object")
    return _BY_NAME[given]()


def unknown_format(given: str, known: Iterable[str]) -> str:
    """Return the text of an error that lists the known formats, the most similar first."""
    names = sorted([*known, f"{_KEYED}KEY"], key=lambda name: -SequenceMatcher(None, given, name).ratio())
    return f"format is {given!r}, expected {', '.join(names)}"


def fit(form: Format, parts: Sequence[bytes], max_bytes: int) -> int:
    """Return how many of the first parts fit in a body of `max_bytes`. At least 1, if there are parts.

    The size counts before compression. An event that is larger by itself goes alone.
    """
    fits, too_many = min(len(parts), 1), len(parts) + 1
    count = len(parts)
    while too_many - fits > 1:
        if len(form.body(parts[:count])) <= max_bytes:
            fits = count
        else:
            too_many = count
        count = (fits + too_many) // 2
    return fits


class LearnedSize:
    """The size of a body that a service accepts, as far as its answers show. Threads can share it.

    A limit that the service raises later is not noticed: restart the process for that.
    """

    def __init__(self, max_bytes: int) -> None:
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
            raise ConfigurationError(f"max_batch_bytes is {max_bytes!r}, expected a whole number of at least 1")
        self._max_bytes = max_bytes
        self._seen = (0, max_bytes + 1)  # the largest accepted body below the smallest refused one

    @property
    def max_bytes(self) -> int:
        """The size that the next body should not exceed."""
        accepted, refused = self._seen
        return self._max_bytes if refused > self._max_bytes else max(accepted, refused // 2)

    def accepted(self, size: int) -> None:
        """Record that a body of this size was accepted."""
        accepted, refused = self._seen
        if accepted < size < refused:
            self._seen = (size, refused)

    def refused(self, size: int) -> None:
        """Record that a body of this size with several events was too large."""
        accepted, refused = self._seen
        self._seen = (accepted if accepted < size else 0, min(size, refused))
