from __future__ import annotations

import socket
import threading

import pytest

from outbox import deadline
from outbox.client import HttpClient
from peers import (
    ACCEPTED,
    BATCH,
    HEAD,
    TOKEN,
    Peer,
    Row,
    certificate,
    drips,
    failure_of,
    forget_environment,
    read_request,
    repeats,
    tls_peer,
)

OVER = "transport: no complete answer within 300 ms"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    forget_environment(monkeypatch)


@pytest.fixture(scope="session")
def trusted(tmp_path_factory):
    return certificate(tmp_path_factory.mktemp("tls"))


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


def test_many_dead_addresses_do_not_outlast_the_deadline(dead_addresses):
    asked = []
    client = HttpClient(dead_addresses, token=TOKEN, allow_insecure=True, connect_timeout_ms=200, deadline_ms=300)
    with client:
        real = deadline.deadline.timeout
        asked = []

        def watched(longest_s=None):
            asked.append(real(longest_s))
            return asked[-1]

        deadline.deadline.timeout = watched
        try:
            assert str(failure_of(client)) == OVER
        finally:
            del deadline.deadline.timeout
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
        deadline.deadline.shorten(0)
        return TOKEN

    with HttpClient(server.url, token=slow) as client:
        assert "no complete answer within" in str(failure_of(client))
    assert server.requests == []
