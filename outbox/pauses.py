"""When a destination is left alone, and who looks whether it works again. Pure: no clock, no database."""

from __future__ import annotations

from typing import NamedTuple

from outbox.failures import UploadFailure
from outbox.outcomes import as_last_error
from outbox.policy import Policy, asked_delay_ms

PROBE_AFTER = 3
"""After this many failures in a row, a claim is a probe of one row."""

LONGEST_PAUSE_MS = 20_000
"""The longest pause, unless an answer named a delay."""


LONGEST_TRUSTED_MS = 3_600_000
"""A pause or a probe that ends later than this was begun by a wrong clock, so it is over."""


class ClaimResult(NamedTuple):
    """What a claim showed about its destination."""

    accepted: int
    """How many rows the service accepted."""
    proven: int
    """How many rows were abandoned because the service rejects them."""
    failure: UploadFailure | None
    """The last failure."""
    is_lone_failure: bool
    """Whether the claim had one row that may have caused the failure. A rejection does not count."""

    @property
    def is_failure(self) -> bool:
        """Whether the requests failed, and neither an acceptance nor a proof shows that the service works."""
        return self.failure is not None and not self.accepted and not self.proven


class SharedPause(NamedTuple):
    """What all flushers know of a destination that failed. The default stands for one that works."""

    failures: int = 0
    """Failures in a row; only an acceptance ends the count."""
    number: int = 0
    """Pauses so far, never reset. A claim that saw another number began before the current pause."""
    until_ms: int = 0
    """Until then nothing is claimed."""
    is_asked: bool = False
    """Whether an answer asked for the pause."""
    probe_until_ms: int = 0
    """The lease of the probe under way. Until then nothing else is claimed."""
    next_probe_failed_before: bool = False
    """Whether the next probe is the oldest row that failed before; otherwise the newest that did not."""
    last_error: str | None = None
    """The text of the last failure."""

    @property
    def needs_probe(self) -> bool:
        """Whether the next claim is a probe of one row."""
        return self.failures >= PROBE_AFTER

    @property
    def holds_until_ms(self) -> int:
        """Until when nothing is claimed: the pause is over, and the result of the probe is known."""
        return max(self.until_ms, self.probe_until_ms)

    def trusted(self, now_ms: int) -> SharedPause:
        """Return the pause without times that only a wrong clock can have written."""
        latest_ms = now_ms + LONGEST_TRUSTED_MS
        return self._replace(
            until_ms=self.until_ms if self.until_ms <= latest_ms else 0,
            probe_until_ms=self.probe_until_ms if self.probe_until_ms <= latest_ms else 0,
        )

    def when_probed(self, *, lease_until_ms: int, failed_before: bool) -> SharedPause:
        """Return the pause while a probe is under way with a row that failed before, or did not."""
        return self._replace(probe_until_ms=lease_until_ms, next_probe_failed_before=not failed_before)

    def when_accepted(self, *, seen: int) -> SharedPause:
        """Return the pause after a claim that saw pause number `seen` got a row accepted.

        That ends the pause and the count of failures. One exception: an answer asked for the pause while the
        accepted request was already under way. Then the service still wants no request.
        """
        if self.is_asked and seen != self.number:
            return self._replace(failures=0)
        return SharedPause(number=self.number)

    def when_done(
        self, claim: ClaimResult, *, seen: int, probe_lease_ms: int | None, now_ms: int, policy: Policy
    ) -> SharedPause:
        """Return the pause after a claim that saw pause number `seen`.

        `probe_lease_ms` is the lease that the claim had as a probe, None if it was none.

        - A failure pauses the destination. A claim from before the current pause neither counts nor lengthens it.
        - A lone failure counts but pauses only if it was a probe.
        - An answer that asks for a delay pauses in any case, and never shortens the pause.
        """
        pause = self
        if probe_lease_ms is not None and probe_lease_ms == self.probe_until_ms:
            pause = pause._replace(probe_until_ms=0)
        failure = claim.failure
        if failure is None:
            return pause
        counts = claim.is_failure and seen == self.number
        if counts:
            pause = pause._replace(failures=pause.failures + 1, last_error=as_last_error(str(failure)))
        asked_ms = asked_delay_ms(failure, policy)
        if asked_ms is not None:
            until_ms = now_ms + min(asked_ms, LONGEST_TRUSTED_MS)
            return _begun(pause, max(self.until_ms, until_ms), failure, is_asked=True)
        if counts and not (claim.is_lone_failure and probe_lease_ms is None):
            return _begun(pause, now_ms + pause_ms(pause.failures, policy), failure, is_asked=False)
        return pause


def pause_ms(failures: int, policy: Policy) -> int:
    """Return how long a destination is left alone after so many failures in a row, if no answer named a delay.

    With the default of 1 000 ms for the first: 1 s, 2 s, 4 s, 8 s, 16 s, 20 s, 20 s, …
    """
    return min(policy.pause_ms << min(failures - 1, 30), LONGEST_PAUSE_MS)


def _begun(pause: SharedPause, until_ms: int, failure: UploadFailure, *, is_asked: bool) -> SharedPause:
    last_error = as_last_error(str(failure))
    return pause._replace(number=pause.number + 1, until_ms=until_ms, is_asked=is_asked, last_error=last_error)
