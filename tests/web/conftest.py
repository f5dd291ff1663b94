from __future__ import annotations

import re

import pytest

from outbox.web import create_app

SECRET = "a-secret-of-the-tests"


class Browser:
    """A client that follows redirects, and sends each form with the token of the page that it has seen last."""

    def __init__(self, app):
        self.app = app
        self.client = app.test_client()
        self.page = ""

    def get(self, path, **options):
        answer = self.client.get(path, follow_redirects=True, buffered=True, **options)
        return self._see(answer)

    def post(self, path, **fields):
        token = re.search(r'name="form_token" value="([^"]+)"', self.page)
        data = {"form_token": token.group(1) if token else "", **fields}
        return self._see(self.client.post(path, data=data, follow_redirects=True))

    def _see(self, answer):
        self.page = answer.get_data(as_text=True)
        return answer

    @property
    def text(self):
        """The words of the page, without its tags."""
        return " ".join(re.sub(r"<[^>]+>", " ", self.page).split())


@pytest.fixture
def open_console(outbox):
    """Return a browser at a console with these settings. Everybody may enter, if they say nothing about it."""

    def open_console(**settings):
        if "secret" not in settings:
            settings.setdefault("may_enter", lambda environ: True)
        return Browser(create_app(outbox, **settings))

    return open_console


@pytest.fixture
def browser(open_console):
    return open_console()
