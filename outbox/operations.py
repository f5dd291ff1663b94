"""What operators do with the events in an outbox, and what they see of them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, overload

from outbox import holds, maintenance
from outbox.destinations import shown, stored
from outbox.failures import ConfigurationError
from outbox.filters import LARGEST_ID, Progress, Scan, Where, cutoff_ms, valid
from outbox.lifecycle import Status
from outbox.outcomes import as_last_error
from outbox.reasons import cancelled

if TYPE_CHECKING:
    from outbox.holds import Hold
    from outbox.policy import Policy
    from outbox.stats import Stats
    from outbox.storage.finding import EventCount, Found
    from outbox.storage.store import Store
    from outbox.storage.tables import ObservationEvent
    from outbox.tries import Try


SCAN_LIMIT = 100_000
"""How many events `find` and `count` read by default to search for text."""


class Operations:
    """The part of `Outbox` for operators."""

    store: Store
    policy: Policy
    wakers: set[Callable[[], object]]

    def retry_now(self, *, destination: str | None = None) -> int:
        """Make waiting and parked events due now, and end the pauses. Return how many events became due.

        None means all destinations. Events scheduled for later, by `not_before`, and events being sent stay as
        they are. One transaction changes all events. `retry` can select events, and uses several
        transactions.
        """
        count = self.store.revival.retry_now(_stored(destination), now_ms=self.store.now_ms())
        self._wake()
        return count

    def requeue_abandoned(
        self, *, older_than: datetime | int, destination: str | None = None, dry_run: bool = False
    ) -> maintenance.RequeueReport:
        """Return abandoned events created before `older_than` to the queue and reset their failures and age.

        With `dry_run`, they are only counted. `older_than` is a datetime with a time zone, or epoch milliseconds.
        `destination` selects the events of one destination; None means all destinations. One transaction locks
        and changes all these events. To select events, or to change them in several transactions, call `requeue`.
        """
        report = maintenance.requeue_abandoned(
            self.store,
            _stored(destination),
            cutoff_ms=cutoff_ms(older_than),
            now_ms=self.store.now_ms(),
            dry_run=dry_run,
        )
        self._wake()
        return report

    def retry(
        self, where: Where, *, dry_run: bool = False, progress: Progress | None = None
    ) -> maintenance.ActionReport:
        """Make matching events that wait or are parked due now, and end the pauses of their destinations.

        Events that are scheduled for later, by `not_before`, stay as they are, and so do events being sent. With
        `dry_run`, the events are only counted.

        `retry`, `requeue`, `abandon` and `purge` have no scan limit: a search for text reads all events that meet
        the other conditions. They act in slices of up to a thousand events, each in a transaction of its own, so
        after an error some events may already be changed. `progress` gets the number of events that were read
        since its last call.
        """
        now = self.store.now_ms()
        acted = self.store.acting.retry(valid(where), now_ms=now, dry_run=dry_run, progress=progress)
        self._wake()
        return maintenance.report(acted)

    def requeue(
        self, where: Where, *, dry_run: bool = False, progress: Progress | None = None
    ) -> maintenance.ActionReport:
        """Return matching abandoned events to the queue and reset their failures and age.

        Transactions, `dry_run` and `progress` work as in `retry`.
        """
        now = self.store.now_ms()
        acted = self.store.acting.requeue(valid(where), now_ms=now, dry_run=dry_run, progress=progress)
        self._wake()
        return maintenance.report(acted)

    @overload
    def abandon(self, row_id: int, reason: str) -> bool: ...

    @overload
    def abandon(
        self, *, where: Where, reason: str, dry_run: bool = False, progress: Progress | None = None
    ) -> maintenance.ActionReport: ...

    def abandon(
        self,
        row_id: int | None = None,
        reason: str = "",
        *,
        where: Where | None = None,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> bool | maintenance.ActionReport:
        """Cancel events that are pending or parked. They become abandoned, with `cancelled: …` as `last_error`.

        With a row id, return False and change nothing if the event is being sent, sent or abandoned, or not there.
        With `where`, cancel the matching events. Transactions, `dry_run` and `progress` work as in `retry`.

        The stored text is cut at 2,048 characters. Raises `ConfigurationError` if the reason is empty.
        """
        if not isinstance(reason, str) or not reason.strip():
            raise ConfigurationError(f"reason is {reason!r}, expected a text")
        last_error = as_last_error(cancelled(reason))
        if where is None:
            if row_id is None or dry_run:
                raise ConfigurationError("where is None, expected a Where, or a row_id without dry_run")
            return 0 < row_id <= LARGEST_ID and self.store.revival.cancel(row_id, last_error=last_error)
        if row_id is not None:
            raise ConfigurationError("row_id and where are both given, expected one of them")
        acted = self.store.acting.cancel(
            valid(where), last_error=last_error, now_ms=self.store.now_ms(), dry_run=dry_run, progress=progress
        )
        return maintenance.report(acted)

    def purge(  # noqa: PLR0913 - each condition is one
        self,
        *,
        where: Where | None = None,
        event_type: str | None = None,
        older_than: datetime | int | None = None,
        destination: str | None = None,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> maintenance.PurgeReport:
        """Delete events of any status for good; with `dry_run`, only count them.

        Give `where`, or the other conditions: `event_type` selects the events of a type, `older_than` those
        created before a datetime with a time zone or epoch milliseconds, `destination` those of one
        destination. Raises `ConfigurationError` if `where`, `event_type` and `older_than` are all missing. The
        ledger counts the deleted events. Events that are being sent are not deleted. Transactions and `progress`
        work as in `retry`.
        """
        if where is None and event_type is None and older_than is None:
            raise ConfigurationError("where, event_type and older_than are all None, expected one of them")
        these = valid(where, event_type=event_type, older_than=older_than, destination=destination)
        acted = self.store.acting.purge(these, now_ms=self.store.now_ms(), dry_run=dry_run, progress=progress)
        return maintenance.purge_report(acted)

    def hold(
        self, destination: str, *, why: str, for_ms: int | None = None, until: datetime | int | None = None
    ) -> Hold:
        """Send nothing more to a destination until `resume`, on all hosts. Return the hold.

        `why` is the reason, at most 500 characters; `outbox status` and the console show it. The hold ends by
        itself after `for_ms` milliseconds, or at `until`, a datetime with a time zone or epoch milliseconds.
        Events are still enqueued. A batch that is being sent is settled as usual. A retry or an acceptance does
        not end a hold. If the destination is on hold already, this replaces the reason and the end.

        Raises `ConfigurationError` for a reason that is empty or too long, and for an end that is in the past or
        after the year 9999.
        """
        if for_ms is not None and until is not None:
            raise ConfigurationError("for_ms and until are both given, expected at most one of them")
        if for_ms is not None and (not isinstance(for_ms, int) or isinstance(for_ms, bool)):
            raise ConfigurationError(f"for_ms is {for_ms!r}, expected a whole number of milliseconds")
        now = self.store.now_ms()
        until_ms = now + for_ms if for_ms is not None else None
        if until is not None:
            until_ms = cutoff_ms(until, "until")
        return self.store.holds.hold(
            stored(destination),
            why=holds.checked_why(why),
            until_ms=None if until_ms is None else holds.checked_end_ms(until_ms, now_ms=now),
            now_ms=now,
        )

    def resume(self, destination: str) -> bool:
        """End the hold of a destination. Return False, and change nothing, if it is not on hold.

        Running workers continue within their poll interval, at most 20 seconds.
        """
        is_resumed = self.store.holds.resume(stored(destination), now_ms=self.store.now_ms())
        self._wake()
        return is_resumed

    def pending_count(self) -> int:
        """Return the number of pending and sending events of all destinations. Parked events do not count."""
        return self.store.views.pending_count()

    def stats(self) -> Stats:
        """Return what is queued, what is stuck, and the likely cause.

        This counts all events, so its time grows with the table: about a second for a million events. Raises
        `StorageError`.
        """
        from outbox import stats  # noqa: PLC0415 - programs that only enqueue need not load the code that reads

        return stats.gather(self.store, self.policy, now_ms=self.store.now_ms())

    def get(self, row_id: int) -> ObservationEvent | None:
        """Return one event, detached from the database. None if it is not there, or no row id can be `row_id`."""
        return self.store.views.get(row_id) if 0 < row_id <= LARGEST_ID else None

    def tries(self, row_id: int) -> list[Try]:
        """Return the last five failed tries of an event, the oldest first. An event that is not there has none."""
        return self.store.tries.of(row_id) if 0 < row_id <= LARGEST_ID else []

    def find(  # noqa: PLR0913 - each condition is one
        self,
        where: Where | None = None,
        *,
        status: Status | str | None = None,
        event_type: str | None = None,
        older_than: datetime | int | None = None,
        due_after: datetime | int | None = None,
        destination: str | None = None,
        limit: int = 100,
        newest_first: bool = False,
        before: int | None = None,
        after: int | None = None,
        scan_limit: int = SCAN_LIMIT,
        progress: Progress | None = None,
    ) -> Found:
        """Return the first events that match, in the order of their row ids, detached from the database.

        Give the conditions as `where`, or as arguments. `before` and `after` are row ids: `before` selects events
        with smaller ids, `after` those with larger ids. For the next page, pass `next` of the result as `before`
        if the newest events come first, else as `after`.

        A search for text reads at most `scan_limit` events that meet the other conditions. The result says how
        many it read, and whether these were all. `progress` gets the number of events that were read since its
        last call.

        Raises `ConfigurationError` for a condition that no event can meet, and for a limit that is negative or
        2^63 and more.
        """
        these = valid(
            where,
            status=status,
            event_type=event_type,
            older_than=older_than,
            due_after=due_after,
            destination=destination,
        )
        for name, number in (("limit", limit), ("before", before or 0), ("after", after or 0)):
            if not 0 <= number <= LARGEST_ID:
                raise ConfigurationError(f"{name} is {number!r}, expected a whole number from 0 to {LARGEST_ID}")
        return self.store.finding.find(
            these,
            limit=limit,
            newest_first=newest_first,
            before=before,
            after=after,
            scan=_scan(scan_limit, progress),
        )

    def count(self, where: Where, *, scan_limit: int = SCAN_LIMIT, progress: Progress | None = None) -> EventCount:
        """Return the number of events that match.

        A search for text reads at most `scan_limit` events that meet the other conditions, the newest first. The
        result says how many it read, and whether these were all. `progress` and the errors are those of `find`.
        """
        return self.store.finding.count(valid(where), _scan(scan_limit, progress))

    def overdue_ms(self) -> int:
        """Return how long, in ms, the next event has been due; 0 if no event is due. Far cheaper than `stats`.

        The event is pending, or its flusher died while sending it. Events of destinations on hold do not count.
        """
        now = self.store.now_ms()
        held = {hold.destination for hold in self.store.holds.lasting(now_ms=now)}
        due_ms = [
            one.next_due_at_ms for name, one in self.store.views.due(now_ms=now).items() if shown(name) not in held
        ]
        return max((now - one for one in due_ms if one is not None and one <= now), default=0)

    def _wake(self, _session: object = None) -> None:
        for wake in tuple(self.wakers):
            wake()


def _scan(limit: int, progress: Progress | None) -> Scan:
    if not 0 < limit < LARGEST_ID:
        raise ConfigurationError(f"scan_limit is {limit!r}, expected a whole number from 1 to {LARGEST_ID - 1}")
    return Scan(limit, progress)


def _stored(destination: str | None) -> str | None:
    return None if destination is None else stored(destination)
