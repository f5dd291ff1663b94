"""The options that select the events for a command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar

import click

from outbox.cli.options import destination_option, moment_ms
from outbox.filters import LARGEST_ID, Where
from outbox.lifecycle import Status
from outbox.words import escape

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class _RowId(click.IntRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(
                f"{escape(str(value))!r}, expected a row id, a whole number from 1; `outbox list --event-id` finds"
                " an event by its event id",
                param,
                ctx,
            )


ROW_ID = _RowId(1, LARGEST_ID)

_CONDITIONS = tuple(field.name for field in fields(Where))
_OPTIONS = (
    click.argument("ids", metavar="[ID]...", nargs=-1, type=ROW_ID),
    click.option(
        "--event-id",
        "event_ids",
        metavar="TEXT",
        multiple=True,
        help="Only the event with this event id. Repeatable.",
    ),
    destination_option("--destination", words="Only events of this destination."),
    click.option(
        "--status",
        multiple=True,
        type=click.Choice([status.value for status in Status]),
        help="Only events with this status. Repeatable.",
    ),
    click.option("--type", "event_type", metavar="NAME", help="Only events of this type."),
    click.option(
        "--failure", metavar="TEXT", help="Only events whose last error contains this text, case-sensitive."
    ),
    click.option(
        "--contains", metavar="TEXT", help="Only events whose payload contains this text, case-sensitive."
    ),
    click.option(
        "--older-than",
        metavar="MOMENT",
        callback=moment_ms,
        help="Only events created before this time; 0s matches every event.",
    ),
    click.option(
        "--newer-than", metavar="MOMENT", callback=moment_ms, help="Only events created at this time or later."
    ),
    click.option(
        "--due-after",
        metavar="MOMENT",
        callback=moment_ms,
        help="Only pending events that are due later than this time, such as 2026-11-24T12:00:00Z; 0s means now.",
    ),
)


def filter_options(command: Decorated) -> Decorated:
    """Add the row ids and the options that select events, and pass them to the command as `where`."""

    @wraps(command)
    def filtered(*args: Any, **options: Any) -> Any:
        # () stands for a missing option. To `Where`, an empty list would mean that no event matches.
        given = {name: None if (value := options.pop(name)) == () else value for name in _CONDITIONS}
        return command(*args, where=Where(**given), **options)

    options: Any = filtered
    for add in reversed(_OPTIONS):
        options = add(options)
    decorated: Decorated = options
    return decorated


def filter_or_all_options(command: Decorated) -> Decorated:
    """Add the same options, and --all, which is needed to select every event."""

    @wraps(command)
    def checked(*args: Any, where: Where, everything: bool, **options: Any) -> Any:
        if where.is_everything and not everything:
            raise click.UsageError("expected ids or options that select events, or --all for every event")
        if everything and not where.is_everything:
            raise click.UsageError("--all and conditions are both given, expected one of them")
        return command(*args, where=where, **options)

    options: Any = click.option("--all", "everything", is_flag=True, help="Select every event.")(checked)
    decorated: Decorated = filter_options(options)
    return decorated
