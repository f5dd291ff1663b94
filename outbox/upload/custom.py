"""The answers and exceptions of a client that the application wrote itself."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from outbox import retry_after
from outbox.clock import now_ms
from outbox.failures import ConfigurationError, HttpFailure, TransportFailure, UploadFailure
from outbox.upload.redaction import without_credentials

if TYPE_CHECKING:
    from outbox.upload.formats import Item


def requests_failure(error: Exception, client: object) -> UploadFailure | None:
    """Return the failure that a `requests.RequestException` means; None for any other error, which is a bug.

    It has the status of the error's response, if there is one, and the delay that the response asks for. Its texts
    hold no credentials.
    """
    # A client that raised such an error has loaded the library. If it is not loaded, this check must not load it.
    requests: Any = sys.modules.get("requests")
    if requests is None or not isinstance(error, requests.RequestException):
        return None
    from outbox.upload.answer import MAX_ANSWER_BYTES, SNIPPET_LENGTH, one_line, phrase  # noqa: PLC0415 - it loads urllib3

    def shown(text: object) -> str:
        return one_line(without_credentials(text, client))[:SNIPPET_LENGTH]

    response: Any = error.response
    if response is None or response.status_code is None:
        return TransportFailure(f"{type(error).__name__}: {shown(error)}".rstrip(": "))
    # Only the part that was read, which has no public name. `content` would read the rest, which can take any
    # time.
    content = vars(response).get("_content") or b""
    text = content[:MAX_ANSWER_BYTES].decode(errors="replace")
    delay_ms = retry_after.in_body(text)
    if delay_ms is None:
        delay_ms = retry_after.in_header(response.headers.get("Retry-After", ""), now_ms=now_ms())
    status = response.status_code
    return HttpFailure(
        status, shown(response.reason or "") or phrase(status), shown(text), retry_after_ms=delay_ms
    )


def failures_of(answered: object, part: Sequence[Item]) -> dict[int, UploadFailure]:
    """Return the failures that a client's answer names, by row id. Raises `ConfigurationError` for a bug."""
    if answered is None:
        return {}
    if not isinstance(answered, Mapping):
        raise ConfigurationError(f"upload() returned a {type(answered).__name__}, expected None or a mapping")
    unknown = set(answered) - {item.id for item in part}
    if unknown:
        raise ConfigurationError(f"upload() returned the id {unknown.pop()!r}, which is not in the batch")
    failures = {row_id: failure for row_id, failure in answered.items() if failure is not None}
    for failure in failures.values():
        if not isinstance(failure, UploadFailure):
            raise ConfigurationError(
                f"upload() returned a {type(failure).__name__} for an event, expected None or an UploadFailure"
            )
    return failures
