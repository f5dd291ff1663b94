"""Turns one answer of the service into an outcome for each event."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, TypeAlias

import msgspec
from urllib3 import BaseHTTPResponse

from outbox.failures import ConfigurationError, HttpFailure, TransportFailure, UploadFailure
from outbox.upload.answer import SNIPPET_LENGTH, body_of, one_line, phrase
from outbox.upload.formats import Item
from outbox.upload.redaction import redact

log = logging.getLogger("outbox")

Outcomes = Mapping[int, UploadFailure | None]
"""Failures by row id; None for an accepted row."""

_Found: TypeAlias = Sequence[UploadFailure | None] | Mapping[str, UploadFailure | None]

ReadAnswer = Callable[[int, Mapping[str, str], bytes], _Found]
"""Returns failures from the status, headers and body of a 2xx: one for each event in batch order, or a mapping by
event id. None stands for an accepted event, and so does an event that is not in the mapping. It may raise the
`UploadFailure` of the whole batch. Any other exception means that the answer can't be read."""

_LISTS = ("results", "items", "events", "responses")
_IDS = ("event_id", "id")
_ACCEPTED = range(200, 300)


def results(body: bytes, event_ids: Sequence[str]) -> list[UploadFailure | None]:
    """Read a list of objects, each with the integer `status` of an event. A status that is not 2xx is a failure.

    The list is the whole body, or the field `results`, `items`, `events` or `responses` of an object. If the
    objects have the ids of these events as `event_id` or `id`, their order does not matter.

    Raises `TransportFailure` if only some of the ids are ids of these events.
    """
    found = msgspec.json.decode(body)
    if isinstance(found, dict):
        found = next(found[name] for name in _LISTS if name in found)
    failures: list[UploadFailure | None] = [_failure(result) for result in found]
    for name in _IDS:
        named = [one if isinstance(one := result.get(name), str) else None for result in found]
        # Other ids are the service's own.
        if len(named) == len(event_ids) and not set(event_ids).isdisjoint(named):
            by_id = dict(zip(named, failures, strict=True))
            if by_id.keys() != set(event_ids):
                raise TransportFailure("the ids of the results are not those of the events")
            return [by_id[event_id] for event_id in event_ids]
    return failures


def _failure(result: dict[str, Any]) -> HttpFailure | None:
    status = result["status"]
    if status in _ACCEPTED:
        return None
    return HttpFailure(status, phrase(status), msgspec.json.encode(result).decode())


class AnswerReader:
    """Applies a `ReadAnswer` to the answers that one client gets."""

    def __init__(self, read: ReadAnswer | str, max_bytes: int) -> None:
        if read != "results" and not callable(read):
            raise ConfigurationError(f"read_answer is {read!r}, expected 'results', a callable or None")
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
            raise ConfigurationError(f"max_answer_bytes is {max_bytes!r}, expected a whole number of at least 1")
        self._read = read
        self._max_bytes = max_bytes
        self._has_warned = False

    def outcomes(
        self, answer: BaseHTTPResponse, batch: Sequence[Item], credentials: Sequence[str]
    ) -> Outcomes | UploadFailure:
        """Return the outcomes that a 2xx names, or the failure of the whole batch.

        Without an outcome, an event is accepted.
        """
        body, is_cut = body_of(answer, self._max_bytes)
        if is_cut:
            return TransportFailure(f"the answer has more than {self._max_bytes} bytes")
        found: _Found
        try:
            if isinstance(self._read, str):
                found = results(body, [item.event_id for item in batch])
            else:
                found = self._read(answer.status, dict(answer.headers), body)
        except UploadFailure as failure:
            return _clean(failure, credentials)
        except Exception as error:  # noqa: BLE001 - a reader may raise anything for an unexpected answer
            if answer.status == HTTPStatus.MULTI_STATUS:
                return TransportFailure(f"a 207 that can't be read: {type(error).__name__}")
            self._warn(answer.status, error)
            return {}
        return _by_row(found, batch, credentials)

    def _warn(self, status: int, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "an answer %d can't be read (%s), its events count as accepted; not logged again for this client",
                status,
                type(error).__name__,
                extra={"event_name": "outbox.unreadable_answer", "status": status},
            )


def _by_row(found: _Found, batch: Sequence[Item], credentials: Sequence[str]) -> Outcomes | UploadFailure:
    event_ids = [item.event_id for item in batch]
    if isinstance(found, Mapping):
        unknown = set(found).difference(event_ids)
        if unknown:
            return TransportFailure(f"the answer names {len(unknown)} events that were not sent")
        found = [found.get(event_id) for event_id in event_ids]
    if len(found) != len(batch):
        return TransportFailure(f"the answer has {len(found)} results for {len(batch)} events")
    cleaned = (None if failure is None else _clean(failure, credentials) for failure in found)
    return {item.id: failure for item, failure in zip(batch, cleaned, strict=True)}


def _clean(failure: UploadFailure, credentials: Sequence[str]) -> UploadFailure:
    """Return the failure with texts that can be stored: the service may have repeated a credential in them."""

    def shown(text: str) -> str:
        return one_line(redact(text, credentials))[:SNIPPET_LENGTH]

    if isinstance(failure, HttpFailure):
        return HttpFailure(
            failure.status,
            shown(failure.reason_phrase),
            shown(failure.body_snippet),
            retry_after_ms=failure.retry_after_ms,
        )
    if isinstance(failure, TransportFailure):
        return TransportFailure(shown(failure.message))
    return UploadFailure(shown(str(failure)))
