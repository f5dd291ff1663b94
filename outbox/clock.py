"""All clocks: the time of day, which tests may move, and a monotonic clock, which nothing moves."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from importlib.util import module_from_spec
from typing import Any

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.timezone.utc)
_REREAD_AFTER_S = 10.0


def _time_module() -> Any:
    """Return a fresh copy of the module `time`.

    Tools that freeze time replace the functions of `time`, perhaps before this module is loaded, and all names
    that refer to these functions. They don't find the functions of a copy.
    """
    spec: Any = time.__spec__
    copy = module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


_time = _time_module()

monotonic_s: Callable[[], float] = _time.monotonic
"""Return the seconds since an arbitrary moment. This clock continues while a test freezes the time. Use it for
waits, deadlines and durations: with a frozen clock, no deadline would ever pass."""

_system_ns: Callable[[], int] = _time.time_ns


def now_ms() -> int:
    """Return the current time in Unix epoch milliseconds, UTC.

    Each operation reads the time once and passes it on, so that all its writes agree.
    """
    # Each call looks the class up in its module: a name that was bound in frozen time would stay frozen.
    return epoch_ms(dt.datetime.now(dt.timezone.utc))


def epoch_ms(when: dt.datetime) -> int:
    """Convert a datetime with a time zone to epoch milliseconds, rounded down. Exact, because it uses no float."""
    since = when - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000 + since.microseconds // 1_000


LATEST_MS = 253_402_300_799_999
"""The last time that a datetime can hold: the end of the year 9999."""


def utc(ms: int) -> str:
    """Return "2026-11-24 12:00:00 UTC"; a stored value that is no date is returned as it is."""
    if not isinstance(ms, int):  # SQLite stores any value in any column
        return repr(ms)
    try:
        return f"{_EPOCH + dt.timedelta(milliseconds=ms):%Y-%m-%d %H:%M:%S} UTC"
    except OverflowError:
        return f"{ms} ms since 1970"


class SharedClock:
    """The clock of the database server, which all hosts share, so that wrong clocks of hosts don't matter.

    `read_ms` reads it at least every ten seconds; in between, the monotonic clock continues it. While a test
    freezes or moves the time of this process, the test's time applies instead.
    """

    def __init__(self, read_ms: Callable[[], int]) -> None:
        self._read_ms = read_ms
        self._reading: tuple[float, int] | None = None

    def now_ms(self) -> int:
        """Return the current time in epoch milliseconds."""
        before_ms = _system_ns() // 1_000_000
        local_ms = now_ms()
        if not before_ms <= local_ms <= _system_ns() // 1_000_000:
            return local_ms
        reading = self._reading
        if reading is None or monotonic_s() - reading[0] > _REREAD_AFTER_S:
            # Stamped before the query: latency makes rows due early, never late.
            reading = self._reading = (monotonic_s(), self._read_ms())
        asked_at, then_ms = reading
        return then_ms + int((monotonic_s() - asked_at) * 1_000)
