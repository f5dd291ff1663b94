"""The pages that are shown when something is wrong."""

from __future__ import annotations

from flask import Flask, render_template
from werkzeug.exceptions import HTTPException

from outbox.failures import ConfigurationError, OutboxError


def add_to(app: Flask) -> None:
    """Turn each expected error into a page that names it."""
    app.register_error_handler(HTTPException, _of_http)
    app.register_error_handler(ConfigurationError, _of_input)
    app.register_error_handler(OutboxError, _of_storage)


def _of_http(error: HTTPException) -> tuple[str, int]:
    status = error.code or 500
    return _page(error.name, error.description or "", status)


def _of_input(error: ConfigurationError) -> tuple[str, int]:
    return _page("Bad request", str(error), 400)


def _of_storage(error: OutboxError) -> tuple[str, int]:
    return _page("The database can't be used", str(error), 503)


def _page(title: str, words: str, status: int) -> tuple[str, int]:
    return render_template("error.html", title=title, words=words), status
