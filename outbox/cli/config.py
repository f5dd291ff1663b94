"""The file `outbox.toml`: which settings it may have, and what each of them accepts.

The file holds no secrets, only where they are. A setting whose name ends in `_env` names an environment variable
that holds a secret. A setting whose name ends in `_file` names a file that holds a secret.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from outbox.cli.credentials import Reader, expanded, in_file, in_variable
from outbox.failures import ConfigurationError
from outbox.policy import Policy, Verdict
from outbox.storage.engines import parse_url
from outbox.upload.secrets import LIKELY_CREDENTIAL

FILE_NAME = "outbox.toml"
"""The file that is read from the current directory if no other one is named."""

DESTINATION = "default"
"""The only destination so far."""


@dataclass(frozen=True)
class Config:
    """What a file says. The default stands for no file."""

    name: str = FILE_NAME
    folder: Path = Path()
    """Where the file is. Paths in it are relative to this folder."""
    database: str | None = None
    policy: dict[str, Any] = field(default_factory=dict)
    """Arguments of `Policy`."""
    destination: dict[str, Any] = field(default_factory=dict)
    """The settings of the destination. They have been checked."""

    def secret(self, name: str, *, is_word: bool = True) -> Reader:
        """Return a function that reads the secret with this name, which the destination has."""
        variable, file = (self.destination.get(f"{name}_{kind}") for kind in ("env", "file"))
        return self.reader(variable, file, f"{name}_{'env' if variable else 'file'}", is_word=is_word)

    def header(self, name: str) -> str | Reader:
        """Return the value of a header, or a function that reads it."""
        value = self.destination["headers"][name]
        return value if isinstance(value, str) else self.reader(value.get("env"), value.get("file"), name)

    def path(self, given: str) -> Path:
        """Return a path of the file as an absolute one."""
        return self.folder / expanded(given)

    def reader(self, variable: str | None, file: str | None, setting: str, *, is_word: bool = False) -> Reader:
        """Return a function that reads the secret from the variable or the file. Without both, it returns None."""
        setting = f"{self.name}: {setting}"
        if variable:
            return in_variable(variable, setting=setting, is_word=is_word)
        if file:
            return in_file(self.path(file), setting=setting, is_word=is_word)
        return lambda: None


def read(given: str | None) -> Config:
    """Return the settings of the given file, or of `outbox.toml` in the current directory if there is one.

    Raises `ConfigurationError`, which names the setting and what is accepted.
    """
    path = Path(given or FILE_NAME)
    if not given:
        if not path.exists():
            return Config()
        _refuse_strange_owner(path)
    try:
        return _checked(_parsed(path), path)
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
        raise ConfigurationError(f"the file can't be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigurationError(f"the file is not TOML: {error}") from None


class _Kind(NamedTuple):
    accepts: Callable[[Any], bool]
    words: str
    is_shown: bool = True
    """Whether an error may show the value."""


def _one_of(*choices: str) -> _Kind:
    return _Kind(lambda value: value in choices, f"one of {', '.join(map(repr, choices))}")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_TEXT = _Kind(_is_text, "a text")
_HIDDEN_TEXT = _TEXT._replace(is_shown=False)
_FLAG = _Kind(lambda value: isinstance(value, bool), "true or false")
_NUMBER = _Kind(lambda value: type(value) is int, "a whole number")
_TABLE = _Kind(lambda value: isinstance(value, dict), "a table", is_shown=False)
_ANYTHING = _Kind(lambda _: True, "")  # `Policy` checks it
_FILE = _Kind(lambda value: _is_text(value) and value != "", "the path of a file")
_FILES = _Kind(
    lambda value: _is_text(value) or (isinstance(value, list) and list(map(type, value)) == [str, str]),
    "the path of a file, or an array of two paths",
)
_VARIABLE = _Kind(
    lambda value: _is_text(value) and bool(re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", value)),
    "the name of an environment variable",
    is_shown=False,
)

_TOP = {"database": _HIDDEN_TEXT, "policy": _TABLE, "destinations": _TABLE}
_POLICY = {setting.name: _ANYTHING for setting in fields(Policy)}
_VERDICTS = {verdict.name.lower(): verdict for verdict in Verdict}
_HEADER = {"env": _VARIABLE, "file": _FILE}
_SERVICE = {
    "url": _HIDDEN_TEXT,
    "path": _HIDDEN_TEXT,
    "format": _TEXT,
    "source": _TEXT,
    "subject": _TEXT,
    "headers": _TABLE,
    "allow_insecure": _FLAG,
    "compression": _one_of("gzip", "zstd"),
    "read_answer": _one_of("results"),
    "cert": _FILES,
    "verify": _FILE,
    **dict.fromkeys(
        ("connect_timeout_ms", "read_timeout_ms", "deadline_ms", "max_answer_bytes", "max_batch_bytes"), _NUMBER
    ),
}


class Login(NamedTuple):
    """Which settings a way to log in has."""

    secret: str | None
    """The name of the secret. Its settings are `NAME_env` and `NAME_file`."""
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @property
    def settings(self) -> set[str]:
        """The names of all settings."""
        return {*self.required, *self.optional, *(_sources(self.secret) if self.secret else ())}


def _sources(secret: str) -> dict[str, _Kind]:
    return {f"{secret}_env": _VARIABLE, f"{secret}_file": _FILE}


LOGINS = {
    "bearer": Login("token"),
    "basic": Login("password", ("user",)),
    "api-key": Login("api_key", ("api_key_header",)),
    "oauth2": Login("client_secret", ("token_url", "client_id"), ("scope",)),
    "none": Login(None),
}
"""The values of `auth`."""
_SECRETS = (*(login.secret for login in LOGINS.values() if login.secret), "webhook_secret")
_DESTINATION = {
    **_SERVICE,
    "auth": _one_of(*LOGINS),
    **{name: _TEXT for login in LOGINS.values() for name in (*login.required, *login.optional)},
    **{name: kind for secret in (*_SECRETS, "path") for name, kind in _sources(secret).items()},
}

SETTINGS = (*_sources("database"), "database", *_DESTINATION)
"""The names of all settings but those of the policy."""


def _checked(document: dict[str, Any], path: Path) -> Config:
    _check(document, {**_TOP, **_sources("database")}, "")
    _at_most_one(document, ("database", "database_env", "database_file"), "")
    policy = document.get("policy", {})
    _check(policy, _POLICY, "policy.")
    destinations = document.get("destinations", {})
    for name, table in destinations.items():
        if name != DESTINATION:
            raise ConfigurationError(
                f"destinations.{name} is unknown: there is one destination so far, destinations.{DESTINATION}"
            )
        _check({name: table}, {name: _TABLE}, "destinations.")
    destination = destinations.get(DESTINATION, {})
    _check_destination(destination, f"destinations.{DESTINATION}.")
    config = Config(str(path), path.absolute().parent, policy=_policy(policy), destination=destination)
    return replace(config, database=_database(document, config))


def _policy(table: dict[str, Any]) -> dict[str, Any]:
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
            _check({status: name}, {status: _one_of(*_VERDICTS)}, "policy.verdicts.")
        given["verdicts"] = {int(status): _VERDICTS[name] for status, name in verdicts.items()}
    Policy(**given)
    return given


def _check_destination(table: dict[str, Any], where: str) -> None:
    _check(table, _DESTINATION, where, secrets=_SECRETS)
    chosen = table.get("auth", "bearer")
    for kind, login in LOGINS.items():
        for name in sorted(login.settings & table.keys()):
            if kind != chosen:
                raise ConfigurationError(f"{where}{name} is a setting of auth = {kind!r}, but auth is {chosen!r}")
    login = LOGINS[chosen]
    for name in login.required:
        if name not in table:
            raise ConfigurationError(f"{where}auth is {chosen!r}, expected {where}{name}")
    if chosen != "bearer" and login.secret and not _sources(login.secret).keys() & table.keys():
        raise ConfigurationError(
            f"{where}auth is {chosen!r}, expected {where}{' or '.join(_sources(login.secret))}"
        )
    for secret in _SECRETS:
        _at_most_one(table, _sources(secret), where)
    _at_most_one(table, ("path", *_sources("path")), where)
    if any(LIKELY_CREDENTIAL.search(name) for name in re.findall(r"[?&]([^=&]*)=", table.get("path", ""))):
        raise ConfigurationError(f"{where}path holds a secret, {_elsewhere('path')}")
    for name, value in table.get("headers", {}).items():
        _check_header(name, value, f"{where}headers.")


def _check_header(name: str, value: object, where: str) -> None:
    if isinstance(value, dict):
        _check(value, _HEADER, f"{where}{name}.")
        if len(value) == 1:
            return
    elif _is_text(value) and not LIKELY_CREDENTIAL.search(name):
        return
    raise ConfigurationError(
        f'{where}{name} (not shown: it may be a secret), expected {{ env = "VARIABLE" }} or {{ file = "PATH" }},'
        " or a text if its name is not that of a credential"
    )


def _database(document: dict[str, Any], config: Config) -> str | None:
    url: str | None = document.get("database")
    variable, file = document.get("database_env"), document.get("database_file")
    if variable or file:
        setting = "database_env" if variable else "database_file"
        url = config.reader(variable, file, setting)()
        if url is None:
            raise ConfigurationError(f"{setting} leads to an empty text, expected an SQLAlchemy URL")
    elif url is not None and "://" in url and _has_password(url):
        raise ConfigurationError(f"database holds a secret, {_elsewhere('database')}")
    return url


def _has_password(url: str) -> bool:
    parsed = parse_url(url)
    return parsed.password is not None or any("passw" in name.lower() for name in parsed.query)


def _check(
    table: Mapping[str, Any], known: Mapping[str, _Kind], where: str, *, secrets: Iterable[str] = ()
) -> None:
    for name, value in table.items():
        if name in secrets:
            raise ConfigurationError(f"{where}{name} is a secret, {_elsewhere(name)}")
        if name not in known:
            (nearest,) = get_close_matches(name, known, n=1, cutoff=0)
            raise ConfigurationError(f"{where}{name} is unknown; the nearest setting is {where}{nearest}")
        kind = known[name]
        if not kind.accepts(value):
            shown = repr(value) if kind.is_shown else "(not shown)"
            raise ConfigurationError(f"{where}{name} is {shown}, expected {kind.words}")


def _at_most_one(table: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    given = [f"{where}{name}" for name in names if name in table]
    if len(given) > 1:
        raise ConfigurationError(f"{' and '.join(given)} are set, expected one of them")


def _elsewhere(name: str) -> str:
    return (
        f"and the file holds no secrets; expected {name}_env, the name of an environment variable,"
        f" or {name}_file, the path of a file"
    )
