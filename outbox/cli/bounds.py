"""The options that bound the queue. Without them, no command deletes an event to make room, or rejects one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from outbox.cli.options import config_of, duration_ms
from outbox.policy import Policy

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_NUMBER = click.IntRange(0, 2**53 - 1)


def _bound(name: str, rows: str, *more: str) -> Callable[[Decorated], Decorated]:
    return _number(name, " ".join((f"Maximum number of {rows}; 0, the default, is no bound.", *more)))


def _number(name: str, words: str) -> Callable[[Decorated], Decorated]:
    return click.option(
        f"--{name}",
        metavar="NUMBER",
        type=_NUMBER,
        default=0,
        envvar=f"OUTBOX_{name.replace('-', '_').upper()}",
        show_envvar=True,
        help=words,
    )


_max_undelivered_option = _bound("max-undelivered", "undelivered events of each destination")

warn_undelivered_option = _number(
    "max-undelivered",
    "Warn when a destination has half or nine tenths of this number of undelivered events; 0, the default, is no"
    " warning.",
)
"""The same setting for a command that only warns."""


def bounds_options(command: Decorated) -> Decorated:
    """Add the options for all bounds, and pass them to the command as `policy`."""

    @wraps(command)
    def bounded(*args: Any, **options: Any) -> Any:
        given = {
            name: options.pop(name)
            for name in ("max_sent", "max_undelivered", "max_rows", "when_full", "keep_sent")
        }
        return command(*args, policy=policy_of(**given), **options)

    decorators = (
        _bound(
            "max-rows", "events of each destination", "Beyond it, the oldest delivered events are deleted first."
        ),
        _max_undelivered_option,
        _bound("max-sent", "delivered events of each destination", "The oldest beyond it are deleted."),
        click.option(
            "--when-full",
            type=click.Choice(("reject", "trim")),
            default="reject",
            show_default=True,
            envvar="OUTBOX_WHEN_FULL",
            show_envvar=True,
            help="At the bound on undelivered events or on all events: reject new events, or delete abandoned"
            " events and then the oldest.",
        ),
        click.option(
            "--keep-sent",
            metavar="DURATION",
            callback=duration_ms,
            default="0s",
            envvar="OUTBOX_KEEP_SENT",
            show_envvar=True,
            help="Delete events that were delivered longer ago than this; 0s, the default, deletes none.",
        ),
    )
    options: Any = bounded
    for decorate in reversed(decorators):
        options = decorate(options)
    decorated: Decorated = options
    return decorated


def policy_of(**options: Any) -> Policy:
    """Return the policy of the current command: the bounds of its options or `outbox.toml`, and no others."""
    context = click.get_current_context()
    given = {
        f"{name}_ms" if name == "keep_sent" else name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    unbounded = {"max_sent": 0, "max_undelivered": 0, "max_rows": 0, "keep_sent_ms": 0}
    return Policy(**{**unbounded, **config_of(context).policy, **given})
