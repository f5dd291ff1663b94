"""The commands that act on events: retry, requeue, abandon and purge."""

from __future__ import annotations

import dataclasses

import click

from outbox.cli.display import as_json, reading_bar, say
from outbox.cli.endings import FAILED, fail
from outbox.cli.filters import filter_or_all_options
from outbox.cli.options import dry_run_option, json_option, uses_database
from outbox.filters import Where
from outbox.maintenance import ActionReport, PurgeReport
from outbox.outbox import Outbox
from outbox.stats import counted
from outbox.words import escape


@click.command(epilog="Example: outbox retry --all")
@filter_or_all_options
@dry_run_option
@uses_database
@json_option
def retry(database: str, *, where: Where, dry_run: bool, in_json: bool) -> None:
    """Make matching events due now if they wait or are parked.

    The pauses of their destinations end, and the next flush, or a running worker, sends the events. Events
    scheduled for later stay as they are. Exit code 1: an event that you named is neither waiting nor parked.
    """
    with Outbox(database) as outbox, reading_bar() as bar:
        report = outbox.retry(where, dry_run=dry_run, progress=bar.advance)
    _say(report, "would be made due" if dry_run else "made due", dry_run=dry_run, in_json=in_json)
    _say_left(where, report.total, "wait or are parked", dry_run=dry_run)


@click.command(epilog="Example: outbox requeue --failure 422 --older-than 12h --dry-run")
@filter_or_all_options
@dry_run_option
@uses_database
@json_option
def requeue(database: str, *, where: Where, dry_run: bool, in_json: bool) -> None:
    """Return abandoned events to the queue and reset their failures and age.

    Exit code 1: an event that you named is not abandoned.
    """
    with Outbox(database) as outbox, reading_bar() as bar:
        report = outbox.requeue(where, dry_run=dry_run, progress=bar.advance)
    _say(report, "would be requeued" if dry_run else "requeued", dry_run=dry_run, in_json=in_json)
    _say_left(where, report.total, "are abandoned", dry_run=dry_run)


@click.command(epilog="""Example: outbox abandon --contains '"order":17' --reason "wrong price" --dry-run""")
@filter_or_all_options
@click.option("--reason", metavar="TEXT", required=True, help="The reason. `outbox show` shows it.")
@dry_run_option
@uses_database
@json_option
def abandon(database: str, *, where: Where, reason: str, dry_run: bool, in_json: bool) -> None:
    """Cancel pending and parked events: they are not sent, and stay in the database.

    `outbox requeue` returns them to the queue. Events that are being sent are not changed. Exit code 1: some
    events were being sent, or an event that you named is neither pending nor parked.
    """
    with Outbox(database) as outbox, reading_bar() as bar:
        report = outbox.abandon(where=where, reason=reason, dry_run=dry_run, progress=bar.advance)
    _say(report, "would be abandoned" if dry_run else "abandoned", dry_run=dry_run, in_json=in_json)
    _say_in_flight(report, "abandoned", dry_run=dry_run)
    _say_left(where, report.total + report.in_flight, "are pending or parked", dry_run=dry_run)


@click.command(epilog="Example: outbox purge --type order_shipped --older-than 30d --dry-run")
@filter_or_all_options
@dry_run_option
@uses_database
@json_option
def purge(database: str, *, where: Where, dry_run: bool, in_json: bool) -> None:
    """Delete events of any status for good.

    `outbox status` shows how many events were deleted. Events that are being sent are not deleted.
    Exit code 1: some events were being sent, or an event that you named does not exist.
    """
    with Outbox(database) as outbox, reading_bar() as bar:
        report = outbox.purge(where=where, dry_run=dry_run, progress=bar.advance)
    done = f"{'would be purged' if dry_run else 'purged'}, {report.undelivered} of them undelivered"
    _say(report, done, dry_run=dry_run, in_json=in_json)
    _say_in_flight(report, "purged", dry_run=dry_run)
    _say_left(where, report.total + report.in_flight, "exist", dry_run=dry_run)


def _say(report: ActionReport | PurgeReport, done: str, *, dry_run: bool, in_json: bool) -> None:
    if in_json:
        say(as_json({**dataclasses.asdict(report), "dry_run": dry_run}))
        return
    say(f"{counted(report.total, 'event')} {done}")
    for event_type, count in report.per_type.items():
        say(f"  {escape(event_type)}: {count}")


def _say_in_flight(report: ActionReport | PurgeReport, done: str, *, dry_run: bool) -> None:
    """Say how many events were left alone because they are being sent. Unless it is a dry run, fail."""
    if not report.in_flight:
        return
    kept = f"{done} because they are being sent: {counted(report.in_flight, 'event')}"
    if dry_run:
        say(f"outbox: would not be {kept}", err=True)
    else:
        fail(f"not {kept}; run the command again later", FAILED)


def _say_left(where: Where, reported: int, which: str, *, dry_run: bool) -> None:
    """Say how many of the named events the action does not apply to. Unless it is a dry run, fail."""
    left = len({*(where.ids or ())}) - reported
    if left <= 0:
        return
    if not dataclasses.replace(where, ids=None).is_everything:
        which += " and meet the other conditions"
    words = f"left alone: {left} of the events that you named; this changes only events that {which};"
    words += " `outbox show ID` tells more"
    if dry_run:
        say(f"outbox: {words}", err=True)
    else:
        fail(words, FAILED)


COMMANDS = (retry, requeue, abandon, purge)
