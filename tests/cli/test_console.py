"""Also of web/serving.py."""

from __future__ import annotations

import socket
import threading
from urllib.request import urlopen

import pytest

from command_line import STEERING
from outbox import Outbox
from outbox.cli import console
from outbox.web.serving import Server


@pytest.fixture
def visit(monkeypatch):
    """Return a list of what a visitor finds, who ends the console afterwards as Ctrl-C does."""
    found = []

    def run(server):
        thread = threading.Thread(target=run.original, args=(server,))
        thread.start()
        with urlopen(f"http://127.0.0.1:{server.port}/") as answer:
            found.append((answer.url, answer.status, answer.read().decode()))
        server._server.task_dispatcher.shutdown()  # waits until no thread uses the sockets
        server._server.trigger.pull_trigger(server._server.close)  # in its own thread, which selects its sockets
        thread.join()

    run.original = Server.run
    monkeypatch.setattr(Server, "run", run)
    return found


def test_web_says_where_it_listens_and_shows_the_outbox(run, url, visit):
    Outbox.open(url).close()
    result = run("web", "--listen", "127.0.0.1:0")
    assert (result.exit_code, result.stderr) == (0, "")
    assert visit[0][:2] == (result.stdout.strip(), 200)
    assert "The outbox is empty" in visit[0][2]


def test_a_port_that_is_in_use_is_named(run, url):
    Outbox.open(url).close()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run("web", "--listen", f"127.0.0.1:{port}")
    assert result.exit_code == 1
    assert f"port {port} of 127.0.0.1: " in result.stderr


def test_with_a_secret_web_asks_for_it(run, url, visit, monkeypatch):
    monkeypatch.setenv(console.VARIABLE, "a-secret-of-the-tests")
    Outbox.open(url).close()
    result = run("web", "--listen", "0.0.0.0:0")
    assert result.exit_code == 0
    assert "put a proxy with TLS in front of it" in result.stderr
    assert visit[0][0].endswith("/login")


def test_elsewhere_than_on_loopback_web_needs_a_secret(run, url):
    Outbox.open(url).close()
    result = run("web", "--listen", "0.0.0.0:8765")
    assert result.exit_code == 2
    assert "other machines can reach 0.0.0.0, expected a secret in OUTBOX_WEB_SECRET" in result.stderr.replace(
        "\n", " "
    )


@pytest.mark.parametrize(
    "given", ["localhost:1", "127.0.0.1", "127.0.0.1:65536", "::1:80", "[127.0.0.1]:80", "1:2:\x1b", ""]
)
def test_only_an_address_with_a_port_is_one(run, given):
    result = run("web", "--listen", given)
    assert result.exit_code == 2
    assert "expected an address and a port, such as 127.0.0.1:8765 or [::1]:8765" in " ".join(
        result.stderr.split()
    )
    assert not STEERING.search(result.stderr)


def test_without_the_extra_web_says_how_to_install_it(run, monkeypatch):
    monkeypatch.setattr(console, "find_spec", lambda name: None)
    result = run("web")
    assert result.exit_code == 2
    assert "`outbox web` needs flask and waitress: pip install 'observation-outbox[web]'" in result.stderr
