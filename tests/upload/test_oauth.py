from __future__ import annotations

import base64
import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote_plus

import pytest
from oauthlib import oauth2

from conditions import FOREVER_S
from outbox.failures import ConfigurationError, HttpFailure
from outbox.testing.answers import Answer, Drop, Hang
from outbox.testing.receiver import IngestServer
from outbox.upload.client import HttpClient
from outbox.upload.oauth import ClientCredentials
from peers import BATCH, answers, authority, failure_of, tls_peer

SECRET = "secret/+ of the tests"


class Validator(oauth2.RequestValidator):
    """Knows one client, and notes the tokens that it gets."""

    def __init__(self):
        self.tokens = []
        self.secret = SECRET

    def authenticate_client(self, request, *args, **kwargs):
        user, _, password = base64.b64decode(request.headers["Authorization"].split()[1]).decode().partition(":")
        request.client = type("Client", (), {"client_id": user})
        return (unquote_plus(user), unquote_plus(password)) == ("shop", self.secret)

    def validate_grant_type(self, client_id, grant_type, client, request, *args, **kwargs):
        return grant_type == "client_credentials"

    def validate_scopes(self, client_id, scopes, client, request, *args, **kwargs):
        return set(scopes) <= {"write"}

    def get_default_scopes(self, client_id, request, *args, **kwargs):
        return []

    def save_bearer_token(self, token, request, *args, **kwargs):
        self.tokens.append(token["access_token"])


class TokenEndpoint:
    """A token endpoint of oauthlib on this machine."""

    def __init__(self):
        self.validator = Validator()
        oauth = oauth2.BackendApplicationServer(self.validator, token_expires_in=600)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                headers, text, status = oauth.create_token_response(
                    f"https://localhost{self.path}", "POST", body, dict(self.headers)
                )
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/token"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def endpoint():
    with TokenEndpoint() as running:
        yield running


@pytest.fixture
def scripted():
    """A token endpoint whose answers the test gives."""
    with IngestServer() as running:
        yield running


def token_answer(**fields):
    return Answer(200, json.dumps({"access_token": "token-of-tests", "token_type": "Bearer", **fields}))


# --- tokens ---


def test_a_token_is_got_once_and_sent_with_each_request(server, endpoint):
    auth = ClientCredentials(endpoint.url, "shop", SECRET, scope="write")
    with HttpClient(server.url, auth=auth) as client:
        assert client.logged_in
        client.upload(BATCH)
        client.upload(BATCH)

    (token,) = endpoint.validator.tokens
    assert [request.headers["Authorization"] for request in server.requests] == [f"Bearer {token}"] * 2


def test_the_token_is_replaced_before_it_expires(server, endpoint, noon):
    with HttpClient(server.url, auth=ClientCredentials(endpoint.url, "shop", SECRET)) as client:
        client.upload(BATCH)
        noon.travel(seconds=539)
        client.upload(BATCH)
        assert len(endpoint.validator.tokens) == 1
        noon.travel(seconds=1)
        client.upload(BATCH)

    assert len(endpoint.validator.tokens) == 2
    assert server.requests[-1].headers["Authorization"] == f"Bearer {endpoint.validator.tokens[-1]}"


def test_the_token_is_replaced_once_after_a_401(server, endpoint):
    with HttpClient(server.url, auth=ClientCredentials(endpoint.url, "shop", SECRET)) as client:
        client.upload(BATCH)
        server.script(401)
        client.upload(BATCH)
        server.script(401, 401)
        assert failure_of(client).status == 401

    assert [request.status for request in server.requests] == [200, 401, 200, 401, 401]
    assert len(endpoint.validator.tokens) == 3


def test_a_token_that_another_thread_replaced_meanwhile_is_kept(server, endpoint):
    auth = ClientCredentials(endpoint.url, "shop", SECRET)
    with HttpClient(server.url, auth=auth) as client:
        client.upload(BATCH)
        older = server.requests[0]
        server.script(401)
        client.upload(BATCH)
        assert auth.refused(older)
        client.upload(BATCH)

    assert len(endpoint.validator.tokens) == 2


@pytest.mark.parametrize(
    ("lifetime", "fetches"), [(10, 1), ("10", 1), (None, 1), (8, 2), (0, 3), ("soon", 3), (-1, 3), ("nan", 3)]
)
def test_any_lifetime_is_understood(server, scripted, noon, lifetime, fetches):
    fields = {} if lifetime is None else {"expires_in": lifetime}
    scripted.script(*[token_answer(**fields)] * 3)
    with HttpClient(server.url, auth=ClientCredentials(scripted.url, "shop", SECRET)) as client:
        for _ in range(2):
            client.upload(BATCH)
        noon.travel(seconds=8)
        client.upload(BATCH)

    assert len(scripted.requests) == fetches


def test_a_secret_that_rotates_is_asked_for_with_each_token(server, endpoint):
    endpoint.validator.secret = "the next secret"
    secrets = iter([SECRET, "the next secret"])
    with HttpClient(server.url, auth=ClientCredentials(endpoint.url, "shop", lambda: next(secrets))) as client:
        assert failure_of(client).status == 401
        client.upload(BATCH)


# --- failures ---


def test_a_secret_that_the_endpoint_rejects_counts_like_a_401(server, endpoint):
    endpoint.validator.secret = "another secret"
    with HttpClient(server.url, auth=ClientCredentials(endpoint.url, "shop", SECRET)) as client:
        failure = failure_of(client)

    assert str(failure) == '401 token endpoint answered 401 Unauthorized: {"error": "invalid_client"}'
    assert failure.status == 401
    assert server.requests == []


def test_a_scope_that_the_endpoint_rejects_counts_like_a_401(server, endpoint):
    with HttpClient(server.url, auth=ClientCredentials(endpoint.url, "shop", SECRET, scope="read")) as client:
        assert str(failure_of(client)).startswith("401 token endpoint answered 400 Bad Request: {")


@pytest.mark.parametrize("status", [302, 404, 429, 500, 503])
def test_other_answers_of_the_endpoint_are_transport_failures(server, scripted, status):
    scripted.script(Answer(status, "no"))
    with HttpClient(server.url, auth=ClientCredentials(scripted.url, "shop", SECRET)) as client:
        failure = failure_of(client)

    assert not isinstance(failure, HttpFailure)
    assert str(failure).startswith(f"transport: token endpoint: {status} ")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Answer(200, "no JSON"), "the answer can't be read"),
        (Answer(200, "[" * 100_000), "the answer can't be read"),
        (Answer(200, "{}"), "the answer can't be read"),
        (Answer(200, '{"access_token":5}'), "the answer can't be read"),
        (token_answer(access_token=""), "the answer has no bearer token that can be sent"),
        (token_answer(access_token="two words"), "the answer has no bearer token that can be sent"),
        (token_answer(token_type="mac"), "the answer has no bearer token that can be sent"),
    ],
)
def test_an_answer_without_a_token_is_a_transport_failure(server, scripted, answer, why):
    scripted.script(answer)
    with HttpClient(server.url, auth=ClientCredentials(scripted.url, "shop", SECRET)) as client:
        assert str(failure_of(client)) == f"transport: token endpoint: {why}"


def test_no_answer_of_the_endpoint_is_a_transport_failure(server, scripted):
    scripted.stop()
    with HttpClient(server.url, auth=ClientCredentials(scripted.url, "shop", SECRET)) as client:
        failure = failure_of(client)

    assert str(failure).startswith("transport: token endpoint: ConnectionError: ")
    assert failure.__context__ is None


def test_the_endpoint_counts_toward_the_deadline_of_the_upload(server, scripted):
    scripted.script(Hang())
    with HttpClient(server.url, auth=ClientCredentials(scripted.url, "shop", SECRET), deadline_ms=50) as client:
        assert str(failure_of(client)) == "transport: token endpoint: no complete answer in time"


def test_the_endpoint_has_a_deadline_of_its_own(server, scripted):
    scripted.script(Hang())
    auth = ClientCredentials(scripted.url, "shop", SECRET, deadline_ms=50)
    with HttpClient(server.url, auth=auth) as client:
        assert str(failure_of(client)) == "transport: token endpoint: no complete answer in time"
        auth._deadline_ms = FOREVER_S * 1_000  # a slow machine needs longer than 50 ms for an answer
        scripted.script(token_answer())
        client.upload(BATCH)


def test_a_dead_connection_to_the_endpoint_is_replaced(server, scripted):
    scripted.script(token_answer(expires_in=0), Drop(), token_answer())
    with HttpClient(server.url, auth=ClientCredentials(scripted.url, "shop", SECRET)) as client:
        client.upload(BATCH)
        client.upload(BATCH)

    assert [request.status for request in scripted.requests] == [200, None, 200]


def test_mutual_tls_works_with_the_endpoint(server, tmp_path):
    ca, own, cert = authority(tmp_path)
    body = b'{"access_token":"token-of-tests"}'
    text = b"HTTP/1.1 200 \r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with tls_peer(own, answers(text), clients_of=ca) as peer:
        auth = ClientCredentials(peer.url, "shop", SECRET, verify=ca, cert=cert)
        with HttpClient(server.url, auth=auth) as client:
            client.upload(BATCH)

    assert server.requests[0].headers["Authorization"] == "Bearer token-of-tests"


# --- secrecy and settings ---


@pytest.mark.parametrize("given", [SECRET, lambda: SECRET])
def test_no_failure_shows_a_credential(server, scripted, given):
    basic = base64.b64encode(b"shop:secret%2F%2B+of+the+tests").decode()
    scripted.script(Answer(400, f"not {SECRET} {basic}"), token_answer())
    server.script(Answer(400, "not token-of-tests"))
    with HttpClient(server.url, auth=ClientCredentials(scripted.url, "shop", given)) as client:
        assert failure_of(client).body_snippet == "not [REDACTED-TOKEN] [REDACTED-TOKEN]"
        assert failure_of(client).body_snippet == "not [REDACTED-TOKEN]"

    assert scripted.requests[0].headers["Authorization"] == f"Basic {basic}"
    assert scripted.requests[0].body == b"grant_type=client_credentials"


def test_client_credentials_show_nothing_and_do_not_travel():
    auth = ClientCredentials("https://login.example/token", "shop", SECRET)

    assert repr(auth) == "ClientCredentials(…)"
    with pytest.raises(TypeError, match="ClientCredentials can't be pickled: it holds a secret"):
        pickle.dumps(auth)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("login.example", "shop", SECRET), "token_url is 'login.example', expected http:// or https://"),
        (
            ("http://login.example", "shop", SECRET),
            "token_url is 'http://login.example': requests would be sent unen",
        ),
        (("https://login.example", "", SECRET), "client_id is of type str, expected a text that is not empty"),
        (
            ("https://login.example", "shop", None),
            "client_secret is of type NoneType, expected a text that is not",
        ),
        (("https://login.example", "shop", SECRET, 5), "scope is of type int, expected a text that is not empty"),
    ],
)
def test_settings_that_can_not_work_are_refused_without_showing_them(arguments, message):
    with pytest.raises(ConfigurationError) as caught:
        ClientCredentials(*arguments[:3], scope=arguments[3] if len(arguments) > 3 else None)

    assert str(caught.value).startswith(message)
    frames = [frame.frame.f_locals for frame in caught.traceback if not frame.path.name.startswith("test_")]
    assert frames
    assert SECRET not in str(frames)


def test_a_token_endpoint_inside_a_cluster_may_be_reached_over_http():
    assert ClientCredentials("http://login.internal", "shop", SECRET, allow_insecure=True).credentials == (SECRET,)
