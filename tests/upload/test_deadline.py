from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
from urllib3.util.connection import create_connection

from outbox.failures import UploadFailure
from outbox.upload import deadline
from outbox.upload.client import HttpClient
from outbox.upload.deadline import Progress, progress
from peers import (
    ACCEPTED,
    BATCH,
    HEAD,
    TOKEN,
    Peer,
    Proxy,
    Row,
    answers,
    drips,
    failure_of,
    read_request,
    repeats,
    tls_peer,
)

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


def test_after_a_request_that_could_not_be_sent_in_time_no_answer_is_waited_for(monkeypatch):
    """Else a service that takes nothing more of a request would be waited for twice as long."""
    reads = []
    monkeypatch.setattr(deadline._Reader, "readinto", lambda *_: reads.append("a read") or 0)
    batch = [Row(1, '"%s"' % ("x" * 20_000_000))]
    with Peer(reads_nothing) as peer, HttpClient(peer.url, token=TOKEN, read_timeout_ms=50) as client:
        assert str(failure_of(client, batch)).startswith("transport: ")
    assert reads == []


@pytest.mark.parametrize(("total_ms", "left_s"), [(100, 0.1), (5_000, 0.5)])
def test_a_deadline_can_only_be_moved_forward(monkeypatch, total_ms, left_s):
    monkeypatch.setattr(deadline, "monotonic_s", lambda: 0.0)
    one = Progress(total_ms, 60)
    one.shorten(500)
    assert one.timeout() == left_s


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


def test_the_deadline_holds_while_time_is_frozen(noon):
    with Peer(drips(HEAD)) as peer, HttpClient(peer.url, token=TOKEN, deadline_ms=300) as client:
        assert str(failure_of(client)) == OVER


def test_moving_a_frozen_clock_does_not_end_an_upload(noon):
    def serve(connection, stopped):
        read_request(connection)
        noon.travel(hours=1)
        connection.sendall(ACCEPTED)

    with Peer(serve) as peer, HttpClient(peer.url, token=TOKEN) as client:
        client.upload(BATCH)


@pytest.mark.parametrize("every_s", [0.0, 0.02])
@pytest.mark.parametrize("head", [b"", b"Content-Length: 100000\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_a_2xx_is_success_however_its_body_goes_on(head, every_s):
    serve = repeats(b"HTTP/1.1 200 \r\n" + head + b"\r\n", b"1\r\nx\r\n", every_s)
    with Peer(serve) as peer, HttpClient(peer.url, token=TOKEN) as client:
        client.upload(BATCH)
        client.upload(BATCH)


def test_a_dripping_proxy_does_not_outlast_the_deadline():
    with (
        Peer(drips(b"HTTP/1.1 200 go\r\nX-Header: ")) as peer,
        HttpClient("https://ingest.example", token=TOKEN, proxies={"https": peer.url}, deadline_ms=300) as client,
    ):
        assert str(failure_of(client)) == OVER


@pytest.mark.parametrize("serve", [drips(b""), drips(HEAD + b"\r\n"), reads_slowly, reads_nothing])
def test_the_deadline_holds_over_tls(trusted, serve):
    batch = [Row(1, '"%s"' % ("x" * 20_000_000))] if serve in (reads_slowly, reads_nothing) else BATCH
    with (
        tls_peer(trusted, serve) as peer,
        HttpClient(peer.url, token=TOKEN, verify=trusted, deadline_ms=300) as client,
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


def drips_after(count):
    """A proxy's tunnel that lets so many bytes of the server through, and then drips."""

    def pump(source, sink, stopped):
        left = count
        with suppress(OSError):
            while piece := source.recv(1):
                sink.sendall(piece)
                left -= 1
                if left < 0:
                    stopped.wait(0.02)

    return pump


@pytest.mark.parametrize("count", [5, 3_000], ids=["handshake", "answer"])
@pytest.mark.parametrize("over_tls", [False, True])
def test_a_dripping_tunnel_does_not_outlast_the_deadline(trusted, count, over_tls):
    answer = answers(b"HTTP/1.1 500 No\r\nContent-Length: 9000\r\n\r\n" + b"x" * 9_000)
    with tls_peer(trusted, answer) as peer:
        proxy = Proxy(peer.port, drips_after(count))
        way = tls_peer(trusted, proxy) if over_tls else Peer(proxy)
        with (
            way as through,
            HttpClient(
                peer.url, token=TOKEN, verify=trusted, proxies={"all": through.url}, deadline_ms=600
            ) as client,
        ):
            assert str(failure_of(client)) == "transport: no complete answer within 600 ms"


def test_a_handshake_is_given_what_connecting_left(trusted, monkeypatch):
    given = []
    connect, shake = create_connection, ssl.SSLSocket.do_handshake

    def connects_slowly(*arguments, **options):
        sock = connect(*arguments, **options)
        progress().shorten(200)  # as if connecting had taken the rest
        return sock

    def shakes(sock, *arguments):
        given.append(sock.gettimeout())
        shake(sock, *arguments)

    monkeypatch.setattr("urllib3.util.connection.create_connection", connects_slowly)
    monkeypatch.setattr(ssl.SSLSocket, "do_handshake", shakes)
    with (
        tls_peer(trusted, answers(ACCEPTED)) as peer,
        HttpClient(peer.url, token=TOKEN, verify=trusted) as client,
        suppress(UploadFailure),
    ):
        client.upload(BATCH)
    assert given
    assert max(one for one in given if one) <= 0.2


@pytest.fixture
def dead_addresses(monkeypatch):
    """Eight addresses behind one name, none of which ever accepts: their queues are full."""
    listening, waiting = [], []
    for number in range(2, 10):
        dead = socket.create_server(
            (f"127.0.0.{number}", 0 if not listening else listening[0].getsockname()[1]), backlog=0
        )
        listening.append(dead)
        for _ in range(4):
            caller = socket.socket()
            caller.setblocking(False)
            caller.connect_ex(dead.getsockname())
            waiting.append(caller)
    port = listening[0].getsockname()[1]
    real = socket.getaddrinfo

    def several(host, *arguments, **options):
        if host != "many.test":
            return real(host, *arguments, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (dead.getsockname()[0], port)) for dead in listening]

    monkeypatch.setattr(socket, "getaddrinfo", several)
    yield f"http://many.test:{port}"
    for opened in (*listening, *waiting):
        opened.close()


def test_many_dead_addresses_do_not_outlast_the_deadline(dead_addresses, monkeypatch):
    asked, real = [], Progress.timeout

    def watched(progress, longest_s=None):
        asked.append(real(progress, longest_s))
        return asked[-1]

    monkeypatch.setattr(Progress, "timeout", watched)
    client = HttpClient(dead_addresses, token=TOKEN, allow_insecure=True, connect_timeout_ms=200, deadline_ms=300)
    with client:
        assert str(failure_of(client)) == OVER
    assert len(asked) <= 3
    assert sum(asked) <= 0.31


def test_a_live_address_behind_a_dead_one_is_found(server, monkeypatch):
    port = int(server.url.rpartition(":")[2])
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")]
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: found if host == "two.test" else real(host, *a, **k)
    )
    with HttpClient(f"http://two.test:{port}", token=TOKEN, allow_insecure=True) as client:
        client.upload(BATCH)
    assert len(server.requests) == 1


def test_the_token_is_asked_for_within_the_deadline(server):
    def slow():
        progress().shorten(0)
        return TOKEN

    with HttpClient(server.url, token=slow) as client:
        assert "no complete answer within" in str(failure_of(client))
    assert server.requests == []


def test_an_upload_during_another_one_leaves_its_time_alone():
    def serve(connection, stopped):
        read_request(connection)
        stopped.wait(0.6)  # longer than what is left to the inner upload once it was accepted
        connection.sendall(ACCEPTED)

    def token():
        with Peer(repeats(ACCEPTED, b"")) as other, HttpClient(other.url, token=TOKEN) as inner:
            inner.upload(BATCH)
        return TOKEN

    with Peer(serve) as peer, HttpClient(peer.url, token=token) as client:
        client.upload(BATCH)


INTERRUPTS_EACH_LINE = """
import http.client, itertools, socket, sys
from outbox.upload import deadline

def is_interrupted(sock, at):
    lines = itertools.count(1)
    def interrupt(frame, event, arg):
        code = frame.f_code
        # The constructor of Python's own SocketIO has the same weakness.
        if code.co_name != "__init__" or code.co_filename not in (deadline.__file__, http.client.__file__):
            return None
        if next(lines) == at:
            raise KeyboardInterrupt
        return interrupt
    sys.settrace(interrupt)
    try:
        deadline._Response(sock, 0, "POST")
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)

with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
    print(next(at for at in itertools.count(1) if not is_interrupted(sock, at)))
"""


def test_an_interrupt_while_an_answer_is_prepared_prints_nothing():
    # In development mode, each Python prints what a destructor raises.
    command = [sys.executable, "-X", "dev", "-c", INTERRUPTS_EACH_LINE]
    interrupted = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert interrupted.stderr == ""
    assert int(interrupted.stdout) > 10
