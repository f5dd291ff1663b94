"""Fresh rows are claimed by one query, if it finds the same rows as an ordinary claim."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event

from builders import NOON_MS, ScriptedClient, add_row, rule_fired
from outbox import Outbox, Policy

pytestmark = pytest.mark.servers("mariadb")

LATER_MS = NOON_MS + 3_600_000


def claimed(outbox: Outbox, at_most: int = 2) -> tuple[list[int], int]:
    """Claim rows; return their ids, and the number of statements."""
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    claims = outbox.store.claims
    claims._identity.outbox_id(lambda query: claims._writer.run(lambda transaction: transaction.value(query)))
    claims.take_turns(is_any_failed=False)
    event.listen(outbox.engine, "before_cursor_execute", note)
    found = claims.claim(now_ms=NOON_MS, lease_until_ms=LATER_MS, batch_size=at_most)
    event.remove(outbox.engine, "before_cursor_execute", note)
    return [row.id for row in found.rows], len(statements)


def fresh(outbox: Outbox, created_at_ms: int, *, due_at_ms: int = NOON_MS, **columns: Any) -> int:
    return add_row(outbox, created_at_ms=created_at_ms, next_attempt_at_ms=due_at_ms, **columns)


def test_a_full_batch_takes_two_statements(outbox: Outbox) -> None:
    third, first, _, second = (fresh(outbox, created) for created in (30, 10, 40, 20))
    assert claimed(outbox, 3) == ([first, second, third], 2)


def test_a_batch_that_is_not_full_takes_three_statements(outbox: Outbox) -> None:
    ids = [fresh(outbox, created) for created in (2, 3)]
    fresh(outbox, 1, due_at_ms=LATER_MS)
    assert claimed(outbox, 3) == (ids, 3)


def test_rows_that_are_not_due_are_left_out(outbox: Outbox) -> None:
    first, _, second = (fresh(outbox, at, due_at_ms=due) for at, due in ((1, 1), (2, LATER_MS), (3, 3)))
    assert claimed(outbox) == ([first, second], 2)


def test_full_batches_behind_many_rows_that_wait_are_found(outbox: Outbox) -> None:
    for _ in range(8):
        fresh(outbox, 1, due_at_ms=LATER_MS)
    ids = [fresh(outbox, created) for created in (2, 3)]
    found, statements = claimed(outbox)
    assert found == ids
    assert statements > 2


def test_due_rows_behind_the_oldest_rows_fill_a_batch(outbox: Outbox) -> None:
    for _ in range(7):
        fresh(outbox, 1, due_at_ms=LATER_MS)
    ids = [fresh(outbox, created) for created in (2, 3)]
    assert claimed(outbox)[0] == ids


def test_a_row_whose_lease_ran_out_has_its_turn(outbox: Outbox) -> None:
    _, second = (fresh(outbox, created) for created in (3, 2))
    first = fresh(outbox, 1, status="sending")
    assert claimed(outbox)[0] == [first, second]


def test_rows_under_a_lease_do_not_hide_a_full_batch(outbox: Outbox) -> None:
    for _ in range(9):
        fresh(outbox, 1, status="sending", due_at_ms=LATER_MS)
    ids = [fresh(outbox, created) for created in (2, 3)]
    assert claimed(outbox) == (ids, 2)


def test_the_claim_tells_the_number_of_the_last_pause(outbox: Outbox) -> None:
    outbox.store.pauses.change("", lambda pause: pause._replace(number=7))
    for created in (1, 2):
        fresh(outbox, created)
    claim = outbox.store.claims.claim(now_ms=NOON_MS, lease_until_ms=LATER_MS, batch_size=2)
    assert (len(claim.rows), claim.pause.number) == (2, 7)


def test_a_large_batch_is_claimed_and_delivered_by_lists_of_500(outbox: Outbox) -> None:
    """A statement that lists a thousand rows would read all of them."""
    ids = outbox.enqueue_many([rule_fired()] * 1_001)
    texts: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE observation_events"):
            texts.append(statement)

    outbox.policy = Policy(batch_size=1_001)
    event.listen(outbox.engine, "before_cursor_execute", note)
    assert outbox.flush(ScriptedClient()).sent == len(ids)
    assert len(texts) == 2 * 3


@pytest.mark.parametrize("number", [1, 2, 501])
def test_a_claim_and_a_delivery_read_only_their_rows(outbox: Outbox, number: int) -> None:
    changes: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if statement.startswith("UPDATE observation_events"):
            changes.append((statement, values))

    outbox.policy = Policy(batch_size=501)
    outbox.enqueue_many([rule_fired()] * 600, not_before=2**52)
    outbox.enqueue_many([rule_fired()] * number)
    event.listen(outbox.engine, "before_cursor_execute", note)
    assert outbox.flush(ScriptedClient()).sent == number
    event.remove(outbox.engine, "before_cursor_execute", note)
    with outbox.engine.connect() as connection:
        read = [
            connection.exec_driver_sql(f"EXPLAIN {statement}", values).mappings().one()["rows"]
            for statement, values in changes
        ]
    assert sum(map(int, read)) <= 2 * number
