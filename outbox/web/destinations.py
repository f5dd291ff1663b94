"""The page of destinations: what happens at each, and the holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from flask import Blueprint, flash, redirect, render_template, request, url_for
from werkzeug.wrappers import Response

from outbox.destinations import stored
from outbox.failures import ConfigurationError
from outbox.holds import LONGEST_WHY
from outbox.reasons import without_body
from outbox.tries import Try
from outbox.web.console import console
from outbox.web.overview import MOST_DESTINATIONS, destination_rows
from outbox.words import DURATIONS, age_ms

pages = Blueprint("destinations", __name__)

_FAILURES_SHOWN = 3


@pages.get("/destinations")
def show() -> str:
    """Show what happens at each destination."""
    settings = console()
    look = settings.looks.look()
    latest = settings.outbox.store.tries.latest()
    destinations = [
        (
            row,
            settings.outbox.store.views.last_accepted_ms(stored(row.name)),
            _failures(latest.get(stored(row.name), ())),
        )
        for row in destination_rows(look)
    ]
    return render_template(
        "destinations.html",
        destinations=destinations,
        longest_why=LONGEST_WHY,
        most=MOST_DESTINATIONS,
        now_ms=look.now_ms,
    )


@pages.post("/destinations/hold")
def hold() -> Response:
    """Put a destination on hold."""
    name = request.form.get("destination", "")
    try:
        console().outbox.hold(
            name, why=request.form.get("why", ""), for_ms=_length_ms(request.form.get("lasts", ""))
        )
    except ConfigurationError as error:
        return _back(f"{name} is not on hold: {error}", "bad")
    return _back(f"{name} is on hold. Batches that are being sent are finished.", "good")


@pages.post("/destinations/resume")
def resume() -> Response:
    """End the hold of a destination."""
    name = request.form.get("destination", "")
    if console().outbox.resume(name):
        return _back(f"{name} is no longer on hold. Running workers continue within 20 seconds.", "good")
    return _back(f"{name} was not on hold.", "")


def _failures(tries: Sequence[Try]) -> list[tuple[Try, int]]:
    """Return the last failed requests, each with the number of its events that still exist."""
    requests = Counter(tries)
    cut = without_body if console().hide_payloads else str
    return [
        (one._replace(failure=cut(one.failure)), events) for one, events in [*requests.items()][:_FAILURES_SHOWN]
    ]


def _back(words: str, kind: str) -> Response:
    console().looks.forget()
    flash(words, kind)
    return redirect(url_for("destinations.show"), 303)


def _length_ms(text: str) -> int | None:
    if not text.strip():
        return None
    length = age_ms(text.strip())
    if length is None:
        raise ConfigurationError(f"the time is {text!r}, expected {DURATIONS}")
    return length
