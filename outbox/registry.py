"""The registered event types."""

from __future__ import annotations

import logging
from typing import Generic, TypeVar, Union

import msgspec

from outbox.failures import ConfigurationError

_BUILT_IN = "outbox.event_types"
"""The module whose types an application can't replace."""

log = logging.getLogger("outbox")

_Type = TypeVar("_Type", bound=msgspec.Struct)


class Registry(Generic[_Type]):
    """The event types by tag, and the decoder of their union.

    Any thread may define a type while others decode. This needs no lock, which a fork could copy while it is held:
    adding a type is one dict operation, and a decoder is rebuilt when the set of types has changed.
    """

    def __init__(self) -> None:
        self._types: dict[str, type[_Type]] = {}
        self._version = object()
        self._decoder: tuple[object, msgspec.json.Decoder[_Type]] | None = None

    def add(self, known: type[_Type]) -> None:
        """Register a type. Raises `ConfigurationError` for a tag that is not a text, or that this package uses."""
        tag = known.__struct_config__.tag
        if not isinstance(tag, str) or not tag:
            raise ConfigurationError(f"{known.__qualname__} has the tag {tag!r}, expected a text")
        other = self._types.get(tag)
        if other is not None and other.__module__ == _BUILT_IN:
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
        self._types[tag] = known
        self._version = object()

    def types(self) -> dict[str, type[_Type]]:
        """Return the types by tag."""
        return dict(self._types)

    def decoder(self) -> msgspec.json.Decoder[_Type]:
        """Return the decoder of all types. Raises `ConfigurationError` if one of them can't be decoded."""
        version, built = self._version, self._decoder
        if built is None or built[0] is not version:
            built = self._decoder = version, _union_decoder(list(self._types.values()))
        return built[1]


def _is_redefined(known: type, other: type) -> bool:
    # A notebook cell defines its type again on each run, and a function on each call.
    same = (known.__module__, known.__qualname__) == (other.__module__, other.__qualname__)
    return same or "<locals>" in other.__qualname__


def _union_decoder(types: list[type[_Type]]) -> msgspec.json.Decoder[_Type]:
    try:
        return msgspec.json.Decoder(Union[tuple(types)])  # noqa: UP007 - the types are known only at run time
    except (TypeError, NameError) as error:
        names = ", ".join(known.__qualname__ for known in types if not _is_decodable(known))
        raise ConfigurationError(f"the event type {names} can't be decoded: {error}") from None


def _is_decodable(known: type) -> bool:
    try:
        msgspec.json.Decoder(known)
    except (TypeError, NameError):
        return False
    return True
