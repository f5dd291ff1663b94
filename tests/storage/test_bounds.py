from __future__ import annotations

import logging

import pytest
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import Session

from builders import DOWN, NOON_MS, ScriptedClient, add_row, refuse, rule_fired, statuses
from outbox import Outbox, Policy, QueueFull
from outbox.storage import bounds, counts
from outbox.storage.engines import writing

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("noon")]


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch):
    """The age of counts; the test sets it."""
    passed = [100.0]
    monkeypatch.setattr(counts, "monotonic_s", lambda: passed[0])
    return passed


def deleted(outbox: Outbox) -> list[tuple[str, str, int]]:
    return [(entry.status, entry.reason, entry.events) for entry in outbox.stats().deleted]


def enqueue(outbox: Outbox, number: int = 1) -> list[int]:
    return outbox.enqueue_many([rule_fired()] * number)


def counted(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by the name of each bound whose rows are counted."""
    seen: list[str] = []
    for name in ("sent", "undelivered"):
        count = getattr(outbox.store.bounds._counts[""], name)
        monkeypatch.setattr(
            count, "set", lambda rows, name=name, count=count: seen.append(name) or type(count).set(count, rows)
        )
    return seen


# Delivered rows


def test_flushers_keep_the_newest_delivered_rows(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_sent=3)) as outbox:
        old = [add_row(outbox, status="sent", sent_at_ms=NOON_MS - number) for number in (1, 3, 2)]
        waiting = [add_row(outbox, status=status) for status in ("parked", "abandoned")]
        enqueue(outbox, 2)
        assert deleted(outbox) == []  # enqueue never looks
        assert outbox.flush(ScriptedClient()).sent == 2
        assert [row.id for row in outbox.find()] == [old[0], *waiting, waiting[1] + 1, waiting[1] + 2]
        assert deleted(outbox) == [("sent", "max_sent", 2)]
        enqueue(outbox, 4)
        assert outbox.flush(ScriptedClient()).sent == 4
        assert outbox.stats().counts["sent"] == 3


def test_delivered_rows_are_deleted_in_slices(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "TRIM_SLICE", 2)
    with Outbox.open(url, policy=Policy(max_sent=2)) as outbox:
        for number in range(7):
            add_row(outbox, status="sent", sent_at_ms=NOON_MS + number)
        outbox.flush(ScriptedClient())
        assert deleted(outbox) == [("sent", "max_sent", 5)]


def test_what_others_deliver_and_delete_is_noticed_within_five_seconds(url: str, seconds: list[float]) -> None:
    with Outbox.open(url, policy=Policy(max_sent=3)) as outbox:
        add_row(outbox, status="sent", sent_at_ms=NOON_MS)
        outbox.flush(ScriptedClient())
        for number in range(4):
            add_row(outbox, status="sent", sent_at_ms=NOON_MS + number)
        outbox.flush(ScriptedClient())
        assert deleted(outbox) == []
        seconds[0] += 5
        outbox.flush(ScriptedClient())
        assert deleted(outbox) == [("sent", "max_sent", 2)]
        with writing(outbox.engine) as connection:
            connection.exec_driver_sql("DELETE FROM observation_events")
        enqueue(outbox, 2)
        assert outbox.flush(ScriptedClient()).sent == 2
        assert statuses(outbox) == []  # this flusher did not know yet
        seconds[0] += 5
        enqueue(outbox, 2)
        assert outbox.flush(ScriptedClient()).sent == 2
        assert statuses(outbox) == ["sent", "sent"]


def test_flushers_stop_when_others_have_deleted_the_excess(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_sent=3)) as outbox:
        enqueue(outbox, 3)
        outbox.flush(ScriptedClient())
        with writing(outbox.engine) as connection:
            connection.exec_driver_sql("DELETE FROM observation_events")
        outbox.policy = Policy(max_sent=1)
        enqueue(outbox)
        assert outbox.flush(ScriptedClient()).sent == 1
        assert deleted(outbox) == [("sent", "max_sent", 1)]


def test_retention_and_purge_are_known(url: str, noon) -> None:
    with Outbox.open(url, policy=Policy(max_sent=3, keep_sent_ms=1_000)) as outbox:
        enqueue(outbox, 3)
        outbox.flush(ScriptedClient())
        noon.travel(seconds=2)
        outbox.flush(ScriptedClient())
        enqueue(outbox, 3)
        outbox.flush(ScriptedClient())
        outbox.purge(older_than=NOON_MS + 10_000_000)
        enqueue(outbox, 3)
        outbox.flush(ScriptedClient())
        assert deleted(outbox) == [("sent", "purge", 3), ("sent", "retention", 3)]
        assert outbox.stats().counts["sent"] == 3


def test_a_bound_that_can_not_be_kept_fails_no_flush(url: str, caplog) -> None:
    with Outbox.open(url, policy=Policy(max_sent=1)) as outbox:
        add_row(outbox, status="sent", sent_at_ms=NOON_MS)
        enqueue(outbox)
        refuse(outbox, "DELETE", "observation_events", "no deletions here")
        assert outbox.flush(ScriptedClient()).sent == 1
        assert "trimming the queue failed, the next flush tries again" in caplog.text


# Undelivered rows


@pytest.mark.parametrize("in_session", [False, True])
def test_a_queue_full_of_undelivered_events_rejects(url: str, in_session: bool) -> None:
    host = create_engine(url)
    with (
        Outbox.open(host, policy=Policy(max_undelivered=4)) as outbox,
        Session(host) as session,
    ):
        where = {"session": session} if in_session else {}
        for status in ("sent", "parked", "abandoned"):
            add_row(outbox, status=status, sent_at_ms=1)
        with Outbox(url, policy=outbox.policy) as full:
            full.enqueue(rule_fired(), **where)
            full.enqueue(rule_fired(), **where)
            with pytest.raises(QueueFull) as refused:
                full.enqueue(rule_fired(), **where)
        session.commit()
        assert str(refused.value) == (
            "4 events are not delivered yet, and the policy's max_undelivered is 4: there is no room for 1 more;"
            " `outbox status` shows why they wait. Deliver or purge events, or raise max_undelivered"
        )
        assert len(statuses(outbox)) == 5
        assert deleted(outbox) == []
    host.dispose()


def test_delivered_and_purged_events_make_room_at_once(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_undelivered=2)) as outbox:
        enqueue(outbox, 2)
        outbox.flush(ScriptedClient())
        enqueue(outbox, 2)
        with pytest.raises(QueueFull):
            enqueue(outbox)
        outbox.purge(event_type="rule_fired")
        enqueue(outbox, 2)


def test_enqueue_counts_nothing_on_its_way(url: str, seconds: list[float], monkeypatch) -> None:
    with Outbox.open(url, policy=Policy(max_undelivered=5_000)) as outbox:
        seen = counted(outbox, monkeypatch)
        enqueue(outbox, 999)
        enqueue(outbox)
        assert seen == []
        enqueue(outbox)  # a thousand were enqueued since the last count
        assert seen == ["undelivered"]
        seconds[0] += 4.9
        enqueue(outbox)
        assert seen == ["undelivered"]
        seconds[0] += 0.2
        enqueue(outbox)
        assert seen == ["undelivered"] * 2


def test_what_others_enqueue_counts_within_five_seconds(url: str, seconds: list[float]) -> None:
    policy = Policy(max_undelivered=3)
    with Outbox.open(url, policy=policy) as outbox, Outbox(url, policy=policy) as other:
        enqueue(other, 3)
        enqueue(outbox)
        seconds[0] += 5
        with pytest.raises(QueueFull):
            enqueue(outbox)
        other.flush(ScriptedClient())
        seconds[0] += 5
        enqueue(outbox)


def test_a_session_of_the_same_engine_counts_on_its_own_connection(url: str, seconds: list[float]) -> None:
    host = create_engine(url, pool_size=1, max_overflow=0, pool_timeout=1)
    Outbox.open(url).close()
    with Outbox(host, policy=Policy(max_undelivered=2)) as outbox, Session(host) as session:
        outbox.enqueue(rule_fired(), session=session)
        seconds[0] += 5
        outbox.enqueue(rule_fired(), session=session)
        with pytest.raises(QueueFull):
            outbox.enqueue(rule_fired(), session=session)
        session.rollback()
        seconds[0] += 5
        enqueue(outbox, 2)
    host.dispose()


@pytest.mark.parametrize("in_session", [False, True])
def test_trimming_deletes_abandoned_rows_then_the_oldest(url: str, caplog, in_session: bool) -> None:
    with Outbox.open(url) as outbox:
        sent = add_row(outbox, status="sent", sent_at_ms=NOON_MS)
        in_flight = add_row(outbox, status="sending", next_attempt_at_ms=NOON_MS + 1, created_at_ms=1)
        add_row(outbox, status="parked", created_at_ms=2)
        add_row(outbox, status="abandoned")
    host = create_engine(url)
    with (
        Outbox(url, policy=Policy(max_undelivered=3, when_full="trim")) as outbox,
        Session(host) as session,
    ):
        if in_session:
            new = [outbox.enqueue(rule_fired(), session=session) for _ in range(2)]
            session.commit()
            assert deleted(outbox) == []
            outbox.flush(ScriptedClient(DOWN))
        else:
            new = [enqueue(outbox)[0] for _ in range(2)]
        assert [row.id for row in outbox.find()] == [sent, in_flight, *new]
        assert deleted(outbox) == [("abandoned", "max_undelivered", 1), ("parked", "max_undelivered", 1)]
        assert outbox.stats().left_undelivered == 2
        assert "events that were deleted before they were delivered: " in caplog.text
    host.dispose()


def test_a_large_excess_is_trimmed_in_slices(url: str) -> None:
    with Outbox.open(url) as outbox:
        enqueue(outbox, 2_500)
    with Outbox(url, policy=Policy(max_undelivered=10, when_full="trim")) as outbox:
        outbox.flush(ScriptedClient(DOWN))
        assert deleted(outbox) == [("pending", "max_undelivered", 2_490)]
        assert len(statuses(outbox)) == 10


def test_nothing_is_trimmed_that_others_have_made_room_for(url: str) -> None:
    policy = Policy(max_undelivered=3, when_full="trim", max_sent=1)
    with Outbox.open(url, policy=policy) as outbox, Outbox(url, policy=policy) as other:
        enqueue(outbox, 3)
        assert other.flush(ScriptedClient()).sent == 3
        enqueue(outbox, 3)
        assert outbox.pending_count() == 3
        assert outbox.stats().left_undelivered == 0


@pytest.mark.parametrize("when_full", ["trim", "reject"])
def test_warnings_are_logged_at_half_and_at_nine_tenths(url: str, caplog, when_full) -> None:
    with Outbox.open(url, policy=Policy(max_undelivered=10, when_full=when_full)) as outbox:
        for _ in range(10):
            enqueue(outbox)
        words = (
            "the queue is filling up: {} undelivered events, {} of max_undelivered (10) or more; `outbox status`"
        )
        warnings = [words.format(5, "half"), words.format(9, "nine tenths")]
        assert [message.partition(" shows")[0] for message in caplog.messages] == warnings
        assert {record.levelno for record in caplog.records} == {logging.WARNING}
        outbox.flush(ScriptedClient())
        caplog.clear()
        enqueue(outbox, 6)
        enqueue(outbox)
        assert len(caplog.messages) == 1  # and again once it was less


def test_a_database_that_can_not_count_is_opened(url: str, monkeypatch, caplog) -> None:
    Outbox.open(url).close()
    monkeypatch.setattr(bounds, "undelivered_rows", lambda _: select(func.no_such()))
    with Outbox(url, policy=Policy(max_undelivered=10)) as outbox:
        assert "counting the queue failed" in caplog.text
        assert outbox.pending_count() == 0
