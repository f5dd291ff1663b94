"""The service that takes the events, and the client that a flusher reaches it by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from outbox import BatchItem, UploadFailure

from .facts import Request
from .stage import AFTER_UPLOAD, BEFORE_UPLOAD, Process


@dataclass
class Answer:
    """What becomes of one request. Without an exception the client sees a 2xx."""

    raises: BaseException | None = None
    stored: bool = True


@dataclass
class Server:
    """Judges requests by `decide`, and remembers for good what it stored."""

    decide: Callable[[Sequence[BatchItem]], Answer]
    is_blameless: bool = True
    """Whether it never rejects what it would accept; or else no policy can tell."""
    logged_in: bool = True
    stored: set[tuple[int, int]] = field(default_factory=set)
    """Of each event the id and the creation time."""

    def receive(self, batch: Sequence[BatchItem]) -> Answer:
        answer = self.decide(batch)
        if answer.stored:
            self.stored.update((item.id, item.created_at_ms) for item in batch)
        return answer


class Client:
    """The upload client of one process."""

    def __init__(self, process: Process, server: Server) -> None:
        self._process = process
        self._server = server

    @property
    def logged_in(self) -> bool:
        return self._server.logged_in

    def upload(self, batch: Sequence[BatchItem], /) -> None:
        process = self._process
        ids = tuple(item.id for item in batch)
        process.pause(BEFORE_UPLOAD, ids)
        request = Request(ids)
        process.operation.requests.append(request)
        process.operation.uploading = True
        process.stage.model.upload_starts(process, process.stage)
        answer = self._server.receive(batch)
        request.on_its_way = repr(answer)
        process.pause(AFTER_UPLOAD, "stored" if answer.stored else "not stored")
        process.operation.uploading = False
        process.operation.settlements = 0
        process.stage.note(process.name, "is answered", repr(answer.raises) if answer.raises else "ok")
        if isinstance(answer.raises, UploadFailure):
            request.failure = answer.raises
        elif isinstance(answer.raises, Exception):
            request.failure = UploadFailure(f"client error: {type(answer.raises).__name__}: {answer.raises}")
        if answer.raises is not None:
            process.operation.troubled |= request.failure is not answer.raises
            process.operation.gives_back |= request.failure is None
            raise answer.raises
        request.accepted = True
