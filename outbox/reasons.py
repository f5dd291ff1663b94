"""The texts that are stored as `last_error`: how each is made, and what it means."""

from __future__ import annotations

import re

from outbox.failures import TRANSPORT

_PERMANENT = "permanent: "
_UNDECODABLE = f"{_PERMANENT}decode observation event: "
_AGED_OUT = "aged-out"
_CLIENT_ERROR = "client error: "
_CANCELLED = "cancelled: "
_NO_ROUTE = "the service accepts no events at this URL; check the URL and its path"


def rejected(failure: str) -> str:
    """Return the reason of a row that the service rejected."""
    return f"{_PERMANENT}{failure}"


def undecodable(why: str) -> str:
    """Return the reason of a row whose payload or columns this program can't read."""
    return f"{_UNDECODABLE}{why}"


def aged_out(failure: str, *, is_rate_limited: bool = False) -> str:
    """Return the reason of a row that failed and is too old for another try."""
    return f"{_AGED_OUT}{' (rate-limited)' if is_rate_limited else ''}: {failure}"


def cancelled(reason: str) -> str:
    """Return the reason of a row that the application or an operator cancelled."""
    return f"{_CANCELLED}{reason}"


def client_error(kind: str, message: str) -> str:
    """Return the text for an exception of the upload client that is not an `UploadFailure`."""
    return f"{_CLIENT_ERROR}{kind}: {message}" if message else f"{_CLIENT_ERROR}{kind}"


def without_answer(failure: str | None) -> str | None:
    """Return a failure's text for the log, without the body of the answer, which may repeat payloads."""
    if failure is not None and failure[:1].isdigit():
        return failure.partition(": ")[0]
    return failure


def without_body(last_error: str) -> str:
    """Return a stored failure without what may repeat a payload: bodies of answers and texts of exceptions."""
    kept = _WITHOUT_BODY.match(last_error)
    if kept is None:
        return "…"
    return last_error if kept.end() == len(last_error) else f"{kept.group()}: …"


def in_words(last_error: str, waits_for: str | None = None) -> str:
    """Return what a stored failure means, followed by its text in brackets.

    `waits_for` is what a pending row waits for. A row that failed alone says nothing about the service.
    """
    return f"{_MEANINGS_ALONE.get(waits_for or '') or _meaning(last_error)} ({last_error})"


def _meaning(last_error: str) -> str:
    for start, meaning in _MEANINGS:
        if last_error.startswith(start):
            return meaning
    return "the upload failed"


_WITHOUT_BODY = re.compile(
    rf"(?:{_PERMANENT}|{_AGED_OUT}(?: \(rate-limited\))?: )?"
    rf"(?:(?:{TRANSPORT}|{_CANCELLED}).*|\d+[^:]*|{_CLIENT_ERROR}[^:]*|decode observation event)",
    re.DOTALL,
)
# By what the row waits for, a value of `WaitsFor`.
_MEANINGS_ALONE = {
    "proof": "the service rejected this event alone",
    "row": "this event failed alone while the service seemed to work",
}
# The first entry whose start matches the failure's text applies.
_MEANINGS = (
    (TRANSPORT, "the service gave no usable answer"),
    (_CLIENT_ERROR, "the upload client has a bug: it raised an exception that is not an UploadFailure"),
    (
        f"{_UNDECODABLE}event_type: invalid value ",
        "the flusher did not know the event type; after `outbox requeue`, the event is sent as it is",
    ),
    (
        f"{_UNDECODABLE}the column ",
        "an integer column holds an invalid value, which another program wrote",
    ),
    (_UNDECODABLE, "the payload is not a JSON object"),
    (f"{_PERMANENT}404", _NO_ROUTE),
    (f"{_PERMANENT}405", _NO_ROUTE),
    (_PERMANENT, "the service rejected this event"),
    (_CANCELLED, "the event was cancelled"),
    (_AGED_OUT, "the event is too old for another try"),
    ("401", "the service rejected the token"),
    ("403", "the service rejected the token"),
    ("408", "the service was too slow"),
    ("425", "the service was not ready"),
    ("429", "the service asks to slow down"),
    ("3", "the service redirects, and redirects are not followed; check the URL"),
    ("404", _NO_ROUTE),
    ("405", _NO_ROUTE),
    ("4", "the service rejected the request; check the URL and what the service accepts"),
    ("5", "the service is failing"),
)
