"""The page of destinations."""

from __future__ import annotations

from flask import Blueprint, render_template

from outbox.web.console import console
from outbox.web.overview import destination_rows

pages = Blueprint("destinations", __name__)


@pages.get("/destinations")
def show() -> str:
    """Show what happens at each destination."""
    return render_template("destinations.html", rows=destination_rows(console().looks.look()))
