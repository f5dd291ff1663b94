"""Acts on the events that match: retry, requeue, cancel and purge. Rows in flight are left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Text, and_, bindparam, or_, select

from outbox import outcomes
from outbox.filters import Progress, Where
from outbox.lifecycle import Status, StatusOnly, fire, moves
from outbox.storage.deletion import Deletable, Deletion
from outbox.storage.finding import Finding
from outbox.storage.pauses import RESUME_ALL
from outbox.storage.revival import REQUEUE_ROWS
from outbox.storage.sql import (
    by_id,
    columns,
    contains_text,
    is_in_flight,
    is_one_of,
    may_have_tries,
    move,
    now,
    these_rows,
    this_destination,
    unindexed_status,
)
from outbox.storage.transactions import Transaction, Writer

MATCHED = select(
    *(columns[name] for name in ("id", "status", "event_type", "destination", "created_at_ms")),
    is_in_flight,
    and_(
        columns.next_attempt_at_ms > now, or_(columns.not_before_ms.is_(None), columns.not_before_ms <= now)
    ).label("is_waiting"),
    (columns.next_attempt_at_ms > bindparam("due_after", type_=BigInteger)).label("is_due_later"),
    contains_text(columns.last_error, bindparam("failure", type_=Text)).label("has_failure"),
    may_have_tries,
)
_APART = ("status", "event_type", "is_in_flight", "is_waiting", "is_due_later")
KINDS = MATCHED.with_only_columns(*(MATCHED.selected_columns[name] for name in _APART))
"""The columns that decide whether an action applies to a row. A dry run counts rows by them."""

LOCK_MATCHED = by_id(MATCHED.where(these_rows).order_by(columns.id).with_for_update())

RETRY_PARKED_ROWS, RETRY_WAITING_ROWS = (
    by_id(
        move(outcomes.retry_now(now_ms=now, is_parked=status == Status.PARKED)).where(
            these_rows, is_one_of(unindexed_status, status)
        )
    )
    for status in (Status.PARKED, Status.PENDING)
)
CANCEL_ROWS = by_id(move(outcomes.cancel(last_error=bindparam("reason"))).where(these_rows))
RESUME_ONE = RESUME_ALL.where(this_destination)


class Matched(NamedTuple):
    """What has to be known about a row to decide whether an action applies to it."""

    id: int
    status: str
    event_type: str
    destination: str
    created_at_ms: int
    is_in_flight: bool
    is_waiting: bool
    """Whether it is due later than now, and not because it was scheduled."""
    is_due_later: bool
    has_failure: bool | None
    may_have_tries: bool

    def fits(self, where: Where) -> bool:
        """Return whether the row meets the conditions on columns that may have changed since it was found."""
        return (
            (where.statuses is None or self.status in where.statuses)
            and (where.due_after is None or (self.status == Status.PENDING and bool(self.is_due_later)))
            and (where.failure is None or bool(self.has_failure))
        )


Rows = Sequence[Matched]


class Acted(NamedTuple):
    """The number of rows that an action changed, by status and event type, and of those left in flight."""

    changed: Counter[tuple[str, str]]
    in_flight: int


class _Action(NamedTuple):
    where: Where
    trigger: str | None
    """The move. None stands for a deletion, which any status allows."""
    run: Callable[[Transaction, Rows], object]
    """Changes rows that are locked."""

    @property
    def searched(self) -> Where:
        """The conditions for rows to which the action may apply, or which are in flight."""
        if self.trigger is None:
            return self.where
        wanted = (*moves()[self.trigger].sources, Status.SENDING)
        of = self.where.statuses
        return replace(self.where, status=[one for one in wanted if of is None or one in of])

    def may_start_from(self, row: Matched) -> bool:
        return self.trigger is None or row.status in moves()[self.trigger].sources

    def applies_to(self, row: Matched) -> bool:
        if row.is_in_flight or not self.may_start_from(row) or not row.fits(self.where):
            return False
        return self.trigger != "retry_now" or row.status == Status.PARKED or bool(row.is_waiting)


class Acting:
    """Acts on the rows that match, in slices. Each slice is a short transaction, which locks its rows.

    Rows are searched without a lock. A row that no longer matches when it is locked stays as it is. So do rows in
    flight, and rows inserted meanwhile. Each method returns what it changed, or would change in a dry run.
    """

    def __init__(self, writer: Writer, finding: Finding, deletion: Deletion) -> None:
        self._writer = writer
        self._finding = finding
        self._deletion = deletion

    def retry(
        self, where: Where, *, now_ms: int, dry_run: bool = False, progress: Progress | None = None
    ) -> Acted:
        """Make waiting and parked rows due, and end the pauses of their destinations.

        If whole destinations match, their pauses end even if there are no such rows.
        """

        def retry(transaction: Transaction, rows: Rows) -> None:
            for statement, status in ((RETRY_PARKED_ROWS, Status.PARKED), (RETRY_WAITING_ROWS, Status.PENDING)):
                transaction.change_rows(statement, [row.id for row in rows if row.status == status], now=now_ms)

        if where.is_whole_destination and not dry_run:
            self._resume(where.stored_destination)
        action = _Action(where, "retry_now", retry)
        return self._act(action, now_ms=now_ms, dry_run=dry_run, progress=progress)

    def requeue(
        self, where: Where, *, now_ms: int, dry_run: bool = False, progress: Progress | None = None
    ) -> Acted:
        """Bring abandoned rows back as if they were new."""

        def requeue(transaction: Transaction, rows: Rows) -> None:
            transaction.change_rows(REQUEUE_ROWS, [row.id for row in rows], now=now_ms)

        return self._act(_Action(where, "requeue", requeue), now_ms=now_ms, dry_run=dry_run, progress=progress)

    def cancel(
        self,
        where: Where,
        *,
        last_error: str,
        now_ms: int,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> Acted:
        """Abandon rows that are pending or parked."""

        def cancel(transaction: Transaction, rows: Rows) -> None:
            transaction.change_rows(CANCEL_ROWS, [row.id for row in rows], reason=last_error)

        return self._act(_Action(where, "cancel", cancel), now_ms=now_ms, dry_run=dry_run, progress=progress)

    def purge(
        self, where: Where, *, now_ms: int, dry_run: bool = False, progress: Progress | None = None
    ) -> Acted:
        """Delete rows of any status, and count them in the ledger."""

        def purge(transaction: Transaction, rows: Rows) -> None:
            self._deletion.delete(transaction, [_deletable(row) for row in rows], reason="purge")

        return self._act(_Action(where, None, purge), now_ms=now_ms, dry_run=dry_run, progress=progress)

    def _act(self, action: _Action, *, now_ms: int, dry_run: bool, progress: Progress | None) -> Acted:
        # Leases and due times are compared with the start. A row whose lease ends meanwhile is left alone.
        due_after: Any = action.where.due_after
        these = {"now": now_ms, "due_after": due_after or 0, "failure": action.where.failure or ""}
        if dry_run and not action.where.has_text:
            return self._count(action, these)
        changed: Counter[tuple[str, str]] = Counter()
        in_flight = 0
        resumed: set[str] = set()
        for found in self._finding.slices(action.searched, MATCHED, these, progress=progress):
            rows = [Matched._make(row) for row in found]
            if not dry_run:
                if action.trigger == "retry_now":
                    waiting = {row.destination for row in rows if action.may_start_from(row)}
                    for destination in sorted(waiting - resumed):
                        self._resume(destination)
                    resumed |= waiting
                rows = self._change(action, rows, these)
            for row in rows:
                in_flight += bool(row.is_in_flight)
                changed[row.status, row.event_type] += action.applies_to(row)
        return Acted(+changed, in_flight)

    def _count(self, action: _Action, these: dict[str, Any]) -> Acted:
        """Count in one query, which takes a fifth of the time of reading the rows."""
        changed: Counter[tuple[str, str]] = Counter()
        in_flight = 0
        for *kind, events in self._finding.tally(action.searched, KINDS, these):
            row = Matched(
                id=0,
                destination="",
                created_at_ms=0,
                has_failure=None,
                may_have_tries=False,
                **dict(zip(_APART, kind, strict=True)),
            )
            in_flight += events * bool(row.is_in_flight)
            changed[row.status, row.event_type] += events * action.applies_to(row)
        return Acted(+changed, in_flight)

    def _change(self, action: _Action, found: Rows, these: dict[str, Any]) -> list[Matched]:
        """Change those of the rows to which the action applies. Return all of them as they were before."""
        chosen = [row.id for row in found if action.applies_to(row)]

        def change(transaction: Transaction) -> list[Matched]:
            locked = [Matched._make(row) for row in transaction.rows_of(LOCK_MATCHED, chosen, **these)]
            rows = [row for row in locked if action.applies_to(row)]
            if action.trigger is not None:
                for row in rows:
                    fire(StatusOnly(Status(row.status)), action.trigger)
            if rows:
                action.run(transaction, rows)
            return locked

        others = [row for row in found if not action.applies_to(row)]
        return others + self._writer.run(change) if chosen else others

    def _resume(self, destination: str | None) -> None:
        """End the pause of a destination. None means all destinations."""
        statement, this = (RESUME_ALL, {}) if destination is None else (RESUME_ONE, {"destination": destination})
        self._writer.run(lambda transaction: transaction.change(statement, **this))


def _deletable(row: Matched) -> Deletable:
    return Deletable(
        row.id, row.status, row.event_type, row.destination, row.created_at_ms, bool(row.may_have_tries)
    )
