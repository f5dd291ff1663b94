"""No credential shows up anywhere, no file is readable by others, and no other host hears of anything."""

from __future__ import annotations

import base64
import faulthandler
import gc
import gzip
import html
import http.client
import json
import logging
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import threading
import traceback
import urllib.parse
from contextlib import suppress
from pathlib import Path

import pytest

from builders import ROOT, row, rule_fired
from conditions import FOREVER_S
from outbox import Outbox, UploadFailure
from outbox.failures import ConfigurationError
from outbox.upload.auth import NO_AUTH, ApiKey
from outbox.upload.client import HttpClient
from outbox.upload.oauth import ClientCredentials
from peers import BATCH, HEAD, Peer, answers, read_request

# Tracebacks show the lines of this file, so it must not stand in one. Letters and digits only: no way of writing
# a text changes them, but base64 and writing all in percent.
CORE = secrets.token_hex(12)
CANARY = f"canary/+='&{CORE}%=="
# No upload here waits for it: each service answers or ends, however busy the machine is.
DEADLINE_MS = 30_000


def spellings(text):
    """The text as it is, with each byte percent-encoded, and in base64, wherever in a longer text it stands."""
    data = text.encode()
    yield text
    yield "".join(f"%{byte:02x}" for byte in data)
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + data).decode()
        yield encoded[4 if before else 0 : -4]


def assert_without_canary(text):
    text = text.decode("latin-1") if isinstance(text, bytes) else text
    for spelling in spellings(CORE):
        # No comparison that pytest would explain: a failure here must not print it either.
        found = text.lower().find(spelling.lower()) if "%" in spelling else text.find(spelling)
        if found >= 0:
            pytest.fail(f"the canary is in: …{text[max(0, found - 300) : found]}…", pytrace=True)


def as_crash_reports_show(error):
    """The texts that reports make of an error, with the local variables of all frames."""
    trace = traceback.TracebackException.from_exception(error, capture_locals=True)
    before = "" if error.__context__ is None else as_crash_reports_show(error.__context__)
    return f"{error!s} {error!r} {vars(error)!r} {''.join(trace.format())} {before}"


class Recorder(logging.Handler):
    """Keeps all that log records could show, with the local variables of their tracebacks."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.text = ""

    def emit(self, record):
        self.text += f"{record.name} {record.getMessage()} {vars(record)!r}\n"
        if record.exc_info and record.exc_info[1]:
            self.text += as_crash_reports_show(record.exc_info[1])


@pytest.fixture
def recorder():
    """Everything that any library logs."""
    root = logging.getLogger()
    level, kept = root.level, Recorder()
    root.addHandler(kept)
    root.setLevel(logging.DEBUG)
    yield kept
    root.removeHandler(kept)
    root.setLevel(level)


@pytest.fixture(autouse=True)
def _nothing_shows_the_canary(recorder, capfd, tmp_path, monkeypatch):
    """After each test: not the log, not the terminal, not a file."""
    monkeypatch.setattr(http.client.HTTPConnection, "debuglevel", 1)
    gc.freeze()  # the collection is of what this test leaves; one of all tests before it would take a second
    yield
    gc.collect()
    out, err = capfd.readouterr()
    for text in (recorder.text, out, err):
        assert_without_canary(text)
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "token":
            assert_without_canary(path.read_bytes())


# --- what the server says ---


def said(head):
    """The credentials of a request, which a server repeats."""
    query = head.split(" ")[1].partition("?")[2]
    return " ".join([query, *(line.partition(": ")[2] for line in head.split("\r\n") if "uthorization" in line)])


def document(body, headers=b""):
    return b"HTTP/1.1 500 No\r\n%sContent-Length: %d\r\n\r\n%s" % (headers, len(body), body)


ECHOES = {
    "body": lambda text: document(text.encode()),
    "body without an end": lambda text: HEAD + b"Content-Length: 9999\r\n\r\n" + text.encode(),
    "JSON": lambda text: document(json.dumps({"error": text}).replace("/", "\\/").encode()),
    "JSON, escaped": lambda text: document("".join(f"\\u{ord(char):04x}" for char in text).encode()),
    "URL": lambda text: document(urllib.parse.quote(text, safe="").encode()),
    "URL, all of it": lambda text: document("".join(f"%{byte:02X}" for byte in text.encode()).encode()),
    "URL, twice": lambda text: document(urllib.parse.quote(urllib.parse.quote(text, safe="")).encode()),
    "JSON in JSON": lambda text: document(json.dumps({"error": json.dumps(text).replace("/", "\\/")}).encode()),
    "UTF-16": lambda text: document(text.encode("utf-16")),
    "HTML": lambda text: document(html.escape(text).encode()),
    "gzip": lambda text: document(gzip.compress(text.encode()), b"Content-Encoding: gzip\r\n"),
    "reason": lambda text: f"HTTP/1.1 401 {text}\r\n\r\n".encode(),
    "status line": lambda text: f"{text}\r\n\r\n".encode(),
    "status": lambda text: f"HTTP/1.1 {text} No\r\n\r\n".encode(),
    "protocol": lambda text: f"HTTP/{text} 200 OK\r\n\r\n".encode(),
    "header": lambda text: document(b"", f"X-Echo: {text}\r\n".encode()),
    "header's name": lambda text: document(b"", f"{text}: 1\r\n".encode()),
    "line that is no header": lambda text: document(b"", f"X-Echo: 1\r\n{text}\r\n".encode()),
    "first line that is no header": lambda text: document(b"", f" {text}\r\n".encode()),
    "long header": lambda text: HEAD + b"X-Echo: " + text.encode() * 5_000 + b"\r\n\r\n",
    "many headers": lambda text: HEAD + f"X-Echo: {text}\r\n".encode() * 200 + b"\r\n",
    "Location": lambda text: f"HTTP/1.1 302 No\r\nLocation: /?{text}\r\nContent-Length: 0\r\n\r\n".encode(),
    "Set-Cookie": lambda text: document(b"", f"Set-Cookie: a={text}; Domain={text}; Expires={text}\r\n".encode()),
    "Retry-After": lambda text: f"HTTP/1.1 429 No\r\nRetry-After: {text}\r\n\r\n".encode(),
    "retryAfterSec": lambda text: document(f'{{"retryAfterSec":"{text}"}}'.encode()),
    "Content-Length": lambda text: HEAD + f"Content-Length: {text}\r\n\r\n".encode(),
    "two Content-Lengths": lambda text: HEAD + f"Content-Length: 1\r\nContent-Length: {text}\r\n\r\n".encode(),
    "Content-Encoding": lambda text: document(b"x", f"Content-Encoding: {text}\r\n".encode()),
    "Transfer-Encoding": lambda text: HEAD + f"Transfer-Encoding: {text}, chunked\r\n\r\n0\r\n\r\n".encode(),
    "chunk's size": lambda text: HEAD + f"Transfer-Encoding: chunked\r\n\r\n{text}\r\n".encode(),
    "chunk": lambda text: HEAD + f"Transfer-Encoding: chunked\r\n\r\n8\r\n{text}".encode(),
    "success": lambda text: f"HTTP/1.1 200 {text}\r\nX-Echo: {text}\r\n{text}\r\n\r\n{text}".encode(),
    "interim answer": lambda text: f"HTTP/1.1 103 {text}\r\nLink: {text}\r\n\r\n".encode(),
}


def with_canary(url, password=CANARY):
    return url.replace("//", f"//{urllib.parse.quote(CANARY, safe='')}:{urllib.parse.quote(password, safe='')}@")


def add_canary(request):
    request.headers["Authorization"] = f"Key {CANARY}"


def with_auth(auth, **settings):
    return lambda url: HttpClient(
        url,
        auth=auth(url) if callable(auth) and auth is not add_canary else auth,
        deadline_ms=DEADLINE_MS,
        **settings,
    )


WAYS = {
    "with user and password": with_auth((CANARY, CANARY)),
    "with a key": with_auth(ApiKey("X-Authorization", f"Key {CANARY}")),
    "with a callable": with_auth(add_canary),
    "with a header": with_auth(NO_AUTH, headers={"X-Authorization": CANARY}),
    "with a header from a callable": with_auth(NO_AUTH, headers={"X-Authorization": lambda: CANARY}),
    "with a query": with_auth(NO_AUTH, path=f"/hook?key={urllib.parse.quote(CANARY, safe='')}"),
    "to a token endpoint": with_auth(lambda url: ClientCredentials(url, "shop", CANARY)),
    "with results": lambda url: HttpClient(url, token=CANARY, deadline_ms=DEADLINE_MS, read_answer="results"),
    "directly": lambda url: HttpClient(url, token=CANARY, deadline_ms=DEADLINE_MS),
    "by a proxy": lambda url: HttpClient(
        "http://ingest.example",
        token=CANARY,
        deadline_ms=DEADLINE_MS,
        allow_insecure=True,
        proxies={"http": with_canary(url)},
    ),
    "by a proxy that takes a key": lambda url: HttpClient(
        "http://ingest.example",
        token=CANARY,
        deadline_ms=DEADLINE_MS,
        allow_insecure=True,
        proxies={"http": with_canary(url, password="")},
    ),
    "by a tunnel": lambda url: HttpClient(
        "https://ingest.example", token=CANARY, deadline_ms=DEADLINE_MS, proxies={"https": with_canary(url)}
    ),
}


# How the credentials go out decides what is redacted; where the server repeats them does not depend on it.
REPEATED = [
    *((echo, "directly") for echo in ECHOES),
    *((echo, way) for way in WAYS if way != "directly" for echo in ("body", "URL", "reason", "header", "success")),
]


@pytest.mark.parametrize(("echoed", "way"), REPEATED)
def test_credentials_that_a_server_repeats_are_shown_nowhere(outbox, echoed, way):
    echo, make_client = ECHOES[echoed], WAYS[way]
    heard = []

    def serve(connection, stopped):
        head, _ = read_request(connection)
        heard.append(any(spelling in head for spelling in spellings(CORE)))
        connection.sendall(echo(said(head)))

    row_id = outbox.enqueue(rule_fired())
    with Peer(serve) as peer, make_client(peer.url) as client:
        try:
            client.upload(BATCH)
        except UploadFailure as failure:
            assert_without_canary(as_crash_reports_show(failure))
        report = outbox.flush(client)

    assert any(heard), "the credentials were sent"
    assert_without_canary(repr(report))
    assert_without_canary(repr(row(outbox, row_id).last_error))
    assert_without_canary(repr(outbox.stats()))


# --- crashes ---


def fails(error):
    def fail(*args, **kwargs):
        raise error

    return fail


BREAKING_POINTS = [
    "outbox.upload.client.HttpClient._prepare",
    "outbox.upload.endpoint.Endpoint._adapter",
    "socket.getaddrinfo",
    "outbox.upload.deadline.Connection.send",
    "http.client.HTTPConnection.putheader",
    "outbox.upload.deadline._Response.begin",
    "outbox.upload.deadline._Reader.readinto",
    "requests.Response.__exit__",
    "outbox.upload.answer.redact",
]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LookupError("a bug")], ids=repr)
@pytest.mark.parametrize("place", BREAKING_POINTS)
def test_a_crash_in_the_middle_of_an_upload_carries_no_credentials_out(outbox, place, error, monkeypatch):
    outbox.enqueue(rule_fired())
    with Peer(answers(document(b"no"))) as peer, WAYS["by a proxy"](peer.url) as client:
        monkeypatch.setattr(place, fails(error))
        with pytest.raises(type(error)) as crash:
            outbox.flush(client)
        monkeypatch.undo()

    assert_without_canary(as_crash_reports_show(crash.value))
    assert crash.traceback[-1].name == "fail"
    assert outbox.pending_count() == 1


@pytest.mark.parametrize("token", [CANARY, lambda: CANARY], ids=["text", "callable"])
def test_a_bug_of_the_client_stores_no_credentials(outbox, token, monkeypatch):
    row_id = outbox.enqueue(rule_fired())
    with HttpClient("https://ingest.example", token=token) as client:
        monkeypatch.setattr(client, "_send", fails(LookupError(f"it was {CANARY}")))
        with pytest.raises(LookupError):
            outbox.flush(client)
    assert outbox.get(row_id).last_error == "client error: LookupError: it was [REDACTED-TOKEN]"


def test_a_batch_that_is_none_carries_no_credentials_out():
    with pytest.raises(AttributeError) as caught:
        HttpClient("https://ingest.example", token=CANARY).upload([object()])

    assert_without_canary(as_crash_reports_show(caught.value))


def test_a_token_callable_that_fails_carries_no_credentials_out():
    def token():
        keyring = {"token": CANARY}
        return keyring["tokne"]

    with pytest.raises(KeyError) as caught:
        HttpClient("https://ingest.example", token=token).upload(BATCH)

    assert_without_canary(as_crash_reports_show(caught.value))


def test_a_client_shows_no_credentials():
    for client in (HttpClient("https://ingest.example", token=CANARY), WAYS["by a tunnel"]("http://127.0.0.1:1")):
        assert_without_canary(f"{client!r} {client!s} {client}")


WRONG_SETTINGS = {
    "token of two words": lambda: HttpClient("https://ingest.example", token=f"two {CANARY}"),
    "token beyond latin-1": lambda: HttpClient("https://ingest.example", token=f"\u20ac{CANARY}"),
    "token over http": lambda: HttpClient("http://ingest.example", token=CANARY),
    "password in base_url": lambda: HttpClient(with_canary("https://ingest.example"), token=CANARY),
    "password in a wrong base_url": lambda: HttpClient(with_canary("https://[::1"), token=CANARY),
    "query in base_url": lambda: HttpClient(f"https://ingest.example?key={CANARY}", token=CANARY),
    "proxy of another kind": lambda: HttpClient(
        "https://ingest.example", token=CANARY, proxies={"https": with_canary("socks5://proxy.example")}
    ),
    "proxy that is none": lambda: HttpClient(
        "https://ingest.example", token=CANARY, proxies={"https": with_canary("http://[::1")}
    ),
    "proxy's password beyond latin-1": lambda: HttpClient(
        "https://ingest.example", token=CANARY, proxies={"https": f"http://u:\u20ac{CANARY}@proxy.example"}
    ),
    "time": lambda: HttpClient("https://ingest.example", token=CANARY, deadline_ms=0),
    "base_url that is no text": lambda: HttpClient(None, token=CANARY),
    "proxies that are no mapping": lambda: HttpClient("https://ingest.example", proxies=with_canary("http://x")),
    "token that is no text": lambda: HttpClient("https://ingest.example", token=[CANARY]),
    "CA bundle": lambda: HttpClient("https://ingest.example", token=CANARY, verify="/nowhere/ca.pem"),
}


@pytest.mark.parametrize("make", WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_settings_that_are_refused_carry_no_credentials_out(make):
    with pytest.raises(ConfigurationError) as caught:
        make()

    assert_without_canary(as_crash_reports_show(caught.value))


def test_a_refused_proxy_of_the_environment_carries_no_credentials_out(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", with_canary("socks5://proxy.example"))
    with pytest.raises(ConfigurationError) as caught:
        HttpClient("https://ingest.example", token=CANARY)

    assert_without_canary(as_crash_reports_show(caught.value))


def test_a_dump_of_all_threads_shows_no_credentials(tmp_path):
    with (tmp_path / "dump").open("wb+") as dump:

        def serve(connection, stopped):
            read_request(connection)
            faulthandler.dump_traceback(dump, all_threads=True)

        with Peer(serve) as peer, WAYS["directly"](peer.url) as client, pytest.raises(UploadFailure):
            client.upload(BATCH)
        dump.seek(0)
        assert b"upload" in dump.read()


# --- commands ---

VERBOSE = """
import http.client, logging, resource, sys, traceback
logging.basicConfig(level=logging.DEBUG)
http.client.HTTPConnection.debuglevel = 1
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core holds all that the process knew
sys.excepthook = lambda *error: print(*traceback.TracebackException(*error, capture_locals=True).format())
"""
SEVERAL = (
    "import sys; from outbox.cli import main; [main(one.split(), standalone_mode=False) for one in sys.argv[1:]]"
)
EVENT = b'{"event_type":"rule_fired","rule_ids":["r1"],"session_id":"s1","fired_at":"2026-11-24T12:00:00Z"}'


@pytest.fixture
def command(tmp_path):
    """Start a command that logs and reports as much as it can, with the canary as its token."""
    (tmp_path / "verbose").mkdir()
    (tmp_path / "verbose" / "sitecustomize.py").write_text(VERBOSE)
    started = []

    def start(*arguments, program=("-m", "outbox"), **environment):
        variables = {
            "OUTBOX_DATABASE_URL": f"sqlite:///{tmp_path / 'outbox.db'}",
            "OUTBOX_TOKEN": CANARY,
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "verbose"), str(ROOT)]),
            "PYTHONFAULTHANDLER": "1",
            **environment,
        }
        process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            umask=0,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process:
            process.kill()


@pytest.fixture
def run(command):
    """Run a command to its end, and return what it wrote."""

    def run_(*arguments, exit_code=0, given=b"", **environment):
        process = command(*arguments, **environment)
        written, _ = process.communicate(given, timeout=FOREVER_S)
        assert_without_canary(written)
        assert process.returncode == exit_code, written.decode()
        return written.decode()

    return run_


def process_list():
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            lines.append(path.read_bytes())
    return b" ".join(lines)


@pytest.mark.slow
def test_no_command_shows_credentials(run, tmp_path):
    processes = []

    def repeats_it(connection, stopped):
        processes.append(process_list())
        head, _ = read_request(connection)
        connection.sendall(b"HTTP/1.1 401 No\r\n\r\n" + said(head).encode())

    (tmp_path / "token").write_text(f"two {CANARY}")
    with Peer(repeats_it) as peer:
        direct = {"OUTBOX_URL": peer.url}
        tunnelled = {"OUTBOX_URL": "https://ingest.example", "HTTPS_PROXY": with_canary(peer.url)}
        run("upgrade")
        run("enqueue", given=EVENT)
        run("enqueue", given=b'{"event_type":"rule_fired"}', exit_code=2)
        run("flush", **tunnelled, exit_code=3)
        run("retry", "--all")
        assert "[REDACTED-TOKEN]" in run("flush", **direct, exit_code=3)
        shows = ("status", "list", "list --json", "show 1", "requeue --older-than 0s", "list --ndjson")
        run(*shows, "retry --all", "doctor", program=("-c", SEVERAL))
        run("flush", **direct, OUTBOX_TOKEN=f"two {CANARY}", exit_code=2)
        run("flush", **direct, OUTBOX_TOKEN="", OUTBOX_TOKEN_FILE=str(tmp_path / "token"), exit_code=2)
        run("flush", OUTBOX_URL=with_canary("https://ingest.example"), exit_code=2)
        run("flush", OUTBOX_URL="http://ingest.example", exit_code=2)
        run("flush", **tunnelled | {"HTTPS_PROXY": with_canary("socks5://proxy.example")}, exit_code=2)
        run("flush", **direct, OUTBOX_DATABASE_URL=f"sqlite:///{tmp_path / 'token'}", exit_code=1)
        run("receive", OUTBOX_TOKEN=f"two {CANARY}", exit_code=2)

    assert len(processes) == 2
    for seen in processes:
        assert sys.platform != "linux" or b"flush" in seen
        assert_without_canary(seen)


def test_a_command_that_crashes_shows_no_credentials(run, command):
    def kills(connection, stopped):
        read_request(connection)
        is_started.wait(FOREVER_S)
        flushing.send_signal(signal.SIGABRT)
        stopped.wait(FOREVER_S)

    is_started = threading.Event()
    run("enqueue", given=EVENT)
    with Peer(kills) as peer:
        flushing = command("flush", OUTBOX_URL=peer.url)
        is_started.set()
        written, _ = flushing.communicate(timeout=FOREVER_S)

    assert b"Fatal Python error: Aborted" in written
    assert_without_canary(written)


def test_the_receiver_shows_no_credentials(command):
    receiving = command("receive")
    receiving.stdin.close()
    url = next(line for line in iter(receiving.stdout.readline, b"") if line.startswith(b"http")).decode().strip()
    with HttpClient(url, token=CANARY) as client:
        client.upload(BATCH)
    with HttpClient(url, token=CANARY + "x") as client, pytest.raises(UploadFailure, match="401"):
        client.upload(BATCH)
    written = b"".join(receiving.stdout.readline() for _ in range(2))

    assert b": 401" in written
    assert_without_canary(written)


# --- other hosts ---

HEADERS_THAT_LEAD_AWAY = (
    "Location: {url}/cloud/observations",
    "Content-Location: {url}/",
    "Link: <{url}/>; rel=preload, <{url}/>; rel=preconnect",
    "Refresh: 0; url={url}/",
    'Alt-Svc: http/1.1="{host}"; ma=999',
    "Set-Cookie: session=1; Domain={host}; Path=/",
    'WWW-Authenticate: Digest realm="{url}", nonce="1"',
    'Proxy-Authenticate: Basic realm="{url}"',
    'Report-To: {{"endpoints":[{{"url":"{url}"}}],"group":"default","max_age":999}}',
)


@pytest.mark.parametrize(
    "status", [103, 200, 201, 300, 301, 302, 303, 305, 306, 307, 308, 401, 407, 421, 426, 429, 503, 511]
)
def test_nothing_that_a_server_says_leads_to_another_host(outbox, status, monkeypatch):
    elsewhere, heads, names = [], [], []

    def leads_away(connection, stopped):
        headers = "\r\n".join(HEADERS_THAT_LEAD_AWAY).format(url=other.url, host=f"127.0.0.1:{other.port}")
        while True:
            heads.append(read_request(connection)[0])
            connection.sendall(f"HTTP/1.1 {status} X\r\n{headers}\r\nContent-Length: 0\r\n\r\n".encode())

    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *args, **kw: (names.append(args[0]), look_up(*args, **kw))[1]
    )
    with Peer(lambda *_: elsewhere.append("a connection")) as other, Peer(leads_away) as peer:
        monkeypatch.setenv("HTTP_PROXY", other.url)
        with HttpClient(peer.url.replace("127.0.0.1", "localhost"), token=CANARY) as client:
            for _ in range(2):
                outbox.enqueue(rule_fired())
                outbox.retry_now()
                outbox.flush(client)

    assert elsewhere == []
    assert set(names) <= {"localhost", "127.0.0.1", "::1"}
    assert len(heads) >= 2
    assert all(head.startswith("POST /cloud/observations ") and "Cookie" not in head for head in heads)


# --- files ---


@pytest.fixture
def open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(sys.platform == "win32", reason="has no modes")
def test_the_files_of_a_database_are_for_their_owner_only(tmp_path, open_umask):
    with Outbox.open(f"sqlite:///{tmp_path / 'outbox.db'}") as outbox:
        outbox.enqueue(rule_fired())
        modes = {path.name: mode_of(path) for path in tmp_path.iterdir()}

    assert modes == {"outbox.db": 0o600, "outbox.db-wal": 0o600, "outbox.db-shm": 0o600}


@pytest.mark.skipif(sys.platform == "win32", reason="has no modes")
def test_the_store_of_the_receiver_is_for_its_owner_only(command, tmp_path):
    receiving = command("receive", "--store", str(tmp_path / "store" / "events"), OUTBOX_TOKEN="")
    assert receiving.wait(FOREVER_S) == 1, "the folder is not created"
    receiving = command("receive", "--store", str(tmp_path / "events"), OUTBOX_TOKEN="")
    receiving.stdin.close()
    url = next(line for line in iter(receiving.stdout.readline, b"") if line.startswith(b"http")).decode().strip()
    with HttpClient(url, token=CANARY) as client:
        client.upload(BATCH)

    assert mode_of(tmp_path / "events") == 0o600
