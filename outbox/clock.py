"""The only place that reads the time."""

import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MILLISECOND = timedelta(milliseconds=1)
_REREAD_AFTER_S = 10.0


def now_ms() -> int:
    """Return the time now: Unix epoch milliseconds, UTC.

    An operation reads it once and hands it down, so that all that one operation writes agrees.
    """
    return epoch_ms(datetime.now(timezone.utc))


def epoch_ms(when: datetime) -> int:
    """Return a time that has a time zone as epoch milliseconds, rounded down. Exact: no float is involved."""
    return (when - _EPOCH) // _MILLISECOND


class SharedClock:
    """The clock of a database server, which all hosts share, however wrong their own may be.

    It is read by `read_ms` at least every ten seconds; between, the time is carried on by a clock that nobody
    sets. While a test moves the time of this process, that time counts instead.
    """

    # Bound in the class: tools that freeze time replace the names in modules.
    _monotonic = staticmethod(time.monotonic)
    _system_ns = staticmethod(time.time_ns)

    def __init__(self, read_ms: Callable[[], int]) -> None:
        self._read_ms = read_ms
        self._reading: tuple[float, int] | None = None

    def now_ms(self) -> int:
        """Return the time now, in ms."""
        before_ms = self._system_ns() // 1_000_000
        local_ms = now_ms()
        if not before_ms <= local_ms <= self._system_ns() // 1_000_000:
            return local_ms
        reading = self._reading
        if reading is None or self._monotonic() - reading[0] > _REREAD_AFTER_S:
            # The time before the question: a due time is then rather too early by the answer's way than too late.
            reading = self._reading = (self._monotonic(), self._read_ms())
        asked_at, then_ms = reading
        return then_ms + int((self._monotonic() - asked_at) * 1_000)
