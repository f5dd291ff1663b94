"""How large the table gets: the cap, what happens when it is reached, and how long delivered rows stay."""

from __future__ import annotations

import pytest
from sqlalchemy.orm import Session

from builders import DOWN, NOON_MS, ScriptedClient, add_row, refuse, rule_fired, statuses
from outbox import Outbox, Policy, QueueFull

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("noon")]

WEEK_MS = 7 * 86_400_000


def rejecting(url: str, max_rows: int) -> Outbox:
    return Outbox.open(url, policy=Policy(max_rows=max_rows, when_full="reject"))


def deleted(outbox: Outbox) -> list[tuple[str, str, int]]:
    return [(entry.status, entry.reason, entry.events) for entry in outbox.stats().deleted]


# The cap


def test_nothing_undelivered_is_deleted_by_default(outbox: Outbox) -> None:
    outbox.enqueue_many([rule_fired()] * 10_050)
    outbox.flush(ScriptedClient(DOWN))
    assert outbox.pending_count() == 10_050
    assert deleted(outbox) == []


def test_without_a_cap_nothing_is_trimmed(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_rows=0)) as outbox:
        outbox.enqueue_many([rule_fired()] * 10_001)
        outbox.flush(ScriptedClient())
        assert deleted(outbox) == []


# Reject


@pytest.mark.parametrize("in_session", [False, True])
def test_a_full_queue_rejects_and_keeps_what_it_holds(url: str, in_session: bool) -> None:
    with rejecting(url, 3) as outbox, Session(outbox.engine) as session:
        where = {"session": session} if in_session else {}
        for status in ("pending", "parked", "abandoned"):
            add_row(outbox, status=status)
        words = (
            "3 events are not delivered yet, and the policy's max_rows is 3: there is no room for 1 more; `outbox status`"
            " shows why they wait. Deliver or purge events, or raise max_rows"
        )
        with pytest.raises(QueueFull, match=f"^{words}$"):
            outbox.enqueue(rule_fired(), **where)
        session.rollback()
        assert statuses(outbox) == ["pending", "parked", "abandoned"]
        assert deleted(outbox) == []


def test_many_events_that_do_not_all_have_room_are_rejected_as_a_whole(url: str) -> None:
    with rejecting(url, 3) as outbox:
        outbox.enqueue(rule_fired())
        with pytest.raises(QueueFull):
            outbox.enqueue_many([rule_fired()] * 3)
        assert len(outbox.enqueue_many([rule_fired()] * 2)) == 2


@pytest.mark.parametrize("in_session", [False, True])
@pytest.mark.traced
def test_delivered_rows_make_room_for_new_ones(url: str, in_session: bool) -> None:
    with rejecting(url, 3) as outbox:
        outbox.enqueue_many([rule_fired()] * 3)
        outbox.flush(ScriptedClient())
        outbox.enqueue_many([rule_fired()] * 2)
        if in_session:
            with Session(outbox.engine) as session:
                outbox.enqueue(rule_fired(), session=session)
                session.commit()
            assert (
                statuses(outbox) == ["sent"] + ["pending"] * 3
            )  # trimmed at the next enqueue or flush of our own
            outbox.flush(ScriptedClient(DOWN))
        else:
            outbox.enqueue(rule_fired())
        assert statuses(outbox) == ["pending"] * 3
        assert deleted(outbox) == [("sent", "cap", 3)]


def test_a_flush_that_rejects_at_the_cap_deletes_delivered_rows_alone(url: str) -> None:
    with rejecting(url, 1) as outbox:
        for status in ("abandoned", "parked", "sent"):
            add_row(outbox, status=status, sent_at_ms=1)
        outbox.flush(ScriptedClient())
        assert statuses(outbox) == ["abandoned", "pending"]  # nothing else was due, so a parked row is tried


# Retention


def test_delivered_rows_are_deleted_when_their_time_is_over(url: str, noon) -> None:
    with Outbox.open(url, policy=Policy(keep_sent_ms=60_000)) as outbox:
        outbox.enqueue_many([rule_fired()] * 3)
        outbox.flush(ScriptedClient())
        others = [add_row(outbox, status=status, created_at_ms=1) for status in ("parked", "abandoned")]
        noon.travel(seconds=60)
        outbox.flush(ScriptedClient())
        assert statuses(outbox) == ["sent"] * 3 + ["pending", "abandoned"]
        noon.travel(seconds=0.001)
        outbox.flush(ScriptedClient())
        assert [found.id for found in outbox.find()] == others
        assert deleted(outbox) == [("sent", "retention", 3)]
        assert outbox.stats().left_undelivered == 0


def test_a_flush_that_sends_something_deletes_what_is_old_too(url: str) -> None:
    with Outbox.open(url, policy=Policy(keep_sent_ms=1)) as outbox:
        add_row(outbox, status="sent", sent_at_ms=NOON_MS - 2)
        outbox.enqueue(rule_fired())
        assert outbox.flush(ScriptedClient()).sent == 1
        assert deleted(outbox) == [("sent", "retention", 1)]


@pytest.mark.servers
def test_servers_keep_delivered_rows_for_a_week(outbox: Outbox) -> None:
    old = add_row(outbox, status="sent", sent_at_ms=NOON_MS - WEEK_MS - 1)
    kept = add_row(outbox, status="sent", sent_at_ms=NOON_MS - WEEK_MS)
    outbox.flush(ScriptedClient())
    assert [found.id for found in outbox.find()] == [kept] != [old]


def test_retention_that_fails_fails_no_flush(url: str, caplog) -> None:
    with Outbox.open(url, policy=Policy(keep_sent_ms=1)) as outbox:
        add_row(outbox, status="sent", sent_at_ms=1)
        outbox.enqueue(rule_fired())
        refuse(outbox, "DELETE", "observation_events", "no deletions here")
        assert outbox.flush(ScriptedClient()).sent == 1
        assert "expiring the queue failed, the next flush tries again" in caplog.text
        assert statuses(outbox) == ["sent", "sent"]
