"""The command enqueue: it records events, or puts edited ones in the place of recorded ones."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
import msgspec

from outbox import capture
from outbox.cli.bounds import bounds_options
from outbox.cli.config import check_known
from outbox.cli.display import Bar, as_json, say
from outbox.cli.endings import FAILED, MISUSE, fail
from outbox.cli.options import config_of, json_option, uses_database
from outbox.events import MAX_PAYLOAD_BYTES, encode
from outbox.failures import InvalidEvent
from outbox.filters import is_row_id
from outbox.outbox import Outbox
from outbox.policy import Policy
from outbox.stats import counted
from outbox.words import escape

Line = TypeVar("Line")

_ERRORS_SHOWN = 10
# A smaller file is read so fast that it needs no progress bar.
_BAR_FROM_BYTES = 1024 * 1024
# A listed event has its columns beside the payload, and six bytes for a character that is not ASCII.
_MAX_LISTED_BYTES = 8 * MAX_PAYLOAD_BYTES


class _Edited(NamedTuple):
    """A line of `outbox list --ndjson` after its payload was edited."""

    row_id: int
    payload: dict[str, Any]
    created_at_ms: int | None


def _with_paths(
    _context: click.Context, _param: click.Parameter, names: tuple[str, ...]
) -> list[tuple[str, Path | None]]:
    return [(name, None if name == "-" else Path(name).absolute()) for name in names or ("-",)]


@click.command(epilog="""Example: echo '{"event_type": "order_shipped", ...}' | outbox enqueue""")
@click.argument(
    "files",
    metavar="[FILE]...",
    nargs=-1,
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    callback=_with_paths,
    is_eager=True,  # a relative path is resolved before modules of types are imported
)
@click.option(
    "--to",
    metavar="NAME",
    multiple=True,
    help="Destination of the events, instead of the routes in outbox.toml. If the file describes destinations, it"
    " is one of these or `default`. Repeatable.",
)
@click.option("--skip-invalid", is_flag=True, help="Enqueue the valid lines of a file that has invalid lines.")
@click.option(
    "--replace",
    is_flag=True,
    help="Read lines of `outbox list --ndjson`. Each payload takes the place of the event with its id.",
)
@bounds_options
@uses_database
@json_option
@click.pass_context
def enqueue(
    context: click.Context,
    database: str,
    files: list[tuple[str, Path | None]],
    *,
    to: tuple[str, ...],
    skip_invalid: bool,
    replace: bool,
    policy: Policy,
    in_json: bool,
) -> None:
    """Enqueue events from files or standard input, one JSON object per line.

    Each file is enqueued in one transaction. If a line is invalid, nothing from its file is enqueued, unless
    --skip-invalid is given. An event for several destinations gets a row, and a row id, for each of them. The
    database is created or upgraded if necessary.

    With --replace, each line needs the `id` of an event and its new `payload`. The new event takes the place of
    the old one in one transaction, and keeps the destination. It gets a new event id: a service that saw the old
    id would drop the edited event as a duplicate. Exit code 1: an event was not replaced, because it is sent,
    being sent or gone.
    """
    if replace and to:
        raise click.UsageError("--to and --replace are both given; a replaced event keeps its destination")
    if capture.is_off():
        say(f"outbox: nothing enqueued: {capture.IS_OFF}", err=True)
        return
    config = config_of(context)
    for destination in to:
        check_known(destination, config.destinations, "--to is")
    refused = left = 0
    with Outbox.open(database, policy=policy, routes=config.routes) as outbox:
        for name, path in files:
            shown = "standard input" if path is None else escape(name)
            read: Callable[[bytes], Any] = _Editing().line if replace else _event
            lines, invalid = _read_lines(path, shown, read, show_all=skip_invalid)
            is_refused = invalid > 0 and not skip_invalid
            refused += is_refused
            if is_refused:
                lines = []
                say(f"outbox: {shown}: nothing enqueued because of {counted(invalid, 'invalid line')}", err=True)
            if replace:
                done, words, kept = _replace(outbox, lines)
                left += kept
            else:
                done, words = _enqueue(outbox, lines, to)
            if in_json:
                say(as_json({"file": name, "invalid": invalid, **done}))
            elif not is_refused:
                say(f"{shown}: {words}")
    if refused or left:
        context.exit(MISUSE if refused else FAILED)


def _enqueue(outbox: Outbox, events: list[dict[str, Any]], to: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """Enqueue the events of a file. Return what was done, for JSON and in words."""
    ids = outbox.enqueue_many(events, to=to or None)
    first = f", first id {ids[0]}" if ids else ""
    return {"enqueued": len(events), "ids": ids}, f"{counted(len(events), 'event')} enqueued{first}"


def _replace(outbox: Outbox, edited: list[_Edited]) -> tuple[dict[str, Any], str, int]:
    """Replace the events of a file. Return what was done, for JSON and in words, and how many were left."""
    report = outbox.replace(
        {one.row_id: one.payload for one in edited},
        created_at_ms={one.row_id: one.created_at_ms for one in edited if one.created_at_ms is not None},
    )
    for row_id, why in report.refused.items():
        say(f"outbox: event {row_id} is not replaced: {why}", err=True)
    done = {"replaced": len(report.replaced), "ids": report.replaced, "refused": report.refused}
    return done, f"{counted(len(report.replaced), 'event')} replaced", len(report.refused)


def _read_lines(
    path: Path | None, shown: str, read: Callable[[bytes], Line], *, show_all: bool
) -> tuple[list[Line], int]:
    """Return what the valid lines hold, and the number of the invalid lines. Print why those are invalid."""
    events = []
    invalid = 0
    if path is None and sys.stdin is None:
        fail("standard input is closed; name a file, or pipe the events in", MISUSE)
    size = None if path is None else path.stat().st_size or None
    with (
        click.open_file(str(path or "-"), "rb") as file,
        Bar("Reading", total=size, drawn_from=_BAR_FROM_BYTES) as bar,
    ):
        for number, line in enumerate(file, 1):
            bar.advance(len(line))
            text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if not text:
                continue
            try:
                events.append(read(text))
            except InvalidEvent as error:
                invalid += 1
                if show_all or invalid <= _ERRORS_SHOWN:
                    say(f"outbox: {shown}, line {number}: {escape(str(error))}", err=True)
    return events, invalid


def _event(line: bytes) -> dict[str, Any]:
    event = _object(line, MAX_PAYLOAD_BYTES)
    encode(event)
    return event


class _Editing:
    """Reads the edited events of a file. Refuses a second line for the same event."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def line(self, line: bytes) -> _Edited:
        found = _object(line, _MAX_LISTED_BYTES)
        row_id, payload, created_at_ms = found.get("id"), found.get("payload"), found.get("created_at_ms")
        if not isinstance(row_id, int) or not is_row_id(row_id):
            raise InvalidEvent(f"id is {row_id!r}, expected the row id of the event to replace")
        if row_id in self._seen:
            raise InvalidEvent(f"id is {row_id}, like that of an earlier line, expected each event once")
        if not isinstance(payload, dict):
            raise InvalidEvent(f"payload is {type(payload).__name__}, expected the new event, a JSON object")
        if created_at_ms is not None and not isinstance(created_at_ms, int):
            raise InvalidEvent(f"created_at_ms is {created_at_ms!r}, expected epoch milliseconds")
        encode(payload)
        self._seen.add(row_id)
        return _Edited(row_id, payload, created_at_ms)


def _object(line: bytes, most_bytes: int) -> dict[str, Any]:
    if len(line) > most_bytes:
        raise InvalidEvent(f"the line has {len(line)} bytes, expected at most {most_bytes}")
    try:
        found = msgspec.json.decode(line)
    except UnicodeDecodeError:
        raise InvalidEvent("the line is not UTF-8") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidEvent(f"the line is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidEvent(f"expected a JSON object, got {type(found).__name__}")
    return found


COMMANDS = (enqueue,)
