"""How many rows there are, without counting them each time."""

from __future__ import annotations

from math import inf

from outbox.clock import monotonic_s

_LONGEST_AGE_S = 5.0
_MOST_ENQUEUES = 1_000
# In percent of `max_undelivered`: where a warning is logged, and shown by `status` and `doctor`.
_LEVELS = {90: "nine tenths", 50: "half"}


class Count:
    """A number of rows: those that were counted, and what this process has changed since.

    Threads share it without a lock. A change that is lost makes the number wrong only until the next count.
    """

    def __init__(self, *, most_added: float = inf) -> None:
        self.rows = 0
        self._most_added = most_added
        self._added: float = inf  # not counted yet
        self._counted_s = 0.0

    def is_stale(self) -> bool:
        """Return whether to count again: other processes change the number, too."""
        return self._added >= self._most_added or monotonic_s() - self._counted_s >= _LONGEST_AGE_S

    def set(self, rows: int) -> None:
        """Replace the number by one that was counted now."""
        self.rows, self._added, self._counted_s = rows, 0, monotonic_s()

    def add(self, rows: int) -> None:
        """Change the number without a count. A negative number means removed rows."""
        self.rows += rows
        self._added += max(0, rows)


class Counts:
    """The numbers of delivered and of undelivered rows of a destination."""

    def __init__(self) -> None:
        self.sent = Count()
        self.undelivered = Count(most_added=_MOST_ENQUEUES)
        self.told_of = 0
        """The part of `max_undelivered` that was logged last, in percent."""

    def delivered(self, rows: int) -> None:
        """Move rows from the undelivered ones to the delivered ones."""
        self.sent.add(rows)
        self.undelivered.add(-rows)


def filling(undelivered: int, at_most: int | None) -> int:
    """Return the part of the bound that is reached, in percent: 90, 50, or 0 for less than half or no bound."""
    reached = undelivered * 100 // at_most if at_most else 0
    for level in _LEVELS:
        if reached >= level:
            return level
    return 0


def filling_in_words(undelivered: int, at_most: int | None) -> str | None:
    """Return "500 undelivered events, half of max_undelivered (1000) or more", or None for less than half."""
    level = filling(undelivered, at_most)
    if not level:
        return None
    return f"{undelivered} undelivered events, {_LEVELS[level]} of max_undelivered ({at_most}) or more"
