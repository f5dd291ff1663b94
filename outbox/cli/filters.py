"""The options that say which events a command is about."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

from outbox.cli.options import due_after_option, moment_ms, older_than_option, only_destination_option, type_option
from outbox.filters import LARGEST_ID, Where
from outbox.lifecycle import Status

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_CONDITIONS = (
    "ids",
    "event_ids",
    "destination",
    "status",
    "event_type",
    "failure",
    "contains",
    "older_than",
    "newer_than",
    "due_after",
)
_OPTIONS = (
    click.argument("ids", metavar="[ID]...", nargs=-1, type=click.IntRange(1, LARGEST_ID)),
    click.option(
        "--event-id",
        "event_ids",
        metavar="TEXT",
        multiple=True,
        help="Only the event with this event id. Repeatable.",
    ),
    only_destination_option,
    click.option(
        "--status",
        multiple=True,
        type=click.Choice([status.value for status in Status]),
        help="Only events with this status. Repeatable.",
    ),
    type_option,
    click.option(
        "--failure", metavar="TEXT", help="Only events whose last error contains this text. Case counts."
    ),
    click.option("--contains", metavar="TEXT", help="Only events whose payload contains this text. Case counts."),
    older_than_option(),
    click.option(
        "--newer-than", metavar="AGE", callback=moment_ms, help="Only events created at this time or later."
    ),
    due_after_option(),
)


def filter_options(command: Decorated) -> Decorated:
    """Add the row ids and the options that select events, and pass them to the command as `where`."""

    @wraps(command)
    def filtered(*args: Any, **options: Any) -> Any:
        # No id and no --status is no condition; to `Where`, an empty list is one that no event meets.
        given = {name: None if (value := options.pop(name)) == () else value for name in _CONDITIONS}
        return command(*args, where=Where(**given), **options)

    options: Any = filtered
    for add in reversed(_OPTIONS):
        options = add(options)
    decorated: Decorated = options
    return decorated


def filter_or_all_options(command: Decorated) -> Decorated:
    """Add the same and --all, without which a command must not be about every event."""

    @wraps(command)
    def checked(*args: Any, where: Where, everything: bool, **options: Any) -> Any:
        if where.is_everything and not everything:
            raise click.UsageError("expected ids or options that select events, or --all for every event")
        if everything and not where.is_everything:
            raise click.UsageError("--all stands for every event, expected it without ids and other conditions")
        return command(*args, where=where, **options)

    options: Any = click.option("--all", "everything", is_flag=True, help="Every event.")(checked)
    decorated: Decorated = filter_options(options)
    return decorated
