"""Which indexes PostgreSQL's planner chooses, whatever it knows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event, text

from builders import NOON_MS
from outbox import Outbox, Policy, outcomes
from outbox.storage import postgresql_claims
from outbox.storage.claimed import Part
from outbox.storage.store import Store
from outbox.storage.transactions import Transaction

pytestmark = pytest.mark.servers("postgresql")

HERE = "destination-7"
POLICY = Policy(max_rows=10, max_sent=10, max_undelivered=10, when_full="trim", keep_sent_ms=1)
ANALYZE = "ANALYZE observation_events"
INSERT_ROWS = """
    INSERT INTO observation_events
        (destination, event_type, occurred_at_ms, payload_json, created_at_ms, status, waits_for, next_attempt_at_ms)
    SELECT {destination}, 'a', 1, '{{}}', i, CASE i % 7 WHEN 0 THEN 'sent' WHEN 1 THEN 'parked' ELSE 'pending' END,
        CASE i % 3 WHEN 0 THEN 'service' END, i + i % 2
    FROM generate_series(1, 20000) AS i
"""
ONE, MANY = (INSERT_ROWS.format(destination=one) for one in ("''", "'destination-' || i % 100"))
STATISTICS = {
    "of an empty table": [ANALYZE, MANY],
    "of one destination": [ONE, ANALYZE, MANY],
    "of many destinations": [MANY, ANALYZE],
}
"""What the planner may know."""


def claim(store: Store, *, is_original: bool = False) -> object:
    return store.claims.claim(
        now_ms=NOON_MS, lease_until_ms=NOON_MS + 1, batch_size=64, destination=HERE, is_original=is_original
    )


OPERATIONS: dict[str, Callable[[Store], object]] = {
    "claim": claim,
    "claim in turn": lambda store: [claim(store) for _ in range(2)],
    "claim of nothing": lambda store: store.claims.claim(
        now_ms=0, lease_until_ms=1, batch_size=64, destination=HERE
    ),
    "claim of the original": lambda store: claim(store, is_original=True),
    "revive": lambda store: store.revival.revive(HERE, now_ms=1, policy=POLICY, ended_failures=3),
    "unpark": lambda store: store.revival.unpark(HERE, now_ms=NOON_MS, limit=64, spread_ms=1),
    "unpark one": lambda store: store.revival.unpark_one(HERE, now_ms=NOON_MS, spread_ms=1),
    "retention": lambda store: store.deletion.expire(HERE, sent_before_ms=NOON_MS),
    "cap": lambda store: store.deletion.trim(POLICY, HERE, now_ms=NOON_MS),
    "bounds": lambda store: store.bounds.trim(POLICY, HERE, now_ms=NOON_MS),
    "chores": lambda store: store.views.chores(POLICY, HERE, now_ms=NOON_MS),
    "next due": lambda store: store.views.next_due_ms(HERE, now_ms=NOON_MS),
    "last accepted": lambda store: store.views.last_accepted_ms(HERE),
}


@pytest.mark.parametrize("statistics", STATISTICS)
def test_no_statement_for_one_destination_reads_the_rows_of_another(outbox: Outbox, statistics: str) -> None:
    run: list[tuple[str, str, Any]] = []
    with outbox.engine.begin() as connection:
        for statement in STATISTICS[statistics]:
            connection.execute(text(statement))
    for name, operation in OPERATIONS.items():

        def note(_connection: Any, _cursor: Any, sql: str, values: Any, *_: Any, name: str = name) -> None:
            run.append((name, sql, values))

        event.listen(outbox.engine, "before_cursor_execute", note)
        operation(outbox.store)
        event.remove(outbox.engine, "before_cursor_execute", note)
    with outbox.engine.connect() as connection:
        for name, sql, values in run:
            if "observation_events" in sql and re.match("(SELECT|UPDATE|DELETE|WITH)", sql):
                plan = [step for (step,) in connection.exec_driver_sql(f"EXPLAIN {sql}", values)]
                check(plan, name)


ALL_FRESH = """
    INSERT INTO observation_events (event_type, occurred_at_ms, payload_json, created_at_ms, next_attempt_at_ms)
    SELECT 'a', 1, repeat('x', 300), i, i FROM generate_series(1, {rows}) AS i
"""
# For the newest row id.
WALKED = "Index Only Scan Backward using observation_events_pkey"

WAITING_ALONE = """
    INSERT INTO observation_events (event_type, occurred_at_ms, payload_json, created_at_ms, waits_for, next_attempt_at_ms)
    SELECT 'a', 1, '{}', i, 'row', i + 1 FROM generate_series(1, 20000) AS i
"""
WAITING = """
    INSERT INTO observation_events (event_type, occurred_at_ms, payload_json, created_at_ms, waits_for, next_attempt_at_ms)
    SELECT 'a', 1, '{}', i, CASE i % 2 WHEN 0 THEN 'service' END, 2000000000000 + (i * 7919) % 20000
    FROM generate_series(1, 20000) AS i
"""


# Rows that come in any order make an index larger. Then the planner would rather sort.
TALL = [
    change.format(f"observation_events_{name}_idx")
    for name in ("again", "others")
    for change in ("ALTER INDEX {} SET (fillfactor = 10)", "REINDEX INDEX {}")
]


@pytest.mark.parametrize("part", [Part.FRESH, Part.NEWEST, Part.OTHERS])
def test_no_rows_that_wait_are_sorted_although_few_are_expected(outbox: Outbox, part: Part) -> None:
    search = postgresql_claims.SEARCHES[part]
    delivered = ONE.replace("CASE i % 7 WHEN 0 THEN 'sent' WHEN 1 THEN 'parked' ELSE 'pending' END", "'sent'")
    with outbox.engine.connect() as connection:  # the indexes are as before for the tests that follow
        for statement in (delivered, ANALYZE, "DELETE FROM observation_events", WAITING, *TALL):
            connection.execute(text(statement))
        transaction = Transaction(connection.exec_driver_sql, connection.dialect, {})
        postgresql_claims.read_in_order(transaction)
        for query in (search._oldest, search._first_due):
            compiled = transaction.compiled(query)
            values = compiled.arguments({"destination": "", "now": NOON_MS, "look_at": 256})
            plan = [step for (step,) in connection.exec_driver_sql(f"EXPLAIN ANALYZE {compiled.text}", values)]
            told = "\n".join(plan)
            read = [float(found) for found in re.findall(r"actual time=\S+ rows=([\d.]+)", told)]
            removed = [int(found) for found in re.findall(r"Rows Removed by Filter: (\d+)", told)]
            assert max([*read, *removed]) <= 600, told


def test_no_query_is_compiled_for_a_sort_that_is_avoided(outbox: Outbox) -> None:
    show = text("SELECT current_setting('jit'), current_setting('enable_sort')")
    with outbox.engine.begin() as connection:
        connection.execute(text("SELECT set_config('jit', 'on', false)"))
    with outbox.engine.connect() as connection:
        with connection.begin():
            postgresql_claims.read_in_order(Transaction(connection.exec_driver_sql, connection.dialect, {}))
            assert connection.execute(show).one() == ("off", "off")
        with connection.begin():
            assert connection.execute(show).one() == ("on", "on")


@pytest.mark.parametrize(
    "before",
    [
        [],
        [ALL_FRESH.format(rows=640)],
        # The index of rows that wait is tall now, so that another one looks cheaper.
        [WAITING_ALONE, "DELETE FROM observation_events WHERE created_at_ms % 500 > 0"],
    ],
    ids=["empty", "small", "emptied"],
)
def test_a_plan_that_is_kept_from_a_small_table_serves_when_the_table_has_grown(
    outbox: Outbox, before: list[str]
) -> None:
    with Outbox(outbox.engine.url) as own:
        with own.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for statement in (*before, f"VACUUM {ANALYZE}"):
                connection.execute(text(statement))
        for _ in range(3):
            claim(own.store)
            own.store.views.chores(POLICY, HERE, now_ms=NOON_MS)
            own.store.views.next_due_ms(HERE, now_ms=NOON_MS)
            own.store.views.last_accepted_ms(HERE)
            own.store.claims.settle(
                [(1, outcomes.deliver(sent_at_ms=NOON_MS))],
                lease_until_ms=1,
                created_at_ms={1: 1},
                destination=HERE,
            )
        with own.engine.begin() as connection:
            connection.execute(text(ONE))
            kept = connection.exec_driver_sql(
                "SELECT name, cardinality(parameter_types) FROM pg_prepared_statements WHERE statement ~ 'observation_events'"
            ).all()
            assert len(kept) >= 5
            for name, number in kept:
                nothing = ", ".join(["NULL"] * number)
                plan = "\n".join(connection.exec_driver_sql(f"EXPLAIN EXECUTE {name}({nothing})").scalars())
                assert re.search(r"\$\d", plan), plan
                # The query for the pause and the hold has outer joins, because a destination may have neither.
                assert not re.search(r"(Seq|Bitmap Heap) Scan on observation_events|Sort|(?<!Left )Join", plan), (
                    plan
                )
                scans = re.findall(r"(\w[\w ]*Scan .*on observation_events\b.*)\n +(\w+ Cond)?", plan)
                assert scans, plan
                assert all(condition or WALKED in scan for scan, condition in scans), plan


def check(plan: list[str], name: str) -> None:
    """Check that each index scan has a condition on the destination, unless it looks rows up by their ids."""
    told = f"{name}:\n" + "\n".join(plan)
    assert "Seq Scan on observation_events " not in told, told
    for number, step in enumerate(plan):
        walked = re.search(r"Scan (?:using|on|Backward using) (observation_events_\w+_idx)", step)
        if walked:
            condition = plan[number + 1]
            assert "destination = 'destination-7'" in condition or "(id = ANY" in condition, told
