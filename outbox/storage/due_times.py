"""When the next row of a destination is due, and when the destination last accepted one."""

from __future__ import annotations

from sqlalchemy import BigInteger, cast, func, literal_column, select, union_all

from outbox.lifecycle import Status
from outbox.outcomes import WaitsFor
from outbox.storage.column_types import TIMES_BELOW
from outbox.storage.sql import (
    columns,
    did_not_fail,
    has_creation_time,
    has_due_time,
    is_one_of,
    literal,
    never_tried,
    now,
    of_destination,
    oldest_first,
    unindexed_status,
    was_tried,
)

LAST_ACCEPTED = (
    select(columns.sent_at_ms)
    .where(
        of_destination,
        is_one_of(unindexed_status, Status.SENT),
        columns.sent_at_ms < literal_column(str(TIMES_BELOW), BigInteger),
    )
    .order_by(columns.sent_at_ms.desc())
    .limit(1)
)

_waits = [columns.waits_for == literal(one) for one in WaitsFor]
_pending = is_one_of(unindexed_status, Status.PENDING)
# One look-up for each status and each reason to wait: no index has the order of the times over several of them.
_due_by_status = union_all(
    # These are due since they were created, so the oldest one was due first.
    select(
        select(columns.next_attempt_at_ms)
        .where(of_destination, _pending, did_not_fail, never_tried, has_creation_time, has_due_time)
        .order_by(*oldest_first)
        .limit(1)
        .scalar_subquery()
        .label("due")
    ),
    *(
        select(func.min(columns.next_attempt_at_ms)).where(of_destination, has_due_time, *conditions)
        for conditions in (
            (_pending, did_not_fail, was_tried),
            *((_pending, waits) for waits in _waits),
            # Its flusher died, or will be late.
            *(
                (is_one_of(columns.status, Status.SENDING), columns.next_attempt_at_ms <= now, waits)
                for waits in (did_not_fail, *_waits)
            ),
        )
    ),
).subquery()
NEXT_DUE = select(cast(func.min(_due_by_status.c.due), BigInteger))
