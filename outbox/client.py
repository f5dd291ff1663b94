"""The upload client over HTTP: one POST a batch."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.client
import importlib.metadata
import io
import ipaddress
import os
import re
import threading
import time
import zlib
from datetime import timezone
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

import requests
import urllib3.exceptions
from requests import utils
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import parse_url

from outbox import policy
from outbox.clock import now_ms
from outbox.failures import ConfigurationError, HttpFailure, TransportFailure, UploadFailure

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

MAX_ANSWER_BYTES = 64 * 1024
"""How much of an answer's body is read, before and after decoding."""

SNIPPET_LENGTH = 200
"""How many characters of the server's text a failure keeps."""

REDACTED = "[REDACTED-TOKEN]"
"""What stands in a failure's text where the server repeated a credential."""

_SHORTEST_SECRET = 8
_LONGEST_SPELLING = 12  # of one character: four percent-encoded bytes
_GZIP_FROM_BYTES = 1024
# One TLS record: a larger piece would be several writes, each with the whole time-out for itself.
_PIECE_BYTES = 16 * 1024
_DRAIN_MS = 500

_TRANSPORT_ERRORS = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
    UnicodeError,
    zlib.error,
)


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

    `deadline_ms` is for a whole upload, whatever the server does; `connect_timeout_ms` is for each address of
    the host, `read_timeout_ms` for a silence of the server. Only a name look-up can't be interrupted, but
    nothing is sent when it ends after the deadline. `gzip` compresses bodies over 1 KiB.

    `proxies` maps schemes to proxy URLs, as in requests; None takes them from the environment, except for
    this machine. `verify` is a CA bundle or directory; None takes it from the environment, True is the bundle
    of requests. The environment is read once, here; `.netrc` is never read.

    Threads can share a client, and it can be used after a fork: each thread has its own connection, kept
    alive until `close` or until the client is gone.
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
        for name, value in (
            ("connect_timeout_ms", connect_timeout_ms),
            ("read_timeout_ms", read_timeout_ms),
            ("deadline_ms", deadline_ms),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"{name} is {value!r}, expected a whole number above 0")
        self.base_url = base_url
        self.deadline_ms = deadline_ms
        self._connect_s = min(connect_timeout_ms, deadline_ms) / 1_000
        self._read_s = min(read_timeout_ms, deadline_ms) / 1_000
        self._gzip = gzip
        self._template, is_plain, is_local = _template(base_url)
        if isinstance(token, str) and (problem := _problem_of(token)):
            raise ConfigurationError(f"token: {problem}")
        if token and is_plain and not is_local and not allow_insecure:
            raise ConfigurationError(
                f"base_url is {base_url!r}: the token would be readable on its way; expected https, "
                "or http to localhost, or allow_insecure=True"
            )
        self._token = token
        self._proxies, self._proxy_secrets = _proxy(str(self._template.url), proxies, is_local=is_local)
        self._verify = _ca_bundle(verify)
        # By process as well: a connection that a fork has copied belongs to the parent.
        self._adapters: dict[tuple[int, int], _Adapter] = {}

    @property
    def logged_in(self) -> bool:
        """Whether there is a token. Asks the callable, where there is one."""
        return bool(self._current_token())

    def upload(self, batch: Sequence[Item]) -> None:
        """Deliver the batch in one request, or raise an `UploadFailure`.

        Whatever the token's callable raises goes through: that is no failure of the upload.
        """
        token = self._current_token()
        if problem := _problem_of(token) if token else "none there, not logged in":
            raise TransportFailure(f"token: {problem}")
        request = self._request(batch, str(token))
        secrets = sorted((str(token), *self._proxy_secrets), key=len, reverse=True)
        failure = self._exchange(request, secrets)
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Close the connections of all threads. A later upload opens new ones."""
        while self._adapters:
            self._adapters.popitem()[1].close()

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

    def _exchange(self, request: requests.PreparedRequest, secrets: Sequence[str]) -> UploadFailure | None:
        """Send the request, and return what went wrong.

        Raised by the caller, the failure has no context: the error below it may repeat a credential, and the
        frames of its traceback hold the token and the connection.
        """
        _deadline.start(self.deadline_ms, self._read_s)
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
                    _drain(response)
                    return None
                return _failure(response, secrets)
        except _TRANSPORT_ERRORS as error:
            over = f"no complete answer within {self.deadline_ms} ms"
            text = over if _deadline.is_over() else _describe(error)
            return TransportFailure(_one_line(_redact(text, secrets)))

    def _adapter(self) -> _Adapter:
        key = os.getpid(), threading.get_ident()
        adapter = self._adapters.get(key)
        if adapter is None:
            adapter = self._adapters[key] = _Adapter(max_retries=0)
        return adapter


# --- the deadline ---


class _Deadline(threading.local):
    """When the upload that this thread is busy with must end.

    A socket's time-out is for one operation, so a server that sends a byte a second is never late. Therefore
    every operation is given what is left of the whole, and no more. This needs no second thread, which could
    not be started while the interpreter shuts down, when a last flush may run.
    """

    # Bound in the class: tools that freeze time replace the names in modules. By a clock that stands still no
    # upload would ever end, by one that is moved on it would end at once.
    _now = staticmethod(time.monotonic)
    _end = 0.0
    _longest = 0.0

    def start(self, total_ms: int, operation_s: float) -> None:
        self._end = self._now() + total_ms / 1_000
        self._longest = operation_s

    def shorten(self, total_ms: int) -> None:
        self._end = min(self._end, self._now() + total_ms / 1_000)

    def is_over(self) -> bool:
        return self._now() >= self._end

    def timeout(self) -> float:
        """Return the seconds that the next operation may take. Raises TimeoutError when none are left."""
        left = self._end - self._now()
        if left <= 0:
            raise TimeoutError("deadline")
        return min(left, self._longest)


_deadline = _Deadline()


class _Reader(io.RawIOBase):
    def __init__(self, sock: socket.socket, raw: io.RawIOBase) -> None:
        self._sock = sock
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_deadline.timeout())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, debuglevel: int = 0, method: str | None = None) -> None:
        super().__init__(sock, debuglevel, method)
        self.fp = io.BufferedReader(_Reader(sock, self.fp.detach()))


class _Connection(HTTPConnection):
    response_class = _Response

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        rest = memoryview(data)
        while rest:
            self.sock.settimeout(_deadline.timeout())
            super().send(rest[:_PIECE_BYTES])
            rest = rest[_PIECE_BYTES:]


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Adapter(HTTPAdapter):
    def get_connection_with_tls_context(
        self,
        request: requests.PreparedRequest,
        verify: bool | str | None,  # noqa: FBT001 - the base's signature
        proxies: Mapping[str, str] | None = None,
        cert: tuple[str, str] | str | None = None,
    ) -> Any:
        pool: Any = super().get_connection_with_tls_context(request, verify, proxies, cert)
        pool.ConnectionCls = _TlsConnection if pool.scheme == "https" else _Connection
        return pool


# --- settings ---


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
    return {"all": proxy}, (password, basic) if password else ()


def _ca_bundle(verify: str | os.PathLike[str] | Literal[True] | None) -> str:
    if verify is None:
        verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
    path = utils.DEFAULT_CA_BUNDLE_PATH if verify is True else os.fspath(verify)
    if not Path(path).exists():
        raise ConfigurationError(
            f"verify (or REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE) is {path!r}, expected an existing file or folder"
        )
    return path


# --- answers ---


def _drain(response: requests.Response) -> None:
    """Read the rest of a short body, so that the connection can be used again."""
    _deadline.shorten(_DRAIN_MS)
    try:
        response.raw.read(MAX_ANSWER_BYTES, decode_content=False)
    except _TRANSPORT_ERRORS:
        # The batch is delivered, however the answer goes on.
        response.close()


def _failure(response: requests.Response, secrets: Iterable[str]) -> HttpFailure:
    body, is_cut = _body(response)
    text = body.decode(errors="replace")
    delay_ms = policy.retry_after(text)
    if delay_ms is None:
        delay_ms = _header_delay_ms(response.headers.get("Retry-After", ""))
    if is_cut:
        # The cut may have gone through a credential, of which no pattern would find the beginning.
        text = text[: -_LONGEST_SPELLING * max(map(len, secrets))]
    return HttpFailure(
        response.status_code,
        _one_line(_redact(response.reason or "", secrets))[:SNIPPET_LENGTH] or _phrase(response.status_code),
        _one_line(_redact(text, secrets))[:SNIPPET_LENGTH],
        retry_after_ms=delay_ms,
    )


def _body(response: requests.Response) -> tuple[bytes, bool]:
    """Return the body, decoded, and whether it was longer than what is read."""
    limit = MAX_ANSWER_BYTES
    body = b""
    # Until nothing comes: only then a connection that broke off is noticed.
    while len(body) <= limit and (piece := response.raw.read(limit + 1 - len(body), decode_content=False)):
        body += piece
    is_cut = len(body) > limit
    body = body[:limit]
    # Asked for or not, a server may compress; a small body may hide a huge one.
    if response.headers.get("Content-Encoding", "").lower() in ("gzip", "x-gzip", "deflate"):
        body = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, limit + 1)
        is_cut = is_cut or len(body) > limit
    return body[:limit], is_cut


def _header_delay_ms(value: str) -> int | None:
    value = value.strip()
    if re.fullmatch("[0-9]{1,18}", value):
        return policy.clamp_retry_after(int(value))
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    # Rounded up: to come back a moment too early is to be refused again.
    return policy.clamp_retry_after(-(-(int(date.timestamp()) * 1_000 - now_ms()) // 1_000))


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _describe(error: BaseException) -> str:
    """Return what went wrong in the end: outer errors only repeat the address."""
    inner: BaseException | None = error
    root = error
    while inner is not None:
        root = inner
        causes = (root.__cause__, getattr(root, "reason", None), *root.args)
        inner = next((cause for cause in causes if isinstance(cause, BaseException)), None)
    return f"{type(error).__name__}: {root}"


def _redact(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        if len(secret) >= _SHORTEST_SECRET:
            text = re.sub(_any_spelling(secret), REDACTED, text, flags=re.IGNORECASE)
    return text


def _any_spelling(secret: str) -> str:
    """Return a pattern for the text with any of its characters escaped as in JSON or a URL."""
    # Beyond ASCII a server may answer in another encoding than the one that its text is read in.
    latin_as_utf8 = secret.encode("latin-1", "replace").decode(errors="replace")
    utf8_as_latin = secret.encode(errors="replace").decode("latin-1")
    return "|".join("".join(map(_spelling, reading)) for reading in {secret, latin_as_utf8, utf8_as_latin})


def _spelling(char: str) -> str:
    percent = "".join(f"%{byte:02x}" for byte in char.encode(errors="replace"))
    return rf"(?:\\?{re.escape(char)}|\\u{ord(char):04x}|{percent})"


def _one_line(text: str) -> str:
    # PostgreSQL takes no NUL in a text, and a failure's text is stored.
    return " ".join(text.replace("\0", "\ufffd").split())
