"""The page of destinations: what happens at each, and the holds."""

from __future__ import annotations

from typing import NamedTuple

from flask import Blueprint, flash, redirect, render_template, request, url_for
from werkzeug.wrappers import Response

from outbox.destinations import stored
from outbox.failures import ConfigurationError
from outbox.holds import LONGEST_WHY, Hold
from outbox.records import Pause
from outbox.stats import DestinationStats
from outbox.web.console import console
from outbox.web.looks import Look
from outbox.web.overview import destination_in_words
from outbox.words import AGES, age_ms

pages = Blueprint("destinations", __name__)

_MOST_SHOWN = 50


class Destination(NamedTuple):
    """One destination, as the page shows it."""

    name: str
    stats: DestinationStats | None
    """None if it has no events."""
    hold: Hold | None
    pause: Pause | None
    now: str
    last_accepted_ms: int | None


@pages.get("/destinations")
def show() -> str:
    """Show the destinations with the most undelivered events."""
    look = console().looks.look()
    names = {*look.stats.by_destination, *(hold.destination for hold in look.stats.holds)}
    found = sorted(names, key=lambda name: (-_undelivered(look, name), name))
    return render_template(
        "destinations.html",
        destinations=[_destination(look, name) for name in found[:_MOST_SHOWN]],
        left_out=len(found[_MOST_SHOWN:]),
        longest_why=LONGEST_WHY,
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
        return _back(f"{name} is no longer on hold. Running workers go on within 20 seconds.", "good")
    return _back(f"{name} was not on hold.", "")


def _back(words: str, kind: str) -> Response:
    console().looks.forget()
    flash(words, kind)
    return redirect(url_for("destinations.show"), 303)


def _length_ms(text: str) -> int | None:
    if not text.strip():
        return None
    length = age_ms(text.strip())
    if length is None:
        raise ConfigurationError(f"its length is {text!r}, expected {AGES.replace('an age', 'a time')}")
    return length


def _undelivered(look: Look, name: str) -> int:
    found = look.stats.by_destination.get(name)
    return 0 if found is None else found.undelivered


def _destination(look: Look, name: str) -> Destination:
    one = look.stats.by_destination.get(name)
    held = next((hold for hold in look.stats.holds if hold.destination == name), None)
    pause = next((pause for pause in look.stats.pauses if pause.destination == name), None)
    words = destination_in_words(one, pause, held, now_ms=look.now_ms)
    accepted_ms = console().outbox.store.views.last_accepted_ms(stored(name))
    return Destination(name, one, held, pause, words, accepted_ms)
