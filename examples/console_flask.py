"""A Flask application with the console of its outbox at /outbox, for its operators.

flask --app examples/console_flask run &
curl --cookie-jar cookies --data user=ada http://127.0.0.1:5000/login
curl --cookie cookies http://127.0.0.1:5000/outbox/
"""

import os
from typing import Any

from flask import Flask, request, session
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from outbox import Outbox
from outbox.web import create_app

OPERATORS = {"ada"}

app = Flask(__name__)
app.secret_key = os.environ.get("SECRET_KEY", "for trials only")
outbox = Outbox.open(os.environ.get("DATABASE_URL", "sqlite:///shop.db"))


@app.post("/login")
def log_in() -> str:
    """Trust the given name. A real application checks a password, too."""
    session["user"] = request.form["user"]
    return "logged in\n"


def may_enter(environ: dict[str, Any]) -> bool:
    """Read the application's own session from the request to the console."""
    with app.request_context({**environ}):
        return session.get("user") in OPERATORS


console = create_app(outbox, may_enter=may_enter, secret_key=app.secret_key)
app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/outbox": console})
