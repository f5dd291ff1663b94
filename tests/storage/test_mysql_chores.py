"""MySQL and MariaDB look for chores, and find delivered rows, past any number of other rows."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text

from builders import NOON_MS
from outbox import Outbox, Policy
from outbox.lifecycle import Status
from outbox.storage.claimed import Part
from outbox.storage.deletion import EXPIRED, TRIM_FIRST
from outbox.storage.dialects import dialect_of
from outbox.storage.due_times import LAST_ACCEPTED, due_everywhere, next_due
from outbox.storage.mysql_chores import CHORES
from outbox.storage.mysql_claims import SEARCHES
from outbox.storage.sql import oldest
from outbox.storage.transactions import Transaction

_READ = ("Handler_icp_attempts", *(f"Handler_read_{place}" for place in ("first", "key", "last", "next", "prev")))

pytestmark = pytest.mark.servers("mariadb")

FILL = """
    INSERT INTO observation_events (event_type, occurred_at_ms, payload_json, created_at_ms, next_attempt_at_ms, status,
        sent_at_ms, waits_for)
    SELECT 'a', 1, '{{}}', seq, seq, {status}, {sent_at}, {waits_for} FROM {database}.seq_1_to_2000
"""
SOME_SENT = {"status": "if(seq > 1990, 'sent', 'pending')", "sent_at": "if(seq > 1990, seq, NULL)"}


def filled(outbox: Outbox, *, status: str, sent_at: str = "NULL", waits_for: str = "NULL") -> None:
    database = outbox.engine.url.database
    with outbox.engine.begin() as connection:
        connection.execute(
            text(FILL.format(status=status, sent_at=sent_at, waits_for=waits_for, database=database))
        )


def reads(outbox: Outbox, statement: Any, **parameters: Any) -> tuple[list[tuple[Any, ...]], int]:
    """Run a query; return its rows, and how many rows the server read."""
    with outbox.engine.begin() as connection:
        transaction = Transaction(connection.exec_driver_sql, connection.dialect, {})
        connection.exec_driver_sql("FLUSH STATUS")
        rows = transaction.rows(statement, destination="", **parameters)
        counted = connection.execute(text("SHOW SESSION STATUS LIKE 'Handler%'")).fetchall()
    return rows, sum(int(number) for name, number in counted if name in _READ)


@pytest.mark.parametrize("status", ["'pending'", "'parked'", "if(seq % 2, 'sending', 'abandoned')"])
def test_a_look_for_chores_reads_the_ends_of_indexes_only(outbox: Outbox, status: str) -> None:
    filled(outbox, status=status)
    ((parked, *_, last_id),), read = reads(outbox, CHORES, sent_before=NOON_MS)
    assert (parked, last_id >= 2_000, read <= 8) == ("parked" if status == "'parked'" else None, True, True)


def test_a_look_for_chores_finds_expired_rows_past_all_others(outbox: Outbox) -> None:
    filled(outbox, **SOME_SENT)
    found = {before: reads(outbox, CHORES, sent_before=before) for before in (1_991, 1_992)}
    assert {before: rows[0][1] for before, (rows, _) in found.items()} == {1_991: None, 1_992: 1_991}
    assert all(read <= 8 for _, read in found.values())


def test_rows_that_failed_are_found_past_all_others(outbox: Outbox) -> None:
    filled(outbox, status="'pending'")
    policy = Policy()
    assert not outbox.store.views.chores(policy, now_ms=NOON_MS).is_any_failed
    with outbox.engine.begin() as connection:
        connection.execute(text("UPDATE observation_events SET waits_for = 'delay' WHERE created_at_ms = 1000"))
    assert outbox.store.views.chores(policy, now_ms=NOON_MS).is_any_failed


def test_the_last_delivery_is_found_past_all_undelivered_ones(outbox: Outbox) -> None:
    filled(outbox, **SOME_SENT)
    rows, read = reads(outbox, LAST_ACCEPTED)
    assert (rows, read <= 2) == ([(2_000,)], True)


def test_the_last_deliveries_of_all_destinations_are_found_by_the_index_alone(outbox: Outbox) -> None:
    filled(outbox, **SOME_SENT)
    with outbox.engine.begin() as connection:
        connection.execute(text("ANALYZE TABLE observation_events"))
        query = due_everywhere(dialect_of(connection)).compile(connection)
        plan = connection.exec_driver_sql(f"EXPLAIN {query}", {**query.params, "now": NOON_MS})
        (last,) = [
            step for step in plan.mappings() if (step["key"] or "").endswith("delivered_idx") and step["ref"]
        ]
    assert "Using index" in last["Extra"]


@pytest.mark.parametrize("waits_for", ["NULL", "'service'"])
# To find the destinations of a small table, `due_everywhere` reads an entry of an index for each row.
@pytest.mark.parametrize(("find", "at_most"), [(next_due, 40), (due_everywhere, 2_040)])
def test_the_next_due_time_is_found_past_all_others(
    outbox: Outbox, find: Any, at_most: int, waits_for: str
) -> None:
    filled(outbox, status="elt(1 + seq % 4, 'pending', 'parked', 'abandoned', 'sent')", waits_for=waits_for)
    with outbox.engine.begin() as connection:
        connection.execute(
            text("UPDATE observation_events SET created_at_ms = 1")
        )  # a due time after the creation marks a row that was tried
        connection.execute(text("ANALYZE TABLE observation_events"))
    rows, read = reads(outbox, find(dialect_of(outbox.engine)), now=NOON_MS)
    assert (4 in rows[0], read <= at_most) == (True, True)


def test_the_oldest_rows_of_a_status_are_found_past_all_others(outbox: Outbox) -> None:
    """They wait for different reasons, and each reason has its own part of an index."""
    waits_for = "elt(1 + seq % 5, NULL, 'service', 'delay', 'proof', 'row')"
    filled(outbox, status="if(seq > 1980, 'parked', 'pending')", waits_for=waits_for)
    rows, read = reads(outbox, oldest(Status.PARKED), excess=3)
    assert ([row[4] for row in rows], read <= 40) == ([1_981, 1_982, 1_983], True)


def test_a_row_whose_senders_died_is_found_past_all_others(outbox: Outbox) -> None:
    filled(outbox, status="'sending'")
    with outbox.engine.begin() as connection:
        connection.execute(text("UPDATE observation_events SET lost_leases = 1 WHERE created_at_ms = 1000"))
    rows, read = reads(outbox, SEARCHES[Part.ALONE]._oldest, now=NOON_MS, look_at=4)
    assert ([row[1] for row in rows], read <= 10) == ([1_000], True)


@pytest.mark.parametrize(
    ("statement", "parameters"),
    [(EXPIRED, {"sent_before": NOON_MS, "slice_size": 3}), (TRIM_FIRST[0][0], {"excess": 3})],
)
def test_delivered_rows_are_deleted_past_all_undelivered_ones(
    outbox: Outbox, statement: Any, parameters: dict[str, int]
) -> None:
    filled(outbox, **SOME_SENT)
    rows, read = reads(outbox, statement, **parameters)
    assert ([row[4] for row in rows], read <= 8) == ([1_991, 1_992, 1_993], True)
