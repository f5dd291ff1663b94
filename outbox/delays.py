"""Delays: the backoff of a row, and its jitter.

This module does no I/O and reads no clock.
"""

from __future__ import annotations

_MAX_DOUBLINGS = 5


def backoff(retry_count: int, backoff_ms: int | tuple[int, ...] = 60_000) -> int:
    """Return the delay in ms after `retry_count` transient failures.

    A number is the unit: unit * 2^min(max(count, 0), 5). With the default unit: 0 → 60 000, 1 → 120 000,
    2 → 240 000, 3 → 480 000, 4 → 960 000, 5 and more → 1 920 000. A tuple holds the delays after the first
    failure, the second, and so on; the last one repeats.
    """
    if isinstance(backoff_ms, tuple):
        return backoff_ms[min(max(retry_count, 1), len(backoff_ms)) - 1]
    return int(backoff_ms << min(max(retry_count, 0), _MAX_DOUBLINGS))


def longest_backoff(backoff_ms: int | tuple[int, ...]) -> int:
    """Return the longest delay in ms that `backoff` can return."""
    return max(backoff_ms) if isinstance(backoff_ms, tuple) else backoff(_MAX_DOUBLINGS, backoff_ms)


def jitter(base_ms: int, seed: int) -> int:
    """Return a value from 0 to a quarter of `base_ms`. It depends only on the seed, so tests know the value."""
    return seed % max(1, base_ms // 4)
