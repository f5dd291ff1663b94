"""What goes wrong between a client and its server, from the queue to the wire and back: each fault has its verdict,
ends by the deadline and in little memory, and the queue goes on."""

from __future__ import annotations

import re
import socket
import sys
import tracemalloc
import zlib
from contextlib import contextmanager
from itertools import repeat
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import row, rule_fired
from outbox.failures import UploadFailure
from outbox.upload.client import HttpClient
from peers import (
    ACCEPTED,
    BATCH,
    HEAD,
    TOKEN,
    Peer,
    answers,
    certificate,
    drips,
    read_request,
    repeats,
    reset,
    tls_peer,
)
from servers import free_port

DEADLINE_MS = 1_000
# Of uploads that end before their deadline, however busy the machine is.
FAR_DEADLINE_MS = 30_000
LITTLE_MEMORY = 16 * 1024 * 1024
PIECE = b"x" * 1024 * 1024


def client_of(peer, **settings):
    return HttpClient(peer.url, token=TOKEN, **{"deadline_ms": FAR_DEADLINE_MS, **settings})


def hangs_unread(connection, stopped):
    stopped.wait()


def hangs_after_reading(connection, stopped):
    read_request(connection)
    stopped.wait()


def resets(*pieces):
    """Send the pieces, each once the client has seen the one before, then reset the connection."""

    def serve(connection, stopped):
        read_request(connection)
        for piece in pieces:
            connection.sendall(piece)
            stopped.wait(0.05)
        reset(connection)

    return serve


def sends(head, pieces):
    def serve(connection, stopped):
        read_request(connection)
        connection.sendall(head)
        for piece in pieces:
            connection.sendall(piece)

    return serve


def gzip_bomb():
    packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    return b"".join([*map(packer.compress, repeat(PIECE, 60)), packer.flush()])


BOMB = gzip_bomb()
BOMB_HEADERS = b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB)
HUGE = b"Content-Length: %d\r\n\r\n" % (100 * len(PIECE))
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


class Fault(NamedTuple):
    serve: Any
    status: str
    error: str | None
    deadline_ms: int


def delivers(serve):
    return Fault(serve, "sent", None, FAR_DEADLINE_MS)


def delays(serve, error):
    """A transient failure; `error` is what the row says, a pattern where it depends on the system."""
    return Fault(serve, "pending", error, DEADLINE_MS if error == OVER else FAR_DEADLINE_MS)


def head(status_line, headers=b"Content-Length: 0\r\n"):
    return b"HTTP/1.1 %s\r\n%s\r\n" % (status_line, headers)


OVER = f"transport: no complete answer within {DEADLINE_MS} ms"
GONE = r"transport: ConnectionError: \[Errno \d+\] Connection reset by peer"

FAULTS = {
    # No answer
    "closed unanswered": delays(answers(b""), "transport: ConnectionError: Remote end closed connection.*"),
    "reset unanswered": delays(resets(), GONE),
    "reset in the headers": delays(resets(HEAD + b"X-Header: 1\r\n"), GONE),
    "reset after the headers": delays(
        resets(HEAD + b"Content-Length: 100\r\n\r\n"), r"transport: .*reset by peer.*"
    ),
    "reset in the body": delays(
        resets(HEAD + b"Content-Length: 100\r\n\r\n", b"x" * 50), r"transport: .*reset by peer.*"
    ),
    "hanging, request unread": delays(hangs_unread, OVER),
    "hanging, request read": delays(hangs_after_reading, OVER),
    "hanging after the headers": delays(repeats(HEAD + b"Content-Length: 9\r\n\r\n", b"", 0.02), OVER),
    # No end
    "dripping status line": delays(drips(b"HTTP/1.1 "), OVER),
    "dripping headers": delays(drips(HEAD + b"X-Header: "), OVER),
    "dripping body": delays(drips(HEAD + b"Content-Length: 100000\r\n\r\n"), OVER),
    "dripping body of a success": delivers(drips(head(b"200 OK", b"Content-Length: 100000\r\n"))),
    "endless body": delays(repeats(HEAD + b"\r\n", PIECE), "500 Internal Server Error: x{200}"),
    "endless body of a success": delivers(repeats(b"HTTP/1.1 200 OK\r\n\r\n", PIECE)),
    "endless chunk": delays(repeats(HEAD + CHUNKED + b"ffffffff\r\n", PIECE), "500 Internal Server Error: x{200}"),
    "endless chunk size": delays(repeats(HEAD + CHUNKED, b"1" * 65536), "transport: .*"),
    "endless status line": delays(repeats(b"HTTP/1.1 200 ", PIECE), "transport: .*got more than 65536 bytes.*"),
    "endless header": delays(repeats(HEAD + b"X-Header: ", PIECE), "transport: .*got more than 65536 bytes.*"),
    "endless headers": delays(repeats(HEAD, b"X-Header: 1\r\n"), "transport: .*got more than 100 headers.*"),
    "endless interim answers": delays(repeats(b"", head(b"100 Continue", b"")), OVER),
    "headers without end": delays(sends(HEAD + b"X-Header: 1\r\n", []), "500 Internal Server Error"),
    # Much
    "100 MB": delays(sends(HEAD + HUGE, repeat(PIECE, 100)), "500 Internal Server Error: x{200}"),
    "100 MB of a success": delivers(sends(b"HTTP/1.1 200 OK\r\n" + HUGE, repeat(PIECE, 100))),
    "100 MB of blanks": delays(sends(HEAD + HUGE, repeat(b" " * len(PIECE), 100)), "500 Internal Server Error"),
    "a gzip bomb": delays(sends(HEAD + BOMB_HEADERS, [BOMB]), "500 Internal Server Error: x{200}"),
    "a gzip bomb of a success": delivers(sends(b"HTTP/1.1 200 OK\r\n" + BOMB_HEADERS, [BOMB])),
    # Wrong
    "garbage in a success": delivers(answers(head(b"200 OK", b"Content-Length: 4\r\n") + b"\x00\xff{[")),
    "a success longer than it says": delivers(answers(head(b"200 OK", b"Content-Length: 2\r\n") + b"ok" + HEAD)),
    "a success shorter than it says": delivers(answers(head(b"200 OK", b"Content-Length: 9\r\n") + b"ok")),
    "a failure longer than it says": delays(
        answers(head(b"500 No", b"Content-Length: 2\r\n") + b"ok" + ACCEPTED), "500 No: ok"
    ),
    "a failure shorter than it says": delays(
        answers(head(b"500 No", b"Content-Length: 9\r\n") + b"ok"), r"transport: .*2 bytes read, 7 more expected.*"
    ),
    "a length that is no number": delays(answers(head(b"500 No", b"Content-Length: x\r\n") + b"ok"), "500 No: ok"),
    "a length below 0": delays(answers(head(b"500 No", b"Content-Length: -1\r\n") + b"ok"), "500 No: ok"),
    "two lengths": delays(
        answers(head(b"500 No", b"Content-Length: 2\r\nContent-Length: 3\r\n") + b"ok"), "transport: .*"
    ),
    "chunks that are none": delays(
        answers(HEAD + CHUNKED + b"nonsense\r\n"), "transport: ProtocolError: .*IncompleteRead.*"
    ),
    "a chunk of size -1": delays(
        repeats(HEAD + CHUNKED + b"-1\r\n", PIECE), "transport: ProtocolError: negative size"
    ),
    "a chunk of size -5": delays(
        answers(HEAD + CHUNKED + b"-5\r\nxxxxx\r\n"), "transport: ProtocolError: negative size"
    ),
    "a chunk of size -1 in a success": delivers(repeats(b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"-1\r\n", PIECE)),
    "gzip that is none": delays(
        answers(head(b"500 No", b"Content-Encoding: gzip\r\nContent-Length: 2\r\n") + b"ok"),
        "transport: error: Error -3 while decompressing data: incorrect header check",
    ),
    "lines that are no headers": delays(answers(b"HTTP/1.1 500 No\r\nno header\r\n\r\nok"), "500 No: ok"),
    "another protocol": delays(answers(b"220 smtp.example ESMTP\r\n"), "transport: .*220 smtp.example ESMTP.*"),
    "binary data": delays(answers(b"\x15\x03\x01\x00\x02\x02\x46\r\n"), "transport: ConnectionError: .*"),
    # Status lines
    "status 099": delays(answers(head(b"099 Low")), "transport: ConnectionError: HTTP/1.1 099 Low"),
    "status 600": delays(answers(head(b"600 High")), "600 High"),
    "status 999": delays(answers(head(b"999 High")), "999 High"),
    "status 1000": delays(answers(head(b"1000 High")), "transport: ConnectionError: HTTP/1.1 1000 High"),
    "status -200": delays(answers(head(b"-200 Low")), "transport: ConnectionError: HTTP/1.1 -200 Low"),
    "no status": delays(answers(b"HTTP/1.1\r\n\r\n"), "transport: ConnectionError: HTTP/1.1"),
    "no reason": delays(answers(head(b"503")), "503 Service Unavailable"),
    "an empty reason": delays(answers(head(b"503 ")), "503 Service Unavailable"),
    "a success without a reason": delivers(answers(head(b"200"))),
    "continue and success": delivers(answers(head(b"100 Continue", b"") + ACCEPTED)),
    "continue and failure": delays(answers(head(b"100 Continue", b"") + head(b"500 No")), "500 No"),
    "continue and nothing": delays(repeats(head(b"100 Continue", b""), b"", 0.02), OVER),
    "101": delays(answers(head(b"101 Switching Protocols", b"Upgrade: h2c\r\n")), "101 Switching Protocols"),
    "103": delays(answers(head(b"103 Early Hints", b"Link: </x>\r\n") + ACCEPTED), "103 Early Hints"),
    "301": delays(answers(head(b"301 Moved Permanently")), "301 Moved Permanently"),
    "302": delays(answers(head(b"302 Found")), "302 Found"),
    "303": delays(answers(head(b"303 See Other")), "303 See Other"),
    "307": delays(answers(head(b"307 Temporary Redirect")), "307 Temporary Redirect"),
    "308": delays(answers(head(b"308 Permanent Redirect")), "308 Permanent Redirect"),
}


@contextmanager
def little_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < LITTLE_MEMORY
    finally:
        tracemalloc.stop()


def check(outbox, row_id, fault):
    """The row has the fault's verdict."""
    found = row(outbox, row_id)
    assert found.status == fault.status
    assert found.retry_count == (fault.status == "pending")
    assert (found.last_error is None) == (fault.error is None)
    if fault.error is not None:
        assert re.fullmatch(fault.error, found.last_error), found.last_error


def check_that_it_goes_on(outbox, client):
    """What failed and what comes later are delivered."""
    client.deadline_ms = FAR_DEADLINE_MS
    last = outbox.enqueue(rule_fired())
    outbox.retry_now()
    outbox.flush_all(client)
    assert outbox.pending_count() == 0
    assert row(outbox, last).status == "sent"


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_the_answer_has_its_verdict_and_the_queue_goes_on(outbox, fault):
    row_id = outbox.enqueue(rule_fired())
    with Peer(fault.serve, answers(ACCEPTED)) as peer, client_of(peer, deadline_ms=fault.deadline_ms) as client:
        with little_memory():
            outbox.flush(client)
        check(outbox, row_id, fault)
        check_that_it_goes_on(outbox, client)


# --- before there is a connection ---


def test_a_refused_connection_has_its_verdict_and_the_queue_goes_on(outbox):
    row_id = outbox.enqueue(rule_fired())
    with HttpClient(f"http://127.0.0.1:{free_port()}", token=TOKEN) as client:
        outbox.flush(client)
        check(outbox, row_id, delays(None, r"transport: ConnectionError: \[Errno \d+\] Connection refused"))
    with Peer(answers(ACCEPTED)) as peer, client_of(peer) as client:
        check_that_it_goes_on(outbox, client)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a full backlog refuses")
@pytest.mark.parametrize("settings", [{"connect_timeout_ms": 100}, {"deadline_ms": 100}])
def test_a_connection_that_nobody_takes_has_its_verdict_and_the_queue_goes_on(outbox, settings):
    row_id = outbox.enqueue(rule_fired())
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        with (
            socket.create_connection(address),
            HttpClient(f"http://127.0.0.1:{address[1]}", token=TOKEN, **settings) as client,
        ):
            outbox.flush(client)
    words = "no complete answer within 100 ms" if "deadline_ms" in settings else "ConnectTimeout: timed out"
    check(outbox, row_id, delays(None, f"transport: {words}"))
    with Peer(answers(ACCEPTED)) as peer, client_of(peer) as client:
        check_that_it_goes_on(outbox, client)


# --- between two uploads ---


def test_a_connection_that_ends_between_two_uploads_is_replaced(outbox):
    first, second = outbox.enqueue(rule_fired()), rule_fired()
    with Peer(answers(ACCEPTED)) as peer, client_of(peer) as client:
        outbox.flush(client)
        peer.wait_for_the_end()
        second = outbox.enqueue(second)
        outbox.flush(client)

    assert (row(outbox, first).status, row(outbox, second).status) == ("sent", "sent")


# --- TLS ---


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    def make(name, **settings):
        return certificate(tmp_path_factory.mktemp(name), **settings)

    return {
        "good": make("good"),
        "strange": make("strange"),
        "expired": make("expired", until="20200102000000Z"),
        "other name": make("other", names="DNS:other.example"),
    }


@pytest.mark.parametrize(
    ("shown", "trusted", "error"),
    [
        ("strange", "good", "self.signed certificate.*"),
        ("expired", "expired", "certificate has expired.*"),
        ("other name", "other name", "IP address mismatch.*"),
    ],
)
def test_a_certificate_that_is_wrong_has_its_verdict_and_the_queue_goes_on(
    outbox, certificates, shown, trusted, error
):
    seen = []

    def serve(connection, stopped):
        seen.append(connection.recv(1))

    row_id = outbox.enqueue(rule_fired())
    with tls_peer(certificates[shown], serve) as peer, client_of(peer, verify=certificates[trusted]) as client:
        outbox.flush(client)
    check(outbox, row_id, delays(None, f"transport: SSLError: .*certificate verify failed: {error}"))
    assert seen in ([], [b""])
    with (
        tls_peer(certificates["good"], answers(ACCEPTED)) as peer,
        client_of(peer, verify=certificates["good"]) as client,
    ):
        check_that_it_goes_on(outbox, client)


# --- anything ---

SIZES = [b"0", b"1", b"5", b"-1", b"-5", b"+5", b"1_0", b"0x5", b"ffffffff", b"9" * 5_000, b"1;x=y", b"", b"x"]
TEXTS = [
    b"",
    b"x" * 70_000,
    b'{"retryAfterSec":5}',
    b"\xff\xfe\x00",
    TOKEN.encode(),
    zlib.compress(b"x"),
    b"\r\n\r\n",
]
VALUES = [
    *SIZES,
    *TEXTS,
    b"gzip",
    b"deflate",
    b"chunked",
    b"close",
    b"keep-alive",
    b"1, 2",
    b"Mon, 01 Jan 0001 00:00:00 +2359",
]
HEADERS = [
    b"Content-Length",
    b"Transfer-Encoding",
    b"Content-Encoding",
    b"Retry-After",
    b"Connection",
    b"Set-Cookie2",
    b"",
    b" X",
]
STATUSES = [b"200", b"204", b"100", b"103", b"401", b"429", b"503", b"999", b"20", b"-1", b"2_0"]

parts = st.sampled_from
lines = st.tuples(parts(HEADERS), parts([b": ", b":", b""]), parts(VALUES), parts([b"\r\n", b"\n", b""])).map(
    b"".join
)
chunks = st.tuples(parts(SIZES), parts([b"\r\n", b"\n"]), parts([b"a", b"abcde"]), parts([b"\r\n", b""])).map(
    b"".join
)
status_lines = st.tuples(
    parts([b"HTTP/1.1 ", b"HTTP/1.0 ", b""]), parts(STATUSES), parts([b" OK\r\n", b"\r\n", b" "])
)
bodies = st.one_of(parts(TEXTS), st.binary(max_size=50))
whole_answers = st.tuples(
    status_lines.map(b"".join), st.lists(lines, max_size=4).map(b"".join), parts([b"\r\n", b""]), bodies
).map(b"".join)
chunked_answers = st.lists(chunks, min_size=1, max_size=4).map(lambda sent: b"".join([HEAD, CHUNKED, *sent]))


@pytest.mark.traced
def test_any_answer_is_a_success_or_a_failure():
    said = []

    def serve(connection, stopped):
        read_request(connection)
        connection.sendall(said[-1])

    @settings(deadline=None, max_examples=300)
    @given(whole_answers | chunked_answers)
    def check_upload(answer):
        said.append(answer)
        try:
            client.upload(BATCH)
        except UploadFailure as failure:
            assert TOKEN not in str(failure)
            assert len(str(failure)) < 500
            assert not any(char < " " or "\x7f" <= char < "\xa0" for char in str(failure))

    with Peer(serve) as peer, client_of(peer) as client:
        check_upload()
