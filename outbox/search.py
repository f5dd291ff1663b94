"""What every search for the rows that make a service fail has in common.

This module does no I/O and reads no clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from outbox import outcomes
from outbox.decisions import Judged, after_shared_failure
from outbox.failures import UploadFailure
from outbox.outcomes import Outcome
from outbox.pauses import ClaimResult
from outbox.policy import Policy, Verdict, verdict
from outbox.search_order import SearchOrder

Row = TypeVar("Row", bound=Judged)


class Search(ABC, Generic[Row]):
    """Decides which rows each request of a claim holds, and the outcome of each row."""

    def __init__(self, rows: Sequence[Row], policy: Policy) -> None:
        self._policy = policy
        self._rows = tuple(rows)
        self._open = {row.id: row for row in rows}
        # None until the whole claim failed and is searched.
        self._order: SearchOrder[Row] | None = None
        # Rows that failed alone, whose outcome depends on the answers to come.
        self._undecided: list[tuple[Row, UploadFailure]] = []
        self._outcomes: list[tuple[int, Outcome]] = []
        self._accepted = self._proven = 0
        self._accepted_at_ms: int | None = None
        self._failure: UploadFailure | None = None
        self._is_lone_failure = False
        self._is_over = False
        self.verdict: Verdict | None = None
        """The verdict that applied to all rows without an outcome, if the search ended with such a verdict."""
        self.not_sent = 0
        """How many rows the search released because it ended before their request."""

    @property
    def result(self) -> ClaimResult:
        """What the claim showed so far."""
        return ClaimResult(self._accepted, self._proven, self._failure, self._is_lone_failure)

    def next_part(self) -> tuple[Row, ...]:
        """Return the rows of the next request, none when the claim is done. Changes nothing."""
        if self._is_over:
            return ()
        return tuple(self._open.values()) if self._order is None else self._order.next_part()

    def take_outcomes(self) -> list[tuple[int, Outcome]]:
        """Return what was decided since the last call, each with the id of its row."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def drop(self, row_ids: Iterable[int], *, now_ms: int) -> None:
        """Leave out rows that another flusher took over. They get no outcome."""
        dropped = set(row_ids)
        self._open = {row_id: row for row_id, row in self._open.items() if row_id not in dropped}
        self._undecided = [(row, failure) for row, failure in self._undecided if row.id not in dropped]
        if self._order is not None:
            self._order.remove(dropped)
            self._end_if_done(now_ms)

    def accepted(self, part: Sequence[Row], *, now_ms: int) -> None:
        """Record that the service accepted this part."""
        self._accepted += len(part)
        self._accepted_at_ms = now_ms
        delivered = outcomes.deliver(sent_at_ms=now_ms)
        for row in part:
            self._settle(row, delivered)
        if self._order is not None:
            self._order.accepted(part)
        self._learn_from_acceptance()
        self._end_if_done(now_ms)

    def rejected(
        self, part: Sequence[Row], failure: UploadFailure, *, now_ms: int, accepted_at_ms: int | None = None
    ) -> None:
        """Record that the upload of this part failed, for whatever reason.

        `accepted_at_ms` is when the destination last accepted a row, as far as the database knows. The search also
        counts the acceptances that it saw itself.
        """
        self._failure = failure
        self._accepted_at_ms = _latest(self._accepted_at_ms, accepted_at_ms)
        self._learn_from_failure(part, failure, now_ms)

    def answered(
        self,
        part: Sequence[Row],
        failures: Mapping[int, UploadFailure],
        *,
        now_ms: int,
        accepted_at_ms: int | None = None,
    ) -> None:
        """Record an answer that names the rows of this part that failed, by id. It accepted the others.

        Each failure is judged for its row alone, and says nothing about the destination.
        """
        accepted = [row for row in part if row.id not in failures]
        self._accepted_at_ms = now_ms if accepted else _latest(self._accepted_at_ms, accepted_at_ms)
        for row in part:
            if row.id in failures:
                self._settle_named(row, failures[row.id], now_ms, is_other_accepted=bool(accepted))
        if self._order is not None:
            self._order.remove(failures)
        if accepted:
            self.accepted(accepted, now_ms=now_ms)
        else:
            self._end_if_done(now_ms)

    @abstractmethod
    def _settle_named(self, row: Row, failure: UploadFailure, now_ms: int, *, is_other_accepted: bool) -> None:
        """Settle a row whose failure an answer names."""

    @abstractmethod
    def _learn_from_failure(self, part: Sequence[Row], failure: UploadFailure, now_ms: int) -> None:
        """Settle rows, narrow the search down, or end it."""

    @abstractmethod
    def _learn_from_acceptance(self) -> None:
        """Draw conclusions from an acceptance for rows that were tried before."""

    @abstractmethod
    def _settle_rest(self, now_ms: int) -> None:
        """Settle the rows that have no outcome when the search ends."""

    def _settle(self, row: Row, outcome: Outcome) -> None:
        self._open.pop(row.id, None)
        self._outcomes.append((row.id, outcome))

    def _settle_all(self, failure: UploadFailure, now_ms: int, *, keeps_row: bool = False) -> None:
        """End the search with a failure that applies to every row without an outcome."""
        self.verdict = verdict(failure, self._policy)
        for row in tuple(self._open.values()):
            outcome = after_shared_failure(failure, row, now_ms=now_ms, policy=self._policy, keeps_row=keeps_row)
            self._settle(row, outcome)
        self._end(now_ms)

    def _end_if_done(self, now_ms: int) -> None:
        if self._order is None or self._order.is_empty:
            self._end(now_ms)

    def _end(self, now_ms: int) -> None:
        self._is_over = True
        self._settle_rest(now_ms)


def _latest(*times_ms: int | None) -> int | None:
    return max((time_ms for time_ms in times_ms if time_ms is not None), default=None)
