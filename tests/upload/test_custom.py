from __future__ import annotations

import subprocess
import sys

import pytest
import requests

from outbox.failures import HttpFailure, TransportFailure
from outbox.testing.answers import Answer, Hang
from outbox.upload.custom import requests_failure

KEY = "key-123/abc+def"


class Client:
    def redact(self, text):
        return text.replace(KEY, "[REDACTED-TOKEN]")


def error_of(call, *args, **settings):
    with pytest.raises(requests.RequestException) as caught:
        call(*args, **settings)
    return caught.value


def raise_for_status(server, answer, **settings):
    server.script(answer)
    with requests.Session() as session:
        return error_of(session.post(server.url, b"[]", **settings).raise_for_status)


def test_a_response_gives_its_status_and_text(server):
    failure = requests_failure(raise_for_status(server, Answer(401, f'{{"error":\n "no {KEY}"}}')), Client())

    assert isinstance(failure, HttpFailure)
    assert str(failure) == '401 Unauthorized: {"error": "no [REDACTED-TOKEN]"}'


@pytest.mark.parametrize(
    ("answer", "delay_ms"),
    [
        (Answer(429, '{"retryAfterSec":40}', {"Retry-After": "50"}), 40_000),
        (Answer(429, "later", {"Retry-After": "50"}), 50_000),
        (Answer(503, '{"retryAfterSec":99999}'), 300_000),
        (Answer(503, "", {"Retry-After": "0"}), 1_000),
        (Answer(503, "", {"Retry-After": "soon"}), None),
    ],
)
def test_the_delay_that_a_response_asks_for_is_clamped(server, answer, delay_ms):
    assert requests_failure(raise_for_status(server, answer), object()).retry_after_ms == delay_ms


def test_a_status_without_reason_gets_the_usual_one(server):
    assert str(requests_failure(raise_for_status(server, Answer(503, "", reason=" ")), object())) == (
        "503 Service Unavailable"
    )


def test_what_was_not_read_of_a_response_is_left_out(server):
    server.script(Answer(500, "x" * 100))
    with requests.Session() as session, session.post(server.url, b"[]", stream=True) as response:
        assert str(requests_failure(error_of(response.raise_for_status), object())) == "500 Internal Server Error"


def test_a_long_text_is_cut(server):
    assert (
        len(requests_failure(raise_for_status(server, Answer(500, "x " * 100_000)), object()).body_snippet) == 200
    )


def test_without_a_response_it_is_a_transport_failure(server):
    server.script(Hang())
    error = error_of(requests.post, server.url, b"[]", timeout=0.05)

    failure = requests_failure(error, object())

    assert isinstance(failure, TransportFailure)
    assert str(failure).startswith("transport: ReadTimeout: ")


@pytest.mark.parametrize(
    "url", [f"nonsense://{KEY}", f"https://user:{KEY}@[::1", f"http://127.0.0.1:1/?key={KEY}"]
)
def test_no_failure_shows_a_credential(url):
    text = str(requests_failure(error_of(requests.post, url), Client()))

    assert text.startswith("transport: ")
    assert KEY not in text


@pytest.mark.parametrize("response", [None, requests.Response()])
def test_an_error_without_a_text_is_told_by_its_type(response):
    error = requests.ConnectionError(response=response)
    assert str(requests_failure(error, object())) == "transport: ConnectionError"


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("no file")])
def test_any_other_error_is_a_bug(error):
    assert requests_failure(error, object()) is None


def test_the_question_does_not_load_requests():
    code = (
        "import sys; from outbox.upload.custom import requests_failure;"
        "assert requests_failure(ValueError(), None) is None; assert 'requests' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
