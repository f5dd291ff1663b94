"""The commands that show events: list and show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from outbox.cli.display import Bar, as_json, list_in_words, reading_bar, say
from outbox.cli.endings import FAILED, fail
from outbox.cli.filters import ROW_ID, filter_options
from outbox.cli.options import json_option, uses_database
from outbox.events import check_payload
from outbox.failures import InvalidEvent
from outbox.filters import LARGEST_ID, Where
from outbox.life import event_as_dict, event_in_words, life_as_dict, look_around
from outbox.operations import SCAN_LIMIT
from outbox.outbox import Outbox
from outbox.stats import counted

if TYPE_CHECKING:
    from outbox.storage.tables import ObservationEvent

_PAGE = 1_000


@click.command("list", epilog="Example: outbox list --status abandoned --failure 422 --newer-than 7d")
@filter_options
@click.option("--oldest-first", is_flag=True, help="Begin with the oldest event instead of the newest one.")
@click.option(
    "--limit",
    type=click.IntRange(1, LARGEST_ID - 1),
    default=100,
    show_default=True,
    help="Maximum number to show.",
)
@click.option(
    "--scan-limit",
    metavar="NUMBER",
    type=click.IntRange(1, LARGEST_ID - 1),
    default=SCAN_LIMIT,
    show_default=True,
    help="Maximum number of events to read for --failure and --contains.",
)
@click.option("--ndjson", is_flag=True, help="Print one JSON object per line, with the payload as JSON.")
@uses_database
@json_option
def list_events(
    database: str,
    *,
    where: Where,
    oldest_first: bool,
    limit: int,
    scan_limit: int,
    ndjson: bool,
    in_json: bool,
) -> None:
    """List the events that match, the newest first.

    --failure and --contains read the events that meet the other conditions, in the order of the list. They stop
    when --limit events are found or --scan-limit events are read. The command says so if more may match.
    --contains searches the payload as it is stored: JSON without blanks between its parts.

    `outbox enqueue --replace` reads what --ndjson prints.
    """
    if ndjson and in_json:
        raise click.UsageError("--json and --ndjson are both given, expected one of them")
    found: list[ObservationEvent] = []
    with Outbox(database) as outbox, reading_bar() as bar:
        search = _Search(outbox, where, bar, left=limit, scan_left=scan_limit, newest_first=not oldest_first)
        for rows in search.pages():
            if ndjson:
                say("\n".join(map(as_line, rows)))
            else:
                found += rows
    if in_json:
        say(as_json([event_as_dict(row) for row in found]))
    elif found:
        say(list_in_words(found))
    elif not search.is_any:
        say("outbox: no matching events", err=True)
    if search.ended_by_limit:
        say(f"outbox: more than {counted(limit, 'event')} match; --limit sets how many are shown", err=True)
    if search.ended_by_scan:
        say(
            f"outbox: only {counted(scan_limit, 'event')} were searched for the text; more may match:"
            " give more conditions, or a larger --scan-limit",
            err=True,
        )


class _Search:
    """Finds events page by page, so that a long list needs little memory."""

    def __init__(
        self, outbox: Outbox, where: Where, bar: Bar, *, left: int, scan_left: int, newest_first: bool
    ) -> None:
        self._outbox = outbox
        self._where = where
        self._bar = bar
        self._left = left
        self._scan_left = scan_left
        self._newest_first = newest_first
        self.is_any = False
        self.ended_by_limit = False
        self.ended_by_scan = False

    def pages(self) -> Iterator[list[ObservationEvent]]:
        """Yield the events in slices. No slice is empty."""
        seen: int | None = None
        while True:
            found = self._outbox.find(
                self._where,
                limit=min(self._left, _PAGE),
                newest_first=self._newest_first,
                before=seen if self._newest_first else None,
                after=None if self._newest_first else seen,
                scan_limit=self._scan_left,
                progress=self._bar.advance,
            )
            if found:
                self.is_any = True
                yield found
            seen = found.next
            self._left -= len(found)
            self._scan_left -= found.rows_read
            if seen is None:
                return
            self.ended_by_limit = found.is_complete and not self._left
            self.ended_by_scan = not found.is_complete or (bool(self._left) and self._scan_left <= 0)
            if self.ended_by_limit or self.ended_by_scan:
                return


@click.command(epilog="Example: outbox show 17")
@click.argument("row_id", metavar="ID", type=ROW_ID)
@uses_database
@json_option
def show(database: str, row_id: int, *, in_json: bool) -> None:
    """Show one event: what happened to it, why it waits, and what happens to it next.

    The last five failed tries are shown, with the host, the duration and the failure of each.
    """
    with Outbox(database) as outbox:
        row = outbox.get(row_id)
        if row is None:
            fail(f"there is no event {row_id}: it was never enqueued here, or it was deleted", FAILED)
        around = look_around(outbox.store, outbox.policy, row)
    say(as_json(life_as_dict(row, around)) if in_json else event_in_words(row, around))


def as_line(row: ObservationEvent) -> str:
    """Return one event as a JSON object in one line of ASCII, so its text can't control the terminal.

    The payload is the stored text, so its numbers keep all their digits. If it is no JSON object, it is null, and
    `payload_json` has the text.
    """
    columns = event_as_dict(row)
    try:
        check_payload(row.payload_json)
    except InvalidEvent:
        return as_json({**columns, "payload": None})
    del columns["payload_json"]
    payload = re.sub("[^ -~]", _in_ascii, row.payload_json)
    return f'{as_json(columns)[:-1]}, "payload": {payload}}}'


def _in_ascii(found: re.Match[str]) -> str:
    char = found.group()
    # JSON has these characters only as blanks between its parts, never inside a string.
    return " " if char in "\n\r\t" else as_json(char)[1:-1]


COMMANDS = (list_events, show)
