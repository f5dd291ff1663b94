"""The commands hold and resume, and where an operator sees a hold."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
from freezegun import freeze_time

from builders import NOON, NOON_MS, add_row

SAID = "an operator put billing on hold at 2026-11-24 12:00:00 UTC until 2026-11-24 14:00:00 UTC: billing moves"
WAY_OUT = "`outbox resume billing` ends the hold"


@pytest.fixture
def held(run, outbox):
    """Billing is on hold since noon, for two hours."""
    with freeze_time(NOON):
        add_row(outbox, destination="billing")
        return run("hold", "billing", "--for", "2h", "--why", "billing moves")


def test_hold_says_what_it_did_and_how_many_events_wait(held):
    assert (held.exit_code, held.stderr) == (0, "")
    assert held.stdout == f"{SAID}; {WAY_OUT}\n1 event is pending or being sent\n"


def test_hold_and_resume_print_json(run, outbox):
    with freeze_time(NOON):
        result = run("hold", "default", "--why", "a deploy", "--json")
    hold = {"destination": "default", "why": "a deploy", "since_ms": NOON_MS, "until_ms": None}
    assert json.loads(result.stdout) == {**hold, "pending": 0}
    results = [run("resume", "default", "--json") for _ in range(2)]
    assert [json.loads(one.stdout) for one in results] == [
        {"destination": "default", "resumed": True},
        {"destination": "default", "resumed": False},
    ]
    assert [one.exit_code for one in results] == [0, 1]


@pytest.mark.usefixtures("held", "noon")
def test_resume_ends_a_hold_and_says_if_there_is_none(run):
    result = run("resume", "billing")
    assert (result.exit_code, result.stdout) == (0, "billing is no longer on hold\n")
    again = run("resume", "billing")
    assert (again.exit_code, again.stdout) == (1, "")
    assert again.stderr == "outbox: the destination billing is not on hold; `outbox status` shows all holds\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["billing"], "Missing option '--why'"),
        (["billing", "--why", " "], "why is ' ', expected a text that says why nothing may be sent"),
        (["billing", "--why", "x" * 501], "why has 501 characters, expected at most 500"),
        (["billing", "--why", "x", "--for", "soon"], "'soon', expected a time such as 30s, 15m, 12h or 7d"),
        (["billing", "--why", "x", "--for", "0s"], "expected a time after"),
        (["two words", "--why", "x"], "the destination is 'two words', expected a name"),
    ],
)
@pytest.mark.usefixtures("outbox")
def test_a_hold_that_can_not_be_is_wrong_usage(run, arguments, words):
    result = run("hold", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.usefixtures("outbox")
def test_a_destination_that_neither_the_file_nor_the_database_knows_is_not_held(
    run, outbox, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run("hold", "earlier", "--why", "x").exit_code == 0
    add_row(outbox, destination="old", status="sent")
    Path("outbox.toml").write_text("[destinations.billing]\nurl = 'https://billing.example.com'")
    result = run("hold", "defalt", "--why", "x")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "outbox: DESTINATION is defalt, which is unknown; the nearest destination of the file is default\n"
    )
    for name in ("default", "billing", "old", "earlier"):
        assert run("hold", name, "--why", "x").exit_code == 0
    for name in ("default", "billing", "old", "earlier"):
        assert run("resume", name).exit_code == 0


@pytest.mark.usefixtures("held")
def test_status_show_health_and_flush_say_that_a_destination_is_on_hold(run, logged_in):
    with freeze_time(NOON + timedelta(hours=1)):
        status, show, health = run("status"), run("show", 1), run("health")
        flush = run("flush", "--destination", "billing", "--url", "http://127.0.0.1:9", "--no-auth")
        in_json = [json.loads(run(*command, "--json").stdout) for command in (["status"], ["health"], ["show", 1])]
    assert f"\non hold       {SAID}; {WAY_OUT}\n" in status.stdout
    assert f"\nlikely cause  {SAID}; {WAY_OUT}; 1 event is waiting\n" in status.stdout
    assert f". But nothing is sent now: {SAID}; {WAY_OUT}\n" in show.stdout
    assert (health.exit_code, health.stdout, health.stderr) == (0, "ok\n", f"outbox: {SAID}; {WAY_OUT}\n")
    assert (flush.exit_code, flush.stderr) == (3, f"outbox: nothing was sent: {SAID}; {WAY_OUT}\n")
    hold = {
        "destination": "billing",
        "why": "billing moves",
        "since_ms": NOON_MS,
        "until_ms": NOON_MS + 7_200_000,
    }
    assert in_json[0]["holds"] == in_json[1]["holds"] == [hold]
    assert WAY_OUT in in_json[2]["next"]


@pytest.mark.usefixtures("held")
def test_the_events_of_other_destinations_are_still_overdue(run, outbox):
    add_row(outbox)
    with freeze_time(NOON + timedelta(hours=1)):
        result = run("health")
    assert result.exit_code == 3
    assert result.stderr.splitlines()[0] == f"outbox: {SAID}; {WAY_OUT}"
    assert "an event has been due for 1 hour" in result.stderr


@pytest.mark.usefixtures("held")
def test_a_hold_that_is_over_is_shown_no_more(run):
    with freeze_time(NOON + timedelta(hours=2)):
        assert "on hold" not in run("status").stdout + run("show", 1).stdout
        assert run("health").exit_code == 3


@pytest.mark.usefixtures("outbox")
def test_the_reason_can_not_control_the_terminal(run):
    result = run("hold", "billing", "--why", "a\x1b[31m\nb")
    assert r": a\x1b[31m\nb; `outbox resume" in result.stdout
    assert r": a\x1b[31m\nb; `outbox resume" in run("status").stdout
