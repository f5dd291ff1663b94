from __future__ import annotations

import types

import pytest

from command_line import TOKEN, runner
from outbox.cli import display, main


@pytest.fixture
def run(url):
    def run(*arguments, **options):
        return runner().invoke(main, ["--database", url, *map(str, arguments)], **options)

    return run


@pytest.fixture
def server(outbox_server):
    outbox_server.token = TOKEN
    return outbox_server


@pytest.fixture
def logged_in(monkeypatch, server):
    monkeypatch.setenv("OUTBOX_URL", server.url)
    monkeypatch.setenv("OUTBOX_TOKEN", TOKEN)


@pytest.fixture
def token_file(monkeypatch, tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN)
    monkeypatch.setenv("OUTBOX_TOKEN_FILE", str(file))
    return file


@pytest.fixture
def terminal(monkeypatch):
    """Standard error claims to be a terminal wherever the command line asks."""
    monkeypatch.setattr(display, "sys", types.SimpleNamespace(stderr=_Terminal(), stdout=_Terminal()))


class _Terminal:
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def opted_out(monkeypatch):
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
