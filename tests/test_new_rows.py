from datetime import datetime, timezone
from typing import Any

import pytest

from builders import NOON, NOON_MS, rule_fired
from outbox import Event, Instant
from outbox.new_rows import columns, new_row


class Weighed(Event, tag="weighed"):
    order_id: str


class Beat(Event, tag="beat"):
    occurred_at: Instant
    rule_id: int = 0


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Weighed(order_id="o1"), ("weighed", None, "[]", "", None, 99)),
        (Beat(occurred_at=NOON, rule_id=3), ("beat", None, "[]", "", None, NOON_MS)),
        ({"event_type": "order_lost", "rule_id": 3, "rule_ids": "r1"}, ("order_lost", None, "[]", "", None, 99)),
        (
            {"event_type": "order_lost", "rule_id": "r1", "session_id": "s1", "file_path": "a.py"},
            ("order_lost", "r1", '["r1"]', "s1", "a.py", 99),
        ),
        ({"event_type": "order_lost", "rule_ids": ["r1", 2]}, ("order_lost", None, '["r1",2]', "", None, 99)),
    ],
)
def test_columns_repeat_the_payload(event: Event, expected: tuple[Any, ...]) -> None:
    assert tuple(columns(event, now_ms=99).values()) == expected


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


@pytest.mark.parametrize(
    ("occurred_at", "expected"),
    [
        ("2026-11-24T12:00:00Z", NOON_MS),
        ("2026-11-24t14:00:00.0019+02:00", NOON_MS + 1),
        ("2026-11-24T12:00:00", 99),
        ("2026-11-24", 99),
        ("yesterday", 99),
        (NOON_MS, 99),
        (None, 99),
        ({}, 99),
    ],
)
def test_an_event_without_a_class_happened_at_its_rfc_3339_time_or_now(occurred_at: Any, expected: int) -> None:
    event = {"event_type": "order_lost", "occurred_at": occurred_at}
    assert new_row(event, None, strict=False, now_ms=99)["occurred_at_ms"] == expected


def test_a_time_of_an_event_without_a_class_may_be_a_datetime() -> None:
    event = {"event_type": "order_lost", "occurred_at": NOON}
    assert new_row(event, None, strict=False, now_ms=99)["occurred_at_ms"] == NOON_MS


def test_redact_gets_a_dict_of_its_own_for_an_event_without_a_class() -> None:
    given = {"event_type": "order_lost", "email": "a@example.com"}

    def redact(event: dict[str, Any]) -> dict[str, Any]:
        del event["email"]
        return event

    assert new_row(given, redact, strict=False, now_ms=0)["payload_json"] == '{"event_type":"order_lost"}'
    assert given["email"]
