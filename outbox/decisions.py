"""Decides the outcome of a row after its upload failed.

This module does no I/O and reads no clock.
"""

from __future__ import annotations

from typing import Protocol

from outbox import outcomes, reasons
from outbox.delays import backoff, jitter
from outbox.failures import UploadFailure
from outbox.outcomes import Outcome, WaitsFor, as_last_error
from outbox.policy import Policy, Verdict, asked_delay_ms, is_recent, named_delay_ms, verdict


class Judged(Protocol):
    """The columns of a row on which its outcome depends."""

    @property
    def id(self) -> int:
        """Seeds the jitter."""

    @property
    def retry_count(self) -> int:
        """Transient failures so far."""

    @property
    def created_at_ms(self) -> int:
        """When it was enqueued."""

    @property
    def revived_at_ms(self) -> int | None:
        """When it last got a full new chance."""

    @property
    def not_before_ms(self) -> int | None:
        """When it was to be sent at the earliest."""

    @property
    def suspected_at_ms(self) -> int | None:
        """When it was first rejected alone."""

    @property
    def waits_for(self) -> str | None:
        """Why it waited, a value of `WaitsFor`."""


def age_out_ms(row: Judged, max_age_ms: int) -> int:
    """Return the time after which a failure abandons the row.

    Its age counts from its creation, its revival or its not-before time, whichever is the latest.
    """
    return max(row.created_at_ms, row.revived_at_ms or 0, row.not_before_ms or 0) + max_age_ms


def abandonment(reason: str) -> Outcome:
    """Return the outcome that abandons a row for this reason."""
    return outcomes.abandon(last_error=as_last_error(reason))


def after_shared_failure(
    failure: UploadFailure, row: Judged, *, now_ms: int, policy: Policy, keeps_row: bool = False
) -> Outcome:
    """Decide what a failure does to a row that probably did not cause it.

    401 and 403 park the row. After a 429 it waits for the delay, after any other failure for the backoff. It is
    abandoned if it is too old. With `keeps_row`, a row that waited for `row` still does, except after a 429.
    """
    judged = verdict(failure, policy)
    if judged is Verdict.AUTH_BLOCKED:
        return outcomes.park(last_error=as_last_error(str(failure)))
    if judged is Verdict.RATE_LIMITED:
        if _is_aged_out(row, now_ms, policy):
            return abandonment(reasons.aged_out(str(failure), is_rate_limited=True))
        delay_ms = asked_delay_ms(failure, policy) or 0
        return _rescheduled(failure, row, WaitsFor.DELAY, now_ms, delay_ms, retry_count=row.retry_count)
    waits_for = WaitsFor.SERVICE if named_delay_ms(failure, policy) is None else WaitsFor.DELAY
    if keeps_row and row.waits_for == WaitsFor.ROW:
        waits_for = WaitsFor.ROW
    return _backed_off(failure, row, waits_for, now_ms=now_ms, policy=policy)


def after_refused_size(failure: UploadFailure, row: Judged, *, now_ms: int, policy: Policy) -> Outcome:
    """Let a row wait because a request with several rows was too large. This is not a failure of the row."""
    delay_ms = backoff(row.retry_count, policy.backoff_ms)
    return _rescheduled(failure, row, WaitsFor.SERVICE, now_ms, delay_ms, retry_count=row.retry_count)


def after_lone_failure(failure: UploadFailure, row: Judged, *, now_ms: int, policy: Policy) -> Outcome:
    """Let a row wait that failed alone while its destination worked, or abandon it if it is too old."""
    return _backed_off(failure, row, WaitsFor.ROW, now_ms=now_ms, policy=policy)


def after_rejection(failure: UploadFailure, row: Judged, *, now_ms: int, policy: Policy) -> Outcome:
    """Let a row that was rejected alone wait for proof. It is a suspect since its first rejection."""
    return _backed_off(failure, row, WaitsFor.PROOF, now_ms=now_ms, policy=policy)


def after_proof(failure: UploadFailure) -> Outcome:
    """Abandon a row, because it is proven that the row itself is rejected."""
    return abandonment(reasons.rejected(str(failure)))


def is_proven(row: Judged, *, now_ms: int, accepted_at_ms: int | None, policy: Policy) -> bool:
    """Return whether a row that is rejected alone now is to blame.

    It was first rejected alone at least `proof_ms` ago, and since then, at most 60 000 ms ago, the destination
    accepted another row.
    """
    suspected_at_ms = row.suspected_at_ms
    return (
        suspected_at_ms is not None
        and accepted_at_ms is not None
        and now_ms - suspected_at_ms >= policy.proof_ms
        and suspected_at_ms < accepted_at_ms
        and is_recent(accepted_at_ms, now_ms)
    )


def _backed_off(
    failure: UploadFailure, row: Judged, waits_for: WaitsFor, *, now_ms: int, policy: Policy
) -> Outcome:
    if _is_aged_out(row, now_ms, policy):
        return abandonment(reasons.aged_out(str(failure)))
    retry_count = row.retry_count + 1
    delay_ms = max(backoff(retry_count, policy.backoff_ms), named_delay_ms(failure, policy) or 0)
    return _rescheduled(failure, row, waits_for, now_ms, delay_ms, retry_count=retry_count)


def _rescheduled(  # noqa: PLR0913 - the columns depend on all of these
    failure: UploadFailure, row: Judged, waits_for: WaitsFor, now_ms: int, delay_ms: int, *, retry_count: int
) -> Outcome:
    is_suspect = waits_for is WaitsFor.PROOF and row.suspected_at_ms is None
    return outcomes.reschedule(
        retry_count=retry_count,
        next_attempt_at_ms=now_ms + delay_ms + jitter(delay_ms, now_ms ^ row.id),
        last_error=as_last_error(str(failure)),
        waits_for=waits_for.value,
        suspected_at_ms=now_ms if is_suspect else row.suspected_at_ms,
    )


def _is_aged_out(row: Judged, now_ms: int, policy: Policy) -> bool:
    return now_ms > age_out_ms(row, policy.max_age_ms)
