from __future__ import annotations

from builders import add_row


def test_the_filters_choose_the_events(browser, outbox):
    add_row(outbox, status="parked")
    add_row(outbox, status="sent", event_type="order_placed", sent_at_ms=1)
    browser.get("/events?status=parked")
    assert 'href="/events/1"' in browser.page
    assert 'href="/events/2"' not in browser.page


def test_an_event_shows_its_payload_and_nothing_in_it_is_run(browser, outbox):
    add_row(outbox, payload_json='{"text":"<script>alert(1)</script>"}')
    browser.get("/events/1")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in browser.page
    assert "<script>alert" not in browser.page


def test_a_payload_that_is_no_json_is_shown_as_it_is(browser, outbox):
    add_row(outbox, payload_json="{no json")
    browser.get("/events/1")
    assert "{no json" in browser.text


def test_a_hidden_payload_is_not_on_the_page(open_console, outbox):
    add_row(outbox, payload_json='{"card":"4111"}')
    browser = open_console(hide_payloads=True)
    browser.get("/events/1")
    assert "hides payloads" in browser.text
    assert "4111" not in browser.page


def test_an_event_that_is_not_there_is_a_page_too(browser):
    assert browser.get("/events/7").status_code == 404
    assert "there is no event 7" in browser.text
