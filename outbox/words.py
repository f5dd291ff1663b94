"""Texts for people that the command line and the console share: times, pauses, and stored text made harmless."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from outbox.pauses import PROBE_AFTER
from outbox.reasons import in_words
from outbox.records import Pause
from outbox.stats import counted, duration

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def escape(text: str) -> str:
    """Return the text as one line, with non-printing characters as Python escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def when(ms: int, *, now_ms: int) -> str:
    """Return "2026-11-24 12:00:00 UTC (3 minutes ago)"; a stored value that is no number is shown as it is."""
    if not _is_number(ms):
        return repr(ms)
    distance = f"in {duration(ms - now_ms)}" if ms > now_ms else f"{duration(now_ms - ms)} ago"
    return f"{utc(ms)} ({distance})"


def utc(ms: int) -> str:
    """Return "2026-11-24 12:00:00 UTC"; a stored value that is no date is shown as it is."""
    if not _is_number(ms):
        return repr(ms)
    try:
        return f"{_EPOCH + timedelta(milliseconds=ms):%Y-%m-%d %H:%M:%S} UTC"
    except OverflowError:
        return f"{ms} ms since 1970"


def _is_number(stored: object) -> bool:
    # SQLite stores any value in any column.
    return isinstance(stored, int)


def pause_in_words(pause: Pause, *, now_ms: int) -> str:
    """Return what the flushers of a paused destination do now, and why."""
    why = in_words(pause.last_error)
    if pause.failures:
        why += f", {counted(pause.failures, 'failure')} in a row"
    if pause.paused_until_ms > now_ms:
        until = when(pause.paused_until_ms, now_ms=now_ms)
        return f"nothing is sent until {until}: {why}; `outbox retry` ends the pause"
    if pause.probe_until_ms > now_ms:
        until = when(pause.probe_until_ms, now_ms=now_ms)
        return (
            f"one flusher sends one event as a probe; the others wait for its result, at most until {until}: {why}"
        )
    sends = "one event as a probe" if pause.failures >= PROBE_AFTER else "a batch"
    return f"the pause is over, and the next flush sends {sends}: {why}"
