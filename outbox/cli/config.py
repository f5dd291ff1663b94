"""The file `outbox.toml`: where it is, and what it says.

The file holds no secrets, only where they are. A setting whose name ends in `_env` names an environment variable
that holds a secret. A setting whose name ends in `_file` names a file that holds a secret.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from outbox.cli import config_destination
from outbox.cli.config_checks import ANYTHING, HIDDEN_TEXT, TABLE, at_most_one, check, elsewhere, one_of, sources
from outbox.cli.config_destination import check_destination
from outbox.cli.config_table import Table
from outbox.destinations import DEFAULT_NAME, stored, stored_names
from outbox.failures import ConfigurationError
from outbox.policy import Policy, Verdict
from outbox.storage.engines import parse_url

FILE_NAME = "outbox.toml"
"""The file that is read from the current directory if no other one is named."""

_DATABASE = ("database", *sources("database"))
_TOP = {
    "database": HIDDEN_TEXT,
    **sources("database"),
    "policy": TABLE,
    "routes": TABLE,
    "destinations": TABLE,
}
_POLICY = {setting.name: ANYTHING for setting in fields(Policy)}  # `Policy` checks the values
_VERDICTS = {verdict.name.lower(): verdict for verdict in Verdict}

SETTINGS = (*_DATABASE, *config_destination.SETTINGS)
"""The names of all settings but those of the policy and the routes."""


@dataclass(frozen=True)
class Config:
    """What a file says. The default stands for no file."""

    name: str = FILE_NAME
    database: str | None = None
    policy: dict[str, Any] = field(default_factory=dict)
    """Arguments of `Policy`."""
    routes: dict[str, Any] = field(default_factory=dict)
    """The routes for `Outbox`. They have been checked."""
    destinations: dict[str, Table] = field(default_factory=dict)
    """The settings of each destination in the file, by name."""

    def destination(self, name: str) -> Table:
        """Return the settings of a destination, none if it is not in the file."""
        return self.destinations.get(name) or Table(_where(self.name, name))


def read(given: str | None) -> Config:
    """Return the settings of the given file, or of `outbox.toml` in the current directory if there is one.

    Raises `ConfigurationError`, which names the setting and what is accepted.
    """
    path = Path(given or FILE_NAME)
    if not given:
        if not path.exists():
            return Config()
        _refuse_strange_owner(path)
    document = _parsed(path)
    try:
        return _checked(document, path)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def _refuse_strange_owner(path: Path) -> None:
    own_id = getattr(os, "getuid", lambda: None)()  # not on Windows
    if own_id is not None and path.stat().st_uid not in (0, own_id):
        raise ConfigurationError(f"{path} belongs to another user; if you trust the file, name it with --config")


def _parsed(path: Path) -> dict[str, Any]:
    toml = import_module(
        "tomllib" if sys.version_info >= (3, 11) else "tomli"
    )  # here, because most runs have no file to read
    try:
        with path.open("rb") as file:
            document: dict[str, Any] = toml.load(file)
            return document
    except OSError as error:
        raise ConfigurationError(f"{path}: the file can't be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigurationError(f"{path}: the file is not TOML: {error}") from None


def _checked(document: dict[str, Any], path: Path) -> Config:
    check(document, _TOP, "")
    at_most_one(document, _DATABASE, "")
    folder = path.absolute().parent
    tables = _destinations(document.get("destinations", {}))
    return Config(
        str(path),
        _database(Table("", folder, document)),
        _policy(document.get("policy", {})),
        _routes(document.get("routes", {}), tables),
        {name: Table(_where(str(path), name), folder, settings) for name, settings in tables.items()},
    )


def _where(file: str, destination: str) -> str:
    return f"{file}: destinations.{destination}."


def _database(top: Table) -> str | None:
    url: str | None = top.settings.get("database")
    for setting in sources("database"):
        if setting in top.settings:
            url = top.secret("database", is_word=False)()
            if url is None:
                raise ConfigurationError(f"{setting} leads to an empty text, expected an SQLAlchemy URL")
            return url
    if url is not None and "://" in url and _has_password(url):
        raise ConfigurationError(f"database holds a secret, {elsewhere('database')}")
    return url


def _has_password(url: str) -> bool:
    parsed = parse_url(url)
    return parsed.password is not None or any("passw" in name.lower() for name in parsed.query)


def _policy(table: dict[str, Any]) -> dict[str, Any]:
    check(table, _POLICY, "policy.")
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in table.items()
    }
    verdicts = given.get("verdicts")
    if isinstance(verdicts, dict):
        for status, name in verdicts.items():
            if not re.fullmatch("[1-5][0-9]{2}", status):
                raise ConfigurationError(
                    f"policy.verdicts.{status} is unknown, expected an HTTP status, 100 to 599"
                )
            check({status: name}, {status: one_of(*_VERDICTS)}, "policy.verdicts.")
        given["verdicts"] = {int(status): _VERDICTS[name] for status, name in verdicts.items()}
    Policy(**given)
    return given


def _destinations(tables: dict[str, Any]) -> dict[str, dict[str, Any]]:
    for name, table in tables.items():
        try:
            stored(name)
        except ConfigurationError as error:
            raise ConfigurationError(f"destinations: {error}") from None
        check({name: table}, {name: TABLE}, "destinations.")
        check_destination(table, f"destinations.{name}.")
    return tables


def _routes(routes: dict[str, Any], tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Check the routes. If the file describes destinations, they lead to these or to `default`."""
    for event_type, named in routes.items():
        try:
            stored_names(named, "the value")
        except ConfigurationError as error:
            raise ConfigurationError(f"routes.{event_type}: {error}") from None
        for name in [named] if isinstance(named, str) else named:
            check_known(name, tables, f"routes.{event_type} leads to")
    return routes


def check_known(name: str, tables: Collection[str], what: str) -> None:
    """Raise `ConfigurationError` if the file describes destinations, but not this one; `default` is known."""
    known = {*tables, DEFAULT_NAME}
    if tables and name not in known:
        (nearest,) = get_close_matches(name, sorted(known), n=1, cutoff=0)
        raise ConfigurationError(
            f"{what} {name}, which is unknown; the nearest destination of the file is {nearest}"
        )
