from __future__ import annotations

import base64
import copy
import gzip
import hashlib
import importlib.metadata
import json
import multiprocessing
import pickle
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import urllib.parse
import zlib
from contextlib import contextmanager
from typing import NamedTuple

import pytest
from freezegun import freeze_time

from outbox.client import HttpClient
from outbox.failures import ConfigurationError, HttpFailure, TransportFailure, UploadFailure
from outbox.receiver import Answer, Drop, Hang, IngestServer

TOKEN = "tok-123/abc+def=="  # noqa: S105 - made up
FOREVER_MS = 30_000


class Row(NamedTuple):
    id: int = 1
    payload_json: str = '{"a":1}'


BATCH = [Row()]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with IngestServer() as running:
        yield running


@pytest.fixture
def client(server):
    with HttpClient(server.url, token=TOKEN) as made:
        yield made


@pytest.fixture
def connections(server):
    """The addresses from which the server was connected to."""
    seen = []
    take = server._server.process_request

    def count(request, address):
        seen.append(address)
        take(request, address)

    server._server.process_request = count
    return seen


def failure_of(client, batch=BATCH):
    with pytest.raises(UploadFailure) as caught:
        client.upload(batch)
    return caught.value


class Peer:
    """A TCP server that does what `serve(connection, stopped)` says, one connection after the other."""

    def __init__(self, serve):
        self.stopped = threading.Event()
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        # Small, so that a large upload has to wait for the reader.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(FOREVER_MS / 1_000)
        self._listener.close()

    def _run(self):
        while not self.stopped.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    self._serve(connection, self.stopped)
                except OSError:
                    continue


def read_request(connection):
    """Return the head and the body of a request."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionError
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    length = int((head.lower() + b"\r\n").partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head.decode("latin-1"), body


def answers(text):
    def serve(connection, stopped):
        read_request(connection)
        connection.sendall(text)

    return serve


def repeats(head, piece, every_s=0.0):
    """Answer with the head, and then with the piece again and again."""

    def serve(connection, stopped):
        read_request(connection)
        connection.sendall(head)
        while not stopped.wait(every_s):
            connection.sendall(piece)

    return serve


def drips(head, piece=b"x"):
    return repeats(head, piece, every_s=0.02)


# --- the request ---


def test_a_batch_is_one_json_array_of_the_stored_texts(server, client):
    client.upload([Row(1, '{"b" : 1,"a":"\\u00e9"}'), Row(2, '{"c":"é"}')])

    (request,) = server.requests
    assert (request.path, request.events) == ("/cloud/observations", 2)
    assert list(server.received.values()) == ['{"b" : 1,"a":"\\u00e9"}', '{"c":"é"}']


def test_the_headers_say_what_is_sent_and_by_whom(server, client, monkeypatch):
    client.upload(BATCH)

    headers = dict(server.requests[0].headers)
    assert headers.pop("Host") == server.url.removeprefix("http://")
    assert len(headers.pop("Idempotency-Key")) == 32
    assert headers.pop("User-Agent").startswith("observation-outbox/")
    assert headers == {
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "Authorization": f"Bearer {TOKEN}",
        "Content-Length": "9",
        "Content-Type": "application/json",
    }


@pytest.mark.parametrize("version", ["1.2.3", None])
def test_the_user_agent_names_the_version(server, monkeypatch, version):
    def look_up(name):
        assert name == "observation-outbox"
        if version is None:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(importlib.metadata, "version", look_up)
    with HttpClient(server.url, token=TOKEN) as client:
        client.upload(BATCH)

    assert server.requests[0].headers["User-Agent"] == f"observation-outbox/{version or 0}"


@pytest.mark.parametrize("base", ["", "/", "/v1", "/v1/"])
def test_the_base_url_may_have_a_path_and_a_slash_at_its_end(server, base):
    with HttpClient(server.url + base, token=TOKEN) as client:
        client.upload(BATCH)

    assert server.requests[0].path == base.rstrip("/") + "/cloud/observations"


def test_the_same_rows_have_the_same_key_and_others_another(server, client):
    batches = (
        [Row(1, '{"a":1}'), Row(2, '{"a":2}')],
        [Row(1, '{"a":1}'), Row(2, '{"a":2}')],
        [Row(1, '{"a":1}'), Row(3, '{"a":2}')],
        [Row(1, '{"a":1}'), Row(2, '{"a":3}')],
        [Row(1, '{"a":1}')],
    )
    for batch in batches:
        client.upload(batch)

    keys = [request.headers["Idempotency-Key"] for request in server.requests]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def test_the_key_is_a_hash_of_ids_and_payloads(server, client):
    client.upload([Row(12, '{"a":1}')])

    expected = hashlib.sha256(b'12 7 {"a":1}').hexdigest()[:32]
    assert server.requests[0].headers["Idempotency-Key"] == expected


@pytest.mark.parametrize(("length", "is_compressed"), [(1024, False), (1025, True)])
def test_bodies_over_one_kib_are_compressed_on_request(server, length, is_compressed):
    payload = '{"a":"%s"}' % ("x" * (length - 10))
    with HttpClient(server.url, token=TOKEN, gzip=True) as client:
        client.upload([Row(1, payload)])

    assert list(server.received.values()) == [payload]
    assert ("Content-Encoding" in server.requests[0].headers) == is_compressed


def test_bodies_are_not_compressed_unless_told(server, client):
    client.upload([Row(1, '{"a":"%s"}' % ("x" * 5_000))])

    assert "Content-Encoding" not in server.requests[0].headers


# --- success and failure ---


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_every_2xx_is_success(server, client, status):
    server.script(Answer(status))

    assert client.upload(BATCH) is None


@pytest.mark.parametrize("status", [199, 300, 304, 400, 401, 403, 408, 422, 429, 500, 503, 599, 999])
def test_every_other_status_is_a_failure(server, client, status):
    server.script(Answer(status))

    failure = failure_of(client)

    assert isinstance(failure, HttpFailure)
    assert failure.status == status
    assert failure.__cause__ is None


def test_a_failure_says_status_reason_and_body(server, client):
    server.script(Answer(401, '{"error":"session_revoked"}'))

    assert str(failure_of(client)) == '401 Unauthorized: {"error":"session_revoked"}'


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_failures_and_not_followed(server, client, status):
    server.script(Answer(status, headers={"Location": f"{server.url}/cloud/observations"}))

    failure = failure_of(client)

    assert failure.status == status
    assert [request.status for request in server.requests] == [status]


@pytest.mark.parametrize("answer", [Answer(503, headers={"Retry-After": "1"}), Drop()])
def test_nothing_is_tried_twice(server, client, answer):
    server.script(answer)

    failure_of(client)

    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "sent", "shown"),
    [
        (503, None, "Service Unavailable"),
        (503, "", "Service Unavailable"),
        (599, "", ""),
        (503, "So   sorry", "So sorry"),
        (503, "x" * 300, "x" * 200),
    ],
)
def test_the_reason_is_the_servers_or_else_the_usual_one(server, client, status, sent, shown):
    server.script(Answer(status, reason=sent))

    assert failure_of(client).reason_phrase == shown


@pytest.mark.parametrize(
    ("body", "snippet"),
    [
        ("  two\r\n\t words\u00a0 ", "two words"),
        ("x" * 201, "x" * 200),
        ("é" * 201, "é" * 200),
        (b"\xff\xfeno text", "\ufffd\ufffdno text"),
        ("a\0b", "a\ufffdb"),
        (" \n ", ""),
        (" " * 70_000 + "late", ""),
    ],
)
def test_the_snippet_is_the_start_of_the_body_in_one_line(server, client, body, snippet):
    server.script(Answer(500, body))

    assert failure_of(client).body_snippet == snippet


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (gzip.compress(b"too  many", mtime=0), "gzip"),
        (gzip.compress(b"too  many", mtime=0), "X-GZIP"),
        (zlib.compress(b"too  many"), "deflate"),
        (b"too  many", "identity"),
        (b"too  many", "unheard-of"),
    ],
)
def test_a_compressed_body_is_read_although_none_was_asked_for(server, client, body, encoding):
    server.script(Answer(429, body, {"Content-Encoding": encoding}))

    assert failure_of(client).body_snippet == "too many"


def test_a_body_that_claims_to_be_compressed_and_is_not_is_no_answer(server, client):
    server.script(Answer(422, "plain", {"Content-Encoding": "gzip"}))

    assert str(failure_of(client)) == "transport: error: Error -3 while decompressing data: incorrect header check"


def test_a_gzip_bomb_does_not_expand(server, client, monkeypatch):
    sizes = []
    make = zlib.decompressobj

    class Watched:
        def __init__(self, *args):
            self._real = make(*args)

        def decompress(self, *args):
            data = self._real.decompress(*args)
            sizes.append(len(data))
            return data

    monkeypatch.setattr("outbox.answer.zlib.decompressobj", Watched)
    server.script(Answer(500, gzip.compress(b"x" * 50_000_000), {"Content-Encoding": "gzip"}))

    assert failure_of(client).body_snippet == "x" * 200
    assert sizes == [64 * 1024 + 1]


@pytest.mark.parametrize(
    ("body", "headers", "delay_ms"),
    [
        ('{"data":{"retryAfterSec":55}}', {}, 55_000),
        ('{"data":{"retryAfterSec":55}}', {"Retry-After": "7"}, 55_000),
        (" " * 1_000 + '{"retryAfterSec":55}', {}, 55_000),
        ('{"retryAfterSec":9,"text":"%s"}' % ("x" * 70_000), {}, 9_000),
        ("", {}, None),
        ("later", {"Retry-After": "7"}, 7_000),
        ("", {"Retry-After": " 7 "}, 7_000),
        ("", {"Retry-After": "0"}, 1_000),
        ("", {"Retry-After": "99999999999999999"}, 300_000),
        ("", {"Retry-After": "Tue, 24 Nov 2026 12:01:00 GMT"}, 60_000),
        ("", {"Retry-After": "Tuesday, 24-Nov-26 12:01:00 GMT"}, 60_000),
        ("", {"Retry-After": "Tue Nov 24 12:01:00 2026"}, 60_000),
        ("", {"Retry-After": "Tue, 24 Nov 2026 14:01:00 +0200"}, 60_000),
        ("", {"Retry-After": "Tue, 24 Nov 2026 11:00:00 GMT"}, 1_000),
        ("", {"Retry-After": "Tue, 24 Nov 2099 12:00:00 GMT"}, 300_000),
        ("", {"Retry-After": "-1"}, None),
        ("", {"Retry-After": "1.5"}, None),
        ("", {"Retry-After": "soon"}, None),
        ("", {"Retry-After": "Tue, 99 Nov 99999 12:01:00 GMT"}, None),
        ("", {"Retry-After": "9" * 19}, None),
    ],
)
def test_the_delay_is_the_bodys_or_else_the_headers(server, client, body, headers, delay_ms):
    server.script(Answer(429, body, headers))

    with freeze_time("2026-11-24T12:00:00Z"):
        assert failure_of(client).retry_after_ms == delay_ms


def test_a_date_is_never_rounded_to_too_early(server, client):
    server.script(Answer(429, headers={"Retry-After": "Tue, 24 Nov 2026 12:00:10 GMT"}))

    with freeze_time("2026-11-24T12:00:00.001Z"):
        assert failure_of(client).retry_after_ms == 10_000


# --- no answer ---


def test_a_refused_connection_is_a_transport_failure(server):
    server.stop()

    with HttpClient(server.url, token=TOKEN) as client:
        assert re.fullmatch(r"transport: ConnectionError: \[.*refused.*", str(failure_of(client)))


def test_a_name_that_does_not_resolve_is_a_transport_failure(monkeypatch):
    def fail(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with HttpClient("https://ingest.example", token=TOKEN) as client:
        assert str(failure_of(client)) == "transport: ConnectionError: [Errno -2] Name or service not known"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 422 \r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 422 \r\nTransfer-Encoding: chunked\r\n\r\n64\r\nshort",
        b"HTTP/1.1 422 \r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        b"HTTP/1.1 422 \r\n" + b"X-Header: 1\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 422 \r\nX-Header: " + b"x" * 100_000 + b"\r\n\r\n",
    ],
)
def test_an_answer_that_is_incomplete_or_unreadable_is_a_transport_failure(answer):
    with Peer(answers(answer)) as peer, HttpClient(peer.url, token=TOKEN) as client:
        assert isinstance(failure_of(client), TransportFailure)


def test_a_silent_server_is_given_up_after_the_read_timeout(server):
    server.script(Hang())

    with HttpClient(server.url, token=TOKEN, read_timeout_ms=50) as client:
        assert str(failure_of(client)) == "transport: ReadTimeout: timed out"


def test_a_failure_while_another_error_is_handled_tells_its_own_cause(server):
    server.stop()
    with HttpClient(server.url, token=TOKEN) as client:
        try:
            {}["something else"]
        except KeyError:
            assert "Connection refused" in str(failure_of(client))


def test_mistakes_in_the_program_go_through(client):
    with pytest.raises(AttributeError):
        client.upload([object()])


# --- the deadline ---

HEAD = b"HTTP/1.1 500 \r\n"
ACCEPTED = b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n"
OVER = "transport: no complete answer within 300 ms"


@pytest.mark.parametrize(
    "serve",
    [
        drips(b""),
        drips(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
        drips(HEAD + b"X-Header: "),
        drips(HEAD + b"Content-Length: 100000\r\n\r\n"),
        drips(HEAD + b"\r\n"),
        drips(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
    ids=["status line", "continue", "headers", "body", "body without length", "chunks"],
)
def test_a_dripping_answer_does_not_outlast_the_deadline(serve):
    with Peer(serve) as peer, HttpClient(peer.url, token=TOKEN, deadline_ms=300) as client:
        assert str(failure_of(client)) == OVER


def reads_slowly(connection, stopped):
    while not stopped.wait(0.02):
        connection.recv(100)


def reads_nothing(connection, stopped):
    stopped.wait()


@pytest.mark.parametrize("serve", [reads_slowly, reads_nothing])
def test_a_slow_upload_does_not_outlast_the_deadline(serve):
    batch = [Row(1, '"%s"' % ("x" * 20_000_000))]
    with Peer(serve) as peer, HttpClient(peer.url, token=TOKEN, deadline_ms=300) as client:
        assert str(failure_of(client, batch)) == OVER


def test_a_large_upload_arrives_whole(server, client):
    payload = '{"a":"%s"}' % ("x" * 5_000_000)

    client.upload([Row(1, payload)])

    assert list(server.received.values()) == [payload]


def test_an_upload_may_take_longer_than_the_connect_timeout():
    def serve(connection, stopped):
        stopped.wait(0.3)
        received = b""
        while not received.endswith(b'"]'):
            received = received[-2:] + connection.recv(65_536)
        connection.sendall(ACCEPTED)

    with Peer(serve) as peer, HttpClient(peer.url, token=TOKEN, connect_timeout_ms=100) as client:
        client.upload([Row(1, '"%s"' % ("x" * 20_000_000))])


def test_nothing_is_sent_when_connecting_took_until_the_deadline(server, monkeypatch):
    look_up = socket.getaddrinfo

    def look_up_slowly(*args, **kwargs):
        threading.Event().wait(0.01)
        return look_up(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up_slowly)
    with HttpClient(server.url, token=TOKEN, deadline_ms=5) as client:
        assert str(failure_of(client)) == "transport: no complete answer within 5 ms"

    assert server.requests == []


def test_the_deadline_holds_while_time_is_frozen():
    with (
        Peer(drips(HEAD)) as peer,
        HttpClient(peer.url, token=TOKEN, deadline_ms=300) as client,
        freeze_time("2026-11-24T12:00:00Z"),
    ):
        assert str(failure_of(client)) == OVER


def test_moving_a_frozen_clock_does_not_end_an_upload():
    with freeze_time("2026-11-24T12:00:00Z") as clock:

        def serve(connection, stopped):
            read_request(connection)
            clock.tick(3_600)
            connection.sendall(ACCEPTED)

        with Peer(serve) as peer, HttpClient(peer.url, token=TOKEN) as client:
            client.upload(BATCH)


@pytest.mark.parametrize("head", [HEAD, b"HTTP/1.1 500 \r\nTransfer-Encoding: chunked\r\n"])
def test_an_endless_body_is_read_to_64_kib(head):
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n" if b"chunked" in head else b"x" * 4096
    with Peer(repeats(head + b"\r\n", chunk)) as peer, HttpClient(peer.url, token=TOKEN) as client:
        assert failure_of(client).body_snippet == "x" * 200


@pytest.mark.parametrize("every_s", [0.0, 0.02])
@pytest.mark.parametrize("head", [b"", b"Content-Length: 100000\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_a_2xx_is_success_however_its_body_goes_on(head, every_s):
    serve = repeats(b"HTTP/1.1 200 \r\n" + head + b"\r\n", b"1\r\nx\r\n", every_s)
    with Peer(serve) as peer, HttpClient(peer.url, token=TOKEN) as client:
        client.upload(BATCH)
        client.upload(BATCH)


# --- connections ---


@pytest.mark.parametrize(
    "answer",
    [
        Answer(),
        Answer(204),
        Answer(200, "x" * 1_000),
        Answer(422, "x" * 64 * 1_024),
        Answer(429, '{"a":1}'),
        Answer(307, "x", {"Location": "http://127.0.0.1:1/"}),
    ],
)
def test_a_connection_is_used_again(server, client, connections, answer):
    server.script(answer, answer, answer)

    for _ in range(3):
        try:
            client.upload(BATCH)
        except HttpFailure as failure:
            assert failure.status == answer.status

    assert len(server.requests) == 3
    assert len(connections) == 1


def test_a_connection_that_the_server_closed_meanwhile_is_replaced(server, client):
    client.upload(BATCH)
    server.stop()
    server.start()

    client.upload(BATCH)

    assert [request.status for request in server.requests] == [200, 200]


def test_a_body_that_was_cut_does_not_spoil_the_next_answer(server, client):
    server.script(Answer(500, "x" * 1_000_000), Answer(200, "x" * 1_000_000), Answer(422, "next"))

    assert failure_of(client).status == 500
    client.upload(BATCH)
    assert failure_of(client).body_snippet == "next"


def test_each_thread_has_a_connection_of_its_own(server, client, connections):
    threads = [threading.Thread(target=client.upload, args=(BATCH,)) for _ in range(3)]
    together = threading.Barrier(3)
    server._decide, decide = lambda *args: (together.wait(FOREVER_MS / 1_000), decide(*args))[1], server._decide
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [request.status for request in server.requests] == [200, 200, 200]
    assert len(connections) == 3


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX") or sys.platform == "darwin", reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_leaves_the_parents_connection_alone(server, client, connections):
    client.upload(BATCH)
    child = multiprocessing.get_context("fork").Process(target=client.upload, args=(BATCH,))
    child.start()
    child.join(FOREVER_MS / 1_000)
    client.upload(BATCH)

    assert child.exitcode == 0
    assert [request.status for request in server.requests] == [200, 200, 200]
    assert len(connections) == 2


def test_closing_ends_the_connections_of_all_threads_and_uploading_opens_new_ones(server, client, connections):
    thread = threading.Thread(target=client.upload, args=(BATCH,))
    thread.start()
    thread.join()
    client.upload(BATCH)
    client.close()

    with server._server._changed:
        assert server._server._changed.wait_for(lambda: not server._server._open, FOREVER_MS / 1_000)
    client.upload(BATCH)
    assert len(connections) == 3


def test_cookies_are_not_sent_back(server, client):
    server.script(Answer(200, headers={"Set-Cookie": "session=1; Path=/"}))

    client.upload(BATCH)
    client.upload(BATCH)

    assert all("Cookie" not in request.headers for request in server.requests)


def test_netrc_is_not_read(server, tmp_path, monkeypatch):
    path = tmp_path / "netrc"
    path.write_text("machine 127.0.0.1 login someone password else\n")
    path.chmod(0o600)
    monkeypatch.setenv("NETRC", str(path))

    with HttpClient(server.url, token=TOKEN) as client:
        client.upload(BATCH)

    assert server.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"


# --- credentials ---


@pytest.mark.parametrize(
    ("token", "expected"),
    [(None, False), ("", False), (TOKEN, True), (lambda: None, False), (lambda: TOKEN, True)],
)
def test_logged_in_means_that_there_is_a_token(token, expected):
    assert HttpClient("https://ingest.example", token=token).logged_in is expected


def test_the_token_is_asked_for_before_each_upload(server):
    tokens = iter(["first-token", "second-token"])
    with HttpClient(server.url, token=lambda: next(tokens)) as client:
        client.upload(BATCH)
        client.upload(BATCH)

    sent = [request.headers["Authorization"] for request in server.requests]
    assert sent == ["Bearer first-token", "Bearer second-token"]


@pytest.mark.parametrize("token", [None, lambda: None, lambda: ""])
def test_without_a_token_nothing_is_sent(server, token):
    with HttpClient(server.url, token=token) as client:
        assert str(failure_of(client)) == "transport: token: none there, not logged in"

    assert server.requests == []


BAD_TOKENS = [
    "two words",
    "line\nbreak",
    " padded",
    "nul\0",
    "no-break\u00a0space",
    "c1-\x85-control",
    "emoji-\U0001f600",
]


@pytest.mark.parametrize("token", BAD_TOKENS)
def test_a_token_that_can_not_be_sent_is_refused_without_showing_it(token):
    with pytest.raises(ConfigurationError, match=r"^token: .* expected one word of latin-1$") as caught:
        HttpClient("https://ingest.example", token=token)

    assert token not in str(caught.value)


@pytest.mark.parametrize("token", [*BAD_TOKENS, b"bytes", 1])
def test_a_token_from_the_callable_that_can_not_be_sent_is_a_transport_failure(server, token):
    with HttpClient(server.url, token=lambda: token) as client:
        failure = failure_of(client)

    assert str(failure).startswith("transport: token: ")
    assert str(token) not in str(failure)
    assert server.requests == []


def test_what_the_callable_raises_goes_through(server):
    def token():
        raise LookupError("no keyring")

    client = HttpClient(server.url, token=token)

    with pytest.raises(LookupError, match="no keyring"):
        client.upload(BATCH)
    with pytest.raises(LookupError, match="no keyring"):
        _ = client.logged_in


def test_a_token_beyond_ascii_is_sent_as_latin_1(server):
    with HttpClient(server.url, token="tökén") as client:
        client.upload(BATCH)

    assert server.requests[0].headers["Authorization"] == "Bearer tökén"


@pytest.mark.parametrize(
    "url", ["http://ingest.example", "http://127.evil.example", "http://10.0.0.1", "HTTP://[::2]"]
)
@pytest.mark.parametrize("token", [TOKEN, lambda: TOKEN])
def test_a_token_is_not_sent_in_plain_text_to_another_machine(url, token):
    with pytest.raises(ConfigurationError, match="readable on its way; expected https") as caught:
        HttpClient(url, token=token)

    assert TOKEN not in str(caught.value)
    assert HttpClient(url, token=token, allow_insecure=True).logged_in
    assert not HttpClient(url).logged_in


@pytest.mark.parametrize(
    "url",
    ["http://localhost:80", "http://LOCALHOST", "http://127.9.9.9", "http://[::1]:8080", "https://ingest.example"],
)
def test_a_token_may_go_to_this_machine_or_over_https(url):
    assert HttpClient(url, token=TOKEN).logged_in


def test_the_token_is_not_shown_and_does_not_travel(client):
    assert TOKEN not in repr(client)
    assert repr(client).startswith("HttpClient('http://127.0.0.1:")
    for copies in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match="can't be pickled"):
            copies(client)


LATIN_TOKEN = "tökén-äöü-123"  # noqa: S105 - made up


@pytest.mark.parametrize(
    ("token", "spelling"),
    [
        (TOKEN, TOKEN),
        (TOKEN, json.dumps(TOKEN).replace("/", "\\/")),
        (TOKEN, TOKEN.replace("+", "\\u002B").replace("=", "\\u003d")),
        (TOKEN, urllib.parse.quote(TOKEN)),
        (TOKEN, urllib.parse.quote(TOKEN, safe="")),
        (TOKEN, urllib.parse.quote(TOKEN, safe="").lower()),
        ('quote"back\\slash', json.dumps('quote"back\\slash')[1:-1]),
        (LATIN_TOKEN, LATIN_TOKEN),
        (LATIN_TOKEN, LATIN_TOKEN.encode("latin-1")),
        (LATIN_TOKEN, json.dumps(LATIN_TOKEN)[1:-1]),
        (LATIN_TOKEN, urllib.parse.quote(LATIN_TOKEN)),
        ("12345678", "12345678"),
    ],
)
def test_a_credential_is_taken_out_of_the_body_however_it_is_spelled(server, token, spelling):
    spelling = spelling if isinstance(spelling, bytes) else spelling.encode()
    server.script(Answer(401, b"Bearer " + spelling + b" and " + spelling + b" end"))

    with HttpClient(server.url, token=token) as client:
        snippet = failure_of(client).body_snippet

    assert snippet.replace('"', "") == "Bearer [REDACTED-TOKEN] and [REDACTED-TOKEN] end"


def test_a_text_shorter_than_8_characters_is_left_alone(server):
    server.script(Answer(401, "error 1234567"))

    with HttpClient(server.url, token="1234567") as client:
        assert failure_of(client).body_snippet == "error 1234567"


@pytest.mark.parametrize("sent", [TOKEN, LATIN_TOKEN, LATIN_TOKEN.encode().decode("latin-1")])
def test_a_credential_is_taken_out_of_the_reason(server, sent):
    server.script(Answer(401, reason=f"not {sent}"))

    with HttpClient(server.url, token=TOKEN if sent == TOKEN else LATIN_TOKEN) as client:
        assert str(failure_of(client)) == "401 not [REDACTED-TOKEN]"


def test_a_credential_is_taken_out_before_the_body_is_cut_to_the_snippet(server, client):
    server.script(Answer(401, "x" * 195 + TOKEN))

    assert failure_of(client).body_snippet == "x" * 195 + "[REDA"


@pytest.mark.parametrize("shown", range(1, len(TOKEN)))
def test_the_beginning_of_a_credential_at_the_cut_is_not_kept(server, client, shown):
    blanks = 64 * 1024 - len("start") - shown
    server.script(Answer(401, "start" + " " * blanks + TOKEN + " end"))

    assert failure_of(client).body_snippet == "start"


def test_the_beginning_of_a_credential_at_the_cut_of_a_compressed_body_is_not_kept(server, client):
    body = gzip.compress(b"start" + b" " * (64 * 1024 - 10) + TOKEN.encode())
    server.script(Answer(401, body, {"Content-Encoding": "gzip"}))

    assert failure_of(client).body_snippet == "start"


def test_a_credential_is_taken_out_of_a_transport_failure():
    answer = f"nonsense {TOKEN} nonsense\r\n\r\n".encode()
    with Peer(answers(answer)) as peer, HttpClient(peer.url, token=TOKEN) as client:
        failure = failure_of(client)

    assert str(failure) == "transport: ConnectionError: nonsense [REDACTED-TOKEN] nonsense"
    assert failure.__context__ is None


# --- settings ---


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ingest.example",
        "ftp://ingest.example",
        "https://",
        "https:///path",
        "https://:443",
        "https://ingest.example:port",
        "https://ingest.example:99999",
        "https://ingest .example",
        " https://ingest.example",
        "https://ingest.example/\n",
        "https://ingest.example\\@evil.example",
        "https://user:password@ingest.example",
        "https://ingest.example/?api_key=password",
        "https://ingest.example/#password",
        "https://[::1",
        "https://*.example",
        f"https://{'x' * 64}\u00e9.example",
    ],
)
def test_a_url_that_can_not_work_is_refused(url):
    with pytest.raises(
        ConfigurationError, match=r"^base_url is .*, expected http:// or https://, a host"
    ) as caught:
        HttpClient(url, token=TOKEN)

    assert "password" not in str(caught.value)


@pytest.mark.parametrize("name", ["connect_timeout_ms", "read_timeout_ms", "deadline_ms"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "5"])
def test_a_time_that_can_not_work_is_refused(name, value):
    with pytest.raises(ConfigurationError, match=f"^{name} is .*, expected a whole number above 0$"):
        HttpClient("https://ingest.example", **{name: value})


def test_the_deadline_is_there_to_be_checked():
    assert HttpClient("https://ingest.example").deadline_ms == 45_000
    assert HttpClient("https://ingest.example", deadline_ms=7).deadline_ms == 7


# --- proxies ---


class Proxy:
    """A proxy for plain requests and tunnels, all of which it leads to one server."""

    def __init__(self, target):
        self.heads = []
        self._target = target

    def __call__(self, connection, stopped):
        head, body = read_request(connection)
        self.heads.append(head)
        with socket.create_connection(("127.0.0.1", self._target)) as onward:
            if head.startswith("CONNECT "):
                connection.sendall(b"HTTP/1.1 200 go\r\n\r\n")
                back = threading.Thread(target=pump, args=(onward, connection))
                back.start()
                pump(connection, onward)
                back.join()
            else:
                onward.sendall(head.encode("latin-1") + b"\r\nConnection: close\r\n\r\n" + body)
                pump(onward, connection)


def pump(source, sink):
    try:
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return


@contextmanager
def proxied(server):
    proxy = Proxy(int(server.url.rpartition(":")[2]))
    with Peer(proxy) as peer:
        yield proxy, peer.url


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_used(server, monkeypatch, name):
    with proxied(server) as (proxy, url):
        monkeypatch.setenv(name, url.removeprefix("http://") if name == "ALL_PROXY" else url)
        with HttpClient("http://ingest.example/v1", token=TOKEN, allow_insecure=True) as client:
            monkeypatch.delenv(name)  # it was read once
            client.upload(BATCH)

    assert proxy.heads[0].startswith("POST http://ingest.example/v1/cloud/observations HTTP/1.1\r\n")
    assert len(server.received) == 1


def test_no_proxy_of_the_environment_is_honoured(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "ingest.example")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.0.1", server._port))])

    with HttpClient(f"http://ingest.example:{server._port}", token=TOKEN, allow_insecure=True) as client:
        client.upload(BATCH)

    assert len(server.received) == 1


def test_a_proxy_of_the_environment_does_not_see_what_is_for_this_machine(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")

    with HttpClient(server.url, token=TOKEN) as client:
        client.upload(BATCH)

    assert len(server.received) == 1


def test_given_proxies_replace_those_of_the_environment(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with proxied(server) as (proxy, url):
        with HttpClient(server.url, token=TOKEN, proxies={"http": url}) as client:
            client.upload(BATCH)
        assert len(proxy.heads) == 1
        with HttpClient(server.url, token=TOKEN, proxies={}) as client:
            client.upload(BATCH)
        assert len(proxy.heads) == 1


PASSWORD = "p@ss:wörd/1"  # noqa: S105 - made up


def with_password(url):
    return url.replace("//", f"//someone:{urllib.parse.quote(PASSWORD, safe='')}@")


def test_a_proxy_is_told_user_and_password(server):
    with (
        proxied(server) as (proxy, url),
        HttpClient(server.url, token=TOKEN, proxies={"http": with_password(url)}) as client,
    ):
        client.upload(BATCH)

    basic = base64.b64encode(f"someone:{PASSWORD}".encode("latin-1")).decode()
    assert f"\r\nProxy-Authorization: Basic {basic}" in proxy.heads[0]


@pytest.mark.parametrize(
    "spelling",
    [
        PASSWORD,
        urllib.parse.quote(PASSWORD, safe=""),
        json.dumps(PASSWORD)[1:-1],
        base64.b64encode(f"someone:{PASSWORD}".encode("latin-1")).decode(),
    ],
)
def test_a_proxys_password_is_taken_out_of_failures(server, spelling):
    server.script(Answer(502, f"not {spelling}"))
    with (
        proxied(server) as (_, url),
        HttpClient(server.url, token=TOKEN, proxies={"http": with_password(url)}) as client,
    ):
        assert failure_of(client).body_snippet == "not [REDACTED-TOKEN]"


@pytest.mark.parametrize(
    "proxy",
    [
        "socks5://127.0.0.1:1",
        "http://",
        "ftp://u:password@h",
        "http://u:password@[::1",
        "http://u:password%e2%82%ac@h",
    ],
)
def test_a_proxy_that_can_not_be_used_is_refused_without_showing_it(proxy):
    with pytest.raises(ConfigurationError, match=r"proxy for base_url .* expected http:// or https://") as caught:
        HttpClient("https://ingest.example", token=TOKEN, proxies={"https": proxy})

    assert "u:password" not in str(caught.value)


def test_a_proxy_that_refuses_is_a_transport_failure():
    refusal = f"HTTP/1.1 407 {PASSWORD} needed\r\n\r\n".encode("latin-1")
    with (
        Peer(answers(refusal)) as peer,
        HttpClient("https://ingest.example", token=TOKEN, proxies={"https": with_password(peer.url)}) as client,
    ):
        failure = failure_of(client)

    assert str(failure) == "transport: ProxyError: Tunnel connection failed: 407 [REDACTED-TOKEN] needed"


def test_a_dripping_proxy_does_not_outlast_the_deadline():
    with (
        Peer(drips(b"HTTP/1.1 200 go\r\nX-Header: ")) as peer,
        HttpClient("https://ingest.example", token=TOKEN, proxies={"https": peer.url}, deadline_ms=300) as client,
    ):
        assert str(failure_of(client)) == OVER


# --- TLS ---


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate for localhost and 127.0.0.1 that no authority has signed, and its key, in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    path = folder / "both.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([*command, *names, *files], check=True, capture_output=True)
    path.write_bytes((folder / "key.pem").read_bytes() + (folder / "cert.pem").read_bytes())
    return path


@contextmanager
def tls_peer(certificate, serve):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def serve_tls(connection, stopped):
        with context.wrap_socket(connection, server_side=True) as secure:
            serve(secure, stopped)

    with Peer(serve_tls) as peer:
        peer.url = f"https://127.0.0.1:{peer.port}"
        yield peer


def test_an_unknown_certificate_is_a_transport_failure(certificate):
    with tls_peer(certificate, answers(ACCEPTED)) as peer, HttpClient(peer.url, token=TOKEN) as client:
        assert "certificate verify failed" in str(failure_of(client))


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_ca_bundle_of_the_environment_is_used(certificate, monkeypatch, name):
    monkeypatch.setenv(name, str(certificate))
    with tls_peer(certificate, answers(ACCEPTED)) as peer, HttpClient(peer.url, token=TOKEN) as client:
        monkeypatch.delenv(name)  # it was read once
        client.upload(BATCH)


def test_a_given_ca_bundle_replaces_that_of_the_environment(certificate, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere")
    with tls_peer(certificate, answers(ACCEPTED)) as peer:
        with HttpClient(peer.url, token=TOKEN, verify=certificate) as client:
            client.upload(BATCH)
        with HttpClient(peer.url, token=TOKEN, verify=True) as client:
            assert "certificate verify failed" in str(failure_of(client))


def test_a_certificate_for_another_name_is_a_transport_failure(certificate, monkeypatch):
    with tls_peer(certificate, answers(ACCEPTED)) as peer:
        address = ("127.0.0.1", peer.port)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", address)])
        with HttpClient(f"https://ingest.example:{peer.port}", token=TOKEN, verify=certificate) as client:
            assert "certificate verify failed: Hostname mismatch" in str(failure_of(client))


def test_a_ca_bundle_that_is_not_there_is_refused():
    with pytest.raises(ConfigurationError, match="is '/nowhere', expected an existing file or folder"):
        HttpClient("https://ingest.example", token=TOKEN, verify="/nowhere")


def test_tls_goes_through_a_proxys_tunnel(certificate):
    with tls_peer(certificate, answers(ACCEPTED)) as peer:
        proxy = Proxy(peer.port)
        with (
            Peer(proxy) as way,
            HttpClient(peer.url, token=TOKEN, verify=certificate, proxies={"https": way.url}) as client,
        ):
            client.upload(BATCH)

    assert proxy.heads[0].startswith(f"CONNECT 127.0.0.1:{peer.port} ")
    assert TOKEN not in proxy.heads[0]


@pytest.mark.parametrize("serve", [drips(b""), drips(HEAD + b"\r\n"), reads_slowly, reads_nothing])
def test_the_deadline_holds_over_tls(certificate, serve):
    batch = [Row(1, '"%s"' % ("x" * 20_000_000))] if serve in (reads_slowly, reads_nothing) else BATCH
    with (
        tls_peer(certificate, serve) as peer,
        HttpClient(peer.url, token=TOKEN, verify=certificate, deadline_ms=300) as client,
    ):
        assert str(failure_of(client, batch)) == OVER


def test_a_dripping_handshake_does_not_outlast_the_deadline():
    def serve(connection, stopped):
        connection.recv(65536)
        connection.sendall(b"\x16\x03\x03\x40\x00")
        while not stopped.wait(0.02):
            connection.sendall(b"x")

    with Peer(serve) as peer:
        url = peer.url.replace("http:", "https:")
        with HttpClient(url, token=TOKEN, deadline_ms=300) as client:
            assert str(failure_of(client)) == OVER


def test_plain_text_in_place_of_tls_is_a_transport_failure(server):
    with HttpClient(server.url.replace("http:", "https:"), token=TOKEN) as client:
        assert str(failure_of(client)).startswith("transport: ")
