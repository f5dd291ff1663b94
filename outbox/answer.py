"""What is kept of a server's answer, and of there being none."""

from __future__ import annotations

import http.client
import re
import zlib
from datetime import timezone
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

import urllib3.exceptions

from outbox import policy
from outbox.clock import epoch_ms, now_ms
from outbox.deadline import deadline
from outbox.failures import HttpFailure, TransportFailure
from outbox.redaction import redact, without_end

if TYPE_CHECKING:
    from collections.abc import Sequence

    from urllib3 import BaseHTTPResponse

MAX_ANSWER_BYTES = 64 * 1024
"""How much of an answer's body is read, before and after decoding."""

SNIPPET_LENGTH = 200
"""How many characters of the server's text a failure keeps."""

TRANSPORT_ERRORS = (
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,  # those of requests are among them
    UnicodeError,
    zlib.error,
)
"""What is raised where there is no complete answer."""

_DRAIN_MS = 500


def drain(answer: BaseHTTPResponse) -> None:
    """Read the rest of a short body, so that the connection can be used again."""
    deadline.shorten(_DRAIN_MS)
    try:
        answer.read(MAX_ANSWER_BYTES, decode_content=False)
    except TRANSPORT_ERRORS:
        # The batch is delivered, however the answer goes on.
        answer.close()


def rejection(answer: BaseHTTPResponse, secrets: Sequence[str]) -> HttpFailure:
    """Return the failure that an answer other than 2xx means."""
    if answer.status < HTTPStatus.OK:
        # The final answer is still to come, and the next request would take it for its own.
        answer.close()
    body, is_cut = _body(answer)
    text = body.decode(errors="replace")
    delay_ms = policy.retry_after(text)
    if delay_ms is None:
        delay_ms = _header_delay_ms(answer.headers.get("Retry-After", ""))
    if is_cut:
        text = without_end(text, secrets)
    return HttpFailure(
        answer.status,
        _one_line(redact(answer.reason or "", secrets))[:SNIPPET_LENGTH] or _phrase(answer.status),
        _one_line(redact(text, secrets))[:SNIPPET_LENGTH],
        retry_after_ms=delay_ms,
    )


def no_answer(error: BaseException, secrets: Sequence[str]) -> TransportFailure:
    """Return the failure that an error of the transport means."""
    # What went wrong in the end: outer errors only repeat the address.
    inner: BaseException | None = error
    root = error
    while inner is not None:
        root = inner
        causes = (root.__cause__, getattr(root, "reason", None), *root.args)
        inner = next((cause for cause in causes if isinstance(cause, BaseException)), None)
    return TransportFailure(_one_line(redact(f"{type(error).__name__}: {root}", secrets)))


def _body(answer: BaseHTTPResponse) -> tuple[bytes, bool]:
    """Return the body, decoded, and whether it was longer than what is read."""
    limit = MAX_ANSWER_BYTES
    body = b""
    # Until nothing comes: only then a connection that broke off is noticed.
    while len(body) <= limit and (piece := answer.read(limit + 1 - len(body), decode_content=False)):
        body += piece
    is_cut = len(body) > limit
    body = body[:limit]
    # Asked for or not, a server may compress; a small body may hide a huge one.
    if answer.headers.get("Content-Encoding", "").lower() in ("gzip", "x-gzip", "deflate"):
        body = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, limit + 1)
        is_cut = is_cut or len(body) > limit
    return body[:limit], is_cut


def _header_delay_ms(value: str) -> int | None:
    # Sent twice it is a list, of which the first counts; more than 18 digits are more than any clamp.
    seconds = re.match(r"\s*([0-9]{1,18})[0-9]*\s*(?:,|$)", value)
    if seconds:
        return policy.clamp_retry_after(int(seconds.group(1)) * 1_000)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return policy.clamp_retry_after(epoch_ms(date) - now_ms())


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _one_line(text: str) -> str:
    # PostgreSQL takes no NUL in a text, and a failure's text is stored.
    return " ".join(text.replace("\0", "\ufffd").split())
