"""What a failed upload means for its rows: verdicts, back-off, jitter, Retry-After. Pure: no I/O, no clock."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from outbox.failures import ConfigurationError, HttpFailure, UploadFailure

MAX_ERROR_LENGTH = 2_048
"""How many characters of a failure's text a row keeps."""

RETRY_AFTER_MIN_MS, RETRY_AFTER_MAX_MS = 1_000, 300_000
"""A server's wish for a delay is clamped to these."""

_MAX_DOUBLINGS = 5
_MAX_PAUSE_DOUBLINGS = 6
_DAY_MS = 24 * 60 * 60 * 1_000
# Doubled five times and added to the time, it is a number that databases can hold.
_LIMIT = 2**53


@dataclass(frozen=True)
class Policy:
    """How much, how often and how long. Times are milliseconds.

    Raises `ConfigurationError` for a value that is not a whole number above zero and below 2^53, but for what is
    said to be another.
    """

    batch_size: int = 64
    """Rows claimed and uploaded at once."""
    lease_ms: int = 60_000
    """How long a claim keeps other flushers away. An upload must end within three quarters of it."""
    backoff_ms: int = 60_000
    """The unit of the back-off: doubled for each transient failure of a row, at most five times."""
    rate_limit_ms: int = 60_000
    """The delay after a 429 that names none."""
    pause_ms: int = 1_000
    """How long, on servers, the flushers of all hosts leave a destination alone that failed; doubled for each
    further failure, six times at most."""
    max_age_ms: int = 7 * _DAY_MS
    """A row older than this is abandoned at its next transient failure."""
    max_rows: int | None = None
    """The cap; 0 is none. By default 10 000 on SQLite, and none on servers."""
    when_full: Literal["trim", "reject"] = "trim"
    """At the cap: "trim" deletes delivered rows first, then abandoned ones, then the oldest; "reject" deletes only
    delivered ones, and `enqueue` raises `QueueFull` where that does not make room."""
    keep_sent_ms: int | None = None
    """How long delivered rows stay; 0 is for ever. By default until the cap deletes them on SQLite, and 7 days on
    servers."""
    unpark_limit: int = 256
    """How many parked rows one success brings back."""
    unpark_spread_ms: int = 5_000
    """They come back spread over this time, so that recovery is no stampede."""

    def __post_init__(self) -> None:
        if self.when_full not in ("trim", "reject"):
            raise ConfigurationError(f"policy: when_full is {self.when_full!r}, expected 'trim' or 'reject'")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "when_full" or (field.default is None and value is None):
                continue
            at_least = 0 if field.default is None else 1
            if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value < _LIMIT:
                raise ConfigurationError(
                    f"policy: {field.name} is {value!r}, expected a whole number from {at_least} on and below 2^53"
                )

    def on(self, *, is_shared: bool) -> Policy:
        """Return the policy with what suits a server, or SQLite, where it leaves that open."""
        max_rows, keep_sent_ms = (0, 7 * _DAY_MS) if is_shared else (10_000, 0)
        return replace(
            self,
            max_rows=max_rows if self.max_rows is None else self.max_rows,
            keep_sent_ms=keep_sent_ms if self.keep_sent_ms is None else self.keep_sent_ms,
        )


class Verdict(Enum):
    """What a failure means. All but `PERMANENT` are shared: they hold for every row of the claim."""

    TRANSIENT = "transient"
    RATE_LIMITED = "rate limited"
    AUTH_BLOCKED = "auth blocked"
    PERMANENT = "permanent"


class Outcome(NamedTuple):
    """What becomes of one row: the trigger of its move, and the columns that the move writes."""

    trigger: str
    values: dict[str, Any]


class Judged(Protocol):
    """A row as far as `decide` has to know it."""

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
        """When it was last given a full new chance."""


def verdict(failure: UploadFailure) -> Verdict:
    """Judge a failure by its HTTP status; one without a status is transient."""
    if not isinstance(failure, HttpFailure):
        return Verdict.TRANSIENT
    if failure.status == 429:
        return Verdict.RATE_LIMITED
    if failure.status in (401, 403):
        return Verdict.AUTH_BLOCKED
    if failure.status in (408, 425):
        return Verdict.TRANSIENT
    return Verdict.PERMANENT if 400 <= failure.status <= 499 else Verdict.TRANSIENT


def decide(judged: Verdict, failure: UploadFailure, row: Judged, *, now_ms: int, policy: Policy) -> Outcome:
    """Decide what a failure that was judged so does to one row."""
    text = str(failure)
    if judged is Verdict.AUTH_BLOCKED:
        return Outcome("park", {"last_error": as_last_error(text)})
    if judged is Verdict.PERMANENT:
        return abandonment(f"permanent: {text}")
    asked_delay_ms = _asked_delay_ms(failure)
    aged_out = now_ms - max(row.created_at_ms, row.revived_at_ms or 0) > policy.max_age_ms
    if judged is Verdict.RATE_LIMITED:
        if aged_out:
            return abandonment(f"aged-out (rate-limited): {text}")
        delay_ms = asked_delay_ms or policy.rate_limit_ms
        retry_count = row.retry_count
    else:
        if aged_out:
            return abandonment(f"aged-out: {text}")
        retry_count = row.retry_count + 1
        delay_ms = max(backoff(retry_count, policy.backoff_ms), asked_delay_ms or 0)
    return Outcome(
        "reschedule",
        {
            "retry_count": retry_count,
            "next_attempt_at_ms": now_ms + delay_ms + jitter(delay_ms, now_ms ^ row.id),
            "last_error": as_last_error(text),
        },
    )


def pause_ms(failure: UploadFailure, seen: int, policy: Policy) -> int | None:
    """Return for how long, in ms, everybody leaves the destination alone, after so many pauses in a row.

    None where the failure says nothing about the destination: it answered, if only to reject a token or a row.
    """
    judged = verdict(failure)
    asked_delay_ms = _asked_delay_ms(failure)
    if judged is Verdict.RATE_LIMITED:
        return asked_delay_ms or policy.rate_limit_ms
    if judged is Verdict.TRANSIENT:
        return max(policy.pause_ms << min(seen, _MAX_PAUSE_DOUBLINGS), asked_delay_ms or 0)
    return None


def abandonment(reason: str) -> Outcome:
    """Give the row up, for this reason."""
    return Outcome("abandon", {"last_error": as_last_error(reason)})


def backoff(retry_count: int, unit_ms: int = Policy.backoff_ms) -> int:
    """Return the delay in ms after so many transient failures: unit * 2^min(max(count, 0), 5).

    With the default unit: 0 → 60 000, 1 → 120 000, 2 → 240 000, 3 → 480 000, 4 → 960 000, 5 and more → 1 920 000.
    """
    return int(unit_ms << min(max(retry_count, 0), _MAX_DOUBLINGS))


def jitter(base_ms: int, seed: int) -> int:
    """Return 0 to a quarter of `base_ms`, decided by the seed alone, so that rows spread and tests know."""
    return seed % max(1, base_ms // 4)


def retry_after(body: str) -> int | None:
    """Return the delay in ms that a response body asks for, clamped to 1 000 … 300 000, or None.

    A JSON body: the integer `retryAfterSec` of the outermost object that has one. Any other, one that was cut off
    for example: the digits after the first `"retryAfterSec"` and a colon.
    """
    try:
        seconds = _outermost_retry_after(msgspec.json.decode(body))
    except (ValueError, RecursionError):
        seconds = _textual_retry_after(body)
    return None if seconds is None else clamp_retry_after(seconds * 1_000)


def clamp_retry_after(delay_ms: int) -> int:
    """Return the delay, but at least 1 000 and at most 300 000 ms."""
    return min(max(delay_ms, RETRY_AFTER_MIN_MS), RETRY_AFTER_MAX_MS)


def _outermost_retry_after(document: object) -> int | None:
    level = [document]
    while level:
        for value in level:
            if isinstance(value, dict) and type(value.get("retryAfterSec")) is int:
                return int(value["retryAfterSec"])
        level = [inner for value in level for inner in _children(value)]
    return None


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _textual_retry_after(body: str) -> int | None:
    _, found, rest = body.partition('"retryAfterSec"')
    # Eighteen digits are more than the clamp lets through, and a number without end is not read.
    digits = re.match(r"\s*:\s*([0-9]{1,18})", rest) if found else None
    return int(digits.group(1)) if digits else None


def _asked_delay_ms(failure: UploadFailure) -> int | None:
    # The two statuses for which HTTP defines a wish to be left alone for a while.
    if not isinstance(failure, HttpFailure) or failure.status not in (429, 503):
        return None
    return retry_after(failure.body_snippet) if failure.retry_after_ms is None else failure.retry_after_ms


def as_last_error(text: str) -> str:
    """Return a failure's text as it is stored: cut, and with nothing in it that a database refuses."""
    # Such a text would keep the row from ever being settled.
    return text[:MAX_ERROR_LENGTH].replace("\0", "\ufffd").encode(errors="replace").decode()
