from __future__ import annotations

import json
import stat
from datetime import timedelta

import alembic.command
import pytest
from freezegun import freeze_time

from builders import NOON, NOON_MS, add_row, rule_fired
from command_line import IS_OFF
from outbox import Outbox, Policy
from outbox.schema import REVISIONS
from outbox.storage.engines import writing
from test_schema import alembic_here


@pytest.mark.parametrize("command", ["status", "list", "flush", "retry --all"])
def test_only_upgrade_and_enqueue_create_a_database(run, tmp_path, logged_in, command):
    result = run(*command.split())
    assert result.exit_code == 1
    assert result.stderr.startswith("outbox: there is no database ")
    assert "`outbox upgrade`" in result.stderr
    assert not (tmp_path / "outbox.db").exists()


def test_upgrade_says_from_where_to_where(run, url, tmp_path):
    first = run("upgrade")
    assert (first.exit_code, first.stdout) == (0, f"{url}: created schema {REVISIONS[-1]}\n")
    assert stat.S_IMODE((tmp_path / "outbox.db").stat().st_mode) == 0o600
    assert run("upgrade").stdout == f"{url}: schema {REVISIONS[-1]} is up to date\n"
    assert json.loads(run("upgrade", "--json").stdout) == {
        "database": url,
        "from": REVISIONS[-1],
        "to": REVISIONS[-1],
    }


def test_upgrade_names_the_older_schema(run, url, outbox):
    outbox.close()
    alembic.command.downgrade(alembic_here(url), REVISIONS[-2])
    assert run("upgrade").stdout == f"{url}: upgraded schema {REVISIONS[-2]} to {REVISIONS[-1]}\n"


@pytest.mark.parametrize("command", ["upgrade", "enqueue", "status"])
def test_a_newer_schema_is_refused(run, outbox, command):
    with writing(outbox.engine) as connection:
        connection.exec_driver_sql("UPDATE outbox_alembic_version SET version_num = 'outbox_9999'")
    result = run(command)
    assert result.exit_code == 1
    assert "this program is too old for it" in result.stderr


def fill(outbox):
    add_row(outbox, status="sent", sent_at_ms=NOON_MS)
    add_row(outbox, next_attempt_at_ms=NOON_MS + 300_000, event_type="fix_outcome")
    add_row(outbox, status="parked", last_error="401 Unauthorized", next_attempt_at_ms=NOON_MS + 60_000)
    add_row(outbox, status="parked", last_error="401 Unauthorized", next_attempt_at_ms=NOON_MS + 60_000)


def test_status_shows_counts_ages_and_the_likely_cause(run, outbox, url):
    fill(outbox)
    with freeze_time(NOON + timedelta(minutes=3)):
        result = run("status")
    assert result.exit_code == 0
    assert (
        result.stdout
        == f"""\
database      {url}
oldest        3 minutes old (pending or sending)
next due      2026-11-24 12:05:00 UTC (in 2 minutes)
likely cause  the service rejected the token 3 minutes ago (401 Unauthorized); 2 events are parked; set a new \
token, then run `outbox retry --all`

             pending  sending  sent  parked  abandoned
fix_outcome        1        0     0       0          0
rule_fired         0        0     1       2          0
all                1        0     1       2          0
"""
    )


def test_json_of_status_is_the_stats(run, outbox, url):
    fill(outbox)
    with freeze_time(NOON + timedelta(minutes=3)):
        stats = json.loads(run("status", "--json").stdout)
    assert stats["database"] == url
    assert stats["counts"] == {"pending": 1, "sending": 0, "sent": 1, "parked": 2, "abandoned": 0}
    assert stats["by_type"]["rule_fired"] == {"parked": 2, "sent": 1}
    assert stats["oldest_pending_age_ms"] == 180_000
    assert stats["next_due_at_ms"] == NOON_MS + 300_000


def test_status_of_an_empty_outbox_is_short(run, outbox, url):
    assert (
        run("status").stdout
        == f"""\
database      {url}

     pending  sending  sent  parked  abandoned
all        0        0     0       0          0
"""
    )


def test_status_tells_what_was_deleted(run, url):
    with Outbox.open(url, policy=Policy(max_rows=1, when_full="trim")) as outbox:
        add_row(outbox, status="sent", sent_at_ms=NOON_MS)
        outbox.enqueue_many([rule_fired()] * 3)
    said = run("status").stdout
    assert "lost          2 undelivered events deleted because the queue was full\n" in said
    assert said.endswith("""
events deleted so far, 2 of them undelivered:
status   type        reason  events
pending  rule_fired  cap          2
sent     rule_fired  cap          1
""")
    stats = json.loads(run("status", "--json").stdout)
    assert stats["left_undelivered"] == 2
    assert stats["deleted"][1] == {"status": "sent", "event_type": "rule_fired", "reason": "cap", "events": 1}


def test_status_and_doctor_say_how_full_the_queue_is(run, outbox, monkeypatch):
    outbox.enqueue_many([rule_fired()] * 5)
    assert "filling up" not in run("status").stdout
    assert "filling up" not in run("status", "--max-undelivered", "11").stdout
    words = "5 undelivered events, half of max_undelivered (10) or more"
    monkeypatch.setenv("OUTBOX_MAX_UNDELIVERED", "10")
    assert f"filling up    {words}\n" in run("status").stdout
    assert json.loads(run("status", "--json").stdout)["filling"] == words
    result = run("doctor")
    assert result.exit_code == 1
    assert f"WRONG  bounds        the queue is filling up: {words}; `outbox status` shows why" in result.stdout
    result = run("doctor", "--max-undelivered", "11")
    assert result.exit_code == 0
    assert "ok     bounds        5 undelivered events, less than half of max_undelivered\n" in result.stdout
    assert "bounds" not in run("doctor", "--max-undelivered", "0").stdout
    assert outbox.stats().filling is None


def test_status_and_show_say_that_capture_is_off(run, outbox, opted_out):
    add_row(outbox)
    assert f"likely cause  {IS_OFF}\n" in run("status").stdout
    assert json.loads(run("status", "--json").stdout)["likely_cause"] == IS_OFF
    assert f"abandons it. But nothing is sent now: {IS_OFF}\n" in run("show", "1").stdout


def test_doctor_says_that_capture_is_off_which_is_no_fault(run, outbox, opted_out):
    result = run("doctor")
    assert result.exit_code == 0
    words = "capture is off (OUTBOX_CAPTURE=false): no event is enqueued or sent"
    assert result.stdout.startswith(f"ok     capture       {words}\n")
