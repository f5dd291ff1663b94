"""A Django application, in one file, with the console of its outbox at /outbox, for its operators.

python examples/console_django.py &
curl --cookie-jar cookies --data user=ada http://127.0.0.1:8000/login
curl --cookie cookies http://127.0.0.1:8000/outbox/
"""

import os
from typing import Any

import waitress
from django.conf import settings
from django.contrib.sessions.middleware import SessionMiddleware
from django.core.handlers.wsgi import WSGIRequest
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from outbox import Outbox
from outbox.web import create_app

OPERATORS = {"ada"}

settings.configure(
    SECRET_KEY=os.environ.get("SECRET_KEY", "for trials only"),
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["127.0.0.1"],
    MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware"],
    SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
)
outbox = Outbox.open(os.environ.get("DATABASE_URL", "sqlite:///shop.db"))


def log_in(request: HttpRequest) -> HttpResponse:
    """Trust the given name. A real application checks a password, too."""
    request.session["user"] = request.POST["user"]
    return HttpResponse("logged in\n")


urlpatterns = [path("login", log_in)]


def may_enter(environ: dict[str, Any]) -> bool:
    """Read the application's own session. With `django.contrib.auth`, this is `get_user(request).is_staff`."""
    request = WSGIRequest(environ)
    SessionMiddleware(lambda _: HttpResponse()).process_request(request)
    return request.session.get("user") in OPERATORS


console = create_app(
    outbox, may_enter=may_enter, secret_key=settings.SECRET_KEY, host_names=settings.ALLOWED_HOSTS
)
application = DispatcherMiddleware(get_wsgi_application(), {"/outbox": console})

if __name__ == "__main__":
    server = waitress.create_server(application, listen=os.environ.get("LISTEN", "127.0.0.1:8000"))
    print(f"http://127.0.0.1:{server.effective_port}")
    server.run()
