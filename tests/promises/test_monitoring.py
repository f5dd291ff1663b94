"""What the page about monitoring promises of the log, the metrics and the alert rules."""

from __future__ import annotations

import ast
import json
import logging
import re
from pathlib import Path

import pytest
import yaml
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from builders import ROOT, ScriptedClient, rule_fired, run_code, statuses
from conditions import until
from outbox import HttpClient, HttpFailure, Outbox, Policy, Worker
from outbox.hooks import OUTCOMES
from outbox.meter import OutboxMeter
from outbox.metrics import OutboxMetrics
from outbox.testing.receiver import IngestServer
from test_docs import blocks

PAGE = "docs/monitoring.md"
CANARY = "payload-canary-7d1f"


def rows_of_tables(first_column: str) -> list[list[str]]:
    """The cells of the table with this heading."""
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    (table,) = re.findall(rf"^\| {re.escape(first_column)} \|.*\n\| ---.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# --- the log ---


def logged(call: ast.Call) -> list[tuple[str, str, frozenset[str]]]:
    """The names, the level and the attributes of one call of the logger."""
    (extra,) = [keyword.value for keyword in call.keywords if keyword.arg == "extra"]
    keys = [key.value for key in extra.keys]
    attributes = frozenset(keys) - {"event_name"}
    name = extra.values[keys.index("event_name")]
    if isinstance(name, ast.JoinedStr):
        return [
            (f"outbox.{word}", logging.getLevelName(level).lower(), attributes)
            for word, level in OUTCOMES.values()
        ]
    level = call.func.attr
    if level == "log":
        (level,) = re.findall(r"logging\.([A-Z]+) if ", ast.unparse(call.args[0]))
    return [(name.value, level.lower(), attributes)]


def test_the_page_lists_every_log_record_with_its_level_and_attributes() -> None:
    calls = [
        node
        for path in (ROOT / "outbox").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and re.fullmatch(r"log\.(log|debug|info|warning|error)", ast.unparse(node.func))
    ]
    listed = [
        (codes(name)[0], level, frozenset(codes(attributes)))
        for name, level, attributes, *_ in rows_of_tables("`event_name`")
    ]
    assert len({name for name, *_ in listed}) == len(listed)
    assert {record for call in calls for record in logged(call)} == {*listed}


def echo(batch) -> HttpFailure:
    """The answer of a service that rejects, and repeats what it got, as many do."""
    return HttpFailure(422, "Unprocessable Entity", batch[0].payload_json)


def test_no_record_holds_a_payload_though_the_service_repeats_it(outbox: Outbox, caplog) -> None:
    outbox.policy = Policy.original()
    caplog.set_level(logging.DEBUG, "outbox")
    event = rule_fired(session_id=CANARY, rule_ids=[CANARY])
    _, bad, _ = outbox.enqueue_many([event] * 3)
    rejecting = [lambda batch: echo(batch) if bad in [item.id for item in batch] else None] * 4
    outbox.flush(ScriptedClient(*rejecting))
    assert statuses(outbox) == ["sent", "abandoned", "sent"]
    outbox.enqueue_many([event] * 2)
    with Worker(outbox, ScriptedClient(*[echo] * 9)):
        until(lambda: "outbox.cannot_deliver" in names(caplog))
    assert CANARY in outbox.get(bad).last_error
    assert {"outbox.sent", "outbox.abandoned", "outbox.rescheduled", "outbox.upload"} <= {*names(caplog)}
    for record in caplog.records:
        assert CANARY not in f"{record.getMessage()} {vars(record)}"
    assert "can't deliver: 422 Unprocessable Entity" in [record.getMessage() for record in caplog.records]
    (abandoned,) = [record for record in caplog.records if record.event_name == "outbox.abandoned"]
    event_id = outbox.get(bad).event_id
    assert (abandoned.events, abandoned.row_ids, abandoned.event_ids) == (1, [bad], [event_id])
    assert abandoned.levelname == "WARNING"
    assert abandoned.getMessage() == f"abandoned: 1 of 1 events, rows [{bad}], event ids ['{event_id}']"


def names(caplog) -> list[str]:
    return [record.event_name for record in caplog.records]


# --- the metrics and the alert rules ---

FUNCTIONS = {"absent", "histogram_quantile", "increase", "max", "min", "rate", "sum"}
WORDS = {"or", "by", "unless"}
# Prometheus adds these to all that it scrapes.
OF_SCRAPES = {"instance", "job"}
DASHBOARD = json.loads((ROOT / "docs" / "grafana.json").read_text(encoding="utf-8"))


@pytest.fixture
def samples(outbox: Outbox) -> dict[str, dict[str, set[str]]]:
    """The names of all samples of an outbox with some events, with the values of their labels."""
    registry = CollectorRegistry()
    OutboxMetrics(outbox, registry=registry)
    outbox.enqueue(rule_fired())
    found: dict[str, dict[str, set[str]]] = {}
    with Worker(outbox, ScriptedClient(logged_in=False)):
        scraped = generate_latest(registry).decode()
    for family in text_string_to_metric_families(scraped):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return {name: labels for name, labels in found.items() if not name.endswith("_created")}


def rules() -> list[dict[str, object]]:
    (text,) = blocks(PAGE, "yaml")
    (group,) = yaml.safe_load(text)["groups"]
    return group["rules"]


def test_the_page_lists_every_metric_with_its_type_and_labels(outbox: Outbox) -> None:
    registry = CollectorRegistry()
    OutboxMetrics(outbox, registry=registry)
    outbox.enqueue(rule_fired())
    exported = set()
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        name = f"{family.name}_total" if family.type == "counter" else family.name
        if not family.name.endswith("_created"):
            exported.add((name, family.type, frozenset(labels)))
    listed = [
        (codes(name)[0], kind, frozenset(codes(labels))) for name, kind, labels, _ in rows_of_tables("metric")
    ]
    assert len(listed) == len(exported)
    assert {*listed} == exported


@pytest.mark.parametrize(
    ("metric", "label"), [("outbox_outcomes_total", "outcome"), ("outbox_upload_duration_seconds", "result")]
)
def test_the_page_lists_every_value_of_a_fixed_label(samples, metric: str, label: str) -> None:
    (words,) = [words for name, _, _, words in rows_of_tables("metric") if codes(name) == [metric]]
    values = next(labels[label] for name, labels in samples.items() if name.startswith(metric))
    assert {*codes(words)} == values


def test_every_alert_rule_has_what_prometheus_wants() -> None:
    for rule in rules():
        assert rule.keys() - {"for"} == {"alert", "expr", "annotations"}
        assert re.fullmatch(r"Outbox[A-Za-z]+", rule["alert"])
        assert re.fullmatch(r"[1-9][0-9]*[md]", rule.get("for", "1m"))
        assert rule["annotations"].keys() == {"summary"}
    assert len({rule["alert"] for rule in rules()}) == len(rules())


def check_names(expression: str, samples: dict[str, dict[str, set[str]]]) -> set[str]:
    """Check that all names in an expression are exported; return the metrics."""
    assert expression.count("(") == expression.count(")")
    bare = re.sub(r"\[(?:[1-9][0-9]*[mh]|\$__rate_interval)\]|\{[^}]*\}|\b(?:by|on) \([^)]*\)", "", expression)
    used = re.findall(r"[A-Za-z_:][A-Za-z0-9_:]*", re.sub(r"\b[0-9][0-9.e]*\b", "", bare))
    metrics = {*used} - FUNCTIONS - WORDS
    assert metrics
    assert metrics <= samples.keys()
    for metric, matchers in re.findall(r"([a-z_]+)\{([^}]*)\}", expression):
        for matcher in matchers.split(", "):
            label, variable, value = re.fullmatch(r'([a-z_]+)(?:=~"\$([a-z]+)"|!?="([a-z_]+)")', matcher).groups()
            assert label in samples[metric] or label in OF_SCRAPES
            assert value in samples[metric][label] if variable is None else variable == label
    labels = {label for metric in metrics for label in samples[metric]} | OF_SCRAPES
    for grouping in re.findall(r"\bby \(([^)]*)\)", expression):
        assert {*grouping.split(", ")} <= labels
    return metrics


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_every_name_in_an_alert_rule_is_exported(samples, rule: dict[str, str]) -> None:
    check_names(rule["expr"], samples)


def test_every_name_in_the_dashboard_is_exported_and_every_metric_is_shown(samples) -> None:
    shown = set()
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            shown |= check_names(target["expr"], samples)
            grouped = {*", ".join(re.findall(r"\bby \(([^)]*)\)", target["expr"])).split(", ")}
            assert {*re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])} <= grouped
    # Of a histogram, percentiles and rates tell more than the sum.
    assert shown == samples.keys() - {"outbox_upload_duration_seconds_sum"}


def test_the_variables_of_the_dashboard_are_labels_that_are_exported(samples) -> None:
    source, *others = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"]) == ("datasource", "datasource")
    for variable in others:
        query = r'label_values\((\w+)(?:\{job=~"\$job"\})?, (\w+)\)'
        metric, label = re.fullmatch(query, variable["query"]).groups()
        assert label == variable["name"]
        assert label in samples[metric] or label in OF_SCRAPES
    assert {*re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))} == {
        "__all",
        "__rate_interval",
        *(variable["name"] for variable in DASHBOARD["templating"]["list"]),
    }


def test_no_panel_of_the_dashboard_covers_another() -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len({*cells}) == len(cells)
    assert max(x for x, _ in cells) < 24  # the width of Grafana's grid
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)


# --- the examples ---


def test_the_code_that_exports_metrics_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    registry = CollectorRegistry()
    monkeypatch.setattr(OutboxMetrics.__init__, "__kwdefaults__", {"registry": registry})
    namespace: dict[str, object] = {}
    code = blocks(PAGE, "python")[1].replace("(9464,", "(0,")
    run_code(code, PAGE, namespace)
    assert registry.get_sample_value("outbox_up") == 1
    namespace["outbox"].close()
    namespace["server"].shutdown()
    namespace["server"].server_close()


def test_the_code_that_exports_metrics_through_a_meter_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    reader = InMemoryMetricReader()
    monkeypatch.setattr(OutboxMeter.__init__, "__kwdefaults__", {"meter_provider": MeterProvider([reader])})
    namespace: dict[str, object] = {}
    run_code(blocks(PAGE, "python")[2], PAGE, namespace)
    assert "outbox_up" in reader.get_metrics_data().to_json()
    namespace["outbox"].close()


def test_the_code_that_enqueues_in_a_span_keeps_its_trace(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", TracerProvider())
    namespace: dict[str, object] = {}
    run_code(blocks(PAGE, "python")[3], PAGE, namespace)
    with namespace["outbox"] as outbox:
        assert "traceparent" in outbox.find()[0].trace_context


def test_the_hook_of_the_page_reports_abandoned_events(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    run_code(blocks(PAGE, "python")[0], PAGE, namespace)
    with namespace["outbox"] as outbox, IngestServer() as server, HttpClient(server.url, token="t") as client:
        outbox.policy = Policy.original()
        outbox.enqueue_many([rule_fired(), rule_fired(session_id="poison")])
        outbox.flush(client)
    assert capsys.readouterr().out.startswith("rule_fired 2 was abandoned: permanent: 422 ")
