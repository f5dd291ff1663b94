"""When waiting rows become due because their destination accepted another row.

This module does no I/O and reads no clock.
"""

from __future__ import annotations

from typing import NamedTuple

from outbox.policy import Policy

_YOUNG_SUSPECTS_AFTER_MS = _YOUNG_SUSPECTS_SPREAD_MS = 60_000

ROWS_REVIVED_AFTER = 3
"""A success that ends this many failures in a row also revives the rows that failed alone."""


class DueRange(NamedTuple):
    """The range of times in which revived rows become due; the id of each decides when."""

    begin_ms: int
    spread_ms: int

    @property
    def end_ms(self) -> int:
        """The end of the range.

        Only rows that are due later are revived. Otherwise each success would choose the same rows again, and rows
        further back would wait.
        """
        return self.begin_ms + self.spread_ms

    def due_ms(self, row_id: int) -> int:
        """Return when a row is due."""
        return self.begin_ms + row_id % self.spread_ms


def due_range(*, now_ms: int, policy: Policy, is_young: bool = False) -> DueRange:
    """Return when rows become due after a success: now, or a minute later if they are suspects and too young."""
    if is_young:
        return DueRange(now_ms + _YOUNG_SUSPECTS_AFTER_MS, _YOUNG_SUSPECTS_SPREAD_MS)
    return DueRange(now_ms, policy.unpark_spread_ms)


def is_young(suspected_at_ms: int, *, now_ms: int, policy: Policy) -> bool:
    """Return whether a suspect can't be proven yet."""
    return now_ms - suspected_at_ms < policy.proof_ms
