"""The queries that count rows, each by an index alone where the database has one."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, select

from outbox.lifecycle import Status
from outbox.storage.dialects.base import Dialect
from outbox.storage.sql import is_one_of, of_destination, unindexed_status


def _rows(*kinds: ColumnElement[bool]) -> Select[Any]:
    """Return the query that counts the rows of a destination that match one of these conditions."""
    return _everywhere(*(and_(of_destination, kind) for kind in kinds))


def _everywhere(*kinds: ColumnElement[bool]) -> Select[Any]:
    counts = [select(func.count()).where(kind).scalar_subquery() for kind in kinds]
    return select(sum(counts[1:], start=counts[0]))


_SENT, _PARKED, _ABANDONED = (
    is_one_of(unindexed_status, status) for status in (Status.SENT, Status.PARKED, Status.ABANDONED)
)
SENT_ROWS = _rows(_SENT)


@cache
def pending_rows(dialect: Dialect) -> Select[Any]:
    """Return the query for how many rows are pending or sending."""
    return _rows(*dialect.pending)


@cache
def pending_everywhere(dialect: Dialect) -> Select[Any]:
    """Return the query for how many rows of all destinations are pending or sending."""
    return _everywhere(*dialect.pending)


@cache
def undelivered_rows(dialect: Dialect) -> Select[Any]:
    """Return the query for how many rows are not delivered."""
    return _rows(*dialect.pending, _PARKED, _ABANDONED)


@cache
def all_rows(dialect: Dialect) -> Select[Any]:
    """Return the query for how many rows there are."""
    return _rows(*dialect.pending, _PARKED, _ABANDONED, _SENT)
