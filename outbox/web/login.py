"""The login page of a console with a secret."""

from __future__ import annotations

from flask import Blueprint, flash, redirect, render_template, request, session, url_for
from werkzeug.wrappers import Response

from outbox.web.security import begin_session, is_secret

pages = Blueprint("login", __name__)


@pages.get("/login")
def form() -> str:
    """Ask for the secret."""
    return render_template("login.html")


@pages.post("/login")
def enter() -> Response | tuple[str, int]:
    """Begin a session, if the secret is right."""
    if not is_secret(request.form.get("secret", "")):
        return render_template("login.html", is_wrong=True), 403
    begin_session()
    return redirect(url_for("overview.show"), 303)


@pages.post("/logout")
def leave() -> Response:
    """End the session."""
    session.clear()
    flash("You are logged out.")
    return redirect(url_for("login.form"), 303)
