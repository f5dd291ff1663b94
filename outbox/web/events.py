"""The pages of events: those that match, and one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Blueprint, abort, render_template, request

from outbox.failures import ConfigurationError
from outbox.life import OF_PAYLOAD, event_facts, look_around, past, pretty
from outbox.lifecycle import Status
from outbox.reasons import without_body
from outbox.web import filters
from outbox.web.actions import ACTIONS, actions_for, listing_url
from outbox.web.console import console
from outbox.web.filters import Filters

if TYPE_CHECKING:
    from outbox.storage.finding import Found
    from outbox.storage.tables import ObservationEvent

pages = Blueprint("events", __name__)

_PER_PAGE = 50
_MOST_READ = 10_000
"""How many events one page reads to search for text, which takes tens of milliseconds."""
_ERROR_WIDTH = 160
_SHOWN_APART = frozenset({"event", "status", "next"})


@pages.get("/events")
def listing() -> tuple[str, int]:
    """Show one page of the events that match."""
    settings = console()
    now_ms = settings.outbox.store.now_ms()
    problem = None
    try:
        found = filters.read(request.args, now_ms=now_ms, hide_payloads=settings.hide_payloads)
        events = _page(found)
    except ConfigurationError as error:
        found, events, problem = filters.unread(request.args), None, str(error)
    stats = settings.looks.latest()  # only to suggest names
    page = render_template(
        "events.html",
        actions=ACTIONS.values(),
        destinations=sorted(stats.by_destination) if stats else [],
        events=events,
        filters=found,
        is_oldest_first=_is_oldest_first(),
        now_ms=now_ms,
        problem=problem,
        statuses=[status.value for status in Status],
        types=sorted(stats.by_type) if stats else [],
        error_of=_error_of,
        page_url=lambda start: _page_url(found, start),
    )
    return page, 200 if problem is None else 400


@pages.get("/events/<int:row_id>")
def one(row_id: int) -> str:
    """Show one event."""
    settings = console()
    row = settings.outbox.get(row_id)
    if row is None:
        abort(404, f"there is no event {row_id}: it was never enqueued here, or it was deleted")
    around = look_around(settings.outbox.store, settings.outbox.policy, row)
    if settings.hide_payloads:
        around = around._replace(
            pauses=[pause._replace(last_error=without_body(pause.last_error)) for pause in around.pauses],
            tries=[one._replace(failure=without_body(one.failure)) for one in around.tries],
        )
        row.last_error = row.last_error and without_body(row.last_error)
    facts = dict(event_facts(row, around))
    return render_template(
        "event.html",
        actions=actions_for(row.status),
        row=row,
        what_next=facts["next"],
        past=past(row, around.tries),
        facts=[
            (name, text)
            for name, text in facts.items()
            if name not in _SHOWN_APART and not (settings.hide_payloads and name in OF_PAYLOAD)
        ],
        payload=None if settings.hide_payloads else pretty(row.payload_json),
    )


def _page(found: Filters) -> Found:
    position = request.args.get("from")
    start = None if not position else filters.row_id(position)
    is_oldest_first = _is_oldest_first()
    return console().outbox.find(
        found.where,
        limit=_PER_PAGE,
        newest_first=not is_oldest_first,
        before=None if is_oldest_first else start,
        after=start if is_oldest_first else None,
        scan_limit=_MOST_READ,
    )


def _page_url(found: Filters, start: int | None) -> str:
    """Return the URL of the page that begins after an event, or of the first one."""
    fields = [*found.as_given()]
    if _is_oldest_first():
        fields.append(("order", "oldest"))
    if start is not None:
        fields.append(("from", str(start)))
    return listing_url(fields)


def _is_oldest_first() -> bool:
    return request.args.get("order") == "oldest"


def _error_of(row: ObservationEvent) -> str:
    """Return the last failure of an event, in one short line."""
    error = row.last_error or ""
    if error and console().hide_payloads:
        error = without_body(error)
    return error if len(error) <= _ERROR_WIDTH else f"{error[:_ERROR_WIDTH]}…"
