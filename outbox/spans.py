"""The span of an upload. Requires OpenTelemetry's API; only `tracing` loads this module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol
from urllib.parse import urlsplit

import msgspec
from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from outbox.destinations import shown
from outbox.failures import HttpFailure, TransportFailure, UploadFailure
from outbox.outcomes import Outcome
from outbox.policy import Policy, verdict
from outbox.reasons import without_answer

# Always W3C Trace Context, even if the program configured other formats: baggage may hold personal data.
_propagator = TraceContextTextMapPropagator()
_MAX_TRACESTATE = 512  # characters; the specification requires no more
_stored = msgspec.json.Decoder(dict[str, str])


def current_context() -> str | None:
    """Return `traceparent` and perhaps `tracestate` of the current span, as JSON; None if there is no span."""
    headers = carrier()
    return msgspec.json.encode(headers).decode() if headers else None


def carrier() -> dict[str, str]:
    """Return `traceparent` and perhaps `tracestate` of the current span, empty if there is no span.

    A `tracestate` of more than 512 characters is left out.
    """
    headers: dict[str, str] = {}
    if trace.get_current_span().get_span_context().is_valid:
        _propagator.inject(headers)
    if len(headers.get("tracestate", "")) > _MAX_TRACESTATE:
        del headers["tracestate"]
    return headers


def has_tracer() -> bool:
    """Return whether the program has set up a tracer. Without one, spans would go nowhere."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


class Traced(Protocol):
    """What a span needs to know about an event of its request."""

    @property
    def id(self) -> int:
        """The row id."""

    @property
    def event_id(self) -> str:
        """The id of the event."""

    @property
    def trace_context(self) -> str | None:
        """What `current_context` returned when the event was enqueued."""


class ClientSpan:
    """The client span of one request, with a link to the context of each event. It starts as the current span.

    Its attributes follow OpenTelemetry's semantic conventions for messaging.
    """

    def __init__(self, part: Sequence[Traced], destination: str, client: object) -> None:
        attributes: dict[str, str | int] = {
            "messaging.system": "outbox",
            "messaging.operation.type": "send",
            "messaging.operation.name": "send",
            "messaging.destination.name": shown(destination),
        }
        if len(part) == 1:
            attributes["messaging.message.id"] = part[0].event_id
        else:
            attributes["messaging.batch.message_count"] = len(part)
        if host := urlsplit(getattr(client, "base_url", "")).hostname:
            attributes["server.address"] = host
        self._row_ids = {item.id for item in part}
        self._verdict: str | None = None
        self._is_current = True
        self._span = trace.get_tracer("outbox").start_span(
            f"send {shown(destination)}",
            kind=trace.SpanKind.CLIENT,
            attributes=attributes,
            links=list(_links(part)),
        )
        self._token = context.attach(trace.set_span_in_context(self._span))

    def answered(
        self, answer: UploadFailure | Mapping[int, UploadFailure], policy: Policy, redact: Callable[[str], str]
    ) -> None:
        """Record the failure. The text is that of the log, without the body of the answer."""
        self._leave()
        failures = [answer] if isinstance(answer, UploadFailure) else list(answer.values())
        if failures:
            self._verdict = verdict(failures[0], policy).value
        if isinstance(answer, UploadFailure) or len(failures) == len(self._row_ids):
            text = without_answer(str(failures[0])) or ""
            self._fail(_error_type(failures[0]), redact(text))

    def decided(self, outcomes: Sequence[tuple[int, Outcome]]) -> None:
        """Add the span event `retry` if events of the request will be sent again."""
        if self._verdict is None:
            return
        own = [outcome for row_id, outcome in outcomes if row_id in self._row_ids]
        again = [outcome.values for outcome in own if outcome.trigger == "reschedule"]
        attributes: dict[str, str | int] = {"outbox.verdict": self._verdict}
        if again:
            attributes["outbox.events"] = len(again)
            attributes["outbox.retry_count"] = max(values["retry_count"] for values in again)
            attributes["outbox.next_attempt_at_ms"] = min(values["next_attempt_at_ms"] for values in again)
            self._span.add_event("retry", attributes)
        elif not own:  # they follow in smaller requests of the same claim
            self._span.add_event("retry", {**attributes, "outbox.events": len(self._row_ids)})

    def end(self, kind: type[BaseException] | None) -> None:
        """End the span. `kind` is the type of the exception that interrupted the request, if one did."""
        if self._is_current and kind is not None:
            self._fail(kind.__name__)
        self._leave()
        self._span.end()

    def _leave(self) -> None:
        if self._is_current:
            self._is_current = False
            context.detach(self._token)

    def _fail(self, error_type: str, text: str | None = None) -> None:
        self._span.set_attribute("error.type", error_type)
        self._span.set_status(trace.Status(trace.StatusCode.ERROR, text))


def _error_type(failure: UploadFailure) -> str:
    if isinstance(failure, HttpFailure):
        return str(failure.status)
    return "timeout" if isinstance(failure, TransportFailure) and failure.is_timeout else type(failure).__name__


def _links(part: Sequence[Traced]) -> Iterator[trace.Link]:
    """Yield a link to each context. Events that were enqueued in the same span share one."""
    for stored in dict.fromkeys(item.trace_context for item in part):
        if stored is None:
            continue
        try:
            headers = _stored.decode(stored)
        except (TypeError, ValueError, msgspec.DecodeError):  # another program wrote it
            continue
        linked = trace.get_current_span(_propagator.extract(headers)).get_span_context()
        if linked.is_valid:
            yield trace.Link(linked)
