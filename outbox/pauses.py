"""The rules for pauses of a destination, and for the probes after them.

This module does no I/O and reads no clock.
"""

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
"""A pause or a probe that ends later than this was begun by a wrong clock, so it is ignored."""


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
        """Whether a request failed, and no row was accepted or proven bad."""
        return self.failure is not None and not self.accepted and not self.proven


class SharedPause(NamedTuple):
    """What all flushers know of a destination. The defaults stand for a destination that works."""

    failures: int = 0
    """The number of failures in a row. Only an acceptance resets it."""
    number: int = 0
    """Pauses so far, never reset. A claim that saw another number began before the current pause."""
    until_ms: int = 0
    """When the pause ends. Nothing is claimed before."""
    is_asked: bool = False
    """Whether an answer asked for the pause."""
    probe_until_ms: int = 0
    """When the lease of the current probe ends. Nothing else is claimed before."""
    next_probe_failed_before: bool = False
    """Whether the next probe is the oldest row that failed before. Otherwise it is the newest row that did not."""
    last_error: str | None = None
    """The text of the last failure."""

    @property
    def needs_probe(self) -> bool:
        """Whether the next claim is a probe of one row."""
        return self.failures >= PROBE_AFTER

    @property
    def holds_until_ms(self) -> int:
        """When the next claim is possible: after the pause, and after the lease of the probe."""
        return max(self.until_ms, self.probe_until_ms)

    def trusted(self, now_ms: int) -> SharedPause:
        """Return the pause without times that only a wrong clock can have written."""
        latest_ms = now_ms + LONGEST_TRUSTED_MS
        return self._replace(
            until_ms=self.until_ms if self.until_ms <= latest_ms else 0,
            probe_until_ms=self.probe_until_ms if self.probe_until_ms <= latest_ms else 0,
        )

    def when_probed(self, *, lease_until_ms: int, failed_before: bool) -> SharedPause:
        """Return the pause during a probe. `failed_before` tells of which kind the row of the probe is."""
        return self._replace(probe_until_ms=lease_until_ms, next_probe_failed_before=not failed_before)

    def when_accepted(self, *, seen: int) -> SharedPause:
        """Return the pause after the service accepted a row of a claim that saw pause number `seen`.

        An acceptance ends the pause and the count of failures, with one exception: if an answer asked for the
        pause while the accepted request was already under way, the service still wants no request.
        """
        if self.is_asked and seen != self.number:
            return self._replace(failures=0)
        return SharedPause(number=self.number)

    def when_done(
        self, claim: ClaimResult, *, seen: int, probe_lease_ms: int | None, now_ms: int, policy: Policy
    ) -> SharedPause:
        """Return the pause after a claim that saw pause number `seen`.

        `probe_lease_ms` is the lease of the claim if it was a probe, else None.

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
    """Return the length of the pause after this many failures in a row, if no answer named a delay.

    With the default `pause_ms` of 1 000: 1 s, 2 s, 4 s, 8 s, 16 s, 20 s, 20 s, …
    """
    return min(policy.pause_ms << min(failures - 1, 30), LONGEST_PAUSE_MS)


def _begun(pause: SharedPause, until_ms: int, failure: UploadFailure, *, is_asked: bool) -> SharedPause:
    last_error = as_last_error(str(failure))
    return pause._replace(number=pause.number + 1, until_ms=until_ms, is_asked=is_asked, last_error=last_error)
