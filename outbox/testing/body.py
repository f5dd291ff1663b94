"""Reads the body of a request: the events of a batch, each with its exact text."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Literal, NamedTuple

import msgspec

from outbox.failures import ConfigurationError
from outbox.testing.answers import Answer, error_answer
from outbox.upload.compression import ZSTD
from outbox.upload.formats import unknown_format

MAX_BODY_BYTES = 32 * 1024 * 1024
"""Maximum size of a request's body in bytes, before and after decompression."""


class Found(NamedTuple):
    """An event in a body: its exact text, and its id if the format has one."""

    text: bytes
    id: str | None = None


_NotEmpty = Annotated[str, msgspec.Meta(min_length=1)]


class _CloudEvent(msgspec.Struct):
    specversion: Literal["1.0"]
    id: _NotEmpty
    source: _NotEmpty
    type: _NotEmpty
    data: msgspec.Raw


class _Create(msgspec.Struct):
    id: str | None = msgspec.field(default=None, name="_id")


class _Action(msgspec.Struct):
    create: _Create


def _array(body: bytes) -> list[Found]:
    return [Found(bytes(event)) for event in msgspec.json.decode(body, type=list[msgspec.Raw])]


def _keyed(key: str) -> Callable[[bytes], list[Found]]:
    def read(body: bytes) -> list[Found]:
        found = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        if set(found) != {key}:
            raise ValueError(f"expected an object with the key {key} alone")
        return _array(bytes(found[key]))

    return read


def _lines(body: bytes) -> list[Found]:
    return [Found(line) for line in body.splitlines()]


def _single(body: bytes) -> list[Found]:
    return [Found(body)]


def _cloud_event(body: bytes) -> list[Found]:
    event = msgspec.json.decode(body, type=_CloudEvent)
    return [Found(bytes(event.data), event.id)]


def _cloud_events(body: bytes) -> list[Found]:
    return [event for raw in _array(body) for event in _cloud_event(raw.text)]


def _bulk(body: bytes) -> list[Found]:
    lines = body.splitlines()
    actions = (msgspec.json.decode(line, type=_Action).create for line in lines[::2])
    return [Found(text, action.id) for action, text in zip(actions, lines[1::2], strict=True)]


_READERS: dict[str, Callable[[bytes], list[Found]]] = {
    "json": _array,
    "ndjson": _lines,
    "single": _single,
    "cloudevents": _cloud_event,
    "cloudevents-batch": _cloud_events,
    "elasticsearch": _bulk,
}


def reader_of(name: str) -> Callable[[bytes], list[Found]]:
    """Return the reader for bodies of the format with this name.

    Raises `ConfigurationError` for an unknown name.
    """
    if name.startswith("json:") and name != "json:":
        return _keyed(name.removeprefix("json:"))
    if name not in _READERS:
        raise ConfigurationError(unknown_format(name, _READERS))
    return _READERS[name]


def events_in(
    encoding: str, body: bytes, read: Callable[[bytes], list[Found]] = _array
) -> tuple[list[Found], Answer | None]:
    """Return the events; or none, and the answer that refuses the request."""
    try:
        body = _decompressed(encoding, body)
        if len(body) > MAX_BODY_BYTES:
            return [], error_answer(413, "too large")
        events = read(body)
    except (msgspec.MsgspecError, RecursionError, ValueError, EOFError, zlib.error) as error:
        return [], error_answer(400, str(error))
    if not all(_is_object(event.text) for event in events):
        return [], error_answer(400, "expected objects")
    return events, None


def _decompressed(encoding: str, body: bytes) -> bytes:
    if encoding == "gzip":
        stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
        body = stream.decompress(body, MAX_BODY_BYTES + 1)
        if len(body) <= MAX_BODY_BYTES and not stream.eof:
            raise EOFError("gzip ends early")
    elif encoding == "zstd":
        zstd = import_module(ZSTD).ZstdDecompressor()
        try:
            body = zstd.decompress(body, MAX_BODY_BYTES + 1)
        except import_module(ZSTD).ZstdError as error:
            raise ValueError(str(error)) from None
        if len(body) <= MAX_BODY_BYTES and not zstd.eof:
            raise EOFError("zstd ends early")
    return body


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def line_of(event: Found) -> bytes:
    """Return the line of an event in a file. With an id, it is an array of the id and the event."""
    # These line breaks are only white space of JSON: inside texts, line breaks are escaped.
    text = event.text.replace(b"\r", b" ").replace(b"\n", b" ")
    return (text if event.id is None else msgspec.json.encode((event.id, msgspec.Raw(text)))) + b"\n"


def stored_event(line: bytes) -> Found | None:
    """Return the event of a line in a file; None if there is none."""
    name = None
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        name, raw = msgspec.json.decode(line, type=tuple[str, msgspec.Raw])
        line = bytes(raw)
    return Found(line.strip(), name) if _is_object(line) else None
