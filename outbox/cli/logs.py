"""The log of a command, on standard error. Its text is escaped, so it can't control the terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timezone
from typing import Any, Literal

import click

from outbox.cli.display import as_json, say
from outbox.cli.endings import exit_code_of
from outbox.failures import OutboxError
from outbox.words import escape

log = logging.getLogger("outbox.run")

Form = Literal["text", "json"]

_STANDARD = vars(logging.makeLogRecord({})).keys() | {"message", "asctime"}
"""The attributes that every record has. All other attributes are ours."""


class _Plain(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            say(f"outbox: {escape(line)}", err=True)


class _Text(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            say(f"{_time(record)} {record.levelname} {escape(line)}", err=True)


class _Json(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            fields["exception"] = logging.Formatter().formatException(record.exc_info)
        say(as_json(fields, default=str), err=True)  # `str` takes any attribute, so no record is lost


def shown_log() -> AbstractContextManager[None]:
    """Print this package's log."""
    return _logging_to(_Plain())


def hidden_log() -> AbstractContextManager[None]:
    """Keep this package's log off standard error, where Python prints unhandled warnings."""
    return _logging_to(logging.NullHandler())


@contextmanager
def run_log(form: Form, *, verbose: int, quiet: bool) -> Iterator[None]:
    """Print this package's log with time and level. The error that ends the command is logged, too.

    Warnings are printed and, unless `quiet`, the records of `run` itself. `verbose` 1 adds level info, 2 debug.
    """
    if verbose and quiet:
        raise click.UsageError("--verbose and --quiet are both given, expected one of them")
    levels = {"outbox.run": logging.WARNING if quiet else logging.INFO}
    if verbose:
        levels["outbox"] = logging.INFO if verbose == 1 else logging.DEBUG
    before = {name: logging.getLogger(name).level for name in levels}
    with _logging_to(_Json() if form == "json" else _Text()):
        try:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            yield
        except (OutboxError, OSError) as error:
            log.error("%s", error, extra={"event_name": "outbox.run_failed"})  # noqa: TRY400 - the text says what to do, and a traceback would hide it
            raise click.exceptions.Exit(exit_code_of(error)) from None
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


@contextmanager
def _logging_to(handler: logging.Handler) -> Iterator[None]:
    logger = logging.getLogger("outbox")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _time(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created, timezone.utc)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
