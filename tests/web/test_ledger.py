from __future__ import annotations

from builders import add_row


def test_the_ledger_says_what_was_deleted_and_why(browser, outbox):
    add_row(outbox, status="sent", sent_at_ms=1)
    add_row(outbox, status="abandoned")
    outbox.purge(older_than=2**53)
    browser.get("/ledger")
    assert "2 events deleted from this database so far, 1 of them undelivered" in browser.text
    assert "they were purged" in browser.text


def test_without_deletions_the_ledger_says_so(browser):
    browser.get("/ledger")
    assert "No event has been deleted" in browser.text
