"""What tests of the rules build rows and answers from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from outbox.failures import HttpFailure, TransportFailure, UploadFailure
from outbox.isolation import isolate
from outbox.outcomes import Outcome
from outbox.policy import Policy
from outbox.search import Search

NOON_MS = 1_795_521_600_000
SECOND = 1_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR

REJECTED = HttpFailure(422, "Unprocessable Entity")
BROKEN = HttpFailure(500, "Internal Server Error")
DOWN = HttpFailure(503, "Service Unavailable")
MISSING = HttpFailure(404, "Not Found")
REVOKED = HttpFailure(401, "Unauthorized")
FORBIDDEN = HttpFailure(403, "Forbidden")
TOO_LARGE = HttpFailure(413, "Content Too Large")
SLOW_DOWN = HttpFailure(429, "Too Many Requests")
WAIT_40_S = HttpFailure(429, "Too Many Requests", '{"retryAfterSec":40}')
UNREACHABLE = TransportFailure("connection refused")
LATE = TransportFailure("no complete answer within 45000 ms", is_timeout=True)


@dataclass(frozen=True)
class Row:
    id: int = 5
    retry_count: int = 0
    created_at_ms: int = NOON_MS
    revived_at_ms: int | None = None
    not_before_ms: int | None = None
    suspected_at_ms: int | None = None
    waits_for: str | None = None


def rows(count: int, **columns: int | str | None) -> list[Row]:
    return [Row(number + 1, **columns) for number in range(count)]


@dataclass
class Run:
    """What a search did with the answers that it got."""

    search: Search[Row]
    parts: list[tuple[int, ...]] = field(default_factory=list)
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        return [len(part) for part in self.parts]

    def ids(self, trigger: str) -> list[int]:
        return sorted(row_id for row_id, outcome in self.outcomes.items() if outcome.trigger == trigger)

    def waiting(self) -> dict[int, str]:
        """Return what each rescheduled row waits for."""
        return {row_id: o.values["waits_for"] for row_id, o in self.outcomes.items() if o.trigger == "reschedule"}


Answer = Callable[[tuple[int, ...]], "UploadFailure | None"]


def run(
    claimed: Sequence[Row],
    answers: Iterable[UploadFailure | None] | Answer,
    policy: Policy | None = None,
    *,
    accepted_at_ms: int | None = None,
    now_ms: int = NOON_MS,
    step_ms: int = 0,
    one_by_one: bool = False,
) -> Run:
    """Search a claim to its end. `answers` come in order, or follow from the ids of a request."""
    script = None if callable(answers) else iter(answers)
    done = Run(isolate(claimed, policy or Policy(), one_by_one=one_by_one))
    while part := done.search.next_part():
        assert part == done.search.next_part()
        ids = tuple(row.id for row in part)
        done.parts.append(ids)
        failure = answers(ids) if script is None else next(script)  # type: ignore[operator]
        now_ms += step_ms
        if failure is None:
            done.search.accepted(part, now_ms=now_ms)
        else:
            done.search.rejected(part, failure, now_ms=now_ms, accepted_at_ms=accepted_at_ms)
        for row_id, outcome in done.search.take_outcomes():
            assert row_id not in done.outcomes
            done.outcomes[row_id] = outcome
    if script is not None:
        assert list(script) == []
    return done


def failing(**by_failure: tuple[UploadFailure, set[int]]) -> Answer:
    """Answer a request by its first row that is named."""
    failures = {row_id: failure for failure, ids in by_failure.values() for row_id in ids}
    return lambda ids: next((failures[row_id] for row_id in ids if row_id in failures), None)


def rejecting(*bad: int, failure: UploadFailure = REJECTED) -> Answer:
    return lambda ids: failure if {*ids} & {*bad} else None
