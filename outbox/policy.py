"""The settings of an outbox, and what a failed upload means.

This module does no I/O and reads no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, ClassVar, Literal

from outbox import retry_after
from outbox.delays import longest_backoff
from outbox.failures import ClientError, ConfigurationError, HttpFailure, TransportFailure, UploadFailure

RECENT_MS = 60_000
"""A destination works if it accepted a row at most this many ms ago."""

_AUTHENTICATION = (401, 403)
_MISSING_ROUTE = (404, 405, 410)
_SHARED_4XX = (408, 425)
_OFTEN = 4
"""From this `retry_count` on, one row may be the cause of a shared failure, even if its destination accepted
nothing recently."""
_TWICE = 2
"""From this `retry_count` on, one row may be the cause of a shared failure, if its destination works."""

_DAY_MS = 24 * 60 * 60 * 1_000
# A delay below this limit, doubled five times and added to the time, fits into 64 bits.
_LIMIT = 2**53


class Verdict(Enum):
    """The meaning of a failure. It applies to the rows of the request, or to a row that failed alone."""

    TRANSIENT = "transient"
    RATE_LIMITED = "rate limited"
    AUTH_BLOCKED = "auth blocked"
    PERMANENT = "permanent"


@dataclass(frozen=True)
class Policy:
    """Sizes, limits and times of an outbox. Times are in milliseconds.

    Integers from 1 to 2^53 - 1, unless the field says otherwise. Other values raise `ConfigurationError`.
    """

    batch_size: int = 64
    """Maximum number of rows in a claim. A request holds at most these rows; a client's method `fit` can choose
    fewer."""
    lease_ms: int = 60_000
    """How long a claim keeps other flushers away. An upload must end within three quarters of this time."""
    backoff_ms: int | tuple[int, ...] = 60_000
    """How long a row waits after a transient failure. A number is the unit of the backoff: doubled for each
    failure of the row, at most five times. A tuple such as `(5_000, 300_000, 1_800_000)` holds the delays after
    the first failure, the second, and so on; the last one repeats."""
    rate_limit_ms: int = 60_000
    """The delay after a 429 that asks for no delay."""
    pause_ms: int = 1_000
    """How long all flushers of the database pause a destination after a failure. Doubled for each further failure
    in a row, up to 20 seconds."""
    max_age_ms: int = 7 * _DAY_MS
    """A row older than this is abandoned at its next failure; after 401 and 403 it is parked instead. Its age
    counts from the latest of these times: its creation, its `not_before`, and its last return from parked or
    abandoned."""
    max_sent: int | None = None
    """Maximum number of delivered rows of a destination; 0: no bound. Flushers delete the oldest beyond it.
    Default: 10 000 on SQLite, no bound on servers."""
    max_undelivered: int | None = None
    """Maximum number of pending, sending, parked and abandoned rows of a destination together; 0: no bound.
    Default: 1 000 000 on SQLite, no bound on servers. Several processes that enqueue at once may exceed it by
    1 000 rows each."""
    max_rows: int | None = None
    """Maximum number of rows of a destination; 0: no bound, which is the default. Beyond it, the oldest delivered
    rows are deleted first."""
    when_full: Literal["reject", "trim"] = "reject"
    """What happens at `max_undelivered`, and at `max_rows` once no delivered row is left: "reject" lets `enqueue`
    raise `QueueFull`. "trim" deletes abandoned rows, then the oldest, but none in flight."""
    keep_sent_ms: int | None = None
    """How long delivered rows stay; 0: until a bound deletes them. Default: 0 on SQLite, 7 days on servers."""
    proof_ms: int = 600_000
    """The shortest time between the first rejection of a row and its abandonment."""
    revive_limit: int = 256
    """When the service accepts a row, waiting rows of its destination become due: at most this many for each claim
    and each value of `waits_for`."""
    unpark_limit: int = 256
    """When the service accepts a row, parked rows of its destination return to the queue: at most this many for
    each claim."""
    unpark_spread_ms: int = 5_000
    """The due times of these parked rows are spread over this time, so that they do not all become due at once."""
    enqueue_patience_ms: int = 5_000
    """How long an `enqueue` or an operator's command is retried while the database server can't be reached."""
    flush_patience_ms: int = 30_000
    """How long flushers and workers retry a claim or the write of an outcome while the database server can't be
    reached."""
    verdicts: Mapping[int, Verdict] = field(default_factory=dict, hash=False)
    """What an answer with one of these HTTP statuses (100 to 599) means, instead of the default, such as
    `{409: Verdict.TRANSIENT}`."""

    is_original: ClassVar[bool] = False
    """Whether the rules of difflore apply."""

    @staticmethod
    def original(**changes: Any) -> OriginalPolicy:
        """Return the policy of difflore's uploader, with `changes`.

        It abandons a rejected row at once if another row of its claim was accepted. It claims the oldest rows
        first, never pauses, and never revives. Beyond 10 000 rows it deletes the oldest.
        """
        bounds = {"max_rows": 10_000, "when_full": "trim", "max_sent": 0, "max_undelivered": 0, "keep_sent_ms": 0}
        return OriginalPolicy(**{**bounds, **changes})

    def __post_init__(self) -> None:
        if self.when_full not in ("trim", "reject"):
            raise ConfigurationError(f"policy: when_full is {self.when_full!r}, expected 'trim' or 'reject'")
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name in ("when_full", "verdicts") or (setting.default is None and value is None):
                continue
            if setting.name == "backoff_ms" and isinstance(value, tuple):
                if not value or not all(_is_whole(delay_ms, at_least=1) for delay_ms in value):
                    raise ConfigurationError(
                        f"policy: backoff_ms is {value!r}, expected one or more whole numbers from 1 to 2^53 - 1"
                    )
                continue
            at_least = 0 if setting.default is None else 1
            if not _is_whole(value, at_least=at_least):
                or_more = ", or a tuple of them" if setting.name == "backoff_ms" else ""
                raise ConfigurationError(
                    f"policy: {setting.name} is {value!r},"
                    f" expected a whole number from {at_least} to 2^53 - 1{or_more}"
                )
        # A copy, because the caller's mapping may change.
        object.__setattr__(self, "verdicts", _checked_verdicts(self.verdicts))

    def on(self, *, is_shared: bool) -> Policy:
        """Return the policy with the defaults for a database server (`is_shared`) or SQLite filled in."""
        defaults = {
            "max_sent": 0 if is_shared else 10_000,
            "max_undelivered": 0 if is_shared else 1_000_000,
            "max_rows": 0,
            "keep_sent_ms": 7 * _DAY_MS if is_shared else 0,
        }
        changes: dict[str, Any] = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return replace(self, **changes)


@dataclass(frozen=True)
class OriginalPolicy(Policy):
    """What `Policy.original()` returns: the settings and the rules of difflore's uploader."""

    is_original: ClassVar[bool] = True


def _is_whole(value: object, *, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and at_least <= value < _LIMIT


def _checked_verdicts(given: object) -> dict[int, Verdict]:
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"policy: verdicts is {given!r}, expected a mapping from HTTP status to Verdict")
    for status, judged in given.items():
        if not isinstance(status, int) or not 100 <= status <= 599:
            raise ConfigurationError(
                f"policy: verdicts has the key {status!r}, expected an HTTP status, 100 to 599"
            )
        if not isinstance(judged, Verdict):
            known = ", ".join(str(one) for one in Verdict)
            raise ConfigurationError(f"policy: verdicts[{status}] is {judged!r}, expected one of {known}")
    return dict(given)


def verdict(failure: UploadFailure, policy: Policy) -> Verdict:
    """Return the verdict on a failure by its HTTP status; a failure without a status is transient.

    `policy.verdicts` decides first. 404, 405 and 410 are transient: at a fixed URL they mean that the route is
    missing. Under `Policy.original()` they are permanent.
    """
    if not isinstance(failure, HttpFailure):
        return Verdict.TRANSIENT
    if failure.status in policy.verdicts:
        return policy.verdicts[failure.status]
    if failure.status == 429:
        return Verdict.RATE_LIMITED
    if failure.status in _AUTHENTICATION:
        return Verdict.AUTH_BLOCKED
    if failure.status in _SHARED_4XX or (failure.status in _MISSING_ROUTE and not policy.is_original):
        return Verdict.TRANSIENT
    return Verdict.PERMANENT if 400 <= failure.status <= 499 else Verdict.TRANSIENT


def named_delay_ms(failure: UploadFailure, policy: Policy) -> int | None:
    """Return the delay in ms that an answer names, clamped to 1 000 … 300 000, or None.

    Only an answer with status 429 or 503, for which HTTP defines Retry-After, or with the verdict `RATE_LIMITED`
    can name a delay.
    """
    if not isinstance(failure, HttpFailure):
        return None
    if failure.status not in (429, 503) and verdict(failure, policy) is not Verdict.RATE_LIMITED:
        return None
    if failure.retry_after_ms is None:
        return retry_after.in_body(failure.body_snippet)
    return retry_after.clamp(failure.retry_after_ms)


def asked_delay_ms(failure: UploadFailure, policy: Policy) -> int | None:
    """Return the delay in ms for which the service wants no request.

    A 429 that names no delay asks for `rate_limit_ms`.
    """
    named_ms = named_delay_ms(failure, policy)
    if named_ms is None and verdict(failure, policy) is Verdict.RATE_LIMITED:
        return policy.rate_limit_ms
    return named_ms


def longest_wait_ms(policy: Policy) -> int:
    """Return the longest delay in ms after a failure, including the jitter."""
    longest_ms = max(longest_backoff(policy.backoff_ms), policy.rate_limit_ms, retry_after.MAX_MS)
    return longest_ms * 5 // 4


def is_recent(accepted_at_ms: int | None, now_ms: int) -> bool:
    """Return whether the destination works: it accepted a row at most 60 000 ms ago."""
    return accepted_at_ms is not None and now_ms - accepted_at_ms <= RECENT_MS


def may_be_one_rows(failure: UploadFailure, *, rows: int, retry_count: int, works: bool, policy: Policy) -> bool:
    """Return whether one row may have caused a shared failure.

    `rows` is the size of the claim, `retry_count` that of its oldest row; `works` tells whether the destination
    accepted a row at most 60 000 ms ago.

    - The answer names a delay, or its verdict is rate limited: never.
    - Auth blocked (401 and 403): always if the destination works, else for claims of several rows with
      `retry_count` >= 4.
    - Transient with a 4xx (404, 405, 410, 408 and 425) or 5xx, and no answer before the deadline: with
      `retry_count` >= 2 if the destination works, else for claims of several rows with `retry_count` >= 4.
    - Any other failure, and any failure under `Policy.original()`: never.
    """
    if policy.is_original or asked_delay_ms(failure, policy) is not None:
        return False
    failed_often = rows > 1 and retry_count >= _OFTEN
    judged = verdict(failure, policy)
    if judged is Verdict.AUTH_BLOCKED:
        return works or failed_often
    if judged is Verdict.TRANSIENT and (is_timeout(failure) or 400 <= _status(failure) <= 599):
        return failed_often or (works and retry_count >= _TWICE)
    return False


def is_timeout(failure: UploadFailure) -> bool:
    """Return whether there was no answer before the deadline. One event may take the service too long."""
    return isinstance(failure, TransportFailure) and failure.is_timeout


def is_too_large(failure: UploadFailure) -> bool:
    """Return whether the service refused the size of the request."""
    return isinstance(failure, HttpFailure) and failure.status == 413


def _status(failure: UploadFailure) -> int:
    if isinstance(failure, ClientError):
        return 500
    return failure.status if isinstance(failure, HttpFailure) else 0
