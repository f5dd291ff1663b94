from __future__ import annotations

import base64
import pickle

import pytest
from requests.auth import HTTPBasicAuth

from outbox.failures import ConfigurationError, TransportFailure
from outbox.testing.answers import Answer
from outbox.upload.auth import NO_AUTH, ApiKey
from outbox.upload.client import HttpClient
from peers import (
    BATCH,
    TOKEN,
    failure_of,
)

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
    with pytest.raises(ConfigurationError, match=r"^token: .* expected one word in latin-1$") as caught:
        HttpClient("https://ingest.example", token=token)

    assert token not in str(caught.value)


@pytest.mark.parametrize("token", [b"bytes", 1, True, ["token"]])
def test_a_token_that_is_no_text_is_refused_without_showing_it(token):
    with pytest.raises(ConfigurationError, match=f"^token: got {type(token).__name__}, expected text or None$"):
        HttpClient("https://ingest.example", token=token)


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
    with pytest.raises(ConfigurationError, match="sent unencrypted; expected https") as caught:
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


# --- other credentials ---

KEY = "key-123/abc+def"
PASSWORD = "pässword:1"
BASIC = base64.b64encode(f"shop:{PASSWORD}".encode()).decode()


def add_key(request):
    request.headers["X-Api-Key"] = KEY


def replace_request(request):
    new = request.copy()
    new.headers["X-Api-Key"] = KEY
    return new


@pytest.mark.parametrize(
    ("auth", "header", "value"),
    [
        (("shop", PASSWORD), "Authorization", f"Basic {BASIC}"),
        ((lambda: "shop", lambda: PASSWORD), "Authorization", f"Basic {BASIC}"),
        (ApiKey("X-Api-Key", KEY), "X-Api-Key", KEY),
        (ApiKey("Authorization", lambda: f"Token {KEY}"), "Authorization", f"Token {KEY}"),
        (add_key, "X-Api-Key", KEY),
        (replace_request, "X-Api-Key", KEY),
        (HTTPBasicAuth("shop", "password"), "Authorization", "Basic c2hvcDpwYXNzd29yZA=="),
        (NO_AUTH, "Authorization", None),
    ],
)
def test_credentials_are_sent(server, auth, header, value):
    with HttpClient(server.url, auth=auth) as client:
        assert client.logged_in
        client.upload(BATCH)

    assert server.requests[0].headers.get(header) == value


@pytest.mark.parametrize(
    ("auth", "secret"),
    [
        (("shop", PASSWORD), PASSWORD),
        (("shop", lambda: PASSWORD), PASSWORD),
        (("shop", PASSWORD), BASIC),
        (("only-a-key", ""), "only-a-key"),
        (ApiKey("X-Api-Key", KEY), KEY),
        (ApiKey("X-Api-Key", lambda: f"Token {KEY}"), KEY),
        (add_key, KEY),
        (replace_request, KEY),
        (lambda request: request.headers.update({"X-Api-Key": b"b" + KEY.encode()}), f"b{KEY}"),
        (lambda request: request.prepare_url(request.url, {"key": KEY}), KEY),
    ],
)
def test_credentials_are_taken_out_of_failures(server, auth, secret):
    server.script(Answer(400, f"not {secret}"))
    with HttpClient(server.url, auth=auth) as client:
        assert failure_of(client).body_snippet == "not [REDACTED-TOKEN]"


@pytest.mark.parametrize("auth", [("shop", PASSWORD), ApiKey("X-Api-Key", f"Token {PASSWORD}")])
def test_fixed_credentials_are_known_before_the_first_upload(auth):
    assert HttpClient("https://ingest.example", auth=auth).redact(f"not {PASSWORD}") == "not [REDACTED-TOKEN]"


def test_the_credentials_of_a_callable_are_known_too():
    def auth(request):
        return request

    auth.credentials = (KEY,)

    assert HttpClient("https://ingest.example", auth=auth).redact(f"not {KEY}") == "not [REDACTED-TOKEN]"


def test_a_callable_sees_the_whole_request(server):
    seen = []
    with HttpClient(
        server.url,
        auth=lambda request: seen.append((request.body, dict(request.headers))),
        headers={"X-Shop": "17"},
        sign=lambda body, message_id, now_ms: {"X-Signature": "s"},
    ) as client:
        client.upload(BATCH)

    ((body, headers),) = seen
    assert body == server.requests[0].body
    assert {"Content-Length", "Content-Type", "Idempotency-Key", "X-Shop", "X-Signature"} <= set(headers)


def test_a_callable_may_fail_the_upload(server):
    def auth(request):
        raise TransportFailure("no token today")

    with HttpClient(server.url, auth=auth) as client:
        failure = failure_of(client)

    assert str(failure) == "transport: no token today"
    assert all(entry.path.name != "auth.py" for entry in pytest.ExceptionInfo.from_exception(failure).traceback)
    assert server.requests == []


@pytest.mark.parametrize("error", [OSError("no token file"), LookupError("no key")])
def test_other_errors_of_a_callable_are_raised_as_they_are(server, error):
    def auth(request):
        raise error

    with HttpClient(server.url, auth=auth) as client, pytest.raises(type(error), match="no"):
        client.upload(BATCH)


@pytest.mark.parametrize("answer", [True, False])
def test_after_a_401_a_callable_may_ask_for_one_more_try(server, answer):
    refused_keys = []

    class Auth:
        def __call__(self, request):
            request.headers["X-Api-Key"] = ["old", "new"][len(refused_keys)]

        def refused(self, request):
            refused_keys.append(request.headers["X-Api-Key"])
            return answer

    server.script(401, 401)
    with HttpClient(server.url, auth=Auth()) as client:
        assert failure_of(client).status == 401

    assert [request.headers["X-Api-Key"] for request in server.requests] == ["old", "new"][: 1 + answer]
    assert refused_keys == ["old"]


@pytest.mark.parametrize("auth", [add_key, NO_AUTH, ("shop", PASSWORD)])
def test_other_credentials_are_not_renewed_after_a_401(server, auth):
    server.script(401)
    with HttpClient(server.url, auth=auth) as client:
        assert failure_of(client).status == 401

    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("auth", "problem"),
    [
        (ApiKey("X-Api-Key", lambda: None), "X-Api-Key: not set, not logged in"),
        (ApiKey("X-Api-Key", lambda: ""), "X-Api-Key: not set, not logged in"),
        (ApiKey("X-Api-Key", lambda: "line\nbreak"), "X-Api-Key: it has blanks at an end, control characters or"),
        (ApiKey("X-Api-Key", lambda: 5), "X-Api-Key: got int, expected text"),
        ((lambda: "shop", lambda: None), "the password is of type NoneType, expected text"),
        ((lambda: "a:b", "password"), "the user has a colon, which Basic authentication does not allow"),
        (("shop", lambda: "line\nbreak"), "the password has control characters"),
    ],
)
def test_what_a_callable_returns_and_can_not_be_sent_is_a_transport_failure(server, auth, problem):
    with HttpClient(server.url, auth=auth) as client:
        assert str(failure_of(client)).startswith(f"transport: auth: {problem}")

    assert server.requests == []


@pytest.mark.parametrize("auth", [ApiKey("X-Api-Key", ""), ApiKey("X-Api-Key", lambda: None), ("", "")])
def test_empty_credentials_mean_not_logged_in(auth):
    assert not HttpClient("https://ingest.example", auth=auth).logged_in


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ApiKey("X Api Key", KEY), "auth: 'X Api Key': expected the name of a header, such as X-Api-Key"),
        (lambda: ApiKey(5, KEY), "auth: 5: expected the name of a header, such as X-Api-Key"),
        (lambda: ApiKey("Content-Length", KEY), "auth: 'Content-Length': the client sets this header"),
        (
            lambda: ApiKey("X-Api-Key", f"{KEY}\n"),
            "auth: 'X-Api-Key': it has blanks at an end, control characters",
        ),
        (lambda: ApiKey("X-Api-Key", None), "auth: 'X-Api-Key': got NoneType, expected text"),
    ],
)
def test_a_key_that_can_not_be_sent_is_refused_without_showing_it(make, message):
    with pytest.raises(ConfigurationError, match=f"^{message}") as caught:
        make()

    frames = [frame.frame.f_locals for frame in caught.traceback if frame.path.name == "auth.py"]
    assert frames
    assert KEY not in str(caught.value) + str(frames)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auth": "password"}, "auth is of type str, expected (user, password), ApiKey, NO_AUTH or a callable"),
        (
            {"auth": ("a", "b", "c")},
            "auth is of type tuple, expected (user, password), ApiKey, NO_AUTH or a callable",
        ),
        ({"auth": ("a:b", "password")}, "auth: the user has a colon, which Basic authentication does not allow"),
        ({"auth": ("a", "pass\nword")}, "auth: the password has control characters"),
        ({"auth": ("a", None)}, "auth: the password is of type NoneType, expected text"),
        ({"auth": NO_AUTH, "token": "password"}, "token and auth are both set, expected one of them"),
        ({"headers": "password"}, "headers is of type str, expected a mapping"),
        ({"headers": {"X Y": "password"}}, "headers: 'X Y': expected the name of a header, such as X-Api-Key"),
        ({"headers": {"Idempotency-Key": "password"}}, "headers: 'Idempotency-Key': the client sets this header"),
        ({"headers": {"X-Y": "password "}}, "headers: 'X-Y': it has blanks at an end, control characters or"),
    ],
)
def test_settings_that_can_not_work_are_refused_without_showing_them(settings, message):
    with pytest.raises(ConfigurationError) as caught:
        HttpClient("https://ingest.example", **settings)

    assert str(caught.value).startswith(message)
    frames = [frame.frame.f_locals for frame in caught.traceback if not frame.path.name.startswith("test_")]
    assert frames
    assert "pass" not in str(frames)


@pytest.mark.parametrize("auth", [NO_AUTH, add_key, ("shop", PASSWORD)])
def test_nothing_is_sent_in_plain_text_to_another_machine(auth):
    with pytest.raises(ConfigurationError, match="requests would be sent unencrypted; expected https"):
        HttpClient("http://ingest.example", auth=auth)

    assert HttpClient("http://ingest.example", auth=auth, allow_insecure=True).logged_in


@pytest.mark.parametrize("credential", [ApiKey("X-Api-Key", KEY), NO_AUTH])
def test_credentials_show_nothing_and_do_not_travel(credential):
    assert KEY not in repr(credential)
    assert repr(NO_AUTH) == "NO_AUTH"
    with pytest.raises(TypeError, match="can't be pickled: it holds a secret"):
        pickle.dumps(credential)


# --- headers ---


def test_headers_are_added_to_each_request(server):
    tenants = iter(["first", None, "third"])
    headers = {"X-Shop": "a b", "User-Agent": "shop/1", "X-Tenant": lambda: next(tenants)}
    with HttpClient(server.url, token=TOKEN, headers=headers) as client:
        for _ in range(3):
            client.upload(BATCH)

    sent = [request.headers for request in server.requests]
    assert [(one["X-Shop"], one["User-Agent"], one.get("X-Tenant")) for one in sent] == [
        ("a b", "shop/1", "first"),
        ("a b", "shop/1", None),
        ("a b", "shop/1", "third"),
    ]


def test_credentials_replace_a_header_of_the_same_name(server):
    with HttpClient(server.url, token=TOKEN, headers={"Authorization": "Basic x"}) as client:
        client.upload(BATCH)

    assert server.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("headers", [{"X-Api-Key": f"Key {KEY}"}, {"X-Shop": lambda: KEY}])
def test_headers_that_may_be_secrets_are_taken_out_of_failures(server, headers):
    server.script(Answer(400, f"not {KEY}"))
    with HttpClient(server.url, auth=NO_AUTH, headers=headers) as client:
        assert failure_of(client).body_snippet == "not [REDACTED-TOKEN]"


def test_other_headers_stay_in_failures(server):
    server.script(Answer(400, "not application/vnd.shop"))
    with HttpClient(server.url, auth=NO_AUTH, headers={"Accept": "application/vnd.shop"}) as client:
        assert failure_of(client).body_snippet == "not application/vnd.shop"


def test_a_header_from_a_callable_that_can_not_be_sent_is_a_transport_failure(server):
    with HttpClient(server.url, auth=NO_AUTH, headers={"X-Shop": lambda: "a\nb"}) as client:
        assert str(failure_of(client)).startswith("transport: headers: X-Shop: it has blanks at an end")


def test_a_cut_answer_without_any_secret_is_shown(server):
    server.script(Answer(500, "x" * 100_000))
    with HttpClient(server.url, auth=NO_AUTH) as client:
        assert failure_of(client).body_snippet == "x" * 200
