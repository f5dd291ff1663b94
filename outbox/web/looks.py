"""The numbers of the overview over time. All requests share them, so that many readers cost no more than one."""

from __future__ import annotations

from collections import deque
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from outbox import stats
from outbox.clock import monotonic_s
from outbox.lifecycle import Status

if TYPE_CHECKING:
    from outbox.outbox import Outbox
    from outbox.stats import Stats

FRESH_S = 1.0
"""The queue is read again after this time at the earliest."""

_PART_OF_TIME = 10
"""Reading may take a tenth of the time, so that a large queue is read less often."""

_RATE_S = 60.0
_LONGEST_GAP_S = 60.0
_MOST_POINTS = 120


class Point(NamedTuple):
    """The sums at one moment. Deleted events count, so only `depth` can fall."""

    at_s: float
    depth: int
    enqueued: int
    sent: int


class Look(NamedTuple):
    """The queue at one moment."""

    stats: Stats
    now_ms: int
    enqueued_per_s: float | None
    """None if there is no earlier look to compare with."""
    sent_per_s: float | None
    over_s: float
    """The time that the rates cover."""
    points: tuple[Point, ...]
    """This look and those before it, the oldest first."""


class Looks:
    """Reads the queue when somebody looks, at most once a second.

    `with_bodies` keeps the bodies of answers in the texts of failures.
    """

    def __init__(self, outbox: Outbox, *, with_bodies: bool) -> None:
        self._outbox = outbox
        self._with_bodies = with_bodies
        self._lock = Lock()
        self._points: deque[Point] = deque(maxlen=_MOST_POINTS)
        self._latest: Look | None = None
        self._fresh_until_s = 0.0

    def look(self) -> Look:
        """Return the queue as it was at most a second ago, or longer ago if it is slow to read."""
        with self._lock:
            began_s = monotonic_s()
            if self._latest is None or began_s >= self._fresh_until_s:
                self._latest = self._read(began_s)
                took_s = monotonic_s() - began_s
                self._fresh_until_s = began_s + took_s + max(FRESH_S, _PART_OF_TIME * took_s)
            return self._latest

    def latest(self) -> Stats | None:
        """Return the queue as it was at the last look, however long ago. Reads nothing."""
        return None if self._latest is None else self._latest.stats

    def forget(self) -> None:
        """Read the queue again at the next look, because it was changed."""
        self._fresh_until_s = 0.0

    def _read(self, at_s: float) -> Look:
        now_ms = self._outbox.store.now_ms()
        seen = stats.gather(self._outbox.store, self._outbox.policy, now_ms=now_ms, with_bodies=self._with_bodies)
        if self._points and at_s - self._points[-1].at_s > _LONGEST_GAP_S:
            self._points.clear()
        point = _point(seen, at_s)
        self._points.append(point)
        first = next(one for one in self._points if one.at_s >= at_s - _RATE_S)
        over_s = at_s - first.at_s
        enqueued, sent = point.enqueued - first.enqueued, point.sent - first.sent
        return Look(
            seen,
            now_ms,
            enqueued / over_s if over_s else None,
            sent / over_s if over_s else None,
            over_s,
            tuple(self._points),
        )


def _point(seen: Stats, at_s: float) -> Point:
    deleted = sum(entry.events for entry in seen.deleted)
    deleted_sent = sum(entry.events for entry in seen.deleted if entry.status == Status.SENT)
    return Point(
        at_s,
        depth=seen.counts[Status.PENDING] + seen.counts[Status.SENDING],
        enqueued=sum(seen.counts.values()) + deleted,
        sent=seen.counts[Status.SENT] + deleted_sent,
    )
