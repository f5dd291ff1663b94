"""The answers of the test server: scripted ones, and those that the contract of difflore's service defines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal

import msgspec

Mode = Literal["ok", "down", "overloaded", "revoked", "hang", "drop"]
"""The answer to all requests.

- `ok`: 200.
- `down`: 503.
- `overloaded`: 429.
- `revoked`: 401.
- `hang`: no answer until the server stops.
- `drop`: no answer; the connection is closed at once.
"""

_DEFINED_ERRORS = {400, 401, 403, 429}
_CODES = {
    400: "BAD_REQUEST",
    401: "UNAUTHORIZED",
    403: "FORBIDDEN",
    404: "NOT_FOUND",
    405: "METHOD_NOT_SUPPORTED",
    411: "LENGTH_REQUIRED",
    413: "PAYLOAD_TOO_LARGE",
    422: "UNPROCESSABLE_CONTENT",
    429: "RATE_LIMITED",
    503: "SERVICE_UNAVAILABLE",
}


@dataclass(frozen=True)
class Answer:
    """An answer. `stores` says whether the batch is stored; None means only if the status is 2xx.

    With `body` None, 200, 400, 401, 403 and 429 get their usual body, and other statuses no body. With `reason`
    None, the answer has the usual reason phrase of its status.
    """

    status: int = 200
    body: str | bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    reason: str | None = None
    stores: bool | None = None


@dataclass(frozen=True)
class Drop:
    """Close the connection without an answer. If `stores` is set, store the batch first."""

    stores: bool = False


@dataclass(frozen=True)
class Hang:
    """Wait `ms` milliseconds (None: until the server stops), then close the connection without an answer."""

    ms: int | None = None
    stores: bool = False


@dataclass(frozen=True)
class Request:
    """A received request. `status` is None if it got no answer."""

    path: str
    events: int
    status: int | None
    headers: Mapping[str, str] = field(repr=False)  # contains the token
    body: bytes = field(default=b"", repr=False)


def error_answer(status: int, message: str, **data: Any) -> Answer:
    """Return the answer of an error, with the body that the contract defines."""
    return Answer(status, _error_body(status, message, data))


def usual_body(status: int, *, received: int, deduped: int) -> bytes | None:
    """Return the body that the contract defines for this status, or None."""
    if status == HTTPStatus.OK:
        return msgspec.json.encode({"received": received, "deduped": deduped})
    return _error_body(status, HTTPStatus(status).phrase) if status in _DEFINED_ERRORS else None


def results_answer(events: Sequence[tuple[str | None, bool]]) -> Answer:
    """Return a 207 with a result for each event, given its id and whether it is accepted."""
    results = [
        {
            **({"status": 200} if is_accepted else {"status": 422, "error": "invalid event"}),
            **({} if name is None else {"id": name}),
        }
        for name, is_accepted in events
    ]
    return Answer(207, msgspec.json.encode({"results": results}))


def bulk_answer(items: Sequence[tuple[str | None, int]]) -> Answer:
    """Return the answer of Elasticsearch to `create` actions with these ids and statuses."""
    errors = {
        400: {"type": "document_parsing_exception", "reason": "invalid event"},
        409: {"type": "version_conflict_engine_exception", "reason": "document already exists"},
    }
    results = [
        {"create": {"_id": name, "status": status, **({"error": errors[status]} if status in errors else {})}}
        for name, status in items
    ]
    has_errors = any(status in errors for _, status in items)
    return Answer(200, msgspec.json.encode({"took": 1, "errors": has_errors, "items": results}))


def _error_body(status: int, message: str, data: Mapping[str, Any] | None = None) -> bytes:
    is_defined = status in _DEFINED_ERRORS
    code, data = _CODES[status], data or None
    return msgspec.json.encode(
        {"defined": is_defined, "code": code, "status": status, "message": message, "data": data}
    )
