from __future__ import annotations

from datetime import timedelta

import pytest
from freezegun import freeze_time

from builders import DOWN, NOON, NOON_MS, ScriptedClient, add_row, rule_fired
from command_line import IS_OFF
from outbox import Outbox, Policy
from outbox.doctor import examine
from outbox.pauses import SharedPause
from outbox.stats import DestinationStats, duration


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
        "3 events failed alone while the service seemed to work (403); each is retried until it is too old;"
        " `outbox show ID` shows the answers, and when that is",
        "the service rejected 1 event alone (422 Bad); an event is abandoned if it is rejected again later,"
        " while the service accepts others; `outbox show ID` says when",
        "1 event is abandoned; `outbox list --status abandoned` shows why,"
        " and `outbox requeue --all` returns the event to the queue",
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
        "the service rejected the token 1 minute ago; 1 event is parked; set a new token, then run `outbox retry --all`."
        " Also: the service is failing (503); 1 event is waiting; the next try is due now"
    )


def test_abandoned_events_are_named_with_the_command_that_brings_them_back(outbox):
    add_row(outbox, status="abandoned")
    add_row(outbox, status="abandoned")
    assert causes(outbox) == (
        "2 events are abandoned; `outbox list --status abandoned` shows why,"
        " and `outbox requeue --all` returns the events to the queue"
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
    assert outbox.stats().likely_cause == "not logged in, the client has no credentials; 1 event is waiting"
    outbox.flush_all(ScriptedClient(DOWN))
    assert outbox.stats().likely_cause.startswith("the service is failing")
    outbox.flush_all(logged_out)
    assert outbox.stats().likely_cause.startswith(
        "not logged in, the client has no credentials; 1 event is waiting. Also: the"
    )


def test_a_hold_is_a_cause_only_if_events_wait_for_its_end(outbox: Outbox) -> None:
    outbox.hold("default", why="a deploy")
    assert outbox.stats().likely_cause is None
    add_row(outbox, status="sent")
    assert outbox.stats().likely_cause is None
    for status in ("parked", "sending", "pending"):
        add_row(outbox, status=status)
    assert (
        ": a deploy; `outbox resume default` ends the hold; 3 events are waiting." in outbox.stats().likely_cause
    )


# Several destinations


@pytest.mark.contract
@pytest.mark.usefixtures("noon")
def test_the_numbers_of_each_destination_are_its_own(outbox: Outbox) -> None:
    add_row(outbox, status="sent", sent_at_ms=NOON_MS)
    add_row(outbox, next_attempt_at_ms=NOON_MS + 5_000)
    for waits_for in ("service", "row", None):
        add_row(outbox, destination="billing", waits_for=waits_for, last_error="503")
    add_row(outbox, destination="billing", status="sending", next_attempt_at_ms=NOON_MS - 7_000)
    add_row(outbox, destination="billing", status="parked", event_type="order_packed")
    add_row(outbox, destination="search", status="abandoned", waits_for="proof")
    outbox.store.pauses.change("billing", lambda _: SharedPause(failures=1, until_ms=NOON_MS + 1))
    outbox.store.pauses.change("search", lambda _: SharedPause(failures=1, until_ms=NOON_MS))
    found = outbox.stats()

    def numbers(**events: int) -> dict[str, int]:
        return {**dict.fromkeys(("pending", "sending", "sent", "parked", "abandoned"), 0), **events}

    default, billing, search = found.by_destination.values()
    assert [*found.by_destination] == ["default", "billing", "search"]
    assert default == DestinationStats(numbers(pending=1, sent=1), 0, NOON_MS + 5_000, 0, None)
    assert billing == DestinationStats(
        numbers(pending=3, sending=1, parked=1), 2, NOON_MS - 7_000, 7_000, NOON_MS + 1
    )
    assert search == DestinationStats(numbers(abandoned=1), 0, None, 0, None)
    assert (billing.undelivered, search.undelivered) == (5, 1)
    assert found.by_type["rule_fired"] == {"pending": 4, "sending": 1, "sent": 1, "abandoned": 1}
    assert (found.next_due_at_ms, found.overdue_ms, outbox.overdue_ms()) == (NOON_MS - 7_000, 7_000, 7_000)
    assert [pause.destination for pause in found.pauses] == ["billing", "search"]


@pytest.mark.contract
def test_a_cause_names_its_destination_and_counts_its_events(outbox: Outbox) -> None:
    for destination, error, events in (("", "503", 1), ("billing", "502", 2), ("search", "501", 1)):
        for _ in range(events):
            add_row(outbox, destination=destination, waits_for="service", last_error=error)
    for destination in ("billing", "billing", "search"):
        add_row(outbox, destination=destination, status="parked", last_error="401")
    outbox.store.login_problems["archive"] = "not logged in"
    said = causes(outbox)
    assert "billing: the service is failing (502); 2 events are waiting; the next try is due now" in said
    assert "search: the service rejected the token" in said
    assert "(401); 1 event is parked; set" in said
    assert "archive" not in said
    outbox.store.login_problems["search"] = "not logged in"
    assert causes(outbox).startswith("search: not logged in; 2 events are waiting")


def test_the_next_try_waits_for_the_pause_of_its_own_destination(outbox: Outbox) -> None:
    add_row(outbox, waits_for="service", last_error="503", next_attempt_at_ms=NOON_MS + 120_000)
    for destination, minutes in (("billing", 9), ("", 3)):
        pause = SharedPause(failures=1, until_ms=NOON_MS + minutes * 60_000)
        outbox.store.pauses.change(destination, lambda _, pause=pause: pause)
    assert causes(outbox) == "the service is failing (503); 1 event is waiting; the next try is in 2 minutes"


@pytest.mark.contract
def test_a_destination_that_nobody_delivers_to_is_a_cause(outbox: Outbox) -> None:
    def said() -> str | None:
        with freeze_time(NOON + timedelta(hours=1)):
            return outbox.stats().likely_cause

    add_row(outbox)
    assert said() is None  # one that knows only the default destination reads `overdue`
    add_row(outbox, destination="billing")
    assert said() == "nothing was delivered for an hour to default, billing, although events are due"
    assert causes(outbox) is None
    outbox.store.pauses.change("billing", lambda _: SharedPause(failures=1, until_ms=NOON_MS + 1))
    assert said() == "nothing was delivered for an hour to default, although events are due"
    with freeze_time(NOON):
        outbox.hold("default", why="a deploy")
    assert said() == (
        "an operator put default on hold at 2026-11-24 12:00:00 UTC: a deploy; `outbox resume default` ends the hold;"
        " 1 event is waiting"
    )


def test_the_fullest_destination_fills_the_queue(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_undelivered=4)) as outbox:
        outbox.enqueue_many([rule_fired()] * 1)
        outbox.enqueue_many([rule_fired()] * 2, to="billing")
        assert outbox.stats().filling.startswith("billing: 2 undelivered events")
        (words,) = (one.words for one in examine(outbox.engine, outbox.policy) if one.check == "bounds")
        assert words.startswith("the queue is filling up: 2 undelivered events")
