"""What Prometheus is told, and what that may cost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import types
from datetime import timedelta
from pathlib import Path

import pytest
import requests
from freezegun import freeze_time
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update

from builders import (
    DOWN,
    NOON,
    REJECTED,
    REVOKED,
    ROOT,
    SLOW_DOWN,
    ScriptedClient,
    add_row,
    on_statement,
    rule_fired,
)
from command_line import logged, runner
from outbox import ObservationEvent, Outbox, Policy, Worker, measures, metrics
from outbox.cli import main
from outbox.metrics import OutboxMetrics, serve
from outbox.storage.engines import writing


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def exported(outbox: Outbox, registry: CollectorRegistry, monkeypatch) -> OutboxMetrics:
    monkeypatch.setattr(measures, "_REST", 0)  # each scrape of a test is to look
    return OutboxMetrics(outbox, registry=registry)


def scrape(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """The samples by name and label values, the state before the type, as Prometheus reads them."""
    text = generate_latest(registry).decode()
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels, reverse=True))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def depth(samples: dict[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    """Events by state and type, where there are any."""
    return {key[1:]: value for key, value in samples.items() if key[0] == "outbox_events" and value}


# --- the state of the queue ---


@pytest.mark.contract
@pytest.mark.usefixtures("exported")
def test_depth_is_told_by_state_and_type_and_states_without_events_are_zero(
    outbox: Outbox, registry: CollectorRegistry
) -> None:
    outbox.enqueue_many([rule_fired()] * 3)
    add_row(outbox, status="parked", event_type="fix_outcome")
    samples = scrape(registry)
    assert samples["outbox_up",] == 1
    assert depth(samples) == {("pending", "rule_fired"): 3, ("parked", "fix_outcome"): 1}
    assert samples["outbox_events", "abandoned", "rule_fired"] == 0


@pytest.mark.usefixtures("exported")
def test_ages_are_told_in_seconds_and_zero_where_there_is_nothing(
    outbox: Outbox, registry: CollectorRegistry
) -> None:
    samples = scrape(registry)
    assert (samples["outbox_oldest_pending_age_seconds",], samples["outbox_overdue_seconds", "default"]) == (0, 0)
    with freeze_time(NOON) as clock:
        outbox.enqueue(rule_fired())
        clock.tick(timedelta(seconds=90))
        outbox.flush(ScriptedClient(SLOW_DOWN))
        clock.tick(timedelta(seconds=30))
        samples = scrape(registry)
        assert (samples["outbox_oldest_pending_age_seconds",], samples["outbox_overdue_seconds", "default"]) == (
            120,
            0,
        )
        clock.tick(timedelta(seconds=60))
        overdue_ms = outbox.overdue_ms()
        assert overdue_ms > 0
        assert scrape(registry)["outbox_overdue_seconds", "default"] == overdue_ms / 1_000


@pytest.mark.usefixtures("exported")
def test_a_worker_that_gives_no_sign_of_life_is_told(
    outbox: Outbox, registry: CollectorRegistry, monkeypatch
) -> None:
    name = ("outbox_worker_silent_seconds",)
    workers = [Worker(outbox, ScriptedClient()) for _ in range(2)]
    assert name not in scrape(registry)
    with workers[0], workers[1]:
        assert scrape(registry)[name] < 60
        monkeypatch.setattr(workers[1]._threads, "silent_ms", lambda: 600_500)
        assert scrape(registry)[name] == 600.5
    assert name not in scrape(registry)


def test_what_was_deleted_undelivered_is_told_by_the_ledger(url: str, registry: CollectorRegistry) -> None:
    with Outbox.open(url, policy=Policy(max_rows=1, when_full="trim")) as outbox:
        add_row(outbox, status="sent", sent_at_ms=1)
        outbox.enqueue_many([rule_fired()] * 3)
        OutboxMetrics(outbox, registry=registry)
        assert scrape(registry)["outbox_deleted_undelivered_total",] == 2


@pytest.mark.servers
@pytest.mark.usefixtures("exported")
def test_a_pause_is_told(outbox: Outbox, registry: CollectorRegistry) -> None:
    client = ScriptedClient(SLOW_DOWN)
    assert scrape(registry)["outbox_paused_destinations",] == 0
    outbox.enqueue(rule_fired())
    outbox.flush(client)
    samples = scrape(registry)
    assert samples["outbox_paused_destinations",] == 1
    assert ("outbox_disk_free_bytes",) not in samples


@pytest.mark.usefixtures("exported")
def test_a_hold_is_told_and_so_is_its_end(outbox: Outbox, registry: CollectorRegistry) -> None:
    outbox.enqueue(rule_fired(), to="billing")
    outbox.hold("billing", why="billing moves")
    outbox.hold("search", why="search moves")  # it has no events

    def held() -> dict[str, float]:
        return {key[1]: value for key, value in scrape(registry).items() if key[0] == "outbox_destination_held"}

    assert held() == {"default": 0, "billing": 1, "search": 1}
    outbox.resume("billing")
    assert held() == {"default": 0, "billing": 0, "search": 1}


@pytest.mark.usefixtures("exported")
def test_the_free_space_beside_the_file_is_told(registry: CollectorRegistry) -> None:
    assert scrape(registry)["outbox_disk_free_bytes",] > 0


@pytest.mark.usefixtures("exported")
def test_each_destination_has_series_that_start_at_zero(outbox: Outbox, registry: CollectorRegistry) -> None:
    with freeze_time(NOON) as clock:
        outbox.enqueue(rule_fired(), to="billing")
        clock.tick(timedelta(seconds=90))
        samples = scrape(registry)
        assert samples["outbox_overdue_seconds", "billing"] == 90
        assert samples["outbox_overdue_seconds", "default"] == 0
        assert samples["outbox_destination_events", "pending", "billing"] == 1
        assert samples["outbox_outcomes_total", "sent", "billing"] == 0
        outbox.flush(ScriptedClient(), destination="billing")
        samples = scrape(registry)
    assert samples["outbox_overdue_seconds", "billing"] == 0
    assert samples["outbox_destination_events", "sent", "billing"] == 1
    assert samples["outbox_outcomes_total", "sent", "billing"] == 1
    assert samples["outbox_outcomes_total", "sent", "default"] == 0
    assert samples["outbox_upload_duration_seconds_count", "accepted", "billing"] == 1
    assert samples["outbox_upload_duration_seconds_count", "accepted", "default"] == 0


@pytest.mark.usefixtures("noon")
def test_destinations_beyond_the_largest_share_series(
    outbox: Outbox, registry: CollectorRegistry, monkeypatch
) -> None:
    monkeypatch.setattr(measures, "MOST_DESTINATIONS", 2)
    monkeypatch.setattr(measures, "_REST", 0)
    OutboxMetrics(outbox, registry=registry)
    for name, events in (("archive", 1), ("billing", 3), ("search", 1)):
        outbox.enqueue_many([rule_fired()] * events, to=name)
    scrape(registry)
    for name in ("archive", "billing", "search"):
        outbox.flush(ScriptedClient(), destination=name)
    samples = scrape(registry)
    assert {key[2] for key in samples if key[0] == "outbox_destination_events"} == {"billing", "(other)"}
    for name, events in (("default", 0), ("billing", 3), ("(other)", 2)):
        assert samples["outbox_outcomes_total", "sent", name] == events
        assert samples.get(("outbox_destination_events", "sent", name), 0) == events
    outbox.hold("archive", why="a deploy")
    held = {key[1]: value for key, value in scrape(registry).items() if key[0] == "outbox_destination_held"}
    assert held == {"default": 0, "billing": 0, "(other)": 1}


@pytest.mark.usefixtures("exported")
def test_types_beyond_the_largest_share_a_series_and_odd_names_break_nothing(
    outbox: Outbox, registry: CollectorRegistry, monkeypatch
) -> None:
    monkeypatch.setattr(measures, "MOST_TYPES", 2)
    with writing(outbox.engine) as connection:
        connection.exec_driver_sql("PRAGMA ignore_check_constraints = ON")
    for event_type, status, events in (("a", "odd", 4), ('b\n"', "sent", 3), ("c", "sent", 1), ("d", "sent", 1)):
        for _ in range(events):
            add_row(outbox, event_type=event_type, status=status)
    assert depth(scrape(registry)) == {("(other)", "a"): 4, ("sent", 'b\n"'): 3, ("sent", "(other)"): 2}
    with writing(outbox.engine) as connection:
        connection.exec_driver_sql(
            "UPDATE observation_events SET event_type = CAST(x'ff' AS TEXT) WHERE status = 'odd'"
        )
    assert depth(scrape(registry))["(other)", "?"] == 4


@pytest.mark.usefixtures("exported")
def test_a_database_that_fails_does_not_break_the_scrape_and_is_logged_once(
    outbox: Outbox, registry: CollectorRegistry, caplog
) -> None:
    def rename(there: str, new: str) -> None:
        with writing(outbox.engine) as connection:
            connection.exec_driver_sql(f"ALTER TABLE {there} RENAME TO {new}")

    def scrape_twice(*, up: bool) -> None:
        for _ in range(2):
            samples = scrape(registry)
            assert samples["outbox_up",] == up
            assert (("outbox_events", "sent", "rule_fired") in samples) == up
            assert samples["outbox_outcomes_total", "sent", "default"] == 1

    outbox.enqueue(rule_fired())
    outbox.flush(ScriptedClient())
    for times in (1, 2):
        scrape_twice(up=True)
        rename("observation_events", "elsewhere")
        scrape_twice(up=False)
        rename("elsewhere", "observation_events")
        assert [record.event_name for record in caplog.records] == ["outbox.not_measured"] * times


def test_a_folder_that_is_gone_does_not_break_the_scrape(tmp_path: Path, registry: CollectorRegistry) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with Outbox.open(f"sqlite:///{folder}/outbox.db") as outbox:
        OutboxMetrics(outbox, registry=registry)
        outbox.engine.dispose()
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        samples = scrape(registry)
    assert samples["outbox_up",] == 0
    assert ("outbox_disk_free_bytes",) not in samples


def test_looking_takes_at_most_a_tenth_of_the_time(
    outbox: Outbox, registry: CollectorRegistry, monkeypatch
) -> None:
    now = 0.0
    looks = 0

    def look(statement: str) -> None:
        nonlocal now, looks
        if "GROUP BY" in statement and "observation_events.event_type" in statement:
            looks += 1
            now += 2.0

    monkeypatch.setattr(measures, "monotonic_s", lambda: now)
    on_statement(outbox, look)
    OutboxMetrics(outbox, registry=registry)
    assert looks == 0
    seen = scrape(registry)
    assert (looks, now) == (1, 2.0)
    outbox.enqueue(rule_fired())
    now = 21.9
    assert scrape(registry) == seen
    assert looks == 1
    now = 22.0
    assert depth(scrape(registry)) == {("pending", "rule_fired"): 1}
    assert looks == 2


# --- what this process flushed ---


@pytest.mark.usefixtures("exported")
def test_outcomes_are_counted_from_zero_on(outbox: Outbox, registry: CollectorRegistry) -> None:
    outbox.policy = Policy.original()

    def outcomes() -> dict[str, float]:
        return {key[1]: value for key, value in scrape(registry).items() if key[0] == "outbox_outcomes_total"}

    assert outcomes() == {"sent": 0, "rescheduled": 0, "parked": 0, "abandoned": 0, "released": 0}
    outbox.enqueue_many([rule_fired()] * 3)
    outbox.flush(ScriptedClient(REJECTED, None, REJECTED, DOWN))
    outbox.enqueue_many([rule_fired()] * 2)
    outbox.flush(ScriptedClient(REVOKED))
    outbox.enqueue(rule_fired())
    with pytest.raises(KeyboardInterrupt):
        outbox.flush(ScriptedClient(KeyboardInterrupt()))
    assert outcomes() == {"sent": 1, "rescheduled": 1, "parked": 2, "abandoned": 1, "released": 1}


@pytest.mark.usefixtures("exported")
def test_lost_leases_are_counted(outbox: Outbox, registry: CollectorRegistry) -> None:
    def lose(_batch):
        with writing(outbox.engine) as connection:
            connection.execute(update(ObservationEvent.__table__).values(next_attempt_at_ms=1))
        return DOWN

    assert scrape(registry)["outbox_lost_leases_total",] == 0
    outbox.enqueue_many([rule_fired()] * 2)
    outbox.flush(ScriptedClient(lose))
    assert scrape(registry)["outbox_lost_leases_total",] == 2


@pytest.mark.usefixtures("exported")
def test_the_time_of_uploads_is_told_by_their_result(outbox: Outbox, registry: CollectorRegistry) -> None:
    outbox.enqueue_many([rule_fired()] * 2)
    outbox.flush(ScriptedClient(REJECTED, None, SLOW_DOWN))
    samples = scrape(registry)
    counts = {key[1]: value for key, value in samples.items() if key[0] == "outbox_upload_duration_seconds_count"}
    assert counts == {"accepted": 1, "permanent": 1, "rate_limited": 1, "transient": 0, "auth_blocked": 0}
    assert samples["outbox_upload_duration_seconds_bucket", "accepted", "45.0", "default"] == 1
    assert 0 < samples["outbox_upload_duration_seconds_sum", "accepted", "default"] < 45


# --- serving them ---


def test_they_are_served_with_those_of_the_process(outbox: Outbox) -> None:
    outbox.enqueue(rule_fired())
    with serve(outbox, port=0, address="127.0.0.1") as url:
        text = requests.get(url, timeout=20).text
    assert 'outbox_events{event_type="rule_fired",status="pending"} 1.0' in text
    assert "python_info" in text


def test_an_address_of_ipv6_stands_in_brackets_in_the_url(outbox: Outbox, monkeypatch) -> None:
    ends = types.SimpleNamespace(shutdown=int, server_close=int, join=int, server_port=9464)
    monkeypatch.setattr(metrics, "start_http_server", lambda *_, **__: (ends, ends))
    with serve(outbox, port=0, address="::1") as url:
        assert url == "http://[::1]:9464/metrics"


@pytest.mark.usefixtures("measured")
def test_run_serves_them(outbox: Outbox, url: str, monkeypatch) -> None:
    monkeypatch.setenv("OUTBOX_TOKEN", "token-of-tests")
    outbox.enqueue(rule_fired())
    run = subprocess.Popen(
        [
            sys.executable,
            *("-m", "outbox", "--database", url, "run", "--url", "http://127.0.0.1:9"),
            "--metrics-port",
            "0",
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    with run:
        said = run.stderr.readline()
        assert logged(said)[0].startswith("INFO metrics at http://127.0.0.1:")
        assert logged(run.stderr.readline())[0].startswith("INFO delivering from ")
        assert "outbox_up 1.0" in requests.get(said.split()[-1], timeout=20).text
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=240)
    assert run.returncode == 0


@pytest.mark.parametrize(("address", "reason"), [("127.0.0.1", "in use"), ("no.such.host.invalid", "")])
def test_where_metrics_can_not_be_served_is_named(outbox: Outbox, url: str, address: str, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = [
            "run",
            "--url",
            "http://127.0.0.1:9",
            "--metrics-port",
            str(port),
            "--metrics-address",
            address,
        ]
        result = runner().invoke(main, ["--database", url, *arguments])
    assert result.exit_code == 1
    assert f"metrics at port {port} of {address}: " in result.stderr
    assert reason in result.stderr


def test_without_the_extra_run_says_how_to_get_it(outbox: Outbox, url: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "outbox.metrics", None)
    result = runner().invoke(
        main, ["--database", url, "run", "--url", "http://127.0.0.1:9", "--metrics-port", "0"]
    )
    assert result.exit_code == 2
    assert "pip install 'observation-outbox[prometheus]'" in result.stderr
