"""The metrics: their names, and how their values are read from the database."""

from __future__ import annotations

import logging
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

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

MOST_TYPES = 50
"""Number of event types with their own series: the types with the most events. All others share one series."""

MOST_DESTINATIONS = 50
"""Number of destinations with their own series: the first that this process saw. All others share one series."""

OTHER = "(other)"

# Figures are reused for ten times as long as reading them took, so reading takes at most a tenth of the time.
_REST = 10


class Measure(NamedTuple):
    """One metric."""

    name: str
    """The name of a counter ends with `_total`."""
    help: str
    labels: tuple[str, ...] = ()

    @property
    def is_counter(self) -> bool:
        """Whether the value only grows."""
        return self.name.endswith("_total")


OF_QUEUE = {
    "up": Measure("outbox_up", "1 if the database can be read, else 0."),
    "events": Measure("outbox_events", "Events in the database.", ("status", "event_type")),
    "oldest": Measure("outbox_oldest_pending_age_seconds", "Age of the oldest pending or sending event."),
    "depth": Measure("outbox_destination_events", "Events in the database.", ("destination", "status")),
    "overdue": Measure("outbox_overdue_seconds", "How long the next event has been due.", ("destination",)),
    "waiting": Measure(
        "outbox_waiting_events", "Pending events that failed, by what they wait for.", ("waits_for",)
    ),
    "paused": Measure("outbox_paused_destinations", "Destinations that failed and have accepted nothing since."),
    "held": Measure(
        "outbox_destination_held", "1 while an operator holds the destination, else 0.", ("destination",)
    ),
    "silent": Measure("outbox_worker_silent_seconds", "Time since a worker of this process gave a sign of life."),
    "deleted": Measure("outbox_deleted_undelivered_total", "Undelivered events that were deleted."),
    "disk_free": Measure("outbox_disk_free_bytes", "Free disk space beside the SQLite file."),
}
"""The metrics that are read when they are exported."""

OUTCOMES_TOTAL = Measure("outbox_outcomes_total", "Events by outcome and destination.", ("outcome", "destination"))
LOST_LEASES = Measure(
    "outbox_lost_leases_total", "Events that another flusher took over before their outcome was written."
)
UPLOAD_DURATION = Measure(
    "outbox_upload_duration_seconds",
    "Duration of the requests to the services, by result and destination.",
    ("result", "destination"),
)
UPLOAD_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 45)

RESULTS = ("accepted", *(verdict.value.replace(" ", "_") for verdict in Verdict))
"""The results of an upload."""

Found = Mapping[str, Mapping[tuple[str, ...], float]]
"""The values by key of `OF_QUEUE`, then by the values of the labels. What can't be read is missing."""


class Measures:
    """The figures of one outbox for one exporter.

    `begin` is called with the label of each new destination, so that its counters start at 0. If a series started
    with its first event, a rate would not count that event.
    """

    def __init__(self, outbox: Outbox, begin: Callable[[str], object]) -> None:
        self._outbox = outbox
        self._begin = begin
        self._lock = threading.Lock()
        self._look_again_s = 0.0
        self._found: Found = {}
        self._is_up = True
        self._destinations: set[str] = set()
        self._begun: set[str] = set()
        self._label(DEFAULT_NAME)

    def follow(
        self,
        *,
        count: Callable[[str, str, int], object],
        lost: Callable[[int], object],
        observe: Callable[[str, str, float], object],
    ) -> None:
        """Call these functions for what the outbox flushes from now on.

        `count` gets an outcome, the label of the destination and a number of events, `lost` a number of events,
        and `observe` the result of an upload, the label of the destination and the duration in seconds.
        """

        def settled(word: str, news: Settled) -> None:
            count(word, self._label(news.destination), news.recorded)

        def uploaded(news: Upload) -> None:
            result = RESULTS[0] if news.verdict is None else news.verdict.value.replace(" ", "_")
            observe(result, self._label(news.destination), news.duration_ms / 1_000)

        counting = {f"on_{word}": partial(settled, word) for word, _ in OUTCOMES.values()}
        self._outbox.hooks.append(Hooks(**counting, on_lost=lost, on_upload=uploaded))

    def read(self) -> Found:
        """Read the database, unless the last figures are recent enough."""
        with self._lock:
            begun_s = monotonic_s()
            if begun_s >= self._look_again_s:
                self._found = self._look()
                ended_s = monotonic_s()
                self._look_again_s = ended_s + (ended_s - begun_s) * _REST
            return self._found

    def _label(self, destination: str) -> str:
        if len(self._destinations) < MOST_DESTINATIONS:
            self._destinations.add(destination)
        label = destination if destination in self._destinations else OTHER
        if label not in self._begun:
            self._begun.add(label)
            self._begin(label)
        return label

    def _look(self) -> Found:
        found: dict[str, Mapping[tuple[str, ...], float]] = {}
        try:
            stats = self._outbox.stats()
        except OutboxError as error:
            if self._is_up:
                log.warning(
                    "the metrics can't read the database: %s", error, extra={"event_name": "outbox.not_measured"}
                )
            self._is_up = False
        else:
            self._is_up = True
            by_size = sorted(
                stats.by_destination, key=lambda name: stats.by_destination[name].undelivered, reverse=True
            )
            names = [*by_size, *(hold.destination for hold in stats.holds)]
            found = _figures(stats, {name: self._label(name) for name in names})
        found["up"] = {(): int(self._is_up)}  # OTLP has no booleans
        silent_ms = [age for silence in tuple(self._outbox.heartbeats) if (age := silence()) is not None]
        if silent_ms:
            found["silent"] = {(): max(silent_ms) / 1_000}
        path = file_of(self._outbox.engine)
        if path is not None and path.parent.is_dir():
            found["disk_free"] = {(): shutil.disk_usage(path.parent).free}
        return found


def _figures(stats: Stats, labels: Mapping[str, str]) -> dict[str, Mapping[tuple[str, ...], float]]:
    depth: Counter[tuple[str, ...]] = Counter()
    overdue_ms = {DEFAULT_NAME: 0}
    for destination, one in stats.by_destination.items():
        label = labels[destination]
        for status, count in one.counts.items():
            depth[label, _known(status)] += count
        overdue_ms[label] = max(overdue_ms.get(label, 0), one.overdue_ms)
    held = dict.fromkeys(overdue_ms, 0) | {labels[hold.destination]: 1 for hold in stats.holds}
    return {
        "events": _events(stats.by_type.items()),
        "oldest": {(): (stats.oldest_pending_age_ms or 0) / 1_000},
        "depth": depth,
        "overdue": {(label,): ms / 1_000 for label, ms in overdue_ms.items()},
        "waiting": {(waits_for,): count for waits_for, count in stats.waits_for.items()},
        "paused": {(): len(stats.pauses)},
        "held": {(label,): is_held for label, is_held in held.items()},
        "deleted": {(): stats.left_undelivered},
    }


def _events(by_type: Iterable[tuple[str, Mapping[str, int]]]) -> Counter[tuple[str, ...]]:
    events: Counter[tuple[str, ...]] = Counter()
    for rank, (event_type, counts) in enumerate(sorted(by_type, key=lambda one: (-sum(one[1].values()), one[0]))):
        # A program without this library may have stored a type that is not valid Unicode.
        label = event_type.encode(errors="replace").decode() if rank < MOST_TYPES else OTHER
        events.update({(status.value, label): 0 for status in Status})
        for status, count in counts.items():
            events[_known(status), label] += count
    return events


def _known(status: str) -> str:
    return status if status in {one.value for one in Status} else OTHER
