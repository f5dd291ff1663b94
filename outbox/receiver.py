"""A small ingest server for trials, demonstrations and tests. It listens on this machine only."""

from __future__ import annotations

import hmac
import os
import socket
import socketserver
import sys
import threading
import zlib
from collections import deque
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec

from outbox.events import content_hash
from outbox.failures import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from email.message import Message
    from types import TracebackType
    from typing import BinaryIO

    from typing_extensions import Self

MAX_BODY_BYTES = 32 * 1024 * 1024
"""How large a request's body may be, before and after decompression."""

Mode = Literal["ok", "down", "overloaded", "revoked", "hang", "drop"]
"""How all requests are answered: 2xx, 503, 429, 401, late and with nothing, or with nothing at once."""

_PIECE_BYTES = 64 * 1024
_POLL_S = 0.02


@dataclass(frozen=True)
class Answer:
    """Answer with this; the batch is stored when `stores` says so, None: when the status is 2xx.

    `reason` is the reason phrase, None: the usual one of the status.
    """

    status: int = 200
    body: str | bytes = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    reason: str | None = None
    stores: bool | None = None


@dataclass(frozen=True)
class Drop:
    """Close the connection without an answer, and store the batch first if told so."""

    stores: bool = False


@dataclass(frozen=True)
class Hang:
    """Wait this long, or until the server is stopped (None), then close the connection without an answer."""

    ms: int | None = None
    stores: bool = False


@dataclass(frozen=True)
class Request:
    """What is remembered of a request: `status` is None where there was no answer."""

    path: str
    events: int
    status: int | None
    headers: Mapping[str, str] = field(repr=False)  # the token is in it


class IngestServer:
    """Takes batches at `POST …/cloud/observations`, and stores each event once, told apart by its content hash.

    `port` 0 takes a free one, which a later start takes again. `token`: what requests must bring as bearer token,
    None: anything; it may be changed at any time. `store`: a file to which new events are appended, a line each,
    and from which it knows earlier ones. A batch with an event whose text contains `poison` is answered with 422
    as a whole.

    `GET /received` answers with the counts. `POST /control` with `{"mode": "overloaded", "retryAfterSec": 2}`
    changes the mode; see `Mode`.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        token: str | None = None,
        store: str | os.PathLike[str] | None = None,
        poison: str = "poison",
    ) -> None:
        self.stored: dict[str, str] = {}
        """Content hash → text of each event, in the order of arrival."""
        self.requests: list[Request] = []
        self.duplicates = 0
        self.token = token
        self._port = port
        self._path = None if store is None else os.fspath(store)
        self._poison = poison.encode()
        self._mode: Mode = "ok"
        self._retry_after_sec: int | None = None
        self._script: deque[Answer | Drop | Hang] = deque()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._file: BinaryIO | None = None
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The base URL for a client."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> Self:
        """Listen, and answer in background threads. Raises OSError for a port or file that can't be had."""
        self._stopping.clear()
        try:
            server = _Server(("127.0.0.1", self._port), self._handler())
        except OSError as error:
            raise OSError(error.errno, f"port {self._port} of 127.0.0.1: {error.strerror}") from None
        try:
            self._file = None if self._path is None else self._open(self._path)
        except OSError:
            server.server_close()
            raise
        self._server = server
        self._port = server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), name="ingest")
        self._thread.start()
        return self

    def stop(self) -> None:
        """End all connections and stop listening. What was received stays; it can be started again."""
        if self._server is None or self._thread is None:
            return
        self._stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.end_connections()
        self._server.server_close()
        self._server = self._thread = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def script(self, *answers: Answer | Drop | Hang | int) -> None:
        """Give the next requests these answers, one each, whatever the mode. A number is a status; 200 accepts."""
        with self._lock:
            self._script.extend(Answer(answer) if isinstance(answer, int) else answer for answer in answers)

    def set_mode(self, mode: Mode, *, retry_after_sec: int | None = None) -> None:
        """Answer all requests in this way from now on; 503 and 429 ask for that delay."""
        if mode not in get_args(Mode):
            raise ConfigurationError(f"mode is {mode!r}, expected one of {', '.join(get_args(Mode))}")
        with self._lock:
            self._mode, self._retry_after_sec = mode, retry_after_sec

    def summary(self) -> dict[str, Any]:
        """Return the number of different events, of requests and of events that came again, and the mode."""
        with self._lock:
            return {
                "events": len(self.stored),
                "requests": len(self.requests),
                "duplicates": self.duplicates,
                "mode": self._mode,
            }

    def _handler(self) -> Callable[..., BaseHTTPRequestHandler]:
        return lambda *args: _Handler(self, *args)

    def _open(self, path: str) -> BinaryIO:
        """Open the store and learn what is in it. The file is made for its owner only."""
        file = open(path, "a+b", opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115 - it stays open
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):
                # An append that a crash cut short; what comes next must not be glued to it.
                file.write(b"\n")
            if _is_object(line):
                text = line.decode().strip()
                self.stored[content_hash(text)] = text
        return file

    def _decide(self, path: str, headers: Message, body: bytes) -> Answer | Drop | Hang:
        """Decide on the answer, store, and remember the request: all before the client can see an answer."""
        with self._lock:
            events, refusal = _events(headers.get("Content-Encoding", ""), body)
            decision = self._script.popleft() if self._script else self._usual(headers, events, refusal)
            is_success = isinstance(decision, Answer) and 200 <= decision.status <= 299  # noqa: PLR2004 - HTTP's 2xx
            if is_success if decision.stores is None else decision.stores:
                self._store(events)
            status = decision.status if isinstance(decision, Answer) else None
            self.requests.append(Request(path, len(events), status, dict(headers)))
            return decision

    def _usual(self, headers: Message, events: list[bytes], refusal: Answer | None) -> Answer | Drop | Hang:
        delay = {} if self._retry_after_sec is None else {"retryAfterSec": self._retry_after_sec}
        modes: dict[Mode, Answer | Drop | Hang] = {
            "down": _json(503, error="down", **delay),
            "overloaded": _json(429, error="rate_limited", **delay),
            "revoked": _json(401, error="session_revoked"),
            "hang": Hang(),
            "drop": Drop(),
        }
        if self._mode in modes:
            return modes[self._mode]
        wanted = f"Bearer {self.token}"
        if self.token is not None and not hmac.compare_digest(
            headers.get("Authorization", "").encode(), wanted.encode()
        ):
            return _json(401, error="invalid_token")
        if refusal is not None:
            return refusal
        bad = [index for index, event in enumerate(events) if self._poison in event]
        if bad:
            return _json(422, error="invalid_event", index=bad[0])
        return _json(200, accepted=len(events))

    def _store(self, events: list[bytes]) -> None:
        new = {}
        for event in events:
            text = event.decode()
            key = content_hash(text)
            if key in self.stored or key in new:
                self.duplicates += 1
            else:
                new[key] = text
        if self._file is not None and new:
            # Line breaks between the parts of an event mean nothing; in its texts they are escaped.
            lines = (text.replace("\r", " ").replace("\n", " ") + "\n" for text in new.values())
            self._file.write("".join(lines).encode())
            self._file.flush()
        self.stored.update(new)


class _Control(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    mode: Mode
    retry_after_sec: int | None = None


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    # Else a failed test that stopped nothing would never end.
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: Callable[..., BaseHTTPRequestHandler]) -> None:
        self._open: set[socket.socket] = set()
        self._changed = threading.Condition()
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # The one of HTTPServer looks its own name up, which may wait for a name server.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            self._open.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._changed:
                self._open.discard(request)
                self._changed.notify_all()

    def end_connections(self) -> None:
        """Wake the threads that wait for a next request on connections kept alive, and wait for all to end."""
        with self._changed:
            for request in self._open:
                _shut(request)
            self._changed.wait_for(lambda: not self._open)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that left."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes; without this the second waits for the client's acknowledgement.
    disable_nagle_algorithm = True

    def __init__(self, ingest: IngestServer, *args: Any) -> None:
        self._ingest = ingest
        super().__init__(*args)

    def do_POST(self) -> None:
        body = self._body()
        if isinstance(body, Answer):
            self._answer(body)
        elif self.path == "/control":
            self._answer(self._control(body))
        elif self.path.endswith("/cloud/observations"):
            decision = self._ingest._decide(self.path, self.headers, body)  # noqa: SLF001 - one unit
            if isinstance(decision, Answer):
                self._answer(decision)
            else:
                if isinstance(decision, Hang):
                    wait_s = None if decision.ms is None else decision.ms / 1_000
                    self._ingest._stopping.wait(wait_s)  # noqa: SLF001 - one unit
                self.close_connection = True
        else:
            self._answer(_json(404, error="not_found"))

    def do_GET(self) -> None:
        # A body, if there is one, is not read, so what follows on this connection is not a request.
        self.close_connection = True
        if self.path.endswith("/cloud/observations"):
            self._answer(replace(_json(405, error="method_not_allowed"), headers={"Allow": "POST"}))
        elif self.path == "/received" and self.command == "GET":
            self._answer(_json(200, **self._ingest.summary()))
        else:
            self._answer(_json(404, error="not_found"))

    do_DELETE = do_HEAD = do_OPTIONS = do_PATCH = do_PUT = do_GET  # noqa: N815 - as above

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Log nothing: requests carry credentials."""

    def _body(self) -> bytes | Answer:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self.close_connection = True
            return _json(411, error="length_required")
        left = int(length)
        if left <= MAX_BODY_BYTES:
            return self.rfile.read(left)
        # Read to the end all the same: a client that is still sending would see a reset, and not the answer.
        while left > 0 and (piece := self.rfile.read(min(left, _PIECE_BYTES))):
            left -= len(piece)
        return _json(413, error="too_large")

    def _control(self, body: bytes) -> Answer:
        try:
            wish = msgspec.json.decode(body, type=_Control)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            return _json(400, error=str(error))
        self._ingest.set_mode(wish.mode, retry_after_sec=wish.retry_after_sec)
        return _json(200, **self._ingest.summary())

    def _answer(self, answer: Answer) -> None:
        body = answer.body.encode() if isinstance(answer.body, str) else answer.body
        self.send_response(answer.status, answer.reason)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _json(status: int, **document: Any) -> Answer:
    return Answer(status, msgspec.json.encode(document))


def _events(encoding: str, body: bytes) -> tuple[list[bytes], Answer | None]:
    """Return each event's exact text, or none and the answer that says why."""
    try:
        if encoding == "gzip":
            stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
            body = stream.decompress(body, MAX_BODY_BYTES + 1)
            if len(body) > MAX_BODY_BYTES:
                return [], _json(413, error="too_large")
            if not stream.eof:
                return [], _json(400, error="gzip ends early")
        events = [bytes(event) for event in msgspec.json.decode(body, type=list[msgspec.Raw])]
    except (msgspec.MsgspecError, RecursionError, zlib.error) as error:
        return [], _json(400, error=str(error))
    if not all(map(_is_object, events)):
        return [], _json(400, error="expected an array of objects")
    return events, None


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def _shut(request: socket.socket) -> None:
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the client was faster
