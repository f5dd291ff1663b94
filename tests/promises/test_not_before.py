"""No event is sent before its not-before time, and what was scheduled can be cancelled."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from builders import DOWN, NOON, NOON_MS, ScriptedClient, add_row, columns_of, row
from outbox import ConfigurationError, IllegalTransition, ObservationEvent, Outbox, Policy, outcomes
from outbox.outcomes import WaitsFor
from outbox.storage.store import Store

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("noon")]

HOUR_MS = 3_600_000
LATER_MS = NOON_MS + HOUR_MS
EVENT = {"event_type": "reminder"}


@pytest.mark.parametrize("not_before", [LATER_MS, NOON + timedelta(hours=1)])
def test_an_event_waits_for_its_time(outbox: Outbox, noon, not_before: Any) -> None:
    (row_id,) = outbox.enqueue(EVENT, to=["default"], not_before=not_before)
    found = row(outbox, row_id)
    assert (found.created_at_ms, found.next_attempt_at_ms, found.not_before_ms) == (NOON_MS, LATER_MS, LATER_MS)
    assert outbox.stats().oldest_pending_age_ms == 0
    client = ScriptedClient()
    noon.move_to(NOON + timedelta(minutes=59))
    assert outbox.flush(client).claimed == 0
    noon.move_to(NOON + timedelta(hours=1))
    assert outbox.flush(client).sent == 1


def test_a_time_that_is_past_delays_nothing(outbox: Outbox) -> None:
    ids = outbox.enqueue_many([EVENT, EVENT], not_before=NOON_MS - 1, event_ids=["a", None])
    assert [row(outbox, row_id).next_attempt_at_ms for row_id in ids] == [NOON_MS] * 2
    assert outbox.flush(ScriptedClient()).sent == 2


@pytest.mark.parametrize("not_before", ["tomorrow", NOON.replace(tzinfo=None), 1.5, -1, 2**53])
@pytest.mark.traced
def test_other_times_are_refused(outbox: Outbox, not_before: Any) -> None:
    with pytest.raises(ConfigurationError, match="^not_before is .*, expected "):
        outbox.enqueue(EVENT, not_before=not_before)


def settle(store: Store, row_id: int, outcome: outcomes.Outcome) -> None:
    store.claims.settle([(row_id, outcome)], lease_until_ms=NOON_MS, created_at_ms={})


RESCHEDULED = outcomes.reschedule(
    retry_count=1, next_attempt_at_ms=NOON_MS, last_error="503", waits_for="service", suspected_at_ms=None
)
# By move: the state of the row before, how the store moves it, and how the row moves itself.
MOVES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "reschedule": (
        {"status": "sending"},
        lambda store, row_id: settle(store, row_id, RESCHEDULED),
        lambda one: one.reschedule(
            retry_count=1, next_attempt_at_ms=NOON_MS, error="503", waits_for=WaitsFor.SERVICE
        ),
    ),
    "release": (
        {"status": "sending"},
        lambda store, row_id: settle(store, row_id, outcomes.release(next_attempt_at_ms=NOON_MS)),
        lambda one: one.release(now_ms=NOON_MS),
    ),
    "unpark": (
        {"status": "parked"},
        lambda store, _: store.revival.unpark(now_ms=NOON_MS, limit=9, spread_ms=1),
        lambda one: one.unpark(now_ms=NOON_MS, spread_ms=1),
    ),
    "retry now": (
        {"status": "parked"},
        lambda store, _: store.revival.retry_now(now_ms=NOON_MS),
        lambda one: one.retry_now(now_ms=NOON_MS),
    ),
    "requeue": (
        {"status": "abandoned"},
        lambda store, _: store.revival.requeue(cutoff_ms=NOON_MS + 1, now_ms=NOON_MS, dry_run=False),
        lambda one: one.requeue(now_ms=NOON_MS),
    ),
    "revive": (
        {"status": "pending", "waits_for": "service", "next_attempt_at_ms": LATER_MS + HOUR_MS},
        lambda store, _: store.revival.revive(now_ms=NOON_MS, policy=Policy(unpark_spread_ms=1), ended_failures=0),
        lambda one: one.revive(next_attempt_at_ms=NOON_MS),
    ),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize(
    ("not_before_ms", "due_ms"), [(LATER_MS, LATER_MS), (NOON_MS - 1, NOON_MS), (None, NOON_MS)]
)
def test_no_move_makes_a_row_due_before_its_time(
    outbox: Outbox, name: str, not_before_ms: int | None, due_ms: int
) -> None:
    before, move, move_row = MOVES[name]
    row_id = add_row(outbox, **before, not_before_ms=not_before_ms)
    move(outbox.store, row_id)
    found = row(outbox, row_id)
    assert (found.status, found.next_attempt_at_ms) == ("pending", due_ms)
    loose = ObservationEvent(
        **{"id": row_id, "next_attempt_at_ms": NOON_MS, **before}, not_before_ms=not_before_ms
    )
    move_row(loose)
    assert loose.next_attempt_at_ms == due_ms


def test_a_retry_leaves_scheduled_events_alone(outbox: Outbox) -> None:
    outbox.enqueue(EVENT, not_before=LATER_MS)
    waiting = add_row(outbox, next_attempt_at_ms=LATER_MS)
    assert outbox.retry_now() == 1
    assert row(outbox, waiting).next_attempt_at_ms == NOON_MS


def test_the_age_of_an_event_counts_from_its_time(outbox: Outbox, noon) -> None:
    outbox.policy = Policy(max_age_ms=HOUR_MS)
    row_id = outbox.enqueue(EVENT, not_before=LATER_MS)
    noon.move_to(NOON + timedelta(hours=2))
    outbox.flush(ScriptedClient(DOWN))
    assert row(outbox, row_id).status == "pending"
    noon.move_to(NOON + timedelta(hours=3))
    outbox.flush(ScriptedClient(DOWN))
    assert row(outbox, row_id).status == "abandoned"


def test_scheduled_events_are_found_by_their_due_time(outbox: Outbox) -> None:
    ids = [outbox.enqueue(EVENT, not_before=NOON_MS + hours * HOUR_MS) for hours in range(3)]
    add_row(outbox, status="sending", next_attempt_at_ms=LATER_MS + 1)
    assert [found.id for found in outbox.find(due_after=NOON_MS)] == ids[1:]
    assert [found.id for found in outbox.find(due_after=NOON + timedelta(hours=1))] == ids[2:]
    with pytest.raises(ConfigurationError, match="^due_after is 'now', expected a datetime"):
        outbox.find(due_after="now")


# --- cancel ---


@pytest.mark.traced
def test_what_is_scheduled_or_parked_can_be_cancelled(outbox: Outbox) -> None:
    ids = [outbox.enqueue(EVENT, not_before=LATER_MS), outbox.enqueue(EVENT), add_row(outbox, status="parked")]
    assert all(outbox.abandon(row_id, "order o-17 was cancelled") for row_id in ids)
    found = [row(outbox, row_id) for row_id in ids]
    assert {(one.status, one.last_error) for one in found} == {
        ("abandoned", "cancelled: order o-17 was cancelled")
    }
    assert outbox.requeue_abandoned(older_than=NOON_MS + 1).total == 3
    assert row(outbox, ids[0]).next_attempt_at_ms == LATER_MS


@pytest.mark.parametrize("status", ["sending", "sent", "abandoned"])
def test_nothing_else_is_cancelled(outbox: Outbox, status: str) -> None:
    row_id = add_row(outbox, status=status, next_attempt_at_ms=NOON_MS - 1)
    before = columns_of(row(outbox, row_id))
    assert not outbox.abandon(row_id, "late")
    assert not outbox.abandon(row_id + 1, "not there")
    assert not outbox.abandon(-1, "not there")
    assert not outbox.abandon(2**63, "not there")
    assert columns_of(row(outbox, row_id)) == before
    with pytest.raises(IllegalTransition, match="^cancel is not a move"):
        row(outbox, row_id).cancel(reason="late")


@pytest.mark.parametrize("reason", ["", " ", None, 5])
def test_a_cancellation_has_a_reason(outbox: Outbox, reason: Any) -> None:
    row_id = outbox.enqueue(EVENT)
    with pytest.raises(ConfigurationError, match="^reason is .*, expected a text"):
        outbox.abandon(row_id, reason)
    assert row(outbox, row_id).status == "pending"
