"""The commands about events: enqueue, list, show, retry, requeue and purge."""

from __future__ import annotations

import codecs
import dataclasses
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from outbox import capture
from outbox.cli.bounds import bounds_options
from outbox.cli.display import Bar, as_json, list_in_words, say
from outbox.cli.endings import FAILED, MISUSE, fail
from outbox.cli.options import (
    config_of,
    dry_run_option,
    due_after_option,
    json_option,
    older_than_option,
    only_destination_option,
    type_option,
    uses_database,
)
from outbox.events import MAX_PAYLOAD_BYTES, encode
from outbox.failures import InvalidEvent
from outbox.filters import LARGEST_ID
from outbox.life import event_as_dict, event_in_words, what_next
from outbox.lifecycle import Status
from outbox.outbox import Outbox
from outbox.policy import Policy
from outbox.stats import counted
from outbox.words import escape

_ERRORS_SHOWN = 10
# A smaller file is read so fast that it needs no progress bar.
_BAR_FROM_BYTES = 1024 * 1024


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
    help="Destination of the events, instead of the routes in outbox.toml. Repeatable.",
)
@click.option("--skip-invalid", is_flag=True, help="Enqueue the valid lines of a file that has invalid lines.")
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
    policy: Policy,
    in_json: bool,
) -> None:
    """Enqueue events from files or standard input, one JSON object per line.

    Each file is enqueued in one transaction. If a line is invalid, nothing from its file is enqueued, unless
    --skip-invalid is given. An event for several destinations gets a row, and a row id, for each of them. The
    database is created or upgraded if necessary.
    """
    if capture.is_off():
        say(f"outbox: nothing enqueued: {capture.IS_OFF}", err=True)
        return
    refused = 0
    with Outbox.open(database, policy=policy, routes=config_of(context).routes) as outbox:
        for name, path in files:
            shown = "standard input" if path is None else escape(name)
            events, invalid = _read_events(path, shown, show_all=skip_invalid)
            is_refused = invalid > 0 and not skip_invalid
            ids = [] if is_refused else outbox.enqueue_many(events, to=to or None)
            enqueued = 0 if is_refused else len(events)
            refused += is_refused
            if is_refused:
                lines = counted(invalid, "invalid line")
                say(f"outbox: {shown}: nothing enqueued because of {lines}", err=True)
            if in_json:
                say(as_json({"file": name, "enqueued": enqueued, "invalid": invalid, "ids": ids}))
            elif not is_refused:
                first = f", first id {ids[0]}" if ids else ""
                say(f"{shown}: {counted(enqueued, 'event')} enqueued{first}")
    if refused:
        context.exit(MISUSE)


@click.command("list", epilog="Example: outbox list --status abandoned --older-than 7d")
@click.option(
    "--status", type=click.Choice([status.value for status in Status]), help="Only events with this status."
)
@type_option
@only_destination_option
@older_than_option()
@due_after_option()
@click.option(
    "--limit",
    type=click.IntRange(1, LARGEST_ID - 1),
    default=100,
    show_default=True,
    help="Maximum number to show.",
)
@uses_database
@json_option
def list_events(
    database: str,
    *,
    status: str | None,
    event_type: str | None,
    destination: str | None,
    older_than: int | None,
    due_after: int | None,
    limit: int,
    in_json: bool,
) -> None:
    """List events, oldest first."""
    with Outbox(database) as outbox:
        rows = outbox.find(
            status=status,
            event_type=event_type,
            older_than=older_than,
            due_after=due_after,
            destination=destination,
            limit=limit + 1,
        )
    if in_json:
        say(as_json([event_as_dict(row) for row in rows[:limit]]))
    elif rows:
        say(list_in_words(rows[:limit]))
    else:
        say("outbox: no matching events", err=True)
    if rows[limit:]:
        say(f"outbox: more than {counted(limit, 'event')} match; --limit sets how many are shown", err=True)


@click.command(epilog="Example: outbox show 17")
@click.argument("row_id", metavar="ID", type=click.IntRange(1, LARGEST_ID))
@uses_database
@json_option
def show(database: str, row_id: int, *, in_json: bool) -> None:
    """Show one event: why it waits, what would prove that it is bad, and what happens to it next."""
    with Outbox(database) as outbox:
        row = outbox.get(row_id)
        now = outbox.store.now_ms()
        pauses = [
            pause
            for pause in outbox.store.views.pauses(now_ms=now)
            if row is not None and pause.destination == row.destination
        ]
        holds = outbox.store.holds.lasting(now_ms=now)
        policy = outbox.policy
    if row is None:
        fail(f"there is no event {row_id}: it was never enqueued here, or it was deleted", FAILED)
    if in_json:
        following = what_next(row, now_ms=now, policy=policy, pauses=pauses, holds=holds)
        say(as_json({**event_as_dict(row), "next": following}))
    else:
        say(event_in_words(row, now_ms=now, policy=policy, pauses=pauses, holds=holds))


@click.command(epilog="Example: outbox retry")
@only_destination_option
@uses_database
@json_option
def retry(database: str, *, destination: str | None, in_json: bool) -> None:
    """Retry all waiting and parked events now.

    Pauses end, and the events become due: the next flush, or a running worker, sends them.
    """
    with Outbox(database) as outbox:
        count = outbox.retry_now(destination=destination)
    say(as_json({"retried": count}) if in_json else f"{counted(count, 'event')} made due")


@click.command(epilog="Example: outbox requeue --older-than 12h --dry-run")
@older_than_option(required=True)
@only_destination_option
@dry_run_option
@uses_database
@json_option
def requeue(database: str, *, older_than: int, destination: str | None, dry_run: bool, in_json: bool) -> None:
    """Return abandoned events to the queue and reset their failures and age."""
    with Outbox(database) as outbox:
        report = outbox.requeue_abandoned(older_than=older_than, destination=destination, dry_run=dry_run)
    if in_json:
        say(as_json({**dataclasses.asdict(report), "dry_run": dry_run}))
        return
    say(f"{counted(report.total, 'event')} {'would be requeued' if dry_run else 'requeued'}")
    _say_types(report.per_type)


@click.command(epilog="Example: outbox purge --type order_shipped --older-than 30d --dry-run")
@type_option
@older_than_option()
@only_destination_option
@dry_run_option
@uses_database
@json_option
def purge(
    database: str,
    *,
    event_type: str | None,
    older_than: int | None,
    destination: str | None,
    dry_run: bool,
    in_json: bool,
) -> None:
    """Delete events of any status for good.

    Give --type, --older-than or both. `outbox status` shows how many events were deleted. Events that are being
    sent are not deleted. Exit code 1: there were such events.
    """
    with Outbox(database) as outbox:
        report = outbox.purge(
            event_type=event_type, older_than=older_than, destination=destination, dry_run=dry_run
        )
    if in_json:
        say(as_json({**dataclasses.asdict(report), "dry_run": dry_run}))
    else:
        done = "would be purged" if dry_run else "purged"
        say(f"{counted(report.total, 'event')} {done}, {report.undelivered} of them undelivered")
        _say_types(report.per_type)
    if report.in_flight:
        kept = f"because they are being sent: {counted(report.in_flight, 'event')}"
        if dry_run:
            say(f"outbox: would not be purged {kept}", err=True)
        else:
            fail(f"not purged {kept}; run the command again later", FAILED)


def _say_types(per_type: dict[str, int]) -> None:
    for event_type, count in per_type.items():
        say(f"  {escape(event_type)}: {count}")


def _read_events(path: Path | None, shown: str, *, show_all: bool) -> tuple[list[dict[str, Any]], int]:
    """Return the events of a file and the number of its invalid lines; print why those are invalid."""
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
                events.append(_event(text))
            except InvalidEvent as error:
                invalid += 1
                if show_all or invalid <= _ERRORS_SHOWN:
                    say(f"outbox: {shown}, line {number}: {escape(str(error))}", err=True)
    return events, invalid


def _event(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_PAYLOAD_BYTES:
        raise InvalidEvent(f"the line has {len(line)} bytes, expected at most {MAX_PAYLOAD_BYTES}")
    try:
        event = msgspec.json.decode(line)
    except UnicodeDecodeError:
        raise InvalidEvent("the line is not UTF-8") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidEvent(f"the line is not JSON: {error}") from None
    if not isinstance(event, dict):
        raise InvalidEvent(f"expected a JSON object, got {type(event).__name__}")
    encode(event)
    return event


COMMANDS = (enqueue, list_events, show, retry, requeue, purge)
