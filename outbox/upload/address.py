"""Where requests go: checks of the base URL, the proxy and the accepted certificates."""

from __future__ import annotations

import base64
import importlib.metadata
import ipaddress
import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

import requests
import urllib3.exceptions
from requests import utils
from urllib3.util import parse_url

from outbox.failures import ConfigurationError


def request_template(
    base_url: str, path: str, *, name: str = "base_url"
) -> tuple[requests.PreparedRequest, bool, bool]:
    """Return a request without a body, whether it is plain http, and whether it is to this machine.

    `name` is the name of `base_url` in errors.
    """
    # A URL with a user, query or fragment may contain a credential, so the message does not repeat it.
    expected = "expected http:// or https://, a host and an optional path, such as https://api.example.com/v1"
    if not isinstance(base_url, str):
        raise ConfigurationError(f"{name} is of type {type(base_url).__name__}, {expected}")
    shown = "(not shown: it may hold a credential)" if re.search("[@?#]", base_url) else repr(base_url)
    refusal = ConfigurationError(f"{name} is {shown}, {expected}")
    if not re.fullmatch(r"https?://[^\s\x00-\x1f\x7f\\@?#]+", base_url, re.IGNORECASE):
        raise refusal
    if not isinstance(path, str) or not re.fullmatch(
        r"(?:/[^\s\x00-\x1f\x7f\\?#]*(?:\?[^\s\x00-\x1f\x7f#]*)?)?", path
    ):
        raise ConfigurationError(
            "path (not shown: it may hold a credential), expected an empty text, or / and a path"
        )
    request = requests.Request(
        "POST",
        base_url.rstrip("/") + path if path else base_url,
        headers={
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": f"observation-outbox/{_version()}",
        },
    )
    try:
        template = request.prepare()
        # Parsed by the parser that also decides where the request goes.
        url = parse_url(str(template.url))
    except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError):
        raise refusal from None
    return template, url.scheme == "http", _is_this_machine(str(url.host))


def is_on_this_machine(url: str) -> bool:
    """Return whether the host of the URL is this machine."""
    return _is_this_machine(str(parse_url(url).host))


def _version() -> str:
    try:
        return importlib.metadata.version("observation-outbox")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "0"


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def proxy_for(
    url: str, proxies: Mapping[str, str] | None, *, is_local: bool
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the proxy in the form that requests expects, and the credentials in it."""
    if proxies is None:
        # A plain-text request to this machine must not go to a proxy on another one.
        proxies = {} if is_local else utils.get_environ_proxies(url)
    if not isinstance(proxies, Mapping):
        raise ConfigurationError(
            f"proxies is of type {type(proxies).__name__}, expected a mapping of schemes to URLs"
        )
    chosen = utils.select_proxy(url, dict(proxies))
    if not chosen:
        return {}, ()
    try:
        proxy = chosen if "://" in chosen else f"http://{chosen}"
        parts = parse_url(proxy)
        user, password = utils.get_auth_from_url(proxy)
        basic = base64.b64encode(f"{user}:{password}".encode("latin-1")).decode()
        is_usable = parts.scheme in ("http", "https") and parts.host
    except (urllib3.exceptions.HTTPError, ValueError, TypeError):
        is_usable = False
    if not is_usable:
        raise ConfigurationError(
            "the proxy for base_url (from proxies, or HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) can't be used, "
            "expected http:// or https://, a host, and a password of latin-1 if any; SOCKS is not supported"
        )
    if not parts.auth:
        return {"all": proxy}, ()
    # A user without a password may be a key.
    return {"all": proxy}, (password or user or unquote(parts.auth), basic)


def ca_bundle(verify: str | os.PathLike[str] | Literal[True] | None) -> str:
    """Return the path of the certificates to accept. Raises `ConfigurationError` if there is none."""
    if verify is None:
        verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
    path = utils.DEFAULT_CA_BUNDLE_PATH if verify is True else verify
    # With an empty path requests would accept any certificate.
    if not path or not isinstance(path, str | os.PathLike) or not Path(path).exists():
        raise ConfigurationError(
            f"verify (or REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE) is {verify!r}, expected an existing file or folder"
        )
    return str(Path(path).absolute())  # a daemon may change its working directory


Certificate = str | os.PathLike[str] | tuple[str | os.PathLike[str], str | os.PathLike[str]]
"""The file of a client's certificate and key, or the files of both."""


def client_certificate(cert: Certificate | None) -> tuple[str, str] | None:
    """Return the paths of the certificate and its key, which may be one file. Raises `ConfigurationError`."""
    if cert is None:
        return None
    try:
        certificate, key = cert if isinstance(cert, tuple) else (cert, cert)
        paths = str(Path(certificate).absolute()), str(Path(key).absolute())
        # Without a password, OpenSSL would ask for that of an encrypted key at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(*paths, password="")
    except (OSError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"cert is {cert!r}, expected a file with a certificate and its key, or a tuple of the two files,"
            f" and a key without a password: {error}"
        ) from None
    return paths
