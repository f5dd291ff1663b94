"""What the simulation knows: rows, the pause, requests, and what each process is about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from outbox import HttpFailure, UploadFailure

MINUTE_MS = 60 * 1_000
WEEK_MS = 7 * 24 * 60 * MINUTE_MS

MOVE, EXCLUSION, ACCEPTANCE, CONSERVATION, LOSS, LIVENESS, ABANDONMENT, ATOMICITY, REPORT, PAUSE, BLAME, DELETION, ISOLATION, HOLD = (
    "1 only moves of the table",
    "2 one owner under valid leases",
    "3 sent means accepted",
    "4 conservation",
    "5 nothing delivered is lost",
    "6 everything deliverable is delivered",
    "7 given up for a reason",
    "8 one answer, one transaction",
    "9 reports tell the truth",
    "10 a service that failed is left alone",
    "11 no event that the service would accept is given up",
    "12 nothing undelivered is deleted",
    "13 a destination is on its own",
    "14 nothing of a held destination is claimed",
)  # fmt: skip


class Violation(Exception):  # noqa: N818 - it is what was found, not what went wrong with the simulation
    """A promise that was broken."""

    def __init__(self, invariant: str, message: str) -> None:
        super().__init__(f"{invariant}: {message}")
        self.invariant = invariant


class Row(NamedTuple):
    id: int
    event_type: str
    payload_json: str
    status: str
    retry_count: int
    next_attempt_at_ms: int
    last_error: str | None
    created_at_ms: int
    sent_at_ms: int | None
    revived_at_ms: int | None
    suspected_at_ms: int | None
    waits_for: str | None
    lost_leases: int
    destination: str

    @property
    def age(self) -> tuple[int, int]:
        return self.created_at_ms, self.id

    @property
    def event(self) -> tuple[int, int]:
        """Tells events apart; after a failover that lost rows one may have the id of another."""
        return self.id, self.created_at_ms

    @property
    def decodable(self) -> bool:
        return self.payload_json != "spoilt"

    @property
    def poison(self) -> bool:
        return "poison" in self.payload_json

    @property
    def lost_again(self) -> int:
        """How many leases ran out on it, when it is claimed now."""
        return self.lost_leases + (self.status == "sending")

    @property
    def failed_before(self) -> bool:
        """Whether it is claimed in turn with the rows that did not fail; its senders may have died of it, too."""
        return self.waits_for is not None or self.lost_again >= 2

    def gave_chance_at(self) -> int:
        return max(self.created_at_ms, self.revived_at_ms or 0)

    def brought_back(self, *, now: int, due: int) -> Row:
        """Return the row with a full new chance."""
        return self._replace(
            status="pending", retry_count=0, last_error=None, next_attempt_at_ms=due, revived_at_ms=now,
            suspected_at_ms=None, waits_for=None,
        )  # fmt: skip


class Pause(NamedTuple):
    """What all flushers know of a destination. The default is one that never failed."""

    destination: str
    failures: int = 0
    pauses: int = 0
    paused_until_ms: int = 0
    is_asked: int = 0
    probe_until_ms: int = 0
    probe_failed_before: int = 0
    last_error: str = ""
    unparked_at_ms: int = 0

    @property
    def until_ms(self) -> int:
        return max(self.paused_until_ms, self.probe_until_ms)

    def trusted(self, now_ms: int) -> Pause:
        """Without times that lie more than an hour ahead: a wrong clock wrote these, and they hold nothing up."""
        latest_ms = now_ms + 3_600_000
        return self._replace(
            paused_until_ms=self.paused_until_ms if self.paused_until_ms <= latest_ms else 0,
            probe_until_ms=self.probe_until_ms if self.probe_until_ms <= latest_ms else 0,
        )


@dataclass
class Request:
    ids: tuple[int, ...]
    on_its_way: str = ""
    """The answer as the server gave it; the client learns of it one step later."""
    failure: UploadFailure | None = None
    """What the answer is recorded as; an exception of the client that is no failed upload, too."""
    accepted: bool = False


@dataclass
class Operation:
    """What one process is about, and what it has learnt meanwhile."""

    kind: str
    destinations: Sequence[str] = ("",)
    """Whose rows it may touch: those that it enqueues for, or the one that it flushes."""
    cutoff_ms: int = 0
    there: dict[int, Row] = field(default_factory=dict)
    """The rows when it began."""
    pause: Pause | None = None
    """The pause of its destination when it began."""
    readings: list[int] = field(default_factory=list)
    results: list[object] = field(default_factory=list)
    claim: dict[int, Row] = field(default_factory=dict)
    lease_ms: int = 0
    pauses: list[Pause] = field(default_factory=list)
    """The pauses that its transaction may have seen."""
    holds: list[int] = field(default_factory=list)
    """When the holds end that its transaction may have seen; 0 is no hold."""
    seen: set[int] = field(default_factory=set)
    """The number of the pause when it claimed: more than one, if it may have seen either."""
    probe_until_ms: int = 0
    """Until when its claim, a probe, keeps others away."""
    ended_failures: int = 0
    """How many failures in a row its acceptance ended."""
    requests: list[Request] = field(default_factory=list)
    uploading: bool = False
    settlements: int = 0
    given_up: int = 0
    """How many rows of its claim it abandoned."""
    by_chance: bool = False
    """Whether a row that it had lost came under the very lease that it had."""
    troubled: bool = False
    gives_back: bool = False
    """Whether something happened after which it releases its rows."""
    commit_lost: bool = False
    inserted: int = 0
    moved: Counter[str] = field(default_factory=Counter)

    @property
    def destination(self) -> str:
        return self.destinations[0]

    @property
    def now_ms(self) -> int:
        return self.readings[-1]

    @property
    def last_failure(self) -> UploadFailure | None:
        return next((request.failure for request in reversed(self.requests) if request.failure), None)

    def accepted(self) -> set[int]:
        return {row_id for request in self.requests if request.accepted for row_id in request.ids}

    def uploads(self) -> set[tuple[int, int]]:
        """Return the id and the creation time of each event of the last request."""
        return {self.claim[row_id].event for row_id in self.requests[-1].ids}

    def delivered(self, row: Row) -> bool:
        return row.id in self.accepted() and self.claim[row.id].event == row.event

    def failed_alone(self, row_id: int) -> list[UploadFailure]:
        """Return the failures of requests that held this row and no other."""
        return [request.failure for request in self.requests if request.ids == (row_id,) and request.failure]


# What failures mean, told again


def status_of(failure: UploadFailure | None) -> int:
    return failure.status if isinstance(failure, HttpFailure) else 0


def is_permanent(failure: UploadFailure | None, *, original: bool) -> bool:
    shared = (401, 403, 408, 425, 429) if original else (401, 403, 404, 405, 408, 410, 425, 429)
    return 400 <= status_of(failure) <= 499 and status_of(failure) not in shared


def is_auth(failure: UploadFailure | None) -> bool:
    return status_of(failure) in (401, 403)


def is_rate_limit(failure: UploadFailure | None) -> bool:
    return status_of(failure) == 429


def asked_ms(failure: UploadFailure | None) -> int | None:
    """Return for how long the answer asks for no request."""
    if isinstance(failure, HttpFailure) and failure.status in (429, 503):
        return failure.retry_after_ms or (60_000 if failure.status == 429 else None)
    return None
