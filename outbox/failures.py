"""Every error that this package raises on purpose.

OutboxError
├── ConfigurationError      a setting that can't work (also a ValueError)
├── InvalidEvent            an event that can't be stored or decoded (also a ValueError)
├── QueueFull               the queue is at its cap, and the policy is to reject
├── IllegalTransition       a move that the lifecycle does not have
├── SchemaError             the database's schema is missing, older or newer than this program
├── StorageError            the database could not do what was asked
└── UploadFailure           one upload did not succeed
    ├── HttpFailure         the server answered, but not with 2xx
    └── TransportFailure    there was no complete answer
"""

from __future__ import annotations


class OutboxError(Exception):
    """The base of every error that this package raises on purpose."""


class ConfigurationError(OutboxError, ValueError):
    """A setting can't work; the message names it, its value and what would be accepted."""


class InvalidEvent(OutboxError, ValueError):  # noqa: N818 - the name says what is invalid
    """An event can't be stored or decoded; the message names the field and what it should be."""


class QueueFull(OutboxError):  # noqa: N818 - the field's own term
    """The queue is at its cap and the policy is to reject; nothing was recorded. Flush, then try again."""


class IllegalTransition(OutboxError):  # noqa: N818 - the field's own term
    """A move that the lifecycle does not have, or a change of status that is no move."""


class SchemaError(OutboxError):
    """The database's schema does not fit this program; the message says what to do."""


class StorageError(OutboxError):
    """The database could not do what was asked; the message says why and what to do."""


class UploadFailure(OutboxError):  # noqa: N818 - a failure is data that policy judges, not a bug
    """One upload did not succeed. `str()` gives the text that is stored as `last_error`."""


class HttpFailure(UploadFailure):
    """The server answered with a status that is not 2xx.

    `body_snippet` is the start of the body, one line, free of credentials. `retry_after_ms` is the delay that
    the answer asks for, where the client knows it better than the snippet tells: read from the whole body, or
    from the Retry-After header.
    """

    def __init__(
        self, status: int, reason_phrase: str = "", body_snippet: str = "", *, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(status, reason_phrase, body_snippet)
        self.status = status
        self.reason_phrase = reason_phrase
        self.body_snippet = body_snippet
        self.retry_after_ms = retry_after_ms

    def __str__(self) -> str:
        answer = f"{self.status} {self.reason_phrase}".rstrip()
        return f"{answer}: {self.body_snippet}" if self.body_snippet else answer


class TransportFailure(UploadFailure):
    """There was no complete answer: connection, DNS, TLS, time-out, or an unreadable response."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"transport: {self.message}"


def without_answer(failure: str | None) -> str | None:
    """Return a failure's text as the log may show it: a server's answer may repeat the payloads that it got."""
    if failure is not None and failure[:1].isdigit():
        return failure.partition(": ")[0]
    return failure
