"""The only place that reads the time."""

from datetime import datetime, timedelta, timezone

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MILLISECOND = timedelta(milliseconds=1)


def now_ms() -> int:
    """Return the time now: Unix epoch milliseconds, UTC.

    An operation reads it once and hands it down, so that all that one operation writes agrees.
    """
    return epoch_ms(datetime.now(timezone.utc))


def epoch_ms(when: datetime) -> int:
    """Return a time that has a time zone as epoch milliseconds, rounded down. Exact: no float is involved."""
    return (when - _EPOCH) // _MILLISECOND
