from __future__ import annotations

import json
import re
import sys
from datetime import timedelta

import pytest
from freezegun import freeze_time

from builders import NOON, NOON_MS, ROOT, add_row, row, statuses
from command_line import GOOD, record_bars
from outbox import Outbox
from outbox.cli import events
from outbox.clock import now_ms
from outbox.events import MAX_PAYLOAD_BYTES


def test_the_first_enqueue_creates_the_database(run, url):
    result = run("enqueue", input=f"{GOOD}\n{GOOD}\n")
    assert (result.exit_code, result.stdout) == (0, "standard input: 2 events enqueued, first id 1\n")
    with Outbox(url) as outbox:
        assert statuses(outbox) == ["pending", "pending"]


def test_the_routes_of_the_file_or_an_option_name_the_destinations(run, outbox, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outbox.toml").write_text("[routes]\nrule_fired = ['billing', 'search']\n'*' = 'archive'")
    assert run("enqueue", input=GOOD).stdout == "standard input: 1 event enqueued, first id 1\n"
    result = run("enqueue", "--json", "--to", "default", "--to", "billing", input=GOOD)
    assert json.loads(result.stdout) == {"file": "-", "enqueued": 1, "invalid": 0, "ids": [3, 4]}
    assert run("enqueue", input='{"event_type": "order_packed"}').exit_code == 0
    found = [row(outbox, row_id).destination for row_id in range(1, 6)]
    assert found == ["billing", "search", "", "billing", "archive"]
    refused = run("enqueue", "--to", "billing", "--to", "billing", input=GOOD)
    assert refused.exit_code == 2
    assert "to is ('billing', 'billing'), expected different destinations" in refused.stderr


def test_an_option_selects_the_events_of_one_destination(run, outbox):
    for destination in ("", "billing"):
        for status in ("parked", "abandoned"):
            add_row(outbox, destination=destination, status=status)
    of_billing = ("--destination", "billing")
    assert [one["id"] for one in json.loads(run("list", "--json", *of_billing).stdout)] == [3, 4]
    assert [one["id"] for one in json.loads(run("list", "--json", "--destination", "default").stdout)] == [1, 2]
    assert run("retry", *of_billing).stdout == "1 event made due\n"
    assert run("requeue", "--older-than", "0s", *of_billing).stdout.startswith("1 event requeued\n")
    assert statuses(outbox) == ["parked", "abandoned", "pending", "pending"]
    assert run("purge", "--older-than", "0s", *of_billing).stdout.startswith("2 events purged, 2 of them")
    assert statuses(outbox) == ["parked", "abandoned"]


def test_byte_order_mark_blank_lines_and_carriage_returns_are_no_part_of_events(run, outbox):
    result = run("enqueue", "-", input=f"\ufeff{GOOD}\r\n\r\n  \n{GOOD}".encode())
    assert (result.exit_code, statuses(outbox)) == (0, ["pending", "pending"])
    assert row(outbox, 1).payload_json == GOOD


def test_an_empty_file_is_done(run, outbox):
    result = run("enqueue", input="")
    assert (result.exit_code, result.stdout) == (0, "standard input: 0 events enqueued\n")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{oops", "the line is not JSON: "),
        (b"[1]", "expected a JSON object, got list"),
        (b'"\xff\xfe"', "the line is not UTF-8"),
        (b"[" * 100_000, "the line is not JSON: "),
        (b'{"event_type":""}', "event_type is '', expected a printable text of 1 to 191 characters"),
        (
            b'{"event_type":"rule_fired","session_id":"s","rule_ids":[]}',
            "rule_fired: fired_at: missing, expected ",
        ),
        (
            b'{"event_type":"' + b"x" * MAX_PAYLOAD_BYTES,
            f"the line has {MAX_PAYLOAD_BYTES + 15} bytes, expected at most ",
        ),
        (b'{"a":"\x1b[31m"}', "the line is not JSON: "),
    ],
)
def test_an_invalid_line_refuses_its_file_with_number_and_reason(run, outbox, line, reason):
    result = run("enqueue", input=GOOD.encode() + b"\n" + line)
    assert result.exit_code == 2
    first, last = result.stderr.splitlines()
    assert first.startswith(f"outbox: standard input, line 2: {reason}")
    assert last == "outbox: standard input: nothing enqueued because of 1 invalid line"
    assert (result.stdout, statuses(outbox)) == ("", [])


def test_only_the_first_invalid_lines_are_shown(run, outbox):
    lines = run("enqueue", input="{\n" * 50).stderr.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "outbox: standard input: nothing enqueued because of 50 invalid lines"


def test_one_file_that_is_refused_leaves_the_others(run, outbox, tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text(GOOD)
    bad.write_text(f"{GOOD}\nbad")
    result = run("enqueue", bad, good)
    assert result.exit_code == 2
    assert result.stdout == f"{good}: 1 event enqueued, first id 1\n"
    assert statuses(outbox) == ["pending"]


def test_skip_invalid_reports_every_invalid_line_and_records_the_rest(run, outbox):
    result = run("enqueue", "--skip-invalid", input="bad\n" * 20 + GOOD)
    assert (result.exit_code, len(result.stderr.splitlines())) == (0, 20)
    assert result.stdout == "standard input: 1 event enqueued, first id 1\n"


def test_skip_invalid_with_nothing_valid_records_nothing(run, outbox):
    result = run("enqueue", "--skip-invalid", input="bad\n")
    assert (result.exit_code, result.stdout) == (0, "standard input: 0 events enqueued\n")


def test_json_of_enqueue_is_one_object_a_file(run, outbox, tmp_path):
    (tmp_path / "bad").write_text("bad")
    result = run("enqueue", "--json", "-", tmp_path / "bad", input=f"{GOOD}\n{GOOD}")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"file": "-", "enqueued": 2, "invalid": 0, "ids": [1, 2]},
        {"file": str(tmp_path / "bad"), "enqueued": 0, "invalid": 1, "ids": []},
    ]


def test_a_file_that_is_not_there_is_misuse(run, tmp_path):
    assert run("enqueue", tmp_path / "none").exit_code == 2


def test_switched_off_capture_is_said_and_no_failure(run, monkeypatch, tmp_path):
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    result = run("enqueue", input=GOOD)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "capture is off" in result.stderr
    assert not (tmp_path / "outbox.db").exists()


def test_the_examples_are_events_that_can_be_enqueued(run, outbox):
    examples = ROOT / "examples" / "events.ndjson"
    assert run("enqueue", examples).exit_code == 0


def test_a_short_file_draws_no_bar_on_a_terminal(run, outbox, terminal, monkeypatch):
    monkeypatch.delitem(sys.modules, "rich.progress", raising=False)
    assert run("enqueue", input=GOOD).exit_code == 0
    assert "rich.progress" not in sys.modules


def test_a_long_file_draws_a_bar_on_a_terminal(run, outbox, terminal, monkeypatch, tmp_path):
    monkeypatch.setattr(events, "_BAR_FROM_BYTES", 2 * len(GOOD))
    (tmp_path / "file").write_text(f"{GOOD}\n" * 5)
    drawn = record_bars(monkeypatch)
    assert run("enqueue", tmp_path / "file").exit_code == 0
    size = 5 * (len(GOOD) + 1)
    assert drawn == [("Reading", size, size)]


def test_list_shows_what_is_due_later(run, outbox):
    ids = [add_row(outbox, next_attempt_at_ms=NOON_MS + minutes * 60_000) for minutes in (0, 1, 2)]
    result = run("list", "--due-after", "2026-11-24T12:00:00Z", "--json")
    assert [found["id"] for found in json.loads(result.stdout)] == ids[1:]


def test_list_shows_the_oldest_first_and_says_when_there_are_more(run, outbox):
    for minutes in (3, 1, 2):
        add_row(outbox, created_at_ms=NOON_MS + minutes * 60_000, retry_count=1, last_error="x" * 100)
    result = run("list", "--limit", 2)
    error = "x" * 77 + "..."
    assert (
        result.stdout
        == f"""\
id  status   type        created                  failures  last error
 2  pending  rule_fired  2026-11-24 12:01:00 UTC         1  {error}
 3  pending  rule_fired  2026-11-24 12:02:00 UTC         1  {error}
"""
    )
    assert result.stderr == "outbox: more than 2 events match; --limit sets how many are shown\n"
    assert run("list").stderr == ""


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ([], [1, 2, 3]),
        (["--status", "sent"], [1]),
        (["--type", "fix_outcome"], [2]),
        (["--older-than", "30m"], [1, 2]),
        (["--older-than", "1h"], [1]),
        (["--older-than", "2026-11-24T13:30:00+02:00"], [1, 2]),
        (["--older-than", "2026-11-24T11:00:00z"], [1]),
        (["--status", "sent", "--type", "fix_outcome"], []),
    ],
)
def test_list_filters(run, outbox, options, ids):
    add_row(outbox, status="sent", created_at_ms=NOON_MS - 2 * 3_600_000)
    add_row(outbox, event_type="fix_outcome", created_at_ms=NOON_MS - 3_600_000)
    add_row(outbox)
    with freeze_time(NOON):
        result = run("list", "--json", *options)
    assert [event["id"] for event in json.loads(result.stdout)] == ids


def test_a_list_of_nothing_says_so(run, outbox):
    result = run("list")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "outbox: no matching events\n")


@pytest.mark.parametrize("row_id", ["0", "x", "9223372036854775808"])
def test_what_is_no_id_is_misuse(run, outbox, row_id):
    assert run("show", row_id).exit_code == 2


def test_retry_makes_due_what_is_parked_or_waits(run, outbox):
    add_row(outbox, status="parked")
    add_row(outbox, next_attempt_at_ms=NOON_MS * 2)
    add_row(outbox, status="abandoned")
    assert run("retry").stdout == "2 events made due\n"
    assert json.loads(run("retry", "--json").stdout) == {"retried": 0}
    assert statuses(outbox) == ["pending", "pending", "abandoned"]


def test_requeue_tells_first_and_acts_then(run, outbox):
    for event_type in ("rule_fired", "fix_outcome", "rule_fired"):
        add_row(outbox, status="abandoned", event_type=event_type)
    add_row(outbox, status="abandoned", created_at_ms=NOON_MS + 3_600_000)
    with freeze_time(NOON + timedelta(hours=1)):
        dry = run("requeue", "--older-than", "30m", "--dry-run")
        assert dry.stdout == "3 events would be requeued\n  fix_outcome: 1\n  rule_fired: 2\n"
        assert statuses(outbox) == ["abandoned"] * 4
        assert run("requeue", "--older-than", "30m").stdout.startswith("3 events requeued\n")
        assert statuses(outbox) == ["pending", "pending", "pending", "abandoned"]
        assert json.loads(run("requeue", "--older-than", "30m", "--json").stdout) == {
            "total": 0,
            "per_type": {},
            "dry_run": False,
        }


def test_requeue_wants_an_age(run, outbox):
    assert run("requeue").exit_code == 2


def test_purge_tells_first_and_acts_then(run, outbox):
    for event_type in ("rule_fired", "fix_outcome", "rule_fired"):
        add_row(outbox, status="sent" if event_type == "fix_outcome" else "pending", event_type=event_type)
    kept = add_row(outbox, created_at_ms=NOON_MS + 3_600_000)
    with freeze_time(NOON + timedelta(hours=1)):
        dry = run("purge", "--older-than", "30m", "--dry-run")
        assert dry.stdout == "3 events would be purged, 2 of them undelivered\n  fix_outcome: 1\n  rule_fired: 2\n"
        assert len(statuses(outbox)) == 4
        done = run("purge", "--older-than", "30m")
        assert (done.exit_code, done.stderr) == (0, "")
        assert done.stdout.startswith("3 events purged, 2 of them undelivered\n")
        assert [found.id for found in outbox.find()] == [kept]
        assert json.loads(run("purge", "--type", "fix_outcome", "--json").stdout) == {
            "total": 0,
            "undelivered": 0,
            "in_flight": 0,
            "per_type": {},
            "dry_run": False,
        }
    assert re.search(
        r"events deleted so far, 2 of them undelivered:\n(?s:.*)\bpending +rule_fired +purge +2\n",
        run("status").stdout,
    )


def test_a_purge_of_a_type_leaves_other_types(run, outbox):
    add_row(outbox)
    kept = add_row(outbox, event_type="fix_outcome")
    assert run("purge", "--type", "rule_fired").exit_code == 0
    assert [found.id for found in outbox.find()] == [kept]


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_purge_of_everything_by_accident_is_misuse(run, outbox, options):
    add_row(outbox)
    result = run("purge", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "expected one of them or both" in result.stderr
    assert statuses(outbox) == ["pending"]


def test_a_purge_says_what_it_had_to_leave(run, outbox):
    add_row(outbox, status="sending", created_at_ms=1, next_attempt_at_ms=now_ms() + 60_000)
    dry = run("purge", "--older-than", "0s", "--dry-run")
    assert (dry.exit_code, dry.stderr) == (0, "outbox: would not be purged because they are being sent: 1 event\n")
    result = run("purge", "--older-than", "0s")
    assert (result.exit_code, result.stdout) == (1, "0 events purged, 0 of them undelivered\n")
    assert (
        result.stderr == "outbox: not purged because they are being sent: 1 event; run the command again later\n"
    )
    assert statuses(outbox) == ["sending"]
