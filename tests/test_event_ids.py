from __future__ import annotations

import pytest

from builders import NOON_MS, row, rule_fired, statuses
from outbox import ConfigurationError, InvalidEvent, Outbox, Where
from outbox.event_ids import derived, is_valid

EXPECTED = "expected 1 to 191 printable ASCII characters without blanks"


@pytest.mark.parametrize("event_id", ["a", "order-17", "!", "~", "x" * 191, "<a@b.example>"])
def test_printable_ascii_is_an_id(event_id):
    assert is_valid(event_id)


@pytest.mark.parametrize("event_id", ["", " ", "a b", "a\n", "é", "\x7f", "a\0", "x" * 192, None, 17, b"a"])
def test_anything_else_is_none(event_id):
    assert not is_valid(event_id)


@pytest.mark.parametrize("event_id", ["", "a b", "é", "x" * 192, 17])
def test_an_invalid_id_is_refused_and_nothing_is_recorded(outbox: Outbox, event_id):
    with pytest.raises(InvalidEvent, match=f"^event_id is .*, {EXPECTED}$"):
        outbox.enqueue(rule_fired(), event_id=event_id)
    with pytest.raises(InvalidEvent, match=f"^event_id is .*, {EXPECTED}$"):
        outbox.enqueue_many([rule_fired()] * 2, event_ids=["fine", event_id])
    assert statuses(outbox) == []


@pytest.mark.parametrize("event_ids", ["ab", [], ["a"], ["a", "b", "c"]])
def test_each_event_needs_an_id_or_none(outbox: Outbox, event_ids):
    with pytest.raises(ConfigurationError, match="expected a list with an id or None for each of 2 events$"):
        outbox.enqueue_many([rule_fired()] * 2, event_ids=event_ids)
    assert statuses(outbox) == []


def test_the_ids_may_come_from_any_iterable(outbox: Outbox):
    ids = outbox.enqueue_many([rule_fired()] * 2, event_ids=(name for name in ("a", "b")))
    assert [row(outbox, row_id).event_id for row_id in ids] == ["a", "b"]


def test_without_capture_ids_are_of_no_interest(outbox: Outbox, monkeypatch):
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    assert outbox.enqueue(rule_fired(), event_id="a") is None
    assert outbox.enqueue_many([rule_fired()], event_ids=["a"]) == []
    assert statuses(outbox) == []


def test_a_derived_id_tells_outbox_time_and_row():
    assert derived("u-u-i-d", NOON_MS, 17) == f"u-u-i-d-{NOON_MS}-17"


def test_a_row_id_that_no_database_gives_is_found_nowhere(outbox: Outbox):
    row_id = outbox.enqueue(rule_fired())
    found = row(outbox, row_id).event_id
    impossible = found.removesuffix(f"-{row_id}") + f"-{2**63}"
    assert [one.id for one in outbox.find(Where(event_ids=[impossible, found]))] == [row_id]
