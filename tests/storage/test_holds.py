"""What an operator's hold of a destination keeps from being sent, and what ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from builders import DOWN, NOON, NOON_MS, REVOKED, ScriptedClient, add_row, row, rule_fired, statuses
from outbox import ConfigurationError, FlushReport, Hold, Outbox, Policy, schema
from outbox.holds import hold_in_words

MINUTE_MS = 60_000

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("noon")]


@pytest.fixture
def other(outbox: Outbox, url: str) -> Iterator[Outbox]:
    """The same outbox in another process."""
    with Outbox(url) as opened:
        yield opened


def flushed(outbox: Outbox, client: ScriptedClient | None = None, **options: str) -> FlushReport:
    return outbox.flush(client or ScriptedClient(), **options)


def held(hold: Hold) -> FlushReport:
    return FlushReport(skipped=hold_in_words(hold), hold=hold)


def fail_thrice(outbox: Outbox, noon) -> None:
    """Let the next claim be a probe."""
    for _ in range(3):
        outbox.enqueue(rule_fired())
        report = outbox.flush(ScriptedClient(DOWN))
        noon.travel(milliseconds=report.paused_until_ms - outbox.store.now_ms())


STATES: dict[str, Callable[[Outbox], object]] = {
    "fresh": add_row,
    "failed": lambda outbox: add_row(outbox, waits_for="service", retry_count=1, last_error="503"),
    "with a lease that ran out": lambda outbox: add_row(outbox, status="sending", lost_leases=2),
    "never due": lambda outbox: add_row(outbox, next_attempt_at_ms=2**60),
}


@pytest.mark.parametrize("policy", [Policy(), Policy.original()], ids=["ours", "original"])
@pytest.mark.parametrize("state", STATES)
def test_nothing_of_a_held_destination_is_claimed(
    outbox: Outbox, other: Outbox, state: str, policy: Policy
) -> None:
    STATES[state](outbox)
    before = statuses(outbox)
    hold = other.hold("default", why="a deploy")
    outbox.policy = policy.on(is_shared=outbox.store.is_shared)
    assert flushed(outbox) == held(hold)
    assert statuses(outbox) == before
    assert other.resume("default")
    assert flushed(outbox).claimed == 1


def test_no_probe_is_sent_and_no_parked_event_is_tried_during_a_hold(outbox: Outbox, noon) -> None:
    fail_thrice(outbox, noon)
    outbox.enqueue_many([rule_fired()] * 2)
    parked = add_row(outbox, status="parked", last_error="401")
    hold = outbox.hold("default", why="a deploy")
    client = ScriptedClient()
    assert [flushed(outbox, client) for _ in range(2)] == [held(hold)] * 2
    assert outbox.stats().pauses[0].probe_until_ms == 0
    assert row(outbox, parked).status == "parked"
    assert not client.batches
    outbox.resume("default")
    assert flushed(outbox, client).attempted == 1
    assert client.sizes == [1]


def test_a_hold_concerns_one_destination(outbox: Outbox) -> None:
    outbox.enqueue(rule_fired(), to=["billing", "search"])
    hold = outbox.hold("billing", why="billing moves")
    assert flushed(outbox, destination="billing") == held(hold)
    assert flushed(outbox, destination="search").sent == 1


def test_events_are_enqueued_during_a_hold_and_sent_after_it(outbox: Outbox) -> None:
    outbox.hold("default", why="a deploy")
    outbox.enqueue_many([rule_fired()] * 3)
    assert flushed(outbox).sent == 0
    outbox.resume("default")
    assert outbox.flush_all(ScriptedClient()).sent == 3


def test_neither_retry_nor_requeue_nor_upgrade_nor_a_reopened_outbox_ends_a_hold(outbox: Outbox, url: str) -> None:
    for status in ("pending", "parked", "abandoned"):
        add_row(outbox, status=status, next_attempt_at_ms=NOON_MS + MINUTE_MS)
    hold = outbox.hold("default", why="a deploy")
    assert outbox.retry_now() == 2
    assert outbox.retry_now(destination="default") == 0
    assert outbox.requeue_abandoned(older_than=NOON_MS + 1).total == 1
    schema.upgrade(outbox.engine)
    with Outbox.open(url) as reopened:
        assert flushed(reopened) == held(hold)
        assert reopened.stats().holds == [hold]


@pytest.mark.parametrize("answer", [None, DOWN, REVOKED])
def test_a_batch_in_flight_settles_and_its_outcome_ends_no_hold(outbox: Outbox, answer) -> None:
    (row_id,) = outbox.enqueue_many([rule_fired()])

    def hold_meanwhile(_batch):
        outbox.hold("default", why="a deploy")
        return answer

    assert flushed(outbox, ScriptedClient(hold_meanwhile)).claimed == 1
    assert row(outbox, row_id).status == {None: "sent", DOWN: "pending", REVOKED: "parked"}[answer]
    assert [hold.why for hold in outbox.stats().holds] == ["a deploy"]
    outbox.enqueue(rule_fired())
    assert flushed(outbox).hold is not None


def test_flush_all_stops_at_a_hold(outbox: Outbox) -> None:
    outbox.policy = replace(outbox.policy, batch_size=2)
    outbox.enqueue_many([rule_fired()] * 5)
    report = outbox.flush_all(ScriptedClient(lambda _batch: outbox.hold("default", why="a deploy") and None))
    assert (report.sent, report.skipped, report.hold) == (2, hold_in_words(outbox.stats().holds[0]), report.hold)
    assert statuses(outbox).count("pending") == 3


def test_a_hold_for_a_time_ends_by_itself(outbox: Outbox, noon) -> None:
    outbox.enqueue(rule_fired())
    hold = outbox.hold("default", why="a deploy", for_ms=MINUTE_MS)
    assert hold == Hold("default", "a deploy", hold.since_ms, hold.since_ms + MINUTE_MS)
    noon.travel(milliseconds=MINUTE_MS - 1)
    assert flushed(outbox) == held(hold)
    noon.travel(milliseconds=1)
    assert outbox.stats().holds == []
    assert not outbox.resume("default")
    assert flushed(outbox).sent == 1


@pytest.mark.parametrize("until", [NOON + timedelta(hours=2), NOON_MS + 7_200_000])
def test_a_hold_may_name_its_end(outbox: Outbox, until) -> None:
    assert outbox.hold("billing", why="a deploy", until=until).until_ms == NOON_MS + 7_200_000


def test_holding_again_replaces_the_reason_and_the_end(outbox: Outbox, noon) -> None:
    first = outbox.hold("billing", why="a deploy", for_ms=MINUTE_MS)
    noon.travel(seconds=30)
    again = outbox.hold("billing", why="a long deploy")
    assert again == Hold("billing", "a long deploy", first.since_ms, None)
    assert outbox.hold("billing", why="a short one", for_ms=1).since_ms == first.since_ms
    noon.travel(milliseconds=1)
    assert outbox.stats().holds == []
    new = outbox.hold("billing", why="another deploy")
    assert new.since_ms == first.since_ms + 30_001
    assert outbox.stats().holds == [new]


def test_resume_says_whether_there_was_a_hold(outbox: Outbox) -> None:
    assert not outbox.resume("billing")
    outbox.hold("billing", why="a deploy")
    assert not outbox.resume("default")
    assert outbox.resume("billing")
    assert not outbox.resume("billing")


def test_all_holds_are_shown_to_every_host(outbox: Outbox, other: Outbox) -> None:
    holds = [outbox.hold(name, why=f"{name} moves") for name in ("search", "default", "billing")]
    assert other.stats().holds == sorted(holds, key=lambda hold: hold.destination.replace("default", ""))


def test_events_on_hold_are_not_overdue(outbox: Outbox, noon) -> None:
    outbox.enqueue(rule_fired(), to=["billing", "search"])
    noon.travel(seconds=9)
    outbox.hold("billing", why="a deploy")
    assert outbox.overdue_ms() == 9_000
    assert flushed(outbox, destination="search").sent == 1
    assert outbox.overdue_ms() == 0
    outbox.resume("billing")
    assert outbox.overdue_ms() == 9_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"why": ""}, "why is ''"),
        ({"why": "x" * 501}, "why has 501 characters, expected at most 500"),
        ({"why": "x", "for_ms": 1, "until": NOON_MS * 2}, "for_ms and until are both given"),
        ({"why": "x", "for_ms": 0}, "expected a time after 2026-11-24 12:00:00 UTC"),
        ({"why": "x", "for_ms": "2h"}, "for_ms is '2h', expected a whole number of milliseconds"),
        ({"why": "x", "for_ms": True}, "for_ms is True"),
        ({"why": "x", "until": NOON_MS}, "the hold would end at 2026-11-24 12:00:00 UTC"),
        ({"why": "x", "until": datetime(2026, 11, 24, tzinfo=timezone.utc)}, "expected a time after"),
        ({"why": "x", "until": datetime(2027, 11, 24)}, "until is .*, expected a datetime with a time zone"),
    ],
)
@pytest.mark.sqlite
def test_a_hold_that_can_not_be_is_refused(outbox: Outbox, options, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        outbox.hold("billing", **options)
    assert outbox.stats().holds == []
