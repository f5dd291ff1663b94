"""The table `[destinations.NAME]` of `outbox.toml`: which settings it may have, and how they fit together."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from outbox.cli.config_checks import (
    FILE,
    FILES,
    FLAG,
    HIDDEN_TEXT,
    NUMBER,
    TABLE,
    TEXT,
    VARIABLE,
    at_most_one,
    check,
    elsewhere,
    is_text,
    one_of,
    sources,
)
from outbox.failures import ConfigurationError
from outbox.upload.secrets import LIKELY_CREDENTIAL

_HEADER = {"env": VARIABLE, "file": FILE}
_SERVICE = {
    "url": HIDDEN_TEXT,
    "path": HIDDEN_TEXT,
    "format": TEXT,
    "source": TEXT,
    "subject": TEXT,
    "headers": TABLE,
    "allow_insecure": FLAG,
    "compression": one_of("gzip", "zstd"),
    "read_answer": one_of("results"),
    "cert": FILES,
    "verify": FILE,
    **dict.fromkeys(
        ("connect_timeout_ms", "read_timeout_ms", "deadline_ms", "max_answer_bytes", "max_batch_bytes"), NUMBER
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
        return {*self.required, *self.optional, *(sources(self.secret) if self.secret else ())}


LOGINS = {
    "bearer": Login("token"),
    "basic": Login("password", ("user",)),
    "api-key": Login("api_key", ("api_key_header",)),
    "oauth2": Login("client_secret", ("token_url", "client_id"), ("scope",)),
    "none": Login(None),
}
"""The values of `auth`."""
_SECRETS = (*(login.secret for login in LOGINS.values() if login.secret), "webhook_secret")
SETTINGS = {
    **_SERVICE,
    "auth": one_of(*LOGINS),
    **{name: TEXT for login in LOGINS.values() for name in (*login.required, *login.optional)},
    **{name: kind for secret in (*_SECRETS, "path") for name, kind in sources(secret).items()},
}


def check_destination(table: dict[str, Any], where: str) -> None:
    """Check the settings of a destination. `where` precedes their names in errors."""
    check(table, SETTINGS, where, secrets=_SECRETS)
    chosen = table.get("auth", "bearer")
    for kind, login in LOGINS.items():
        for name in sorted(login.settings & table.keys()):
            if kind != chosen:
                raise ConfigurationError(f"{where}{name} is a setting of auth = {kind!r}, but auth is {chosen!r}")
    login = LOGINS[chosen]
    for name in login.required:
        if name not in table:
            raise ConfigurationError(f"{where}auth is {chosen!r}, expected {where}{name}")
    if chosen != "bearer" and login.secret and not sources(login.secret).keys() & table.keys():
        raise ConfigurationError(
            f"{where}auth is {chosen!r}, expected {where}{' or '.join(sources(login.secret))}"
        )
    for secret in _SECRETS:
        at_most_one(table, sources(secret), where)
    at_most_one(table, ("path", *sources("path")), where)
    if any(LIKELY_CREDENTIAL.search(name) for name in re.findall(r"[?&]([^=&]*)=", table.get("path", ""))):
        raise ConfigurationError(f"{where}path holds a secret, {elsewhere('path')}")
    for name, value in table.get("headers", {}).items():
        _check_header(name, value, f"{where}headers.")


def _check_header(name: str, value: object, where: str) -> None:
    if isinstance(value, dict):
        check(value, _HEADER, f"{where}{name}.")
        if len(value) == 1:
            return
    elif is_text(value) and not LIKELY_CREDENTIAL.search(name):
        return
    raise ConfigurationError(
        f'{where}{name} (not shown: it may be a secret), expected {{ env = "VARIABLE" }} or {{ file = "PATH" }},'
        " or a text if its name is not that of a credential"
    )
