from __future__ import annotations

from builders import add_row


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
