"""OAuth 2 client credentials: tokens that a token endpoint gives to a client."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from http import HTTPStatus
from typing import Literal, NamedTuple
from urllib.parse import quote_plus, urlencode

import msgspec
import requests
from urllib3 import BaseHTTPResponse

from outbox.clock import now_ms
from outbox.failures import ConfigurationError, HttpFailure, TransportFailure
from outbox.upload.address import Certificate
from outbox.upload.answer import MAX_ANSWER_BYTES, TRANSPORT_ERRORS, body_of, no_answer, rejection
from outbox.upload.deadline import upload_within
from outbox.upload.endpoint import Endpoint
from outbox.upload.redaction import private_locals
from outbox.upload.secrets import Private, Secret, current, problem_of_word, texts

_REFUSED = {HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
_LONGEST_MARGIN_MS = 60_000


class _Token(NamedTuple):
    text: str
    until_ms: float


class _Answer(msgspec.Struct):
    access_token: str
    token_type: str = "Bearer"  # noqa: S105 - not a password
    expires_in: float | str | None = None


class ClientCredentials(Private):
    """Logs in with OAuth 2 client credentials: `HttpClient(url, auth=ClientCredentials(…))`.

    Posts `client_id` and `client_secret` to `token_url` as Basic authentication. The answer contains a token,
    which is added to each request. A new token is requested before the old one expires, and once after a 401.
    `client_secret` may be a callable, which is called each time. These requests count toward the deadline of the
    upload.

    An answer 400, 401 or 403 of the token endpoint counts like a 401 of the service. The times and the settings of
    the connection mean the same as those of `HttpClient`. Raises `ConfigurationError` for an invalid setting.
    """

    def __init__(  # noqa: PLR0913 - keyword-only settings, each with a default
        self,
        token_url: str,
        client_id: str,
        client_secret: Secret,
        *,
        scope: str | None = None,
        connect_timeout_ms: int = 5_000,
        read_timeout_ms: int = 15_000,
        deadline_ms: int = 45_000,
        allow_insecure: bool = False,
        proxies: Mapping[str, str] | None = None,
        verify: str | os.PathLike[str] | Literal[True] | None = None,
        cert: Certificate | None = None,
    ) -> None:
        try:
            with private_locals():
                self._endpoint = Endpoint(
                    token_url,
                    "",
                    name="token_url",
                    connect_timeout_ms=connect_timeout_ms,
                    read_timeout_ms=read_timeout_ms,
                    deadline_ms=deadline_ms,
                    proxies=proxies,
                    verify=verify,
                    cert=cert,
                )
                if not allow_insecure:
                    self._endpoint.refuse_readable()
                _check(client_id=client_id, client_secret=client_secret, scope=scope)
        except ConfigurationError:
            del self, token_url, client_secret, proxies  # crash reports show local variables
            raise
        self._id, self._secret = client_id, client_secret
        form = {"grant_type": "client_credentials"} | ({"scope": scope} if scope else {})
        self._body = urlencode(form).encode()
        self._deadline_ms = deadline_ms
        self._used: tuple[str, ...] = ()
        # Assigned as a whole: threads share it without a lock. Two of them may get a token each.
        self._token: _Token | None = None

    @property
    def credentials(self) -> tuple[str, ...]:
        """The credentials that are known: the secret and the token."""
        token = () if self._token is None else (self._token.text,)
        return (*self._endpoint.credentials, *texts(self._secret), *self._used, *token)

    def __call__(self, request: requests.PreparedRequest) -> None:
        """Add the token. Raises an `UploadFailure` if there is none."""
        token = self._token
        if token is None or now_ms() >= token.until_ms:
            token = self._token = self._fetch()
        request.headers["Authorization"] = f"Bearer {token.text}"

    def refused(self, request: requests.PreparedRequest) -> bool:
        """Forget the token of this request, and return True: a new token may be accepted."""
        token = self._token
        if token is not None and request.headers.get("Authorization") == f"Bearer {token.text}":
            self._token = None
        return True

    def _fetch(self) -> _Token:
        begun_ms = now_ms()
        request = self._endpoint.request()
        secret = str(current(self._secret))
        pair = f"{quote_plus(self._id)}:{quote_plus(secret)}"
        basic = base64.b64encode(pair.encode()).decode()
        self._used = (secret, quote_plus(secret), basic)
        request.headers["Authorization"] = f"Basic {basic}"
        request.headers["Content-Type"] = "application/x-www-form-urlencoded"
        request.body = self._body
        request.headers["Content-Length"] = str(len(self._body))
        with upload_within(self._deadline_ms, self._endpoint.read_s) as progress:
            try:
                answer = self._endpoint.exchange(request, progress, self._read)
            except TRANSPORT_ERRORS as error:
                failure = no_answer(error, self.credentials)
                why = "no complete answer in time" if progress.is_over() else failure.message
                raise TransportFailure(f"token endpoint: {why}") from None
        if (
            problem_of_word(answer.access_token)
            or not answer.access_token
            or answer.token_type.lower() != "bearer"
        ):
            raise TransportFailure("token endpoint: the answer has no bearer token that can be sent")
        return _Token(answer.access_token, begun_ms + _usable_ms(answer.expires_in))

    def _read(self, answer: BaseHTTPResponse) -> _Answer:
        if answer.status != HTTPStatus.OK:
            failure = rejection(answer, self.credentials)
            if failure.status not in _REFUSED:
                raise TransportFailure(f"token endpoint: {failure}")
            reason = f"token endpoint answered {failure.status} {failure.reason_phrase}"
            raise HttpFailure(HTTPStatus.UNAUTHORIZED, reason.rstrip(), failure.body_snippet)
        body, _ = body_of(answer, MAX_ANSWER_BYTES)
        try:
            return msgspec.json.decode(body, type=_Answer)
        except (ValueError, RecursionError):
            raise TransportFailure("token endpoint: the answer can't be read") from None


def _usable_ms(expires_in: float | str | None) -> float:
    """Return how long a token can be used: a minute less than it lives, or a tenth less if that is shorter."""
    try:
        lifetime_ms = float("inf") if expires_in is None else float(expires_in) * 1_000
    except ValueError:
        lifetime_ms = 0
    return max(0, lifetime_ms - min(lifetime_ms / 10, _LONGEST_MARGIN_MS))


def _check(**values: object) -> None:
    for name, value in values.items():
        is_optional = name == "scope" and value is None
        is_call = name == "client_secret" and callable(value)
        if not is_optional and not is_call and not (isinstance(value, str) and value):
            raise ConfigurationError(
                f"{name} is of type {type(value).__name__}, expected a text that is not empty"
            )
