from __future__ import annotations

import base64
import json
import socket
from pathlib import Path

import pytest

from builders import rule_fired
from command_line import GOOD, TOKEN, runner
from outbox.cli import main
from outbox.testing import Answer, ScriptedServer

EVENT = json.loads(GOOD)
AUTHORIZATION = "Authorization"


@pytest.fixture
def receiver(outbox_server: ScriptedServer) -> ScriptedServer:
    """A service that takes every login."""
    return outbox_server


@pytest.fixture
def flushed(run, outbox, receiver, tmp_path, monkeypatch):
    """Flush one event with this file, and return the request that arrived."""
    monkeypatch.chdir(tmp_path)

    def flush(lines, *options):
        Path("outbox.toml").write_text(f"[destinations.default]\nurl = '{receiver.url}'\n{lines}\n")
        outbox.enqueue(rule_fired())
        result = run("flush", *options)
        assert result.exit_code == 0, result.stderr
        return receiver.requests[-1]

    return flush


def basic(text):
    return f"Basic {base64.b64encode(text.encode()).decode()}"


@pytest.mark.parametrize(
    ("lines", "header", "value"),
    [
        ("token_env = 'SHOP_SECRET'", AUTHORIZATION, "Bearer s-1"),
        ("token_file = 'secret'", AUTHORIZATION, "Bearer s-2"),
        ("auth = 'basic'\nuser = 'shop'\npassword_env = 'SHOP_SECRET'", AUTHORIZATION, basic("shop:s-1")),
        ("auth = 'basic'\nuser = 'shop'\npassword_file = 'secret'", AUTHORIZATION, basic("shop:s-2")),
        ("auth = 'api-key'\napi_key_header = 'X-Api-Key'\napi_key_env = 'SHOP_SECRET'", "X-Api-Key", "s-1"),
        ("auth = 'none'", AUTHORIZATION, None),
        ("auth = 'none'\nheaders = { X-Api-Key = { file = 'secret' }, X-Shop = '17' }", "X-Api-Key", "s-2"),
        ("auth = 'none'\nheaders = { X-Api-Key = { file = 'secret' }, X-Shop = '17' }", "X-Shop", "17"),
    ],
)
def test_the_file_says_how_to_log_in(flushed, tmp_path, monkeypatch, lines, header, value):
    monkeypatch.setenv("SHOP_SECRET", "s-1")
    (tmp_path / "secret").write_text("s-2\n")
    assert flushed(lines).headers.get(header) == value


def test_oauth_gets_a_token_for_the_secret_of_the_file(flushed, receiver, tmp_path):
    (tmp_path / "secret").write_text("s-2\n")
    receiver.script(Answer(200, '{"access_token": "t-1"}'), 200)
    lines = f"auth = 'oauth2'\ntoken_url = '{receiver.url}/token'\nclient_id = 'shop'\nscope = 'events'\n"
    assert flushed(f"{lines}client_secret_file = 'secret'").headers[AUTHORIZATION] == "Bearer t-1"
    assert receiver.requests[0].path == "/token"
    assert receiver.requests[0].headers[AUTHORIZATION] == basic("shop:s-2")


@pytest.mark.parametrize(
    ("lines", "options", "path"),
    [
        ("", [], "/cloud/observations"),
        ("path = ''", [], "/"),
        ("path = '/events'", [], "/events"),
        ("path_env = 'SHOP_PATH'", [], "/hook?key=p-1"),
        ("path_env = 'NOT_SET_ANYWHERE'", [], "/"),
        ("path = '/events'", ["--path", "/others"], "/others"),
        ("path = '/events'", ["--path", ""], "/"),
    ],
)
def test_the_path_comes_from_the_option_or_the_file(flushed, monkeypatch, lines, options, path):
    monkeypatch.setenv("SHOP_PATH", "/hook?key=p-1")
    assert flushed(f"auth = 'none'\n{lines}", *options).path == path


@pytest.mark.parametrize(
    ("lines", "options", "body"),
    [
        ("format = 'json:events'", [], {"events": [EVENT]}),
        ("format = 'json:events'", ["--format", "json:batch"], {"batch": [EVENT]}),
        ("", ["--format", "single"], EVENT),
        ("", [], [EVENT]),
    ],
)
def test_the_format_comes_from_the_option_or_the_file(flushed, receiver, lines, options, body):
    receiver.script(200)
    assert json.loads(flushed(f"auth = 'none'\n{lines}", *options).body) == body


@pytest.mark.parametrize("form", ["cloudevents", "cloudevents-batch"])
def test_the_file_names_the_source_and_the_subject_of_cloudevents(flushed, receiver, form):
    receiver.script(200)
    body = json.loads(flushed(f"auth = 'none'\nformat = '{form}'\nsource = '/shop'\nsubject = 'session_id'").body)
    event = body[0] if form == "cloudevents-batch" else body
    assert (event["source"], event["subject"], event["data"]) == ("/shop", "s1", EVENT)


def test_a_source_without_cloudevents_is_misuse(run, outbox, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outbox.toml").write_text(
        "[destinations.default]\nurl = 'https://a.example'\nauth = 'none'\nsource = '/shop'"
    )
    result = run("flush")
    assert result.exit_code == 2
    assert "source set, but the format is 'json', expected cloudevents or cloudevents-batch" in result.stderr


def test_options_add_headers_and_take_the_login_away(flushed, monkeypatch):
    monkeypatch.setenv("OUTBOX_TOKEN", TOKEN)
    lines = "token_env = 'NOT_SET_ANYWHERE'\nheaders = { X-Shop = '17', X-Part = 'a' }"
    request = flushed(lines, "--no-auth", "--header", "X-Part: b:c ", "--header", "X-More:")
    assert AUTHORIZATION not in request.headers
    assert [request.headers[name] for name in ("X-Shop", "X-Part", "X-More")] == ["17", "b:c", ""]


def test_the_token_of_the_environment_comes_before_that_of_the_file(flushed, monkeypatch):
    monkeypatch.setenv("OUTBOX_TOKEN", TOKEN)
    monkeypatch.setenv("SHOP_TOKEN", "s-1")
    assert flushed("token_env = 'SHOP_TOKEN'").headers[AUTHORIZATION] == f"Bearer {TOKEN}"


def test_the_variable_of_the_url_comes_before_the_file(run, outbox, receiver, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outbox.toml").write_text("[destinations.default]\nurl = 'https://nowhere.invalid'\nauth = 'none'")
    monkeypatch.setenv("OUTBOX_URL", receiver.url)
    outbox.enqueue(rule_fired())
    assert run("flush").exit_code == 0
    assert len(receiver.events) == 1


def test_the_file_sets_the_connection_the_size_and_the_signature(flushed, receiver, tmp_path):
    (tmp_path / "hook").write_text("whsec_c2VjcmV0LW9mLXRlc3Rz")
    (tmp_path / "ca.pem").touch()
    receiver.secret, receiver.results = "whsec_c2VjcmV0LW9mLXRlc3Rz", True
    request = flushed(
        "auth = 'none'\nwebhook_secret_file = 'hook'\nverify = 'ca.pem'\nread_answer = 'results'\ncompression = 'gzip'\n"
        "connect_timeout_ms = 1_000\nread_timeout_ms = 2_000\ndeadline_ms = 3_000\nmax_batch_bytes = 4_000"
    )
    assert "webhook-signature" in request.headers
    assert len(receiver.events) == 1


@pytest.mark.parametrize("cert", ["'client.pem'", "['client.pem', 'client.key']"])
def test_the_file_names_the_certificate_of_the_client(run, outbox, tmp_path, monkeypatch, cert):
    monkeypatch.chdir(tmp_path)
    Path("outbox.toml").write_text(
        f"[destinations.default]\nurl = 'https://localhost'\nauth = 'none'\ncert = {cert}"
    )
    result = run("flush")
    assert result.exit_code == 2
    assert f"{tmp_path}/client.pem" in result.stderr
    assert "expected a file with a certificate and its key" in result.stderr


def test_http_to_another_machine_needs_to_be_allowed(run, outbox, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["flush", "--url", "http://ingest.invalid", "--no-auth"]
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert "requests would be sent unencrypted" in refused.stderr
    assert run(*arguments, "--allow-insecure").exit_code == 0
    Path("outbox.toml").write_text("[destinations.default]\nallow_insecure = true")
    assert run(*arguments).exit_code == 0


CLUSTER = """\
database = "sqlite:///outbox.db"
[destinations.default]
url = "http://ingest.internal:{port}/events"
path = ""
auth = "none"
allow_insecure = true
"""


def test_a_service_inside_a_cluster_without_a_token_takes_a_file_of_six_lines(tmp_path, monkeypatch, receiver):
    def find(host, *arguments, **settings):
        return found("127.0.0.1" if host == "ingest.internal" else host, *arguments, **settings)

    found = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", find)
    monkeypatch.chdir(tmp_path)
    file = CLUSTER.format(port=receiver.url.rpartition(":")[2])
    assert len(file.splitlines()) == 6
    Path("outbox.toml").write_text(file)
    enqueued = runner().invoke(main, ["enqueue"], input='{"event_type":"order_packed","order_id":"o-17"}')
    flushed = runner().invoke(main, ["flush", "--all"])
    assert (enqueued.exit_code, flushed.exit_code) == (0, 0), flushed.stderr
    assert [request.path for request in receiver.requests] == ["/events"]
    assert receiver.events == [{"event_type": "order_packed", "order_id": "o-17"}]
    assert AUTHORIZATION not in receiver.requests[0].headers
    Path("outbox.toml").write_text(file.replace("allow_insecure = true\n", ""))
    assert runner().invoke(main, ["flush"]).exit_code == 2
