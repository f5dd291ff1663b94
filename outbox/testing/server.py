"""The HTTP server of the test server: its connections, and its routes."""

from __future__ import annotations

import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import msgspec

from outbox.testing.answers import Answer, Drop, Hang, Mode, error_answer
from outbox.testing.body import MAX_BODY_BYTES

_PIECE_BYTES = 64 * 1024
_LONGEST_NUMBER = 18  # longer lengths exceed the limit in any case


class Service(NamedTuple):
    """Answers the requests."""

    path: str | None
    """The only path for batches; None means any."""

    decide: Callable[[str, Message, bytes], Answer | Drop | Hang]
    """Given the path, headers and body of a batch: store it, and return the answer."""
    set_mode: Callable[..., None]
    summary: Callable[[], dict[str, Any]]
    stopping: threading.Event
    """Set when the server stops; ends the requests that hang."""


class _Control(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    mode: Mode
    retry_after_sec: int | None = None


class Server(ThreadingHTTPServer):
    """Answers each connection in a thread of its own, and can end the connections that are kept alive."""

    request_queue_size = 128
    # Otherwise a failed test that does not stop the server would never end.
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: Callable[..., BaseHTTPRequestHandler]) -> None:
        self._open: set[socket.socket] = set()
        self._changed = threading.Condition()
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind the address, without a look-up of its name."""
        # HTTPServer's method looks up its own name, which may wait for a name server.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Note the connection before its thread starts."""
        with self._changed:
            self._open.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve the connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._changed:
                self._open.discard(request)
                self._changed.notify_all()

    def end_connections(self) -> None:
        """Shut all kept-alive connections, so that their threads end, and wait for the threads."""
        with self._changed:
            for request in self._open:
                _shut(request)
            self._changed.wait_for(lambda: not self._open)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore an error that occurs because the client disconnected."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """The routes: batches, the mode and the summary."""

    protocol_version = "HTTP/1.1"
    # Headers and body are two writes. Without this, the second one waits for the client's acknowledgement.
    disable_nagle_algorithm = True

    def __init__(self, service: Service, *args: Any) -> None:
        self._service = service
        super().__init__(*args)

    def do_POST(self) -> None:
        """Answer a batch, or change the mode."""
        body = self._body()
        if isinstance(body, Answer):
            self._answer(body)
        elif self.path == "/control":
            self._answer(self._control(body))
        elif self._is_for_batches():
            decision = self._service.decide(self.path, self.headers, body)
            if isinstance(decision, Answer):
                self._answer(decision)
            else:
                if isinstance(decision, Hang):
                    wait_s = None if decision.ms is None else decision.ms / 1_000
                    self._service.stopping.wait(wait_s)
                self.close_connection = True
        else:
            self._answer(error_answer(404, "not found"))

    def do_GET(self) -> None:
        """Answer with the summary, or refuse the method or path."""
        # The body is not read, so the next bytes on this connection may not be a request.
        self.close_connection = True
        if self.path == "/received" and self.command == "GET":
            self._answer(self._summary())
        elif self._is_for_batches():
            self._answer(replace(error_answer(405, "method not allowed"), headers={"Allow": "POST"}))
        else:
            self._answer(error_answer(404, "not found"))

    do_DELETE = do_HEAD = do_OPTIONS = do_PATCH = do_PUT = do_GET  # noqa: N815 - http.server asks for these names

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Log nothing: requests carry credentials."""

    def _is_for_batches(self) -> bool:
        return self._service.path in (None, self.path.partition("?")[0])

    def _body(self) -> bytes | Answer:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self.close_connection = True
            return error_answer(411, "length required")
        left = int(length[:_LONGEST_NUMBER])
        if left <= MAX_BODY_BYTES:
            return self.rfile.read(left)
        # Read to the end nevertheless: a client that is still sending would get a reset instead of the answer.
        while left > 0 and (piece := self.rfile.read(min(left, _PIECE_BYTES))):
            left -= len(piece)
        return error_answer(413, "too large")

    def _control(self, body: bytes) -> Answer:
        try:
            wish = msgspec.json.decode(body, type=_Control)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            return error_answer(400, str(error))
        self._service.set_mode(wish.mode, retry_after_sec=wish.retry_after_sec)
        return self._summary()

    def _summary(self) -> Answer:
        return Answer(200, msgspec.json.encode(self._service.summary()))

    def _answer(self, answer: Answer) -> None:
        body = answer.body.encode() if isinstance(answer.body, str) else answer.body or b""
        self.send_response(answer.status, answer.reason)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _shut(request: socket.socket) -> None:
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the client closed it first
