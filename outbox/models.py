"""Turns Pydantic models, dataclasses and attrs objects into mappings, so that they can be events."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from outbox.failures import InvalidEvent


class PydanticModel(Protocol):
    """A model of Pydantic 2, or any other object with its `model_dump`."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Return the fields as values that JSON can hold."""
        ...


class Dataclass(Protocol):
    """An object of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class AttrsObject(Protocol):
    """An object of a class that attrs defined."""

    __attrs_attrs__: ClassVar[Any]


Model = PydanticModel | Dataclass | AttrsObject


def mapping_of(model: object) -> dict[str, Any]:
    """Return the fields of a model as its own library converts them, and its attribute `event_type` if it has one.

    Raises `InvalidEvent` if the object is not a model, or if its library can't convert it.
    """
    kind = type(model)
    try:
        fields = _fields(model)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidEvent(f"{kind.__name__}: {error}") from error
    if not isinstance(fields, Mapping):
        raise InvalidEvent(
            "expected an Event, a mapping with event_type, a Pydantic model, a dataclass or an attrs object,"
            f" got {kind.__name__}"
        )
    event_type = getattr(model, "event_type", None)
    return {**fields} if event_type is None or "event_type" in fields else {"event_type": event_type, **fields}


def _fields(model: Any) -> object:
    kind = type(model)
    if callable(getattr(kind, "model_dump", None)):
        return model.model_dump(mode="json")
    if hasattr(kind, "__attrs_attrs__"):
        return sys.modules["attr"].asdict(model)  # the object exists, so attrs is loaded
    return dataclasses.asdict(model) if dataclasses.is_dataclass(kind) else None
