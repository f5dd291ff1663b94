from __future__ import annotations

import re
from urllib.parse import urlencode

import pytest
from freezegun import freeze_time

from builders import NOON, NOON_MS, add_row, row, rule_fired, statuses
from outbox.clock import now_ms


@pytest.fixture
def rows(outbox):
    """Of each kind one: waiting, parked, abandoned, sent, and in flight."""
    later = now_ms() + 600_000
    return [
        add_row(outbox, next_attempt_at_ms=later, waits_for="service", last_error="503 Down", retry_count=1),
        add_row(outbox, status="parked", last_error="401 Unauthorized", event_type="invoice_paid"),
        add_row(outbox, status="abandoned", last_error="permanent: 422 no"),
        add_row(outbox, status="sent", sent_at_ms=NOON_MS),
        add_row(outbox, status="sending", next_attempt_at_ms=later),
    ]


def confirmed(browser, **fields):
    """Choose an action, read what it would do, and confirm it."""
    query = "&".join(f"{name}={value}" for name, values in fields.items() for value in str(values).split(","))
    browser.get(f"/events/confirm?{query}")
    before = browser.text
    answer = browser.post("/events/act", **{name: str(values).split(",") for name, values in fields.items()})
    return before, answer


@pytest.mark.parametrize(
    ("action", "counted", "done", "after"),
    [
        ("retry", "Retry 2 events?", "2 events were made due.", ["pending", "pending", "abandoned", "sent", "sending"]),
        ("requeue", "Requeue 1 event?", "1 event was requeued.", ["pending", "parked", "pending", "sent", "sending"]),
        ("abandon", "Abandon 2 events?", "2 events were abandoned.", ["abandoned", "abandoned", "abandoned", "sent", "sending"]),
        ("purge", "Purge 4 events?", "4 events were deleted for good.", ["sending"]),
    ],
)  # fmt: skip
def test_an_action_is_counted_confirmed_and_done(browser, outbox, rows, action, counted, done, after):
    browser.get(f"/events/confirm?do={action}&scope=all")
    assert counted in browser.text
    assert "every event of this outbox" in browser.text
    assert "1 event is being sent and will be left alone" in browser.text
    assert statuses(outbox) == ["pending", "parked", "abandoned", "sent", "sending"]
    browser.post("/events/act", do=action, scope="all", reason="not wanted")
    assert f"{done} Left alone because a flusher is sending them: 1 event." in browser.text
    assert statuses(outbox) == after


def test_only_the_selected_events_are_changed(browser, outbox, rows):
    before, _ = confirmed(browser, do="purge", scope="selected", row=f"{rows[2]},{rows[3]}")
    assert "You chose 2 events." in before
    assert "1 of them was never delivered" in before
    assert statuses(outbox) == ["pending", "parked", "sending"]


def test_all_that_match_are_changed_and_no_others(browser, outbox, rows):
    before, answer = confirmed(browser, do="retry", scope="all", status="parked", older_than="0s")
    assert "all events that match these conditions" in before
    assert "1 invoice_paid" in before
    assert statuses(outbox)[:2] == ["pending", "pending"]
    assert row(outbox, rows[0]).next_attempt_at_ms > now_ms()
    assert answer.request.full_path == "/events?older_than=0s&status=parked"


def test_the_form_names_what_was_counted_not_an_age_that_moves(browser, rows):
    browser.get("/events/confirm?do=retry&scope=all&older_than=1h")
    assert 'name="older_than" value="20' in browser.page


@pytest.mark.parametrize("condition", [{}, {"older_than": "2026-12-24T12:00:00Z"}])
def test_an_event_that_came_after_the_count_is_left_alone(browser, outbox, rows, condition):
    with freeze_time(NOON) as clock:
        browser.get(f"/events/confirm?{urlencode({'do': 'purge', 'scope': 'all', **condition})}")
        assert "Purge 4 events?" in browser.text
        fields = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', browser.page))
        clock.tick(1)
        new = outbox.enqueue(rule_fired())
        browser.post("/events/act", **fields)
    assert "4 events were deleted for good." in browser.text
    assert [found.id for found in outbox.find(status="pending")] == [new]


def test_an_action_on_the_page_of_an_event_returns_there(browser, outbox, rows):
    _, answer = confirmed(browser, do="requeue", scope="one", row=rows[2])
    assert answer.request.path == f"/events/{rows[2]}"
    assert "1 event was requeued" in browser.text


def test_after_the_purge_of_an_event_its_page_is_not_asked_for(browser, outbox, rows):
    _, answer = confirmed(browser, do="purge", scope="one", row=rows[3])
    assert (answer.status_code, answer.request.path) == (200, "/events")


def test_a_reason_is_needed_to_abandon_and_is_kept(browser, outbox, rows):
    browser.get("/events/confirm?do=abandon&scope=all")
    assert browser.post("/events/act", do="abandon", scope="all", reason=" ").status_code == 400
    assert "the reason has 0 characters, expected 1 to 500" in browser.text
    browser.get("/")
    browser.get("/events/confirm?do=abandon&scope=all")
    browser.post("/events/act", do="abandon", scope="all", reason="the customer left")
    assert row(outbox, rows[0]).last_error == "cancelled: the customer left"


def test_an_action_that_applies_to_nothing_offers_only_the_way_back(browser, rows):
    browser.get(f"/events/confirm?do=requeue&scope=selected&row={rows[3]}")
    assert "Nothing to requeue" in browser.text
    assert "/events/act" not in browser.page


def test_an_action_without_a_selection_says_so(browser, rows):
    answer = browser.get("/events/confirm?do=purge&scope=selected&status=sent")
    assert answer.request.full_path == "/events?status=sent"
    assert "No event is selected" in browser.text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"do": "explode", "scope": "all"},
            "do is 'explode', expected one of retry, requeue, abandon, purge",
        ),
        ({"do": "purge", "scope": "some"}, "scope is 'some', expected all, selected or one"),
        ({"do": "purge"}, "scope is '', expected all, selected or one"),
        ({"do": "purge", "scope": "selected", "row": "x"}, "ids has the entry 'x'"),
    ],
)
def test_a_form_that_makes_no_sense_changes_nothing(browser, outbox, rows, fields, words):
    browser.get("/events/confirm?do=purge&scope=all")
    assert browser.post("/events/act", **fields).status_code == 400
    assert words in browser.text.replace("&#39;", "'")
    assert len(statuses(outbox)) == 5


def test_without_its_token_no_action_is_done(browser, outbox, rows):
    browser.get("/events/confirm?do=purge&scope=all")
    assert browser.client.post("/events/act", data={"do": "purge", "scope": "all"}).status_code == 400
    assert len(statuses(outbox)) == 5


def test_a_link_changes_nothing(browser, outbox, rows):
    assert browser.get("/events/act?do=purge&scope=all").status_code == 405
    assert len(statuses(outbox)) == 5


def test_a_read_only_console_offers_and_does_nothing(open_console, outbox, rows):
    browser = open_console(read_only=True, secret="a-secret-of-the-tests")
    browser.get("/login")
    browser.post("/login", secret="a-secret-of-the-tests")
    browser.get("/events")
    assert "read-only" in browser.text
    assert "Purge" not in browser.text
    assert browser.get("/events/confirm?do=purge&scope=all").status_code == 403
    browser.get("/")
    assert browser.post("/events/act", do="purge", scope="all").status_code == 403
    assert "this console is read-only" in browser.text
    assert len(statuses(outbox)) == 5
