"""What brings rows back: revival after a success, unpark, retry, and requeue of abandoned rows."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Engine, Select, and_, bindparam, case, or_, select, update

from outbox import outcomes, revival
from outbox.destinations import DEFAULT_DESTINATION
from outbox.lifecycle import Status
from outbox.outcomes import WaitsFor
from outbox.policy import Policy
from outbox.storage.dialects import dialect_of
from outbox.storage.indexes import OLDEST_OF_STATUS, TIMES_INDEX, WAITING_INDEX
from outbox.storage.pauses import RESUME_ALL, know
from outbox.storage.sql import (
    by_id,
    columns,
    has_status,
    in_order,
    is_one_of,
    literal,
    lock,
    move,
    now,
    of_destination,
    oldest_first,
    these_rows,
    this_destination,
    this_row,
    unindexed_status,
    without_index,
)
from outbox.storage.tables import destinations
from outbox.storage.transactions import Transaction, Writer, read

_UNPARK_EVERY_MS = 60_000

_is_parked = and_(of_destination, is_one_of(unindexed_status, Status.PARKED))
PARKED = select(columns.id).where(_is_parked).order_by(*oldest_first).limit(bindparam("unpark_limit"))
LOCK_PARKED = in_order(lock(PARKED), OLDEST_OF_STATUS)
_UNPARK = outcomes.unpark(row_id=columns.id, now_ms=now, spread_ms=bindparam("spread"))
UNPARK_ROWS = by_id(move(_UNPARK).where(these_rows))
# The one that was not tried for longest: mostly one that was never unparked, near the head of the first query.
LONGEST_PARKED = (
    in_order(PARKED.where(columns.revived_at_ms.is_(None)).limit(1), OLDEST_OF_STATUS),
    select(columns.id).where(_is_parked).order_by(columns.revived_at_ms, *oldest_first).limit(1),
)
_may_unpark = or_(
    destinations.c.unparked_at_ms <= now - _UNPARK_EVERY_MS,
    destinations.c.unparked_at_ms > now,  # the clock was set back
)
LAST_UNPARKED = select(destinations.c.unparked_at_ms).where(this_destination, ~_may_unpark)
BEGIN_UNPARK = update(destinations).where(this_destination, _may_unpark).values(unparked_at_ms=now)


_soon = bindparam("soon", type_=BigInteger)
_LATEST: dict[WaitsFor, ColumnElement[int]] = {
    WaitsFor.SERVICE: _soon,
    WaitsFor.PROOF: case(
        (
            columns.suspected_at_ms > bindparam("young_since", type_=BigInteger),
            bindparam("late", type_=BigInteger),
        ),
        else_=_soon,
    ),
    WaitsFor.ROW: _soon,
}


def _late(kind: WaitsFor, due_at_ms: ColumnElement[int]) -> Select[Any]:
    """Return the query for the rows that wait for `kind` and are due later than a success allows."""
    return select(columns.id, columns.suspected_at_ms).where(
        of_destination,
        is_one_of(unindexed_status, Status.PENDING),
        columns.waits_for == literal(kind),
        due_at_ms > _LATEST[kind],
    )


# To find out whether there is any such row. It reads from the latest due time, so nearly always one row decides.
LAST_LATE = {
    kind: in_order(
        _late(kind, columns.next_attempt_at_ms).order_by(columns.next_attempt_at_ms.desc()).limit(1), TIMES_INDEX
    )
    for kind in _LATEST
}
# With its index of the due time, SQLite would read and sort all waiting rows for each batch.
LOCK_LATE = {
    kind: in_order(
        lock(
            _late(kind, without_index(columns.next_attempt_at_ms))
            .order_by(*oldest_first)
            .limit(bindparam("revive_limit"))
        ),
        WAITING_INDEX,
    )
    for kind in _LATEST
}
_REVIVE = outcomes.revive(
    next_attempt_at_ms=bindparam("begin", type_=BigInteger) + columns.id % bindparam("spread")
)
REVIVE_ROWS = by_id(move(_REVIVE).where(these_rows))

# Two statements: in one with a CASE on the status, MySQL would read the status that it has just set.
RETRY_PARKED = move(outcomes.retry_now(now_ms=now, is_parked=True)).where(has_status(Status.PARKED))
RETRY_WAITING = move(outcomes.retry_now(now_ms=now, is_parked=False)).where(
    has_status(Status.PENDING),
    columns.next_attempt_at_ms > now,
    or_(columns.not_before_ms.is_(None), columns.not_before_ms <= now),
)
RETRY = (RESUME_ALL, RETRY_PARKED, RETRY_WAITING)
RETRY_ONE = (
    RESUME_ALL.where(this_destination),
    RETRY_PARKED.where(of_destination),
    RETRY_WAITING.where(of_destination),
)
"""The same for one destination."""

OLD_ABANDONED = (
    select(columns.id, columns.event_type)
    .where(is_one_of(unindexed_status, Status.ABANDONED), columns.created_at_ms < bindparam("cutoff"))
    .order_by(columns.id)
)
OLD_ABANDONED_OF_ONE = OLD_ABANDONED.where(of_destination)
LOCK_OLD_ABANDONED, LOCK_OLD_ABANDONED_OF_ONE = (
    one.with_for_update() for one in (OLD_ABANDONED, OLD_ABANDONED_OF_ONE)
)
CANCEL = by_id(move(outcomes.cancel(last_error=bindparam("reason"))).where(this_row))
REQUEUE_ROWS = by_id(move(outcomes.requeue(now_ms=now)).where(these_rows))


def _rows(query: Select[Any], transaction: Transaction, **parameters: Any) -> list[tuple[Any, ...]]:
    return transaction.rows(query, **parameters)


class Revival:
    """Makes rows due again."""

    def __init__(self, engine: Engine, writer: Writer) -> None:
        self._dialect = dialect_of(engine)
        self._writer = writer

    def revive(
        self, destination: str = DEFAULT_DESTINATION, *, now_ms: int, policy: Policy, ended_failures: int
    ) -> int:
        """Make the oldest waiting rows of a destination due, because it accepted another row; return how many."""
        kinds = [WaitsFor.SERVICE, WaitsFor.PROOF]
        if ended_failures >= revival.ROWS_REVIVED_AFTER:
            kinds.append(WaitsFor.ROW)
        soon, late = (
            revival.due_range(now_ms=now_ms, policy=policy, is_young=is_young) for is_young in (False, True)
        )
        limits: dict[str, Any] = {
            "destination": destination,
            "soon": soon.end_ms,
            "late": late.end_ms,
            "young_since": now_ms - policy.proof_ms,
            "revive_limit": policy.revive_limit,
        }
        # Usually there are none. Then nothing is locked.
        waiting = [kind for kind in kinds if read(self._writer, partial(_rows, LAST_LATE[kind], **limits))]

        def revive(transaction: Transaction) -> int:
            changed = 0
            for kind in waiting:
                rows = transaction.rows(LOCK_LATE[kind], **limits)
                young = {
                    row_id
                    for row_id, suspected_at_ms in rows
                    if kind is WaitsFor.PROOF
                    and suspected_at_ms is not None
                    and revival.is_young(suspected_at_ms, now_ms=now_ms, policy=policy)
                }
                others = [row_id for row_id, _ in rows if row_id not in young]
                for due, row_ids in ((late, sorted(young)), (soon, others)):
                    changed += transaction.change_rows(
                        REVIVE_ROWS, row_ids, begin=due.begin_ms, spread=due.spread_ms
                    )
            return changed

        return self._writer.run(revive, survives_power_cut=False) if waiting else 0

    def unpark(self, destination: str = DEFAULT_DESTINATION, *, now_ms: int, limit: int, spread_ms: int) -> int:
        """Bring back the oldest parked rows of a destination; return how many."""

        def unpark(transaction: Transaction) -> int:
            found = transaction.rows(LOCK_PARKED, destination=destination, unpark_limit=limit)
            parked = [row_id for (row_id,) in found]
            return transaction.change_rows(UNPARK_ROWS, parked, now=now_ms, spread=spread_ms)

        return self._writer.run(unpark, survives_power_cut=False)

    def unpark_one(self, destination: str = DEFAULT_DESTINATION, *, now_ms: int, spread_ms: int) -> int:
        """Bring back the row whose last try is the oldest, at most one a minute; return how many."""
        this = {"destination": destination, "now": now_ms}
        if read(self._writer, lambda transaction: transaction.rows(LAST_UNPARKED, **this)):
            return 0
        found: list[tuple[Any, ...]] = []
        for query in LONGEST_PARKED:
            found = found or read(self._writer, partial(_rows, query, destination=destination))

        def unpark(transaction: Transaction) -> int:
            know(self._dialect, transaction, destination)
            is_first = transaction.change(BEGIN_UNPARK, **this)
            row_ids = [row_id for (row_id,) in found] if is_first else []
            return transaction.change_rows(UNPARK_ROWS, row_ids, now=now_ms, spread=spread_ms)

        return self._writer.run(unpark, survives_power_cut=False) if found else 0

    def retry_now(self, destination: str | None = None, *, now_ms: int) -> int:
        """Make waiting and parked rows due, and end the pause; return how many. None means all destinations."""
        this = {} if destination is None else {"destination": destination}
        resume, *retries = RETRY if destination is None else RETRY_ONE

        def retry_now(transaction: Transaction) -> int:
            transaction.change(resume, **this)
            return sum(transaction.change(retry, now=now_ms, **this) for retry in retries)

        return self._writer.run(retry_now)

    def cancel(self, row_id: int, *, last_error: str) -> bool:
        """Abandon a row that is pending or parked. Return False if it is neither, or not there."""
        return bool(
            self._writer.run(lambda transaction: transaction.change(CANCEL, row_id=row_id, reason=last_error))
        )

    def requeue(
        self, destination: str | None = None, *, cutoff_ms: int, now_ms: int, dry_run: bool
    ) -> dict[str, int]:
        """Bring back the abandoned rows created before the cutoff. None means all destinations.

        Return the number of these rows for each event type, sorted by its name.
        """
        these = {"cutoff": cutoff_ms} if destination is None else {"cutoff": cutoff_ms, "destination": destination}
        look_up, lock_up = (
            (OLD_ABANDONED, LOCK_OLD_ABANDONED)
            if destination is None
            else (OLD_ABANDONED_OF_ONE, LOCK_OLD_ABANDONED_OF_ONE)
        )

        def requeue(transaction: Transaction) -> list[tuple[Any, ...]]:
            if dry_run:
                return transaction.rows(look_up, **these)
            rows = transaction.rows(lock_up, **these)
            transaction.change_rows(REQUEUE_ROWS, [row_id for row_id, _ in rows], now=now_ms)
            return rows

        per_type = Counter(event_type for _, event_type in self._writer.run(requeue))
        return dict(sorted(per_type.items()))
