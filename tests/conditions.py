"""Waiting for what other threads and processes bring about, for as long as it takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# Longer than anything takes on a busy machine. Only a test that fails waits so long.
FOREVER_S = 60


def until(condition: Callable[[], object], within_s: float = 2 * FOREVER_S, *, pause_s: float = 0.001) -> None:
    """Look again and again, after a pause that grows."""
    end, wait_s = time.monotonic() + within_s, pause_s
    while not condition():
        assert time.monotonic() < end, "it never came about"
        threading.Event().wait(wait_s)
        wait_s = max(pause_s, min(1.5 * wait_s, 0.05))  # looking often would slow down what this waits for


# A test before may have left a thread that still waits for an answer.
_left_before: set[threading.Thread] = set()


def forget_earlier_threads() -> None:
    _left_before.clear()
    _left_before.update(threading.enumerate())


def worker_threads() -> list[threading.Thread]:
    """Return the threads of workers that this test started."""
    return [one for one in threading.enumerate() if one.name == "outbox-worker" and one not in _left_before]
