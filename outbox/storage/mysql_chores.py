"""The query with which MySQL and MariaDB look for chores.

Each part asks for MIN or MAX, which reads one entry at the end of an index. A query with LIMIT 1 would also read
the entries of rows that changed lately.
"""

from __future__ import annotations

from sqlalchemy import bindparam, func, select

from outbox.lifecycle import Status
from outbox.storage.pauses import IS_TROUBLED
from outbox.storage.sql import LAST_ID, columns, is_one_of, of_destination

# The columns are those of `views.CHORES`. Only delivered rows have a time of their delivery.
CHORES = select(
    select(func.max(columns.status))
    .where(of_destination, is_one_of(columns.status, Status.PARKED))
    .scalar_subquery(),
    select(func.min(columns.sent_at_ms))
    .where(of_destination, columns.sent_at_ms < bindparam("sent_before"))
    .scalar_subquery(),
    select(func.max(columns.waits_for))
    .where(of_destination, is_one_of(columns.status, Status.PENDING))
    .scalar_subquery(),
    IS_TROUBLED.scalar_subquery(),
    LAST_ID.scalar_subquery(),
)
