import time
from datetime import timedelta

import pytest
from freezegun import freeze_time
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import NOON, NOON_MS
from outbox.clock import now_ms


def test_the_time_is_the_systems() -> None:
    before = time.time_ns() // 1_000_000
    now = now_ms()
    assert before <= now <= time.time_ns() // 1_000_000


@pytest.mark.parametrize("offset_ms", [0, 1, 230, 231, 999, 1_001, 86_399_999])
def test_a_frozen_time_is_exact_to_the_millisecond(offset_ms: int) -> None:
    with freeze_time(NOON + timedelta(milliseconds=offset_ms)):
        assert now_ms() == NOON_MS + offset_ms


@settings(deadline=None)
@given(st.integers(0, 10**9))
def test_a_part_of_a_millisecond_is_left_out(microseconds: int) -> None:
    with freeze_time(NOON + timedelta(microseconds=microseconds)):
        assert now_ms() == NOON_MS + microseconds // 1_000
