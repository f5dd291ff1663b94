"""The ids of events as they are read: the caller's own, or derived ones."""

from __future__ import annotations

from uuid import UUID

import pytest
from sqlalchemy import delete, select

from builders import ScriptedClient, add_row, on_statement, row, rule_fired, statuses
from outbox import ObservationEvent, Outbox, StorageError
from outbox.storage.engines import reading, writing
from outbox.storage.tables import identity

pytestmark = pytest.mark.contract


def outbox_id(outbox: Outbox) -> str:
    with reading(outbox.engine) as connection:
        return connection.scalar(select(identity.c.id))


def derived(outbox: Outbox, row_id: int) -> str:
    return f"{outbox_id(outbox)}-{row(outbox, row_id).created_at_ms}-{row_id}"


def test_an_event_has_the_callers_id_or_a_derived_one(outbox: Outbox) -> None:
    assert UUID(outbox_id(outbox)).version == 4
    plain, own = outbox.enqueue(rule_fired()), outbox.enqueue(rule_fired(), event_id="order-17")
    ids = [derived(outbox, plain), "order-17"]
    client = ScriptedClient()

    assert [row(outbox, row_id).event_id for row_id in (plain, own)] == ids
    assert [found.event_id for found in outbox.find()] == ids
    outbox.flush(client)
    assert [item.event_id for item in client.batches[0]] == ids
    assert [item.occurred_at_ms for item in client.batches[0]] == [row(outbox, plain).occurred_at_ms] * 2


def test_a_derived_id_is_not_stored(outbox: Outbox) -> None:
    outbox.enqueue(rule_fired())
    outbox.find()
    outbox.flush(ScriptedClient())

    with reading(outbox.engine) as connection:
        assert connection.scalar(select(ObservationEvent.event_id)) is None


def test_other_programs_derive_the_same_id(outbox: Outbox, url: str) -> None:
    row_id = outbox.enqueue(rule_fired())

    with Outbox(url) as other:
        assert row(other, row_id).event_id == row(outbox, row_id).event_id


@pytest.mark.sqlite
def test_the_id_of_the_outbox_is_read_once(outbox: Outbox) -> None:
    seen: list[str] = []
    on_statement(outbox, seen.append)
    outbox.enqueue_many([rule_fired()] * 3)
    assert not [one for one in seen if identity.name in one]
    for _ in range(3):
        outbox.flush(ScriptedClient())
        outbox.find()

    assert len([one for one in seen if identity.name in one]) == 1


@pytest.mark.parametrize("event_id", ["a b", "", "é"])
def test_an_id_that_no_caller_may_give_spoils_its_row_alone(outbox: Outbox, event_id: str) -> None:
    add_row(outbox, event_id=event_id)
    outbox.enqueue(rule_fired(), event_id="good")
    outbox.flush(ScriptedClient())

    assert statuses(outbox) == ["abandoned", "sent"]
    assert f"the column event_id is {event_id!a}, expected 1 to 191" in row(outbox, 1).last_error


@pytest.mark.sqlite  # the tests on a server share its id
def test_without_the_id_of_the_outbox_nothing_is_claimed(outbox: Outbox) -> None:
    outbox.enqueue(rule_fired())
    with writing(outbox.engine) as connection:
        connection.execute(delete(identity))

    with pytest.raises(StorageError, match="^the table observation_outbox is empty, "):
        outbox.flush(ScriptedClient())
    assert statuses(outbox) == ["pending"]
