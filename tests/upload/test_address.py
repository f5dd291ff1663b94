from __future__ import annotations

import base64
import json
import socket
import subprocess
import urllib.parse

import pytest

from outbox.failures import ConfigurationError
from outbox.testing.answers import Answer
from outbox.upload.auth import NO_AUTH
from outbox.upload.client import HttpClient
from peers import (
    ACCEPTED,
    BATCH,
    TOKEN,
    Peer,
    Proxy,
    answers,
    authority,
    failure_of,
    proxied,
    tls_peer,
)

# --- the base URL ---


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


@pytest.mark.parametrize("url", [None, 5, b"https://ingest.example", ["https://ingest.example"]])
def test_a_url_that_is_no_text_is_refused(url):
    with pytest.raises(ConfigurationError, match=f"^base_url is of type {type(url).__name__}, expected http://"):
        HttpClient(url, token=TOKEN)


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


@pytest.mark.parametrize("token", [TOKEN, lambda: TOKEN])
def test_a_proxys_password_is_known_before_the_first_upload(token):
    proxies = {"https": with_password("http://127.0.0.1:1")}
    with HttpClient("https://ingest.example", token=token, proxies=proxies) as client:
        assert client.redact(f"no {PASSWORD}") == "no [REDACTED-TOKEN]"


def test_a_proxys_password_that_begins_with_the_token_is_taken_out_whole(server):
    password = f"{TOKEN}-of-the-proxy"
    server.script(Answer(502, f"not {password}"))
    with proxied(server) as (_, url):
        proxy = url.replace("//", f"//someone:{urllib.parse.quote(password, safe='')}@")
        with HttpClient(server.url, token=TOKEN, proxies={"http": proxy}) as client:
            assert failure_of(client).body_snippet == "not [REDACTED-TOKEN]"


@pytest.mark.parametrize(
    "proxy",
    [
        "socks5://127.0.0.1:1",
        "http://",
        "ftp://u:password@h",
        "http://u:password@[::1",
        "http://u:password%e2%82%ac@h",
        5,
    ],
)
def test_a_proxy_that_can_not_be_used_is_refused_without_showing_it(proxy):
    with pytest.raises(ConfigurationError, match=r"proxy for base_url .* expected http:// or https://") as caught:
        HttpClient("https://ingest.example", token=TOKEN, proxies={"https": proxy})

    assert "u:password" not in str(caught.value)


@pytest.mark.parametrize("token", [TOKEN, lambda: TOKEN])
@pytest.mark.parametrize("proxy", ["http://proxy.example:1", "https://proxy.example"])
def test_a_token_for_this_machine_is_not_sent_in_plain_text_to_a_proxy_elsewhere(token, proxy):
    with pytest.raises(ConfigurationError, match="sent unencrypted; .* without a proxy on another machine"):
        HttpClient("http://localhost", token=token, proxies={"all": proxy})

    assert HttpClient("http://localhost", token=token, proxies={"all": proxy}, allow_insecure=True).logged_in
    assert HttpClient("https://localhost", token=token, proxies={"all": proxy}).logged_in


@pytest.mark.parametrize("proxies", ["http://127.0.0.1:1", 5, [("https", "http://127.0.0.1:1")]])
def test_proxies_that_are_no_mapping_are_refused(proxies):
    with pytest.raises(
        ConfigurationError, match=f"^proxies is of type {type(proxies).__name__}, expected a mapping"
    ):
        HttpClient("https://ingest.example", token=TOKEN, proxies=proxies)


@pytest.mark.parametrize("colon", [":", ""])
def test_a_proxys_key_without_a_password_is_taken_out_of_failures(server, colon):
    basic = base64.b64encode(b"key-of-the-proxy:").decode()
    server.script(Answer(502, f"key-of-the-proxy, {basic if colon else ''}"))
    with proxied(server) as (proxy, url):
        with_key = url.replace("//", f"//key-of-the-proxy{colon}@")
        with HttpClient(server.url, token=TOKEN, proxies={"http": with_key}) as client:
            snippet = failure_of(client).body_snippet

    assert snippet.replace(" [REDACTED-TOKEN]", "") == "[REDACTED-TOKEN],"
    assert (basic in proxy.heads[0]) == bool(colon)


def test_a_proxy_that_refuses_is_a_transport_failure():
    refusal = f"HTTP/1.1 407 {PASSWORD} needed\r\n\r\n".encode("latin-1")
    with (
        Peer(answers(refusal)) as peer,
        HttpClient("https://ingest.example", token=TOKEN, proxies={"https": with_password(peer.url)}) as client,
    ):
        failure = failure_of(client)

    assert str(failure) == "transport: ProxyError: Tunnel connection failed: 407 [REDACTED-TOKEN] needed"


# --- TLS ---


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


def test_a_ca_bundle_is_found_from_any_directory(trusted, tmp_path, monkeypatch):
    monkeypatch.chdir(trusted.parent)
    with (
        tls_peer(trusted, answers(ACCEPTED)) as peer,
        HttpClient(peer.url, token=TOKEN, verify=trusted.name) as client,
    ):
        monkeypatch.chdir(tmp_path)
        client.upload(BATCH)


@pytest.mark.parametrize("verify", ["", False, 5, b"/etc"])
def test_what_is_no_ca_bundle_is_refused(verify):
    with pytest.raises(ConfigurationError, match=r"^verify .* is .*, expected an existing file or folder$"):
        HttpClient("https://ingest.example", token=TOKEN, verify=verify)


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


@pytest.mark.parametrize("is_tunnel", [True, False])
def test_a_proxy_may_be_spoken_to_over_tls(trusted, is_tunnel):
    server = tls_peer(trusted, answers(ACCEPTED)) if is_tunnel else Peer(answers(ACCEPTED))
    with server as peer:
        proxy = Proxy(peer.port)
        url = peer.url if is_tunnel else "http://ingest.example"
        with (
            tls_peer(trusted, proxy) as way,
            HttpClient(url, token=TOKEN, verify=trusted, proxies={"all": way.url}, allow_insecure=True) as client,
        ):
            client.upload(BATCH)

    assert proxy.heads[0].startswith("CONNECT " if is_tunnel else "POST http://ingest.example/")


@pytest.mark.parametrize("url", ["https://ingest.example", "http://ingest.example"])
def test_a_proxy_with_an_unknown_certificate_hears_nothing(trusted, url):
    proxy = Proxy(1)
    with (
        tls_peer(trusted, proxy) as way,
        HttpClient(url, token=TOKEN, proxies={"all": with_password(way.url)}, allow_insecure=True) as client,
    ):
        assert "certificate verify failed" in str(failure_of(client))

    assert proxy.heads == []


def test_plain_text_in_place_of_tls_is_a_transport_failure(server):
    with HttpClient(server.url.replace("http:", "https:"), token=TOKEN) as client:
        assert str(failure_of(client)).startswith("transport: ")


# --- the path ---


@pytest.mark.parametrize(
    ("base", "path", "target"),
    [
        ("", "", "/"),
        ("/hook", "", "/hook"),
        ("/hook/", "", "/hook/"),
        ("/v1/", "/events", "/v1/events"),
        ("/v1", "/events/", "/v1/events/"),
        ("", "/a%20b/é?key=a%2Fb&x", "/a%20b/%C3%A9?key=a%2Fb&x"),
    ],
)
def test_a_path_is_added_to_the_base_url(server, base, path, target):
    with HttpClient(server.url + base, path=path, token=TOKEN) as client:
        client.upload(BATCH)

    assert server.requests[0].path == target


@pytest.mark.parametrize("path", ["events", "?key=password", "/a b", "/a#b", "/a\n", "/a\\b", None, 5, b"/"])
def test_a_path_that_can_not_work_is_refused_without_showing_it(path):
    with pytest.raises(
        ConfigurationError, match=r"^path \(not shown: .*, expected an empty text, or / and a path$"
    ):
        HttpClient("https://ingest.example", path=path)


def test_a_credential_in_the_query_of_the_path_is_never_shown(server):
    server.script(Answer(400, "no handler for /hook?key=a%20secret%20word"))
    with HttpClient(server.url, path="/hook?key=a%20secret%20word", token=TOKEN) as client:
        assert failure_of(client).body_snippet == "no handler for /hook?key=[REDACTED-TOKEN]"
        assert client.redact("a secret word") == "[REDACTED-TOKEN]"
        assert "secret" not in repr(client)


# --- mutual TLS ---


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return authority(tmp_path_factory.mktemp("authority"))


@pytest.mark.parametrize("are_two_files", [False, True])
def test_a_client_certificate_is_shown_to_a_service_that_asks(certificates, are_two_files):
    ca, own, cert = certificates
    cert = (cert.with_suffix(".crt"), str(cert.with_suffix(".key"))) if are_two_files else cert
    with (
        tls_peer(own, answers(ACCEPTED), clients_of=ca) as peer,
        HttpClient(peer.url, auth=NO_AUTH, verify=ca, cert=cert) as client,
    ):
        client.upload(BATCH)


def test_without_a_client_certificate_such_a_service_accepts_nothing(certificates):
    ca, own, _ = certificates
    with (
        tls_peer(own, answers(ACCEPTED), clients_of=ca) as peer,
        HttpClient(peer.url, auth=NO_AUTH, verify=ca) as client,
    ):
        assert str(failure_of(client)).startswith("transport: ")


def test_what_is_no_client_certificate_is_refused(certificates, tmp_path):
    ca, _, cert = certificates
    encrypted = tmp_path / "encrypted.key"
    command = ["openssl", "rsa", "-aes128", "-passout", "pass:word", "-in", cert, "-out", encrypted]
    subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "cert.pem").write_text("no certificate")
    for wrong in (
        "missing.pem",
        tmp_path / "cert.pem",
        (cert.with_suffix(".crt"), ca.parent / "server.key"),
        (cert.with_suffix(".crt"), encrypted),
        (cert, cert, cert),
        5,
    ):
        with pytest.raises(
            ConfigurationError, match=r"^cert is .*, expected a file with a certificate and its key"
        ):
            HttpClient("https://ingest.example", cert=wrong)
