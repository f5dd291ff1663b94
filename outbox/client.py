"""The upload client over HTTP: one POST a batch."""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.metadata
import ipaddress
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol
from urllib.parse import unquote

import requests
import urllib3.exceptions
from requests import utils
from requests.adapters import HTTPAdapter
from urllib3.util import parse_url

from outbox.answer import TRANSPORT_ERRORS, drain, no_answer, rejection
from outbox.deadline import Connection, TlsConnection, deadline
from outbox.failures import ConfigurationError, TransportFailure, UploadFailure
from outbox.redaction import private_locals

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

_GZIP_FROM_BYTES = 1024


class Item(Protocol):
    """What the client has to know of an event."""

    @property
    def id(self) -> int:
        """The row's id; with the payload it tells requests apart."""
        ...

    @property
    def payload_json(self) -> str:
        """The JSON text that is sent as it is."""
        ...


class HttpClient:
    """Uploads batches by `POST <base_url>/cloud/observations`.

    `token` is the bearer token, or a callable that is asked for it before each upload; None or an empty text
    means not logged in. It is only sent over https, or over http to this machine, unless `allow_insecure`.

    `deadline_ms` is for a whole upload, whatever the server does, and for the token's callable;
    `connect_timeout_ms` is for each address of the host, `read_timeout_ms` for a silence of the server. Only the
    callable and a name look-up can't be interrupted, but nothing is sent when they end after the deadline.
    `gzip` compresses bodies over 1 KiB.

    `proxies` maps schemes to proxy URLs, as in requests; None takes them from the environment, except for
    this machine. `verify` is a CA bundle or directory; None takes it from the environment, True is the bundle
    of requests. The environment is read once, here; a netrc file never is.

    No text, log record or traceback of ours shows a credential, local variables included. What does hold them:
    the attributes of the client, the caller's own variables, and a dump of the memory.

    Threads can share a client, and it can be used after a fork: each thread has its own connection, kept
    alive until `close`, or until the thread or the client is gone.
    Raises `ConfigurationError` for a setting that can't work.
    """

    def __init__(  # noqa: PLR0913 - keyword-only settings, each with a default
        self,
        base_url: str,
        *,
        token: str | Callable[[], str | None] | None = None,
        connect_timeout_ms: int = 5_000,
        read_timeout_ms: int = 15_000,
        deadline_ms: int = 45_000,
        gzip: bool = False,
        allow_insecure: bool = False,
        proxies: Mapping[str, str] | None = None,
        verify: str | os.PathLike[str] | Literal[True] | None = None,
    ) -> None:
        try:
            with private_locals():
                _check_times(
                    connect_timeout_ms=connect_timeout_ms, read_timeout_ms=read_timeout_ms, deadline_ms=deadline_ms
                )
                self._template, is_plain, is_local = _template(base_url)
                _check_token(token, base_url, is_readable=is_plain and not is_local and not allow_insecure)
                self._proxies, self._proxy_secrets = _proxy(str(self._template.url), proxies, is_local=is_local)
                self._verify = _ca_bundle(verify)
        except ConfigurationError:
            # Reports of crashes show the local variables of this frame, too, and the repr of half a client.
            del self, base_url, token, proxies
            raise
        self.base_url = base_url
        self.deadline_ms = deadline_ms
        self._connect_s = min(connect_timeout_ms, deadline_ms) / 1_000
        self._read_s = min(read_timeout_ms, deadline_ms) / 1_000
        self._gzip = gzip
        self._token = token
        self._threads = threading.local()

    @property
    def destination(self) -> str:
        """The service whose pauses are shared: the base URL."""
        return self.base_url.rstrip("/")

    @property
    def logged_in(self) -> bool:
        """Whether there is a token. Asks the callable, where there is one."""
        return bool(self._current_token())

    def upload(self, batch: Sequence[Item]) -> None:
        """Deliver the batch in one request, or raise an `UploadFailure`.

        Whatever the token's callable raises goes through: that is no failure of the upload.
        """
        # Below are the token and the whole request, which a bug or Ctrl-C must not carry out with its frames.
        with private_locals():
            failure = self._try(batch)
        # Raised here, it has no frames below and no context.
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Close the connections of all threads. A later upload opens new ones."""
        # A connection is closed when nothing refers to it any more; one in use when its upload ends.
        self._threads = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an HttpClient can't be pickled: it holds a token and connections")

    def _current_token(self) -> str | None:
        return self._token() if callable(self._token) else self._token

    def _try(self, batch: Sequence[Item]) -> UploadFailure | None:
        deadline.start(self.deadline_ms, self._read_s)
        token = self._current_token()
        if problem := _problem_of(token) if token else "none there, not logged in":
            return TransportFailure(f"token: {problem}")
        request = self._request(batch, str(token))
        secrets = sorted((str(token), *self._proxy_secrets), key=len, reverse=True)
        try:
            # The adapter and no session: a session would read the whole of a redirect's body, keep cookies
            # and replace the Authorization header by what .netrc says.
            with self._adapter().send(
                request,
                stream=True,
                timeout=(self._connect_s, self._read_s),
                verify=self._verify,
                proxies=self._proxies,
            ) as response:
                if 200 <= response.status_code <= 299:  # noqa: PLR2004 - success, as HTTP defines it
                    drain(response.raw)
                    return None
                return rejection(response.raw, secrets)
        except TRANSPORT_ERRORS as error:
            if deadline.is_over():
                return TransportFailure(f"no complete answer within {self.deadline_ms} ms")
            return no_answer(error, secrets)

    def _request(self, batch: Sequence[Item], token: str) -> requests.PreparedRequest:
        identity = hashlib.sha256()
        payloads = [item.payload_json.encode() for item in batch]
        for item, payload in zip(batch, payloads, strict=True):
            identity.update(b"%d %d " % (item.id, len(payload)))
            identity.update(payload)
        body = b"[" + b",".join(payloads) + b"]"
        # Filled into a copy, because preparing a request takes longer than sending it.
        request = self._template.copy()
        request.headers["Authorization"] = f"Bearer {token}"
        request.headers["Idempotency-Key"] = identity.hexdigest()[:32]
        if self._gzip and len(body) > _GZIP_FROM_BYTES:
            body = gzip.compress(body, mtime=0)
            request.headers["Content-Encoding"] = "gzip"
        request.body = body
        request.headers["Content-Length"] = str(len(body))
        return request

    def _adapter(self) -> _Adapter:
        own = self._threads
        if getattr(own, "process", None) != os.getpid():
            # A connection that a fork has copied belongs to the parent.
            own.process, own.adapter = os.getpid(), _Adapter(max_retries=0)
        adapter: _Adapter = own.adapter
        return adapter


class _Adapter(HTTPAdapter):
    def get_connection_with_tls_context(
        self,
        request: requests.PreparedRequest,
        verify: bool | str | None,  # noqa: FBT001 - the base's signature
        proxies: Mapping[str, str] | None = None,
        cert: tuple[str, str] | str | None = None,
    ) -> Any:
        pool: Any = super().get_connection_with_tls_context(request, verify, proxies, cert)
        pool.ConnectionCls = TlsConnection if pool.scheme == "https" else Connection
        return pool


# --- settings ---


def _check_times(**times: object) -> None:
    for name, value in times.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigurationError(f"{name} is {value!r}, expected a whole number above 0")


def _template(base_url: str) -> tuple[requests.PreparedRequest, bool, bool]:
    """Return the request without what a batch adds, whether it goes over plain http, and to this machine."""
    # A password or a key may stand in these parts, so such a URL is not repeated.
    shown = "(not shown: it may hold a secret)" if re.search("[@?#]", base_url) else repr(base_url)
    expected = "expected http:// or https://, a host and an optional path, such as https://api.example.com/v1"
    refusal = ConfigurationError(f"base_url is {shown}, {expected}")
    if not re.fullmatch(r"https?://[^\s\x00-\x1f\x7f\\@?#]+", base_url, re.IGNORECASE):
        raise refusal
    request = requests.Request(
        "POST",
        base_url.rstrip("/") + "/cloud/observations",
        headers={
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "User-Agent": f"observation-outbox/{_version()}",
        },
    )
    try:
        template = request.prepare()
        # Read by the parser that will also decide where the request goes.
        url = parse_url(str(template.url))
    except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError):
        raise refusal from None
    return template, url.scheme == "http", _is_this_machine(str(url.host))


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


def _check_token(token: object, base_url: str, *, is_readable: bool) -> None:
    if isinstance(token, str) and (problem := _problem_of(token)):
        raise ConfigurationError(f"token: {problem}")
    if token and is_readable:
        raise ConfigurationError(
            f"base_url is {base_url!r}: the token would be readable on its way; expected https, "
            "or http to localhost, or allow_insecure=True"
        )


def _problem_of(token: object) -> str | None:
    """Return why the token can't stand in a header, without repeating it."""
    if not isinstance(token, str):
        return f"got {type(token).__name__}, expected text or None"
    if not re.fullmatch(r"[\x21-\x7e\xa1-\xff]*", token):
        return "it holds white space, control characters or others than latin-1, expected one word of latin-1"
    return None


def _proxy(
    url: str, proxies: Mapping[str, str] | None, *, is_local: bool
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the proxy to use, as requests wants it, and the credentials in it."""
    if proxies is None:
        # What is allowed to go to this machine in plain text must not go to another one.
        proxies = {} if is_local else utils.get_environ_proxies(url)
    chosen = utils.select_proxy(url, dict(proxies))
    if not chosen:
        return {}, ()
    proxy = chosen if "://" in chosen else f"http://{chosen}"
    try:
        parts = parse_url(proxy)
        user, password = utils.get_auth_from_url(proxy)
        basic = base64.b64encode(f"{user}:{password}".encode("latin-1")).decode()
        is_usable = parts.scheme in ("http", "https") and parts.host
    except (urllib3.exceptions.HTTPError, ValueError):
        is_usable = False
    if not is_usable:
        raise ConfigurationError(
            "the proxy for base_url (from proxies, or HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) can't be used, "
            "expected http:// or https://, a host, and a password of latin-1 if any; SOCKS is not supported"
        )
    if not parts.auth:
        return {"all": proxy}, ()
    # A key may stand in the place of the user, without a password.
    return {"all": proxy}, (password, basic) if password else (unquote(parts.auth),)


def _ca_bundle(verify: str | os.PathLike[str] | Literal[True] | None) -> str:
    if verify is None:
        verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
    path = utils.DEFAULT_CA_BUNDLE_PATH if verify is True else os.fspath(verify)
    if not Path(path).exists():
        raise ConfigurationError(
            f"verify (or REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE) is {path!r}, expected an existing file or folder"
        )
    return path
