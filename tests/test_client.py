from __future__ import annotations

import base64
import copy
import gc
import hashlib
import importlib.metadata
import json
import multiprocessing
import pickle
import re
import socket
import sys
import threading
import urllib.parse

import pytest

from outbox.client import HttpClient
from outbox.failures import ConfigurationError, HttpFailure
from outbox.receiver import Answer, Drop, Hang
from peers import (
    ACCEPTED,
    BATCH,
    FOREVER_S,
    TOKEN,
    Peer,
    Proxy,
    Row,
    answers,
    certificate,
    failure_of,
    forget_environment,
    proxied,
    read_request,
    tls_peer,
)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    forget_environment(monkeypatch)


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

    assert list(server.stored.values()) == [payload]
    assert ("Content-Encoding" in server.requests[0].headers) == is_compressed


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


LATIN_TOKEN = "tökén-äöü-123"


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


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_used(server, monkeypatch, name):
    with proxied(server) as (proxy, url):
        monkeypatch.setenv(name, url.removeprefix("http://") if name == "ALL_PROXY" else url)
        with HttpClient("http://ingest.example/v1", token=TOKEN, allow_insecure=True) as client:
            monkeypatch.delenv(name)  # it was read once
            client.upload(BATCH)

    assert proxy.heads[0].startswith("POST http://ingest.example/v1/cloud/observations HTTP/1.1\r\n")
    assert len(server.events) == 1


def test_no_proxy_of_the_environment_is_honoured(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "ingest.example")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.0.1", server._port))])

    with HttpClient(f"http://ingest.example:{server._port}", token=TOKEN, allow_insecure=True) as client:
        client.upload(BATCH)

    assert len(server.events) == 1


def test_a_proxy_of_the_environment_does_not_see_what_is_for_this_machine(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")

    with HttpClient(server.url, token=TOKEN) as client:
        client.upload(BATCH)

    assert len(server.events) == 1


def test_given_proxies_replace_those_of_the_environment(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with proxied(server) as (proxy, url):
        with HttpClient(server.url, token=TOKEN, proxies={"http": url}) as client:
            client.upload(BATCH)
        assert len(proxy.heads) == 1
        with HttpClient(server.url, token=TOKEN, proxies={}) as client:
            client.upload(BATCH)
        assert len(proxy.heads) == 1


PASSWORD = "p@ss:wörd/1"


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


# --- TLS ---


@pytest.fixture(scope="session")
def trusted(tmp_path_factory):
    return certificate(tmp_path_factory.mktemp("tls"))


def test_an_unknown_certificate_is_a_transport_failure(trusted):
    with tls_peer(trusted, answers(ACCEPTED)) as peer, HttpClient(peer.url, token=TOKEN) as client:
        assert "certificate verify failed" in str(failure_of(client))


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_ca_bundle_of_the_environment_is_used(trusted, monkeypatch, name):
    monkeypatch.setenv(name, str(trusted))
    with tls_peer(trusted, answers(ACCEPTED)) as peer, HttpClient(peer.url, token=TOKEN) as client:
        monkeypatch.delenv(name)  # it was read once
        client.upload(BATCH)


def test_a_given_ca_bundle_replaces_that_of_the_environment(trusted, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    with tls_peer(trusted, answers(ACCEPTED)) as peer:
        with HttpClient(peer.url, token=TOKEN, verify=trusted) as client:
            client.upload(BATCH)
        with HttpClient(peer.url, token=TOKEN, verify=True) as client:
            assert "certificate verify failed" in str(failure_of(client))


def test_a_certificate_for_another_name_is_a_transport_failure(trusted, monkeypatch):
    with tls_peer(trusted, answers(ACCEPTED)) as peer:
        address = ("127.0.0.1", peer.port)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", address)])
        with HttpClient(f"https://ingest.example:{peer.port}", token=TOKEN, verify=trusted) as client:
            assert "certificate verify failed: Hostname mismatch" in str(failure_of(client))


def test_a_ca_bundle_that_is_not_there_is_refused():
    with pytest.raises(ConfigurationError, match="is '/nowhere/ca.pem', expected an existing file or folder"):
        HttpClient("https://ingest.example", token=TOKEN, verify="/nowhere/ca.pem")


def test_tls_goes_through_a_proxys_tunnel(trusted):
    with tls_peer(trusted, answers(ACCEPTED)) as peer:
        proxy = Proxy(peer.port)
        with (
            Peer(proxy) as way,
            HttpClient(peer.url, token=TOKEN, verify=trusted, proxies={"https": way.url}) as client,
        ):
            client.upload(BATCH)

    assert proxy.heads[0].startswith(f"CONNECT 127.0.0.1:{peer.port} ")
    assert TOKEN not in proxy.heads[0]


def test_plain_text_in_place_of_tls_is_a_transport_failure(server):
    with HttpClient(server.url.replace("http:", "https:"), token=TOKEN) as client:
        assert str(failure_of(client)).startswith("transport: ")
