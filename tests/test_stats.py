from __future__ import annotations

from datetime import timedelta

import pytest
from freezegun import freeze_time

from builders import DOWN, NOON, NOON_MS, ScriptedClient, add_row, rule_fired
from command_line import IS_OFF
from outbox import Outbox
from outbox.pauses import SharedPause
from outbox.stats import duration


@pytest.mark.parametrize(
    ("ms", "words"),
    [
        (-5, "0 seconds"),
        (1_999, "1 second"),
        (60_000, "1 minute"),
        (7_200_000, "2 hours"),
        (86_400_000 * 9, "9 days"),
    ],
)
def test_a_span_is_put_in_its_largest_unit(ms, words):
    assert duration(ms) == words


def causes(outbox):
    with freeze_time(NOON + timedelta(minutes=1)):
        return outbox.stats().likely_cause


def test_nothing_wrong_has_no_cause(outbox):
    add_row(outbox)
    assert causes(outbox) is None


@pytest.mark.contract
@pytest.mark.parametrize("waits_for", ["service", None])
def test_the_most_frequent_failure_of_what_waits_is_the_cause(outbox, waits_for):
    for error, minutes in (("transport: refused", 2), ("503", 3), ("503", 4)):
        due_ms = NOON_MS + minutes * 60_000
        add_row(outbox, last_error=error, next_attempt_at_ms=due_ms, waits_for=waits_for)
    assert causes(outbox) == "the service is failing (503); 3 events are waiting; the next try is in 1 minute"


@pytest.mark.contract
def test_what_events_wait_for_is_counted_and_each_has_its_cause(outbox):
    for waits_for, error in (
        ("service", "503"),
        ("delay", "429"),
        ("delay", "429"),
        ("row", "500 Oops"),
        ("row", "403"),
        ("row", "403"),
        ("proof", "422 Bad"),
    ):
        add_row(outbox, waits_for=waits_for, last_error=error)
    add_row(outbox, status="abandoned", waits_for="proof", last_error="permanent: 422 Bad")
    assert outbox.stats().waits_for == {"service": 1, "delay": 2, "proof": 1, "row": 3}
    assert causes(outbox).split(". Also: ") == [
        "the service is failing (503); 1 event is waiting; the next try is due now",
        "the service asks to slow down (429); 2 events are waiting; the next try is due now",
        "3 events failed alone while the service accepted others (403); they are tried until they are too old;"
        " find out what the service can't handle in them",
        "the service rejected 1 event alone (422 Bad); an event is abandoned if it is rejected again later,"
        " while the service accepts others; `outbox show ID` says when",
        "1 event is abandoned; `outbox list --status abandoned` shows why,"
        " and `outbox requeue --older-than 0s` returns them to the queue",
    ]


def test_several_suspects_were_rejected_one_by_one(outbox):
    for _ in range(2):
        add_row(outbox, waits_for="proof", last_error="422 Bad")
    assert causes(outbox).startswith("the service rejected 2 events one by one (422 Bad); ")


def test_nothing_is_tried_before_the_pause_is_over(outbox):
    add_row(outbox, waits_for="service", last_error="503")
    pause = SharedPause(failures=1, number=1, until_ms=NOON_MS + 180_000, last_error="503")
    outbox.store.pauses.change("", lambda _: pause)
    assert causes(outbox) == "the service is failing (503); 1 event is waiting; the next try is in 2 minutes"


def test_what_waits_and_is_due_is_called_due(outbox):
    add_row(outbox, last_error="503")
    assert causes(outbox) == "the service is failing (503); 1 event is waiting; the next try is due now"


def test_parked_and_waiting_are_two_causes(outbox):
    add_row(outbox, last_error="503")
    add_row(outbox, status="parked", next_attempt_at_ms=NOON_MS + 60_000)
    assert causes(outbox) == (
        "the service rejected the token 1 minute ago; 1 event is parked; set a new token, then run `outbox retry`."
        " Also: the service is failing (503); 1 event is waiting; the next try is due now"
    )


def test_abandoned_events_are_named_with_the_command_that_brings_them_back(outbox):
    add_row(outbox, status="abandoned")
    add_row(outbox, status="abandoned")
    assert causes(outbox) == (
        "2 events are abandoned; `outbox list --status abandoned` shows why,"
        " and `outbox requeue --older-than 0s` returns them to the queue"
    )


def test_what_else_is_wrong_is_said_too(outbox, monkeypatch):
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    add_row(outbox, last_error="503 Service Unavailable")
    assert outbox.stats().likely_cause.startswith(f"{IS_OFF}. Also: the service is failing")


@pytest.mark.contract
def test_an_event_under_a_lease_is_due_when_the_lease_has_run_out_and_not_before(outbox):
    add_row(outbox, status="sending", next_attempt_at_ms=NOON_MS)
    add_row(outbox, status="pending", next_attempt_at_ms=NOON_MS + 60_000)
    with freeze_time(NOON - timedelta(milliseconds=1)):
        assert outbox.stats().next_due_at_ms == NOON_MS + 60_000
    with freeze_time(NOON):
        assert outbox.stats().next_due_at_ms == NOON_MS


def test_a_flush_without_credentials_is_a_cause_until_one_has_some(outbox: Outbox) -> None:
    logged_out = ScriptedClient(logged_in=False)
    outbox.flush(logged_out)
    assert outbox.stats().likely_cause is None
    outbox.enqueue(rule_fired())
    assert outbox.stats().likely_cause == "not logged in, the client has no token; 1 event is waiting"
    outbox.flush_all(ScriptedClient(DOWN))
    assert outbox.stats().likely_cause.startswith("the service is failing")
    outbox.flush_all(logged_out)
    assert outbox.stats().likely_cause.startswith(
        "not logged in, the client has no token; 1 event is waiting. Also: the"
    )
