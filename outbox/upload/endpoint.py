"""A URL and the connections to it: one for each thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar
from urllib.parse import parse_qsl

import requests
from urllib3 import BaseHTTPResponse

from outbox.failures import ConfigurationError
from outbox.upload.adapter import Adapter
from outbox.upload.address import (
    Certificate,
    ca_bundle,
    client_certificate,
    is_on_this_machine,
    proxy_for,
    request_template,
)
from outbox.upload.answer import TRANSPORT_ERRORS
from outbox.upload.deadline import Progress

Result = TypeVar("Result")

_LIMIT_MS = 2**31  # 24 days: every system can wait that long


class Endpoint:
    """Sends requests to one URL. Redirects, cookies and netrc files have no effect.

    Threads can share it, and it can be used after a fork: each thread has its own connection, which is kept alive
    until `close`, or until the thread or the endpoint is gone. The times are in milliseconds.
    """

    def __init__(  # noqa: PLR0913 - the settings of a connection
        self,
        base_url: str,
        path: str,
        *,
        name: str = "base_url",
        connect_timeout_ms: int,
        read_timeout_ms: int,
        deadline_ms: int,
        proxies: Mapping[str, str] | None,
        verify: str | os.PathLike[str] | Literal[True] | None,
        cert: Certificate | None,
    ) -> None:
        _check_times(
            connect_timeout_ms=connect_timeout_ms, read_timeout_ms=read_timeout_ms, deadline_ms=deadline_ms
        )
        self._template, is_plain, is_local = request_template(base_url, path, name=name)
        self._proxies, proxy_credentials = proxy_for(str(self._template.url), proxies, is_local=is_local)
        # A proxy on another machine gets requests to this machine over the network.
        is_local = is_local and all(map(is_on_this_machine, self._proxies.values()))
        self._readable_url = f"{name} is {base_url!r}" if is_plain and not is_local else None
        query = tuple(value for _, value in parse_qsl(path.partition("?")[2]))
        self.credentials = (*query, *proxy_credentials)
        """The values in the query of the path, and the credentials of the proxy."""
        self._verify = ca_bundle(verify)
        self._cert = client_certificate(cert)
        self._connect_s = min(connect_timeout_ms, deadline_ms) / 1_000
        self.read_s = min(read_timeout_ms, deadline_ms) / 1_000
        """The longest wait for data, in seconds."""
        self._threads = threading.local()

    def refuse_readable(self) -> None:
        """Raise `ConfigurationError` if others on the network could read the requests."""
        if self._readable_url is not None:
            raise ConfigurationError(
                f"{self._readable_url}: requests would be sent unencrypted; expected https, "
                "or http to localhost without a proxy on another machine, or allow_insecure=True"
            )

    def request(self) -> requests.PreparedRequest:
        """Return a new request without a body."""
        # A copy of the prepared request, because preparing a request takes longer than sending it.
        return self._template.copy()

    def exchange(
        self, request: requests.PreparedRequest, progress: Progress, read: Callable[[BaseHTTPResponse], Result]
    ) -> Result:
        """Send the request, and return what `read` makes of the answer. Raises one of `TRANSPORT_ERRORS`."""
        try:
            return self._exchange_once(request, read)
        except TRANSPORT_ERRORS:
            if progress.has_connected or progress.has_answer or progress.is_over():
                raise
        # The kept-alive connection was dead. The batch may have arrived nevertheless, but at-least-once delivery
        # allows sending it twice.
        self._adapter().close()
        return self._exchange_once(request, read)

    def close(self) -> None:
        """Close the connections of all threads. A later request opens new ones."""
        # A connection closes when nothing refers to it; one that is in use, when its upload ends.
        self._threads = threading.local()

    def _exchange_once(
        self, request: requests.PreparedRequest, read: Callable[[BaseHTTPResponse], Result]
    ) -> Result:
        # No session: it would read the whole body of a redirect, keep cookies, and replace the Authorization
        # header by that from .netrc.
        with self._adapter().send(
            request,
            stream=True,
            timeout=(self._connect_s, self.read_s),
            verify=self._verify,
            cert=self._cert,
            proxies=self._proxies,
        ) as response:
            return read(response.raw)

    def _adapter(self) -> Adapter:
        own = self._threads
        if getattr(own, "process", None) != os.getpid():
            # A connection that a fork has copied belongs to the parent.
            own.process, own.adapter = os.getpid(), Adapter(max_retries=0)
        adapter: Adapter = own.adapter
        return adapter


def _check_times(**times: object) -> None:
    for name, value in times.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < _LIMIT_MS:
            raise ConfigurationError(f"{name} is {value!r}, expected a whole number from 1 to 2^31 - 1")
