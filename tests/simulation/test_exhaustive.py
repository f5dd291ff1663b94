"""A small world in every order: what is promised holds in all of them."""

from dataclasses import replace

import pytest
from sqlalchemy import bindparam, update

from outbox import outcomes
from outbox.storage import claimed, claims, sql

from .exhaustive import Scope, search
from .facts import ACCEPTANCE, EXCLUSION, Violation
from .runs import theatre

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


FAILOVER = Scope(answers=("ok",), crashes=0, expiries=0, failovers=1)


@pytest.mark.parametrize(
    "scope",
    [
        Scope(answers=("ok", "permanent"), crashes=0, expiries=0),
        Scope(answers=("ok", "transient"), crashes=0, expiries=0),
        Scope(answers=("ok",), rows=1, batch_size=1),
        FAILOVER,
        Scope(answers=("ok", "permanent"), crashes=0, original=True),
        Scope(answers=("ok",), original=True),
        replace(FAILOVER, original=True),
    ],
    ids=str,
)
def test_every_order_of_a_small_world_keeps_what_is_promised(scope: Scope) -> None:
    with theatre() as stage:
        found = search(scope, stage)
    print(scope, found)
    assert found.interleavings() > 500
    assert len(found.ends) > 1


def test_the_search_finds_a_delivery_that_is_told_by_its_id_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = outcomes.deliver(sent_at_ms=bindparam("new_sent_at_ms"))
    monkeypatch.setattr(claimed, "DELIVER", sql.move(delivery).where(sql.these_rows))
    with theatre() as stage, pytest.raises(Violation) as violation:
        search(FAILOVER, stage)
    assert violation.value.invariant == ACCEPTANCE


def test_the_search_finds_a_move_without_its_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    unfenced = (
        update(sql.events)
        .where(sql.columns.id == bindparam("row_id"))
        .values(status="pending", last_error=bindparam("new_last_error"))
        .values(retry_count=bindparam("new_retry_count"), next_attempt_at_ms=bindparam("new_next_attempt_at_ms"))
        .values(waits_for=bindparam("new_waits_for"), suspected_at_ms=bindparam("new_suspected_at_ms"))
        .values(lost_leases=0)
    )
    monkeypatch.setitem(claims.SETTLE, "reschedule", unfenced)
    with theatre() as stage, pytest.raises(Violation) as violation:
        search(Scope(answers=("transient",), crashes=0, original=True), stage)
    assert violation.value.invariant == EXCLUSION
