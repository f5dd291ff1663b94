import gc
import runpy
import weakref

import pytest
from sqlalchemy import delete, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateTable

from builders import NOON_MS, ROOT, ScriptedClient, add_row, columns_of, row, rule_fired
from outbox import IllegalTransition, ObservationEvent, Outbox, Policy, Status, outcomes
from outbox.lifecycle import StatusOnly, diagram, fire, machine, moves
from outbox.outcomes import Outcome, WaitsFor
from outbox.storage.claims import SETTLE
from outbox.storage.sql import move
from outbox.storage.store import Store
from outbox.storage.tables import Base

pytestmark = pytest.mark.contract

NOW = NOON_MS + 60_000
LEASE = NOW + 5_000

# Each trigger as a row makes it, and as the store makes it.
ROW_MOVES = {
    "claim": lambda r: r.claim(now_ms=NOW, lease_ms=60_000),
    "deliver": lambda r: r.deliver(sent_at_ms=NOW),
    "reschedule": lambda r: r.reschedule(
        retry_count=3, next_attempt_at_ms=NOW + 9, error="503", waits_for=WaitsFor.ROW
    ),
    "park": lambda r: r.park(error="401"),
    "abandon": lambda r: r.abandon(error="permanent: 422"),
    "release": lambda r: r.release(now_ms=NOW),
    "unpark": lambda r: r.unpark(now_ms=NOW, spread_ms=5_000),
    "retry_now": lambda r: r.retry_now(now_ms=NOW),
    "cancel": lambda r: r.cancel(reason="cancelled: sold out"),
    "requeue": lambda r: r.requeue(now_ms=NOW),
    "revive": lambda r: r.revive(next_attempt_at_ms=NOW),
}


FENCED = [trigger for trigger, declared in moves().items() if declared.sources == (Status.SENDING,)]
"""The moves that only `sending` has end a claim, so only the holder of its lease may make them."""


def settle(outcome):
    return lambda store, row_id: (
        store.claims.settle([(row_id, outcome)], lease_until_ms=LEASE, created_at_ms={row_id: NOON_MS}).landed
    )


STORE_MOVES = {
    "claim": lambda store, _: store.claims.claim(now_ms=NOW, lease_until_ms=NOW + 60_000, batch_size=64).rows,
    "deliver": settle(outcomes.deliver(sent_at_ms=NOW)),
    "reschedule": settle(
        outcomes.reschedule(
            retry_count=3,
            next_attempt_at_ms=NOW + 9,
            last_error="503",
            waits_for="row",
            suspected_at_ms=NOON_MS,
        )
    ),
    "park": settle(outcomes.park(last_error="401")),
    "abandon": settle(outcomes.abandon(last_error="permanent: 422")),
    "release": settle(outcomes.release(next_attempt_at_ms=NOW)),
    "unpark": lambda store, _: store.revival.unpark(now_ms=NOW, limit=256, spread_ms=5_000),
    "retry_now": lambda store, _: store.revival.retry_now(now_ms=NOW),
    "cancel": lambda store, row_id: store.revival.cancel(row_id, last_error="cancelled: sold out"),
    "requeue": lambda store, _: store.revival.requeue(cutoff_ms=NOW, now_ms=NOW, dry_run=False),
    "revive": lambda store, _: store.revival.revive(
        now_ms=NOW, policy=Policy(unpark_spread_ms=1), ended_failures=0
    ),
}


def next_attempt(trigger: str) -> int:
    """A due time under which the trigger's own condition holds; for fenced moves the lease."""
    return {"claim": NOW, "retry_now": NOW + 1}.get(trigger, LEASE)


@pytest.mark.parametrize("trigger", moves())
def test_row_and_update_agree_from_every_status(outbox: Outbox, trigger: str) -> None:
    for status in Status:
        with outbox.engine.begin() as connection:
            connection.execute(delete(ObservationEvent))
        check_row_and_update(outbox, status.value, trigger)


def check_row_and_update(outbox: Outbox, status: str, trigger: str) -> None:
    row_id = add_row(
        outbox,
        status=status,
        next_attempt_at_ms=next_attempt(trigger),
        retry_count=2,
        last_error="before",
        waits_for="service",
        suspected_at_ms=NOON_MS,
        lost_leases=1,
    )
    expected = row(outbox, row_id)

    if status in moves()[trigger].sources:
        ROW_MOVES[trigger](expected)
        assert expected.status == moves()[trigger].target
    else:
        before = columns_of(expected)
        with pytest.raises(IllegalTransition, match=trigger):
            ROW_MOVES[trigger](expected)
        assert columns_of(expected) == before

    STORE_MOVES[trigger](outbox.store, row_id)

    assert columns_of(row(outbox, row_id)) == columns_of(expected), status


def test_every_trigger_of_the_table_has_a_row_method_and_an_operation() -> None:
    assert set(ROW_MOVES) == set(STORE_MOVES) == set(moves())
    assert all(callable(getattr(ObservationEvent, trigger)) for trigger in moves())


@pytest.mark.parametrize("trigger", FENCED)
def test_a_fenced_move_under_another_lease_changes_nothing(outbox: Outbox, trigger: str) -> None:
    row_id = add_row(outbox, status="sending", next_attempt_at_ms=LEASE + 1)
    before = columns_of(row(outbox, row_id))

    landed = STORE_MOVES[trigger](outbox.store, row_id)

    assert landed[trigger] == 0
    assert columns_of(row(outbox, row_id)) == before


@pytest.mark.parametrize("trigger", moves())
def test_every_update_names_its_sources_and_its_destination(trigger: str) -> None:
    text = str(SETTLE[trigger] if trigger in SETTLE else move(Outcome(trigger, {})))
    assert f"status='{moves()[trigger].target.value}'" in text
    assert all(f"'{source.value}'" in text.partition("WHERE")[2] for source in moves()[trigger].sources)


def test_the_moves_that_end_a_claim_are_fenced() -> None:
    assert set(SETTLE) == set(FENCED)
    assert all("id = :row_id" in str(fenced) and "ms = :lease" in str(fenced) for fenced in SETTLE.values())


def test_a_status_without_a_row_is_moved_like_a_row() -> None:
    held = StatusOnly(Status.SENDING)
    fire(held, "park")
    assert held.status == "parked"
    with pytest.raises(
        IllegalTransition, match="park is not a move of an event that is 'parked'; .* from sending"
    ):
        fire(held, "park")
    assert held.status == "parked"


def test_the_table_takes_the_statuses_of_the_machine() -> None:
    created = str(CreateTable(ObservationEvent.__table__))
    assert f"CHECK (status IN {tuple(machine().states)})" in created
    assert list(machine().states) == [status.value for status in Status]


def test_a_row_that_is_not_due_cannot_be_claimed() -> None:
    with pytest.raises(IllegalTransition, match="not due before 20"):
        ObservationEvent(next_attempt_at_ms=20).claim(now_ms=19, lease_ms=60_000)


def test_a_row_that_is_due_needs_no_retry_now() -> None:
    with pytest.raises(IllegalTransition, match="is due already"):
        ObservationEvent(next_attempt_at_ms=20).retry_now(now_ms=20)


def test_a_row_that_is_due_no_later_needs_no_revival() -> None:
    with pytest.raises(IllegalTransition, match="is due no later, at 20"):
        ObservationEvent(next_attempt_at_ms=20).revive(next_attempt_at_ms=20)


def test_status_cannot_be_assigned() -> None:
    fresh = ObservationEvent(id=7)
    with pytest.raises(IllegalTransition, match="status of event 7 can't be assigned, .* claim, deliver"):
        fresh.status = "sent"
    assert fresh.status == "pending"


def test_a_new_row_has_its_defaults_before_any_flush() -> None:
    fresh = ObservationEvent(event_type="rule_fired")
    assert (fresh.status, fresh.retry_count, fresh.next_attempt_at_ms) == ("pending", 0, 0)
    assert (fresh.rule_ids_json, fresh.session_id) == ("[]", "")
    assert repr(fresh) == "<ObservationEvent None rule_fired pending>"


def test_a_new_row_cannot_have_a_status_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="lost"):
        ObservationEvent(status="lost")


def test_an_orm_flush_that_would_change_the_status_is_refused(outbox: Outbox) -> None:
    row_id = outbox.enqueue(rule_fired())
    with Session(outbox.engine) as session:
        loaded = session.get(ObservationEvent, row_id)
        loaded.deliver(sent_at_ms=NOW)
        with pytest.raises(IllegalTransition, match=f"status of event {row_id} can't be written by an ORM flush"):
            session.commit()
    assert row(outbox, row_id).status == "pending"


def test_an_orm_flush_of_other_columns_is_let_through(outbox: Outbox) -> None:
    row_id = outbox.enqueue(rule_fired())
    with Session(outbox.engine) as session:
        session.get(ObservationEvent, row_id).file_path = "a.py"
        session.commit()
    assert row(outbox, row_id).file_path == "a.py"


def test_the_table_refuses_a_status_that_does_not_exist(outbox: Outbox) -> None:
    row_id = outbox.enqueue(rule_fired())
    with Session(outbox.engine) as session, pytest.raises(DBAPIError, match="status_check"):
        session.execute(update(ObservationEvent).where(ObservationEvent.id == row_id).values(status="lost"))


def test_an_unknown_trigger_and_an_unknown_status_are_illegal() -> None:
    with pytest.raises(IllegalTransition, match="the moves are claim, deliver"):
        fire(ObservationEvent(), "explode")
    strange = ObservationEvent()
    strange.__dict__["status"] = "lost"
    with pytest.raises(IllegalTransition, match="'lost'"):
        strange.requeue(now_ms=NOW)


def test_the_machine_keeps_no_row_alive() -> None:
    moved = ObservationEvent()
    moved.claim(now_ms=NOW, lease_ms=1)
    gone = weakref.ref(moved)
    del moved
    gc.collect()
    assert gone() is None


def test_the_diagrams_in_the_docs_are_those_of_the_table() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "diagram.py"))["picture"]()
    assert f"```mermaid\n{diagram()}\n```" in (ROOT / "README.md").read_text(), "run `python docs/diagram.py`"
    assert (ROOT / "docs" / "lifecycle.svg").read_text() == drawn, "run `python docs/diagram.py`"


def test_sent_is_final() -> None:
    assert not [declared for declared in moves().values() if Status.SENT in declared.sources]


def test_a_delivered_row_is_left_alone_by_a_late_flusher(outbox: Outbox) -> None:
    row_id = add_row(outbox)
    outbox.flush(ScriptedClient())
    before = columns_of(row(outbox, row_id))
    settle(outcomes.deliver(sent_at_ms=1))(Store(outbox.engine), row_id)
    assert columns_of(row(outbox, row_id)) == before


def test_only_our_tables_are_in_the_metadata() -> None:
    assert set(Base.metadata.tables) == {
        "observation_events",
        "observation_events_ledger",
        "observation_destinations",
        "observation_destinations_ledger",
        "observation_holds",
        "observation_tries",
        "observation_outbox",
    }
