"""`outbox status --watch`: the depth of the queue and its rates over time, read from the database."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.live import Live
from rich.text import Text

from outbox.cli.display import as_json, encodable, say, status_as_dict, status_in_words
from outbox.clock import monotonic_s, now_ms, utc
from outbox.lifecycle import Status
from outbox.outbox import Outbox
from outbox.stats import Stats, duration

_LABEL_WIDTH = 10
_NUMBER_WIDTH = 12
_MOST_LOOKS = 1_000
_BARS = " ▁▂▃▄▅▆▇█"
_BARS_IN_ASCII = " .:-=+*#@"

Curves = dict[str, deque[float]]

_sleep = time.sleep


class Look(NamedTuple):
    """The queue at one moment. The rates are None in the first look."""

    stats: Stats
    depth: int
    """Number of pending and sending events."""
    enqueued_per_s: float | None
    sent_per_s: float | None


def watch(outbox: Outbox, database: str, *, interval_s: int, in_json: bool) -> None:
    """Show the queue every `interval_s` seconds, until an interrupt. Curves are drawn only on a terminal."""
    looks = _looks(outbox, interval_s)
    if in_json:
        for look in looks:  # pragma: no branch - only an interrupt ends it
            rates = {"enqueued_per_s": look.enqueued_per_s, "sent_per_s": look.sent_per_s}
            say(as_json({**status_as_dict(look.stats, database), **rates}))
    elif sys.stdout.isatty():
        _draw(looks, database, f"every {duration(interval_s * 1_000)}, Ctrl-C stops")
    else:
        for look in looks:  # pragma: no branch - only an interrupt ends it
            say(_line(look))


def _looks(outbox: Outbox, interval_s: int) -> Iterator[Look]:
    before: tuple[float, int, int] | None = None
    while True:
        looked_s, stats = monotonic_s(), outbox.stats()
        # With the deleted events of the ledger, both sums only grow, and each event counts once.
        sent = stats.counts[Status.SENT]
        sent += sum(entry.events for entry in stats.deleted if entry.status == Status.SENT)
        enqueued = sum(stats.counts.values()) + sum(entry.events for entry in stats.deleted)
        depth = stats.counts[Status.PENDING] + stats.counts[Status.SENDING]
        if before is None:
            yield Look(stats, depth, None, None)
        else:
            passed_s = looked_s - before[0]
            yield Look(stats, depth, (enqueued - before[1]) / passed_s, (sent - before[2]) / passed_s)
        before = looked_s, enqueued, sent
        _sleep(interval_s)


def _line(look: Look) -> str:
    counts = ", ".join(f"{count} {status}" for status, count in look.stats.counts.items())
    line = f"{utc(now_ms())}: {counts}"
    if look.enqueued_per_s is not None:
        line += f"; {look.enqueued_per_s:.1f} enqueued/s, {look.sent_per_s:.1f} sent/s"
    return line


def _draw(looks: Iterator[Look], database: str, caption: str) -> None:
    console = Console()
    curves: Curves = {name: deque(maxlen=_MOST_LOOKS) for name in ("depth", "enqueued", "sent")}
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for look in looks:  # pragma: no branch - only an interrupt ends it
            values = (look.depth, look.enqueued_per_s or 0, look.sent_per_s or 0)
            for curve, value in zip(curves.values(), values, strict=True):
                curve.append(value)
            drawn = draw_curves(look, curves, width=console.width, encoding=console.encoding)
            words = status_in_words(look.stats, database, now_ms=now_ms())
            live.update(Text(encodable(f"{drawn}\n{caption}\n\n{words}", console.encoding)), refresh=True)


def draw_curves(look: Look, curves: Curves, *, width: int, encoding: str) -> str:
    """Return one line for each number of the look, with its curve, cut to the width."""
    numbers = (f"{look.depth}", _rate(look.enqueued_per_s), _rate(look.sent_per_s))
    room = max(1, width - _LABEL_WIDTH - _NUMBER_WIDTH - 2)
    return "\n".join(
        f"{name:<{_LABEL_WIDTH}}{number:>{_NUMBER_WIDTH}}  {sparkline([*curve][-room:], encoding)}"
        for (name, curve), number in zip(curves.items(), numbers, strict=True)
    )


def _rate(per_s: float | None) -> str:
    return "" if per_s is None else f"{per_s:.1f}/s"


def sparkline(values: Sequence[float], encoding: str) -> str:
    """Return numbers as a line of bars, scaled to the largest. Only 0 is blank."""
    bars = _BARS if encodable(_BARS, encoding) == _BARS else _BARS_IN_ASCII
    top = max(values) or 1
    return "".join(bars[math.ceil(value / top * (len(bars) - 1))] for value in values)
