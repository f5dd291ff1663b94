"""Metrics for Prometheus; they need the extra `prometheus`."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
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

from outbox.failures import OutboxError
from outbox.hooks import OUTCOMES, Hooks, Settled, Upload
from outbox.lifecycle import Status
from outbox.outbox import Outbox
from outbox.policy import Verdict
from outbox.sqlite import sqlite_file
from outbox.stats import Stats

log = logging.getLogger("outbox")

_Family = GaugeMetricFamily | CounterMetricFamily

MOST_TYPES = 50
"""So many event types, those with the most events, have series of their own; the others share one."""

OTHER = "(other)"

# A look is used again until ten times as long has gone by as it took: looking takes at most a tenth of the time.
_REST = 10
_UPLOAD_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 45)


class OutboxMetrics(Collector):
    """Exports an outbox to a registry: the state of the queue, and what is flushed through this `Outbox` object.

    The state is looked up in the database when it is asked for, at most a tenth of the time; while that fails,
    `outbox_up` is 0 and the rest of the state is left out. A registry has room for one outbox.
    """

    # Bound in the class: tools that freeze time replace the names in modules.
    _clock = staticmethod(time.monotonic)

    def __init__(self, outbox: Outbox, *, registry: CollectorRegistry = REGISTRY) -> None:
        self._outbox = outbox
        self._lock = threading.Lock()
        self._look_again_s = 0.0
        self._seen: Sequence[Metric] = ()
        self._is_up = True
        outcomes = Counter("outbox_outcomes", "Events, by what became of them.", ["outcome"], registry=registry)
        uploads = Histogram(
            "outbox_upload_duration_seconds",
            "How long the requests to the service took, by what came of them.",
            ["result"],
            buckets=_UPLOAD_BUCKETS_S,
            registry=registry,
        )
        lost = Counter(
            "outbox_lost_leases",
            "Events that had another owner when their outcome was to be recorded.",
            registry=registry,
        )
        # All series from the start: a rate of one that begins with its first event does not show that event.
        counted = {word: _counted(outcomes.labels(word)) for word, _ in OUTCOMES.values()}
        timed = {verdict: uploads.labels(_result(verdict)) for verdict in (None, *Verdict)}

        def observe(upload: Upload) -> None:
            timed[upload.verdict].observe(upload.duration_ms / 1_000)

        registry.register(self)
        outbox.hooks.append(
            Hooks(**{f"on_{word}": count for word, count in counted.items()}, on_lost=lost.inc, on_upload=observe)
        )

    def describe(self) -> Sequence[Metric]:
        """Return what can be collected, without a look into the database."""
        return list(_families().values())

    def collect(self) -> Sequence[Metric]:
        """Return the state of the queue."""
        with self._lock:
            begun_s = self._clock()
            if begun_s >= self._look_again_s:
                self._seen = self._look()
                ended_s = self._clock()
                self._look_again_s = ended_s + (ended_s - begun_s) * _REST
            return self._seen

    def _look(self) -> Sequence[Metric]:
        families = _families()
        try:
            _fill(families, self._outbox.stats())
        except OutboxError as error:
            if self._is_up:
                log.warning("the queue can't be measured: %s", error, extra={"event_name": "outbox.not_measured"})
            self._is_up = False
        else:
            self._is_up = True
        families["up"].add_metric([], self._is_up)
        path = sqlite_file(self._outbox.engine.url)
        if path is not None and path.parent.is_dir():
            families["disk_free"].add_metric([], shutil.disk_usage(path.parent).free)
        return list(families.values())


@contextmanager
def serve(outbox: Outbox, *, port: int, address: str) -> Iterator[str]:
    """Serve the metrics of the outbox and of this process over HTTP; give the URL. Port 0 takes a free one."""
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
        "up": GaugeMetricFamily("outbox_up", "Whether the database could be looked into."),
        "events": GaugeMetricFamily("outbox_events", "Events in the database.", labels=["state", "event_type"]),
        "oldest": GaugeMetricFamily(
            "outbox_oldest_pending_age_seconds", "The age of the oldest event that is pending or being sent."
        ),
        "overdue": GaugeMetricFamily("outbox_overdue_seconds", "For how long the next event has been due."),
        "paused": GaugeMetricFamily(
            "outbox_paused_destinations", "Services that failed and are left alone by all hosts."
        ),
        "deleted": CounterMetricFamily(
            "outbox_deleted_undelivered", "Events that were deleted and had not been delivered."
        ),
        "disk_free": GaugeMetricFamily("outbox_disk_free_bytes", "What is free where the SQLite file lies."),
    }


def _fill(families: dict[str, _Family], stats: Stats) -> None:
    states = [status.value for status in Status]
    sizes = sorted(stats.by_type.items(), key=lambda item: (-sum(item[1].values()), item[0]))
    events: Tally[tuple[str, str]] = Tally()
    for rank, (event_type, counts) in enumerate(sizes):
        # A file that another program also writes may hold types that are not Unicode.
        label = event_type.encode(errors="replace").decode() if rank < MOST_TYPES else OTHER
        events.update({(state, label): 0 for state in states})
        for state, count in counts.items():
            events[state if state in states else OTHER, label] += count
    for labels, count in events.items():
        families["events"].add_metric(labels, count)
    families["oldest"].add_metric([], (stats.oldest_pending_age_ms or 0) / 1_000)
    families["overdue"].add_metric([], stats.overdue_ms / 1_000)
    families["paused"].add_metric([], len(stats.pauses))
    families["deleted"].add_metric([], stats.left_undelivered)


def _counted(counter: Counter) -> Callable[[Settled], object]:
    return lambda settled: counter.inc(settled.recorded)


def _result(verdict: Verdict | None) -> str:
    return "accepted" if verdict is None else verdict.value.replace(" ", "_")
