"""What the model's table does, in small: the storage has to do the same."""

from __future__ import annotations

import pytest

from outbox.failures import HttpFailure
from outbox.pauses import ClaimResult, SharedPause
from outbox.policy import Policy

from .model import Claim, Row, Table, Turn
from .services import MINUTE, SECOND
from .virtual_time import NOON_MS

DOWN = ClaimResult(0, 0, HttpFailure(503), is_lone_failure=False)
LATER_MS = NOON_MS + 30 * MINUTE


@pytest.fixture
def table() -> Table:
    return Table(Policy(batch_size=3))


def add(table: Table, *kinds: str | None, **columns: int | str) -> list[Row]:
    """Insert rows that are due, one for each reason to wait; None is a fresh row."""
    rows = []
    for number, waits_for in enumerate(kinds):
        row = table.insert(f"{number}", now_ms=NOON_MS - MINUTE + len(table.rows))
        row.waits_for = waits_for
        for column, value in columns.items():
            setattr(row, column, value)
        rows.append(row)
    return rows


def ids(claim: Claim) -> list[int]:
    return [row.id for row in claim.rows]


def test_claims_alternate_between_fresh_rows_and_rows_that_failed_before(table: Table) -> None:
    add(table, *["service"] * 5, *[None] * 5)
    turn = Turn()
    claims = [ids(table.claim(now_ms=NOON_MS, turn=turn)) for _ in range(5)]
    assert claims == [[6, 7, 8], [1, 2, 3], [9, 10], [4, 5], []]


def test_the_other_kind_is_taken_if_there_is_none_of_the_one(table: Table) -> None:
    add(table, *["service"] * 5)
    turn = Turn()
    assert [ids(table.claim(now_ms=NOON_MS, turn=turn)) for _ in range(2)] == [[1, 2, 3], [4, 5]]
    add(table, None)
    assert ids(table.claim(now_ms=NOON_MS, turn=turn)) == [6]


def test_rows_that_wait_for_row_come_after_the_others_that_failed_before(table: Table) -> None:
    add(table, "row", "service", "row", "proof")
    assert ids(table.claim(now_ms=NOON_MS, turn=Turn())) == [2, 4, 1]


def test_a_row_whose_senders_died_twice_is_claimed_alone(table: Table) -> None:
    add(table, None, None, None)
    for number in (1, 2):
        assert ids(table.claim(now_ms=NOON_MS + number * MINUTE, turn=Turn())) == [1, 2, 3]
    assert [table.rows[row_id].lost_leases for row_id in (1, 2, 3)] == [1, 1, 1]
    alone = [ids(table.claim(now_ms=NOON_MS + 3 * MINUTE, turn=Turn())) for _ in range(3)]
    assert alone == [[1], [2], [3]]


def test_a_row_whose_senders_died_twice_is_left_out_of_the_claim_of_older_rows(table: Table) -> None:
    add(table, None)
    add(table, None, status="sending", lost_leases=1)
    add(table, None)
    assert ids(table.claim(now_ms=NOON_MS, turn=Turn())) == [1, 3]
    assert ids(table.claim(now_ms=NOON_MS, turn=Turn())) == [2]


def test_nothing_is_claimed_during_a_pause(table: Table) -> None:
    add(table, None)
    table.pause = SharedPause(1, 1, NOON_MS + SECOND)
    assert table.claim(now_ms=NOON_MS, turn=Turn()) == Claim(paused_until_ms=NOON_MS + SECOND)
    assert ids(table.claim(now_ms=NOON_MS + SECOND, turn=Turn())) == [1]


def test_probes_are_one_row_the_newest_fresh_and_the_oldest_failed_in_turn(table: Table) -> None:
    add(table, "row", "service", None, None)
    table.pause = SharedPause(3, 3)
    probed, now_ms = [], NOON_MS
    for _ in range(3):
        claim = table.claim(now_ms=now_ms, turn=Turn())
        probed += ids(claim)
        assert table.claim(now_ms=now_ms, turn=Turn()).paused_until_ms == claim.lease_until_ms
        table.end_claim(
            lambda pause, claim=claim, now_ms=now_ms: pause.when_done(
                DOWN,
                seen=claim.seen_pause,
                probe_lease_ms=claim.lease_until_ms,
                now_ms=now_ms,
                policy=table.policy,
            )
        )
        now_ms += 20 * SECOND
    assert probed == [4, 2, 3]


def test_the_result_of_a_probe_is_waited_for_until_its_lease_ends(table: Table) -> None:
    add(table, None, None)
    table.pause = SharedPause(3, 3)
    assert ids(table.claim(now_ms=NOON_MS, turn=Turn())) == [2]
    assert table.claim(now_ms=NOON_MS + MINUTE - 1, turn=Turn()).rows == ()
    assert table.claim(now_ms=NOON_MS + MINUTE, turn=Turn()).is_probe


def test_a_success_revives_the_oldest_rows_that_are_due_later() -> None:
    table = Table(Policy(revive_limit=2))
    add(table, "service", "delay", "row", "service", "service", next_attempt_at_ms=LATER_MS)
    add(table, "service", next_attempt_at_ms=NOON_MS + 5 * SECOND)
    table.revive(now_ms=NOON_MS, ended_failures=2)
    due = [row.next_attempt_at_ms for row in table.rows.values()]
    assert due == [NOON_MS + 1, LATER_MS, LATER_MS, NOON_MS + 4, LATER_MS, NOON_MS + 5 * SECOND]
    table.revive(now_ms=NOON_MS, ended_failures=3)
    assert [table.rows[row_id].next_attempt_at_ms for row_id in (2, 3, 5)] == [LATER_MS, NOON_MS + 3, NOON_MS + 5]


def test_a_success_brings_suspects_forward_and_makes_those_due_that_can_be_proven(table: Table) -> None:
    add(table, "proof", next_attempt_at_ms=LATER_MS, suspected_at_ms=NOON_MS - MINUTE)
    add(table, "proof", next_attempt_at_ms=LATER_MS, suspected_at_ms=NOON_MS - 10 * MINUTE)
    add(table, "proof", next_attempt_at_ms=NOON_MS + 2 * MINUTE, suspected_at_ms=NOON_MS - MINUTE)
    table.revive(now_ms=NOON_MS, ended_failures=0)
    assert [row.next_attempt_at_ms - NOON_MS for row in table.rows.values()] == [MINUTE + 1, 2, 2 * MINUTE]


def test_one_parked_row_a_minute_is_tried_in_turn(table: Table) -> None:
    for row in add(table, None, None, None):
        row.status = "parked"
        table._parked[row.id] = table._queued.pop(row.id)
    tried = []
    for second in (0, 59, 60, 120, 180):
        table.unpark_one(now_ms=NOON_MS + second * SECOND)
        for row in list(table._queued.values()):
            tried.append((second, row.id))
            row.status = "parked"
            table._parked[row.id] = table._queued.pop(row.id)
    assert tried == [(0, 1), (60, 2), (120, 3), (180, 1)]
