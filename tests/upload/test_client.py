from __future__ import annotations

import copy
import gc
import hashlib
import importlib.metadata
import multiprocessing
import pickle
import re
import socket
import sys
import threading

import pytest

from outbox.failures import ConfigurationError, HttpFailure
from outbox.testing.answers import Answer, Drop, Hang
from outbox.upload.client import HttpClient
from peers import (
    ACCEPTED,
    BATCH,
    FOREVER_S,
    TOKEN,
    Peer,
    Row,
    answers,
    failure_of,
    read_request,
    reset,
    tls_peer,
)


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


linux = pytest.mark.skipif(sys.platform != "linux", reason="only there can a peer tell what the client has")


# --- the request ---


def test_a_batch_is_one_json_array_of_the_stored_texts(server, client):
    client.upload([Row(1, '{"b" : 1,"a":"\\u00e9"}'), Row(2, '{"c":"é"}')])

    (request,) = server.requests
    assert (request.path, request.events) == ("/cloud/observations", 2)
    assert list(server.stored.values()) == ['{"b" : 1,"a":"\\u00e9"}', '{"c":"é"}']


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


def test_the_same_batch_has_the_same_key_and_others_another(server, client):
    batches = [Row(1), Row(2)], [Row(1), Row(2)], [Row(1), Row(3)], [Row(2), Row(1)], [Row(1)]
    for batch in batches:
        client.upload(batch)

    keys = [request.headers["Idempotency-Key"] for request in server.requests]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def test_the_key_is_a_hash_of_the_event_ids(server, client):
    client.upload([Row(12), Row(7)])

    expected = hashlib.sha256(b"event-12\nevent-7").hexdigest()[:32]
    assert server.requests[0].headers["Idempotency-Key"] == expected


def test_bodies_are_not_compressed_unless_told(server, client):
    client.upload([Row(1, '{"a":"%s"}' % ("x" * 5_000))])

    assert "Content-Encoding" not in server.requests[0].headers


def test_a_large_upload_arrives_whole(server, client):
    payload = '{"a":"%s"}' % ("x" * 5_000_000)

    client.upload([Row(1, payload)])

    assert list(server.stored.values()) == [payload]


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


# --- an answer before the whole request was sent ---


LARGE = [Row(1, '"%s"' % ("x" * 20_000_000))]


def answers_early(text):
    """Answer as soon as the head is there, and end the connection once the client has that answer."""
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")

    def serve(connection, stopped):
        received = b""
        while b"\r\n\r\n" not in received:
            received += connection.recv(100)
        connection.sendall(text)
        unread = bytearray(4)
        while fcntl.ioctl(connection, termios.TIOCOUTQ, unread) or any(unread):
            stopped.wait(0.001)
        reset(connection)

    return serve


@linux
def test_an_answer_that_comes_before_the_whole_request_was_sent_counts():
    early = answers_early(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
    with Peer(early) as peer, HttpClient(peer.url, token=TOKEN) as client:
        assert str(failure_of(client, LARGE)) == "413 Too Large: big"


@linux
def test_so_it_does_over_tls(trusted):
    early = answers_early(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
    with tls_peer(trusted, early) as peer, HttpClient(peer.url, token=TOKEN, verify=trusted) as client:
        assert str(failure_of(client, LARGE)) == "413 Too Large: big"


@linux
def test_nothing_is_accepted_before_the_whole_request_was_sent():
    with Peer(answers_early(ACCEPTED)) as peer, HttpClient(peer.url, token=TOKEN) as client:
        failure = failure_of(client, LARGE)

    assert str(failure) == "transport: answered 200 before the whole request was sent"


@linux
@pytest.mark.untraced
def test_an_acceptance_on_a_fresh_connection_counts_after_a_request_that_broke_off():
    def breaks_off(connection, stopped):
        answers(ACCEPTED)(connection, stopped)
        connection.recv(1)
        reset(connection)

    with Peer(breaks_off, answers(ACCEPTED)) as peer, HttpClient(peer.url, token=TOKEN) as client:
        client.upload(BATCH)
        client.upload(LARGE)


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
    server._decide, decide = lambda *args: (together.wait(FOREVER_S), decide(*args))[1], server._decide
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
    child.join(FOREVER_S)
    client.upload(BATCH)

    assert child.exitcode == 0
    assert [request.status for request in server.requests] == [200, 200, 200]
    assert len(connections) == 2


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


def wait_until_all_are_closed(server):
    with server._server._changed:
        assert server._server._changed.wait_for(lambda: not server._server._open, FOREVER_S)


def test_a_connection_ends_with_its_thread(server, client, connections, no_collector):
    for _ in range(3):
        thread = threading.Thread(target=client.upload, args=(BATCH,))
        thread.start()
        thread.join()

    wait_until_all_are_closed(server)
    assert len(connections) == 3


def test_a_connection_ends_with_its_client(server, no_collector):
    HttpClient(server.url, token=TOKEN).upload(BATCH)

    wait_until_all_are_closed(server)


def test_closing_ends_the_connections_of_all_threads_and_uploading_opens_new_ones(
    server, client, connections, no_collector
):
    uploaded, closed = threading.Event(), threading.Event()

    def upload_and_again_when_closed():
        client.upload(BATCH)
        uploaded.set()
        closed.wait(FOREVER_S)
        client.upload(BATCH)

    thread = threading.Thread(target=upload_and_again_when_closed)
    thread.start()
    uploaded.wait(FOREVER_S)
    client.upload(BATCH)
    client.close()

    wait_until_all_are_closed(server)
    closed.set()
    thread.join()
    client.upload(BATCH)
    assert len(connections) == 4


def test_an_upload_under_way_goes_on_when_the_client_is_closed():
    def serve(connection, stopped):
        read_request(connection)
        client.close()
        connection.sendall(ACCEPTED)

    with Peer(serve) as peer, HttpClient(peer.url, token=TOKEN) as client:
        client.upload(BATCH)


@pytest.mark.parametrize("status", [101, 102, 103, 199])
def test_the_answer_that_follows_an_interim_one_is_not_taken_for_the_next(status):
    def interim_and_late(connection, stopped):
        answers(b"HTTP/1.1 %d \r\n\r\n" % status)(connection, stopped)
        answers(ACCEPTED)(connection, stopped)

    rejects = answers(b"HTTP/1.1 422 \r\nContent-Length: 0\r\n\r\n")
    with Peer(interim_and_late, rejects) as peer, HttpClient(peer.url, token=TOKEN) as client:
        assert failure_of(client).status == status
        assert failure_of(client).status == 422


def test_cookies_are_not_sent_back(server, client):
    server.script(Answer(200, headers={"Set-Cookie": "session=1; Path=/"}))

    client.upload(BATCH)
    client.upload(BATCH)

    assert all("Cookie" not in request.headers for request in server.requests)


def test_cookies_that_no_library_understands_do_no_harm(server, client):
    server.script(Answer(200, headers={"Set-Cookie": "a=b", "Set-Cookie2": "c=d; Expires=tomorrow"}))

    client.upload(BATCH)


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
        assert str(failure_of(client)) == "transport: token: not set, not logged in"

    assert server.requests == []


def test_the_token_is_not_shown_and_does_not_travel(client):
    assert TOKEN not in repr(client)
    assert repr(client).startswith("HttpClient('http://127.0.0.1:")
    for copies in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match="can't be pickled"):
            copies(client)


LATIN_TOKEN = "tökén-äöü-123"


# --- settings ---


@pytest.mark.parametrize("name", ["connect_timeout_ms", "read_timeout_ms", "deadline_ms"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "5", 2**31, 10**400])
def test_a_time_that_can_not_work_is_refused(name, value):
    with pytest.raises(ConfigurationError, match=f"^{name} is .*, expected a whole number from 1 to 2\\^31 - 1$"):
        HttpClient("https://ingest.example", **{name: value})


def test_the_longest_times_are_waited_for(server):
    longest = 2**31 - 1
    times = {"connect_timeout_ms": longest, "read_timeout_ms": longest, "deadline_ms": longest}
    with HttpClient(server.url, token=TOKEN, **times) as client:
        client.upload(BATCH)


def test_the_deadline_is_there_to_be_checked():
    assert HttpClient("https://ingest.example").deadline_ms == 45_000
    assert HttpClient("https://ingest.example", deadline_ms=7).deadline_ms == 7
