"""An edited event takes the place of the old one, in one transaction."""

from __future__ import annotations

import pytest

from builders import NOON_MS, ScriptedClient, add_row, refuse, row, rule_fired, statuses
from outbox import ConfigurationError, InvalidEvent, Outbox, Policy, QueueFull, ReplaceReport, StorageError
from outbox.storage import replacing

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("noon")]

EDITED = rule_fired(session_id="edited")


def ledger(outbox: Outbox) -> list[tuple]:
    return [tuple(entry) for entry in outbox.stats().deleted]


def test_the_new_event_takes_the_place_of_the_old_one(outbox: Outbox) -> None:
    old = add_row(
        outbox, status="abandoned", destination="billing", event_id="mine", retry_count=3, last_error="422"
    )
    assert outbox.replace({old: EDITED}) == ReplaceReport({old: old + 1})
    new = row(outbox, old + 1)
    assert (new.status, new.destination, new.session_id, new.retry_count) == ("pending", "billing", "edited", 0)
    assert (new.created_at_ms, new.next_attempt_at_ms, new.last_error) == (NOON_MS, NOON_MS, None)
    assert outbox.get(old) is None
    assert ledger(outbox) == [("abandoned", "rule_fired", "replaced", 1)]


def test_the_new_event_has_a_new_id_so_no_service_takes_it_for_the_old_one(outbox: Outbox) -> None:
    old = [outbox.enqueue(rule_fired(), event_id="mine"), outbox.enqueue(rule_fired())]
    before = {row(outbox, one).event_id for one in old}
    new = outbox.replace(dict.fromkeys(old, EDITED)).replaced.values()
    after = {row(outbox, one).event_id for one in new}
    assert len(before | after) == 4
    assert outbox.enqueue(rule_fired(), event_id="mine") not in old  # the id is free again


@pytest.mark.parametrize("status", ["pending", "parked", "abandoned"])
def test_what_nobody_sends_can_be_replaced(outbox: Outbox, status: str) -> None:
    assert len(outbox.replace({add_row(outbox, status=status): EDITED}).replaced) == 1


def test_what_is_sent_in_flight_or_gone_stays(outbox: Outbox) -> None:
    sent = add_row(outbox, status="sent", sent_at_ms=NOON_MS)
    held = add_row(outbox, status="sending", next_attempt_at_ms=NOON_MS + 1)
    lost = add_row(outbox, status="sending", next_attempt_at_ms=NOON_MS)
    other = add_row(outbox)
    report = outbox.replace(
        dict.fromkeys([sent, held, lost, other, 99], EDITED), created_at_ms={lost: NOON_MS, other: NOON_MS - 1}
    )
    assert report.replaced == {lost: other + 1}
    assert report.refused == {
        sent: "it is sent",
        held: "it is being sent",
        other: "it was created at another time, so it is another event",
        99: "it was deleted, or never enqueued here",
    }
    assert statuses(outbox) == ["sent", "sending", "pending", "pending"]


def test_an_event_that_is_scheduled_stays_scheduled(outbox: Outbox) -> None:
    later = outbox.enqueue(rule_fired(), not_before=NOON_MS + 9)
    earlier = add_row(outbox, not_before_ms=NOON_MS - 9)
    new = outbox.replace(dict.fromkeys([later, earlier], EDITED)).replaced
    assert (row(outbox, new[later]).not_before_ms, row(outbox, new[later]).next_attempt_at_ms) == (
        NOON_MS + 9,
    ) * 2
    assert (row(outbox, new[earlier]).not_before_ms, row(outbox, new[earlier]).next_attempt_at_ms) == (
        None,
        NOON_MS,
    )


def test_many_are_replaced_in_slices(outbox: Outbox, monkeypatch) -> None:
    monkeypatch.setattr(replacing, "_SLICE", 2)
    old = outbox.enqueue_many([rule_fired()] * 5)
    report = outbox.replace({one: rule_fired(session_id=f"new {one}") for one in old})
    assert {row(outbox, new).session_id for new in report.replaced.values()} == {f"new {one}" for one in old}
    assert ledger(outbox) == [("pending", "rule_fired", "replaced", 5)]


def test_every_event_that_was_ever_enqueued_is_there_or_counted(outbox: Outbox) -> None:
    old = outbox.enqueue_many([rule_fired()] * 3)
    outbox.replace(dict.fromkeys(old[:2], EDITED))
    assert len(outbox.find()) + sum(entry.events for entry in outbox.stats().deleted) == 5


def test_a_replacement_that_fails_changes_nothing(outbox: Outbox) -> None:
    old = outbox.enqueue(rule_fired())
    refuse(outbox, "INSERT", "observation_events", "no room today")
    with pytest.raises(StorageError, match="no room today"):
        outbox.replace({old: EDITED})
    assert row(outbox, old).session_id == "s1"
    assert ledger(outbox) == []


def test_the_replaced_event_needs_no_room(outbox: Outbox) -> None:
    with Outbox(outbox.engine, policy=Policy(max_undelivered=2)) as full:
        old = full.enqueue_many([rule_fired()] * 2)
        full.replace({old[0]: EDITED})
        with pytest.raises(QueueFull):
            full.enqueue(rule_fired())


def test_one_invalid_event_replaces_none(outbox: Outbox) -> None:
    first, second = outbox.enqueue_many([rule_fired()] * 2)
    with pytest.raises(InvalidEvent):
        outbox.replace({first: EDITED, second: {"no": "type"}})
    with pytest.raises(ConfigurationError, match="events has the key 0, expected a row id from 1"):
        outbox.replace({0: EDITED})
    assert [found.id for found in outbox.find()] == [first, second]


def test_while_capture_is_off_nothing_is_replaced(outbox: Outbox, monkeypatch) -> None:
    old = outbox.enqueue(rule_fired())
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    assert outbox.replace({old: EDITED}).refused == {old: "capture is off (OUTBOX_CAPTURE=false)"}
    assert row(outbox, old).session_id == "s1"


def test_the_new_event_is_sent_at_once(outbox: Outbox) -> None:
    old = add_row(outbox, status="parked")
    woken: list[int] = []
    outbox.wakers.add(lambda: woken.append(1))
    new = outbox.replace({old: EDITED}).replaced[old]
    client = ScriptedClient()
    outbox.flush(client)
    assert (client.ids, woken) == ([[new]], [1])
