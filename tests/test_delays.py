import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.delays import backoff, jitter, longest_backoff


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (-1, 60_000),
        (0, 60_000),
        (1, 120_000),
        (2, 240_000),
        (3, 480_000),
        (4, 960_000),
        (5, 1_920_000),
        (6, 1_920_000),
        (2**40, 1_920_000),
    ],
)
def test_backoff(count: int, expected: int) -> None:
    assert backoff(count) == expected


@pytest.mark.parametrize(("count", "expected"), [(-1, 9), (0, 9), (1, 9), (2, 5), (3, 7), (4, 7), (2**40, 7)])
def test_a_schedule_names_each_delay_and_repeats_the_last(count: int, expected: int) -> None:
    assert backoff(count, (9, 5, 7)) == expected


@pytest.mark.parametrize(("backoff_ms", "longest"), [(60_000, 1_920_000), (1, 32), ((9, 5, 7), 9), ((4,), 4)])
def test_no_backoff_is_longer_than_the_longest(backoff_ms, longest) -> None:
    assert longest_backoff(backoff_ms) == longest == max(backoff(count, backoff_ms) for count in range(9))


@pytest.mark.parametrize(
    ("base", "seed", "expected"),
    [(120_000, 31_234, 1_234), (40_000, 9_999, 9_999), (40_000, 10_000, 0), (3, 99, 0), (0, 99, 0), (-8, 7, 0)],
)
def test_jitter(base: int, seed: int, expected: int) -> None:
    assert jitter(base, seed) == expected


@given(base=st.integers(-(2**63), 2**63), seed=st.integers(-(2**63), 2**64))
def test_jitter_is_never_negative_and_below_a_quarter(base: int, seed: int) -> None:
    assert 0 <= jitter(base, seed) < max(1, base // 4)
