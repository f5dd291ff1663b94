"""Servers find the first due rows, whatever lies before them, and without a walk past the rows that wait."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import delete, event, insert, select, text

from builders import NOON_MS
from outbox import ObservationEvent, Outbox
from outbox.storage import due_rows
from outbox.storage.claimed import Kind, Wanted
from outbox.storage.transactions import Transaction

pytestmark = pytest.mark.servers

LATER_MS = NOON_MS + 3_600_000
LIMIT = 4 * 3
"""How many rows a claim of three looks at first."""


def fill(outbox: Outbox, rows: list[dict[str, Any]]) -> None:
    common = {"event_type": "a", "occurred_at_ms": 1, "payload_json": "{}", "status": "pending"}
    with outbox.engine.begin() as connection:
        connection.execute(delete(ObservationEvent))
        connection.execute(insert(ObservationEvent), [{**common, "waits_for": None, **one} for one in rows])


def claim(outbox: Outbox, kind: Kind, at_most: int = 3, *, is_newest: bool = False) -> list[int]:
    """Claim rows, and return their creation times."""
    wanted = Wanted("", NOON_MS, NOON_MS + 60_000, at_most, "id", is_newest=is_newest)
    claims = outbox.store.claims
    claimed = claims._writer.run(lambda transaction: claims._dialect.claim(transaction, kind, wanted))
    return [found.created_at_ms for found in claimed.rows]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.traced
def test_a_claim_takes_the_first_rows_of_its_kind_that_are_due(outbox: Outbox, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - a test
    rarely = chance.choice([0.05, 0.3, 0.95])
    rows = [
        {
            "created_at_ms": NOON_MS - 1_000 + number,
            "status": "sending" if chance.random() < 0.1 else "pending",
            "waits_for": chance.choice([None, None, None, "service", "delay", "proof", "row"]),
            "next_attempt_at_ms": NOON_MS - 1_000 + chance.choice([number, number + 5])
            if chance.random() < rarely
            else LATER_MS + chance.randrange(9),
        }
        for number in range(60)
    ]
    due = [one for one in rows if one["next_attempt_at_ms"] <= NOON_MS]
    fresh = [one["created_at_ms"] for one in due if one["waits_for"] is None]
    failed = sorted(
        (one["waits_for"] == "row", one["created_at_ms"]) for one in due if one["waits_for"] is not None
    )
    at_most = chance.randint(1, 4)
    for kind, expected in (
        (Kind.FRESH, fresh),
        (Kind.FAILED, [created for _, created in failed]),
        (Kind.ANY, [one["created_at_ms"] for one in due]),
    ):
        fill(outbox, rows)
        assert claim(outbox, kind, at_most) == expected[:at_most]
    fill(outbox, rows)
    assert claim(outbox, Kind.FRESH, 1, is_newest=True) == fresh[-1:]


def scheduled(number: int, *, due: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "created_at_ms": created,
            "next_attempt_at_ms": NOON_MS - 1 if created < due else LATER_MS,
        }
        for created in range(number)
    ]


@contextmanager
def reads(outbox: Outbox) -> Iterator[list[str]]:
    """The statements for the first rows, as these are found."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "kind" in statement:
            seen.append(statement)

    event.listen(outbox.engine, "before_cursor_execute", note)
    yield seen
    event.remove(outbox.engine, "before_cursor_execute", note)


@pytest.mark.parametrize(("due", "statements"), [(0, 2), (LIMIT, 1), (1, 2)])
def test_no_claim_walks_past_the_rows_that_wait_for_their_time(outbox: Outbox, due: int, statements: int) -> None:
    """The third statement would walk: it is needed only if many rows are due behind many that are not."""
    fill(
        outbox, [*scheduled(5 * LIMIT, due=due), {"created_at_ms": NOON_MS - 7, "next_attempt_at_ms": NOON_MS - 7}]
    )
    with reads(outbox) as seen:
        assert claim(outbox, Kind.FRESH) == [*range(due), NOON_MS - 7][:3]
    assert len(seen) in {statements, 0}  # PostgreSQL's first statement may suffice


def test_rows_behind_those_that_others_claim_are_found(outbox: Outbox) -> None:
    fill(outbox, scheduled(5 * LIMIT, due=4 * LIMIT))
    with outbox.engine.connect() as connection:
        older = select(ObservationEvent.id).where(ObservationEvent.created_at_ms < 2 * LIMIT)
        ids = connection.scalars(older).all()

    def hold(transaction: Transaction) -> list[int]:
        assert len(transaction.rows_of(due_rows.LOCK_ROWS_IF_DUE, ids, now=NOON_MS)) == 2 * LIMIT
        return claim(outbox, Kind.FRESH)

    assert outbox.store.claims._writer.run(hold) == [2 * LIMIT, 2 * LIMIT + 1, 2 * LIMIT + 2]


def test_the_condition_that_a_row_is_due_is_compared_again_under_the_lock(outbox: Outbox) -> None:
    fill(outbox, scheduled(3, due=3))
    with outbox.engine.begin() as connection:
        row_id = connection.scalar(select(ObservationEvent.id).limit(1))
        connection.execute(
            text(f"UPDATE observation_events SET next_attempt_at_ms = {LATER_MS} WHERE id = {row_id}")
        )
    locked = outbox.store.claims._writer.run(
        lambda transaction: transaction.rows_of(due_rows.LOCK_ROWS_IF_DUE, [row_id], now=NOON_MS)
    )
    assert locked == []
