from __future__ import annotations

import pytest

from builders import NOON_MS, add_row, rule_fired, statuses
from command_line import GOOD
from outbox import Outbox


def deleted(outbox):
    return [(entry.status, entry.reason, entry.events) for entry in outbox.stats().deleted]


@pytest.mark.untraced
def test_without_bounds_no_command_deletes_or_rejects_an_event(run, outbox, logged_in, tmp_path):
    outbox.enqueue_many([rule_fired(session_id=str(n)) for n in range(20_000)])
    (tmp_path / "events").write_text(f"{GOOD}\n" * 100)
    assert run("enqueue", str(tmp_path / "events")).exit_code == 0
    assert run("flush", "--all").exit_code == 0
    assert run("flush").exit_code == 0
    assert deleted(outbox) == []
    assert outbox.stats().counts["sent"] == 20_100


@pytest.mark.parametrize("from_environment", [False, True])
def test_bounds_come_from_options_or_the_environment(run, outbox, logged_in, monkeypatch, from_environment):
    for number in range(5):
        add_row(outbox, status="sent", sent_at_ms=NOON_MS + number)
    where = []
    if from_environment:
        monkeypatch.setenv("OUTBOX_MAX_SENT", "3")
    else:
        where = ["--max-sent", "3"]
    assert run("flush", *where).exit_code == 0
    assert deleted(outbox) == [("sent", "max_sent", 2)]


def test_enqueue_rejects_what_the_bound_leaves_no_room_for(run, outbox):
    assert run("enqueue", "--max-undelivered", "1", input=GOOD).exit_code == 0
    result = run("enqueue", "--max-undelivered", "1", input=GOOD)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "1 events are not delivered yet, and the policy's max_undelivered is 1" in result.stderr
    assert run("enqueue", "--max-rows", "1", input=GOOD).exit_code == 1
    assert run("enqueue", "--max-undelivered", "1", "--when-full", "trim", input=GOOD).exit_code == 0
    assert deleted(outbox) == [("pending", "max_undelivered", 1)]
    assert statuses(outbox) == ["pending"]


def test_delivered_events_are_kept_as_long_as_asked(run, outbox, logged_in, monkeypatch):
    add_row(outbox, status="sent", sent_at_ms=1)
    monkeypatch.setenv("OUTBOX_KEEP_SENT", "30d")
    assert run("flush", "--keep-sent", "0s").exit_code == 0
    assert statuses(outbox) == ["sent"]
    assert run("flush").exit_code == 0
    assert deleted(outbox) == [("sent", "retention", 1)]


@pytest.mark.parametrize(
    "option", [["--max-rows", "-1"], ["--max-sent", "x"], ["--when-full", "block"], ["--keep-sent", "7"]]
)
def test_a_bound_that_is_none_is_misuse(run, outbox, logged_in, option):
    assert run("flush", *option).exit_code == 2


def test_a_command_beside_a_program_deletes_nothing_that_it_keeps(run, url, logged_in):
    with Outbox.open(url, synchronous="NORMAL") as program:
        program.enqueue_many([rule_fired()] * 20_000)
        assert run("flush").exit_code == 0
        assert deleted(program) == []
        assert sum(program.stats().counts.values()) == 20_000
