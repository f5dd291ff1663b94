"""A kept-alive connection that ended unnoticed costs its batch no failure: it is sent once more, on a fresh one."""

from __future__ import annotations

from contextlib import suppress

import pytest

from builders import row, rule_fired
from conditions import until
from outbox.failures import HttpFailure, TransportFailure, UploadFailure
from outbox.upload.client import HttpClient
from peers import (
    ACCEPTED,
    BATCH,
    TOKEN,
    Peer,
    Row,
    failure_of,
    read_request,
    reset,
    tls_peer,
)

# Of a client that gives up a request which its service swallows, and has to get the other answers in time.
READ_TIMEOUT_MS = 3_000

REJECTED = b"HTTP/1.1 422 \r\nContent-Length: 0\r\n\r\n"


class Service:
    """The connections of a peer. Each gets its steps, one for each request that it reads, and then ends."""

    def __init__(self, *connections):
        self.requests = []
        self.serves = [self._serve(number, steps) for number, steps in enumerate(connections)]

    def _serve(self, number, steps):
        def serve(connection, stopped):
            for step in steps:
                head, body = read_request(connection)
                self.requests.append((number, head, body))
                step(connection, stopped)

        return serve

    @property
    def used(self):
        """The number of the connection that each request came over."""
        return [number for number, _, _ in self.requests]


def says(text):
    return lambda connection, stopped: connection.sendall(text)


accepts = says(ACCEPTED)


def ends(connection, stopped):
    pass


def resets(connection, stopped):
    reset(connection)


def swallows(connection, stopped):
    stopped.wait()


def client_of(peer, **settings):
    return HttpClient(peer.url, token=TOKEN, **settings)


@pytest.mark.parametrize("goes", [ends, resets, swallows])
def test_a_request_that_got_nothing_on_a_reused_connection_is_sent_again_on_a_fresh_one(outbox, goes):
    service = Service([accepts, goes], [accepts])
    with Peer(*service.serves) as peer, client_of(peer, read_timeout_ms=READ_TIMEOUT_MS) as client:
        client.upload(BATCH)
        row_id = outbox.enqueue(rule_fired())
        report = outbox.flush(client)

    assert (report.sent, row(outbox, row_id).status) == (1, "sent")
    assert service.used == [0, 0, 1]
    assert service.requests[1][1:] == service.requests[2][1:], "the same key and the same body"


def test_a_large_request_that_broke_off_on_a_reused_connection_is_sent_again():
    def resets_unread(connection, stopped):
        accepts(connection, stopped)
        connection.recv(1)
        reset(connection)

    service = Service([resets_unread], [accepts])
    large = [Row(1, '"%s"' % ("x" * 5_000_000))]
    with Peer(*service.serves) as peer, client_of(peer) as client:
        client.upload(BATCH)
        client.upload(large)

    assert service.used == [0, 1]
    assert len(service.requests[1][2]) > 5_000_000


@pytest.mark.parametrize("goes", [ends, resets])
def test_so_it_is_over_tls(trusted, goes):
    service = Service([accepts, goes], [accepts])
    with tls_peer(trusted, *service.serves) as peer, client_of(peer, verify=trusted) as client:
        client.upload(BATCH)
        client.upload(BATCH)

    assert service.used == [0, 0, 1]


def test_the_answer_on_the_fresh_connection_counts():
    service = Service([accepts, ends], [says(REJECTED), accepts])
    with Peer(*service.serves) as peer, client_of(peer) as client:
        client.upload(BATCH)
        failure = failure_of(client)
        client.upload(BATCH)

    assert isinstance(failure, HttpFailure)
    assert service.used == [0, 0, 1, 1]


@pytest.mark.parametrize("goes", [ends, resets, swallows])
def test_the_failure_of_a_fresh_connection_is_not_tried_again(goes):
    service = Service([goes], [accepts])
    with Peer(*service.serves) as peer, client_of(peer, read_timeout_ms=300) as client:
        assert isinstance(failure_of(client), TransportFailure)
        until(lambda: service.used)

    assert service.used == [0]


@pytest.mark.parametrize("goes", [ends, resets, swallows])
def test_the_fresh_connection_is_the_last_try(goes):
    service = Service([accepts, ends], [goes], [accepts])
    with Peer(*service.serves) as peer, client_of(peer, read_timeout_ms=READ_TIMEOUT_MS) as client:
        client.upload(BATCH)
        assert isinstance(failure_of(client), TransportFailure)

    assert service.used == [0, 0, 1]


@pytest.mark.parametrize(
    "beginning",
    [
        b"H",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 500 No\r\nContent-Length: 9\r\n\r\n",
        b"HTTP/1.1 500 No\r\nContent-Length: 9\r\n\r\nhalf",
        b"nonsense\r\n\r\n",
    ],
)
def test_nothing_is_sent_again_once_a_byte_of_an_answer_was_read(beginning):
    service = Service([accepts, says(beginning)], [accepts])
    with Peer(*service.serves) as peer, client_of(peer) as client:
        client.upload(BATCH)
        with suppress(UploadFailure):
            client.upload(BATCH)

    assert service.used == [0, 0]


@pytest.mark.parametrize("status", [401, 408, 429, 500, 503])
def test_an_answer_on_a_reused_connection_is_not_tried_again(status):
    service = Service([accepts, says(b"HTTP/1.1 %d No\r\n\r\n" % status)], [accepts])
    with Peer(*service.serves) as peer, client_of(peer) as client:
        client.upload(BATCH)
        assert failure_of(client).status == status

    assert service.used == [0, 0]


def test_both_tries_share_one_deadline():
    service = Service([accepts, swallows], [swallows], [accepts])
    with Peer(*service.serves) as peer, client_of(peer, read_timeout_ms=READ_TIMEOUT_MS) as client:
        client.upload(BATCH)
        client.deadline_ms = READ_TIMEOUT_MS * 3 // 2  # too early for a second wait of that length
        assert str(failure_of(client)) == f"transport: no complete answer within {client.deadline_ms} ms"
        until(lambda: len(service.used) == 3)

    assert service.used == [0, 0, 1]


def test_after_the_deadline_there_is_no_second_try():
    service = Service([accepts, swallows], [accepts])
    with Peer(*service.serves) as peer, client_of(peer) as client:
        client.upload(BATCH)
        client.deadline_ms = 1_000
        assert str(failure_of(client)) == "transport: no complete answer within 1000 ms"

    assert service.used == [0, 0]
