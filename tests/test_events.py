import json
from datetime import datetime, timedelta, timezone
from types import MappingProxyType
from typing import Any

import pytest
from freezegun import freeze_time
from hypothesis import given
from hypothesis import strategies as st

from builders import NOON, NOON_MS, Original, ScriptedClient, add_row, row, rule_fired, statuses
from outbox import (
    Event,
    Instant,
    InvalidEvent,
    Outbox,
)
from outbox.events import content_hash, decode, encode, with_type
from outbox.new_rows import columns

PLUS_TWO = timezone(timedelta(hours=2))


class OrderShipped(Event, tag="order_shipped"):
    order_id: str
    details: Any = None


class Visit(Event, tag="visit"):
    page: str | None
    left_at: Instant | None
    seen_at: Instant | int = 0


class Heartbeat(Event, tag="heartbeat"):
    occurred_at: Instant
    rule_id: int = 0


@pytest.mark.parametrize(
    ("event", "wire"),
    [
        (
            OrderShipped(order_id="o1", details={"weight": 1.5}),
            '{"event_type":"order_shipped","order_id":"o1","details":{"weight":1.5}}',
        ),
    ],
)
def test_an_event_goes_on_the_wire_in_field_order_without_absent_fields(event: Event, wire: str) -> None:
    assert encode(event) == (event, wire)
    assert encode(json.loads(wire)) == (event, wire)
    assert decode(wire) == event


@pytest.mark.parametrize(
    "when",
    [NOON, NOON.astimezone(PLUS_TWO), "2026-11-24T14:00:00+02:00", "2026-11-24T12:00:00Z"],
)
def test_times_are_written_in_utc(when: datetime | str) -> None:
    document = {"event_type": "rule_fired", "rule_ids": ["r1"], "session_id": "s1", "fired_at": when}
    event, wire = encode(document)
    assert '"fired_at":"2026-11-24T12:00:00Z"' in wire
    assert columns(event, now_ms=0)["occurred_at_ms"] == NOON_MS
    if isinstance(when, datetime):
        assert encode(rule_fired(fired_at=when))[1] == wire


def test_times_are_written_in_utc_in_fields_that_may_hold_something_else() -> None:
    then = NOON.astimezone(PLUS_TWO)
    wire = '{"event_type":"visit","page":null,"left_at":"2026-11-24T12:00:00Z","seen_at":"2026-11-24T12:00:00Z"}'
    assert encode(Visit(page=None, left_at=then, seen_at=then))[1] == wire
    assert '"left_at":null' in encode(Visit(page="a", left_at=None))[1]


def test_unknown_fields_of_a_mapping_are_kept_behind_the_known_ones() -> None:
    document = {"new": [1], "event_type": "order_shipped", "order_id": "o1"}
    event, wire = encode(document)
    assert wire == '{"event_type":"order_shipped","order_id":"o1","details":null,"new":[1]}'
    assert event == decode(wire) == OrderShipped(order_id="o1")


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (rule_fired(rule_ids="r1"), "rule_fired: rule_ids: expected `array`, got `str`"),
        (rule_fired(rule_ids=["r1", 2]), r"rule_fired: rule_ids\[1\]: expected `str`, got `int`"),
        (rule_fired(session_id=None), "rule_fired: session_id: expected `str`, got `null`"),
        (
            rule_fired(fired_at=datetime(2026, 1, 1)),
            "rule_fired: fired_at: expected an RFC 3339 time with an offset",
        ),
        (rule_fired(fired_at="today"), "rule_fired: fired_at: expected an RFC 3339 time with an offset"),
        (rule_fired(session_id="\ud800"), r"rule_fired: '\\ud800' is not valid Unicode text"),
        (OrderShipped(order_id="x" * 262_200), "order_shipped: 2622.. bytes as JSON, at most 262144 are accepted"),
        (
            OrderShipped(order_id="o", details=float("nan")),
            "order_shipped: details: nan is not a number that JSON",
        ),
        (OrderShipped(order_id="o", details={"a": [0, float("inf")]}), r"details.a\[1\]: inf is not a number"),
        (OrderShipped(order_id="o", details=(rule_fired(intent=float("-inf")),)), r"details\[0\].intent: -inf"),
        (OrderShipped(order_id="o", details=object()), "order_shipped: objects of type object can't be JSON"),
        (
            {"event_type": "order_shipped", "order_id": "o", "details": float("nan")},
            "details: nan is not a number",
        ),
        ({"event_type": "order_shipped", "order_id": "o", "new": {"x": float("nan")}}, "new.x: nan is not"),
        ({"event_type": "order_shipped"}, "order_shipped: order_id: missing, expected `str`"),
        ({"event_type": "heartbeat"}, "heartbeat: occurred_at: missing, expected an RFC 3339 time"),
        ({"event_type": "rule_fired", "rule_ids": [], "fired_at": NOON}, "rule_fired: session_id: missing"),
        ({"event_type": "order_shipped", "order_id": "o", 5: 6}, "the key 5 is int, expected text"),
        ({"event_type": "\ud800"}, r"event_type is '\\ud800', expected a printable text of 1 to 191 characters"),
        ({"event_type": "order\0lost"}, r"event_type is 'order\\x00lost', expected a printable text"),
        ({"event_type": ""}, "event_type is '', expected a printable text"),
        ({"event_type": "x" * 192}, "event_type is 'x{192}', expected a printable text of 1 to 191 characters"),
        ({"event_type": ["rule_fired"]}, "event_type is .* expected a printable text"),
        ({"event_type": None}, "event_type is None, expected a printable text"),
        ({}, "the event has no event_type, expected a printable text of 1 to 191 characters"),
        ({"event_type": "order_lost", "at": "\ud800"}, r"order_lost: '\\ud800' is not valid Unicode text"),
        ({"event_type": "order_lost", "weight": float("nan")}, "order_lost: weight: nan is not a number"),
        ({"event_type": "order_lost", "why": object()}, "order_lost: objects of type object can't be JSON"),
        ({"event_type": "order_lost", "why": "x" * 262_200}, "order_lost: 2622.. bytes as JSON, at most 262144"),
        ({"event_type": "order_lost", 5: 6}, "the key 5 is int, expected text"),
        ("rule_fired", "expected an Event, a mapping with event_type, a Pydantic model, .*, got str"),
        (None, "expected an Event, a mapping with event_type, a Pydantic model, .*, got NoneType"),
    ],
)
def test_an_invalid_event_is_refused_by_name(event: Any, message: str) -> None:
    with pytest.raises(InvalidEvent, match=message):
        encode(event)


def test_an_event_of_an_unknown_type_goes_on_the_wire_as_it_is() -> None:
    document = {"order_id": "o1", "event_type": "order_lost", "at": NOON, "parts": (1, 2.5, None)}
    wire = '{"order_id":"o1","event_type":"order_lost","at":"2026-11-24T12:00:00Z","parts":[1,2.5,null]}'
    assert encode(document) == encode(MappingProxyType(document)) == (json.loads(wire), wire)
    assert encode({"event_type": "x" * 191})[0] == {"event_type": "x" * 191}


@pytest.mark.parametrize("name", ["order_lost", None, "\ud800"])
def test_a_strict_outbox_refuses_an_unknown_type(name: str | None) -> None:
    with pytest.raises(InvalidEvent, match="event_type is .*, expected one of .*fix_outcome, .*, rule_fired"):
        encode({"event_type": name}, strict=True)
    document = {"event_type": "order_shipped", "order_id": "o1"}
    assert encode(document, strict=True) == encode(document)


def test_a_type_is_added_to_an_event_that_names_none() -> None:
    event = OrderShipped(order_id="o1")
    assert with_type(event, "order_shipped") is event
    assert [*with_type({"order_id": "o1"}, "order_lost").items()] == [
        ("event_type", "order_lost"),
        ("order_id", "o1"),
    ]
    assert with_type({"event_type": "order_lost"}, "order_lost") == {"event_type": "order_lost"}


@pytest.mark.parametrize("event", [OrderShipped(order_id="o1"), {"event_type": "order_shipped"}])
def test_a_type_that_contradicts_the_event_is_refused(event: Any) -> None:
    with pytest.raises(
        InvalidEvent, match="event_type is 'order_lost', but the event itself says 'order_shipped'"
    ):
        with_type(event, "order_lost")


def test_an_event_of_the_largest_size_is_accepted() -> None:
    overhead = len(encode(OrderShipped(order_id=""))[1])
    assert len(encode(OrderShipped(order_id="x" * (262_144 - overhead)))[1]) == 262_144


def test_null_itself_is_a_value() -> None:
    assert encode(OrderShipped(order_id="null", details={"a": None}))[1].endswith('"details":{"a":null}}')


def test_an_event_that_holds_itself_is_refused() -> None:
    endless: dict[str, Any] = {"event_type": "order_shipped", "order_id": "o"}
    endless["details"] = endless
    with pytest.raises(InvalidEvent, match="order_shipped: maximum recursion depth"):
        encode(endless)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ("{", "Input data was truncated"),
        ("", "Input data was truncated"),
        ("[]", "expected `object`, got `array`"),
        ("{}", "event_type: missing"),
        ('{"event_type":"order_lost"}', "event_type: invalid value 'order_lost'"),
        ('{"event_type":"rule_fired"}', "rule_ids: missing"),
        ('{"event_type":"order_shipped","order_id":"\ud800"}', "surrogates not allowed"),
        ('{"event_type":"order_shipped","order_id":"o","details":' + "[" * 9_999, "recursion"),
        (b"{}", "the payload is bytes, expected text"),
        (None, "the payload is NoneType, expected text"),
    ],
)
def test_a_stored_payload_that_is_no_event_is_refused_with_the_reason(payload: Any, message: str) -> None:
    with pytest.raises(InvalidEvent, match=message):
        decode(payload)


@given(st.text() | st.binary())
@pytest.mark.untraced
def test_decoding_anything_gives_an_event_or_a_reason(payload: str | bytes) -> None:
    try:
        assert isinstance(decode(payload), Event)
    except InvalidEvent as reason:
        assert str(reason)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(json_values, json_values)
@pytest.mark.untraced
def test_what_is_encoded_can_be_decoded_again(order_id: object, details: object) -> None:
    document = {"event_type": "order_shipped", "order_id": order_id, "details": details}
    try:
        event, wire = encode(document)
    except InvalidEvent as reason:
        assert str(reason).startswith("order_shipped: ")
    else:
        assert decode(wire) == event
        assert json.loads(wire) == document


def test_a_types_own_check_spoils_its_own_row_only(outbox: Outbox, url: str) -> None:
    class Counted(Event, tag="counted"):
        n: int

        def __post_init__(self) -> None:
            if self.n <= 0:
                raise AssertionError

    add_row(outbox, event_type="counted", payload_json='{"event_type":"counted","n":0}')
    outbox.enqueue(Counted(n=1))
    with Outbox(url, policy=Original()) as original:
        assert original.flush(ScriptedClient()).sent == 1
    assert statuses(outbox) == ["abandoned", "sent"]
    assert row(outbox, 1).last_error == "permanent: decode observation event: AssertionError"
    client = ScriptedClient()
    outbox.requeue_abandoned(older_than=2**62)
    assert outbox.flush(client).sent == 1
    assert client.batches[0][0].event == {"event_type": "counted", "n": 0}


def test_a_frozen_time_is_a_time_like_any_other() -> None:
    with freeze_time("2026-11-24T12:00:00Z"):
        now = datetime.now(timezone.utc)
        frozen = [
            rule_fired(fired_at=now),
            {"event_type": "rule_fired", "rule_ids": ["r1"], "session_id": "s1", "fired_at": now},
            OrderShipped(order_id="o", details={"at": now}),
        ]
        for event in frozen:
            assert '"2026-11-24T12:00:00' in encode(event)[1]
        assert encode(frozen[0])[1] == encode(frozen[1])[1] == encode(rule_fired())[1]
        assert columns(encode(frozen[0])[0], now_ms=0)["occurred_at_ms"] == NOON_MS
        with pytest.raises(InvalidEvent, match="fired_at: expected an RFC 3339 time with an offset"):
            encode(rule_fired(fired_at=datetime.now()))


def test_a_time_given_as_text_is_written_in_utc_too() -> None:
    assert encode(rule_fired(fired_at="2026-11-24t14:00:00+02:00"))[1] == encode(rule_fired())[1]


def test_the_content_hash_is_the_start_of_the_sha256() -> None:
    assert content_hash("hello") == "2cf24dba5fb0a30e"
