"""How a command ends: exit codes, errors and signals."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from outbox.cli.display import say
from outbox.failures import ConfigurationError, InvalidEvent
from outbox.words import escape

FAILED, MISUSE, UNDELIVERED, INTERRUPTED = 1, 2, 3, 130
"""The exit codes of the commands. `MISUSE` means wrong usage, settings or input. `INTERRUPTED` means Ctrl-C."""


def exit_code_of(error: Exception) -> int:
    """Return the exit code for an expected error."""
    return MISUSE if isinstance(error, (ConfigurationError, InvalidEvent)) else FAILED


def fail(message: str, exit_code: int) -> NoReturn:
    """Print the message on standard error and exit."""
    say(f"outbox: {escape(message)}", err=True)
    raise click.exceptions.Exit(exit_code)


@contextmanager
def sigterm_like_ctrl_c() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, so that an interrupted flush releases its events."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
