"""Waiting for what other threads and processes bring about, for as long as it takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

FOREVER_S = 30


def until(condition: Callable[[], object], within_s: float = 2 * FOREVER_S) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it never came about"
        threading.Event().wait(0.002)


def worker_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "outbox-worker"]
