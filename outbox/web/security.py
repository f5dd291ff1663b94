"""Who may use the console: the Host header, sessions, forms and headers."""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

from flask import Flask, Request, Response, abort, redirect, request, session, url_for
from flask.sessions import SecureCookieSessionInterface
from werkzeug.wrappers import Response as AnyResponse

from outbox.web.console import console

MayEnter = Callable[[dict[str, Any]], bool]
"""Gets the WSGI environment of a request, and returns whether it may use the console."""

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
"""The names of this machine in a Host header."""

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]+)?")
_SET_BY_PROXIES = ("HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_FORWARDED_FOR", "HTTP_X_FORWARDED_HOST", "HTTP_X_REAL_IP")
_OPEN_TO_ALL = ("static", "login.form", "login.enter")


class Sessions(SecureCookieSessionInterface):
    """Session cookies that are sent below the mount point only, and over TLS only where there is TLS."""

    def get_cookie_path(self, app: Flask) -> str:  # noqa: ARG002 - Flask's signature
        """Return the mount point, so that no other part of the application's site gets the cookie."""
        return request.script_root or "/"

    def get_cookie_secure(self, app: Flask) -> bool:  # noqa: ARG002 - Flask's signature
        """Return whether the browser uses TLS.

        A browser that sends a false header harms only its own session.
        """
        return request.is_secure or request.headers.get("X-Forwarded-Proto") == "https"


def add_to(app: Flask) -> None:
    """Check each request in this order, and add the headers to each answer."""
    app.before_request(_check_host)
    app.before_request(_check_person)
    app.before_request(_check_form)
    app.after_request(_add_headers)
    app.context_processor(lambda: {"form_token": form_token})


def from_this_machine(environ: dict[str, Any]) -> bool:
    """Let requests from this machine in, unless a proxy passed them on. Refuse all others, and say why."""
    passed_on = any(name in environ for name in _SET_BY_PROXIES)
    if passed_on or not ip_address(environ["REMOTE_ADDR"]).is_loopback:
        abort(
            403,
            "this console has no secret, so it refuses proxies and other machines; set OUTBOX_WEB_SECRET",
        )
    return True


def is_secret(given: str) -> bool:
    """Compare a text with the secret, in constant time."""
    secret = console().secret
    return secret is not None and hmac.compare_digest(given.encode(), secret.encode())


def begin_session() -> None:
    """Start a session: this browser can use the console until the session ends."""
    session.clear()
    session["entered"] = True
    session.permanent = True


def form_token() -> str:
    """Return the token that each form of this session carries. Other sites can't read it."""
    if "form_token" not in session:
        session["form_token"] = secrets.token_urlsafe(32)
        session.permanent = True
    token: str = session["form_token"]
    return token


def _check_host() -> None:
    allowed = console().host_names
    name = _name_of(request)
    # DNS rebinding: another site can point a name of its own at this machine.
    if allowed is not None and name not in allowed:
        expected = " or ".join(sorted(allowed))
        abort(400, f"the Host header is {name!r}, expected {expected}; --host-name and host_names add others")


def _name_of(asked: Request) -> str:
    """Return the name in the Host header, in lower case and without port, such as "[::1]"; empty if it is none."""
    host = _HOST.fullmatch(asked.headers.get("Host", "").lower())
    return host["name"] if host else ""


def _check_person() -> AnyResponse | None:
    settings = console()
    if request.endpoint in _OPEN_TO_ALL and (settings.secret is not None or request.endpoint == "static"):
        return None
    if settings.may_enter is not None and not settings.may_enter(request.environ):
        abort(403, "you may not use this console")
    if settings.secret is not None and not session.get("entered"):
        return redirect(url_for("login.form"), 303)
    return None


def _check_form() -> None:
    if request.method in {"GET", "HEAD", "OPTIONS"}:
        return
    expected = session.get("form_token", "")
    given = request.form.get("form_token", "")
    if not expected or not hmac.compare_digest(given.encode(), expected.encode()):
        abort(400, "this form is too old, or comes from another site; go back, reload the page and try again")
    if console().read_only and request.endpoint not in {"login.enter", "login.leave"}:
        abort(403, "this console is read-only")


def _add_headers(response: Response) -> Response:
    response.headers.update(_HEADERS)
    if request.endpoint != "static":
        response.headers["Cache-Control"] = "no-store"
    return response
