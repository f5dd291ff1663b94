from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, replace
from datetime import datetime

import pytest

from builders import NOON, NOON_MS
from outbox import ConfigurationError, Status, Where
from outbox.filters import valid


def test_without_conditions_everything_matches() -> None:
    assert Where().is_everything
    assert Where().is_whole_destination
    assert not Where().has_text


@pytest.mark.parametrize(
    "condition",
    [
        {"ids": []},
        {"event_ids": []},
        {"destination": "billing"},
        {"status": []},
        {"event_type": ""},
        {"failure": "422"},
        {"contains": "order-17"},
        {"older_than": 0},
        {"newer_than": 0},
        {"due_after": 0},
    ],
)
def test_each_condition_makes_it_less_than_everything(condition: dict) -> None:
    assert not Where(**condition).is_everything
    assert Where(**condition).is_whole_destination == ("destination" in condition)


def test_equal_conditions_are_equal_however_they_are_written() -> None:
    written = Where(status="parked", older_than=NOON, ids=[1, 2], destination="default")
    assert written == Where(status=[Status.PARKED], older_than=NOON_MS, ids=(1, 2), destination="default")
    assert hash(written) == hash(replace(written))
    assert written.statuses == (Status.PARKED,)
    assert written.stored_destination == ""


def test_it_can_not_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Where().status = "sent"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ({"ids": [0]}, "ids has the entry 0, expected row ids from 1 to 9223372036854775807"),
        ({"ids": [True]}, "ids has the entry True, expected row ids"),
        ({"ids": [2**63]}, "ids has the entry 9223372036854775808, expected row ids"),
        ({"ids": 17}, "ids is 17, expected a list"),
        ({"ids": range(1, 10_002)}, "ids has 10001 entries, expected at most 10000"),
        ({"event_ids": "order-17"}, "event_ids is 'order-17', expected a list"),
        ({"event_ids": [17]}, "event_ids has the entry 17, expected texts"),
        ({"destination": "a b"}, "the destination is 'a b', expected a name"),
        ({"status": "lost"}, "status is 'lost', expected one of pending, sending, sent, parked, abandoned"),
        ({"status": ["sent", None]}, "status is None, expected one of pending"),
        ({"status": 7}, "status is 7, expected a list"),
        ({"event_type": 7}, "event_type is 7, expected the name of a type"),
        ({"failure": ""}, "failure is '', expected a text that is not empty"),
        (
            {"failure": "a\0b"},
            "failure is 'a\\x00b', expected a text that is not empty, in valid Unicode and without NUL",
        ),
        ({"event_type": "\0"}, "event_type is '\\x00', expected the name of a type, a text, in valid Unicode"),
        ({"contains": "\ud800"}, "contains is '\\ud800', expected a text"),
        (
            {"event_ids": ["\0"]},
            "event_ids has the entry '\\x00', expected texts, in valid Unicode and without NUL",
        ),
        ({"contains": b"x"}, "contains is b'x', expected a text that is not empty"),
        (
            {"older_than": datetime(2026, 1, 1)},
            "older_than is datetime.datetime(2026, 1, 1, 0, 0), expected a dat",
        ),
        ({"newer_than": "now"}, "newer_than is 'now', expected a datetime with a time zone or epoch milliseconds"),
        ({"due_after": 2**63}, "due_after is 9223372036854775808, expected a datetime"),
    ],
)
def test_a_condition_that_no_event_can_meet_is_refused(condition: dict, words: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        Where(**condition)


def test_the_conditions_of_a_call_come_from_one_place() -> None:
    assert valid(None, status="sent", event_type=None) == Where(status="sent")
    assert valid(Where(status="sent"), status=None) == Where(status="sent")
    with pytest.raises(ConfigurationError, match="where and status are both given, expected one of them"):
        valid(Where(), status="sent")
    for wrong in (None, "sent", {"status": "sent"}):
        with pytest.raises(ConfigurationError, match="expected a Where"):
            valid(wrong)  # type: ignore[arg-type]
