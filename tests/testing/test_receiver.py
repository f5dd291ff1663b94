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

from outbox.events import content_hash
from outbox.failures import ConfigurationError
from outbox.testing import server as server_module
from outbox.testing.answers import Answer, Drop, Hang
from outbox.testing.receiver import IngestServer
from outbox.upload.compression import ZSTD
from outbox.upload.signing import StandardWebhooks

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

    assert post(server, spaced, '{"a":2}') == (200, {"received": 2, "deduped": 0})

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
        ("POST", "/other", 404),
        ("POST", "/hook/more", 404),
        ("GET", "/", 404),
        ("PUT", "/received", 404),
        ("HEAD", "/received", 404),
        ("GET", "/hook", 405),
        ("DELETE", "/hook?key=1", 405),
    ],
)
def test_other_paths_and_methods_are_refused(method, path, status):
    with IngestServer(path="/hook") as server:
        assert call(server, method, path)[0] == status
        assert server.requests == []


@pytest.mark.parametrize("path", ["/", "/hook", "/v1/hook?key=1"])
def test_without_a_path_any_path_takes_batches(server, path):
    assert call(server, "POST", path, b'[{"a":1}]')[0] == 200
    assert server.requests[0].path == path
    assert call(server, "GET", path)[0] == 405


def test_a_path_takes_batches_with_any_query():
    with IngestServer(path="/hook") as server:
        assert call(server, "POST", "/hook?key=1", b'[{"a":1}]')[0] == 200


CLOUD_EVENT = '{"specversion":"1.0","id":"%s","source":"/shop","type":"shipped","data":{"a":1}}'


@pytest.mark.parametrize(
    ("name", "body", "stored"),
    [
        ("json:events", '{"events":[{"a":1},{"a":2}]}', ['{"a":1}', '{"a":2}']),
        ("ndjson", '{"a":1}\n{"a":2}\n', ['{"a":1}', '{"a":2}']),
        ("single", '{"a" : 1}', ['{"a" : 1}']),
        ("cloudevents", CLOUD_EVENT % "x", ['{"a":1}']),
        ("cloudevents-batch", f"[{CLOUD_EVENT % 'x'},{CLOUD_EVENT % 'y'},{CLOUD_EVENT % 'x'}]", ['{"a":1}'] * 2),
        ("elasticsearch", '{"create":{"_id":"x"}}\n{"a":1}\n{"create":{}}\n{"a":1}\n', ['{"a":1}'] * 2),
    ],
)
def test_every_format_is_understood(server, name, body, stored):
    server.format = name

    assert call(server, "POST", "/", body)[0] == 200
    assert list(server.stored.values()) == stored
    assert server.requests[0].body == body.encode()


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("json:events", '{"event":[]}'),
        ("json:events", '{"events":[],"more":1}'),
        ("json:events", '{"events":{}}'),
        ("json:events", "[]"),
        ("ndjson", '{"a":\n1}'),
        ("ndjson", "\n"),
        ("single", "[]"),
        ("cloudevents", '{"specversion":"0.3","id":"x","source":"/","type":"t","data":{}}'),
        ("cloudevents", '{"specversion":"1.0","source":"/","type":"t","data":{}}'),
        ("cloudevents", CLOUD_EVENT % ""),
        ("cloudevents", '{"specversion":"1.0","id":"x","source":"/","type":"t","data":[]}'),
        ("cloudevents-batch", CLOUD_EVENT % "x"),
        ("elasticsearch", '{"create":{}}\n'),
        ("elasticsearch", '{"delete":{}}\n{"a":1}\n'),
    ],
)
def test_a_body_of_another_format_is_a_bad_request(server, name, body):
    server.format = name

    assert call(server, "POST", "/", body)[0] == 400
    assert server.stored == {}


def test_a_signed_event_has_an_id():
    with IngestServer(format="single") as server:
        for name in ("x", "y", "x"):
            call(server, "POST", "/", '{"a":1}', {"webhook-id": name})
        call(server, "POST", "/", '{"a":1}')

    assert list(server.stored) == ["x", "y", content_hash('{"a":1}')]
    assert server.duplicates == 1


def test_a_file_keeps_the_ids(tmp_path):
    store = tmp_path / "received"
    with IngestServer(format="cloudevents-batch", store=store) as server:
        call(server, "POST", "/", f"[{CLOUD_EVENT % 'x'},{CLOUD_EVENT % 'y'}]")
        server.format = "single"
        call(server, "POST", "/", '{\n"a":1}')
    with IngestServer(format="cloudevents", store=store) as server:
        call(server, "POST", "/", CLOUD_EVENT % "y")
        call(server, "POST", "/", CLOUD_EVENT % "z")

    plain = '{ "a":1}'
    assert store.read_text() == f'["x",{{"a":1}}]\n["y",{{"a":1}}]\n{plain}\n["z",{{"a":1}}]\n'
    assert server.stored == {**dict.fromkeys("xy", '{"a":1}'), content_hash(plain): plain, "z": '{"a":1}'}


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigurationError, match=r"^format is 'cloudevent', expected cloudevents, "):
        IngestServer(format="cloudevent")


def test_a_signature_is_asked_for():
    secret = "whsec_c2VjcmV0LW9mLXRlc3Rz"
    good = StandardWebhooks("b3RoZXI=", secret)(b"[]", "id", 1_000)
    other_key = StandardWebhooks("b3RoZXI=")(b"[]", "id", 1_000)
    no_time = {**good, "webhook-timestamp": "now"}
    with IngestServer(secret=secret) as server:
        statuses = [
            call(server, "POST", "/", b"[]", headers)[0]
            for headers in (good, other_key, {**good, "webhook-id": "2"}, no_time, {})
        ]
        statuses.append(call(server, "POST", "/", b"[{}]", good)[0])

    assert statuses == [200, 401, 401, 401, 401, 401]


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


@pytest.fixture
def zstd():
    return pytest.importorskip(ZSTD)


def test_zstd_is_understood(server, zstd):
    body = zstd.compress(b'[{"a":1}]')

    assert call(server, "POST", OBSERVATIONS, body, {"Content-Encoding": "zstd"})[0] == 200
    assert list(server.stored.values()) == ['{"a":1}']


@pytest.mark.parametrize("body", [b"no gzip", gzip.compress(b"[]", mtime=0)[:-4]])
def test_broken_gzip_is_a_bad_request(server, body):
    assert call(server, "POST", OBSERVATIONS, body, {"Content-Encoding": "gzip"})[0] == 400


def test_broken_zstd_is_a_bad_request(server, zstd):
    for body in (b"no zstd", zstd.compress(b"[]" * 99)[:-4]):
        assert call(server, "POST", OBSERVATIONS, body, {"Content-Encoding": "zstd"})[0] == 400


def test_a_body_over_the_limit_is_refused_and_the_connection_goes_on(server, monkeypatch):
    monkeypatch.setattr("outbox.testing.server.MAX_BODY_BYTES", 100)
    monkeypatch.setattr("outbox.testing.body.MAX_BODY_BYTES", 100)

    assert call(server, "POST", OBSERVATIONS, b" " * 1_000_000)[0] == 413
    assert call(server, "POST", OBSERVATIONS, gzip.compress(b" " * 101), {"Content-Encoding": "gzip"})[0] == 413


def test_a_body_that_zstd_expands_over_the_limit_is_refused(server, zstd, monkeypatch):
    monkeypatch.setattr("outbox.testing.body.MAX_BODY_BYTES", 100)

    assert call(server, "POST", OBSERVATIONS, zstd.compress(b" " * 101), {"Content-Encoding": "zstd"})[0] == 413


def test_a_body_over_the_limit_that_breaks_off_ends_the_connection(server, monkeypatch):
    monkeypatch.setattr("outbox.testing.server.MAX_BODY_BYTES", 100)
    port = int(server.url.rpartition(":")[2])

    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"POST /cloud/observations HTTP/1.1\r\nContent-Length: 1000\r\n\r\nshort")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_length_of_any_number_of_digits_is_refused(server):
    port = int(server.url.rpartition(":")[2])

    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        length = b"9" * 5_000
        connection.sendall(b"POST /cloud/observations HTTP/1.1\r\nContent-Length: " + length + b"\r\n\r\n")
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
    assert post(server, '{"a":1}', '{"a":"poison"}') == (
        422,
        {
            "defined": False,
            "code": "UNPROCESSABLE_CONTENT",
            "status": 422,
            "message": "invalid event",
            "data": {"index": 1},
        },
    )
    assert server.stored == {}


def test_each_event_can_have_its_own_result(server):
    server.results = True

    assert post(server, '{"a":1}', '{"a":"poison"}') == (
        207,
        {"results": [{"status": 200}, {"status": 422, "error": "invalid event"}]},
    )
    assert list(server.stored.values()) == ['{"a":1}']


def test_a_bulk_request_is_answered_as_elasticsearch_does(server):
    server.format = "elasticsearch"
    body = b"""{"create":{"_id":"x"}}
{"a":1}
{"create":{"_id":"y"}}
{"a":"poison"}
"""
    first = {"create": {"_id": "x", "status": 201}}
    again = {"_id": "x", "status": 409, "error": {"type": "version_conflict_engine_exception"}}
    bad = {"_id": "y", "status": 400, "error": {"type": "document_parsing_exception", "reason": "invalid event"}}

    answers = [json.loads(call(server, "POST", "/_bulk", body)[1]) for _ in range(2)]

    assert answers[0] == {"took": 1, "errors": True, "items": [first, {"create": bad}]}
    again["error"]["reason"] = "document already exists"
    assert answers[1]["items"] == [{"create": again}, {"create": bad}]
    assert json.loads(call(server, "POST", "/_bulk", b"")[1]) == {"took": 1, "errors": False, "items": []}
    assert list(server.stored.values()) == ['{"a":1}']


def test_the_mark_can_be_chosen():
    with IngestServer(poison="bad apple") as server:
        assert post(server, '{"a":"poison"}')[0] == 200
        assert post(server, '{"a":"bad apple"}')[0] == 422


SLOW_DOWN = {
    "defined": True,
    "code": "RATE_LIMITED",
    "status": 429,
    "message": "rate limited",
    "data": {"retryAfterSec": 2},
}
DOWN = {
    "defined": False,
    "code": "SERVICE_UNAVAILABLE",
    "status": 503,
    "message": "down",
    "data": {"retryAfterSec": 2},
}
REVOKED = {
    "defined": True,
    "code": "UNAUTHORIZED",
    "status": 401,
    "message": "session revoked",
    "data": None,
}


@pytest.mark.parametrize(
    ("mode", "answer"), [("down", (503, DOWN)), ("overloaded", (429, SLOW_DOWN)), ("revoked", (401, REVOKED))]
)
def test_the_mode_decides_on_all_answers(server, mode, answer):
    server.set_mode(mode, retry_after_sec=2)

    assert post(server, '{"a":1}') == answer
    assert post(server, '{"a":1}') == answer


def test_without_a_delay_none_is_named(server):
    server.set_mode("overloaded")

    assert post(server, '{"a":1}') == (429, {**SLOW_DOWN, "data": None})


def test_an_unknown_mode_is_refused(server):
    with pytest.raises(ConfigurationError, match="mode is 'sideways', expected one of ok, down"):
        server.set_mode("sideways")


def test_the_mode_changes_over_http(server):
    wish = json.dumps({"mode": "overloaded", "retryAfterSec": 7})

    status, body = call(server, "POST", "/control", wish)

    assert (status, json.loads(body)["mode"]) == (200, "overloaded")
    assert post(server, '{"a":1}') == (429, {**SLOW_DOWN, "data": {"retryAfterSec": 7}})


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

    assert answers[:2] == [(422, b"no"), (200, b'{"received":1,"deduped":0}')]
    assert [request.status for request in server.requests] == [422, 200, 503]
    assert list(server.stored.values()) == ['{"a":1}']


@pytest.mark.parametrize("status", [201, 204, 404, 422, 500, 503])
def test_a_scripted_status_that_the_contract_does_not_define_has_no_body(server, status):
    server.script(status)

    assert call(server, "POST", OBSERVATIONS, b"[]") == (status, b"")


@pytest.mark.parametrize("answer", ["503", None, 5.0, {"status": 503}])
def test_what_is_no_answer_is_refused(server, answer):
    with pytest.raises(ConfigurationError, match=r"^answer is .*, expected a status, Answer, Drop or Hang$"):
        server.script(503, answer)

    assert post(server, '{"a":1}')[0] == 200


def test_a_scripted_body_may_be_empty(server):
    server.script(Answer(200, ""), Answer(429, b""))

    assert post(server, '{"a":1}') == (200, None)
    assert post(server, '{"a":1}') == (429, None)


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


def test_a_relative_store_is_where_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server = IngestServer(store="received.ndjson")
    monkeypatch.chdir("/")
    with server:
        post(server, '{"a":1}')
    assert (tmp_path / "received.ndjson").read_bytes() == b'{"a":1}\n'


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


def test_a_mistake_in_the_server_is_shown(monkeypatch, capfd):
    monkeypatch.setattr(IngestServer, "_decide", lambda *_: 1 / 0)

    with IngestServer() as server, pytest.raises(http.client.RemoteDisconnected):
        post(server, '{"a":1}')

    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_connection_that_is_gone_can_be_shut_down():
    connection = socket.socket()
    connection.close()

    server_module._shut(connection)
