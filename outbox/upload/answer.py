"""Turns answers of the service, and errors of the transport, into failures."""

from __future__ import annotations

import http.client
import zlib
from http import HTTPStatus
from typing import TYPE_CHECKING

import urllib3.exceptions

from outbox import retry_after
from outbox.clock import now_ms
from outbox.failures import HttpFailure, TransportFailure
from outbox.upload.deadline import progress
from outbox.upload.redaction import redact, without_end

if TYPE_CHECKING:
    from collections.abc import Sequence

    from urllib3 import BaseHTTPResponse

MAX_ANSWER_BYTES = 64 * 1024
"""Maximum number of bytes of an answer's body that is read, before and after decoding."""

SNIPPET_LENGTH = 200
"""Maximum length of the service's text, or of a transport error, in a failure."""

TRANSPORT_ERRORS = (
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,  # also the base class of the errors of requests
    UnicodeError,
    zlib.error,
)
"""Errors that mean that there was no complete answer."""

_DRAIN_MS = 500
_NOT_SHOWN = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], "\ufffd")


def drain(answer: BaseHTTPResponse) -> None:
    """Read the body if it is short, so that the connection can be used again."""
    progress().shorten(_DRAIN_MS)
    try:
        answer.read(MAX_ANSWER_BYTES, decode_content=False)
    except TRANSPORT_ERRORS:
        # The batch is delivered, whatever happens to the rest of the answer.
        answer.close()


def rejection(answer: BaseHTTPResponse, credentials: Sequence[str]) -> HttpFailure:
    """Convert an answer other than 2xx to a failure."""
    if answer.status < HTTPStatus.OK:
        # After a 1xx the final answer follows. The next request on this connection would read it as its own
        # answer.
        answer.close()
    body, is_cut = body_of(answer, MAX_ANSWER_BYTES)
    text = body.decode(errors="replace")
    delay_ms = retry_after.in_body(text)
    if delay_ms is None:
        delay_ms = retry_after.in_header(answer.headers.get("Retry-After", ""), now_ms=now_ms())
    if is_cut:
        text = without_end(text, credentials)
    return HttpFailure(
        answer.status,
        one_line(redact(answer.reason or "", credentials))[:SNIPPET_LENGTH] or phrase(answer.status),
        one_line(redact(text, credentials))[:SNIPPET_LENGTH],
        retry_after_ms=delay_ms,
    )


def no_answer(error: BaseException, credentials: Sequence[str]) -> TransportFailure:
    """Convert an error of the transport to a failure."""
    # Use the innermost error: the outer errors only repeat the address.
    inner: BaseException | None = error
    root = error
    has_connected = True
    while inner is not None:
        root = inner
        has_connected = has_connected and not isinstance(root, urllib3.exceptions.ConnectTimeoutError)
        causes = (root.__cause__, getattr(root, "reason", None), *root.args)
        inner = next((cause for cause in causes if isinstance(cause, BaseException)), None)
    # The error may repeat up to 64 KiB of an invalid status line.
    message = one_line(redact(f"{type(error).__name__}: {root}", credentials))[:SNIPPET_LENGTH]
    return TransportFailure(message, is_timeout=has_connected and isinstance(root, TimeoutError))


def body_of(answer: BaseHTTPResponse, limit: int) -> tuple[bytes, bool]:
    """Return at most `limit` bytes of the decoded body, and whether it was cut."""
    body = b""
    # Read until nothing comes: only then a broken connection raises an error.
    while len(body) <= limit and (piece := answer.read(limit + 1 - len(body), decode_content=False)):
        body += piece
    is_cut = len(body) > limit
    body = body[:limit]
    # A service may compress unasked, and a small body may expand to a huge one.
    if answer.headers.get("Content-Encoding", "").lower() in ("gzip", "x-gzip", "deflate"):
        body = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, limit + 1)
        is_cut = is_cut or len(body) > limit
    return body[:limit], is_cut


def phrase(status: int) -> str:
    """Return the usual reason phrase of a status, or an empty text."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def one_line(text: str) -> str:
    """Return the text as it can be stored and displayed."""
    # The text is stored: PostgreSQL refuses NUL. The text is displayed: a terminal executes control characters.
    return " ".join(text.split()).translate(_NOT_SHOWN)
