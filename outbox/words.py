"""Texts that the command line and the console share: times, pauses, and escaped stored text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone

from outbox.clock import epoch_ms, utc
from outbox.pauses import PROBE_AFTER
from outbox.reasons import in_words
from outbox.records import Pause
from outbox.stats import counted, duration

_EXAMPLES = "30s, 15m, 12h or 7d"
DURATIONS = f"a time such as {_EXAMPLES}"
AGES = f"an age such as {_EXAMPLES}"
MOMENTS = f"{AGES}, or a date and time with its zone such as 2026-11-24T12:00:00Z"
"""What `age_ms` and `moment_ms` understand."""

_UNIT_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_EARLIEST_MS = epoch_ms(datetime.min.replace(tzinfo=timezone.utc))
_LATEST_MS = epoch_ms(datetime.max.replace(tzinfo=timezone.utc))


def escape(text: str) -> str:
    """Return the text as one line, with non-printing characters as Python escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def facts_table(facts: Sequence[tuple[str, str]]) -> str:
    """Return a line for each fact: its name, and its text."""
    return "\n".join(f"{name:<14}{escape(text)}".rstrip() for name, text in facts)


def when(ms: int, *, now_ms: int) -> str:
    """Return "2026-11-24 12:00:00 UTC (3 minutes ago)"; a stored value that is no number is shown as it is."""
    if not isinstance(ms, int):  # SQLite stores any value in any column
        return repr(ms)
    return f"{utc(ms)} ({distance(ms, now_ms=now_ms)})"


def distance(ms: int, *, now_ms: int) -> str:
    """Return "3 minutes ago", or "in 3 minutes" for a time to come."""
    return f"in {duration(ms - now_ms)}" if ms > now_ms else f"{duration(now_ms - ms)} ago"


def exact(ms: int) -> str:
    """Return a time as a text that `moment_ms` turns into the same time."""
    return (_EPOCH + timedelta(milliseconds=ms)).isoformat(timespec="milliseconds")


def age_ms(text: str) -> int | None:
    """Return an age such as "30s" in ms, None if the text is no age."""
    age = re.fullmatch(r"([0-9]{1,6})([smhd])", text)
    return int(age.group(1)) * _UNIT_MS[age.group(2)] if age else None


def moment_ms(text: str, *, now_ms: int) -> int | None:
    """Return an age before now, or a date and time with its zone, in epoch ms. None if the text is neither.

    A time before the year 1 or after 9999 in UTC becomes the first or last one of these years, which `exact` can
    write.
    """
    moment = _moment_ms(text, now_ms=now_ms)
    return None if moment is None else min(max(moment, _EARLIEST_MS), _LATEST_MS)


def _moment_ms(text: str, *, now_ms: int) -> int | None:
    age = age_ms(text)
    if age is not None:
        return now_ms - age
    with suppress(ValueError):
        moment = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text))
        if moment.tzinfo is not None:
            return epoch_ms(moment)
    return None


def pause_in_words(pause: Pause, *, now_ms: int) -> str:
    """Return what the flushers of a paused destination do now, and why."""
    why = in_words(pause.last_error)
    if pause.failures:
        why += f", {counted(pause.failures, 'failure')} in a row"
    if pause.paused_until_ms > now_ms:
        until = when(pause.paused_until_ms, now_ms=now_ms)
        return f"nothing is sent until {until}: {why}; `outbox retry --all` ends the pause"
    if pause.probe_until_ms > now_ms:
        until = when(pause.probe_until_ms, now_ms=now_ms)
        return (
            f"one flusher sends one event as a probe; the others wait for its result, at most until {until}: {why}"
        )
    sends = "one event as a probe" if pause.failures >= PROBE_AFTER else "a batch of due events"
    return f"the pause is over, and the next flush sends {sends}: {why}"
