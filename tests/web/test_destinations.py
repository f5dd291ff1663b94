from __future__ import annotations

import re

import pytest

from builders import NOON_MS, ScriptedClient, add_row, rule_fired
from outbox import HttpFailure
from outbox.clock import now_ms
from outbox.pauses import SharedPause
from outbox.web import destinations, overview


def pause(outbox, name, **fields):
    outbox.store.pauses.change(name, lambda _: SharedPause(**{"number": 1, "last_error": "503 Down", **fields}))


def test_each_destination_is_named_with_what_happens_there(browser, outbox):
    add_row(outbox, destination="billing")
    add_row(outbox, destination="")
    browser.get("/destinations")
    assert "billing" in browser.text
    assert "default" in browser.text
    assert "an event has been due for" in browser.text


def test_a_hold_is_told_on_both_pages(browser, outbox):
    add_row(outbox, destination="billing")
    outbox.hold("billing", why="a deploy\x1b")
    for page in ("/destinations", "/"):
        browser.get(page)
        assert r"a deploy\x1b; outbox resume billing ends the hold" in browser.text


def test_without_events_there_are_no_destinations(browser):
    browser.get("/destinations")
    assert "There are no events" in browser.text


def test_the_latest_answers_of_a_service_are_shown(browser, outbox):
    add_row(outbox, destination="billing", status="sent", sent_at_ms=NOON_MS)
    pause(outbox, "billing", until_ms=now_ms() + 60_000, failures=2)
    browser.get("/destinations")
    assert "paused" in browser.text
    assert 'datetime="2026-11-24T12:00:00.000+00:00"' in browser.page
    assert "Latest failure 503 Down" in browser.text


@pytest.mark.parametrize("hide_payloads", [False, True])
def test_the_failed_requests_are_shown_the_last_one_first(open_console, outbox, hide_payloads):
    outbox.enqueue_many([rule_fired(), rule_fired()], to="billing")
    for failure in (HttpFailure(502, "Bad Gateway"), HttpFailure(503, "Down", "4111")):
        outbox.flush(ScriptedClient(failure), destination="billing")
        outbox.retry_now()
    browser = open_console(hide_payloads=hide_payloads)
    browser.get("/destinations")
    shown = re.search(r"Latest failures(.*?)Put billing", browser.text)[1]
    body = "…" if hide_payloads else "4111"
    assert re.fullmatch(
        rf" \d+ \w+ ago 503 Down: {body} transient, 2 events, after \d+ ms, from \S+"
        r" \d+ \w+ ago 502 Bad Gateway transient, 2 events, after \d+ ms, from \S+ ",
        shown,
    ), shown


def test_an_operator_holds_a_destination_and_resumes_it(browser, outbox):
    add_row(outbox, destination="billing")
    browser.get("/destinations")
    browser.post("/destinations/hold", destination="billing", why="it moves", lasts=" 2h ")
    assert "billing is on hold. Batches that are being sent are finished." in browser.text
    (held,) = outbox.stats().holds
    assert (held.destination, held.why, held.until_ms - held.since_ms) == ("billing", "it moves", 7_200_000)
    assert "it moves" in browser.text
    browser.post("/destinations/resume", destination="billing")
    assert "billing is no longer on hold" in browser.text
    assert outbox.stats().holds == []
    browser.post("/destinations/resume", destination="billing")
    assert "billing was not on hold" in browser.text


def test_a_hold_without_a_length_lasts(browser, outbox):
    add_row(outbox)
    browser.get("/destinations")
    browser.post("/destinations/hold", destination="default", why="it moves", lasts="")
    assert outbox.stats().holds[0].until_ms is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"destination": "billing", "why": " "}, "billing is not on hold: why is &#39; &#39;, expected a text"),
        (
            {"destination": "billing", "why": "x", "lasts": "soon"},
            "the time is &#39;soon&#39;, expected a time such as 30s",
        ),
        ({"destination": "a b", "why": "x"}, "the destination is &#39;a b&#39;, expected a name"),
    ],
)
def test_a_hold_that_makes_no_sense_is_refused(browser, outbox, fields, words):
    add_row(outbox, destination="billing")
    browser.get("/destinations")
    browser.post("/destinations/hold", **fields)
    assert words in browser.page
    assert outbox.stats().holds == []


def test_a_destination_on_hold_is_there_without_events(browser, outbox):
    outbox.hold("billing", why="it moves")
    browser.get("/")
    assert "billing on hold" in browser.text
    browser.get("/destinations")
    assert "Resume billing" in browser.text


def test_of_many_destinations_those_with_the_most_undelivered_events_are_shown(browser, outbox, monkeypatch):
    monkeypatch.setattr(overview, "MOST_DESTINATIONS", 2)
    monkeypatch.setattr(destinations, "MOST_DESTINATIONS", 2)
    for name in ("c", "b", "a", "c"):
        add_row(outbox, destination=name)
    browser.get("/destinations")
    assert browser.page.index("Hold a") < browser.page.index("Hold c")
    assert "Hold b" not in browser.text
    assert "At most 2 destinations are shown" in browser.text


def test_a_read_only_console_holds_nothing(open_console, outbox):
    add_row(outbox, destination="billing")
    browser = open_console(read_only=True)
    browser.get("/destinations")
    assert "Hold" not in browser.text
    assert browser.client.post("/destinations/hold", data={"destination": "billing"}).status_code == 400
    assert outbox.stats().holds == []
