"""The failed tries of events that are still there: the last five of each."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence

from sqlalchemy import BigInteger, Engine, Text, and_, bindparam, delete, func, insert, select

from outbox.storage.column_types import LONGEST_NAME
from outbox.storage.engines import reading
from outbox.storage.sql import chunk_ids, columns, events, these_rows
from outbox.storage.tables import tries
from outbox.storage.transactions import Transaction
from outbox.tries import KEPT, Failed, Try

_of_event = and_(tries.c.row_id == columns.id, tries.c.created_at_ms == columns.created_at_ms)
_TRIES = (
    select(*(tries.c[name] for name in Try._fields))
    .join_from(events, tries, _of_event)
    .where(columns.id == bindparam("row_id"))
    .order_by(tries.c.id)
)
_LATEST = (
    select(columns.destination, *(tries.c[name] for name in Try._fields))
    .join_from(events, tries, _of_event)
    .where(tries.c.id > select(func.max(tries.c.id)).scalar_subquery() - bindparam("most", type_=BigInteger))
    .order_by(tries.c.id.desc())
)
# The text is read from the rows that were just settled, so one statement serves all rows of a request.
_RECORD = insert(tries).from_select(
    ["row_id", "created_at_ms", "tried_at_ms", "duration_ms", "host", "verdict", "failure"],
    select(
        columns.id,
        columns.created_at_ms,
        bindparam("tried_at", type_=BigInteger),
        bindparam("took", type_=BigInteger),
        bindparam("host", type_=Text),
        bindparam("verdict", type_=Text),
        columns.last_error,
    ).where(these_rows),
)
_older = tries.alias("older")
_oldest_kept = (
    select(_older.c.id)
    .where(_older.c.row_id == columns.id, _older.c.created_at_ms == columns.created_at_ms)
    .order_by(_older.c.id.desc())
    .limit(1)
    .offset(KEPT - 1)
    .correlate(events)
    .scalar_subquery()
)
# MySQL lets a DELETE read its own table only in a query of its own, inside the condition.
_excess = select(_oldest_kept.label("id")).where(these_rows).subquery("excess")
_MAKE_ROOM = delete(tries).where(tries.c.id.in_(select(_excess.c.id)))
_FORGET = delete(tries).where(tries.c.row_id.in_(chunk_ids))


class Tries:
    """Reads the tries of events."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def of(self, row_id: int) -> list[Try]:
        """Return the tries of an event that are kept, in order."""
        with reading(self._engine) as connection:
            return [Try(*row) for row in connection.execute(_TRIES, {"row_id": row_id})]

    def latest(self, most: int = 500) -> dict[str, list[Try]]:
        """Return the latest tries by stored destination, the last one first.

        They are among the last `most` tries of all destinations. Tries of events that are gone are left out.
        """
        found: defaultdict[str, list[Try]] = defaultdict(list)
        with reading(self._engine) as connection:
            for destination, *one in connection.execute(_LATEST, {"most": most}):
                found[destination].append(Try(*one))
        return dict(found)


def record(transaction: Transaction, failed: Mapping[int, Failed], *, may_have_tries: bool) -> None:
    """Keep the failed try of each row. `failed` says, by row id, how it failed; the text is that of `last_error`.

    If any of the rows may have tries already, this deletes the oldest try of each row that has five.
    """
    if may_have_tries:
        transaction.change_rows(_MAKE_ROOM, [*failed])
    by_request: defaultdict[Failed, list[int]] = defaultdict(list)
    for row_id, one in failed.items():
        by_request[one].append(row_id)
    host = _host()
    for one, row_ids in by_request.items():
        transaction.change_rows(
            _RECORD, row_ids, tried_at=one.tried_at_ms, took=one.duration_ms, host=host, verdict=one.verdict
        )


def forget(transaction: Transaction, row_ids: Sequence[int]) -> None:
    """Delete the tries of these rows."""
    transaction.change_rows(_FORGET, row_ids)


def _host() -> str:
    """Return the name of this host, as a text that every database takes."""
    return socket.gethostname()[:LONGEST_NAME].encode(errors="replace").decode()
