"""OpenTelemetry gets the same metrics as Prometheus."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.metrics import _internal
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from builders import DOWN, REJECTED, ScriptedClient, on_statement, rule_fired
from command_line import runner
from outbox import Outbox, Policy, Worker, measures
from outbox.cli import main, sending
from outbox.meter import OutboxMeter
from outbox.metrics import OutboxMetrics
from outbox.storage.engines import writing

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def exported(outbox: Outbox, reader: InMemoryMetricReader, monkeypatch: pytest.MonkeyPatch) -> OutboxMeter:
    monkeypatch.setattr(measures, "_REST", 0)  # each collection of a test is to look
    return OutboxMeter(outbox, meter_provider=MeterProvider([reader]))


def points(reader: InMemoryMetricReader) -> list[tuple[Any, Any]]:
    """The metrics with each of their points."""
    found = reader.get_metrics_data()
    (scope,) = found.resource_metrics[0].scope_metrics
    assert scope.scope.name == "outbox"
    return [(metric, point) for metric in scope.metrics for point in metric.data.data_points]


def collected(reader: InMemoryMetricReader) -> Samples:
    return {
        (metric.name, frozenset(point.attributes.items())): (
            point.count if isinstance(point, HistogramDataPoint) else point.value
        )
        for metric, point in points(reader)
    }


def scraped(registry: CollectorRegistry) -> Samples:
    """The same of Prometheus: of a histogram, the counts that are not 0."""
    found: Samples = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            name = sample.name.removesuffix("_count")
            is_part = sample.name.endswith(("_bucket", "_sum", "_created"))
            if not is_part and (name == sample.name or sample.value):
                found[name, frozenset(sample.labels.items())] = sample.value
    return found


@pytest.mark.contract
@pytest.mark.usefixtures("exported", "noon")  # what is overdue would grow between the two looks
def test_the_metrics_are_those_of_prometheus(outbox: Outbox, reader: InMemoryMetricReader) -> None:
    registry = CollectorRegistry()
    OutboxMetrics(outbox, registry=registry)
    outbox.policy = Policy(max_rows=9, when_full="trim")
    outbox.enqueue_many([rule_fired()] * 9)
    outbox.enqueue_many([rule_fired()] * 3, to="billing")
    outbox.flush(ScriptedClient(REJECTED, None, DOWN))
    outbox.flush(ScriptedClient(), destination="billing")
    with Worker(outbox, ScriptedClient(logged_in=False)):
        ours, theirs = collected(reader), scraped(registry)
    moving = {"outbox_worker_silent_seconds", "outbox_disk_free_bytes"}
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert key[0] in moving or ours[key] == pytest.approx(value), key
    assert ours["outbox_outcomes_total", frozenset({("outcome", "sent"), ("destination", "billing")})] == 3


@pytest.mark.usefixtures("exported")
def test_counters_start_at_zero_and_grow(outbox: Outbox, reader: InMemoryMetricReader) -> None:
    lost = ("outbox_lost_leases_total", frozenset())
    sent = ("outbox_outcomes_total", frozenset({("outcome", "sent"), ("destination", "default")}))
    found = collected(reader)
    assert (found[lost], found[sent]) == (0, 0)
    outbox.enqueue(rule_fired())
    outbox.flush(ScriptedClient())
    assert collected(reader)[sent] == 1
    growing = {metric.name for metric, _ in points(reader) if getattr(metric.data, "is_monotonic", False)}
    assert growing == {"outbox_outcomes_total", "outbox_lost_leases_total", "outbox_deleted_undelivered_total"}


@pytest.mark.usefixtures("exported")
def test_units_and_buckets_are_told(outbox: Outbox, reader: InMemoryMetricReader) -> None:
    outbox.enqueue(rule_fired())
    outbox.flush(ScriptedClient())
    told = points(reader)
    units = {metric.name: metric.unit for metric, _ in told}
    assert (units["outbox_overdue_seconds"], units["outbox_disk_free_bytes"], units["outbox_up"]) == (
        "s",
        "By",
        "",
    )
    (bounds,) = [point.explicit_bounds for _, point in told if isinstance(point, HistogramDataPoint)]
    assert tuple(bounds) == measures.UPLOAD_BUCKETS_S
    assert all(metric.description.endswith(".") for metric, _ in told)


@pytest.mark.usefixtures("exported")
def test_a_collection_reads_the_database_once(outbox: Outbox, reader: InMemoryMetricReader) -> None:
    reads: list[str] = []
    on_statement(outbox, lambda statement: reads.append(statement) if "GROUP BY" in statement else None)
    collected(reader)
    once = len(reads)
    assert once
    collected(reader)
    assert len(reads) == 2 * once


@pytest.mark.usefixtures("exported")
def test_a_database_that_fails_is_down_and_does_not_break_the_collection(
    outbox: Outbox, reader: InMemoryMetricReader
) -> None:
    with writing(outbox.engine) as connection:
        connection.exec_driver_sql("ALTER TABLE observation_events RENAME TO elsewhere")
    found = {name: value for (name, _), value in collected(reader).items()}
    assert found["outbox_up"] == 0
    assert "outbox_events" not in found
    assert "outbox_outcomes_total" in found


def test_without_a_provider_the_metrics_go_to_the_programs_own(
    outbox: Outbox, reader: InMemoryMetricReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_internal, "_METER_PROVIDER", MeterProvider([reader]))
    OutboxMeter(outbox)
    assert collected(reader)["outbox_up", frozenset()] == 1


def test_run_exports_through_the_meter_that_its_process_has_set_up(
    outbox: Outbox, url: str, reader: InMemoryMetricReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_internal, "_METER_PROVIDER", MeterProvider([reader]))
    seen: list[Samples] = []

    def look(_seconds: float) -> None:
        seen.append(collected(reader))
        raise KeyboardInterrupt

    monkeypatch.setattr(sending, "_sleep", look)
    assert (
        runner().invoke(main, ["--database", url, "run", "--url", "http://127.0.0.1:9", "--no-auth"]).exit_code
        == 0
    )
    assert seen[0]["outbox_up", frozenset()] == 1
