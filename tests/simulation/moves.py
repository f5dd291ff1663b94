"""What a flusher may make of a row that it holds, under each policy.

Nothing here calls the rules of the package: they are told again from the outside, from what the server answered and
what the clock showed. Where they depend on the order of the requests, every possible outcome is allowed; what is
never allowed is to blame a row without a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from outbox import Policy, UploadFailure

from .facts import (
    WEEK_MS,
    Operation,
    Row,
    asked_ms,
    is_auth,
    is_permanent,
    is_rate_limit,
    status_of,
)

Move = tuple[str, Row]


@dataclass
class Moves:
    """The moves that only the holder of a row makes, with the reason that it was given."""

    policy: Policy
    accepted_at_ms: int = 0
    """When the service last accepted a row, by the latest clock that told."""

    def of(self, operation: Operation, old: Row) -> Iterator[Move]:
        settled = old._replace(lost_leases=0)
        if operation.gives_back:
            yield "release", settled._replace(status="pending", next_attempt_at_ms=operation.now_ms)
        if not old.decodable or (self.policy.is_original and "spoilt" in old.payload_json):
            yield "abandon", settled._replace(status="abandoned", last_error="undecodable")
        claimed = operation.claim.get(old.id, old)
        # Where it holds the row by chance only, another one may have changed these meanwhile.
        known = settled._replace(
            retry_count=claimed.retry_count, suspected_at_ms=claimed.suspected_at_ms, waits_for=claimed.waits_for
        )
        # The verdict is formed at one reading of the clock; another one may follow before it is written.
        for now in operation.readings[-2:]:
            for trigger, new in self._after_failure(operation, known, now):
                if trigger != "reschedule":
                    new = new._replace(  # noqa: PLW2901 - only a reschedule writes these
                        retry_count=old.retry_count, suspected_at_ms=old.suspected_at_ms, waits_for=old.waits_for
                    )
                yield trigger, new

    def _after_failure(self, operation: Operation, row: Row, now: int) -> Iterator[Move]:
        raise NotImplementedError

    def _after_shared(self, row: Row, failure: UploadFailure, now: int) -> Iterator[Move]:
        if is_auth(failure):
            yield "park", row._replace(status="parked", last_error=str(failure))
        elif is_rate_limit(failure):
            yield from self._put_off(row, failure, now, "delay", retry_count=row.retry_count)
        else:
            waits_for = "service" if asked_ms(failure) is None else "delay"
            yield from self._put_off(row, failure, now, waits_for, retry_count=row.retry_count + 1)

    def _put_off(
        self, row: Row, failure: UploadFailure, now: int, waits_for: str, *, retry_count: int
    ) -> Iterator[Move]:
        if now - row.gave_chance_at() > WEEK_MS:
            aged_out = "aged-out (rate-limited)" if is_rate_limit(failure) else "aged-out"
            yield "abandon", row._replace(status="abandoned", last_error=f"{aged_out}: {failure}")
            return
        named_ms = asked_ms(failure) or 0
        delay = named_ms if is_rate_limit(failure) else max(60_000 << min(retry_count, 5), named_ms)
        suspected_at_ms = row.suspected_at_ms
        if waits_for == "proof" and suspected_at_ms is None:
            suspected_at_ms = now
        yield (
            "reschedule",
            row._replace(
                status="pending",
                retry_count=retry_count,
                next_attempt_at_ms=now + delay + (now ^ row.id) % max(1, delay // 4),
                last_error=str(failure),
                waits_for=waits_for,
                suspected_at_ms=suspected_at_ms,
            ),
        )


class OriginalMoves(Moves):
    """An acceptance in its claim proves that a row rejected alone is bad."""

    def _after_failure(self, operation: Operation, row: Row, now: int) -> Iterator[Move]:
        last = operation.requests[-1].failure if operation.requests else None
        if last is not None and not is_permanent(last, original=True):
            yield from self._after_shared(row, last, now)
        tried = [one for one in operation.claim.values() if "spoilt" not in one.payload_json]
        for failure in operation.failed_alone(row.id):
            if not is_permanent(failure, original=True):
                continue
            if not operation.accepted():
                yield from self._after_shared(row, failure, now)
            if operation.accepted() or len(tried) == 1:
                yield "abandon", row._replace(status="abandoned", last_error=f"permanent: {failure}")


class OurMoves(Moves):
    """A row is blamed only if it failed alone, and given up only with proof."""

    def _after_failure(self, operation: Operation, row: Row, now: int) -> Iterator[Move]:
        last = operation.last_failure
        alone = operation.failed_alone(row.id)
        if last is not None and not any(is_permanent(failure, original=False) for failure in alone):
            yield from self._after_others(operation, row, last, now)
        works = bool(operation.accepted()) or self._is_recent(now)
        for failure in alone:
            if is_permanent(failure, original=False):
                yield from self._put_off(row, failure, now, "proof", retry_count=row.retry_count + 1)
                if self._is_proven(operation, row, now):
                    yield "abandon", row._replace(status="abandoned", last_error=f"permanent: {failure}")
                continue
            yield from self._after_shared(row, failure, now)
            if works:
                yield from self._put_off(row, failure, now, "row", retry_count=row.retry_count + 1)

    def _after_others(self, operation: Operation, row: Row, failure: UploadFailure, now: int) -> Iterator[Move]:
        """Yield what a failure does to a row that others were sent with."""
        for trigger, new in self._after_shared(row, failure, now):
            yield trigger, new
            if trigger == "reschedule" and row.waits_for == "row":
                yield trigger, new._replace(waits_for="row")
        if status_of(failure) == 413 and len(operation.claim) > 1:
            delay = 60_000 << min(row.retry_count, 5)
            due = now + delay + (now ^ row.id) % (delay // 4)
            yield (
                "reschedule",
                row._replace(
                    status="pending", next_attempt_at_ms=due, last_error=str(failure), waits_for="service"
                ),
            )

    def _is_recent(self, now: int) -> bool:
        return now - self.accepted_at_ms <= 60_000

    def _is_proven(self, operation: Operation, row: Row, now: int) -> bool:
        """Tell whether the service rejected it alone before, long ago, and accepted others since, just now."""
        suspected_at_ms = row.suspected_at_ms
        if suspected_at_ms is None or now - suspected_at_ms < self.policy.proof_ms:
            return False
        accepted_since = self.accepted_at_ms > suspected_at_ms
        return (accepted_since and self._is_recent(now)) or bool(operation.accepted())
