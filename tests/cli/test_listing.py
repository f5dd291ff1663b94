from __future__ import annotations

import json

import pytest
from freezegun import freeze_time

from builders import NOON, NOON_MS, add_row, rule_fired
from command_line import HOSTILE, STEERING, record_bars
from outbox.cli import display, listing
from outbox.storage import finding


def test_list_shows_what_is_due_later(run, outbox):
    ids = [add_row(outbox, next_attempt_at_ms=NOON_MS + minutes * 60_000) for minutes in (0, 1, 2)]
    result = run("list", "--due-after", "2026-11-24T12:00:00Z", "--json")
    assert [found["id"] for found in json.loads(result.stdout)] == ids[:0:-1]


def test_list_shows_the_newest_first_and_says_when_there_are_more(run, outbox):
    for minutes in (3, 2, 1):
        add_row(outbox, created_at_ms=NOON_MS + minutes * 60_000, retry_count=1, last_error="x" * 100)
    result = run("list", "--limit", 2)
    error = "x" * 77 + "..."
    assert (
        result.stdout
        == f"""\
id  status   type        created                  failures  last error
 3  pending  rule_fired  2026-11-24 12:01:00 UTC         1  {error}
 2  pending  rule_fired  2026-11-24 12:02:00 UTC         1  {error}
"""
    )
    assert result.stderr == "outbox: more than 2 events match; --limit sets how many are shown\n"
    assert run("list").stderr == ""


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ([], [1, 2, 3]),
        (["--status", "sent"], [1]),
        (["--status", "sent", "--status", "pending", "--newer-than", "1h"], [2, 3]),
        (["--event-id", "mine"], [2]),
        (["--failure", "503"], [3]),
        (["--contains", '"session_id":"s1"', "--type", "fix_outcome"], [2]),
        (["3", "1"], [1, 3]),
        (["3", "1", "--status", "sent"], [1]),
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
    add_row(outbox, event_type="fix_outcome", created_at_ms=NOON_MS - 3_600_000, event_id="mine")
    add_row(outbox, last_error="503 Unavailable")
    with freeze_time(NOON):
        result = run("list", "--json", *options)
        oldest_first = run("list", "--json", "--oldest-first", *options)
    assert [event["id"] for event in json.loads(result.stdout)] == ids[::-1]
    assert [event["id"] for event in json.loads(oldest_first.stdout)] == ids


def test_a_list_of_nothing_says_so(run, outbox):
    result = run("list")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "outbox: no matching events\n")


@pytest.mark.parametrize("command", ["show", "list"])
@pytest.mark.parametrize("row_id", ["0", "o-17", "9223372036854775808"])
def test_what_is_no_id_is_misuse(run, outbox, command, row_id):
    result = run(command, row_id)
    assert result.exit_code == 2
    assert (
        f"'{row_id}', expected a row id, a whole number from 1; `outbox list --event-id` finds an event"
        " by its event id"
    ) in " ".join(result.stderr.split())


def test_ndjson_has_an_event_in_each_line_with_its_payload_as_json(run, outbox):
    add_row(outbox, payload_json='{"event_type":"x","amount":12345678901234567890.10,"text":"Straße \U0001f600"}')
    add_row(outbox, payload_json=f'{{\n"event_type": "x", "text": {json.dumps(HOSTILE, ensure_ascii=False)}}}')
    lines = run("list", "--ndjson", "--oldest-first").stdout.splitlines()
    first, second = map(json.loads, lines)
    assert (first["id"], first["status"], first["destination"]) == (1, "pending", "default")
    assert '"payload": {"event_type":"x","amount":12345678901234567890.10,' in lines[0]
    assert first["payload"]["text"] == "Straße \U0001f600"
    assert second["payload"]["text"] == HOSTILE
    assert not STEERING.search("".join(lines))
    assert "payload_json" not in first


def test_a_payload_that_is_no_json_object_is_quoted(run, outbox):
    add_row(outbox, payload_json="[1")
    (line,) = run("list", "--ndjson").stdout.splitlines()
    assert (json.loads(line)["payload"], json.loads(line)["payload_json"]) == (None, "[1")


def test_a_long_list_is_read_in_pages(run, outbox, monkeypatch):
    monkeypatch.setattr(listing, "_PAGE", 2)
    outbox.enqueue_many([rule_fired()] * 7)
    for options, ids in (((), [7, 6, 5, 4, 3]), (("--oldest-first",), [1, 2, 3, 4, 5])):
        for text in ((), ("--contains", "s1")):
            result = run("list", "--ndjson", "--limit", 5, *options, *text)
            assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == ids
            assert result.stderr == "outbox: more than 5 events match; --limit sets how many are shown\n"
    assert run("list", "--ndjson", "--limit", 7).stderr == ""


@pytest.mark.parametrize("page", [1, 1_000])
def test_a_bounded_search_says_so(run, outbox, monkeypatch, page):
    monkeypatch.setattr(listing, "_PAGE", page)
    monkeypatch.setattr(finding, "SLICE", 1)
    outbox.enqueue_many([rule_fired(session_id=text) for text in ("wanted", "wanted", "x", "wanted", "x")])
    result = run("list", "--json", "--contains", "wanted", "--scan-limit", 3)
    assert [found["id"] for found in json.loads(result.stdout)] == [4]
    assert result.stderr == (
        "outbox: only 3 events were searched for the text; more may match: give more conditions,"
        " or a larger --scan-limit\n"
    )
    assert run("list", "--contains", "wanted", "--scan-limit", 20).stderr == ""


def test_a_long_search_draws_a_bar_on_a_terminal(run, outbox, terminal, monkeypatch):
    monkeypatch.setattr(display, "_BAR_FROM_EVENTS", 2)
    outbox.enqueue_many([rule_fired()] * 3)
    drawn = record_bars(monkeypatch)
    assert run("list", "--contains", "nowhere").exit_code == 0
    assert drawn == [("Reading", None, 3)]


def test_json_and_ndjson_together_are_misuse(run, outbox):
    assert run("list", "--json", "--ndjson").exit_code == 2
    assert run("--json", "list", "--ndjson").exit_code == 2


def test_ndjson_of_nothing_prints_nothing(run, outbox):
    result = run("list", "--ndjson")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "outbox: no matching events\n")
