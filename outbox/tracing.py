"""Traces: the context of an enqueue, and a span for each upload. Off until the program loads OpenTelemetry.

A program that has not loaded OpenTelemetry's API has no span, so nothing here loads the API first. No error of the
telemetry reaches a caller: it is logged, and the event is recorded or sent without it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING

from outbox.failures import UploadFailure
from outbox.outcomes import Outcome
from outbox.policy import Policy

if TYPE_CHECKING:
    from typing_extensions import Self

    from outbox.spans import ClientSpan, Traced

log = logging.getLogger("outbox")

_API = "opentelemetry.trace"


class UploadSpan:
    """The span of one request. It records nothing if the program has no tracer.

    The request is sent inside `with upload_span(…) as span:`. Then follow `answered` and `decided`.
    """

    def __init__(self, span: ClientSpan | None = None) -> None:
        self._span = span

    def answered(
        self, answer: UploadFailure | Mapping[int, UploadFailure], policy: Policy, redact: Callable[[str], str]
    ) -> None:
        """Record the failure of the request, or the failures of single events by row id."""
        if self._span is not None:
            with _unbroken():
                self._span.answered(answer, policy, redact)

    def decided(self, outcomes: Sequence[tuple[int, Outcome]]) -> None:
        """Record which events will be sent again, and when."""
        if self._span is not None:
            with _unbroken():
                self._span.decided(outcomes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._span is not None:
            with _unbroken():
                self._span.end(kind)


_NO_SPAN = UploadSpan()


def current_context() -> str | None:
    """Return the context of the current span as JSON, as the database stores it; None if there is no span."""
    if _API in sys.modules:
        with _unbroken():
            from outbox import spans  # noqa: PLC0415 - it loads OpenTelemetry

            return spans.current_context()
    return None


def inject(headers: MutableMapping[str, str]) -> None:
    """Add the context of the current span to the headers of a request, if there is a span."""
    if _API in sys.modules:
        with _unbroken():
            from outbox import spans  # noqa: PLC0415 - it loads OpenTelemetry

            headers.update(spans.carrier())


def upload_span(part: Sequence[Traced], destination: str, client: object) -> UploadSpan:
    """Start the span of a request with these events. `destination` is the stored name."""
    if _API in sys.modules:
        with _unbroken():
            from outbox import spans  # noqa: PLC0415 - it loads OpenTelemetry

            if spans.has_tracer():
                return UploadSpan(spans.ClientSpan(part, destination, client))
    return _NO_SPAN


@contextmanager
def _unbroken() -> Iterator[None]:
    """Log an exception of the telemetry instead of raising it."""
    try:
        yield
    except Exception:  # the tracer is the application's code
        with suppress(Exception):  # and so is a log filter
            log.debug("tracing failed", exc_info=True, extra={"event_name": "outbox.tracing_failed"})
