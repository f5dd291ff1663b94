"""What the command line prints, as text or JSON. Stored text is escaped, so it can't control the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from outbox.clock import utc
from outbox.destinations import DEFAULT_NAME, shown
from outbox.holds import hold_in_words
from outbox.lifecycle import Status
from outbox.outcomes import WaitsFor
from outbox.stats import DestinationStats, Stats, counted, duration
from outbox.words import escape, facts_table, pause_in_words, when

if TYPE_CHECKING:
    from rich.progress import Progress
    from typing_extensions import Self

    from outbox.records import Pause
    from outbox.storage.tables import ObservationEvent

# Fewer events are read so fast that they need no progress bar.
_BAR_FROM_EVENTS = 20_000
_ERROR_WIDTH = 80
_MOST_DESTINATIONS = 50

_WAITS: dict[str, str] = {
    WaitsFor.SERVICE: "for the service, which probably failed",
    WaitsFor.DELAY: "because the service asked for a delay",
    WaitsFor.PROOF: "for proof, after being rejected alone",
    WaitsFor.ROW: "after failing alone while the service accepted others",
}


def say(text: str, *, err: bool = False) -> None:
    """Print lines; characters that the output's encoding lacks are escaped.

    If standard error can't be written, the lines are lost, and the command continues.
    """
    stream = sys.stderr if err else sys.stdout
    with suppress(OSError) if err else nullcontext():
        click.echo(encodable(text, stream.encoding or "utf-8"), err=err)


def encodable(text: str, encoding: str) -> str:
    """Return the text with the characters that the encoding lacks escaped."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def as_json(value: object, default: Callable[[object], object] | None = None) -> str:
    """Return JSON in ASCII, so its text can't control the terminal. `default` converts what JSON does not know."""
    return json.dumps(value, default=default or _plain).replace("\x7f", "\\u007f")


def table(rows: Sequence[Sequence[object]]) -> str:
    """Return rows as aligned text, with numbers aligned right. The first row is the heading."""
    texts = [[escape(str(cell)) for cell in row] for row in rows]
    numeric = [all(isinstance(row[column], int) for row in rows[1:]) for column in range(len(rows[0]))]
    widths = [max(len(row[column]) for row in texts) for column in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        for row in texts
    )
    return "\n".join(line.rstrip() for line in lines)


def status_as_dict(stats: Stats, database: str) -> dict[str, Any]:
    """Return what `outbox status --json` prints."""
    entries = {name: [entry._asdict() for entry in getattr(stats, name)] for name in ("deleted", "pauses")}
    return {"database": database, **asdict(stats), **entries}


def status_in_words(stats: Stats, database: str, *, now_ms: int) -> str:
    """Return what `outbox status` prints."""
    # The counts contain all known statuses, and then those that another program wrote.
    rows: list[list[object]] = [["", *stats.counts]]
    rows += [[kind, *(counts.get(status, 0) for status in stats.counts)] for kind, counts in stats.by_type.items()]
    rows.append(["all", *stats.counts.values()])
    facts = [("database", database)]
    if stats.oldest_pending_age_ms is not None:
        facts.append(("oldest", f"{duration(stats.oldest_pending_age_ms)} old (pending or sending)"))
    if stats.next_due_at_ms is not None:
        facts.append(("next due", when(stats.next_due_at_ms, now_ms=now_ms)))
    facts += [("on hold", hold_in_words(hold)) for hold in stats.holds]
    held = {hold.destination for hold in stats.holds}
    facts += [
        ("paused", _of(pause) + pause_in_words(pause, now_ms=now_ms))
        for pause in stats.pauses
        # A pause that is over says what the next flush sends. During a hold, it sends nothing.
        if pause.destination not in held or max(pause.paused_until_ms, pause.probe_until_ms) > now_ms
    ]
    facts += [("waiting", f"{_waiting(count)} {_WAITS[kind]}") for kind, count in stats.waits_for.items() if count]
    if stats.filling is not None:
        facts.append(("filling up", stats.filling))
    if stats.likely_cause is not None:
        facts.append(("likely cause", stats.likely_cause))
    full = ("cap", "max_undelivered")
    lost = sum(entry.events for entry in stats.deleted if entry.status != Status.SENT and entry.reason in full)
    if lost:
        facts.append(("lost", f"{counted(lost, 'undelivered event')} deleted because the queue was full"))
    text = f"{facts_table(facts)}\n\n{table(rows)}"
    if stats.by_destination.keys() - {DEFAULT_NAME}:
        text += f"\n\n{_destinations_in_words(stats.by_destination, now_ms=now_ms)}"
    if stats.deleted:
        text += f"\n\nevents deleted so far, {stats.left_undelivered} of them undelivered:\n"
        text += table([("status", "type", "reason", "events"), *stats.deleted])
    return text


def _destinations_in_words(by_destination: Mapping[str, DestinationStats], *, now_ms: int) -> str:
    """Return a line for each destination, those with the most undelivered events first, at most 50."""
    statuses = [status.value for status in Status]
    rows: list[list[object]] = [["destination", *statuses, "waits", "paused until"]]
    for name, one in sorted(by_destination.items(), key=lambda item: -item[1].undelivered)[:_MOST_DESTINATIONS]:
        until = "" if one.paused_until_ms is None else when(one.paused_until_ms, now_ms=now_ms)
        rows.append([name, *(one.counts[status] for status in statuses), one.waiting, until])
    others = len(by_destination) - _MOST_DESTINATIONS
    return table(rows) + (f"\nand {counted(others, 'destination')} more" if others > 0 else "")


def _of(pause: Pause) -> str:
    return "" if pause.destination == DEFAULT_NAME else f"{pause.destination}: "


def _waiting(count: int) -> str:
    return f"{counted(count, 'event')} {'waits' if count == 1 else 'wait'}"


def list_in_words(rows: Sequence[ObservationEvent]) -> str:
    """Return what `outbox list` prints."""
    destinations = [shown(row.destination) for row in rows]
    cells: list[list[object]] = [["id", "status", "type", "created", "failures", "last error"]]
    for row in rows:
        error = _cut(row.last_error or "")
        cells.append([row.id, row.status, row.event_type, utc(row.created_at_ms), row.retry_count, error])
    if {*destinations} != {DEFAULT_NAME}:
        for line, destination in zip(cells, ["destination", *destinations], strict=True):
            line.insert(3, destination)
    return table(cells)


class Bar:
    """A progress bar on a terminal. It is drawn, and Rich is loaded, once progress reaches `drawn_from`."""

    def __init__(self, what: str, *, total: int | None, drawn_from: int = 0) -> None:
        self._what = what
        self._total = total
        self._drawn_from = drawn_from
        self._done = 0
        self._is_terminal = sys.stderr.isatty()
        self._bar: Progress | None = None

    def advance(self, by: int) -> None:
        """Add to the progress."""
        self._done += by
        if self._is_terminal and self._done >= self._drawn_from:
            bar = self._bar = self._bar or self._start()
            bar.update(bar.task_ids[0], completed=self._done)

    def _start(self) -> Progress:
        from rich.console import Console  # noqa: PLC0415 - slow to load: only a drawn bar needs it
        from rich.progress import Progress  # noqa: PLC0415 - slow to load: only a drawn bar needs it

        bar = Progress(console=Console(stderr=True), transient=True)
        bar.add_task(self._what, total=self._total)
        bar.start()
        return bar

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def reading_bar() -> Bar:
    """Return a bar for a command that reads events, and can't know how many."""
    return Bar("Reading", total=None, drawn_from=_BAR_FROM_EVENTS)


def _cut(text: str) -> str:
    return text if len(text) <= _ERROR_WIDTH else f"{text[: _ERROR_WIDTH - 3]}..."


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} has no JSON")
