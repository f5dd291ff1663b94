from __future__ import annotations

import gzip
import http.client
import json
import socket
import stat
import threading
from contextlib import closing
from pathlib import Path

import pytest

from outbox import receiver
from outbox.events import content_hash
from outbox.failures import ConfigurationError
from outbox.receiver import Answer, Drop, Hang, IngestServer

OBSERVATIONS = "/cloud/observations"


def call(server, method, path, body=None, headers=None):
    port = int(server.url.rpartition(":")[2])
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()


def post(server, *payloads, headers=None):
    status, body = call(server, "POST", OBSERVATIONS, "[" + ",".join(payloads) + "]", headers)
    return status, json.loads(body or "null")


def raw_request(server, text):
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(text)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


@pytest.fixture
def server():
    with IngestServer() as running:
        yield running


def test_events_are_stored_by_the_hash_of_their_exact_text(server):
    spaced = '{"a" : 1,  "b":"\\u00e9"}'

    assert post(server, spaced, '{"a":2}') == (200, {"accepted": 2})

    assert server.stored == {content_hash(spaced): spaced, content_hash('{"a":2}'): '{"a":2}'}


def test_an_event_that_comes_again_is_stored_once_and_counted(server):
    post(server, '{"a":1}', '{"a":1}')
    post(server, '{"a":1}')

    assert list(server.stored.values()) == ['{"a":1}']
    assert server.summary() == {"events": 1, "requests": 2, "duplicates": 2, "mode": "ok"}


def test_requests_are_remembered_with_their_headers_but_without_showing_them(server):
    post(server, '{"a":1}', headers={"Authorization": "Bearer secret-token"})

    (request,) = server.requests
    assert (request.path, request.events, request.status) == (OBSERVATIONS, 1, 200)
    assert request.headers["Authorization"] == "Bearer secret-token"
    assert "secret-token" not in repr(request)


def test_nothing_is_printed_about_requests(server, capfd):
    post(server, '{"a":1}', headers={"Authorization": "Bearer secret-token"})
    raw_request(server, b"nonsense\r\n\r\n")

    assert capfd.readouterr() == ("", "")


def test_a_path_before_the_route_is_part_of_the_base_url(server):
    assert call(server, "POST", "/base" + OBSERVATIONS, "[]")[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/cloud/other", 404),
        ("GET", "/", 404),
        ("PUT", "/received", 404),
        ("HEAD", "/received", 404),
        ("GET", OBSERVATIONS, 405),
        ("DELETE", OBSERVATIONS, 405),
    ],
)
def test_other_paths_and_methods_are_refused(server, method, path, status):
    assert call(server, method, path)[0] == status
    assert server.requests == []


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[1]", b"[{]", b'[{"a":1}', b'[{"a":"\xff"}]', b"[" * 100_000, b"[{" + b'"a":[' * 50_000],
)
def test_what_is_no_array_of_objects_is_a_bad_request(server, body):
    assert call(server, "POST", OBSERVATIONS, body)[0] == 400
    assert server.stored == {}


def test_gzip_is_understood(server):
    body = gzip.compress(b'[{"a":1}]')

    assert call(server, "POST", OBSERVATIONS, body, {"Content-Encoding": "gzip"})[0] == 200
    assert list(server.stored.values()) == ['{"a":1}']


@pytest.mark.parametrize("body", [b"no gzip", gzip.compress(b"[]", mtime=0)[:-4]])
def test_broken_gzip_is_a_bad_request(server, body):
    assert call(server, "POST", OBSERVATIONS, body, {"Content-Encoding": "gzip"})[0] == 400


def test_a_body_over_the_limit_is_refused_and_the_connection_goes_on(server, monkeypatch):
    monkeypatch.setattr(receiver, "MAX_BODY_BYTES", 100)

    assert call(server, "POST", OBSERVATIONS, b" " * 1_000_000)[0] == 413
    assert call(server, "POST", OBSERVATIONS, gzip.compress(b" " * 101), {"Content-Encoding": "gzip"})[0] == 413


def test_a_body_over_the_limit_that_breaks_off_ends_the_connection(server, monkeypatch):
    monkeypatch.setattr(receiver, "MAX_BODY_BYTES", 100)
    port = int(server.url.rpartition(":")[2])

    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"POST /cloud/observations HTTP/1.1\r\nContent-Length: 1000\r\n\r\nshort")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("header", [b"", b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_a_body_without_a_length_is_refused(server, header):
    answer = raw_request(server, b"POST /cloud/observations HTTP/1.1\r\n" + header + b"\r\n")

    assert answer.startswith(b"HTTP/1.1 411 ")


@pytest.mark.parametrize(
    ("sent", "status"), [("Bearer the-right-one", 200), ("Bearer wrong", 401), ("the-right-one", 401), ("", 401)]
)
def test_a_token_is_asked_for(sent, status):
    with IngestServer(token="the-right-one") as server:
        assert post(server, '{"a":1}', headers={"Authorization": sent})[0] == status
        assert len(server.stored) == (status == 200)


def test_a_batch_with_a_marked_event_is_rejected_whole(server):
    assert post(server, '{"a":1}', '{"a":"poison"}') == (422, {"error": "invalid_event", "index": 1})
    assert server.stored == {}


def test_the_mark_can_be_chosen():
    with IngestServer(poison="bad apple") as server:
        assert post(server, '{"a":"poison"}')[0] == 200
        assert post(server, '{"a":"bad apple"}')[0] == 422


@pytest.mark.parametrize(
    ("mode", "answer"),
    [
        ("down", (503, {"error": "down", "retryAfterSec": 2})),
        ("overloaded", (429, {"error": "rate_limited", "retryAfterSec": 2})),
        ("revoked", (401, {"error": "session_revoked"})),
        ("ok", (200, {"accepted": 1})),
    ],
)
def test_the_mode_decides_on_all_answers(server, mode, answer):
    server.set_mode(mode, retry_after_sec=2)

    assert post(server, '{"a":1}') == answer
    assert post(server, '{"a":1}') == answer


def test_without_a_delay_none_is_named(server):
    server.set_mode("overloaded")

    assert post(server, '{"a":1}') == (429, {"error": "rate_limited"})


def test_an_unknown_mode_is_refused(server):
    with pytest.raises(ConfigurationError, match="mode is 'sideways', expected one of ok, down"):
        server.set_mode("sideways")


def test_the_mode_changes_over_http(server):
    wish = json.dumps({"mode": "overloaded", "retryAfterSec": 7})

    status, body = call(server, "POST", "/control", wish)

    assert (status, json.loads(body)["mode"]) == (200, "overloaded")
    assert post(server, '{"a":1}') == (429, {"error": "rate_limited", "retryAfterSec": 7})


@pytest.mark.parametrize("wish", [b"", b"{", b'{"mode":"sideways"}', b'{"mode":"ok","retryAfter":1}', b'"\xff"'])
def test_a_wish_that_makes_no_sense_changes_nothing(server, wish):
    assert call(server, "POST", "/control", wish)[0] == 400
    assert server.summary()["mode"] == "ok"


def test_the_summary_is_there_over_http(server):
    post(server, '{"a":1}')

    status, body = call(server, "GET", "/received")

    assert (status, json.loads(body)) == (200, server.summary())


def test_a_script_answers_one_request_each_before_the_mode(server):
    server.set_mode("down")
    server.script(Answer(422, "no"), Answer())

    answers = [call(server, "POST", OBSERVATIONS, b'[{"a":1}]') for _ in range(3)]

    assert answers == [(422, b"no"), (200, b""), (503, b'{"error":"down"}')]
    assert [request.status for request in server.requests] == [422, 200, 503]
    assert list(server.stored.values()) == ['{"a":1}']


def test_a_scripted_answer_sets_headers_and_reason(server):
    server.script(Answer(429, b"later", {"Retry-After": "9"}, reason="Slow Down"))

    answer = raw_request(
        server, b"POST /cloud/observations HTTP/1.1\r\nConnection: close\r\nContent-Length: 2\r\n\r\n[]"
    )

    assert answer.startswith(b"HTTP/1.1 429 Slow Down\r\n")
    assert b"\r\nRetry-After: 9\r\n" in answer
    assert answer.endswith(b"\r\n\r\nlater")


@pytest.mark.parametrize("answer", [Drop(stores=True), Hang(1, stores=True)])
def test_a_batch_can_be_stored_and_the_answer_lost(server, answer):
    server.script(answer)

    with pytest.raises(http.client.RemoteDisconnected):
        post(server, '{"a":1}')

    assert list(server.stored.values()) == ['{"a":1}']
    assert [request.status for request in server.requests] == [None]


def test_a_batch_can_be_stored_and_failure_be_claimed(server):
    server.script(Answer(500, stores=True), Answer(200, stores=False))

    assert post(server, '{"a":1}')[0] == 500
    assert post(server, '{"a":2}')[0] == 200

    assert list(server.stored.values()) == ['{"a":1}']


def test_the_drop_mode_answers_nothing(server):
    server.set_mode("drop")

    with pytest.raises(http.client.RemoteDisconnected):
        post(server, '{"a":1}')

    assert server.stored == {}


def test_stopping_ends_requests_that_hang():
    server = IngestServer().start()
    server.set_mode("hang")
    outcome = []

    def wait_for_an_answer():
        try:
            post(server, '{"a":1}')
        except (http.client.RemoteDisconnected, ConnectionError) as error:
            outcome.append(error)

    thread = threading.Thread(target=wait_for_an_answer)
    thread.start()
    while not server.requests:
        threading.Event().wait(0.001)
    server.stop()
    thread.join(30)

    assert len(outcome) == 1


def test_stopping_ends_connections_that_are_kept_alive(server):
    port = int(server.url.rpartition(":")[2])
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("POST", OBSERVATIONS, b"[]")
        connection.getresponse().read()

        server.stop()

        assert connection.sock.recv(1) == b""


def test_stopping_twice_or_before_a_start_does_nothing():
    server = IngestServer()
    server.stop()
    server.start()
    server.stop()
    server.stop()


def test_a_server_that_starts_again_has_its_port_and_what_it_received(server):
    post(server, '{"a":1}')
    url = server.url
    server.stop()
    server.start()

    assert server.url == url
    post(server, '{"a":1}')
    assert server.summary()["duplicates"] == 1


def test_a_store_makes_it_idempotent_over_restarts(tmp_path):
    path = tmp_path / "received.ndjson"
    with IngestServer(store=path) as server:
        post(server, '{"a":1}')
        post(server, '{"a":1}', '{"a":\n2}')

    assert path.read_bytes() == b'{"a":1}\n{"a": 2}\n'
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    with IngestServer(store=str(path)) as server:
        post(server, '{"a":1}')
        assert server.summary() == {"events": 2, "requests": 1, "duplicates": 1, "mode": "ok"}


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    path = Path(tmp_path, "received.ndjson")
    path.write_bytes(b'{"a":1}\n\xff\n{"a":')

    with IngestServer(store=path) as server:
        assert list(server.stored.values()) == ['{"a":1}']
        post(server, '{"a":2}')

    assert path.read_bytes() == b'{"a":1}\n\xff\n{"a":\n{"a":2}\n'


def test_a_store_that_can_not_be_opened_leaves_no_port_open(tmp_path):
    with pytest.raises(FileNotFoundError):
        IngestServer(store=tmp_path / "missing" / "received.ndjson").start()


def test_a_taken_port_is_an_error(server):
    port = int(server.url.rpartition(":")[2])

    with pytest.raises(OSError, match=f"port {port} of 127.0.0.1: .*in use"):
        IngestServer(port=port).start()


def test_a_client_that_leaves_early_is_no_error(server, capfd):
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        # Closing with this set sends a reset instead of an orderly end.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sendall(b"POST /cloud/observations HTTP/1.1\r\nContent-Length: 9\r\n\r\n")

    assert post(server, '{"a":1}')[0] == 200
    server.stop()
    assert capfd.readouterr() == ("", "")


def test_a_mistake_in_the_server_is_shown(server, monkeypatch, capfd):
    monkeypatch.setattr(server, "_decide", lambda *_: 1 / 0)

    with pytest.raises(http.client.RemoteDisconnected):
        post(server, '{"a":1}')

    server.stop()
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_connection_that_is_gone_can_be_shut_down():
    connection = socket.socket()
    connection.close()

    receiver._shut(connection)
