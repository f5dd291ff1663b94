from __future__ import annotations

import json
import re
from datetime import timedelta

import pytest
from freezegun import freeze_time

from builders import NOON, NOON_MS, add_row, row, rule_fired, statuses
from outbox.clock import now_ms

COMMANDS = [("retry",), ("requeue",), ("abandon", "--reason", "x"), ("purge",)]


def test_an_option_selects_the_events_of_one_destination(run, outbox):
    for destination in ("", "billing"):
        for status in ("parked", "abandoned"):
            add_row(outbox, destination=destination, status=status)
    of_billing = ("--destination", "billing")
    assert [one["id"] for one in json.loads(run("list", "--json", *of_billing).stdout)] == [4, 3]
    assert [one["id"] for one in json.loads(run("list", "--json", "--destination", "default").stdout)] == [2, 1]
    assert run("retry", *of_billing).stdout.startswith("1 event made due\n")
    assert run("requeue", "--older-than", "0s", *of_billing).stdout.startswith("1 event requeued\n")
    assert statuses(outbox) == ["parked", "abandoned", "pending", "pending"]
    assert run("purge", "--older-than", "0s", *of_billing).stdout.startswith("2 events purged, 2 of them")
    assert statuses(outbox) == ["parked", "abandoned"]


def test_retry_makes_due_what_is_parked_or_waits(run, outbox):
    add_row(outbox, status="parked")
    add_row(outbox, next_attempt_at_ms=NOON_MS * 2)
    add_row(outbox, status="abandoned")
    dry = run("retry", "--all", "--dry-run")
    assert dry.stdout == "2 events would be made due\n  rule_fired: 2\n"
    assert statuses(outbox) == ["parked", "pending", "abandoned"]
    assert run("retry", "--all").stdout == "2 events made due\n  rule_fired: 2\n"
    assert json.loads(run("retry", "--all", "--json").stdout) == {
        "total": 0,
        "in_flight": 0,
        "per_type": {},
        "dry_run": False,
    }
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
            "in_flight": 0,
            "per_type": {},
            "dry_run": False,
        }


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


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_command_on_every_event_by_accident_is_misuse(run, outbox, command, options):
    for status in ("parked", "abandoned", "sent"):
        add_row(outbox, status=status)
    result = run(*command, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "expected ids or options that select events, or --all for every event" in result.stderr
    result = run(*command, "--all", "--status", "parked", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--all and conditions are both given, expected one of them" in result.stderr
    assert statuses(outbox) == ["parked", "abandoned", "sent"]
    assert run(*command, "--all").exit_code == 0


def test_abandoned_events_say_why_and_can_be_requeued(run, outbox):
    ids = outbox.enqueue_many([rule_fired(session_id=f"order-{number}") for number in range(3)])
    assert run("abandon", "--contains", "order-1", "--reason", "wrong price").stdout == (
        "1 event abandoned\n  rule_fired: 1\n"
    )
    assert statuses(outbox) == ["pending", "abandoned", "pending"]
    assert row(outbox, ids[1]).last_error == "cancelled: wrong price"
    assert run("requeue", ids[1]).exit_code == 0
    assert statuses(outbox) == ["pending"] * 3
    assert run("abandon", "--all").exit_code == 2  # it needs a reason


@pytest.mark.parametrize(
    ("command", "status", "which"),
    [
        (("retry",), "parked", "wait or are parked"),
        (("requeue",), "abandoned", "are abandoned"),
        (("abandon", "--reason", "x"), "pending", "are pending or parked"),
        (("purge",), "sent", "exist"),
    ],
)
def test_a_named_event_to_which_the_command_does_not_apply_is_told(run, outbox, command, status, which):
    fits = add_row(outbox, status=status)
    other = 99 if command == ("purge",) else add_row(outbox, status="sent")
    words = f"outbox: left alone: 1 of the events that you named; this changes only events that {which};"
    words += " `outbox show ID` tells more\n"
    dry = run(*command, fits, other, other, "--dry-run")
    assert (dry.exit_code, dry.stderr) == (0, words)
    result = run(*command, fits, other)
    assert (result.exit_code, result.stderr) == (1, words)
    assert result.stdout.startswith("1 event ")
    conditional = run(*command, other, "--type", "order_packed", "--dry-run")
    assert f"only events that {which} and meet the other conditions;" in conditional.stderr


def test_an_abandon_says_what_it_had_to_leave(run, outbox):
    held = add_row(outbox, status="sending", next_attempt_at_ms=now_ms() + 60_000)
    result = run("abandon", held, "--reason", "x")
    assert (result.exit_code, statuses(outbox)) == (1, ["sending"])
    assert "not abandoned because they are being sent: 1 event; run the command again later" in result.stderr


def test_what_is_being_sent_is_no_failure_of_a_retry(run, outbox):
    add_row(outbox, status="sending", next_attempt_at_ms=now_ms() + 60_000)
    assert run("retry", "--all").exit_code == run("requeue", "--all").exit_code == 0


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
