"""A trace goes on from the enqueue to the service, through a real exporter to a real collector."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from builders import rule_fired
from outbox import HttpClient, Outbox
from outbox.meter import OutboxMeter
from outbox.testing import ScriptedServer

KINDS = {"/v1/traces": ExportTraceServiceRequest, "/v1/metrics": ExportMetricsServiceRequest}


class Collector:
    """A receiver of OTLP over HTTP on this machine."""

    def __init__(self) -> None:
        received: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                received.append(KINDS[self.path].FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self._received = received
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def spans(self) -> dict[str, Span]:
        """The spans by name."""
        return {
            span.name: span
            for request in self._received
            if isinstance(request, ExportTraceServiceRequest)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        }

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics by name."""
        return {
            metric.name: metric
            for request in self._received
            if isinstance(request, ExportMetricsServiceRequest)
            for resource in request.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def tracer(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> Iterator[TracerProvider]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{collector.url}/v1/traces")))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield provider
    provider.shutdown()


def test_a_collector_gets_the_trace_from_the_enqueue_to_the_service(
    outbox: Outbox, client: HttpClient, server: ScriptedServer, collector: Collector, tracer: TracerProvider
) -> None:
    server.script(503)
    with trace.get_tracer("shop").start_as_current_span("place order"):
        outbox.enqueue(rule_fired(), event_id="order-17")
    outbox.flush(client)
    assert tracer.force_flush()
    placed, sent = collector.spans["place order"], collector.spans["send default"]
    assert sent.kind == Span.SPAN_KIND_CLIENT
    assert [(link.trace_id, link.span_id) for link in sent.links] == [(placed.trace_id, placed.span_id)]
    assert sent.trace_id != placed.trace_id
    attributes = {attribute.key: attribute.value.string_value for attribute in sent.attributes}
    assert attributes == {
        "messaging.system": "outbox",
        "messaging.operation.type": "send",
        "messaging.operation.name": "send",
        "messaging.destination.name": "default",
        "messaging.message.id": "order-17",
        "server.address": "127.0.0.1",
        "error.type": "503",
    }
    assert (sent.status.code, sent.status.message) == (Status.STATUS_CODE_ERROR, "503 Service Unavailable")
    assert [event.name for event in sent.events] == ["retry"]
    assert server.requests[0].headers["traceparent"].split("-")[1:3] == [sent.trace_id.hex(), sent.span_id.hex()]


def test_a_collector_gets_the_metrics(outbox: Outbox, client: HttpClient, collector: Collector) -> None:
    reader = PeriodicExportingMetricReader(
        OTLPMetricExporter(f"{collector.url}/v1/metrics"), export_interval_millis=float("inf")
    )
    provider = MeterProvider([reader], shutdown_on_exit=False)
    OutboxMeter(outbox, meter_provider=provider)
    outbox.enqueue_many([rule_fired()] * 3)
    outbox.flush(client)
    outbox.enqueue(rule_fired())
    assert provider.force_flush()
    provider.shutdown()
    found = collector.metrics
    depth = {
        tuple(sorted(attribute.value.string_value for attribute in point.attributes)): point.as_int
        for point in found["outbox_destination_events"].gauge.data_points
    }
    assert (depth["default", "pending"], depth["default", "sent"]) == (1, 3)
    assert found["outbox_outcomes_total"].sum.is_monotonic
    (duration,) = found["outbox_upload_duration_seconds"].histogram.data_points
    assert duration.count == 1
