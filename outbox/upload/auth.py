"""The credentials of a request."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from urllib.parse import parse_qsl, urlsplit

import requests

from outbox.failures import ConfigurationError, TransportFailure
from outbox.upload.secrets import (
    LIKELY_CREDENTIAL,
    Private,
    Secret,
    current,
    problem_of_value,
    problem_of_word,
    texts,
)

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# The client computes these from the body.
_COMPUTED = {"content-encoding", "content-length", "idempotency-key", "transfer-encoding"}


class Login(Private):
    """A way to log in. This one adds no credentials."""

    @property
    def logged_in(self) -> bool:
        """Whether there are credentials. Calls the callable, if there is one."""
        return True

    def known(self) -> tuple[str, ...]:
        """Return the credentials that are known before the first request."""
        return ()

    def apply(self, request: requests.PreparedRequest) -> tuple[str, ...]:  # noqa: ARG002 - there are no credentials
        """Add the credentials, and return their texts. Raises an `UploadFailure` if they can't be sent."""
        return ()

    def refused(self, request: requests.PreparedRequest) -> bool:  # noqa: ARG002 - nothing can be renewed
        """Return whether to send the request once more after a 401, because the credentials will be new ones."""
        return False


class NoAuth(Login):
    """No credentials. `NO_AUTH` is the one object of this class."""

    def __repr__(self) -> str:
        return "NO_AUTH"


NO_AUTH = NoAuth()
"""For a service that asks for no credentials."""


class _Bearer(Login):
    def __init__(self, token: Secret | None) -> None:
        if token is not None and not callable(token) and (problem := problem_of_word(token)):
            raise ConfigurationError(f"token: {problem}")
        self._token = token

    @property
    def logged_in(self) -> bool:
        return bool(current(self._token))

    def known(self) -> tuple[str, ...]:
        return texts(self._token)

    def apply(self, request: requests.PreparedRequest) -> tuple[str, ...]:
        token = current(self._token)
        if problem := problem_of_word(token) if token else "not set, not logged in":
            raise TransportFailure(f"token: {problem}")
        request.headers["Authorization"] = f"Bearer {token}"
        return (str(token),)


class ApiKey(Login):
    """A key in a header of its own: `ApiKey("X-Api-Key", key)`.

    `value` is the header's text, or a callable that returns it before each request. An empty text or None means
    not logged in. Raises `ConfigurationError` for a name or a value that can't be sent.
    """

    def __init__(self, header: str, value: Secret) -> None:
        self._header, self._value = header, value
        problem = _problem_of_header(header) or (None if callable(value) else problem_of_value(value))
        if problem:
            del self, value  # crash reports show local variables
            raise ConfigurationError(f"auth: {header!r}: {problem}")

    @property
    def logged_in(self) -> bool:
        """Whether there is a key. Calls the callable, if there is one."""
        return bool(current(self._value))

    def known(self) -> tuple[str, ...]:
        """Return the key if it is a text."""
        return _with_words(*texts(self._value))

    def apply(self, request: requests.PreparedRequest) -> tuple[str, ...]:
        """Set the header."""
        value = current(self._value)
        if problem := problem_of_value(value) if value else "not set, not logged in":
            raise TransportFailure(f"auth: {self._header}: {problem}")
        request.headers[self._header] = str(value)
        return _with_words(str(value))


class _Basic(Login):
    def __init__(self, user: Secret, password: Secret) -> None:
        self._user, self._password = user, password
        for name, text in (("user", user), ("password", password)):
            if not callable(text) and (problem := _problem_of_basic(name, text)):
                raise ConfigurationError(f"auth: {problem}")

    @property
    def logged_in(self) -> bool:
        return bool(current(self._user))

    def known(self) -> tuple[str, ...]:
        # A user without a password may be a key.
        return texts(self._password or self._user)

    def apply(self, request: requests.PreparedRequest) -> tuple[str, ...]:
        user, password = current(self._user), current(self._password)
        if problem := _problem_of_basic("user", user) or _problem_of_basic("password", password):
            raise TransportFailure(f"auth: {problem}")
        text = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.headers["Authorization"] = f"Basic {text}"
        return (str(password or user), text)


class _Function(Login):
    def __init__(self, call: Callable[[requests.PreparedRequest], object]) -> None:
        self._call = call

    def known(self) -> tuple[str, ...]:
        return tuple(getattr(self._call, "credentials", ()))

    def apply(self, request: requests.PreparedRequest) -> tuple[str, ...]:
        headers, url = dict(request.headers), request.url
        returned = self._call(request)
        if isinstance(returned, requests.PreparedRequest) and returned is not request:
            vars(request).update(vars(returned))
        changed = [_text(value) for name, value in request.headers.items() if headers.get(name) != value]
        if request.url != url:
            changed += [value for _, value in parse_qsl(urlsplit(str(request.url)).query)]
        return _with_words(*changed)

    def refused(self, request: requests.PreparedRequest) -> bool:
        hook = getattr(self._call, "refused", None)
        return hook is not None and bool(hook(request))


Auth = tuple[Secret, Secret] | ApiKey | NoAuth | Callable[[requests.PreparedRequest], object]
"""What `HttpClient` takes as `auth`."""


def login(token: Secret | None, auth: Auth | None) -> Login:
    """Return the login that these arguments describe. Raises `ConfigurationError`, which shows no credential."""
    if auth is None:
        return _Bearer(token)
    if token is not None:
        raise ConfigurationError("token and auth are both set, expected one of them")
    if isinstance(auth, Login):
        return auth
    if isinstance(auth, tuple) and len(auth) == 2:  # noqa: PLR2004 - user and password
        return _Basic(*auth)
    if callable(auth):
        return _Function(auth)
    raise ConfigurationError(
        f"auth is of type {type(auth).__name__}, expected (user, password), ApiKey, NO_AUTH or a callable"
    )


class Headers(Login):
    """The headers that a caller adds to every request."""

    def __init__(self, headers: Mapping[str, Secret] | None) -> None:
        if headers is not None and not isinstance(headers, Mapping):
            raise ConfigurationError(f"headers is of type {type(headers).__name__}, expected a mapping")
        self._headers = dict(headers or {})
        for name, value in self._headers.items():
            problem = _problem_of_header(name) or (None if callable(value) else problem_of_value(value))
            if problem:
                raise ConfigurationError(f"headers: {name!r}: {problem}")

    def known(self) -> tuple[str, ...]:
        """Return the texts of the headers that are named like credentials."""
        return _with_words(
            *texts(*(value for name, value in self._headers.items() if LIKELY_CREDENTIAL.search(name)))
        )

    def apply(self, request: requests.PreparedRequest) -> tuple[str, ...]:
        """Set the headers, and return what callables returned.

        If a callable returns None, its header is left out.
        """
        secrets = []
        for name, given in self._headers.items():
            value = current(given)
            if value is None:
                continue
            if problem := problem_of_value(value):
                raise TransportFailure(f"headers: {name}: {problem}")
            request.headers[name] = value
            if callable(given):
                secrets.append(value)
        return _with_words(*secrets)


def _problem_of_header(name: object) -> str | None:
    if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
        return "expected the name of a header, such as X-Api-Key"
    return "the client sets this header" if name.lower() in _COMPUTED else None


def _problem_of_basic(name: str, text: object) -> str | None:
    if not isinstance(text, str):
        return f"the {name} is of type {type(text).__name__}, expected text"
    if name == "user" and ":" in text:
        return "the user has a colon, which Basic authentication does not allow"
    return f"the {name} has control characters" if re.search(r"[\x00-\x1f\x7f]", text) else None


def _with_words(*values: str) -> tuple[str, ...]:
    """Return the values of headers, and their words: a server may repeat a key without the scheme before it."""
    return tuple(form for value in values for form in {value, *value.split()})


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)
