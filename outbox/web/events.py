"""The pages of events: those that match, and one of them."""

from __future__ import annotations

import json

from flask import Blueprint, abort, render_template, request

from outbox.destinations import DEFAULT_NAME
from outbox.lifecycle import Status
from outbox.web.console import console

pages = Blueprint("events", __name__)

_PER_PAGE = 50


@pages.get("/events")
def listing() -> str:
    """Show the events that match."""
    settings = console()
    given = {name: request.args.get(name) or None for name in ("status", "event_type", "destination")}
    rows = settings.outbox.find(**given, limit=_PER_PAGE)  # type: ignore[arg-type] # each is a text
    return render_template(
        "events.html",
        rows=rows,
        given=given,
        statuses=[status.value for status in Status],
        default=DEFAULT_NAME,
        now_ms=settings.outbox.store.now_ms(),
    )


@pages.get("/events/<int:row_id>")
def one(row_id: int) -> str:
    """Show one event."""
    settings = console()
    row = settings.outbox.get(row_id)
    if row is None:
        abort(404, f"there is no event {row_id}: it was never enqueued here, or it was deleted")
    payload = None if settings.hide_payloads else pretty(row.payload_json)
    return render_template("event.html", row=row, payload=payload, now_ms=settings.outbox.store.now_ms())


def pretty(payload_json: str) -> str:
    """Return a payload over several lines; as it is if it is no JSON."""
    try:
        return json.dumps(json.loads(payload_json), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return payload_json
