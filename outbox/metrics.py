"""Prometheus metrics. Requires the extra `prometheus`."""

from __future__ import annotations

import logging
import shutil
import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

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

from outbox.clock import monotonic_s
from outbox.destinations import DEFAULT_NAME
from outbox.failures import OutboxError
from outbox.hooks import OUTCOMES, Hooks, Settled, Upload
from outbox.lifecycle import Status
from outbox.outbox import Outbox
from outbox.policy import Verdict
from outbox.stats import Stats
from outbox.storage.engines import file_of

log = logging.getLogger("outbox")

_Family = GaugeMetricFamily | CounterMetricFamily

MOST_TYPES = 50
"""Number of event types with their own series: the types with the most events. All others share one series."""

MOST_DESTINATIONS = 50
"""Number of destinations with their own series: the first that this process saw. All others share one series."""

OTHER = "(other)"

# Figures are reused for ten times as long as reading them took, so reading takes at most a tenth of the time.
_REST = 10
_UPLOAD_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 45)


class OutboxMetrics(Collector):
    """Exports the queue in the database, and the outcomes of this `Outbox` object's flushes, to a registry.

    A scrape reads the database, unless the last figures are recent enough: reading takes at most a tenth of the
    time. While the database can't be read, `outbox_up` is 0 and its other figures are missing. A registry holds
    one outbox.
    """

    def __init__(self, outbox: Outbox, *, registry: CollectorRegistry = REGISTRY) -> None:
        self._outbox = outbox
        self._lock = threading.Lock()
        self._look_again_s = 0.0
        self._seen: Sequence[Metric] = ()
        self._is_up = True
        self._destinations: set[str] = set()
        self._outcomes = Counter(
            "outbox_outcomes", "Events by outcome and destination.", ["outcome", "destination"], registry=None
        )
        self._uploads = Histogram(
            "outbox_upload_duration_seconds",
            "Duration of the requests to the services, by result and destination.",
            ["result", "destination"],
            buckets=_UPLOAD_BUCKETS_S,
            registry=None,
        )
        lost = Counter(
            "outbox_lost_leases",
            "Events that another flusher took over before their outcome was written.",
            registry=None,
        )
        self._begin_series([DEFAULT_NAME])
        # In this order: reading the queue begins the series of new destinations.
        for collector in (self, self._outcomes, self._uploads, lost):
            registry.register(collector)
        counting = {f"on_{word}": partial(self._count, word) for word, _ in OUTCOMES.values()}
        outbox.hooks.append(Hooks(**counting, on_lost=lost.inc, on_upload=self._observe))

    def _begin_series(self, destinations: Iterable[str]) -> None:
        """Start series at 0: the rate of a series that starts with its first event does not count that event."""
        for label in dict.fromkeys(map(self._label, destinations)):
            for word, _ in OUTCOMES.values():
                self._outcomes.labels(word, label)
            for verdict in (None, *Verdict):
                self._uploads.labels(_result(verdict), label)

    def _label(self, destination: str) -> str:
        if len(self._destinations) < MOST_DESTINATIONS:
            self._destinations.add(destination)
        return destination if destination in self._destinations else OTHER

    def _count(self, word: str, settled: Settled) -> None:
        self._outcomes.labels(word, self._label(settled.destination)).inc(settled.recorded)

    def _observe(self, upload: Upload) -> None:
        self._uploads.labels(_result(upload.verdict), self._label(upload.destination)).observe(
            upload.duration_ms / 1_000
        )

    def describe(self) -> Sequence[Metric]:
        """Return the metrics without values and without reading the database."""
        return list(_families().values())

    def collect(self) -> Sequence[Metric]:
        """Return the metrics of the queue."""
        with self._lock:
            begun_s = monotonic_s()
            if begun_s >= self._look_again_s:
                self._seen = self._look()
                ended_s = monotonic_s()
                self._look_again_s = ended_s + (ended_s - begun_s) * _REST
            return self._seen

    def _look(self) -> Sequence[Metric]:
        families = _families()
        try:
            stats = self._outbox.stats()
            found = stats.by_destination
            self._begin_series(sorted(found, key=lambda name: found[name].undelivered, reverse=True))
            _fill(families, stats, self._label)
        except OutboxError as error:
            if self._is_up:
                log.warning(
                    "the metrics can't read the database: %s", error, extra={"event_name": "outbox.not_measured"}
                )
            self._is_up = False
        else:
            self._is_up = True
        families["up"].add_metric([], self._is_up)
        silent_ms = [age for silence in tuple(self._outbox.heartbeats) if (age := silence()) is not None]
        if silent_ms:
            families["silent"].add_metric([], max(silent_ms) / 1_000)
        path = file_of(self._outbox.engine)
        if path is not None and path.parent.is_dir():
            families["disk_free"].add_metric([], shutil.disk_usage(path.parent).free)
        return list(families.values())


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


def _families() -> dict[str, _Family]:
    return {
        "up": GaugeMetricFamily("outbox_up", "1 if the database can be read, else 0."),
        "events": GaugeMetricFamily("outbox_events", "Events in the database.", labels=["status", "event_type"]),
        "oldest": GaugeMetricFamily(
            "outbox_oldest_pending_age_seconds", "Age of the oldest pending or sending event."
        ),
        "depth": GaugeMetricFamily(
            "outbox_destination_events", "Events in the database.", labels=["destination", "status"]
        ),
        "overdue": GaugeMetricFamily(
            "outbox_overdue_seconds", "How long the next event has been due.", labels=["destination"]
        ),
        "waiting": GaugeMetricFamily(
            "outbox_waiting_events", "Pending events that failed, by what they wait for.", labels=["waits_for"]
        ),
        "paused": GaugeMetricFamily("outbox_paused_destinations", "Destinations that are paused for all hosts."),
        "silent": GaugeMetricFamily(
            "outbox_worker_silent_seconds", "Time since a worker of this process gave a sign of life."
        ),
        "deleted": CounterMetricFamily("outbox_deleted_undelivered", "Undelivered events that were deleted."),
        "disk_free": GaugeMetricFamily("outbox_disk_free_bytes", "Free disk space beside the SQLite file."),
    }


def _fill(families: dict[str, _Family], stats: Stats, label_of: Callable[[str], str]) -> None:
    statuses = [status.value for status in Status]
    sizes = sorted(stats.by_type.items(), key=lambda item: (-sum(item[1].values()), item[0]))
    events: Tally[tuple[str, str]] = Tally()
    for rank, (event_type, counts) in enumerate(sizes):
        # Another program that writes to the file may store types that are not Unicode.
        label = event_type.encode(errors="replace").decode() if rank < MOST_TYPES else OTHER
        events.update({(status, label): 0 for status in statuses})
        for status, count in counts.items():
            events[status if status in statuses else OTHER, label] += count
    for labels, count in events.items():
        families["events"].add_metric(labels, count)
    families["oldest"].add_metric([], (stats.oldest_pending_age_ms or 0) / 1_000)
    depth: Tally[tuple[str, str]] = Tally()
    overdue_ms = {DEFAULT_NAME: 0}
    for destination, one in stats.by_destination.items():
        name = label_of(destination)
        for status, count in one.counts.items():
            depth[name, status if status in statuses else OTHER] += count
        overdue_ms[name] = max(overdue_ms.get(name, 0), one.overdue_ms)
    for labels, count in depth.items():
        families["depth"].add_metric(labels, count)
    for name, ms in overdue_ms.items():
        families["overdue"].add_metric([name], ms / 1_000)
    for waits_for, count in stats.waits_for.items():
        families["waiting"].add_metric([waits_for], count)
    families["paused"].add_metric([], len(stats.pauses))
    families["deleted"].add_metric([], stats.left_undelivered)


def _result(verdict: Verdict | None) -> str:
    return "accepted" if verdict is None else verdict.value.replace(" ", "_")
