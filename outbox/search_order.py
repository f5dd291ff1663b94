"""Which rows of a rejected claim go into the next request.

This module does no I/O and reads no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Generic, Protocol, TypeVar

ONE_BY_ONE = 8
"""A claim of at most this many rows is searched row by row to its end."""


class _Identified(Protocol):
    @property
    def id(self) -> int: ...


Row = TypeVar("Row", bound=_Identified)


class SearchOrder(Generic[Row]):
    """Which rows of a rejected claim go into the next request.

    The first requests hold one row each, until one is accepted. After that, a request holds `good // (bad + 1)`
    rows, so that on average one of them is bad. A rejected part is halved until one bad row is found. If its first
    half is accepted, the second half holds a bad row and is halved without being sent whole. Nothing is known then
    of the rows behind a bad row. A claim of at most 8 rows is searched row by row.

    One bad row among 64 takes 14 requests on average and at most 16, the claim's first included; 16 bad rows take
    63 on average. Row by row all of these take 65.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._unknown = list(rows)
        # By the answers so far, these rows contain a bad row.
        self._group: list[Row] = []
        self._good = self._bad = 0
        self._is_small = len(rows) <= ONE_BY_ONE
        # At most this many rows go into the next request, because of a 413. None: no such limit is known.
        self._limit: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether every row was tried alone or accepted."""
        return not self._unknown and not self._group

    def next_part(self) -> tuple[Row, ...]:
        """Return the rows of the next request."""
        if self._group:
            return tuple(self._group[: max(1, len(self._group) // 2)])
        return tuple(self._unknown[: self._size()])

    def accepted(self, part: Collection[Row]) -> None:
        """Take out an accepted part."""
        self.remove({row.id for row in part})
        self._good += len(part)
        # The claim was rejected, so if no bad row was found, the rest holds one: it need not be sent whole.
        if not self._bad and not self._group and self._limit is None and self._size() >= len(self._unknown):
            self._group, self._unknown = self._unknown, []

    def rejected(self, part: Sequence[Row]) -> None:
        """Narrow down to a rejected part, or take out a row that was rejected alone."""
        self.remove({row.id for row in part})
        self._unknown = self._group + self._unknown
        self._group = list(part) if len(part) > 1 else []
        if len(part) == 1:
            self._bad += 1
            self._limit = None

    def too_large(self, part: Sequence[Row]) -> None:
        """Send at most half as many rows from now on; nothing is known of these rows."""
        self._limit = len(part) // 2
        self._unknown = self._group + self._unknown
        self._group = []

    def remove(self, row_ids: Collection[int]) -> None:
        """Take rows out."""
        self._group = [row for row in self._group if row.id not in row_ids]
        self._unknown = [row for row in self._unknown if row.id not in row_ids]

    def _size(self) -> int:
        if self._limit is not None and not self._bad:
            return self._limit
        if self._is_small or not self._good:
            return 1
        size = max(1, self._good // (self._bad + 1))
        return size if self._limit is None else min(size, self._limit)
