"""The command health: a probe that tells by its exit code whether events are delivered."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from outbox import capture
from outbox.cli.display import as_json, say
from outbox.cli.endings import UNDELIVERED, fail
from outbox.cli.options import duration_ms, heartbeat_option, json_option, uses_database
from outbox.clock import now_ms
from outbox.holds import hold_in_words
from outbox.outbox import Outbox
from outbox.stats import duration
from outbox.words import escape


@click.command(epilog="Example: outbox health --max-overdue 10m")
@click.option(
    "--max-overdue",
    metavar="DURATION",
    default="10m",
    show_default=True,
    callback=duration_ms,
    help="Maximum time that an event may be due without being sent.",
)
@click.option("--live", is_flag=True, help="Do not check for overdue events.")
@heartbeat_option
@click.option(
    "--max-silence",
    metavar="DURATION",
    default="5m",
    show_default=True,
    callback=duration_ms,
    help="Maximum time since the worker last touched its heartbeat file.",
)
@uses_database
@json_option
def health(
    database: str,
    *,
    max_overdue: int,
    live: bool,
    heartbeat: Path | None,
    max_silence: int,
    in_json: bool,
) -> None:
    """Report by exit code whether events are delivered, for probes.

    Exit code 1: the database can't be reached, or its schema does not fit this program. Exit code 3: either events
    are overdue, because nothing delivers them or delivery is too slow; or the heartbeat file was not touched for
    too long, so the worker's process should be restarted. Events that wait after a failed try, parked events, and
    events of a destination on hold are not overdue.
    """
    with Outbox(database) as outbox:
        overdue_ms = None if live else outbox.overdue_ms()
        holds = [] if live else outbox.store.holds.lasting(now_ms=outbox.store.now_ms())
    silent_ms = None if heartbeat is None else now_ms() - _touched_ms(heartbeat)
    if capture.is_off():
        say(f"outbox: {capture.IS_OFF}", err=True)
    if in_json:
        held = [dataclasses.asdict(hold) for hold in holds]
        say(as_json({"overdue_ms": overdue_ms, "silent_ms": silent_ms, "holds": held}))
    for hold in holds:
        say(f"outbox: {escape(hold_in_words(hold))}", err=True)
    if silent_ms is not None and silent_ms > max_silence:
        fail(
            f"the worker has not touched its heartbeat file {str(heartbeat)!r} for {duration(silent_ms)};"
            " restart its process",
            UNDELIVERED,
        )
    if overdue_ms is not None and overdue_ms > max_overdue:
        fail(
            f"an event has been due for {duration(overdue_ms)}; check that `outbox run` or another flusher is"
            " running, and what `outbox status` shows",
            UNDELIVERED,
        )
    if not in_json:
        say("ok")


def _touched_ms(heartbeat: Path) -> int:
    try:
        return heartbeat.stat().st_mtime_ns // 1_000_000
    except FileNotFoundError:
        fail(f"there is no heartbeat file {str(heartbeat)!r}: no worker that touches it was started", UNDELIVERED)


COMMANDS = (health,)
