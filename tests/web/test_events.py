from __future__ import annotations

import re

import pytest

from builders import NOON_MS, add_row
from outbox.web import events


def ids(browser):
    return [int(found) for found in re.findall(r'href="/events/(\d+)"', browser.page)]


def test_the_newest_events_come_first_a_page_of_them(browser, outbox, monkeypatch):
    monkeypatch.setattr(events, "_PER_PAGE", 2)
    for _ in range(5):
        add_row(outbox)
    browser.get("/events")
    assert ids(browser) == [5, 4]
    browser.get(re.search(r'rel="next" href="([^"]+)"', browser.page).group(1).replace("&amp;", "&"))
    assert ids(browser) == [3, 2]
    browser.get(re.search(r'rel="next" href="([^"]+)"', browser.page).group(1).replace("&amp;", "&"))
    assert ids(browser) == [1]
    assert 'rel="next"' not in browser.page
    assert "First page" in browser.text


def test_the_oldest_can_come_first(browser, outbox, monkeypatch):
    monkeypatch.setattr(events, "_PER_PAGE", 2)
    for status in ("pending", "parked", "pending", "pending"):
        add_row(outbox, status=status)
    browser.get("/events?order=oldest&status=pending")
    assert ids(browser) == [1, 3]
    browser.get(re.search(r'rel="next" href="([^"]+)"', browser.page).group(1).replace("&amp;", "&"))
    assert ids(browser) == [4]


def test_the_conditions_choose_the_events_and_stay_in_the_form(browser, outbox):
    add_row(outbox, status="parked", destination="billing", last_error="401 Unauthorized")
    add_row(outbox, status="sent", event_type="order_placed", sent_at_ms=1)
    browser.get("/events?status=parked&failure=Unauthorized&destination=billing")
    assert ids(browser) == [1]
    assert 'value="parked" checked' in browser.page
    assert 'name="failure" value="Unauthorized"' in browser.page
    browser.get("/events?status=parked&status=sent")
    assert ids(browser) == [2, 1]


def test_a_text_is_looked_for_in_so_many_events_and_then_further(browser, outbox, monkeypatch):
    monkeypatch.setattr(events, "_MOST_READ", 2)
    for number in range(4):
        add_row(outbox, payload_json=f'{{"order":{number}}}')
    browser.get('/events?payload="order":0')
    assert "No event matches so far" in browser.text
    assert "2 events searched for the text" in browser.text
    browser.get(re.search(r'rel="next" href="([^"]+)"', browser.page).group(1).replace("&amp;", "&"))
    assert ids(browser) == [1]


def test_a_condition_that_makes_no_sense_is_shown_with_the_form(browser, outbox):
    add_row(outbox)
    assert browser.get("/events?older_than=soon&status=pending").status_code == 400
    assert "older_than is &#39;soon&#39;, expected an age" in browser.page
    assert 'name="older_than" value="soon"' in browser.page
    assert ids(browser) == []


def test_a_page_that_begins_nowhere_is_shown_with_the_form(browser):
    assert browser.get("/events?from=x").status_code == 400


def test_nothing_found_is_said(browser, outbox):
    browser.get("/events")
    assert "There are no events" in browser.text
    browser.get("/events?status=sent")
    assert "No event matches" in browser.text


def test_the_list_says_what_comes_next(browser, outbox):
    add_row(outbox, status="sent", sent_at_ms=NOON_MS)
    add_row(outbox)
    add_row(outbox, next_attempt_at_ms=2**52)
    add_row(outbox, status="abandoned", last_error="permanent: 422 no " + "x" * 300)
    browser.get("/events")
    cells = re.findall(r'data-label="Next">(.*?)</td>', browser.page, re.DOTALL)
    words = [" ".join(re.sub("<[^>]+>", " ", cell).split()) for cell in cells]
    assert words[0] == "\u2013"
    assert words[1].startswith("4503599627370496") or words[1].startswith("in ")
    assert words[2] == "due"
    assert re.fullmatch(r"delivered \d+ \w+ ago|delivered in \d+ \w+", words[3])
    assert "x…" in browser.text


HOSTILE = "<script>alert(1)</script>"


def test_nothing_in_an_event_is_run(browser, outbox):
    add_row(
        outbox,
        payload_json=f'{{"text":"{HOSTILE}"}}',
        event_type=HOSTILE,
        last_error=HOSTILE,
        session_id=HOSTILE,
        file_path=HOSTILE,
        event_id="e",
        status="parked",
    )
    for page in ("/", "/events", "/events/1", f"/events?event_type={HOSTILE}&failure={HOSTILE}",
                 f"/events/confirm?do=purge&scope=all&event_type={HOSTILE}"):  # fmt: skip
        browser.get(page)
        assert "<script>alert" not in browser.page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in browser.page


def test_the_payload_is_pretty_printed(browser, outbox):
    add_row(outbox, payload_json='{"order":{"id":17}}')
    browser.get("/events/1")
    assert "{\n  &#34;order&#34;: {\n    &#34;id&#34;: 17\n  }\n}" in browser.page


def test_a_payload_that_is_no_json_is_shown_as_it_is(browser, outbox):
    add_row(outbox, payload_json="{no json")
    browser.get("/events/1")
    assert "{no json" in browser.text


# Not a part of any hexadecimal number: the ids on the pages are random.
CARD = "card-4111"


@pytest.mark.parametrize("page", ["/", "/events", "/events/1"])
def test_hidden_payloads_are_on_no_page(open_console, outbox, page):
    add_row(
        outbox,
        payload_json=f'{{"number":"{CARD}"}}',
        status="parked",
        last_error=f"401 Unauthorized: {CARD}",
        session_id=f"session-{CARD}",
        file_path=f"/{CARD}",
        rule_ids_json=f'["{CARD}"]',
    )
    browser = open_console(hide_payloads=True)
    browser.get(page)
    assert CARD not in browser.page
    assert "401 Unauthorized: …" in browser.text
    assert "Payload contains" not in browser.text


@pytest.mark.parametrize(
    ("status", "names"),
    [
        ("pending", ["Retry", "Abandon", "Purge"]),
        ("sending", ["Purge"]),
        ("sent", ["Purge"]),
        ("parked", ["Retry", "Abandon", "Purge"]),
        ("abandoned", ["Requeue", "Purge"]),
    ],
)
def test_an_event_offers_only_what_can_be_done_with_it(browser, outbox, status, names):
    add_row(outbox, status=status)
    browser.get("/events/1")
    assert re.findall(r'name="do" value="\w+"[^>]*>(\w+)', browser.page) == names


def test_an_event_that_is_not_there_is_a_page_too(browser):
    assert browser.get("/events/7").status_code == 404
    assert "there is no event 7" in browser.text


def test_a_row_with_blobs_instead_of_texts_is_shown_on_every_page(browser, outbox):
    row_id = add_row(outbox)
    blobs = "event_type = X'6fff', payload_json = X'7bff', last_error = X'00', session_id = X'ff'"
    with outbox.engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE observation_events SET {blobs}")
    for page in ("/", "/events", "/events?payload=x", f"/events/{row_id}"):
        assert browser.get(page).status_code == 200
    assert "o\\xff" in browser.text
    assert "{\\xff" in browser.text
