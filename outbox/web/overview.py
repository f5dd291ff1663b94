"""The first page: what is queued, what is stuck, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from flask import Blueprint, render_template

from outbox.holds import Hold, hold_in_words
from outbox.lifecycle import Status
from outbox.records import Pause
from outbox.stats import CAUSES_JOIN, DestinationStats, Stats, counted, duration
from outbox.web.console import console
from outbox.web.looks import Look, Point
from outbox.words import pause_in_words

pages = Blueprint("overview", __name__)

MOST_DESTINATIONS = 50

_WIDTH, _HEIGHT = 240, 40
_LONG_OVERDUE_MS = 60_000


class Situation(NamedTuple):
    """What is going on, in words."""

    kind: str
    """`good`, `busy` or `bad`."""
    title: str
    causes: Sequence[str]


@pages.get("/")
def show() -> str:
    """Show the page."""
    return render_template("overview.html", **_shown(console().looks.look()))


@pages.get("/live")
def live() -> str:
    """Return the part of the page that changes."""
    return render_template("overview_live.html", **_shown(console().looks.look()))


def _shown(look: Look) -> dict[str, Any]:
    stats = look.stats
    return {
        "look": look,
        "stats": stats,
        "now_ms": look.now_ms,
        "situation": situation(stats),
        "curve": curve(look.points),
        "rows": destination_rows(look),
        "statuses": [status.value for status in Status],
    }


def situation(stats: Stats) -> Situation:
    """Say whether somebody has to act, and on what."""
    if stats.likely_cause is not None:
        causes = stats.likely_cause.split(CAUSES_JOIN)
        title = f"{counted(len(causes), 'thing')} {'needs' if len(causes) == 1 else 'need'} attention"
        return Situation("bad", title, causes)
    waiting = stats.counts[Status.PENDING] + stats.counts[Status.SENDING]
    if waiting:
        title = f"{counted(waiting, 'event')} {'is' if waiting == 1 else 'are'} on the way"
        if stats.overdue_ms < _LONG_OVERDUE_MS:
            return Situation("busy", title, ())
        late = f"an event has been due for {duration(stats.overdue_ms)}; is a worker or a timer running?"
        return Situation("bad", title, [late])
    if not sum(stats.counts.values()):
        return Situation("good", "The outbox is empty", ())
    return Situation("good", "Everything is delivered", ())


class Row(NamedTuple):
    """A destination: how many events it has, and what happens there."""

    name: str
    stats: DestinationStats | None
    """None if it has no events."""
    hold: Hold | None
    pause: Pause | None
    words: str

    @property
    def undelivered(self) -> int:
        """Number of events that are not sent."""
        return 0 if self.stats is None else self.stats.undelivered

    def count(self, status: str) -> int:
        """Return the number of events with a status."""
        return 0 if self.stats is None else self.stats.counts.get(status, 0)


def destination_rows(look: Look) -> list[Row]:
    """Return the destinations by name: if there are more than 50, those with the most undelivered events."""
    stats = look.stats
    pauses = {pause.destination: pause for pause in stats.pauses}
    holds = {hold.destination: hold for hold in stats.holds}
    rows = []
    for name in {*stats.by_destination, *holds, *pauses}:
        one, pause, hold = stats.by_destination.get(name), pauses.get(name), holds.get(name)
        rows.append(Row(name, one, hold, pause, destination_in_words(one, pause, hold, now_ms=look.now_ms)))
    most = sorted(rows, key=lambda row: (-row.undelivered, row.name))[:MOST_DESTINATIONS]
    return sorted(most, key=lambda row: row.name)


def destination_in_words(
    one: DestinationStats | None, pause: Pause | None, hold: Hold | None, *, now_ms: int
) -> str:
    """Say what happens at a destination now. None stands for one without events."""
    if hold is not None:
        return hold_in_words(hold)
    if pause is not None:
        return pause_in_words(pause, now_ms=now_ms)
    if one is None or one.next_due_at_ms is None:
        return "nothing is waiting"
    if 0 < one.overdue_ms < _LONG_OVERDUE_MS:
        return "an event is due now"
    if one.overdue_ms:
        return f"an event has been due for {duration(one.overdue_ms)}"
    return f"the next event is due in {duration(one.next_due_at_ms - now_ms)}"


def curve(points: Sequence[Point]) -> str:
    """Return the depth over time as the points of an SVG polyline; an empty text for fewer than two points."""
    if len(points) < 2:  # noqa: PLR2004 - a line has two ends
        return ""
    first, last = points[0].at_s, points[-1].at_s
    highest = max(point.depth for point in points) or 1
    return " ".join(
        f"{(point.at_s - first) / (last - first) * _WIDTH:.1f},{_HEIGHT - point.depth / highest * _HEIGHT:.1f}"
        for point in points
    )
