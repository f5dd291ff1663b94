"""How the templates write numbers, times and stored text."""

from __future__ import annotations

from flask import Flask
from markupsafe import Markup

from outbox.clock import LATEST_MS, utc
from outbox.destinations import shown
from outbox.stats import counted, duration
from outbox.storage.engines import shown_url
from outbox.web.console import console
from outbox.words import distance, escape, exact


def add_to(app: Flask) -> None:
    """Add the filters to the templates, and what every page needs."""
    app.jinja_env.filters.update(
        counted=counted_with_commas,
        destination=shown,
        duration=duration,
        number=number,
        per_s=per_s,
        printable=escape,
        sentence=sentence,
        time=time,
        with_code=with_code,
    )
    app.context_processor(_shared)


def number(count: int) -> str:
    """Return "1,234"."""
    return f"{count:,}"


def counted_with_commas(count: int, noun: str) -> str:
    """Return "1 event" or "1,234 events"."""
    return counted(count, noun).replace(str(count), number(count), 1)


def per_s(rate: float | None) -> str:
    """Return "12 a second", or "30.0 a minute" for less than one a second."""
    if rate is None:
        return "not known yet"
    if 0 < rate < 1:
        return f"{rate * 60:.1f} a minute"
    return f"{rate:,.0f} a second"


def time(ms: int, now_ms: int) -> Markup:
    """Return a time as its distance from now; the exact time is in the title."""
    # SQLite stores any value in any column.
    if not isinstance(ms, int) or not 0 <= ms <= LATEST_MS:
        return Markup("<span>{}</span>").format(utc(ms))
    title, text = utc(ms), distance(ms, now_ms=now_ms)
    return Markup('<time datetime="{}" title="{}">{}</time>').format(exact(ms), title, text)


def sentence(text: str) -> str:
    """Return the text with a capital first letter and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def with_code(text: str) -> Markup:
    """Return the text, with the parts between backticks as code."""
    parts = escape(text).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else part for place, part in enumerate(parts)
    )


def _shared() -> dict[str, object]:
    settings = console()
    return {
        "console": settings,
        "database": shown_url(settings.outbox.engine),
    }
