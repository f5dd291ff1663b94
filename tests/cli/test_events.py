from __future__ import annotations

import json
import sys

import pytest

from builders import NOON_MS, ROOT, add_row, row, statuses
from command_line import GOOD, record_bars
from outbox import Outbox
from outbox.cli import events
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


def test_a_destination_that_the_file_does_not_describe_is_misuse(run, outbox, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outbox.toml").write_text("[destinations.billing]\n[destinations.search]")
    refused = run("enqueue", "--to", "default", "--to", "biling", input=GOOD)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr == (
        "outbox: --to is biling, which is unknown; the nearest destination of the file is billing\n"
    )
    assert statuses(outbox) == []
    assert run("enqueue", "--to", "default", "--to", "billing", input=GOOD).exit_code == 0


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


def edited(outbox, row_id, **fields):
    """A line of `list --ndjson` with another session."""
    found = outbox.get(row_id)
    payload = json.loads(GOOD) | {"session_id": "edited"}
    return json.dumps({"id": row_id, "created_at_ms": found.created_at_ms, "payload": payload, **fields})


def test_what_list_prints_can_be_edited_and_takes_the_place_of_the_old_events(run, outbox):
    for status in ("abandoned", "sent", "abandoned"):
        add_row(
            outbox, status=status, destination="billing", event_id=f"mine-{status}" if status == "sent" else None
        )
    listed = run("list", "--status", "abandoned", "--ndjson", "--oldest-first").stdout
    lines = listed.replace('"session_id":"s1"', '"session_id":"edited"')
    assert (lines.count("edited"), lines != listed) == (2, True)
    result = run("enqueue", "--replace", input=lines)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "standard input: 2 events replaced\n", "")
    found = [(one.id, one.status, one.session_id, one.destination) for one in outbox.find()]
    assert found == [(2, "sent", "", "billing"), *((new, "pending", "edited", "billing") for new in (4, 5))]
    assert [tuple(entry) for entry in outbox.stats().deleted] == [("abandoned", "rule_fired", "replaced", 2)]


def test_an_event_that_can_not_be_replaced_is_named_and_the_others_are_replaced(run, outbox):
    sent, waiting, gone = add_row(outbox, status="sent"), add_row(outbox), 99
    lines = [edited(outbox, sent), edited(outbox, waiting), f'{{"id": {gone}, "payload": {GOOD}}}']
    result = run("enqueue", "--replace", "--json", input="\n".join(lines))
    assert result.exit_code == 1
    assert result.stderr == (
        "outbox: event 1 is not replaced: it is sent\n"
        "outbox: event 99 is not replaced: it was deleted, or never enqueued here\n"
    )
    assert json.loads(result.stdout) == {
        "file": "-",
        "invalid": 0,
        "replaced": 1,
        "ids": {"2": 3},
        "refused": {"1": "it is sent", "99": "it was deleted, or never enqueued here"},
    }


def test_a_line_of_another_database_replaces_nothing(run, outbox):
    row_id = add_row(outbox)
    result = run("enqueue", "--replace", input=edited(outbox, row_id, created_at_ms=NOON_MS - 1))
    assert result.exit_code == 1
    assert "it was created at another time, so it is another event" in result.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (GOOD, "id is None, expected the row id of the event to replace"),
        (f'{{"id": true, "payload": {GOOD}}}', "id is True, expected the row id"),
        ('{"id": 1, "payload": null}', "payload is NoneType, expected the new event, a JSON object"),
        ('{"id": 1, "payload": {}}', "event_type"),
        (
            f'{{"id": 1, "created_at_ms": "x", "payload": {GOOD}}}',
            "created_at_ms is 'x', expected epoch milliseconds",
        ),
        (f'{{"id": 2, "payload": {GOOD}}}', "id is 2, like that of an earlier line, expected each event once"),
    ],
)
def test_an_invalid_edited_line_refuses_its_file(run, outbox, line, words):
    for _ in range(2):
        add_row(outbox)
    result = run("enqueue", "--replace", input=f"{edited(outbox, 2)}\n{line}\n")
    assert result.exit_code == 2
    assert words in result.stderr
    assert "nothing enqueued because of 1 invalid line" in result.stderr
    assert [found.id for found in outbox.find()] == [1, 2]
    assert run("enqueue", "--replace", "--skip-invalid", input=f"{edited(outbox, 2)}\n{line}\n").exit_code == 0
    assert [found.id for found in outbox.find()] == [1, 3]


def test_a_replaced_event_keeps_its_destination(run, outbox):
    result = run("enqueue", "--replace", "--to", "billing", input="")
    assert result.exit_code == 2
    assert "a replaced event keeps its destination" in result.stderr
