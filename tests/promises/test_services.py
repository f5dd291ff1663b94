"""Events reach services of other kinds: real ones on this machine. Each client is what an application writes for it."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import closing, contextmanager

import pytest
from cloudevents.core.bindings import http
from standardwebhooks import Webhook

from builders import row, rule_fired, statuses
from conditions import until
from outbox import NO_AUTH, ApiKey, Hooks, HttpClient, Policy, StandardWebhooks
from peers import TOKEN, authority, forget_environment
from servers import free_port

flask = pytest.importorskip("flask")
serving = pytest.importorskip("werkzeug.serving")

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/bin")
SECRET = "whsec_c2VjcmV0LW9mLXRlc3Rz"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    forget_environment(monkeypatch)


@contextmanager
def served(application, **settings):
    """Serve a WSGI application on this machine, and return its address."""
    server = serving.make_server("127.0.0.1", 0, application, threaded=True, **settings)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# --- the size of requests ---

CONFIGURATION = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{ listen 127.0.0.1:{port}; client_max_body_size 1m; location / {{ proxy_pass {target}; }} }}
}}
"""


def is_open(port):
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def nginx(server, tmp_path):
    """The URL of an nginx before the test server, which refuses bodies over 1 MiB."""
    if NGINX is None:
        pytest.skip("needs nginx")
    port = free_port()
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(CONFIGURATION.format(folder=tmp_path, port=port, target=server.url))
    process = subprocess.Popen([NGINX, "-c", configuration, "-e", tmp_path / "error.log"])
    try:
        until(lambda: is_open(port) or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "error.log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize(("max_batch_bytes", "refused"), [(1_048_576, 0), (16 * 1_048_576, 2)])
def test_the_limit_of_nginx_is_found_once_with_at_most_two_refused_requests(
    outbox, server, nginx, max_batch_bytes, refused
):
    uploads = []
    outbox.hooks.append(Hooks(on_upload=uploads.append))
    with HttpClient(nginx, token=TOKEN, max_batch_bytes=max_batch_bytes) as client:
        for number in (range(50), range(50, 100)):
            outbox.enqueue_many([{"event_type": "scanned", "n": n, "page": "x" * 50 * 1_024} for n in number])
            assert outbox.flush_all(client).sent == 50

    failures = [upload.failure for upload in uploads if upload.failure]
    assert [failure[:3] for failure in failures] == ["413"] * refused
    assert len(server.stored) == 100
    assert {row(outbox, row_id).retry_count for row_id in range(1, 101)} == {0}


# --- other services ---


def test_an_api_with_a_key_of_its_own_takes_events_in_an_object(outbox):
    application, received = flask.Flask(__name__), []

    @application.post("/v2/events")
    def events():
        if flask.request.headers.get("X-Api-Key") != "key-of-tests":
            return "no", 401
        received.extend(flask.request.get_json()["events"])
        return "", 202

    outbox.enqueue_many([rule_fired(), rule_fired(session_id="s2")])
    with served(application) as address:
        client = HttpClient(
            f"http://{address}/v2/events", path="", auth=ApiKey("X-Api-Key", "key-of-tests"), format="json:events"
        )
        with client:
            outbox.flush_all(client)

    assert [event["session_id"] for event in received] == ["s1", "s2"]
    assert statuses(outbox) == ["sent", "sent"]


def test_a_receiver_of_standard_webhooks_verifies_each_request(outbox):
    webhook = Webhook(SECRET)
    application, received = flask.Flask(__name__), []

    @application.post("/hook")
    def hook():
        received.extend(webhook.verify(flask.request.data, dict(flask.request.headers)))
        return "", 204

    outbox.enqueue(rule_fired())
    with served(application) as address:
        client = HttpClient(f"http://{address}/hook", path="", auth=NO_AUTH, sign=StandardWebhooks(SECRET))
        with client:
            outbox.flush_all(client)

    assert [event["session_id"] for event in received] == ["s1"]
    assert statuses(outbox) == ["sent"]


@pytest.mark.parametrize("form", ["cloudevents", "cloudevents-batch"])
def test_a_receiver_of_cloud_events_stores_each_event_once(outbox, form):
    application, received, answers = flask.Flask(__name__), {}, ["", 503, "", ""]

    @application.post("/events")
    def events():
        bodies = [flask.request.data]
        if flask.request.content_type == "application/cloudevents-batch+json":
            bodies = [json.dumps(one) for one in flask.request.get_json(force=True)]
        for body in bodies:
            message = http.HTTPMessage(headers={"Content-Type": "application/cloudevents+json"}, body=body)
            event = http.from_structured(message, http.JSONFormat())
            received.setdefault(event.get_id(), event)
        status = answers.pop(0)
        return "", status or 204

    outbox.policy = Policy(backoff_ms=(1_000,), pause_ms=1)
    first, second = outbox.enqueue_many([rule_fired()] * 2, event_ids=["order-17", None])
    with served(application) as address:
        client = HttpClient(f"http://{address}/events", path="", auth=NO_AUTH, format=form)
        with client:
            for _ in range(4):
                outbox.flush(client)
                outbox.retry_now()

    assert list(received) == ["order-17", row(outbox, second).event_id]
    assert row(outbox, first).event_id == "order-17"
    assert [event.get_data() for event in received.values()] == [json.loads(row(outbox, first).payload_json)] * 2
    assert [event.get_type() for event in received.values()] == ["rule_fired"] * 2


def test_a_service_with_mutual_tls_knows_the_client_by_its_certificate(outbox, tmp_path):
    ca, own, cert = authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca)
    application, received = flask.Flask(__name__), []

    @application.post("/cloud/observations")
    def observations():
        received.extend(flask.request.get_json())
        return "", 200

    outbox.enqueue(rule_fired())
    with served(application, ssl_context=context) as address:
        client = HttpClient(f"https://{address}", auth=NO_AUTH, verify=ca, cert=cert)
        with client:
            outbox.flush_all(client)

    assert [event["session_id"] for event in received] == ["s1"]
    assert statuses(outbox) == ["sent"]
