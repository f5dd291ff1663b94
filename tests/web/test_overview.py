from __future__ import annotations

from dataclasses import replace

import pytest

from builders import NOON_MS, add_row
from outbox.records import Pause
from outbox.web import looks, overview
from outbox.web.looks import Point


def test_an_empty_outbox_is_said_to_be_empty(browser):
    browser.get("/")
    assert "The outbox is empty" in browser.text
    assert "There are no events" in browser.text


def test_the_counts_lead_to_the_events(browser, outbox):
    add_row(outbox, status="parked", last_error="401 Unauthorized", destination="billing")
    add_row(outbox, status="sent", sent_at_ms=NOON_MS)
    browser.get("/")
    assert 'href="/events?status=parked&amp;destination=billing"' in browser.page
    assert 'href="/events?status=sent&amp;event_type=rule_fired"' in browser.page
    assert "the service rejected the token" in browser.text


def test_the_part_that_updates_is_the_same_as_on_the_page(browser, outbox, monkeypatch):
    monkeypatch.setattr(looks, "FRESH_S", 3_600)  # else, after a second, the page would look again and know rates
    add_row(outbox, status="sent", sent_at_ms=NOON_MS)
    browser.get("/live")
    part = browser.page
    browser.get("/")
    assert part.strip() in browser.page


def test_a_status_and_a_type_of_another_program_are_shown(browser, outbox):
    add_row(outbox, event_type="<b>")
    browser.get("/")
    assert "&lt;b&gt;" in browser.page
    assert "<b>" not in browser.page


def test_several_causes_are_a_list(browser, outbox):
    add_row(outbox, status="abandoned", last_error="permanent: 422 no")
    add_row(outbox, last_error="503 Down", waits_for="service", retry_count=1)
    browser.get("/")
    assert browser.page.count("<li>") >= 2
    assert ". Also: " not in browser.text


def test_hidden_payloads_take_the_bodies_of_answers_with_them(open_console, outbox):
    body = "the-card-4111"
    add_row(outbox, last_error=f"503 Down: {body}", waits_for="service", retry_count=1)
    add_row(outbox, status="parked", last_error=f"401 Unauthorized: {body}")
    browser = open_console(hide_payloads=True)
    browser.get("/")
    assert "503 Down: …" in browser.text
    assert "401 Unauthorized: …" in browser.text
    assert body not in browser.page
    shown = open_console()
    shown.get("/")
    assert body in shown.page


@pytest.mark.parametrize(
    ("changed", "kind", "words"),
    [
        ({}, "busy", "1 event is on the way"),
        ({"overdue_ms": 120_000}, "bad", "1 event is on the way; an event has been due for 2 minutes; is a worker or a timer running?"),
        ({"counts": {"pending": 0, "sending": 0, "sent": 3, "parked": 0, "abandoned": 0}}, "good", "Everything is delivered"),
        ({"likely_cause": "a. Also: b"}, "bad", "2 things need attention; a; b"),
        ({"likely_cause": "a"}, "bad", "1 thing needs attention; a"),
    ],
)  # fmt: skip
def test_what_is_going_on_is_said_in_words(outbox, changed, kind, words):
    add_row(outbox)
    found = overview.situation(replace(outbox.stats(), **{"overdue_ms": 0, **changed}))
    assert (found.kind, "; ".join([found.title, *found.causes])) == (kind, words)


def test_the_situation_of_a_destination_is_said_in_words(outbox):
    add_row(outbox)
    one = outbox.stats().by_destination["default"]
    pause = Pause("default", 1, NOON_MS + 5_000, 0, "503 Down")
    said = [
        overview.destination_in_words(replace(one, **changed), of, None, now_ms=NOON_MS)
        for changed, of in (
            ({}, pause),
            ({"next_due_at_ms": None}, None),
            ({"overdue_ms": 61_000}, None),
            ({"overdue_ms": 59_000}, None),
            ({"next_due_at_ms": NOON_MS + 61_000, "overdue_ms": 0}, None),
        )
    ]
    assert said[0].startswith(
        "nothing is sent until 2026-11-24 12:00:05 UTC (in 5 seconds): the service is failing"
    )
    assert said[1:] == [
        "nothing is waiting",
        "an event has been due for 1 minute",
        "an event is due now",
        "the next event is due in 1 minute",
    ]


def test_the_curve_fits_its_frame():
    points = [Point(at_s, depth, 0, 0) for at_s, depth in ((10, 0), (12, 4), (14, 2))]
    assert overview.curve(points) == "0.0,40.0 120.0,0.0 240.0,20.0"
    assert overview.curve(points[:1]) == ""
