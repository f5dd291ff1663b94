"""A small HTTP server that receives events, for trials, demos and tests. It listens on this machine only."""

from __future__ import annotations

import hmac
import os
import threading
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from outbox.events import content_hash
from outbox.failures import ConfigurationError
from outbox.testing.answers import (
    Answer,
    Drop,
    Hang,
    Mode,
    Request,
    bulk_answer,
    error_answer,
    results_answer,
    usual_body,
)
from outbox.testing.body import Found, events_in, line_of, reader_of, stored_event
from outbox.testing.server import Handler, Server, Service
from outbox.upload.signing import StandardWebhooks

if TYPE_CHECKING:
    from email.message import Message
    from http.server import BaseHTTPRequestHandler
    from types import TracebackType
    from typing import BinaryIO

    from typing_extensions import Self

_POLL_S = 0.02


class IngestServer:
    """Receives batches by POST, and stores each event once.

    Two events are the same if they have the same id. In a format without ids, they are the same if they have the
    same text. A signed request with the format `single` has an id too, its `webhook-id`.

    With `port` 0 the server uses a free port, and keeps it for later starts. `path` is the only path for batches;
    None means any. `format` is the format of the bodies: a name that `HttpClient` knows, or `elasticsearch` for
    the `create` actions of a bulk request. Requests must have the bearer token `token`, and be signed with
    `secret` as in Standard Webhooks. If one of these is None, it is not checked. You may change `format`, `token`
    and `secret` while the server runs. `store` names a file: the server appends each new event to it as a line,
    and counts the events that are already in it as received. The line of an event with an id is an array of the id
    and the event.

    If the text of an event contains `poison`, the whole batch is answered with 422. With `results`, the answer is
    a 207 with a result for each event instead; with `elasticsearch` it is always that of a bulk request.

    The answers follow the contract of difflore's service. A 200 has the body `{"received": …, "deduped": …}`: the
    number of events in the request, and how many of them were known. An error has the body `{"defined": …,
    "code": …, "status": …, "message": …, "data": …}`. `defined` is true for 400, 401, 403 and 429, which the
    contract defines.

    `GET /received` answers with the counts. `POST /control` with `{"mode": "overloaded", "retryAfterSec": 2}`
    changes the mode; see `Mode`.
    """

    def __init__(  # noqa: PLR0913 - keyword-only settings, each with a default
        self,
        *,
        port: int = 0,
        path: str | None = None,
        format: str = "json",  # noqa: A002 - as `HttpClient` names it
        token: str | None = None,
        secret: str | None = None,
        results: bool = False,
        store: str | os.PathLike[str] | None = None,
        poison: str = "poison",
    ) -> None:
        self.stored: dict[str, str] = {}
        """The received events in order of arrival: text by event id, or by content hash without one."""
        self.requests: list[Request] = []
        self.duplicates = 0
        reader_of(format)
        if secret is not None:
            StandardWebhooks(secret)
        self.format = format
        self.token = token
        self.secret = secret
        self.results = results
        self._port = port
        self._path = path
        self._store_path = None if store is None else str(Path(store).absolute())
        self._poison = poison.encode()
        self._mode: Mode = "ok"
        self._retry_after_sec: int | None = None
        self._script: deque[Answer | Drop | Hang] = deque()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._file: BinaryIO | None = None
        self._server: Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The base URL for a client."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> Self:
        """Listen, and answer in background threads. Raises OSError if the port or the file can't be opened."""
        self._stopping.clear()
        try:
            server = Server(("127.0.0.1", self._port), self._handler)
        except OSError as error:
            raise OSError(error.errno, f"port {self._port} of 127.0.0.1: {error.strerror}") from None
        try:
            self._file = None if self._store_path is None else self._open(self._store_path)
        except OSError:
            server.server_close()
            raise
        self._server = server
        self._port = server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), name="ingest")
        self._thread.start()
        return self

    def stop(self) -> None:
        """End all connections and stop listening. Received events stay, and the server can be started again."""
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
        """Answer the next requests with these answers, one each, whatever the mode. A number is a status.

        Raises `ConfigurationError`, and adds no answer, if one of them is of another type.
        """
        scripted = [Answer(answer) if isinstance(answer, int) else answer for answer in answers]
        for answer in scripted:
            if not isinstance(answer, Answer | Drop | Hang):
                raise ConfigurationError(f"answer is {answer!r}, expected a status, Answer, Drop or Hang")
        with self._lock:
            self._script.extend(scripted)

    def set_mode(self, mode: Mode, *, retry_after_sec: int | None = None) -> None:
        """Set how all further requests are answered. With `retry_after_sec`, 503 and 429 ask for that delay."""
        if mode not in get_args(Mode):
            raise ConfigurationError(f"mode is {mode!r}, expected one of {', '.join(get_args(Mode))}")
        with self._lock:
            self._mode, self._retry_after_sec = mode, retry_after_sec

    def summary(self) -> dict[str, Any]:
        """Return the numbers of stored events, requests and duplicates, and the mode."""
        with self._lock:
            return {
                "events": len(self.stored),
                "requests": len(self.requests),
                "duplicates": self.duplicates,
                "mode": self._mode,
            }

    def _handler(self, *args: Any) -> BaseHTTPRequestHandler:
        return Handler(Service(self._path, self._decide, self.set_mode, self.summary, self._stopping), *args)

    def _open(self, path: str) -> BinaryIO:
        """Open the file of events and read it. Only its owner can read a new file."""
        file = open(path, "a+b", opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115 - it stays open
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):
                # A crash cut this line short. Start a new line.
                file.write(b"\n")
            event = stored_event(line)
            if event is not None:
                self.stored[_key(event)] = event.text.decode()
        return file

    def _decide(self, path: str, headers: Message, body: bytes) -> Answer | Drop | Hang:
        """Choose the answer, and store the events and the request before the client sees the answer."""
        with self._lock:
            events, refusal = events_in(headers.get("Content-Encoding", ""), body, reader_of(self.format))
            if self.format == "single":
                events = [event._replace(id=headers.get("webhook-id")) for event in events]
            decision = self._script.popleft() if self._script else self._usual(headers, body, events, refusal)
            is_success = isinstance(decision, Answer) and 200 <= decision.status <= 299  # noqa: PLR2004 - HTTP's 2xx
            deduped = 0
            if is_success if decision.stores is None else decision.stores:
                deduped = self._store([event for event in events if not self._is_bad_alone(event)])
            status = decision.status if isinstance(decision, Answer) else None
            self.requests.append(Request(path, len(events), status, dict(headers), body))
            if isinstance(decision, Answer) and decision.body is None:
                return replace(decision, body=usual_body(decision.status, received=len(events), deduped=deduped))
            return decision

    def _usual(
        self, headers: Message, body: bytes, events: list[Found], refusal: Answer | None
    ) -> Answer | Drop | Hang:
        delay = {} if self._retry_after_sec is None else {"retryAfterSec": self._retry_after_sec}
        modes: dict[Mode, Answer | Drop | Hang] = {
            "down": error_answer(503, "down", **delay),
            "overloaded": error_answer(429, "rate limited", **delay),
            "revoked": error_answer(401, "session revoked"),
            "hang": Hang(),
            "drop": Drop(),
        }
        if self._mode in modes:
            return modes[self._mode]
        refusal = self._unauthorized(headers, body) or refusal
        if refusal is not None:
            return refusal
        if self._judges_each:
            return self._each(events)
        bad = [index for index, event in enumerate(events) if self._poison in event.text]
        if bad:
            return error_answer(422, "invalid event", index=bad[0])
        return Answer()

    def _unauthorized(self, headers: Message, body: bytes) -> Answer | None:
        sent, wanted = headers.get("Authorization", ""), f"Bearer {self.token}"
        if self.token is not None and not hmac.compare_digest(sent.encode(), wanted.encode()):
            return error_answer(401, "invalid token")
        if self.secret is not None and not _is_signed(headers, body, self.secret):
            return error_answer(401, "invalid signature")
        return None

    @property
    def _judges_each(self) -> bool:
        return self.results or self.format == "elasticsearch"

    def _is_bad_alone(self, event: Found) -> bool:
        return self._judges_each and self._poison in event.text

    def _each(self, events: list[Found]) -> Answer:
        if self.format != "elasticsearch":
            return results_answer([(event.id, not self._is_bad_alone(event)) for event in events])
        return bulk_answer([(event.id, self._bulk_status(event)) for event in events])

    def _bulk_status(self, event: Found) -> int:
        if self._is_bad_alone(event):
            return 400
        return 409 if event.id in self.stored else 201

    def _store(self, events: list[Found]) -> int:
        """Store the new events. Return the number of events that were known."""
        new: dict[str, Found] = {}
        for event in events:
            if (key := _key(event)) not in self.stored:
                new.setdefault(key, event)
        if self._file is not None and new:
            self._file.write(b"".join(map(line_of, new.values())))
            self._file.flush()
        self.stored.update((key, event.text.decode()) for key, event in new.items())
        deduped = len(events) - len(new)
        self.duplicates += deduped
        return deduped


def _key(event: Found) -> str:
    return event.id or content_hash(event.text.decode())


def _is_signed(headers: Message, body: bytes, secret: str) -> bool:
    message_id, second = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not second.isdecimal():
        return False
    wanted = StandardWebhooks(secret)(body, message_id, int(second) * 1_000)["webhook-signature"]
    found = headers.get("webhook-signature", "").split()
    return any(hmac.compare_digest(wanted.encode(), one.encode()) for one in found)
