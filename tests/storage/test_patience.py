"""Waits between the tries of an operation."""

from __future__ import annotations

import pytest

from outbox.storage import patience


@pytest.mark.parametrize("patience_ms", [1, 700, 2_000, 5_000, 30_000])
def test_the_last_try_is_made_when_the_patience_is_over(monkeypatch: pytest.MonkeyPatch, patience_ms: int) -> None:
    now_s = 1_000.0
    monkeypatch.setattr(patience, "monotonic_s", lambda: now_s)
    for wait_s in patience.waits_s(patience_ms):
        assert 0 < wait_s <= 3
        now_s += wait_s
    assert now_s == pytest.approx(1_000 + patience_ms / 1_000)


def test_without_patience_nothing_is_repeated() -> None:
    assert list(patience.waits_s(0)) == []
