import sys
import threading

import pytest

from builders import Original, ScriptedClient, add_row, row, rule_fired, statuses
from outbox import (
    ConfigurationError,
    Event,
    Outbox,
    RuleFired,
    events,
)
from outbox.events import decode, encode, event_types
from outbox.registry import Registry


def test_an_event_type_is_registered_by_being_defined() -> None:
    class OrderLost(Event, tag="order_lost_at_sea"):
        order_id: str

    assert event_types()["order_lost_at_sea"] is OrderLost
    assert decode('{"event_type":"order_lost_at_sea","order_id":"o"}') == OrderLost(order_id="o")


def test_an_event_type_without_a_tag_has_its_name_in_lower_case() -> None:
    class Ping(Event):
        pass

    assert encode(Ping())[1] == '{"event_type":"ping"}'


def test_an_event_type_defined_again_replaces_its_former_self() -> None:
    def define(default: int) -> type[Event]:
        class Reloaded(Event, tag="reloaded"):
            number: int = default

        return Reloaded

    first, second = define(1), define(2)
    assert event_types()["reloaded"] is second is not first


@pytest.mark.parametrize(
    ("bases", "config", "message"),
    [
        ((Event,), {"tag": "rule_fired"}, "Wrong has the tag 'rule_fired' of RuleFired, expected one of its own"),
        ((RuleFired,), {}, "Wrong has the tag 'rule_fired' of RuleFired, expected one of its own"),
        ((Event,), {"tag": 5}, "Wrong has the tag 5, expected a text"),
        ((Event,), {"tag": ""}, "Wrong has the tag '', expected a text"),
    ],
)
def test_an_event_type_needs_a_tag_of_its_own(bases, config, message: str) -> None:
    before = event_types()
    with pytest.raises(ConfigurationError, match=message):
        type(Event)("Wrong", bases, {"__annotations__": {}, "__module__": __name__}, **config)
    assert event_types() == before
    assert encode(rule_fired())[0] == rule_fired()


def test_a_second_type_with_a_tag_takes_over_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def define(module: str) -> type[Event]:
        namespace = {"__annotations__": {}, "__module__": module}
        return type(Event)("Shipped", (Event,), namespace, tag="shipped_twice")

    first, again, second = define("shop.events"), define("shop.events"), define("depot.events")
    assert event_types()["shipped_twice"] is second is not again is not first
    (record,) = caplog.records
    assert (
        "now of the type <class 'depot.events.Shipped'>, no longer of <class 'shop.events" in record.getMessage()
    )


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch):
    """A registry that a test may spoil."""
    known = Registry()
    for type_ in event_types().values():
        known.add(type_)
    monkeypatch.setattr(events, "_registry", known)
    return known


@pytest.mark.parametrize("kind", [list[int] | set[int], "NoSuchType"])
def test_an_event_type_that_cannot_be_decoded_is_named_before_a_row_is_touched(
    registry, outbox: Outbox, url: str, kind: object
) -> None:
    outbox.enqueue_many([rule_fired()] * 3)
    type(Event)("Odd", (Event,), {"__annotations__": {"x": kind}, "__module__": __name__}, tag="odd")
    client = ScriptedClient()
    with Outbox(url, policy=Original()) as original:
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="the event type Odd can't be decoded: "):
                original.flush(client)
    assert statuses(outbox) == ["pending"] * 3
    assert outbox.flush(client).sent == 3  # nobody reads the event
    with pytest.raises(ConfigurationError, match="the event type Odd can't be decoded: "):
        assert client.batches[0][0].event


def test_a_row_from_before_its_class_gained_a_field_is_delivered(registry, outbox: Outbox, server, client) -> None:
    class Moved(Event, tag="moved"):
        n: int

    outbox.enqueue({"event_type": "moved", "n": 1, "é": [None, 1.50]})
    stored = row(outbox, 1).payload_json

    class Moved(Event, tag="moved"):  # type: ignore[no-redef]  # noqa: F811 - the next version of the program
        n: int
        to: str

    outbox.enqueue(Moved(n=2, to="x"))
    assert outbox.flush(client).sent == 2
    assert [*server.stored.values()] == [stored, row(outbox, 2).payload_json]
    outbox.enqueue(Moved(n=3, to="y"))
    scripted = ScriptedClient()
    add_row(outbox, event_type="moved", payload_json=stored)
    assert outbox.flush(scripted).sent == 2
    assert sorted(str(item.event) for item in scripted.batches[0]) == [
        str(Moved(n=3, to="y")),
        str({"event_type": "moved", "n": 1, "é": [None, 1.5]}),
    ]


def test_types_may_be_defined_while_others_decode(registry) -> None:
    failures: list[BaseException] = []
    done = threading.Event()

    def decode_all_the_time() -> None:
        while not done.is_set():
            try:
                decode(encode(rule_fired())[1])
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=decode_all_the_time) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for number in range(100):
            type(Event)(f"T{number}", (Event,), {"__annotations__": {}, "__module__": __name__}, tag=f"t{number}")
    finally:
        done.set()
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert failures == []
