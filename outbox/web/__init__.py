"""The console: a WSGI application that shows an outbox in a browser, and acts on its events.

It needs the extra `web`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING

from flask import Flask

from outbox.failures import ConfigurationError
from outbox.web import actions, destinations, errors, events, ledger, login, overview, security, texts
from outbox.web.console import EXTENSION, Console

if TYPE_CHECKING:
    from outbox.outbox import Outbox
    from outbox.web.security import MayEnter

SHORTEST_SECRET = 16
"""The least number of characters of a secret, so that nobody can find it by trying."""

_SESSION_HOURS = 12
_LARGEST_FORM_BYTES = 200_000


def create_app(  # noqa: PLR0913 - each setting has a default
    outbox: Outbox,
    *,
    may_enter: MayEnter | None = None,
    secret: str | None = None,
    secret_key: str | bytes | None = None,
    host_names: Iterable[str] | None = None,
    read_only: bool = False,
    hide_payloads: bool = False,
) -> Flask:
    """Return the console, a Flask object. Mount it in a Flask or Django application, or serve it alone by WSGI.

    Give `may_enter`, `secret` or both, because everyone who enters can delete events.

    - `may_enter` gets the WSGI environment of each request, and returns whether this person may use the console.
    - `secret` is asked for on a login page. It has at least 16 characters.

    `secret_key` signs the session cookie. Without it, the key is derived from `secret`, or else is random. If
    several processes serve the console with `may_enter` alone, give them all the same key, such as that of your
    application.

    `host_names` are the accepted names in the `Host` header, without port. None accepts any name: your application
    or its proxy checks them.

    With `read_only`, the console changes nothing. With `hide_payloads`, it shows no payloads, no field that is
    taken from them, and no bodies of answers, which may repeat them.

    Raises `ConfigurationError` if neither `may_enter` nor `secret` is given, or if the secret is too short.
    """
    if may_enter is None and secret is None:
        raise ConfigurationError("the console has neither may_enter nor secret, expected one of them or both")
    if secret is not None and len(secret) < SHORTEST_SECRET:
        raise ConfigurationError(
            f"the secret of the console has {len(secret)} characters, expected at least {SHORTEST_SECRET}"
        )
    app = Flask(__name__)
    app.secret_key = _session_key(secret_key or secret)
    app.session_interface = security.Sessions()
    app.config.update(
        SESSION_COOKIE_NAME="outbox_console",
        SESSION_COOKIE_SAMESITE="Strict",
        # An answer that is late, such as that of a live update, must not bring a session back after its logout.
        SESSION_REFRESH_EACH_REQUEST=False,
        PERMANENT_SESSION_LIFETIME=timedelta(hours=_SESSION_HOURS),
        MAX_CONTENT_LENGTH=_LARGEST_FORM_BYTES,
    )
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    app.extensions[EXTENSION] = Console(
        outbox,
        may_enter=may_enter,
        secret=secret,
        host_names=None if host_names is None else frozenset(name.lower() for name in host_names),
        read_only=read_only,
        hide_payloads=hide_payloads,
    )
    for module in (security, errors, texts):
        module.add_to(app)
    for page in (overview, events, actions, destinations, ledger, login):
        app.register_blueprint(page.pages)
    return app


def _session_key(given: str | bytes | None) -> bytes:
    """Return the key that signs the session cookie. It differs from the given key, which may sign others."""
    if given is None:
        return secrets.token_bytes(32)
    key = given.encode() if isinstance(given, str) else given
    return hmac.digest(key, b"outbox console session", hashlib.sha256)
