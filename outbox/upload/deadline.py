"""Connections that keep the deadline of a whole upload."""

from __future__ import annotations

import http.client
import io
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

from outbox.clock import monotonic_s

# One TLS record: a larger piece would be several writes, each with the whole time-out for itself.
_PIECE_BYTES = 16 * 1024


class Progress:
    """The progress of one upload: its deadline, and what happened on its connection.

    A socket's timeout applies to one operation, so a service that sends one byte a second never exceeds it.
    Therefore each operation gets only the time that is left of the upload. This needs no second thread. The
    interpreter refuses new threads while it shuts down, and a last flush may run then.
    """

    def __init__(self, total_ms: int, operation_s: float) -> None:
        self._end = monotonic_s() + total_ms / 1_000
        self._longest = operation_s
        self.has_connected = False
        """Whether this upload opened a connection. False while it uses a kept-alive one."""
        self.broke_off = False
        """Whether the connection broke before the whole request was sent."""
        self.has_answer = False
        """Whether at least one byte of an answer was read."""
        self.query = ""
        """The query of the request, with its question mark. It may contain a credential."""

    def part(self, total_ms: int, operation_s: float) -> Progress:
        """Return the progress of an upload inside this one. Its deadline is not later than this one's."""
        inner = Progress(total_ms, operation_s)
        inner._end = min(inner._end, self._end)
        return inner

    def shorten(self, total_ms: int) -> None:
        """Move the deadline to this time from now, unless it is earlier already."""
        self._end = min(self._end, monotonic_s() + total_ms / 1_000)

    def is_over(self) -> bool:
        """Return whether the deadline has passed."""
        return monotonic_s() >= self._end

    def timeout(self, longest_s: float | None = None) -> float:
        """Return how many seconds the next operation may take. Raises TimeoutError after the deadline."""
        left = self._end - monotonic_s()
        if left <= 0:
            raise TimeoutError("deadline")
        return min(left, self._longest if longest_s is None else longest_s)


# urllib3 creates and calls the connections, so the progress can't be passed to them. A context variable also works
# where greenlets share a thread.
_progress: ContextVar[Progress] = ContextVar("progress")

progress = _progress.get
"""Return the progress of the upload that runs in this context."""


@contextmanager
def upload_within(total_ms: int, operation_s: float) -> Iterator[Progress]:
    """Set the deadline of an upload. Inside another upload, it is not later than the deadline of the other one."""
    around = _progress.get(None)
    own = Progress(total_ms, operation_s) if around is None else around.part(total_ms, operation_s)
    token = _progress.set(own)
    try:
        yield progress()
    finally:
        _progress.reset(token)


class _Buffer(io.BufferedReader):
    def read(self, size: int | None = -1) -> bytes:
        """Read at most `size` bytes, never all: http.client asks for all if a chunk's size is negative."""
        if size is None or size < 0:
            raise http.client.HTTPException("negative size")
        return super().read(size)


class _Reader(socket.SocketIO):
    _sock: socket.socket

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(progress().timeout())
        count = super().readinto(buffer)
        progress().has_answer |= bool(count)
        return count


class _Response(http.client.HTTPResponse):
    # An interrupt may end the constructor at any line. The destructor reads this attribute.
    fp: Any = None

    def __init__(self, sock: socket.socket, debuglevel: int = 0, method: str | None = None) -> None:
        super().__init__(sock, debuglevel, method)
        buffered, self.fp = self.fp, None
        raw = buffered.detach()
        raw.__class__ = _Reader
        self.fp = _Buffer(raw)

    def begin(self) -> None:
        super().begin()
        # urllib3 would log lines that are no headers. They may contain our request.
        self.msg.defects = []
        self.msg.set_payload("")


class Connection(HTTPConnection):
    """A connection whose operations all end before the deadline of the upload."""

    response_class = _Response
    # Else `http.client.HTTPConnection.debuglevel = 1`, a common way to watch requests, prints the token.
    debuglevel = 0

    def _new_conn(self) -> socket.socket:
        progress().has_connected, progress().broke_off = True, False
        # urllib3 would give the whole timeout to each of the host's addresses.
        name, patience_s = self._dns_host, self.timeout
        found = socket.getaddrinfo(name, self.port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(address[4][0]) for address in found))
        try:
            for address in addresses[:-1]:
                self._dns_host, self.timeout = address, progress().timeout(patience_s)
                try:
                    return super()._new_conn()
                except HTTPError:
                    continue
            self._dns_host, self.timeout = addresses[-1], progress().timeout(patience_s)
            return super()._new_conn()
        finally:
            self._dns_host, self.timeout = name, patience_s

    def _tunnel(self) -> None:
        super()._tunnel()
        # For the TLS handshake that follows.
        self.sock.settimeout(progress().timeout(self.timeout))

    def putrequest(self, method: str, url: str, *args: Any, **settings: Any) -> None:
        """Add the query to the target, which urllib3 must not log."""
        super().putrequest(method, url + progress().query, *args, **settings)

    def send(self, data: Any) -> None:
        """Send in pieces. Each piece gets the time that is left."""
        if self.sock is None:
            self.connect()
        rest = memoryview(data)
        try:
            while rest:
                self.sock.settimeout(progress().timeout())
                super().send(rest[:_PIECE_BYTES])
                rest = rest[_PIECE_BYTES:]
        except TimeoutError:
            raise
        except OSError as error:
            # After a BrokenPipeError urllib3 reads the answer: the service may have sent a 413 before it closed.
            progress().broke_off = True
            raise BrokenPipeError from error


class TlsConnection(Connection, HTTPSConnection):
    """The same over TLS."""

    def _new_conn(self) -> socket.socket:
        sock = super()._new_conn()
        # For the TLS handshake that follows. Connecting has used some of the time.
        sock.settimeout(progress().timeout(self.timeout))
        return sock

    def _connect_tls_proxy(self, hostname: str, sock: socket.socket) -> ssl.SSLSocket:
        secure = super()._connect_tls_proxy(hostname, sock)
        secure.__class__ = _ProxySocket
        return secure


class _ProxySocket(ssl.SSLSocket):
    """TLS to a proxy. One operation of a TLS connection inside it may cause many operations here."""

    def recv(self, *args: Any) -> bytes:
        self.settimeout(progress().timeout())
        return super().recv(*args)

    def send(self, *args: Any) -> int:
        self.settimeout(progress().timeout())
        return super().send(*args)
