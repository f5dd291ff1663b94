from __future__ import annotations

import json
from datetime import timedelta

import pytest
from freezegun import freeze_time

from builders import NOON, add_row
from command_line import IS_OFF
from outbox.clock import now_ms


def test_health_says_that_capture_is_off_and_keeps_its_exit_codes(run, outbox, opted_out):
    result = run("health")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "ok\n", f"outbox: {IS_OFF}\n")
    add_row(outbox, next_attempt_at_ms=now_ms() - 3_600_000)
    result = run("health", "--json")
    assert result.exit_code == 3
    assert result.stderr.startswith(f"outbox: {IS_OFF}\noutbox: an event has been due for")


def test_health_is_well_while_nothing_is_overdue(outbox, run):
    add_row(outbox, next_attempt_at_ms=now_ms() - 60_000)
    assert (run("health").exit_code, run("health").stdout) == (0, "ok\n")
    add_row(outbox, status="parked")
    add_row(outbox, next_attempt_at_ms=now_ms() + 60_000)
    assert json.loads(run("health", "--json").stdout)["overdue_ms"] >= 60_000


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_health_says_that_nobody_delivers(outbox, run, options):
    with freeze_time(NOON + timedelta(minutes=31)):
        add_row(outbox)
        result = run("health", "--max-overdue", "30m", *options)
    assert result.exit_code == 3
    assert "an event has been due for 31 minutes" in result.stderr


def test_health_tells_of_events_that_a_dead_flusher_held(outbox, run):
    # Its lease ended at noon, and nobody has taken the event since.
    add_row(outbox, status="sending")
    with freeze_time(NOON + timedelta(minutes=31)):
        assert "next due      2026-11-24 12:00:00 UTC (31 minutes ago)" in run("status").stdout
        assert run("health", "--max-overdue", "30m").exit_code == 3
    with freeze_time(NOON - timedelta(minutes=1)):
        assert run("health", "--max-overdue", "0s").exit_code == 0


def test_liveness_does_not_ask_for_deliveries(outbox, run):
    add_row(outbox)
    assert run("health", "--live").exit_code == 0
    assert run("health", "--live", "--json").stdout == '{"overdue_ms": null, "silent_ms": null, "holds": []}\n'


def test_health_says_that_there_is_no_database(run):
    result = run("health", "--live")
    assert result.exit_code == 1
    assert "outbox upgrade" in result.stderr
