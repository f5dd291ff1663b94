import json
import sys
import threading
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from freezegun import freeze_time
from hypothesis import given
from hypothesis import strategies as st

from builders import NOON, NOON_MS, ScriptedClient, add_row, row, rule_fired, statuses
from outbox import (
    ConfigurationError,
    Event,
    FixOutcome,
    Instant,
    InvalidEvent,
    McpRuleServed,
    Outbox,
    RuleActuallyCited,
    RuleCitedInEdit,
    RuleFired,
    events,
)
from outbox.events import columns, content_hash, decode, encode, event_types

PLUS_TWO = timezone(timedelta(hours=2))


class OrderShipped(Event, tag="order_shipped"):
    order_id: str
    details: Any = None


class Heartbeat(Event, tag="heartbeat"):
    occurred_at: Instant
    rule_id: int = 0


SERVED = McpRuleServed(
    tool="search",
    session_id="s1",
    repo_full_name="acme/shop",
    query_hash="beef",
    rule_ids=["r1", "r2"],
    top_k=5,
    was_empty=False,
    strict_match_count=2,
    estimated_tokens=812,
    served_at=NOON,
)
CITED_IN_EDIT = RuleCitedInEdit(rule_id="r1", session_id="s1", file_path="a.py", diff_excerpt="+x", cited_at=NOON)
CITED = RuleActuallyCited(rule_id="r1", session_id="s1", citation_excerpt="as r1 says", cited_at=NOON)
OUTCOME = FixOutcome(rule_id="r1", session_id="s1", accepted=True, occurred_at=NOON)


@pytest.mark.parametrize(
    ("event", "wire"),
    [
        (
            rule_fired(file_path="a.py", intent="fix"),
            '{"event_type":"rule_fired","rule_ids":["r1"],"file_path":"a.py","intent":"fix","session_id":"s1",'
            '"fired_at":"2026-11-24T12:00:00Z"}',
        ),
        (
            SERVED,
            '{"event_type":"mcp_rule_served","tool":"search","session_id":"s1","repo_full_name":"acme/shop",'
            '"query_hash":"beef","rule_ids":["r1","r2"],"top_k":5,"was_empty":false,"strict_match_count":2,'
            '"estimated_tokens":812,"served_at":"2026-11-24T12:00:00Z"}',
        ),
        (
            CITED_IN_EDIT,
            '{"event_type":"rule_cited_in_edit","rule_id":"r1","session_id":"s1","file_path":"a.py",'
            '"diff_excerpt":"+x","cited_at":"2026-11-24T12:00:00Z"}',
        ),
        (
            CITED,
            '{"event_type":"rule_actually_cited","rule_id":"r1","session_id":"s1","citation_excerpt":"as r1 says",'
            '"cited_at":"2026-11-24T12:00:00Z"}',
        ),
        (
            OUTCOME,
            '{"event_type":"fix_outcome","rule_id":"r1","session_id":"s1","accepted":true,'
            '"occurred_at":"2026-11-24T12:00:00Z"}',
        ),
        (
            FixOutcome(
                rule_id="r1", session_id="s1", accepted=False, occurred_at=NOON, mcp_serve_event_ids=["e1", 7]
            ),
            '{"event_type":"fix_outcome","rule_id":"r1","session_id":"s1","accepted":false,'
            '"occurred_at":"2026-11-24T12:00:00Z","mcp_serve_event_ids":["e1",7]}',
        ),
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
    ("event", "expected"),
    [
        (rule_fired(rule_ids=["a", "b"]), ("rule_fired", None, '["a","b"]', "s1", None, NOON_MS)),
        (SERVED, ("mcp_rule_served", None, '["r1","r2"]', "s1", None, NOON_MS)),
        (CITED_IN_EDIT, ("rule_cited_in_edit", "r1", '["r1"]', "s1", "a.py", NOON_MS)),
        (OUTCOME, ("fix_outcome", "r1", '["r1"]', "s1", None, NOON_MS)),
        (OrderShipped(order_id="o1"), ("order_shipped", None, "[]", "", None, 99)),
        (Heartbeat(occurred_at=NOON, rule_id=3), ("heartbeat", None, "[]", "", None, NOON_MS)),
    ],
)
def test_columns_repeat_the_payload(event: Event, expected: tuple[Any, ...]) -> None:
    assert tuple(columns(event, now_ms=99).values()) == expected


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


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        (datetime(1970, 1, 1, tzinfo=timezone.utc), 0),
        (datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=timezone.utc), -1),
        (datetime(2026, 11, 24, 12, 0, 0, 1_999, tzinfo=timezone.utc), NOON_MS + 1),
    ],
)
def test_milliseconds_are_rounded_down(when: datetime, expected: int) -> None:
    assert columns(rule_fired(fired_at=when), now_ms=0)["occurred_at_ms"] == expected


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
        (
            {"event_type": "order_lost"},
            "event_type is 'order_lost', expected one of .*fix_outcome, .*, rule_fired",
        ),
        ({"event_type": "\ud800"}, r"event_type is '\\ud800', expected one of"),
        ({"event_type": ["rule_fired"]}, "event_type is .* expected one of"),
        ({}, "event_type is None, expected one of"),
        ("rule_fired", "expected an Event or a mapping with event_type, got str"),
        (None, "expected an Event or a mapping with event_type, got NoneType"),
    ],
)
def test_an_invalid_event_is_refused_by_name(event: Any, message: str) -> None:
    with pytest.raises(InvalidEvent, match=message):
        encode(event)


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
def test_what_is_encoded_can_be_decoded_again(order_id: object, details: object) -> None:
    document = {"event_type": "order_shipped", "order_id": order_id, "details": details}
    try:
        event, wire = encode(document)
    except InvalidEvent as reason:
        assert str(reason).startswith("order_shipped: ")
    else:
        assert decode(wire) == event
        assert json.loads(wire) == document


def test_old_rows_may_lack_the_serve_event_ids() -> None:
    assert decode(encode(OUTCOME)[1]).mcp_serve_event_ids == []


def test_an_event_type_is_registered_by_being_defined() -> None:
    assert event_types()["order_shipped"] is OrderShipped

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
    known = events._Registry()
    for type_ in event_types().values():
        known.add(type_)
    monkeypatch.setattr(events, "_registry", known)
    return known


@pytest.mark.parametrize("kind", [list[int] | set[int], "NoSuchType"])
def test_an_event_type_that_cannot_be_decoded_is_named_before_a_row_is_touched(
    registry, outbox: Outbox, kind: object
) -> None:
    outbox.enqueue_many([rule_fired()] * 3)
    type(Event)("Odd", (Event,), {"__annotations__": {"x": kind}, "__module__": __name__}, tag="odd")
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="the event type Odd can't be decoded: "):
            outbox.flush(ScriptedClient())
    assert statuses(outbox) == ["pending"] * 3


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


def test_a_types_own_check_spoils_its_own_row_only(outbox: Outbox) -> None:
    class Counted(Event, tag="counted"):
        n: int

        def __post_init__(self) -> None:
            if self.n <= 0:
                raise AssertionError

    add_row(outbox, event_type="counted", payload_json='{"event_type":"counted","n":0}')
    outbox.enqueue(Counted(n=1))
    assert outbox.flush(ScriptedClient()).sent == 1
    assert statuses(outbox) == ["abandoned", "sent"]
    assert row(outbox, 1).last_error == "permanent: decode observation event: AssertionError"


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
