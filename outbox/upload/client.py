"""Uploads events over HTTP, one POST for each batch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from operator import is_
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

import requests
from urllib3 import BaseHTTPResponse

from outbox import tracing
from outbox.clock import now_ms
from outbox.failures import ConfigurationError, HttpFailure, TransportFailure, UploadFailure
from outbox.upload.address import Certificate
from outbox.upload.answer import TRANSPORT_ERRORS, drain, no_answer, rejection
from outbox.upload.auth import Auth, Headers, login
from outbox.upload.compression import compressed, compressor
from outbox.upload.deadline import Progress, upload_within
from outbox.upload.endpoint import Endpoint
from outbox.upload.formats import Format, Item, LearnedSize, fit, format_of
from outbox.upload.redaction import private_locals, redact
from outbox.upload.results import AnswerReader, Outcomes, ReadAnswer
from outbox.upload.secrets import Secret
from outbox.upload.signing import Sign

if TYPE_CHECKING:
    from typing_extensions import Self


class HttpClient:
    """Uploads batches by `POST <base_url><path>`.

    With `path=""`, requests go to `base_url` itself. A credential in a URL belongs in the query of `path`, which
    is never shown.

    `token` is the bearer token. `auth` replaces it: `(user, password)`, an `ApiKey`, `ClientCredentials` of
    OAuth 2, a callable that adds the credentials to the prepared request, or `NO_AUTH`. Without credentials, or
    with an empty token, the client is not logged in. `headers` are added to each request. Each of these texts may
    be a callable, which is called before each upload. Requests are only sent over https, or over http to this
    machine, unless `allow_insecure` is set.

    `format` is the shape of the body: `json`, `json:KEY`, `ndjson`, `single`, `cloudevents`, `cloudevents-batch`,
    or an object such as a `Format`.
    `sign` is a callable that returns the headers that sign a body, such as `StandardWebhooks`. `gzip` or `zstd`
    compresses bodies over 1 KiB. `max_batch_bytes` limits a body before compression; `fit` applies it.

    `read_answer` reads an outcome for each event from a 2xx with at most `max_answer_bytes`: `results`, which is a
    list of objects with a `status`, or a callable. Without it, a 2xx accepts the whole batch, and its body is not
    read.

    `deadline_ms` limits a whole upload, including the callables, whatever the service does. `connect_timeout_ms`
    limits connecting to each address of the service, and `read_timeout_ms` each wait for data. All three are whole
    numbers from 1 to 2^31 - 1; a flush needs a `deadline_ms` of at most three quarters of the policy's `lease_ms`.
    The callables and DNS lookup can't be interrupted; if they overrun the deadline, nothing is sent. If a
    kept-alive connection returns no byte of an answer, the request is sent once more on a new connection.

    `proxies` maps schemes to proxy URLs, as in requests. With None, proxies come from the environment, except for
    URLs on this machine. `verify` is the path of a CA bundle or directory. With None it comes from the
    environment; True means the bundle of requests. The environment is read once, at construction. A netrc file is
    never read. `cert` is the file of a client's certificate and key, or a tuple of both files.

    Our texts, log records and tracebacks never show a credential, not even in local variables. The attributes of
    the client, the caller's variables and a memory dump do contain credentials.

    Threads can share a client, and it can be used after a fork: each thread has its own connection, which is kept
    alive until `close`, or until the thread or the client is gone.

    Raises `ConfigurationError` for an invalid setting.
    """

    def __init__(  # noqa: PLR0913 - keyword-only settings, each with a default
        self,
        base_url: str,
        *,
        path: str = "/cloud/observations",
        token: Secret | None = None,
        auth: Auth | None = None,
        headers: Mapping[str, Secret] | None = None,
        format: Format | str = "json",  # noqa: A002 - the best name for callers
        sign: Sign | None = None,
        read_answer: ReadAnswer | Literal["results"] | None = None,
        max_answer_bytes: int = 65_536,
        max_batch_bytes: int = 1_048_576,
        connect_timeout_ms: int = 5_000,
        read_timeout_ms: int = 15_000,
        deadline_ms: int = 45_000,
        gzip: bool = False,
        zstd: bool = False,
        allow_insecure: bool = False,
        proxies: Mapping[str, str] | None = None,
        verify: str | os.PathLike[str] | Literal[True] | None = None,
        cert: Certificate | None = None,
    ) -> None:
        try:
            with private_locals():
                self._endpoint = Endpoint(
                    base_url,
                    path,
                    connect_timeout_ms=connect_timeout_ms,
                    read_timeout_ms=read_timeout_ms,
                    deadline_ms=deadline_ms,
                    proxies=proxies,
                    verify=verify,
                    cert=cert,
                )
                self._login = login(token, auth)
                self._headers = Headers(headers)
                if (token or auth) and not allow_insecure:
                    self._endpoint.refuse_readable()
                self._format = format_of(format)
                self._compressor = compressor(use_gzip=gzip, use_zstd=zstd)
                self._size = LearnedSize(max_batch_bytes)
                self._reader = None if read_answer is None else AnswerReader(read_answer, max_answer_bytes)
                _check_sign(sign)
        except ConfigurationError:
            # Crash reports show the local variables of this frame, and call `repr` on the incomplete client.
            del self, base_url, path, token, auth, headers, proxies, sign
            raise
        self.base_url = base_url
        self.deadline_ms = deadline_ms
        self._sign = sign
        # The events that `fit` formatted last, and their parts: `build` need not format them again.
        self._formatted: tuple[Sequence[Item], Sequence[bytes]] = (), ()
        # The credentials of the last request. What a callable returns is known from its first request on.
        self._credentials: Sequence[str] = self._known()

    @property
    def logged_in(self) -> bool:
        """Whether there are credentials. Calls the callable of the token or key, if there is one."""
        return self._login.logged_in

    @property
    def one_event_per_request(self) -> bool:
        """Whether the format sends each event in a request of its own."""
        return bool(getattr(self._format, "one_event_per_request", False))

    @property
    def max_batch_bytes(self) -> int:
        """The maximum size of a body in bytes: as set, or less if the service answered a smaller body with 413."""
        return self._size.max_bytes

    def fit(self, batch: Sequence[Item]) -> int:
        """Return how many of the first events fit in one request. At least 1, if there are events."""
        if self.one_event_per_request:
            return min(len(batch), 1)
        parts = self._parts(batch)
        self._formatted = tuple(batch), parts
        return fit(self._format, parts, self.max_batch_bytes)

    def build(self, request: requests.PreparedRequest, batch: Sequence[Item]) -> None:
        """Set the body of the request and its content type, as the format says. A subclass may set more.

        The URL, the method and the `Idempotency-Key` are set already. Compression, `headers`, the signature and
        the credentials follow, so the body must be bytes.
        """
        request.headers["Content-Type"] = self._format.content_type
        request.body = self._format.body(self._parts(batch))

    def upload(self, batch: Sequence[Item]) -> Outcomes | None:
        """Deliver the batch in one request.

        Raises `HttpFailure` for a status other than 2xx, and `TransportFailure` if no usable answer came in time.

        With `read_answer`, return the failures that the service names, by row id. A row that is not in the
        mapping, or has None there, is accepted.

        An exception of a callable is raised unchanged, because it is not a failure of the upload.
        """
        # The frames below hold credentials and the request. The traceback of a bug or Ctrl-C must not expose them.
        with private_locals():
            try:
                result = self._try(batch)
            except UploadFailure as raised:
                result = raised
                # The exception that caused this one may hold credentials.
                result.__cause__ = result.__context__ = None
        # Raised here, so that its traceback has no inner frames and no context.
        if isinstance(result, UploadFailure):
            raise result.with_traceback(None)
        return result or None

    def redact(self, text: str) -> str:
        """Return the text without the credentials that this client holds."""
        return redact(text, self._credentials)

    def close(self) -> None:
        """Close the connections of all threads. A later upload opens new ones."""
        self._endpoint.close()

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

    def _parts(self, batch: Sequence[Item]) -> Sequence[bytes]:
        items, parts = self._formatted  # of this thread or of another
        if len(batch) <= len(items) and all(map(is_, batch, items)):
            self._formatted = (), ()  # they may be large
            return parts[: len(batch)]
        return [self._format.part(item) for item in batch]

    def _known(self) -> tuple[str, ...]:
        signing: tuple[str, ...] = tuple(getattr(self._sign, "credentials", ()))
        return (*self._endpoint.credentials, *self._headers.known(), *self._login.known(), *signing)

    def _try(self, batch: Sequence[Item]) -> Outcomes | UploadFailure:
        with upload_within(self.deadline_ms, self._endpoint.read_s) as progress:
            prepared = self._prepare(batch)
            result = self._send(prepared, progress)
            is_refused = isinstance(result, HttpFailure) and result.status == HTTPStatus.UNAUTHORIZED
            if is_refused and self._login.refused(prepared.request):
                result = self._send(self._prepare(batch), progress)
            return result

    def _prepare(self, batch: Sequence[Item]) -> _Prepared:
        if self.one_event_per_request and len(batch) > 1:
            raise ConfigurationError(f"the batch has {len(batch)} events, but the format sends one per request")
        request = self._endpoint.request()
        key = request.headers["Idempotency-Key"] = idempotency_key(batch)
        tracing.inject(request.headers)
        self.build(request, batch)
        built: Any = request.body
        body, coding = compressed(built, self._compressor)
        if coding is not None:
            request.headers["Content-Encoding"] = coding
        request.body = body
        request.headers["Content-Length"] = str(len(body))
        added = self._headers.apply(request)
        self._credentials = (*self._known(), *added)
        if self._sign is not None:
            message_id = batch[0].event_id if self.one_event_per_request else key
            request.headers.update(self._sign(body, message_id, now_ms()))
        # Last, because a callable may sign all the rest.
        added += self._login.apply(request)
        texts = self._credentials = (*self._known(), *added)
        return _Prepared(request, batch, len(built), texts)

    def _send(self, prepared: _Prepared, progress: Progress) -> Outcomes | UploadFailure:
        def judge(answer: BaseHTTPResponse) -> Outcomes | UploadFailure:
            if not 200 <= answer.status <= 299:  # noqa: PLR2004 - success, as HTTP defines it
                return rejection(answer, prepared.credentials)
            if self._reader is not None:
                outcomes = self._reader.outcomes(answer, prepared.batch, prepared.credentials)
            else:
                outcomes = {}
                drain(answer)
            if progress.broke_off:
                return TransportFailure(f"answered {answer.status} before the whole request was sent")
            self._size.accepted(prepared.size)
            return outcomes

        try:
            result = self._endpoint.exchange(prepared.request, progress, judge)
        except TRANSPORT_ERRORS as error:
            if progress.is_over():
                message = f"no complete answer within {self.deadline_ms} ms"
                return TransportFailure(message, is_timeout=True)
            return no_answer(error, prepared.credentials)
        is_too_large = isinstance(result, HttpFailure) and result.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        if is_too_large and len(prepared.batch) > 1:
            self._size.refused(prepared.size)
        return result


class _Prepared(NamedTuple):
    request: requests.PreparedRequest
    batch: Sequence[Item]
    size: int  # of the body before compression
    credentials: Sequence[str]


def _check_sign(sign: object) -> None:
    if sign is not None and not callable(sign):
        raise ConfigurationError(f"sign is of type {type(sign).__name__}, expected a callable or None")


def idempotency_key(batch: Sequence[Item]) -> str:
    """Return the same 32 hex digits each time the same events are sent together, in the same order."""
    ids = "\n".join(item.event_id for item in batch)
    return hashlib.sha256(ids.encode()).hexdigest()[:32]
