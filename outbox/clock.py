"""The only place that reads the time."""

import time


def now_ms() -> int:
    """Return the time now: Unix epoch milliseconds, UTC.

    An operation reads it once and hands it down, so that all that one operation writes agrees.
    """
    return time.time_ns() // 1_000_000
