"""How the command line shows what is stored: in words and tables, with nothing that steers a terminal."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from outbox import capture
from outbox.events import content_hash, decode
from outbox.failures import InvalidEvent
from outbox.lifecycle import Status
from outbox.statements import Pause
from outbox.stats import Stats, duration, failure_in_words

if TYPE_CHECKING:
    from rich.progress import Progress
    from typing_extensions import Self

    from outbox.models import ObservationEvent

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_ERROR_WIDTH = 80


def escape(text: str) -> str:
    """Return one line without control, format and other characters that do not print: those as in Python."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def say(text: str, *, err: bool = False) -> None:
    """Print lines; what the output's encoding does not have is escaped."""
    click.echo(encodable(text, (sys.stderr if err else sys.stdout).encoding or "utf-8"), err=err)


def encodable(text: str, encoding: str) -> str:
    """Return the text with what the encoding does not have escaped."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


class _Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            say(f"outbox: {escape(line)}", err=True)


def shown_log() -> AbstractContextManager[None]:
    """Print the log of this package on standard error."""
    return _logging_to(_Log())


def hidden_log() -> AbstractContextManager[None]:
    """Keep the log of this package from standard error, where Python prints warnings that nobody handles."""
    return _logging_to(logging.NullHandler())


@contextmanager
def _logging_to(handler: logging.Handler) -> Iterator[None]:
    log = logging.getLogger("outbox")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def as_json(value: object) -> str:
    """Return JSON in ASCII, so that no terminal takes any of it for a command."""
    return json.dumps(value, default=_plain).replace("\x7f", "\\u007f")


def when(ms: int, *, now_ms: int) -> str:
    """Return "2026-11-24 12:00:00 UTC (3 minutes ago)"."""
    distance = f"in {duration(ms - now_ms)}" if ms > now_ms else f"{duration(now_ms - ms)} ago"
    return f"{utc(ms)} ({distance})"


def utc(ms: int) -> str:
    """Return "2026-11-24 12:00:00 UTC"; a stored number that is no date stays a number."""
    try:
        return f"{_EPOCH + timedelta(milliseconds=ms):%Y-%m-%d %H:%M:%S} UTC"
    except OverflowError:
        return f"{ms} ms since 1970"


def table(rows: Sequence[Sequence[object]]) -> str:
    """Return rows as aligned text, numbers to the right; the first row is the heading."""
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
    states = [status.value for status in Status]
    # A file that another program also writes may hold a state that this one does not know.
    states += [state for state in stats.counts if state not in states]
    rows: list[list[object]] = [["", *states]]
    rows += [[kind, *(counts.get(state, 0) for state in states)] for kind, counts in stats.by_type.items()]
    rows.append(["all", *(stats.counts[state] for state in states)])
    facts = [("database", database)]
    if stats.oldest_pending_age_ms is not None:
        facts.append(("oldest", f"{duration(stats.oldest_pending_age_ms)} old, of what is pending or being sent"))
    if stats.next_due_at_ms is not None:
        facts.append(("next due", when(stats.next_due_at_ms, now_ms=now_ms)))
    facts += [("paused", _pause_in_words(pause, now_ms=now_ms)) for pause in stats.pauses]
    if stats.likely_cause is not None:
        facts.append(("likely cause", stats.likely_cause))
    text = f"{_facts(facts)}\n\n{table(rows)}"
    if stats.deleted:
        text += f"\n\ndeleted so far, {stats.left_undelivered} of them undelivered:\n"
        text += table([("state", "type", "reason", "events"), *stats.deleted])
    return text


def _pause_in_words(pause: Pause, *, now_ms: int) -> str:
    why = f"{pause.destination}: {failure_in_words(pause.last_error)}"
    if pause.paused_until_ms > now_ms:
        return f"{why}; nothing is sent for {duration(pause.paused_until_ms - now_ms)}, `outbox retry` ends that"
    return f"{why}; one flusher {'tries' if pause.probe_until_ms > now_ms else 'is to try'} it with a small batch"


def list_in_words(rows: Sequence[ObservationEvent]) -> str:
    """Return what `outbox list` prints."""
    cells: list[list[object]] = [["id", "state", "type", "created", "failures", "last error"]]
    for row in rows:
        error = _cut(row.last_error or "")
        cells.append([row.id, row.status, row.event_type, utc(row.created_at_ms), row.retry_count, error])
    return table(cells)


def event_in_words(row: ObservationEvent, *, now_ms: int, max_age_ms: int) -> str:
    """Return what `outbox show` prints."""
    facts = [
        ("event", str(row.id)),
        ("type", row.event_type),
        ("state", row.status),
        ("next", what_next(row, now_ms=now_ms, max_age_ms=max_age_ms)),
        ("created", when(row.created_at_ms, now_ms=now_ms)),
        ("occurred", when(row.occurred_at_ms, now_ms=now_ms)),
    ]
    if row.revived_at_ms is not None:
        facts.append(("revived", when(row.revived_at_ms, now_ms=now_ms)))
    if row.sent_at_ms is not None:
        facts.append(("sent", when(row.sent_at_ms, now_ms=now_ms)))
    facts.append(("failures", str(row.retry_count)))
    if row.last_error is not None:
        facts.append(("last error", failure_in_words(row.last_error)))
    facts += [
        ("rules", row.rule_ids_json),
        ("session", row.session_id),
        ("file", row.file_path or ""),
        ("content hash", _content_hash(row.payload_json)),
    ]
    return f"{_facts(facts)}\n\n{_pretty(row.payload_json)}"


def event_as_dict(row: ObservationEvent) -> dict[str, Any]:
    """Return the columns of one event by name."""
    return {column.name: getattr(row, column.name) for column in row.__table__.columns}


def what_next(row: ObservationEvent, *, now_ms: int, max_age_ms: int) -> str:
    """Say what will happen to an event, and what would change that."""
    due_ms = row.next_attempt_at_ms
    if row.status == Status.SENT:
        text = "nothing, it is delivered; it is deleted when the outbox is full"
    elif row.status == Status.ABANDONED:
        text = "nothing, it is given up; `outbox requeue --older-than 0s` brings back all that are"
    elif row.status == Status.PARKED:
        text = "it waits for a token that is accepted: `outbox retry` after logging in, or the next success"
    elif row.status not in (Status.PENDING, Status.SENDING):
        text = "nothing, this program does not know its state"
    elif problem := _undecodable(row.payload_json):
        text = f"the next flush abandons it, its payload can't be read: {problem}"
    elif row.status == Status.SENDING and due_ms > now_ms:
        text = (
            f"a flusher is sending it; should that one have died, it is due again at {when(due_ms, now_ms=now_ms)}"
        )
    else:
        due = f"waits until {when(due_ms, now_ms=now_ms)}" if due_ms > now_ms else f"is due since {utc(due_ms)}"
        last_ms = max(row.created_at_ms, row.revived_at_ms or 0) + max_age_ms
        text = f"it {due}, then the next flush sends it; from {utc(last_ms)} on a failure abandons it"
        if capture.is_off():
            text += f". But {capture.PAUSED}"
    return text


class Bar:
    """A progress bar on a terminal; Rich is loaded when it is first drawn, at `drawn_from`."""

    def __init__(self, what: str, *, total: int | None, drawn_from: int = 0) -> None:
        self._what = what
        self._total = total
        self._drawn_from = drawn_from
        self._done = 0
        self._is_terminal = sys.stderr.isatty()
        self._bar: Progress | None = None

    def advance(self, by: int) -> None:
        """Record progress."""
        self._done += by
        if self._is_terminal and self._done >= self._drawn_from:
            bar = self._bar = self._bar or self._start()
            bar.update(bar.task_ids[0], completed=self._done)

    def _start(self) -> Progress:
        from rich.console import Console  # noqa: PLC0415 - only a drawn bar pays for loading it
        from rich.progress import Progress  # noqa: PLC0415 - as above

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


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<14}{escape(text)}".rstrip() for name, text in facts)


def _cut(text: str) -> str:
    return text if len(text) <= _ERROR_WIDTH else f"{text[: _ERROR_WIDTH - 3]}..."


def _pretty(payload_json: str) -> str:
    try:
        lines = json.dumps(json.loads(payload_json), indent=2, ensure_ascii=False).split("\n")
    except (ValueError, RecursionError):
        lines = [payload_json]
    return "\n".join(map(escape, lines))


def _content_hash(payload_json: str) -> str:
    try:
        return content_hash(payload_json)
    except UnicodeEncodeError:
        return ""


def _undecodable(payload_json: str) -> str | None:
    try:
        decode(payload_json)
    except InvalidEvent as error:
        return str(error)
    return None


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} has no JSON")
