"""Prometheus metrics. Requires the extra `prometheus`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from outbox.hooks import OUTCOMES
from outbox.measures import (
    LOST_LEASES,
    OF_QUEUE,
    OUTCOMES_TOTAL,
    RESULTS,
    UPLOAD_BUCKETS_S,
    UPLOAD_DURATION,
    Measure,
    Measures,
)
from outbox.outbox import Outbox


class OutboxMetrics(Collector):
    """Exports the queue in the database, and the outcomes of this `Outbox` object's flushes, to a registry.

    A scrape reads the database, unless the last figures are recent enough: reading takes at most a tenth of the
    time. While the database can't be read, `outbox_up` is 0 and its other figures are missing. A registry holds
    one outbox: a second one raises ValueError.
    """

    def __init__(self, outbox: Outbox, *, registry: CollectorRegistry = REGISTRY) -> None:
        self._outcomes = Counter(*OUTCOMES_TOTAL, registry=None)
        self._uploads = Histogram(*UPLOAD_DURATION, buckets=UPLOAD_BUCKETS_S, registry=None)
        lost = Counter(*LOST_LEASES, registry=None)
        self._measures = Measures(outbox, self._begin_series)
        # In this order: reading the queue begins the series of new destinations.
        for collector in (self, self._outcomes, self._uploads, lost):
            registry.register(collector)
        self._measures.follow(
            count=lambda outcome, label, events: self._outcomes.labels(outcome, label).inc(events),
            lost=lost.inc,
            observe=lambda result, label, seconds: self._uploads.labels(result, label).observe(seconds),
        )

    def _begin_series(self, label: str) -> None:
        for word, _ in OUTCOMES.values():
            self._outcomes.labels(word, label)
        for result in RESULTS:
            self._uploads.labels(result, label)

    def describe(self) -> Sequence[Metric]:
        """Return the metrics without values and without reading the database."""
        return list(map(_family, OF_QUEUE.values()))

    def collect(self) -> Sequence[Metric]:
        """Return the metrics of the queue."""
        found = self._measures.read()
        families = []
        for key, measure in OF_QUEUE.items():
            family = _family(measure)
            for labels, value in found.get(key, {}).items():
                family.add_metric(labels, value)
            families.append(family)
        return families


@contextmanager
def serve(outbox: Outbox, *, port: int, address: str) -> Iterator[str]:
    """Serve the metrics of the outbox and of this process over HTTP; yield the URL. Port 0 picks a free port."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    OutboxMetrics(outbox, registry=registry)
    try:
        server, thread = start_http_server(port, address, registry=registry)
    except OSError as error:
        raise OSError(error.errno, f"metrics at port {port} of {address}: {error.strerror}") from None
    try:
        host = f"[{address}]" if ":" in address else address
        yield f"http://{host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _family(measure: Measure) -> GaugeMetricFamily | CounterMetricFamily:
    kind = CounterMetricFamily if measure.is_counter else GaugeMetricFamily
    return kind(measure.name, measure.help, labels=measure.labels)
