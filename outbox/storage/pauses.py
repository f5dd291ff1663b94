"""The pauses of destinations, which all flushers share, and the probes after them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Engine,
    Select,
    and_,
    bindparam,
    exists,
    literal_column,
    or_,
    select,
    true,
    update,
)

from outbox.destinations import shown
from outbox.holds import Hold
from outbox.pauses import LONGEST_TRUSTED_MS, PROBE_AFTER, SharedPause
from outbox.records import Pause
from outbox.storage.dialects import dialect_of
from outbox.storage.dialects.base import Dialect
from outbox.storage.holds import HOLD_COLUMNS, IS_NOT_ON_HOLD, IS_ON_HOLD
from outbox.storage.sql import lease_until, now, this_destination
from outbox.storage.tables import destinations, holds
from outbox.storage.transactions import Transaction, Writer

_known = destinations.c
# In the order of the fields of a `SharedPause`.
_COLUMNS = (
    "failures",
    "pauses",
    "paused_until_ms",
    "is_asked",
    "probe_until_ms",
    "probe_failed_before",
    "last_error",
)
PAUSE = select(*(_known[name] for name in _COLUMNS)).where(this_destination)
_ONE = select(literal_column("1").label("one")).subquery("one")
PAUSE_AND_HOLD = select(*(_known[name] for name in _COLUMNS), *HOLD_COLUMNS).select_from(
    _ONE.outerjoin(destinations, this_destination).outerjoin(holds, IS_ON_HOLD)
)
"""Always finds one row: a claim reads both by one query, and a destination may have none, one or both of them."""
IS_UNPAUSED = and_(
    IS_NOT_ON_HOLD,
    ~exists().where(
        this_destination,
        or_(_known.failures >= PROBE_AFTER, _known.paused_until_ms > now, _known.probe_until_ms > now),
    ),
)
"""The condition that a claim need not look at the pause and the hold of its destination."""
SEEN = select(_known.pauses).where(this_destination).scalar_subquery()
"""The number of the last pause, as the column of a claim that `IS_UNPAUSED`."""
LOCK_PAUSE = PAUSE.with_for_update()
CHANGE_PAUSE = (
    update(destinations).where(this_destination).values({name: bindparam(f"new_{name}") for name in _COLUMNS})
)
BEGIN_PROBE = (
    update(destinations)
    .where(
        this_destination,
        _known.pauses == bindparam("seen"),
        _known.failures >= PROBE_AFTER,  # else a probe was accepted meanwhile
        *(
            or_(ends <= now, ends > now + LONGEST_TRUSTED_MS)
            for ends in (_known.paused_until_ms, _known.probe_until_ms)
        ),
    )
    .values(probe_until_ms=lease_until)
)
RESUME_ALL = update(destinations).values(
    failures=0, paused_until_ms=0, is_asked=0, probe_until_ms=0, probe_failed_before=0
)
PAUSED = (
    select(*(_known[name] for name in Pause._fields))
    .where(
        _known.paused_until_ms > 0,
        # As in `SharedPause.trusted`: a pause that ends later was begun by a wrong clock.
        *(ends <= now + LONGEST_TRUSTED_MS for ends in (_known.paused_until_ms, _known.probe_until_ms)),
    )
    .order_by(_known.destination)
)
IS_TROUBLED: Select[Any] = select(_known.pauses).where(
    this_destination, or_(_known.failures > 0, _known.paused_until_ms > 0)
)
"""Finds a row if there are failures or a pause that an acceptance ends."""


NEW: dict[str, Any] = {column.name: 0 for column in destinations.c} | {"last_error": ""}
"""The values for a destination that never failed."""


_TRUE = true()


class Changed(NamedTuple):
    """A pause before and after a change."""

    before: SharedPause
    after: SharedPause


class Pauses:
    """Begins and ends pauses, which all flushers of the database share."""

    def __init__(self, engine: Engine, writer: Writer) -> None:
        self._dialect = dialect_of(engine)
        self._writer = writer

    def change(self, destination: str, rule: Callable[[SharedPause], SharedPause]) -> Changed:
        """Change the pause of a destination by a rule, while no other flusher changes it."""

        def change(transaction: Transaction) -> Changed:
            found = transaction.rows(LOCK_PAUSE, destination=destination)
            before = _pause(found[0]) if found else SharedPause()
            after = rule(before)
            if after != before:
                if not found:
                    know(self._dialect, transaction, destination)
                    # Another flusher may have been faster.
                    before = _pause(transaction.rows(LOCK_PAUSE, destination=destination)[0])
                    after = rule(before)
                write_pause(transaction, destination, after)
            return Changed(before, after)

        # Repeatable: a claim counts at most once, because the pause that it begins has another number.
        return self._writer.run(change, repeatable=True, survives_power_cut=False)


def know(dialect: Dialect, transaction: Transaction, destination: str) -> None:
    """Insert a row for a destination, unless it has one."""
    dialect.insert_or_add(transaction, destinations, adds=None, **{**NEW, "destination": destination})


def pause_and_hold(
    transaction: Transaction, destination: str, *, now_ms: int, condition: ColumnElement[bool] = _TRUE
) -> tuple[SharedPause, Hold | None, bool]:
    """Return the pause of a destination, its hold if one lasts, and whether a condition is true.

    A pause that ends impossibly late is ignored: a wrong clock began it.
    """
    ((*found, is_true),) = transaction.rows(_pause_hold_and(condition), destination=destination, now=now_ms)
    pause, hold = tuple(found[: len(_COLUMNS)]), found[len(_COLUMNS) :]
    is_known, is_held = pause[0] is not None, hold[0] is not None
    return (
        _pause(pause).trusted(now_ms) if is_known else SharedPause(),
        Hold(shown(destination), *hold) if is_held else None,
        bool(is_true),
    )


@cache
def _pause_hold_and(condition: ColumnElement[bool]) -> Select[Any]:
    return PAUSE_AND_HOLD.add_columns(condition.label("is_true"))


def write_pause(transaction: Transaction, destination: str, pause: SharedPause) -> None:
    """Write the pause of a destination, which has a row."""
    values = pause._replace(last_error=pause.last_error or "")
    numbers = (int(value) if isinstance(value, bool) else value for value in values)
    new = {f"new_{name}": value for name, value in zip(_COLUMNS, numbers, strict=True)}
    transaction.change(CHANGE_PAUSE, destination=destination, **new)


def begin_probe(
    transaction: Transaction, destination: str, *, seen: int, now_ms: int, lease_until_ms: int
) -> bool:
    """Let this flusher alone probe, until the lease ends; return False if another flusher was faster."""
    return bool(
        transaction.change(BEGIN_PROBE, destination=destination, seen=seen, now=now_ms, lease_until=lease_until_ms)
    )


def _pause(row: tuple[Any, ...]) -> SharedPause:
    failures, number, until_ms, is_asked, probe_until_ms, failed_before, last_error = row
    return SharedPause(
        failures, number, until_ms, bool(is_asked), probe_until_ms, bool(failed_before), last_error or None
    )
