"""The page of destinations."""

from __future__ import annotations

from flask import Blueprint, render_template

from outbox.web.console import console
from outbox.web.overview import destination_in_words

pages = Blueprint("destinations", __name__)


@pages.get("/destinations")
def show() -> str:
    """Show what happens at each destination."""
    look = console().looks.look()
    pauses = {pause.destination: pause for pause in look.stats.pauses}
    rows = [
        (name, one, destination_in_words(one, pauses.get(name), now_ms=look.now_ms))
        for name, one in look.stats.by_destination.items()
    ]
    return render_template("destinations.html", rows=rows)
