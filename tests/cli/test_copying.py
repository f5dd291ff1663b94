from __future__ import annotations

import json

import pytest

from builders import NOON_MS, add_row, columns_of, row
from command_line import IS_OFF, record_bars
from outbox import Outbox
from outbox.storage.engines import writing


def of(outbox, destination):
    """The rows of a destination, in order."""
    return [one for one in outbox.find() if one.destination == destination]


@pytest.fixture
def history(outbox: Outbox) -> list[int]:
    """An event of billing for each status, one of them with an id of its own, and one event of search."""
    add_row(outbox, destination="search")
    return [
        add_row(outbox, destination="billing", created_at_ms=NOON_MS + number, status=status, **more)
        for number, (status, more) in enumerate(
            (
                ("sent", {"sent_at_ms": NOON_MS, "event_id": "order-17", "trace_context": "{}"}),
                ("abandoned", {"last_error": "permanent: 422", "retry_count": 5, "waits_for": "proof"}),
                ("parked", {"last_error": "401"}),
                ("pending", {"not_before_ms": NOON_MS * 2, "next_attempt_at_ms": NOON_MS * 2}),
                ("sending", {"lost_leases": 3}),
            )
        )
    ]


def test_a_copy_is_a_fresh_row_with_the_ids_and_times_of_the_event(run, outbox, history):
    before = [columns_of(row(outbox, row_id)) for row_id in history]
    result = run("copy", "--from", "billing", "--to", "archive")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "5 events copied from billing to archive\n"
    assert [columns_of(row(outbox, row_id)) for row_id in history] == before
    copies = of(outbox, "archive")
    kept = (
        "event_id",
        "event_type",
        "payload_json",
        "session_id",
        "rule_ids_json",
        "occurred_at_ms",
        "created_at_ms",
        "trace_context",
    )
    for name in (*kept, "not_before_ms"):
        assert [getattr(one, name) for one in copies] == [getattr(one, name) for one in of(outbox, "billing")], (
            name
        )
    for one in copies:
        fresh = (one.status, one.retry_count, one.last_error, one.waits_for, one.sent_at_ms, one.lost_leases)
        assert fresh == ("pending", 0, None, None, None, 0)
        # It does not age out at its first failure.
        assert one.revived_at_ms > NOON_MS
    assert [one.next_attempt_at_ms == one.revived_at_ms for one in copies] == [True, True, True, False, True]
    assert copies[3].next_attempt_at_ms == NOON_MS * 2


def test_a_copy_that_is_repeated_adds_only_what_is_new(run, outbox, history):
    assert run("copy", "--from", "billing", "--to", "archive").exit_code == 0
    outbox.enqueue({"event_type": "order_packed"}, to=["billing", "archive"])
    outbox.enqueue({"event_type": "order_packed"}, to="billing")
    report = json.loads(run("copy", "--from", "billing", "--to", "archive", "--json", "--dry-run").stdout)
    assert report == {"copied": 1, "already_there": 6, "damaged": 0, "dry_run": True}
    assert len(of(outbox, "archive")) == 6
    result = run("copy", "--from", "billing", "--to", "archive")
    assert result.stdout == "1 event copied from billing to archive; archive already had 6\n"
    assert len(of(outbox, "archive")) == 7


def test_since_leaves_out_what_is_older(run, outbox, history):
    new = outbox.enqueue({"event_type": "order_packed"}, to="billing", event_id="new")
    result = run("copy", "--from", "billing", "--to", "default", "--since", "1h", "--dry-run")
    assert result.stdout == "1 event would be copied from billing to default\n"
    assert run("copy", "--from", "billing", "--to", "default", "--since", "1h").exit_code == 0
    assert [(one.event_id, one.id > new) for one in of(outbox, "")] == [("new", True)]


def test_a_copy_that_finds_no_room_says_so_and_goes_on_later(run, outbox, history):
    options = ("--max-undelivered", "4", "--when-full", "reject")
    result = run("copy", "--from", "billing", "--to", "archive", *options)
    assert result.exit_code == 1
    assert "0 events of archive are not delivered yet, and the policy's max_undelivered is 4" in result.stderr
    assert of(outbox, "archive") == []


def test_a_row_that_another_program_damaged_is_left_out(run, outbox, history):
    add_row(outbox, destination="billing", event_id="no id")
    add_row(outbox, destination="billing", not_before_ms=2**60)
    damaged = add_row(outbox, destination="billing")
    with writing(outbox.engine) as connection:
        connection.exec_driver_sql(
            "UPDATE observation_events SET session_id = CAST(x'ff' AS TEXT) WHERE id = ?", (damaged,)
        )
    result = run("copy", "--from", "billing", "--to", "archive")
    assert result.exit_code == 1
    assert result.stdout == "5 events copied from billing to archive\n"
    assert result.stderr == (
        "outbox: 3 events can't be copied: another program wrote values to the columns that no event can have\n"
    )


@pytest.mark.parametrize("to", ["default", "billing"])
def test_a_destination_is_not_copied_to_itself(run, outbox, to):
    result = run("copy", "--from", to, "--to", to)
    assert result.exit_code == 2
    assert result.stderr == f"outbox: --from and --to are both {to!r}, expected two destinations\n"


def test_nothing_is_copied_while_capture_is_off(run, outbox, history, opted_out):
    result = run("copy", "--from", "billing", "--to", "archive")
    assert (result.exit_code, result.stderr) == (0, f"outbox: nothing copied: {IS_OFF}\n")
    assert of(outbox, "archive") == []


def test_copy_draws_a_bar_on_a_terminal(run, outbox, history, terminal, monkeypatch):
    drawn = record_bars(monkeypatch)
    assert run("copy", "--from", "billing", "--to", "archive").exit_code == 0
    assert drawn == [("Copying", 6, 6)]
