"""The metrics of `outbox.metrics` through OpenTelemetry's meter. Requires the extra `otel`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation, get_meter

from outbox.hooks import OUTCOMES
from outbox.measures import (
    LOST_LEASES,
    OF_QUEUE,
    OUTCOMES_TOTAL,
    UPLOAD_BUCKETS_S,
    UPLOAD_DURATION,
    Found,
    Measure,
    Measures,
)
from outbox.outbox import Outbox


class OutboxMeter:
    """Exports the metrics of `OutboxMetrics` through a meter, under the same names. Labels become attributes.

    Without `meter_provider`, they go to the program's provider, which may be set up later. A collection reads the
    database once, unless the last figures are recent enough: reading takes at most a tenth of the time. While the
    database can't be read, `outbox_up` is 0 and its other figures are missing. Two outboxes need two providers.
    """

    def __init__(self, outbox: Outbox, *, meter_provider: MeterProvider | None = None) -> None:
        meter = get_meter("outbox", meter_provider=meter_provider)
        self._outcomes = meter.create_counter(**_described(OUTCOMES_TOTAL))
        uploads = meter.create_histogram(
            **_described(UPLOAD_DURATION), explicit_bucket_boundaries_advisory=UPLOAD_BUCKETS_S
        )
        lost = meter.create_counter(**_described(LOST_LEASES))
        lost.add(0)
        self._lock = threading.Lock()
        self._exported = set(OF_QUEUE)
        self._measures = Measures(outbox, self._begin_series)
        self._found: Found = {}
        for key, measure in OF_QUEUE.items():
            create = meter.create_observable_counter if measure.is_counter else meter.create_observable_gauge
            create(**_described(measure), callbacks=[partial(self._observe, key)])
        self._measures.follow(
            count=lambda outcome, label, events: self._outcomes.add(
                events, _attributes(OUTCOMES_TOTAL, outcome, label)
            ),
            lost=lost.add,
            observe=lambda result, label, seconds: uploads.record(
                seconds, _attributes(UPLOAD_DURATION, result, label)
            ),
        )

    def _begin_series(self, label: str) -> None:
        for word, _ in OUTCOMES.values():
            self._outcomes.add(0, _attributes(OUTCOMES_TOTAL, word, label))

    def _observe(self, key: str, _options: CallbackOptions) -> Iterator[Observation]:
        with self._lock:
            # One reading for all instruments of a collection: an instrument that asks again begins another one.
            if key in self._exported:
                self._found = self._measures.read()
                self._exported.clear()
            self._exported.add(key)
            values = self._found.get(key, {})
        for labels, value in values.items():
            yield Observation(value, _attributes(OF_QUEUE[key], *labels))


def _described(measure: Measure) -> dict[str, str]:
    units = {"seconds": "s", "bytes": "By"}
    return {
        "name": measure.name,
        "description": measure.help,
        "unit": units.get(measure.name.rpartition("_")[2], ""),
    }


def _attributes(measure: Measure, *values: str) -> dict[str, str]:
    return dict(zip(measure.labels, values, strict=True))
