"""The search for the rows of a claim that make the service fail.

This module does no I/O and reads no clock.
"""

from __future__ import annotations

from collections.abc import Sequence

from outbox import outcomes
from outbox.decisions import (
    after_lone_failure,
    after_proof,
    after_refused_size,
    after_rejection,
    after_shared_failure,
    is_proven,
)
from outbox.failures import UploadFailure
from outbox.policy import (
    Policy,
    Verdict,
    asked_delay_ms,
    is_recent,
    is_too_large,
    may_be_one_rows,
    verdict,
)
from outbox.search import Row, Search
from outbox.search_order import SearchOrder

GIVE_UP_AFTER = 8
"""The search ends after this many requests in a row in which no row was accepted or proven bad."""


def isolate(rows: Sequence[Row], policy: Policy, *, one_by_one: bool = False) -> Search[Row]:
    """Return the search over the rows of a claim, which are in the order of the claim.

    With `one_by_one`, each request holds one row from the start.

        search = isolate(rows, policy)
        while part := search.next_part():
            failure = upload(part)
            if failure is None:
                search.accepted(part, now_ms=...)
            else:
                search.rejected(part, failure, now_ms=..., accepted_at_ms=...)
            settle(search.take_outcomes())

    Otherwise the first part is the whole claim. If that fails and one row may be the cause, smaller parts follow.
    """
    if policy.is_original:
        return OriginalIsolation(rows, policy)
    return OneByOne(rows, policy) if one_by_one else Isolation(rows, policy)


class Isolation(Search[Row]):
    """The search under our rules: a row is abandoned only with proof, and one row may cause any kind of failure.

    Each failure counts only for the rows of its request. A claim of one row is not sent again.
    """

    def __init__(self, rows: Sequence[Row], policy: Policy) -> None:
        super().__init__(rows, policy)
        self._in_vain = 0
        # Whether the last failure says that several rows together are too large.
        self._is_refused_size = False

    def _learn_from_failure(self, part: Sequence[Row], failure: UploadFailure, now_ms: int) -> None:
        self._is_refused_size = len(part) > 1 and is_too_large(failure)
        if self._concerns_every_row(failure, now_ms):
            self._settle_all(failure, now_ms, keeps_row=self._order is not None)
        elif self._order is None and len(part) > 1:
            self._order = SearchOrder(part)
            if self._is_refused_size:
                self._order.too_large(part)
        else:
            self._narrow_down(part, failure, now_ms)

    def _concerns_every_row(self, failure: UploadFailure, now_ms: int) -> bool:
        if self._accepted or self._is_refused_size:
            return asked_delay_ms(failure, self._policy) is not None
        return self._is_the_services(self._rows, failure, now_ms)

    def _is_the_services(self, rows: Sequence[Row], failure: UploadFailure, now_ms: int) -> bool:
        """Return whether the failure of a request with these rows can't have been caused by one of them."""
        if asked_delay_ms(failure, self._policy) is not None:
            return True
        if verdict(failure, self._policy) is Verdict.PERMANENT:
            return False
        return not may_be_one_rows(
            failure,
            rows=len(rows),
            retry_count=rows[0].retry_count,
            works=is_recent(self._accepted_at_ms, now_ms),
            policy=self._policy,
        )

    def _narrow_down(self, part: Sequence[Row], failure: UploadFailure, now_ms: int) -> None:
        self._in_vain += 1
        if len(part) == 1:
            self._settle_alone(part[0], failure, now_ms)
        if self._order is not None and self._is_refused_size:
            self._order.too_large(part)
        elif self._order is not None:
            self._order.rejected(part)
        self._end_if_done(now_ms)

    def _settle_alone(self, row: Row, failure: UploadFailure, now_ms: int) -> None:
        """Settle a row that failed alone by its own failure."""
        judged = verdict(failure, self._policy)
        works = is_recent(self._accepted_at_ms, now_ms)
        if judged is Verdict.PERMANENT:
            if is_proven(row, now_ms=now_ms, accepted_at_ms=self._accepted_at_ms, policy=self._policy):
                self._proven += 1
                self._in_vain = 0
                self._settle(row, after_proof(failure))
            else:
                self._settle(row, after_rejection(failure, row, now_ms=now_ms, policy=self._policy))
            return
        self._is_lone_failure = self._order is None
        if works:
            self._settle(row, after_lone_failure(failure, row, now_ms=now_ms, policy=self._policy))
        elif judged is Verdict.AUTH_BLOCKED:
            # Whether it is parked depends on whether the service accepts another row of the claim.
            del self._open[row.id]
            self._undecided.append((row, failure))
        else:
            self._settle(row, after_shared_failure(failure, row, now_ms=now_ms, policy=self._policy))

    def _settle_named(self, row: Row, failure: UploadFailure, now_ms: int, *, is_other_accepted: bool) -> None:
        is_rejected = verdict(failure, self._policy) is Verdict.PERMANENT
        if is_other_accepted:
            is_own = asked_delay_ms(failure, self._policy) is None
        else:
            # An answer that names every event of several may tell of a failure of the service.
            is_own = len(self._rows) == 1 and not self._is_the_services((row,), failure, now_ms)
        if is_rejected and is_other_accepted:
            self._proven += 1
            self._settle(row, after_proof(failure))
        elif is_rejected or is_own:
            self._settle_alone(row, failure, now_ms)
        else:
            self._settle(row, after_shared_failure(failure, row, now_ms=now_ms, policy=self._policy))

    def _learn_from_acceptance(self) -> None:
        self._in_vain = 0

    def _end_if_done(self, now_ms: int) -> None:
        if self._in_vain >= GIVE_UP_AFTER:
            self._end(now_ms)
        else:
            super()._end_if_done(now_ms)

    def _settle_rest(self, now_ms: int) -> None:
        settle_undecided = after_lone_failure if self._accepted else after_shared_failure
        for row, own_failure in self._undecided:
            self._settle(row, settle_undecided(own_failure, row, now_ms=now_ms, policy=self._policy))
        failure = self._failure
        if failure is None:
            return
        if self.verdict is None and self.result.is_failure and not self._is_lone_failure:
            judged = verdict(failure, self._policy)
            self.verdict = Verdict.TRANSIENT if judged is Verdict.PERMANENT else judged
        for row in tuple(self._open.values()):
            if self._is_refused_size:
                self._settle(row, after_refused_size(failure, row, now_ms=now_ms, policy=self._policy))
            else:
                outcome = after_shared_failure(failure, row, now_ms=now_ms, policy=self._policy, keeps_row=True)
                self._settle(row, outcome)


class OneByOne(Isolation[Row]):
    """The search where each request holds one row. Each answer is judged like the answer to a claim of one row.

    A failure of the service ends the search. So do eight requests in a row in which no row was accepted or proven
    bad. The rows that were not sent are released.
    """

    def next_part(self) -> tuple[Row, ...]:
        """Return the first row that was not sent."""
        return () if self._is_over else tuple(self._open.values())[:1]

    def _learn_from_failure(self, part: Sequence[Row], failure: UploadFailure, now_ms: int) -> None:
        (row,) = part
        self._is_lone_failure = False
        if self._is_the_services(part, failure, now_ms):
            self.verdict = verdict(failure, self._policy)
            self._settle(row, after_shared_failure(failure, row, now_ms=now_ms, policy=self._policy))
            self._end(now_ms)
        else:
            self._in_vain += 1
            self._settle_alone(row, failure, now_ms)
            self._end_if_done(now_ms)

    def _end_if_done(self, now_ms: int) -> None:
        if self._in_vain >= GIVE_UP_AFTER or not self._open:
            self._end(now_ms)

    def _settle_rest(self, now_ms: int) -> None:
        self.not_sent = len(self._open)
        for row in tuple(self._open.values()):
            self._settle(row, outcomes.release(next_attempt_at_ms=now_ms))
        super()._settle_rest(now_ms)


class OriginalIsolation(Search[Row]):
    """The search of difflore's uploader: an acceptance proves every rejection in its claim.

    Any failure except a rejection ends the search. Acceptances in other claims prove nothing.
    """

    def _learn_from_failure(self, part: Sequence[Row], failure: UploadFailure, now_ms: int) -> None:
        if verdict(failure, self._policy) is not Verdict.PERMANENT:
            self._undecided.clear()
            self._settle_all(failure, now_ms)
        elif self._order is None:
            self._order = SearchOrder(part)
        else:
            if len(part) == 1:
                self._undecided.append((part[0], failure))
            if self._accepted or len(self._rows) == 1:
                self._prove_undecided()
            self._order.rejected(part)
            self._end_if_done(now_ms)

    def _settle_named(self, row: Row, failure: UploadFailure, now_ms: int, *, is_other_accepted: bool) -> None:
        if verdict(failure, self._policy) is Verdict.PERMANENT and (is_other_accepted or len(self._rows) == 1):
            self._proven += 1
            self._settle(row, after_proof(failure))
        else:
            self._settle(row, after_shared_failure(failure, row, now_ms=now_ms, policy=self._policy))

    def _learn_from_acceptance(self) -> None:
        self._prove_undecided()

    def _prove_undecided(self) -> None:
        for row, failure in self._undecided:
            self._settle(row, after_proof(failure))
        self._proven += len(self._undecided)
        self._undecided.clear()

    def _settle_rest(self, now_ms: int) -> None:
        # Every row was rejected: the route or the schema has changed, and the rows are not to blame.
        if self._undecided:
            self.verdict = Verdict.TRANSIENT
        for row, failure in self._undecided:
            self._settle(row, after_shared_failure(failure, row, now_ms=now_ms, policy=self._policy))
