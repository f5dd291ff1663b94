from __future__ import annotations

import pytest
from werkzeug.datastructures import MultiDict

from builders import NOON_MS
from outbox import ConfigurationError, Where
from outbox.web import filters


def read(*fields, hide_payloads=False):
    return filters.read(MultiDict(fields), now_ms=NOON_MS, hide_payloads=hide_payloads)


def test_every_condition_of_the_outbox_can_be_asked_for():
    found = read(
        ("ids", "17, 18"),
        ("event_ids", "a b"),
        ("destination", "billing"),
        ("status", "pending"),
        ("status", "parked"),
        ("event_type", "order_placed"),
        ("failure", "503"),
        ("payload", '"order":17'),
        ("older_than", "1h"),
        ("newer_than", "2026-11-24T00:00:00Z"),
        ("due_after", "0s"),
    )
    assert found.where == Where(
        ids=[17, 18],
        event_ids=["a", "b"],
        destination="billing",
        status=["pending", "parked"],
        event_type="order_placed",
        failure="503",
        contains='"order":17',
        older_than=NOON_MS - 3_600_000,
        newer_than=NOON_MS - 12 * 3_600_000,
        due_after=NOON_MS,
    )
    assert not found.is_everything
    assert found.has_more


def test_without_conditions_every_event_matches():
    found = read(("status", ""), ("event_type", "  "), ("page", "7"))
    assert found.is_everything
    assert found.where == Where()
    assert not found.has_more


def test_what_was_counted_is_what_is_changed_later():
    """An age means another time by then."""
    found = read(("older_than", "1h"), ("status", "sent"), ("event_type", "a"))
    assert [*found.as_given()] == [("event_type", "a"), ("older_than", "1h"), ("status", "sent")]
    meant = [*found.as_meant()]
    assert meant == [("event_type", "a"), ("older_than", "2026-11-24T11:00:00.000+00:00"), ("status", "sent")]
    later = filters.read(MultiDict(meant), now_ms=NOON_MS + 60_000, hide_payloads=False)
    assert later.where == found.where


@pytest.mark.parametrize(
    ("field", "words"),
    [
        (("ids", "17, x"), "ids has the entry 'x', expected row ids, which are whole numbers"),
        (("ids", "\u0661"), "ids has the entry '\u0661', expected row ids"),
        (
            ("older_than", "soon"),
            "older_than is 'soon', expected an age such as 30s, 15m, 12h or 7d, or a date and",
        ),
        (("older_than", "2026-11-24T12:00:00"), "expected an age"),
        (("status", "lost"), "status is 'lost', expected one of pending"),
        (("destination", "a b"), "the destination is 'a b', expected a name"),
    ],
)
def test_a_condition_that_makes_no_sense_is_named(field, words):
    with pytest.raises(ConfigurationError) as error:
        read(field)
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["payload", "failure"])
def test_nobody_can_guess_at_hidden_payloads(name):
    with pytest.raises(ConfigurationError, match=f"hides payloads, so no event can be found by {name}"):
        read((name, "4111"), hide_payloads=True)
