"""The failed tries of an event, as the database stores them.

This module does no I/O and reads no clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from outbox.failures import UploadFailure
from outbox.policy import Policy, verdict

KEPT = 5
"""How many failed tries are kept of each event. The oldest are deleted."""


class Try(NamedTuple):
    """A failed try of an event."""

    tried_at_ms: int
    """When it failed, in Unix epoch milliseconds."""
    duration_ms: int
    """How long the upload took, in whole ms."""
    host: str
    """The name of the host that sent the event."""
    verdict: str
    """The meaning of the failure, a value of `Verdict`."""
    failure: str
    """The text of the failure, as in `last_error`."""


class Failed(NamedTuple):
    """What the failed tries of one request have in common."""

    tried_at_ms: int
    duration_ms: int
    verdict: str


def failed(
    row_ids: Sequence[int],
    answer: UploadFailure | Mapping[int, UploadFailure],
    *,
    now_ms: int,
    duration_ms: float,
    policy: Policy,
) -> dict[int, Failed]:
    """Return how each row of a request failed, by id: all of them, or those that the answer names."""

    def one(failure: UploadFailure) -> Failed:
        return Failed(now_ms, round(duration_ms), verdict(failure, policy).value)

    if isinstance(answer, UploadFailure):
        return dict.fromkeys(row_ids, one(answer))
    return {row_id: one(failure) for row_id, failure in answer.items()}
