"""How long a worker waits before it looks at the queue again.

This module does no I/O and reads no clock.
"""

from __future__ import annotations

from typing import NamedTuple

from outbox.delays import jitter

_SHORTEST_POLL_MS = 100
_LONGEST_WAIT_MS = 20_000
# With the jitter, the longest backoff is the longest wait.
_SHORTEST_BACKOFF_MS, _LONGEST_BACKOFF_MS = 1_000, 16_000


class Look(NamedTuple):
    """What a worker saw when it looked at the queue."""

    goes_on: bool = False
    """Whether to claim again at once: a row was accepted or proven bad, or the claim was a lone failure."""
    paused_until_ms: int | None = None
    """When the hold or the pause of the destination, or the probe of another flusher, ends."""
    next_due_ms: int | None = None
    """When the next row is due, if no row was due."""
    has_failed: bool = False
    """Whether the claim failed, or the look itself did, and no pause says how long to wait."""


def wait_ms(look: Look, *, rounds: int, poll_interval_ms: int, now_ms: int) -> int:
    """Return how long to wait after a look at the queue, in ms.

    `rounds` is the number of looks before this one with the same result.

    - `look.goes_on`: 0.
    - A hold or a pause: until its end, but at most the poll interval: an operator or another flusher may end it.
    - A failure without a pause: 1 s, doubled up to 16 s, plus a jitter of up to a quarter.
    - Nothing due: until a row is due, but at most 100 ms, doubled up to the poll interval.

    An enqueue ends the wait. The poll interval counts as 20 s at most.
    """
    longest_ms = min(poll_interval_ms, _LONGEST_WAIT_MS)
    doubled = 1 << min(rounds, 20)
    if look.goes_on:
        return 0
    if look.paused_until_ms is not None:
        return min(max(look.paused_until_ms - now_ms, 0), longest_ms)
    if look.has_failed:
        backoff_ms = min(_SHORTEST_BACKOFF_MS * doubled, _LONGEST_BACKOFF_MS)
        return backoff_ms + jitter(backoff_ms, now_ms)
    wait = min(_SHORTEST_POLL_MS * doubled, longest_ms)
    if look.next_due_ms is not None and look.next_due_ms > now_ms:
        wait = min(wait, look.next_due_ms - now_ms)
    return wait
