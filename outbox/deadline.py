"""Connections that keep the deadline of a whole upload."""

from __future__ import annotations

import http.client
import io
import socket
import threading
import time
from typing import Any

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

# One TLS record: a larger piece would be several writes, each with the whole time-out for itself.
_PIECE_BYTES = 16 * 1024


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

    def timeout(self, longest_s: float | None = None) -> float:
        """Return the seconds that the next operation may take. Raises TimeoutError when none are left."""
        left = self._end - self._now()
        if left <= 0:
            raise TimeoutError("deadline")
        return min(left, self._longest if longest_s is None else longest_s)


deadline = _Deadline()


class _Reader(io.RawIOBase):
    def __init__(self, sock: socket.socket, raw: io.RawIOBase) -> None:
        self._sock = sock
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(deadline.timeout())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, debuglevel: int = 0, method: str | None = None) -> None:
        super().__init__(sock, debuglevel, method)
        self.fp = io.BufferedReader(_Reader(sock, self.fp.detach()))

    def begin(self) -> None:
        super().begin()
        # Of lines that are no headers urllib3 would log a warning with their text, which may be our request.
        self.msg.defects = []
        self.msg.set_payload("")


class Connection(HTTPConnection):
    """A connection each of whose operations ends by the deadline of its thread."""

    response_class = _Response
    # Else `http.client.HTTPConnection.debuglevel = 1`, a common way to watch requests, prints the token.
    debuglevel = 0

    def _new_conn(self) -> socket.socket:
        # urllib3 would give each of the host's addresses the whole time-out.
        name, patience_s = self._dns_host, self.timeout
        found = socket.getaddrinfo(name, self.port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(address[4][0]) for address in found))
        try:
            for address in addresses[:-1]:
                self._dns_host, self.timeout = address, deadline.timeout(patience_s)
                try:
                    return super()._new_conn()
                except HTTPError:
                    continue
            self._dns_host, self.timeout = addresses[-1], deadline.timeout(patience_s)
            return super()._new_conn()
        finally:
            self._dns_host, self.timeout = name, patience_s

    def send(self, data: Any) -> None:
        """Send in pieces, each of which is given what is left of the time."""
        if self.sock is None:
            self.connect()
        rest = memoryview(data)
        while rest:
            self.sock.settimeout(deadline.timeout())
            super().send(rest[:_PIECE_BYTES])
            rest = rest[_PIECE_BYTES:]


class TlsConnection(Connection, HTTPSConnection):
    """The same over TLS."""
