"""The commands hold and resume: an operator decides that nothing is sent to a destination."""

from __future__ import annotations

import dataclasses

import click

from outbox.cli.config import check_known
from outbox.cli.display import as_json, say
from outbox.cli.endings import FAILED, fail
from outbox.cli.options import config_of, destination_argument, duration_ms, json_option, uses_database
from outbox.destinations import stored
from outbox.failures import ConfigurationError
from outbox.filters import Where
from outbox.holds import LONGEST_WHY, hold_in_words
from outbox.outbox import Outbox
from outbox.stats import counted
from outbox.words import escape


@click.command(epilog='Example: outbox hold billing --for 2h --why "billing moves to a new data center"')
@destination_argument
@click.option(
    "--for",
    "for_ms",
    metavar="DURATION",
    callback=duration_ms,
    help="End the hold after this time, such as 30m or 2h. Without it, only `outbox resume` ends the hold.",
)
@click.option("--why", metavar="TEXT", required=True, help=f"The reason, at most {LONGEST_WHY} characters.")
@uses_database
@json_option
@click.pass_context
def hold(
    context: click.Context, database: str, destination: str, *, for_ms: int | None, why: str, in_json: bool
) -> None:
    """Put a destination on hold: no host sends events to it. Events are still enqueued.

    Batches that are being sent are finished. A retry or a new token does not end a hold. Holding a destination
    again replaces the reason and the end. If outbox.toml describes destinations, DESTINATION is one of these,
    `default`, or a destination that has events or is on hold.
    """
    with Outbox(database) as outbox:
        try:
            check_known(destination, config_of(context).destinations, "DESTINATION is")
        except ConfigurationError:
            if not _is_used(outbox, destination):
                raise
        held = outbox.hold(destination, why=why, for_ms=for_ms)
        pending = outbox.store.views.pending_count(stored(destination))
    if in_json:
        say(as_json({**dataclasses.asdict(held), "pending": pending}))
    else:
        say(escape(hold_in_words(held)))
        say(f"{counted(pending, 'event')} {'is' if pending == 1 else 'are'} pending or being sent")


@click.command(epilog="Example: outbox resume billing")
@destination_argument
@uses_database
@json_option
def resume(database: str, destination: str, *, in_json: bool) -> None:
    """End the hold of a destination. Running workers continue within 20 seconds.

    Exit code 1: the destination is not on hold.
    """
    with Outbox(database) as outbox:
        is_resumed = outbox.resume(destination)
    if in_json:
        say(as_json({"destination": destination, "resumed": is_resumed}))
    if not is_resumed:
        fail(f"the destination {destination} is not on hold; `outbox status` shows all holds", FAILED)
    if not in_json:
        say(f"{escape(destination)} is no longer on hold")


def _is_used(outbox: Outbox, destination: str) -> bool:
    """Return whether the database has an event or a hold of the destination."""
    held = {hold.destination for hold in outbox.store.holds.lasting(now_ms=outbox.store.now_ms())}
    return destination in held or bool(outbox.find(Where(destination=destination), limit=1))


COMMANDS = (hold, resume)
