"""Every error that this package raises on purpose.

OutboxError
├── ConfigurationError      a setting is invalid (also a ValueError)
├── InvalidEvent            an event can't be stored or decoded (also a ValueError)
├── QueueFull               the queue is full, and the policy rejects new events
├── IllegalTransition       the lifecycle does not allow a move
├── SchemaError             the database's schema is missing, or older or newer than this program's
├── StorageError            a database operation failed
│   └── OutcomeUnknown      the connection broke during a commit, so its result is unknown
└── UploadFailure           one upload did not succeed
    ├── HttpFailure         the service answered with another status than 2xx
    ├── TransportFailure    there was no complete answer
    └── ClientError         the client has a bug: it raised anything else
"""

from __future__ import annotations

TRANSPORT = "transport: "
"""How the text of a `TransportFailure` begins."""


class OutboxError(Exception):
    """The base of every error that this package raises on purpose."""


class ConfigurationError(OutboxError, ValueError):
    """A setting is invalid. The message names the setting, its value and what is accepted."""


class InvalidEvent(OutboxError, ValueError):  # noqa: N818 - the name says what is invalid
    """An event can't be stored or decoded. The message names the field and what is accepted."""


class QueueFull(OutboxError):  # noqa: N818 - the field's own term
    """The queue is full and the policy rejects new events. No event was recorded. Flush, then try again."""


class IllegalTransition(OutboxError):  # noqa: N818 - the field's own term
    """The lifecycle does not allow this move, or `status` was changed without a move."""


class SchemaError(OutboxError):
    """The database's schema does not fit this program. The message says what to do."""


class StorageError(OutboxError):
    """A database operation failed. The message says why and what to do."""


class OutcomeUnknown(StorageError):  # noqa: N818 - it need not be an error: the commit may have succeeded
    """The connection to the database server broke during a commit: everything was committed, or nothing.

    To record an event once, enqueue it again with the same `event_id`.
    """


class UploadFailure(OutboxError):  # noqa: N818 - a failure is data that policy judges, not a bug
    """An upload failed. `str()` returns the text that is stored as `last_error`."""


class HttpFailure(UploadFailure):
    """The service answered with a status that is not 2xx.

    `body_snippet` is the start of the body as one line without credentials. `retry_after_ms` is the delay that the
    answer asks for in the Retry-After header or in the whole body. With None, the delay is read from the snippet.
    It applies to 429 and 503, and is clamped to 1 000 … 300 000.

    Raises `ConfigurationError` for a status or a delay that is not a whole number.
    """

    def __init__(
        self, status: int, reason_phrase: str = "", body_snippet: str = "", *, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(status, reason_phrase, body_snippet)
        self.status = status
        self.reason_phrase = reason_phrase
        self.body_snippet = body_snippet
        self.retry_after_ms = retry_after_ms
        _check_numbers(self)

    def __str__(self) -> str:
        answer = f"{self.status} {self.reason_phrase}".rstrip()
        return f"{answer}: {self.body_snippet}" if self.body_snippet else answer


class TransportFailure(UploadFailure):
    """There was no complete answer: connection, DNS or TLS failure, time-out, or an invalid answer.

    `is_timeout` means that there was a connection, but no answer in time. One event may be the cause.
    """

    def __init__(self, message: str, *, is_timeout: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.is_timeout = is_timeout

    def __str__(self) -> str:
        return f"{TRANSPORT}{self.message}"


class ClientError(UploadFailure):
    """The client raised an exception that is no `UploadFailure`. The rows are judged as after a status 500."""


def check_failure(failure: UploadFailure) -> None:
    """Raise an exception if a field of the failure is invalid. A client may have set it."""
    str(failure)
    if isinstance(failure, HttpFailure):
        _check_numbers(failure)


def _check_numbers(failure: HttpFailure) -> None:
    if not _is_whole(failure.status):
        raise ConfigurationError(f"status is {failure.status!r}, expected a whole number")
    delay_ms = failure.retry_after_ms
    if delay_ms is not None and not _is_whole(delay_ms):
        raise ConfigurationError(
            f"retry_after_ms is {delay_ms!r}, expected a whole number, in milliseconds, or None"
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
