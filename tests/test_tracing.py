from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, StatusCode, TraceFlags, TraceState
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from builders import DOWN, OK, REJECTED, ScriptedClient, add_row, on_statement, row, rule_fired
from outbox import BatchItem, HttpClient, HttpFailure, Outbox, TransportFailure, UploadFailure, tracing
from outbox.testing import ScriptedServer

PARENT = SpanContext(
    trace_id=0x4BF92F3577B34DA6A3CE929D0E0E4736,
    span_id=0x00F067AA0BA902B7,
    is_remote=False,
    trace_flags=TraceFlags(TraceFlags.SAMPLED),
)
STORED = '{"traceparent":"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}'


@contextmanager
def in_span(**changed: Any) -> Iterator[None]:
    """Run the block in a span of the program."""
    told = {name: getattr(PARENT, name) for name in ("trace_id", "span_id", "is_remote", "trace_flags")}
    with trace.use_span(trace.NonRecordingSpan(SpanContext(**{**told, **changed}))):
        yield


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> TracerProvider:
    """What the program set up. OpenTelemetry lets a process do that only once."""
    provider = TracerProvider()
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return provider


@pytest.fixture
def spans(provider: TracerProvider) -> Callable[[], Sequence[ReadableSpan]]:
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter.get_finished_spans


def contexts(outbox: Outbox) -> list[str | None]:
    return [found.trace_context for found in outbox.find()]


# --- what an enqueue stores ---


def in_a_session(outbox: Outbox) -> None:
    with Session(outbox.engine) as session, session.begin():
        outbox.enqueue(rule_fired(), session=session)
        outbox.enqueue(rule_fired(), session=session, event_id="mine")


def on_a_connection(outbox: Outbox) -> None:
    with outbox.engine.begin() as connection:
        outbox.enqueue(rule_fired(), connection=connection)
        outbox.enqueue_many([rule_fired()] * 5, connection=connection)


def on_a_drivers_connection(outbox: Outbox) -> None:
    with outbox.engine.begin() as connection:
        outbox.enqueue(rule_fired(), connection=connection.connection)


def to_several(outbox: Outbox) -> None:
    outbox.enqueue(rule_fired(), to=["billing", "search"])
    outbox.enqueue(rule_fired(), to=["billing", "search"], event_id="mine")


def in_bulk(outbox: Outbox) -> None:
    outbox.enqueue_many([rule_fired()] * 22)
    outbox.enqueue_many([rule_fired()] * 3, event_ids=["a", None, "b"])


WAYS = [
    lambda outbox: outbox.enqueue(rule_fired()),
    in_bulk,
    to_several,
    in_a_session,
    on_a_connection,
    on_a_drivers_connection,
]


@pytest.mark.contract
@pytest.mark.parametrize("enqueue", WAYS)
def test_each_way_to_enqueue_stores_the_context_of_the_current_span(
    outbox: Outbox, enqueue: Callable[[Outbox], object]
) -> None:
    with in_span():
        enqueue(outbox)
    assert set(contexts(outbox)) == {STORED}
    enqueue(outbox)
    assert None in contexts(outbox)


def test_without_a_span_no_statement_names_the_column(outbox: Outbox) -> None:
    seen: list[str] = []
    on_statement(outbox, seen.append)
    for enqueue in WAYS:
        enqueue(outbox)
    inserts = [statement for statement in seen if statement.startswith("INSERT INTO observation_events ")]
    assert len(inserts) > len(WAYS)
    assert not [statement for statement in inserts if "trace_context" in statement]


def test_an_asynchronous_session_stores_the_context_of_its_task(outbox: Outbox) -> None:
    async def enqueue() -> None:
        engine = create_async_engine(outbox.engine.url.set(drivername="sqlite+aiosqlite"))
        async with AsyncSession(engine) as session:
            with in_span():
                await session.run_sync(lambda sync: outbox.enqueue(rule_fired(), session=sync))
            await session.commit()
        await engine.dispose()

    asyncio.run(enqueue())
    assert contexts(outbox) == [STORED]


@pytest.mark.parametrize(
    ("state", "stored"),
    [
        ([("vendor", "v" * 250)] * 1, True),
        ([("a", "v" * 250), ("b", "v" * 250)], True),
        ([("a", "v" * 250), ("b", "v" * 250), ("c", "v" * 10)], False),
    ],
)
def test_a_tracestate_is_stored_up_to_512_characters(
    outbox: Outbox, state: list[tuple[str, str]], stored: bool
) -> None:
    with in_span(trace_state=TraceState(state)):
        outbox.enqueue(rule_fired())
    (found,) = contexts(outbox)
    assert json.loads(found) == {
        **json.loads(STORED),
        **({"tracestate": ",".join(f"{key}={value}" for key, value in state)} if stored else {}),
    }


def test_a_trace_that_is_not_sampled_continues_unsampled(outbox: Outbox) -> None:
    with in_span(trace_flags=TraceFlags(0)):
        outbox.enqueue(rule_fired())
    assert json.loads(contexts(outbox)[0])["traceparent"].endswith("-00")


# --- the span of an upload ---


class Answering(ScriptedClient):
    """A client whose answers name the failures of single events."""

    def __init__(self, answer: dict[int, UploadFailure]) -> None:
        super().__init__()
        self.answer = answer

    def upload(self, batch: Sequence[BatchItem], /) -> Any:
        super().upload(batch)
        return self.answer


@pytest.mark.contract
def test_an_upload_is_one_client_span_with_a_link_to_each_context(
    outbox: Outbox, client: HttpClient, spans
) -> None:
    with in_span():
        outbox.enqueue_many([rule_fired()] * 2)
    with in_span(span_id=7, trace_state=TraceState([("vendor", "v")])):
        outbox.enqueue(rule_fired())
    outbox.enqueue(rule_fired())
    assert outbox.flush(client).sent == 4
    (span,) = spans()
    assert (span.name, span.kind, span.parent) == ("send default", trace.SpanKind.CLIENT, None)
    assert dict(span.attributes) == {
        "messaging.system": "outbox",
        "messaging.operation.type": "send",
        "messaging.operation.name": "send",
        "messaging.destination.name": "default",
        "messaging.batch.message_count": 4,
        "server.address": "127.0.0.1",
    }
    linked = [link.context for link in span.links]
    assert [(one.trace_id, one.span_id, one.trace_flags) for one in linked] == [
        (PARENT.trace_id, PARENT.span_id, 1),
        (PARENT.trace_id, 7, 1),
    ]
    assert linked[1].trace_state.to_header() == "vendor=v"
    assert (span.status.status_code, span.events) == (StatusCode.UNSET, ())


def test_an_upload_of_one_event_names_it_and_its_destination(outbox: Outbox, spans) -> None:
    outbox.enqueue(rule_fired(), to="billing", event_id="order-17")
    outbox.flush(ScriptedClient(), destination="billing")
    (span,) = spans()
    assert span.name == "send billing"
    assert span.attributes["messaging.message.id"] == "order-17"
    assert span.attributes["messaging.destination.name"] == "billing"
    assert not {"messaging.batch.message_count", "server.address"} & span.attributes.keys()


def test_the_service_gets_the_context_of_the_span(
    outbox: Outbox, client: HttpClient, server: ScriptedServer, spans
) -> None:
    outbox.enqueue(rule_fired())
    outbox.flush(client)
    (span,) = spans()
    sent = f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-"
    assert server.requests[0].headers["traceparent"].startswith(sent)
    assert not trace.get_current_span().get_span_context().is_valid


def test_a_header_of_the_client_takes_the_place_of_the_context(
    outbox: Outbox, server: ScriptedServer, spans
) -> None:
    outbox.enqueue(rule_fired())
    with HttpClient(server.url, token="t", headers={"traceparent": "mine"}) as client:
        outbox.flush(client)
    assert server.requests[0].headers["traceparent"] == "mine"


def test_without_a_span_the_service_gets_no_context(
    outbox: Outbox, client: HttpClient, server: ScriptedServer
) -> None:
    with in_span():
        outbox.enqueue(rule_fired())
    outbox.flush(client)
    assert "traceparent" not in server.requests[0].headers


@pytest.mark.parametrize(
    ("failure", "kind", "text"),
    [
        (HttpFailure(503, "Service Unavailable", "a body"), "503", "503 Service Unavailable"),
        (
            TransportFailure("no complete answer within 5 ms", is_timeout=True),
            "timeout",
            "transport: no complete answer within 5 ms",
        ),
        (
            TransportFailure("https://me:secret-of-mine@host: refused"),
            "TransportFailure",
            "transport: https://[REDACTED-TOKEN]@host: refused",
        ),
    ],
)
def test_a_failed_upload_says_why_and_when_the_events_are_sent_again(
    outbox: Outbox, spans, failure, kind: str, text: str
) -> None:
    first, second = outbox.enqueue_many([rule_fired()] * 2)
    outbox.flush(ScriptedClient(failure))
    (span,) = spans()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, text)
    assert span.attributes["error.type"] == kind
    (event,) = span.events
    assert event.name == "retry"
    assert dict(event.attributes) == {
        "outbox.verdict": "transient",
        "outbox.events": 2,
        "outbox.retry_count": 1,
        "outbox.next_attempt_at_ms": min(row(outbox, one).next_attempt_at_ms for one in (first, second)),
    }


def test_the_span_holds_the_request_alone(outbox: Outbox, spans) -> None:
    seen: list[bool] = []
    on_statement(outbox, lambda _: seen.append(trace.get_current_span().get_span_context().is_valid))
    outbox.enqueue(rule_fired())
    outbox.flush(ScriptedClient(DOWN))
    assert seen
    assert not any(seen)


def test_each_request_of_an_isolation_is_a_span(outbox: Outbox, spans) -> None:
    outbox.enqueue_many([rule_fired()] * 2)
    outbox.flush(ScriptedClient(REJECTED, REJECTED, OK))
    whole, alone, accepted = spans()
    assert [dict(event.attributes) for event in whole.events] == [
        {"outbox.verdict": "permanent", "outbox.events": 2}
    ]
    assert alone.attributes["error.type"] == "422"
    assert accepted.status.status_code is StatusCode.UNSET
    assert accepted.events == ()


def test_the_failures_of_single_events_are_no_failure_of_the_request(outbox: Outbox, spans) -> None:
    first, _ = outbox.enqueue_many([rule_fired()] * 2)
    outbox.flush(Answering({first: DOWN}))
    outbox.retry_now()
    outbox.flush(Answering({first: DOWN}))
    some, all_of_them = spans()
    assert some.status.status_code is StatusCode.UNSET
    assert [event.attributes["outbox.events"] for event in some.events] == [1]
    assert (all_of_them.status.status_code, all_of_them.attributes["error.type"]) == (StatusCode.ERROR, "503")


def test_an_event_that_is_not_sent_again_is_no_retry(outbox: Outbox, spans) -> None:
    first, _ = outbox.enqueue_many([rule_fired()] * 2)
    outbox.flush(Answering({first: REJECTED}))
    assert row(outbox, first).status == "abandoned"
    assert [span.events for span in spans()] == [()]


def test_an_interrupted_upload_ends_its_span(outbox: Outbox, spans) -> None:
    outbox.enqueue(rule_fired())
    with pytest.raises(KeyboardInterrupt):
        outbox.flush(ScriptedClient(KeyboardInterrupt()))
    (span,) = spans()
    assert (span.status.status_code, span.attributes["error.type"]) == (StatusCode.ERROR, "KeyboardInterrupt")
    assert span.events == ()
    assert not trace.get_current_span().get_span_context().is_valid


@pytest.mark.contract
@pytest.mark.parametrize(
    "stored",
    ["", "null", "[]", "{", '{"traceparent":1}', '{"traceparent":"00-0-0-01"}', '{"traceparent":"x"}', "{}" * 600],
)
def test_a_context_that_another_program_wrote_wrongly_is_no_link(outbox: Outbox, spans, stored: str) -> None:
    add_row(outbox, trace_context=stored)
    with in_span():
        assert outbox.flush(ScriptedClient()).sent == 1
    (span,) = spans()
    assert span.links == ()


def test_a_context_that_is_no_text_is_no_link(outbox: Outbox, spans) -> None:
    row_id = add_row(outbox)
    with outbox.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE observation_events SET trace_context = x'ff' WHERE id = ?", (row_id,))
    assert outbox.flush(ScriptedClient()).sent == 1
    assert [span.links for span in spans()] == [()]


# --- a telemetry that is not there, or broken ---


def test_a_program_without_a_tracer_gets_no_span(
    outbox: Outbox, client: HttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracing.upload_span([], "", None) is tracing.upload_span([], "", None)
    monkeypatch.delitem(tracing.sys.modules, "opentelemetry.trace")
    with in_span():
        outbox.enqueue(rule_fired())
    assert contexts(outbox) == [None]
    assert outbox.flush(client).sent == 1


class Broken(SpanProcessor):
    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        raise RuntimeError("on_start")


class BrokenAtEnd(SpanProcessor):
    def on_end(self, span: ReadableSpan) -> None:
        raise RuntimeError("on_end")


class BrokenSpan(trace.NonRecordingSpan):
    def get_span_context(self) -> SpanContext:
        raise RuntimeError("get_span_context")


@pytest.mark.parametrize("processor", [Broken(), BrokenAtEnd()])
def test_an_error_of_the_telemetry_changes_nothing(
    outbox: Outbox, client: HttpClient, provider: TracerProvider, processor: SpanProcessor, caplog
) -> None:
    caplog.set_level(logging.DEBUG, "outbox")
    provider.add_span_processor(processor)
    with trace.use_span(BrokenSpan(PARENT)):
        outbox.enqueue(rule_fired())
    assert contexts(outbox) == [None]
    assert outbox.flush(client).sent == 1
    assert "outbox.tracing_failed" in [record.event_name for record in caplog.records]


def test_a_log_filter_that_fails_as_well_changes_nothing(outbox: Outbox, caplog) -> None:
    caplog.set_level(logging.DEBUG, "outbox")
    log = logging.getLogger("outbox")

    def fail(_record: logging.LogRecord) -> bool:
        raise RuntimeError("filter")

    log.addFilter(fail)
    try:
        with trace.use_span(BrokenSpan(PARENT)):
            outbox.enqueue(rule_fired())
    finally:
        log.removeFilter(fail)
    assert contexts(outbox) == [None]
