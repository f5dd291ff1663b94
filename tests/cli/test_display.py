from __future__ import annotations

import json
import types
from dataclasses import replace
from datetime import timedelta

import pytest
from freezegun import freeze_time

from builders import NOON, NOON_MS, add_row
from command_line import HOSTILE, STEERING
from outbox.cli import display
from outbox.clock import now_ms
from outbox.pauses import SharedPause
from outbox.storage.engines import writing


def test_a_state_of_another_program_is_counted(outbox):
    stats = outbox.stats()
    odd = replace(stats, counts={**stats.counts, "odd": 3}, by_type={"rule_fired": {"odd": 3}})
    text = display.status_in_words(odd, "db", now_ms=NOON_MS)
    assert text.splitlines()[-1].split() == ["all", "0", "0", "0", "0", "0", "3"]


def status(run):
    with freeze_time(NOON + timedelta(minutes=1)):
        lines = run("status").stdout.splitlines()
    return [(line[:14].rstrip(), line[14:]) for line in lines]


def test_status_counts_what_the_events_wait_for(run, outbox):
    for waits_for in ("service", "service", "delay", "proof", "row"):
        add_row(outbox, waits_for=waits_for, last_error="503 Down")
    assert [text for name, text in status(run) if name == "waiting"] == [
        "2 events wait for the service, which probably failed",
        "1 event waits because the service asked for a delay",
        "1 event waits for proof, after being rejected alone",
        "1 event waits after failing alone while the service accepted others",
    ]


@pytest.mark.parametrize(
    ("pause", "words"),
    [
        (
            {"until_ms": NOON_MS + 90_000, "failures": 2},
            "nothing is sent until 2026-11-24 12:01:30 UTC (in 30 seconds): the service is failing (503 Down), 2 failures"
            " in a row; `outbox retry --all` ends the pause",
        ),
        (
            {"until_ms": NOON_MS + 1, "probe_until_ms": NOON_MS + 90_000},
            "one flusher sends one event as a probe; the others wait for its result, at most until"
            " 2026-11-24 12:01:30 UTC (in 30 seconds): the service is failing (503 Down)",
        ),
        (
            {"until_ms": NOON_MS + 1, "failures": 1},
            "the pause is over, and the next flush sends a batch of due events: the service is failing (503 Down),"
            " 1 failure in a row",
        ),
        (
            {"until_ms": NOON_MS + 1, "failures": 3},
            "the pause is over, and the next flush sends one event as a probe: the service is failing (503 Down),"
            " 3 failures in a row",
        ),
    ],
)
def test_status_says_which_pause_holds_the_events(run, outbox, pause, words):
    outbox.store.pauses.change("", lambda _: SharedPause(**{"number": 1, "last_error": "503 Down", **pause}))
    assert [text for name, text in status(run) if name == "paused"] == [words]


def test_during_a_hold_no_line_says_what_the_next_flush_sends(run, outbox):
    over = SharedPause(number=1, last_error="503 Down", until_ms=NOON_MS + 1, failures=1)
    outbox.store.pauses.change("", lambda _: over)
    outbox.hold("default", why="they move")
    assert [name for name, _ in status(run) if name in ("on hold", "paused")] == ["on hold"]


def test_status_has_a_line_for_each_destination_if_there_are_several(run, outbox, monkeypatch):
    add_row(outbox)
    assert "paused until" not in run("status").stdout
    add_row(outbox, destination="billing", waits_for="service", last_error="503")
    add_row(outbox, destination="billing", status="parked")
    add_row(outbox, destination="search", status="sent", sent_at_ms=NOON_MS)
    until_ms = now_ms() + 600_000
    outbox.store.pauses.change("billing", lambda _: SharedPause(failures=1, until_ms=until_ms, last_error="503"))
    shown = run("status").stdout
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "destination pending sending sent parked abandoned waits paused until" in lines
    assert any(line.startswith("billing 1 0 0 1 0 1 2") for line in lines)
    assert {"default 1 0 0 0 0 0", "search 0 0 1 0 0 0"} <= {*lines}
    assert "paused        billing: nothing is sent until " in shown
    monkeypatch.setattr(display, "_MOST_DESTINATIONS", 2)
    assert "\nand 1 destination more" in run("status").stdout
    found = json.loads(run("status", "--json").stdout)
    assert found["by_destination"]["billing"]["paused_until_ms"] == until_ms
    assert [pause["destination"] for pause in found["pauses"]] == ["billing"]


def test_list_and_show_name_the_destination(run, outbox):
    add_row(outbox)
    assert "destination" not in run("list").stdout
    add_row(outbox, destination="billing")
    lines = [line.split() for line in run("list").stdout.splitlines()]
    assert lines[0][:4] == ["id", "status", "type", "destination"]
    assert [line[3] for line in lines[1:]] == ["billing", "default"]
    assert [one["destination"] for one in json.loads(run("list", "--json").stdout)] == ["billing", "default"]
    assert "\ndestination   billing\n" in run("show", 2).stdout
    assert json.loads(run("show", 1, "--json").stdout)["destination"] == "default"


def test_show_shows_blobs_instead_of_texts(run, outbox):
    add_row(outbox)
    with outbox.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE observation_events SET payload_json = X'7bff', last_error = X'6fff'")
    shown = run("show", 1).stdout
    assert "(o\\xff)\n" in shown
    assert shown.endswith("\n{\\xff\n")


@pytest.mark.parametrize("command", [("status",), ("list",), ("show", "1")])
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_nothing_stored_steers_a_terminal(run, outbox, command, form):
    payload = json.dumps({"event_type": "rule_fired", "intent": HOSTILE}, ensure_ascii=False)
    for status in ("pending", "parked"):
        add_row(
            outbox,
            status=status,
            event_type=HOSTILE,
            last_error=HOSTILE,
            session_id=HOSTILE,
            file_path=HOSTILE,
            payload_json=payload,
        )
    result = run(*command, *form)
    assert result.exit_code == 0
    assert not STEERING.search(result.stdout)
    assert "red" in result.stdout


def test_text_that_is_not_utf_8_is_shown_escaped(run, outbox):
    add_row(outbox)
    with writing(outbox.engine) as connection:
        connection.exec_driver_sql("UPDATE observation_events SET payload_json = CAST(x'22ff22' AS TEXT)")
    result = run("show", 1)
    assert result.exit_code == 0
    assert "\\udcff" in result.stdout
    assert "content hash\n" in result.stdout


def test_what_the_output_can_not_encode_is_escaped(monkeypatch, capsys):
    monkeypatch.setattr(display, "sys", types.SimpleNamespace(stdout=types.SimpleNamespace(encoding="ascii")))
    display.say("grün")
    assert capsys.readouterr().out == "gr\\xfcn\n"


def test_json_takes_no_value_by_guess():
    with pytest.raises(TypeError, match="bytes has no JSON"):
        display.as_json(b"")
