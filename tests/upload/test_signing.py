from __future__ import annotations

import base64
import hashlib
import hmac
import pickle

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from outbox.failures import ConfigurationError
from outbox.testing.answers import Answer
from outbox.upload.client import HttpClient
from outbox.upload.signing import StandardWebhooks
from peers import BATCH, TOKEN, Row, failure_of

SECRET = "whsec_" + base64.b64encode(b"a secret of the tests").decode()
OTHER = base64.b64encode(b"the next secret of the tests").decode()


def webhook(secret):
    """Return the official verifier."""
    return Webhook(secret)


def test_the_official_package_verifies_the_signature(server):
    with HttpClient(server.url, token=TOKEN, sign=StandardWebhooks(SECRET)) as client:
        client.upload([Row(1, '{"a":"é"}')])

    (request,) = server.requests
    assert webhook(SECRET).verify(request.body, dict(request.headers)) == [{"a": "é"}]
    assert request.headers["webhook-id"] == request.headers["Idempotency-Key"]


@pytest.mark.parametrize("form", ["single", "cloudevents"])
def test_a_message_of_one_event_has_its_id(server, form):
    server.format = form
    with HttpClient(server.url, token=TOKEN, format=form, sign=StandardWebhooks(SECRET)) as client:
        client.upload(BATCH)

    (request,) = server.requests
    webhook(SECRET).verify(request.body, dict(request.headers))
    assert request.headers["webhook-id"] == "event-1"


def test_during_a_rotation_both_secrets_verify(server):
    with HttpClient(server.url, token=TOKEN, sign=StandardWebhooks(SECRET, OTHER)) as client:
        client.upload(BATCH)

    (request,) = server.requests
    for secret in (SECRET, OTHER):
        webhook(secret).verify(request.body, dict(request.headers))
    assert len(request.headers["webhook-signature"].split()) == 2


def test_another_body_does_not_verify(server):
    with HttpClient(server.url, token=TOKEN, sign=StandardWebhooks(SECRET)) as client:
        client.upload(BATCH)

    verifier = webhook(SECRET)
    with pytest.raises(WebhookVerificationError):
        verifier.verify(server.requests[0].body + b" ", dict(server.requests[0].headers))


def test_each_try_has_a_fresh_time_and_the_same_id(server, noon):
    server.script(503)
    with HttpClient(server.url, token=TOKEN, sign=StandardWebhooks(SECRET)) as client:
        failure_of(client)
        noon.travel(minutes=2)
        client.upload(BATCH)

    first, second = (request.headers for request in server.requests)
    assert first["webhook-id"] == second["webhook-id"]
    assert int(second["webhook-timestamp"]) - int(first["webhook-timestamp"]) == 120
    assert first["webhook-signature"] != second["webhook-signature"]


def test_the_test_server_asks_for_a_signature(server):
    server.secret = OTHER
    with HttpClient(server.url, token=TOKEN, sign=StandardWebhooks(SECRET)) as client:
        assert failure_of(client).status == 401
        server.secret = SECRET
        client.upload(BATCH)


def test_a_callable_signs_the_bytes_that_are_sent(server):
    key = b"a key"

    def sign(body, message_id, now_ms):
        assert len(message_id) == 32
        assert now_ms > 0
        return {"X-Signature": hmac.new(key, body, hashlib.sha256).hexdigest()}

    with HttpClient(server.url, token=TOKEN, sign=sign, gzip=True) as client:
        client.upload([Row(1, '{"a":"%s"}' % ("x" * 2_000))])

    (request,) = server.requests
    assert request.headers["Content-Encoding"] == "gzip"
    assert request.headers["X-Signature"] == hmac.new(key, request.body, hashlib.sha256).hexdigest()


def test_a_secret_that_rotates_is_asked_for_before_each_upload(server):
    secrets = iter([SECRET, OTHER])
    with HttpClient(server.url, token=TOKEN, sign=StandardWebhooks(lambda: next(secrets))) as client:
        for secret in (SECRET, OTHER):
            client.upload(BATCH)
            webhook(secret).verify(server.requests[-1].body, dict(server.requests[-1].headers))


@pytest.mark.parametrize("given", [SECRET, lambda: SECRET])
@pytest.mark.parametrize("echoed", [SECRET, SECRET.removeprefix("whsec_")])
def test_a_secret_is_taken_out_of_failures(server, given, echoed):
    server.script(Answer(400, f"not {echoed}"))
    with HttpClient(server.url, token=TOKEN, sign=StandardWebhooks(given)) as client:
        assert failure_of(client).body_snippet == "not [REDACTED-TOKEN]"


BAD_SECRETS = ["", "whsec_", "no base64!", "Zm9v=Zm9v", b"Zm9v", 5]


@pytest.mark.parametrize("secret", BAD_SECRETS)
def test_what_is_no_secret_is_refused_without_showing_it(secret):
    with pytest.raises(ConfigurationError, match=r"^StandardWebhooks: a secret is .*, expected whsec_") as caught:
        StandardWebhooks(SECRET, secret)

    assert "Zm9v" not in str(caught.value)
    frames = [frame.frame.f_locals for frame in caught.traceback if frame.path.name == "signing.py"]
    assert frames
    assert "Zm9v" not in str(frames)


@pytest.mark.parametrize("secret", [*BAD_SECRETS, None])
def test_a_callable_that_returns_no_secret_is_a_transport_failure(server, secret):
    with HttpClient(server.url, token=TOKEN, sign=StandardWebhooks(lambda: secret)) as client:
        assert str(failure_of(client)).startswith("transport: sign: a secret is ")

    assert server.requests == []


def test_no_secret_at_all_is_refused():
    with pytest.raises(ConfigurationError, match="StandardWebhooks has no secret, expected at least one"):
        StandardWebhooks()


def test_what_can_not_sign_is_refused():
    with pytest.raises(ConfigurationError, match="sign is of type str, expected a callable or None"):
        HttpClient("https://ingest.example", sign=SECRET)


def test_a_signer_shows_no_secret_and_does_not_travel():
    signer = StandardWebhooks(SECRET)

    assert repr(signer) == "StandardWebhooks(…)"
    with pytest.raises(TypeError, match="StandardWebhooks can't be pickled: it holds a secret"):
        pickle.dumps(signer)
