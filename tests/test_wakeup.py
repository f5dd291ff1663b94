"""What wakes a worker: a ring in its own process, and a notification of PostgreSQL."""

from __future__ import annotations

import gc
import warnings

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from builders import (
    rule_fired,
)
from conditions import FOREVER_S
from outbox import (
    Outbox,
)
from outbox.storage import postgresql_listener
from outbox.storage.engines import open_engine
from outbox.wakeup import Wakeup


@pytest.mark.servers("postgresql")
@pytest.mark.parametrize("fault", ["there is no such database", "the statement is refused"])
def test_who_can_not_listen_sleeps_all_the_same(outbox: Outbox, monkeypatch, fault: str) -> None:
    engine = outbox.engine
    if fault == "the statement is refused":
        monkeypatch.setattr(postgresql_listener, "CHANNEL", "no name")
    else:
        engine = open_engine(engine.url.set(database="outbox_that_is_not_there"))
    bell = Wakeup(engine)
    bell.sleep(0)
    bell.ring()
    bell.sleep(FOREVER_S)
    bell.close()
    bell.ring()
    engine.dispose()


@pytest.mark.servers("postgresql")
def test_what_a_child_leaves_to_its_parent_is_never_collected(outbox: Outbox) -> None:
    with warnings.catch_warnings(record=True):
        gc.collect()  # what earlier tests left would be told of below
    bell = Wakeup(outbox.engine)
    bell.sleep(0)
    bell.leave_to_parent()
    del bell
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gc.collect()
    assert [warning for warning in told if issubclass(warning.category, ResourceWarning)] == []


@pytest.mark.servers("postgresql")
def test_who_begins_to_listen_is_to_look_first_for_what_was_notified_before(outbox: Outbox) -> None:
    bell = Wakeup(outbox.engine)
    assert [bell.sleep(0), bell.sleep(0)] == [True, False]
    bell.close()


@pytest.mark.servers("postgresql")
def test_a_transaction_in_two_phases_notifies_of_nothing_for_it_could_not_be_prepared(outbox: Outbox) -> None:
    statements: list[str] = []
    event.listen(outbox.engine, "before_cursor_execute", lambda *seen: statements.append(seen[2]))
    for twophase in (False, True):
        with Session(outbox.engine, twophase=twophase) as session:
            assert outbox.enqueue(rule_fired(), session=session)
    assert ["pg_notify" in statement for statement in statements if "INSERT" in statement] == [True, False]
