"""Events that are objects of Pydantic, attrs and the standard library."""

import dataclasses
import json
import subprocess
import sys
from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import Any, ClassVar, Literal

import attrs
import pydantic
import pytest

from builders import NOON, NOON_MS, row
from outbox import Event, Instant, InvalidEvent, Outbox
from outbox.models import mapping_of

LINES = [{"sku": "a", "pieces": 2}]
WIRE = {"event_type": "order_paid", "order_id": "o-17", "total": "9.90", "lines": LINES, "occurred_at": "2026-11-24T12:00:00Z"}  # fmt: skip


class Checked(Event, tag="checked"):
    order_id: str
    occurred_at: Instant


class PydanticLine(pydantic.BaseModel):
    sku: str
    pieces: int


class PydanticOrder(pydantic.BaseModel):
    event_type: Literal["order_paid"] = "order_paid"
    order_id: str
    total: Decimal
    lines: list[PydanticLine]
    occurred_at: datetime


@dataclasses.dataclass
class DataLine:
    sku: str
    pieces: int


@dataclasses.dataclass(frozen=True)
class DataOrder:
    event_type: ClassVar[str] = "order_paid"
    order_id: str
    total: Decimal
    lines: list[DataLine]
    occurred_at: datetime


@attrs.frozen
class AttrsLine:
    sku: str
    pieces: int


@attrs.define
class AttrsOrder:
    order_id: str
    total: Decimal
    lines: list[AttrsLine]
    occurred_at: datetime

    @property
    def event_type(self) -> str:
        return "order_paid"


ORDERS = [
    order("o-17", Decimal("9.90"), [line("a", 2)], NOON)
    if order is not PydanticOrder
    else PydanticOrder(
        order_id="o-17", total=Decimal("9.90"), lines=[PydanticLine(sku="a", pieces=2)], occurred_at=NOON
    )
    for order, line in ((PydanticOrder, PydanticLine), (DataOrder, DataLine), (AttrsOrder, AttrsLine))
]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: type(order).__name__)
def test_a_model_becomes_json_as_its_library_makes_it(outbox: Outbox, order: Any) -> None:
    first = row(outbox, outbox.enqueue(order))
    assert json.loads(first.payload_json) == WIRE
    assert (first.event_type, first.occurred_at_ms) == ("order_paid", NOON_MS)
    assert [row(outbox, row_id).payload_json for row_id in outbox.enqueue_many([order])] == [first.payload_json]


@dataclasses.dataclass
class Untyped:
    order_id: str
    occurred_at: datetime


def test_the_argument_names_the_type_of_a_model_that_has_none(outbox: Outbox) -> None:
    event = Untyped("o-17", NOON)
    written = row(outbox, outbox.enqueue(event, event_type="order_lost"))
    assert written.event_type == "order_lost"
    assert written.payload_json == (
        '{"event_type":"order_lost","order_id":"o-17","occurred_at":"2026-11-24T12:00:00Z"}'
    )
    with pytest.raises(InvalidEvent, match="the event has no event_type, expected a printable text"):
        outbox.enqueue(event)


def test_the_class_of_a_registered_type_checks_a_model(outbox: Outbox) -> None:
    outbox.enqueue(Untyped("o-17", NOON), event_type="checked")
    with pytest.raises(InvalidEvent, match="checked: order_id: expected `str`, got `int`"):
        outbox.enqueue(Untyped(17, NOON), event_type="checked")


def test_while_capture_is_off_a_model_is_not_converted(outbox: Outbox, monkeypatch) -> None:
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    assert outbox.enqueue(object(), event_type="order_lost") is None


class Kind(str, Enum):
    PLACED = "order_paid"


@pytest.mark.parametrize("event_type", [Kind.PLACED, "order_paid"])
def test_the_type_may_be_a_member_of_an_enum_of_texts(outbox: Outbox, event_type: str) -> None:
    @dataclasses.dataclass
    class Placed:
        event_type: str

    written = row(outbox, outbox.enqueue(Placed(event_type)))
    assert (written.event_type, written.payload_json) == ("order_paid", '{"event_type":"order_paid"}')


class Listed(pydantic.RootModel[list[int]]):
    pass


class Broken(pydantic.BaseModel):
    what: object


@dataclasses.dataclass
class Number:
    value: float
    event_type: str = "number"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Listed([1]), "expected an Event, a mapping .*, got Listed"),
        (Broken(what=object()), "Broken: Unable to serialize unknown type"),
        (DataOrder, "expected an Event, a mapping .*, got type"),
        (Number(float("nan")), "number: value: nan is not a number that JSON can hold"),
        (Number(object()), "number: objects of type object can't be JSON"),
    ],
)
def test_what_can_not_become_json_is_refused(outbox: Outbox, model: Any, message: str) -> None:
    with pytest.raises(InvalidEvent, match=message):
        outbox.enqueue(model)


def test_a_private_field_belongs_to_the_event() -> None:
    @attrs.define
    class Private:
        _id: int

    assert mapping_of(Private(5)) == {"_id": 5}


def test_the_library_loads_none_of_the_others() -> None:
    code = (
        "import sys, dataclasses; from outbox import InvalidEvent; from outbox.events import encode\n"
        "@dataclasses.dataclass\nclass A:\n    event_type: str\n"
        "encode(A('a'))\n"
        "assert not {'attr', 'attrs', 'pydantic'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
