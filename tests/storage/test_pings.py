"""Connections go back to our pool of a server without an open transaction, and without a needless statement."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from builders import ScriptedClient, add_row, rule_fired, statuses
from outbox import Outbox

pytestmark = pytest.mark.servers


def test_what_was_not_committed_is_rolled_back(outbox: Outbox) -> None:
    add_row(outbox)
    delete = "DELETE FROM observation_events"
    raw = outbox.engine.raw_connection()
    raw.cursor().execute(delete)
    raw.close()
    assert statuses(outbox) == ["pending"]
    with outbox.engine.connect() as connection:
        connection.execute(text(delete))
    assert statuses(outbox) == ["pending"]
    raw = outbox.engine.raw_connection()
    raw.cursor().execute(delete)
    raw.close()
    assert statuses(outbox) == ["pending"]


@pytest.mark.servers("mariadb")
def test_a_connection_whose_transaction_ended_is_not_rolled_back(outbox: Outbox) -> None:
    def rollbacks() -> int:
        with outbox.engine.connect() as connection:  # which ends with a rollback itself
            return int(connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Com_rollback'").one()[1])

    before = rollbacks()
    outbox.enqueue(rule_fired())
    assert outbox.flush(ScriptedClient()).sent == 1
    assert rollbacks() == before + 1
