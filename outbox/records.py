"""The small types that pass between storage, the flusher, its client and their callers.

Times are Unix epoch milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from outbox.destinations import DEFAULT_DESTINATION
from outbox.events import Event, decode
from outbox.failures import InvalidEvent, UploadFailure
from outbox.holds import Hold
from outbox.pauses import SharedPause
from outbox.policy import Verdict

NOT_LOGGED_IN = "not logged in, the client has no credentials"
"""Why a flush skips its events if the client is not logged in."""

LOST_LEASES_ALONE = 2
"""A row is claimed alone from this `lost_leases` on: it may have killed its senders."""


class ClaimedRow(NamedTuple):
    """The columns of a row that a flusher needs while it holds the row."""

    id: int
    """The row id."""
    event_type: str
    """The type of the event."""
    payload_json: str
    """The event as it is stored: one JSON object."""
    retry_count: int
    """The number of failed tries since the event was enqueued, or last requeued or unparked. A 429 does not
    count."""
    created_at_ms: int
    """When the event was enqueued."""
    revived_at_ms: int | None
    suspected_at_ms: int | None = None
    waits_for: str | None = None
    lost_leases: int = 0
    occurred_at_ms: int = 0
    """When the event happened."""
    event_id: str = ""
    """The id of the event, your own or one that the outbox makes. It never changes."""
    not_before_ms: int | None = None
    """When the event may be sent at the earliest; None: at once."""
    trace_context: str | None = None
    """The context of the span in which the event was enqueued: W3C `traceparent` and `tracestate`, as JSON."""


class BatchItem(ClaimedRow):
    """One event of an upload. Times are Unix epoch milliseconds."""

    @cached_property
    def event(self) -> Event | Mapping[str, Any]:
        """The event.

        The first access decodes the payload to the class of the event's type. If the class is not imported or has
        changed, the event is a mapping. Raises `ConfigurationError` if the definition of a registered class is
        wrong.
        """
        try:
            return decode(self.payload_json)
        except InvalidEvent:
            document: dict[str, Any] = json.loads(self.payload_json)
            return document


class Pause(NamedTuple):
    """A destination that failed and has accepted nothing since. Times are Unix epoch milliseconds."""

    destination: str
    """The name of the destination."""
    failures: int
    """The number of failures in a row. Only an acceptance or a retry by an operator resets it."""
    paused_until_ms: int
    """When the pause ends. Nothing is sent before."""
    probe_until_ms: int
    """When the lease of the current probe ends; 0 or a past time if no probe is under way."""
    last_error: str
    """The text of the last failure."""

    @property
    def until_ms(self) -> int:
        """When flushers may send again: after the pause, and after the lease of the probe."""
        return max(self.paused_until_ms, self.probe_until_ms)


class Claim(NamedTuple):
    """The rows that a flusher got, in the order of the claim, and the pause and the hold of their destination.

    While the pause or the hold lasts, there are no rows. `invalid` says, by row id, which column holds an invalid
    value; such a row is abandoned. `due_at_ms` is, by row id, when each valid row was due before the claim.
    """

    rows: list[BatchItem]
    pause: SharedPause = SharedPause()
    is_probe: bool = False
    invalid: Mapping[int, str] = MappingProxyType({})
    due_at_ms: Mapping[int, int] = MappingProxyType({})
    destination: str = DEFAULT_DESTINATION
    hold: Hold | None = None

    @property
    def failed_before(self) -> bool:
        """Whether these rows failed before, or their senders died."""
        first = self.rows[0]
        has_lost = first.id not in self.invalid and first.lost_leases >= LOST_LEASES_ALONE
        return first.waits_for is not None or has_lost


class UploadClient(Protocol):
    """An object that delivers events to a service. Several threads of a worker may call it at the same time.

    A client may have these attributes, too:

    - `deadline_ms` is the longest time that an upload takes, in ms. A flush raises `ConfigurationError` if it is
      over three quarters of the policy's `lease_ms`.
    - `one_event_per_request`: if it is true, `upload` is called once for each event of a claim, in order. If the
      service fails, the flush stops and releases the events that were not sent yet.
    - `fit(batch)` returns how many of the first events fit in one request, at least 1. A flush sends these and
      releases the others, which the next claim takes again. Without it, a request holds all events of a claim.
    - `redact(text)` returns a text without the credentials that the client holds. It is applied to the text of an
      exception that is not an `UploadFailure` before the text is stored.
    """

    @property
    def logged_in(self) -> bool:
        """Whether there are credentials. If not, a flush changes nothing."""
        ...

    def upload(self, batch: tuple[BatchItem, ...], /) -> Mapping[int, UploadFailure | None] | None:
        """Deliver the batch, or raise an `UploadFailure` that applies to the whole batch.

        A client that knows an outcome for each event returns the failures by row id. A row that is not in the
        mapping, or has None there, is accepted.

        An exception of `requests` is a failure with the status of its response. Any other `Exception` is a bug:
        the events wait as after a failure of the service, with `client error: …` as their `last_error`, and the
        exception reaches the caller of `flush`.
        """
        ...


@dataclass(frozen=True)
class FlushReport:
    """What one flush did, in numbers of events. Reports can be added."""

    claimed: int = 0
    """Does not include events that were released because they did not fit in the request."""
    attempted: int = 0
    """Claimed events whose payload is a JSON object."""
    sent: int = 0
    rescheduled: int = 0
    parked: int = 0
    abandoned: int = 0
    lost_leases: int = 0
    """Rows that another flusher owned when their outcome was written. These outcomes were dropped."""
    verdict: Verdict | None = None
    """The verdict that applied to the whole batch, or None."""
    failure: str | None = None
    """The text of the last failure, or of the failure that caused the pause."""
    paused_until_ms: int | None = None
    """When the pause ends. Until then no flusher sends anything: the service failed, or asked to slow down."""
    skipped: str | None = None
    """Why nothing was tried, in words: not logged in, capture is off, or the destination is on hold or paused.
    None if events were tried or nothing was due. In a sum of reports: why the last flush tried nothing."""
    goes_on: bool = False
    """Whether to flush again at once: rows were claimed, and the service works or only one row failed."""
    hold: Hold | None = None
    """The hold of the destination, if that is why nothing was tried."""

    def __add__(self, other: FlushReport) -> FlushReport:
        return FlushReport(
            self.claimed + other.claimed,
            self.attempted + other.attempted,
            self.sent + other.sent,
            self.rescheduled + other.rescheduled,
            self.parked + other.parked,
            self.abandoned + other.abandoned,
            self.lost_leases + other.lost_leases,
            other.verdict,
            other.failure or self.failure,
            other.paused_until_ms,
            other.skipped,
            other.goes_on,
            other.hold,
        )


class Chores(NamedTuple):
    """The maintenance that is due for a destination."""

    destination: str
    is_any_parked: bool
    is_any_expired: bool
    is_any_failed: bool
    """Whether any row waits because it failed."""
    is_troubled: bool
    """Whether the destination failed and has accepted nothing since."""
    may_be_over_cap: bool
    may_be_over_bounds: bool


class Due(NamedTuple):
    """A destination that may have pending or sending rows."""

    next_due_at_ms: int | None
    """When its next row is due: a pending one, or one whose lease ran out. None if there is none."""
    last_accepted_ms: int | None
    """When it last accepted a row, as far as the rows tell."""


class Trouble(NamedTuple):
    """Rows that are not delivered: their most frequent failure, one of their due times, and their number."""

    last_error: str
    next_attempt_at_ms: int
    events: int
    destination: str


class Counted(NamedTuple):
    """How many rows of one kind there are."""

    destination: str
    event_type: str
    status: str
    has_failed: bool
    """Whether the rows wait because they failed."""
    events: int


class Deleted(NamedTuple):
    """The number of events of one kind that were deleted for one reason."""

    status: str
    event_type: str
    reason: str
    events: int


class Overview(NamedTuple):
    """The numbers for `stats`, read in one snapshot."""

    counts: list[Counted]
    oldest_pending_ms: int | None
    due: Mapping[str, Due]
    """The destinations that may have pending or sending rows."""
    parked: Trouble | None
    waiting: dict[str | None, list[Trouble]]
    """The pending rows that failed, by `waits_for`: one `Trouble` for each destination, the largest first. Its
    `next_attempt_at_ms` is the earliest due time. The key None stands for rows that an older version
    rescheduled, or that were parked and retried."""
    deleted: list[Deleted]
    pauses: list[Pause]
    holds: list[Hold]
    without_policy: list[str]
    """The commands for which PostgreSQL hides every row from this database user."""


class Replacement(NamedTuple):
    """A new row, and which row it replaces."""

    row_id: int
    row: dict[str, Any]
    """The columns to insert, without the destination."""
    created_at_ms: int | None = None
    """When the old row was created, if the caller knows. A row of that id from another time is another event."""


class Replaced(NamedTuple):
    """The id of each new row, and why each of the other old rows stays, by the id of the old row."""

    ids: dict[int, int]
    refused: dict[int, str]


class Oddities(NamedTuple):
    """How many rows have times or numbers that no healthy queue has."""

    leases_run_out: int
    leases_too_long: int
    created_in_future: int
    due_too_late: int
    invalid: int


class Listener(Protocol):
    """A connection on which a database notifies of new events."""

    def fileno(self) -> int:
        """Return the file descriptor that can be read when there is a notification."""

    def hear(self) -> bool:
        """Read the notifications; return False if the connection is broken."""

    def close(self) -> None:
        """Close the connection."""
