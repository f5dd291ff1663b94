from __future__ import annotations

import signal
import subprocess
import sys
import types
from typing import get_args
from urllib import request as urlrequest

import pytest

from command_line import GOOD, TOKEN, process
from outbox import NO_AUTH, HttpClient, StandardWebhooks
from outbox.cli import receive
from outbox.testing.answers import Mode
from outbox.testing.receiver import IngestServer
from peers import Row


def test_the_modes_of_receive_are_those_of_the_server():
    assert get_args(Mode) == receive.RECEIVE_MODES


def test_receive_prints_its_url_and_a_line_for_each_request(run, monkeypatch):
    monkeypatch.setenv("OUTBOX_TOKEN", TOKEN)
    started = []
    start = IngestServer.start
    monkeypatch.setattr(IngestServer, "start", lambda self: started.append(self) or start(self))
    pauses = iter([post_with_token, post_with_token, drop_and_post, None])

    def pause(_seconds):
        step = next(pauses)
        if step is None:
            raise KeyboardInterrupt
        step(started[0])

    monkeypatch.setattr(receive, "_sleep", pause)
    result = run("receive", "--mode", "ok", "--reject-marker", "s1")
    assert result.exit_code == 0
    assert (
        result.stdout
        == f"""\
{started[0].url}
POST /cloud/observations 1 events: 422
POST /cloud/observations 1 events: 422
POST /cloud/observations 1 events: no answer
"""
    )


def test_receive_understands_another_service_and_shows_the_events(run, monkeypatch, tmp_path):
    secret = "whsec_c2VjcmV0LW9mLXRlc3Rz"
    store = tmp_path / "received.ndjson"
    store.write_text('{"old":1}\n')
    started = []
    start = IngestServer.start
    monkeypatch.setattr(IngestServer, "start", lambda self: started.append(self) or start(self))

    def upload(_seconds):
        if started[0].requests:
            raise KeyboardInterrupt
        settings = {"auth": NO_AUTH, "sign": StandardWebhooks(secret), "format": "json:events"}
        with HttpClient(started[0].url, path="/hook", **settings) as client:
            upload_all(client)

    def upload_all(client):
        client.upload([Row(1, '{"a":"\\n\u2028"}'), Row(2, '{"a":"poison"}')])

    monkeypatch.setattr(receive, "_sleep", upload)
    options = ["--path", "/hook", "--format", "json:events", "--secret", secret, "--results", "--show"]
    result = run("receive", *options, "--store", str(store))
    assert result.exit_code == 0
    assert (
        result.stdout
        == f"""\
{started[0].url}
POST /hook 2 events: 207
{{"a":"\\n\\u2028"}}
"""
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "jsn"], "format is 'jsn', expected json, "),
        (["--secret", "no base64!"], "a secret is not base64"),
    ],
)
def test_receive_refuses_what_it_does_not_know(run, options, words):
    result = run("receive", *options)
    assert result.exit_code == 2
    assert words in result.stderr


def post_with_token(server):
    body = f"[{GOOD}]".encode()
    call = urlrequest.Request(  # noqa: S310 - the server of the test
        f"{server.url}/cloud/observations", body, {"Authorization": f"Bearer {TOKEN}"}
    )
    with pytest.raises(OSError, match=r".") as failed:
        urlrequest.urlopen(call)  # noqa: S310 - as above
    if hasattr(failed.value, "close"):
        failed.value.close()


def drop_and_post(server):
    server.set_mode("drop")
    post_with_token(server)


def test_receive_ends_at_sigterm_in_a_real_process(tmp_path):
    file = tmp_path / "received"
    receiving = process("-m", "outbox", "receive", "--store", str(file), stdout=subprocess.PIPE)
    url = receiving.stdout.readline().decode().strip()
    call = urlrequest.Request(f"{url}/cloud/observations", f"[{GOOD}]".encode())  # noqa: S310 - our own server
    with urlrequest.urlopen(call) as response:  # noqa: S310 - as above
        assert response.status == 200
    assert receiving.stdout.readline() == b"POST /cloud/observations 1 events: 200\n"
    receiving.send_signal(signal.SIGTERM)
    assert (receiving.communicate()[0], receiving.returncode) == (b"", 0)
    assert file.read_text() == f"{GOOD}\n"


def test_demo_runs_the_demonstration_and_takes_its_exit_code(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "outbox.cli.demo", types.SimpleNamespace(run=lambda: 1))
    assert run("demo").exit_code == 1
