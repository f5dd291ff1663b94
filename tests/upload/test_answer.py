from __future__ import annotations

import gzip
import zlib

import pytest

from outbox.failures import TransportFailure
from outbox.testing.answers import Answer
from outbox.upload.client import HttpClient
from peers import HEAD, TOKEN, Peer, answers, failure_of, repeats

LATIN_TOKEN = "tökén-äöü-123"


@pytest.fixture
def client(server):
    with HttpClient(server.url, token=TOKEN) as made:
        yield made


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
        ("\x1b[2J\x07 \x7f\x9b", "\ufffd[2J\ufffd \ufffd\ufffd"),
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

    monkeypatch.setattr("outbox.upload.answer.zlib.decompressobj", Watched)
    server.script(Answer(500, gzip.compress(b"x" * 50_000_000), {"Content-Encoding": "gzip"}))

    assert failure_of(client).body_snippet == "x" * 200
    assert sizes == [64 * 1024 + 1]


@pytest.mark.parametrize("head", [HEAD, b"HTTP/1.1 500 \r\nTransfer-Encoding: chunked\r\n"])
def test_an_endless_body_is_read_to_64_kib(head):
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n" if b"chunked" in head else b"x" * 4096
    with Peer(repeats(head + b"\r\n", chunk)) as peer, HttpClient(peer.url, token=TOKEN) as client:
        assert failure_of(client).body_snippet == "x" * 200


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
        ("", {"Retry-After": "9" * 19}, 300_000),
        ("", {"Retry-After": "7, 9"}, 7_000),
        ("", {"Retry-After": "7 soon"}, None),
    ],
)
def test_the_delay_is_the_bodys_or_else_the_headers(server, client, noon, body, headers, delay_ms):
    server.script(Answer(429, body, headers))

    assert failure_of(client).retry_after_ms == delay_ms


def test_the_delay_to_a_date_is_exact(server, client, noon):
    server.script(Answer(429, headers={"Retry-After": "Tue, 24 Nov 2026 12:00:10 GMT"}))
    noon.travel(milliseconds=1)

    assert failure_of(client).retry_after_ms == 9_999


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


def test_of_a_line_that_is_no_status_no_more_is_kept_than_of_a_body():
    with Peer(answers(b"x" * 60_000 + b"\r\n")) as peer, HttpClient(peer.url, token=TOKEN) as client:
        assert str(failure_of(client)) == "transport: ConnectionError: " + "x" * (200 - len("ConnectionError: "))


@pytest.mark.parametrize("sent", [TOKEN, LATIN_TOKEN, LATIN_TOKEN.encode().decode("latin-1")])
def test_a_credential_is_taken_out_of_the_reason(server, sent):
    server.script(Answer(401, "", reason=f"not {sent}"))

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
