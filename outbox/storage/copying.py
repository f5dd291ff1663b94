"""Reads the events of a destination, to record them for another one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Select, bindparam, func, select

from outbox.event_ids import derived, is_valid
from outbox.storage.column_types import INTEGERS, invalid_column
from outbox.storage.identity import Identity
from outbox.storage.inserts import known
from outbox.storage.sql import LAST_ID, by_id, columns, without_index
from outbox.storage.transactions import Transaction, Writer, read

_SLICE = 1_000
_SLICE_CHARACTERS = 4 * 1024 * 1024
"""How large the payloads of a slice may be together: the slice is in memory. A larger payload is copied alone."""

_COPIED = (
    "event_id",
    "created_at_ms",
    "occurred_at_ms",
    "not_before_ms",
    "event_type",
    "payload_json",
    "rule_ids_json",
    "session_id",
    "rule_id",
    "file_path",
    "trace_context",
)


def _next(*found: Any) -> Select[Any]:
    # No index has the order of all statuses by id, so all slices together walk the primary key once.
    return by_id(
        select(columns.id, *found)
        .where(
            columns.id > bindparam("seen"),
            columns.id <= bindparam("last"),
            without_index(columns.destination) == bindparam("destination"),
            columns.created_at_ms >= bindparam("created_from", type_=BigInteger),
        )
        .order_by(columns.id)
        .limit(bindparam("slice_size"))
    )


SIZES = _next(func.length(columns.payload_json))
TO_COPY = _next(*(columns[name] for name in _COPIED))


class Slice(NamedTuple):
    """Up to a thousand events of a destination, fewer if their payloads are large."""

    rows: list[dict[str, Any]]
    """The columns to insert, each row with its event id."""
    damaged: int
    """Number of rows whose values no event can have. They are not among `rows`."""
    walked: int
    """How many ids were looked at, with the gaps between them."""


class Copying:
    """Reads the events of one destination as new rows for another one."""

    def __init__(self, writer: Writer, identity: Identity) -> None:
        self._writer = writer
        self._identity = identity

    def last_id(self) -> int:
        """Return the id of the newest row, 0 if there is none."""
        return read(self._writer, lambda transaction: transaction.value(LAST_ID)) or 0

    def slices(self, source: str, *, created_from_ms: int, last_id: int, now_ms: int) -> Iterator[Slice]:
        """Yield the events of a destination up to the row `last_id`, oldest row first, as rows that are due now.

        Each row gets a full new chance: it fails by its age only as if it had been created now.
        """
        outbox_id = read(self._writer, lambda transaction: self._identity.outbox_id(transaction.value))
        seen = 0
        while seen < last_id:
            which = {"destination": source, "created_from": created_from_ms, "seen": seen, "last": last_id}
            sizes = read(self._writer, partial(_read, SIZES, which))
            number = _that_fit([size or 0 for _, size in sizes])
            up_to = sizes[number - 1][0] if number < len(sizes) or number == _SLICE else last_id
            found = read(self._writer, partial(_read, TO_COPY, {**which, "last": up_to}))
            rows = [row for values in found if (row := _new_row(values, outbox_id, now_ms=now_ms)) is not None]
            yield Slice(rows, len(found) - len(rows), up_to - seen)
            seen = up_to

    def missing(self, destination: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return those of the rows whose event ids the destination does not have."""
        event_ids = [row["event_id"] for row in rows]
        there = read(self._writer, lambda transaction: known(transaction, destination, event_ids))
        return [row for row in rows if row["event_id"] not in there]


def _read(query: Select[Any], which: dict[str, Any], transaction: Transaction) -> list[tuple[Any, ...]]:
    return transaction.rows(query, slice_size=_SLICE, **which)


def _that_fit(sizes: Sequence[int]) -> int:
    """Return how many of the first payloads make a slice: at least one, if there are any."""
    fitting = sum(total <= _SLICE_CHARACTERS for total in accumulate(sizes))
    return max(fitting, min(len(sizes), 1))


def _new_row(values: Sequence[Any], outbox_id: str, *, now_ms: int) -> dict[str, Any] | None:
    """Return the columns of the copy, None if another program wrote a value that no event can have."""
    row_id, *copied = values
    row = dict(zip(_COPIED, copied, strict=True))
    if row["event_id"] is None:
        row["event_id"] = derived(outbox_id, row["created_at_ms"], row_id)
    texts = (value for name, value in row.items() if name not in INTEGERS and value is not None)
    if invalid_column(row.items()) or not is_valid(row["event_id"]) or not all(map(_is_writable, texts)):
        return None
    return {**row, "next_attempt_at_ms": max(now_ms, row["not_before_ms"] or 0), "revived_at_ms": now_ms}


def _is_writable(found: object) -> bool:
    try:
        return isinstance(found, str) and found.encode() is not None
    except UnicodeEncodeError:
        return False
