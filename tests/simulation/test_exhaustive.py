"""A small world in every order: what is promised holds in all of them."""

import pytest
from sqlalchemy import bindparam, update

from outbox import statements

from .exhaustive import Scope, search
from .model import EXCLUSION, Violation
from .runs import theatre

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_two_flushers_two_rows_one_crash_and_one_lease_that_runs_out() -> None:
    with theatre() as stage:
        found = search(Scope(), stage)
    print(found)
    assert found.interleavings() > 1_000_000
    assert len(found.ends) > 100


def test_two_flushers_with_a_row_each_and_an_answer_that_is_lost() -> None:
    with theatre() as stage:
        found = search(Scope(answers=("ok", "lost"), batch_size=1, crashes=0), stage)
    print(found)
    assert len(found.ends) > 10


def test_the_search_finds_a_move_without_its_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    unfenced = (
        update(statements.events)
        .where(statements.events.c.id == bindparam("row_id"))
        .values(status="pending", last_error=bindparam("new_last_error"))
        .values(retry_count=bindparam("new_retry_count"), next_attempt_at_ms=bindparam("new_next_attempt_at_ms"))
    )
    monkeypatch.setitem(statements.SETTLE, "reschedule", unfenced)
    with theatre() as stage, pytest.raises(Violation) as violation:
        search(Scope(answers=("transient",), crashes=0), stage)
    assert violation.value.invariant == EXCLUSION
