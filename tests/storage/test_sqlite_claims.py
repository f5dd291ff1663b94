"""Which indexes SQLite's planner chooses, whatever it knows and whichever others there are."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from outbox import Outbox, Where
from outbox.lifecycle import Status
from outbox.storage import deletion, due_times, figures, finding, revival, row_counts, sqlite_claims, views
from outbox.storage.dialects.sqlite import DIALECT
from outbox.storage.engines import reading
from outbox.storage.sql import without_index

INSERT_ROWS = """
    WITH RECURSIVE numbers(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM numbers WHERE i < 2000)
    INSERT INTO observation_events
        (destination, event_type, occurred_at_ms, payload_json, created_at_ms, status, waits_for, next_attempt_at_ms)
    SELECT {destination}, 'a', 1, '{{}}', i, CASE i % 5 WHEN 0 THEN 'sent' WHEN 1 THEN 'parked' ELSE 'pending' END,
        CASE i % 3 WHEN 0 THEN 'service' END, i + i % 2 FROM numbers
"""
DIFFLORES_INDEXES = """
    CREATE INDEX observation_events_pending_idx ON observation_events (status, next_attempt_at_ms, created_at_ms);
    CREATE INDEX observation_events_recent_idx ON observation_events (event_type, session_id, occurred_at_ms)
"""
LAST_ROW = "SCAN observation_events"
"""How the plan calls the look for the newest id. It is the last step, and reads one row."""
STATISTICS = {
    "none": "",
    "of an empty table": "ANALYZE",
    "of one destination": INSERT_ROWS.format(destination="''") + "; ANALYZE",
    "of many destinations": INSERT_ROWS.format(destination="i % 100") + "; ANALYZE",
    "of difflore's indexes, too": DIFFLORES_INDEXES + "; " + INSERT_ROWS.format(destination="''") + "; ANALYZE",
    "nothing of difflore's indexes": DIFFLORES_INDEXES,
}
"""What the planner may know."""


def learn(outbox: Outbox, statistics: str) -> None:
    file = str(outbox.engine.url.database)
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(STATISTICS[statistics])


def plan_of(outbox: Outbox, statement) -> list[str]:
    text = str(statement.compile(outbox.engine))
    with outbox.engine.connect() as connection:
        found = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", (1,) * text.count("?"))
        return [step[3] for step in found]


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize(
    "statement",
    [
        *(statement for statements in deletion.TRIM_FIRST for statement in statements),
        revival.LOCK_PARKED,
        *revival.LOCK_LATE.values(),
        views.CHORES,
    ],
)
def test_what_is_taken_in_order_is_read_in_order(outbox: Outbox, statement, statistics: str) -> None:
    learn(outbox, statistics)
    plan = plan_of(outbox, statement)
    if statement is views.CHORES:
        assert plan.pop() == LAST_ROW
    assert not [step for step in plan if "TEMP B-TREE" in step or step == "SCAN observation_events"], plan


@pytest.mark.parametrize("statistics", STATISTICS)
def test_an_action_on_any_status_walks_the_primary_key(outbox: Outbox, statistics: str) -> None:
    learn(outbox, statistics)
    for event_type, older_than in (("rule_fired", None), (None, 1), ("rule_fired", 1)):
        for destination in (None, "billing"):
            where = Where(event_type=event_type, older_than=older_than, destination=destination)
            with reading(outbox.engine) as connection:
                conditions = outbox.store.finding._conditions(connection, where, of=without_index)
            plan = plan_of(outbox, finding.page(conditions))
            assert plan == ["SEARCH observation_events USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)"]


@pytest.mark.parametrize("statistics", ["none", "of an empty table", "nothing of difflore's indexes"])
@pytest.mark.parametrize("status", Status)
def test_an_action_on_one_status_looks_it_up(outbox: Outbox, status: Status, statistics: str) -> None:
    learn(outbox, statistics)
    with reading(outbox.engine) as connection:
        conditions = outbox.store.finding._conditions(connection, Where(status=status))
    first, *others = [step for step in plan_of(outbox, finding.page(conditions)) if "observation_events" in step]
    assert first.startswith("SEARCH observation_events USING INTEGER PRIMARY KEY (rowid=?")
    assert len(others) == (3 if status is Status.PENDING else 1)
    for step in others:
        assert step.startswith("SCAN observation_events USING COVERING INDEX")


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize(
    "statement",
    [figures.OLDEST_PENDING, figures.LAST_PARKED, figures.WAITING, *revival.RETRY[1:]],
)
def test_what_looks_for_a_status_reads_no_other_rows(outbox: Outbox, statement, statistics: str) -> None:
    learn(outbox, statistics)
    reads = [step for step in plan_of(outbox, statement) if "observation_events" in step]
    assert any("COVERING INDEX" in step for step in reads)
    for step in reads:
        assert "COVERING INDEX" in step or "INTEGER PRIMARY KEY (rowid=?)" in step, reads


@pytest.mark.parametrize("statistics", STATISTICS)
def test_pending_rows_are_counted_in_their_indexes(outbox: Outbox, statistics: str) -> None:
    learn(outbox, statistics)
    reads = [step for step in plan_of(outbox, row_counts.pending_everywhere(DIALECT)) if "observation" in step]
    assert len(reads) == 4
    assert all("COVERING INDEX" in step for step in reads), reads


@pytest.mark.parametrize("statistics", STATISTICS)
def test_the_due_times_of_all_destinations_are_looked_up(outbox: Outbox, statistics: str) -> None:
    learn(outbox, statistics)
    plan = plan_of(outbox, due_times.due_everywhere(DIALECT))
    reads = [step for step in plan if "observation_events" in step]
    assert len(reads) > 10
    assert not [step for step in reads if step.startswith("SCAN")], plan
    first = [step for step in reads if "(destination" not in step]
    assert len(first) == 4, plan  # the first name of each kind: the end of an index


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize(
    ("statement", "index"),
    [
        (sqlite_claims.DUE_NEVER_TRIED, "fresh_idx (destination=? AND created_at_ms<?)"),
        (sqlite_claims.NEWEST_NEVER_TRIED, "fresh_idx (destination=? AND created_at_ms<?)"),
        (sqlite_claims.POSTPONED.head, "tried_idx (destination=? AND created_at_ms<?)"),
        (sqlite_claims.POSTPONED.due, "due_idx (destination=? AND next_attempt_at_ms<?)"),
        (sqlite_claims.POSTPONED.newest, "tried_idx (destination=? AND created_at_ms<?)"),
        (sqlite_claims.POSTPONED.newest_due, "due_idx (destination=? AND next_attempt_at_ms<?)"),
        (sqlite_claims.FAILED.head, "failed_idx (destination=? AND waits_for=? AND created_at_ms<?)"),
        (sqlite_claims.FAILED.due, "retry_idx (destination=? AND waits_for=? AND next_attempt_at_ms<?)"),
    ],
)
def test_a_claim_looks_for_each_kind_of_row_in_an_index_of_theirs(
    outbox: Outbox, statement, index: str, statistics: str
) -> None:
    learn(outbox, statistics)
    plan = plan_of(outbox, statement)
    assert plan[0].endswith(f"observation_events USING COVERING INDEX observation_events_{index}"), plan


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize(
    "statement",
    [
        *sqlite_claims.LEASES_RUN_OUT.values(),
        sqlite_claims.NEVER_DUE,
        *(statement for statements in deletion.TRIM_FIRST for statement in statements),
        *DIALECT.undelivered_to_trim,
        deletion.EXPIRED,
        revival.LOCK_PARKED,
        *revival.LONGEST_PARKED,
        *revival.LAST_LATE.values(),
        *revival.LOCK_LATE.values(),
        row_counts.all_rows(DIALECT),
        row_counts.pending_rows(DIALECT),
        views.CHORES,
        due_times.LAST_ACCEPTED,
        due_times.next_due(DIALECT),
    ],
)
@pytest.mark.untraced
def test_no_statement_for_one_destination_reads_the_waiting_rows_of_another(
    outbox: Outbox, statement, statistics: str
) -> None:
    learn(outbox, statistics)
    plan = plan_of(outbox, statement)
    if statement is views.CHORES:
        assert plan.pop() == LAST_ROW
    reads = [step for step in plan if "observation_events" in step]
    assert reads, plan
    for step in reads:
        assert "(destination=?" in step, plan
