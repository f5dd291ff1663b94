"""Options that several commands share, and the conversion of their values."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import click
from sqlalchemy import URL

from outbox import words
from outbox.cli import config
from outbox.clock import now_ms
from outbox.destinations import shown, stored
from outbox.storage.dialects import dialect_named
from outbox.storage.engines import default_url, parse_url
from outbox.words import escape

_CONFIG = "outbox.config"

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def duration_ms(_context: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """Convert a time such as 30s to ms."""
    age = None if value is None else words.age_ms(value)
    if age is None and value is not None:
        raise click.BadParameter(f"{escape(value)!r}, expected {words.DURATIONS}")
    return age


def moment_ms(_context: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """Convert an age, or a date and time with its zone, to ms since 1970."""
    if value is None:
        return None
    moment = words.moment_ms(value, now_ms=now_ms())
    if moment is None:
        raise click.BadParameter(f"{escape(value)!r}, expected {words.MOMENTS}")
    return moment


def _check_url(_context: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value is not None and "://" not in value:
        # A mistyped URL may hold a password; a path holds no @.
        hint = f"; the URL of the file {escape(value)} is sqlite:///{escape(value)}"
        hint = "" if "@" in value or not value else hint
        raise click.BadParameter(f"expected an SQLAlchemy URL{hint}")
    return value


def _url_of_a_file_or_server(context: click.Context, param: click.Parameter, value: str | None) -> URL:
    value = _check_url(context, param, config_of(context).database if value is None else value)
    url = parse_url(default_url() if value is None else value)
    if dialect_named(url.get_backend_name()).is_in_memory(url):
        raise click.BadParameter(
            "the database is in memory, and its events would end with this command; expected the URL of a file,"
            " such as sqlite:///outbox.db. Is a variable in the URL empty?"
        )
    return url


def _absolute(_context: click.Context, _param: click.Parameter, value: Path | None) -> Path | None:
    return None if value is None else value.absolute()


def _import_modules(_context: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> None:
    for name in value:
        import_module(name)


def import_module(name: str) -> ModuleType:
    """Return the module, which is installed or in the current directory."""
    if "" not in sys.path:
        # The current directory comes last: hooks run in directories of other people, whose files must not replace
        # installed modules.
        sys.path.append("")
    if not all(map(str.isidentifier, name.split("."))):
        raise click.BadParameter(f"{escape(name)!r}, expected the name of a module, such as shop.events")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise click.BadParameter(f"can't import {escape(name)!r}: {error}") from error


def _read_config(context: click.Context, _param: click.Parameter, value: str | None) -> None:
    context.meta[_CONFIG] = config.read(value)


def config_of(context: click.Context) -> config.Config:
    """Return what `outbox.toml` says."""
    found: config.Config = context.meta[_CONFIG]
    return found


def config_option(*, envvar: str | None = None) -> Callable[[Decorated], Decorated]:
    """Add --config. A command without `envvar` reads the file; the main group only passes its name on.

    It is eager, because other options take their defaults from the file.
    """
    return click.option(
        "--config",
        metavar="FILE",
        envvar=envvar,
        expose_value=envvar is not None,
        callback=None if envvar else _read_config,
        is_eager=envvar is None,
        help="TOML file with settings. Default: OUTBOX_CONFIG, else outbox.toml in the current directory if it"
        " exists.",
    )


def database_option(*, envvar: str | None = None) -> Callable[[Decorated], Decorated]:
    """Add --database. The main group names the environment variable, and passes its value on as a default.

    A command without `envvar` gets a URL in any case: the given one, or that of the default file. It is eager,
    because a relative path is resolved before modules of types are imported, which may change the directory.
    """
    return click.option(
        "--database",
        metavar="URL",
        envvar=envvar,
        callback=_check_url if envvar else _url_of_a_file_or_server,
        is_eager=envvar is None,
        help="SQLAlchemy URL of the database. Default: OUTBOX_DATABASE_URL, else that of the TOML file, else a"
        " file in your data directory.",
    )


def types_option(*, envvar: str | None = None) -> Callable[[Decorated], Decorated]:
    """Add --types. A command without `envvar` imports the modules; the main group only passes them on."""
    return click.option(
        "--types",
        metavar="MODULE",
        multiple=True,
        envvar=envvar,
        expose_value=envvar is not None,
        callback=None if envvar else _import_modules,
        help="Import this module, which defines event types. It is installed or in the current directory."
        " Repeatable. Default: OUTBOX_TYPES, names separated by spaces.",
    )


def _destination(_context: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    return None if value is None else shown(stored(value))


def destination_option(*names: str, words: str, required: bool = False) -> Callable[[Decorated], Decorated]:
    """Add an option for the name of a destination, which is explained in these words."""
    return click.option(*names, metavar="NAME", required=required, callback=_destination, help=words)


destination_argument = click.argument("destination", metavar="DESTINATION", callback=_destination)

json_option = click.option("--json", "in_json", is_flag=True, help="Print JSON.")

dry_run_option = click.option("--dry-run", is_flag=True, help="Only count; change nothing.")
heartbeat_option = click.option(
    "--heartbeat",
    metavar="FILE",
    envvar="OUTBOX_HEARTBEAT",
    show_envvar=True,
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_absolute,
    is_eager=True,  # before modules of types are imported, which may change the directory
    help="File that the worker touches while it is alive, for `outbox health`.",
)


def uses_database(command: Decorated) -> Decorated:
    """Add the options of every command that opens the database."""
    return config_option()(database_option()(types_option()(command)))
