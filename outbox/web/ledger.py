"""The page of the ledger: which events were deleted, and why."""

from __future__ import annotations

from flask import Blueprint, render_template

from outbox.lifecycle import Status
from outbox.web.console import console

pages = Blueprint("ledger", __name__)

_REASONS = {
    "cap": "to make room: there were more events than max_rows allows",
    "max_undelivered": "to make room: there were more undelivered events than max_undelivered allows",
    "max_sent": "there were more delivered events than max_sent allows",
    "retention": "they were delivered longer ago than keep_sent_ms allows",
    "purge": "they were purged",
    "replaced": "they were replaced by edited events",
}


@pages.get("/ledger")
def show() -> str:
    """Show the page."""
    look = console().looks.look()
    return render_template(
        "ledger.html",
        stats=look.stats,
        reasons=_REASONS,
        sent=Status.SENT.value,
        total=sum(entry.events for entry in look.stats.deleted),
    )
