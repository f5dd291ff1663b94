import pytest

from outbox.waits import Look, wait_ms
from rule_builders import MINUTE, NOON_MS, SECOND

NOTHING_DUE = Look()
FAILED = Look(has_failed=True)


@pytest.mark.parametrize(
    ("look", "rounds", "expected_ms"),
    [
        (Look(goes_on=True), 0, 0),
        (Look(goes_on=True), 9, 0),
        (Look(paused_until_ms=NOON_MS + 300), 0, 300),
        (Look(paused_until_ms=NOON_MS + 5 * MINUTE), 3, 5 * SECOND),
        (Look(paused_until_ms=NOON_MS - 1), 0, 0),
        (NOTHING_DUE, 0, 100),
        (NOTHING_DUE, 3, 800),
        (NOTHING_DUE, 99, 5 * SECOND),
        (Look(next_due_ms=NOON_MS + 30), 0, 30),
        (Look(next_due_ms=NOON_MS + 30), 9, 30),
        (Look(next_due_ms=NOON_MS + MINUTE), 99, 5 * SECOND),
        (Look(next_due_ms=NOON_MS - 1), 0, 100),
        (FAILED, 0, 1 * SECOND + NOON_MS % 250),
        (FAILED, 3, 8 * SECOND + NOON_MS % 2_000),
        (FAILED, 99, 16 * SECOND + NOON_MS % 4_000),
    ],
)
def test_how_long_a_worker_waits(look: Look, rounds: int, expected_ms: int) -> None:
    assert wait_ms(look, rounds=rounds, poll_interval_ms=5 * SECOND, now_ms=NOON_MS) == expected_ms


@pytest.mark.parametrize("look", [NOTHING_DUE, Look(paused_until_ms=NOON_MS + MINUTE)])
def test_no_worker_waits_longer_than_20_seconds_before_it_looks_again(look: Look) -> None:
    assert wait_ms(look, rounds=99, poll_interval_ms=MINUTE, now_ms=NOON_MS) == 20 * SECOND


def test_a_worker_that_keeps_failing_looks_again_within_20_seconds() -> None:
    longest = max(wait_ms(FAILED, rounds=99, poll_interval_ms=MINUTE, now_ms=now_ms) for now_ms in range(4_000))
    assert longest == 20 * SECOND - 1
