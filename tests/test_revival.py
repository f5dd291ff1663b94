import pytest

from outbox.policy import Policy
from outbox.revival import due_range, is_young
from rule_builders import MINUTE, NOON_MS, SECOND

POLICY = Policy()


@pytest.mark.parametrize(("row_id", "delay_ms"), [(1, 1), (4_999, 4_999), (5_000, 0), (12_345, 2_345)])
def test_rows_are_brought_back_spread_by_their_ids(row_id: int, delay_ms: int) -> None:
    assert due_range(now_ms=NOON_MS, policy=POLICY).due_ms(row_id) == NOON_MS + delay_ms


@pytest.mark.parametrize(("row_id", "delay_ms"), [(0, 60_000), (59_999, 119_999), (60_001, 60_001)])
def test_a_young_suspect_is_tried_in_one_to_two_minutes(row_id: int, delay_ms: int) -> None:
    assert due_range(now_ms=NOON_MS, policy=POLICY, is_young=True).due_ms(row_id) == NOON_MS + delay_ms


def test_a_suspect_is_young_until_it_can_be_proven() -> None:
    assert is_young(NOON_MS - 10 * MINUTE + 1, now_ms=NOON_MS, policy=POLICY)
    assert not is_young(NOON_MS - 10 * MINUTE, now_ms=NOON_MS, policy=POLICY)


def test_rows_that_are_due_soon_anyway_are_left_alone() -> None:
    assert due_range(now_ms=NOON_MS, policy=POLICY).end_ms == NOON_MS + 5 * SECOND
    assert due_range(now_ms=NOON_MS, policy=POLICY, is_young=True).end_ms == NOON_MS + 2 * MINUTE
