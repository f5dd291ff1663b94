"""What operators do with the events in an outbox, and what they see of them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from outbox import maintenance
from outbox.destinations import stored
from outbox.failures import ConfigurationError
from outbox.lifecycle import Status
from outbox.outcomes import as_last_error
from outbox.reasons import cancelled

if TYPE_CHECKING:
    from outbox.policy import Policy
    from outbox.stats import Stats
    from outbox.storage.store import Store
    from outbox.storage.tables import ObservationEvent


LARGEST_ID = 2**63 - 1
"""The largest id, and the largest integer that the databases hold."""


class Operations:
    """The part of `Outbox` for operators."""

    store: Store
    policy: Policy
    wakers: set[Callable[[], object]]

    def retry_now(self, *, destination: str | None = None) -> int:
        """Make waiting and parked events due now; return how many. None means all destinations.

        Events being sent are not changed.
        """
        count = self.store.revival.retry_now(_stored(destination), now_ms=self.store.now_ms())
        self._wake()
        return count

    def requeue_abandoned(
        self, *, older_than: datetime | int, destination: str | None = None, dry_run: bool = False
    ) -> maintenance.RequeueReport:
        """Return abandoned events created before `older_than` to the queue and reset their failures and age.

        With `dry_run`, they are only counted. `older_than` is a datetime with a time zone, or epoch milliseconds.
        `destination` selects the events of one; None means all.
        """
        report = maintenance.requeue_abandoned(
            self.store,
            _stored(destination),
            cutoff_ms=maintenance.cutoff_ms(older_than),
            now_ms=self.store.now_ms(),
            dry_run=dry_run,
        )
        self._wake()
        return report

    def abandon(self, row_id: int, reason: str) -> bool:
        """Cancel an event that is pending or parked. It becomes abandoned, with `cancelled: …` as `last_error`.

        Return False, and change nothing, if the event is being sent, sent or abandoned, or not there.
        """
        if not isinstance(reason, str) or not reason.strip():
            raise ConfigurationError(f"reason is {reason!r}, expected a text")
        return 0 < row_id <= LARGEST_ID and self.store.revival.cancel(
            row_id, last_error=as_last_error(cancelled(reason))
        )

    def purge(
        self,
        *,
        event_type: str | None = None,
        older_than: datetime | int | None = None,
        destination: str | None = None,
        dry_run: bool = False,
    ) -> maintenance.PurgeReport:
        """Delete events of any status for good; with `dry_run`, only count them.

        `event_type` selects the events of a type, `older_than` those created before a datetime with a time zone or
        epoch milliseconds. Give one or both, else it raises `ConfigurationError`. `destination` selects the events
        of one; None means all. The ledger counts the deleted events. Events that are being sent are not deleted.
        Every row is read, and each transaction deletes up to a thousand rows, so after an error some events may
        already be deleted.
        """
        if event_type is None and older_than is None:
            raise ConfigurationError("purge has neither event_type nor older_than, expected one of them or both")
        if not isinstance(event_type, str | None):
            raise ConfigurationError(f"event_type is {event_type!r}, expected the name of a type, a text")
        return maintenance.purge(
            self.store,
            event_type=event_type,
            created_before_ms=None if older_than is None else maintenance.cutoff_ms(older_than),
            destination=_stored(destination),
            now_ms=self.store.now_ms(),
            dry_run=dry_run,
        )

    def pending_count(self) -> int:
        """Return the number of pending and sending events of all destinations. Parked events do not count."""
        return self.store.views.pending_count()

    def stats(self) -> Stats:
        """Return what is queued, what is stuck, and the likely cause."""
        from outbox import stats  # noqa: PLC0415 - programs that only enqueue need not load the code that reads

        return stats.gather(self.store, self.policy, now_ms=self.store.now_ms())

    def get(self, row_id: int) -> ObservationEvent | None:
        """Return one event, detached from the database, or None."""
        return self.store.views.get(row_id) if 0 < row_id <= LARGEST_ID else None

    def find(  # noqa: PLR0913 - each condition is one
        self,
        *,
        status: Status | str | None = None,
        event_type: str | None = None,
        older_than: datetime | int | None = None,
        due_after: datetime | int | None = None,
        destination: str | None = None,
        limit: int = 100,
    ) -> list[ObservationEvent]:
        """Return the oldest events that match all given conditions, detached from the database.

        `due_after` selects pending events that are due later than this time. Times are datetimes with a time zone,
        or epoch milliseconds.

        Raises `ConfigurationError` for a status, time or limit that no event can have.
        """
        known = [one.value for one in Status]
        if status is not None and status not in known:
            raise ConfigurationError(f"status is {status!r}, expected one of {', '.join(known)}")
        if not 0 <= limit <= LARGEST_ID:
            raise ConfigurationError(f"limit is {limit!r}, expected a whole number from 0 to {LARGEST_ID}")
        return self.store.views.find(
            status=None if status is None else Status(status).value,
            event_type=event_type,
            created_before_ms=None if older_than is None else maintenance.cutoff_ms(older_than),
            due_after_ms=None if due_after is None else maintenance.cutoff_ms(due_after, "due_after"),
            destination=_stored(destination),
            limit=limit,
        )

    def overdue_ms(self) -> int:
        """Return how long, in ms, the next event has been due; 0 if no event is due. Far cheaper than `stats`.

        The event is pending, or its flusher died while sending it.
        """
        now = self.store.now_ms()
        due_ms = [due.next_due_at_ms for due in self.store.views.due(now_ms=now).values()]
        return max((now - one for one in due_ms if one is not None and one <= now), default=0)

    def _wake(self, _session: object = None) -> None:
        for wake in tuple(self.wakers):
            wake()


def _stored(destination: str | None) -> str | None:
    return None if destination is None else stored(destination)
