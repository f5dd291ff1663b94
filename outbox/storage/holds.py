"""The holds of destinations: an operator's decisions, which the claims of all flushers obey."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    and_,
    bindparam,
    case,
    delete,
    exists,
    or_,
    select,
    update,
)

from outbox.destinations import shown
from outbox.holds import Hold
from outbox.storage.dialects import dialect_of
from outbox.storage.engines import reading
from outbox.storage.sql import now
from outbox.storage.tables import holds
from outbox.storage.transactions import Transaction, Writer

_lasts: ColumnElement[bool] = or_(holds.c.until_ms.is_(None), holds.c.until_ms > now)
_this = holds.c.destination == bindparam("destination")
IS_ON_HOLD = and_(_this, _lasts)
"""The condition of the hold of a destination, if it lasts."""
IS_NOT_ON_HOLD = ~exists().where(IS_ON_HOLD)
HOLD_COLUMNS = (holds.c.why, holds.c.since_ms, holds.c.until_ms)

_HOLD = select(*HOLD_COLUMNS).where(IS_ON_HOLD)
_SINCE = select(holds.c.since_ms).where(_this)
_HOLDS = select(holds.c.destination, *HOLD_COLUMNS).where(_lasts).order_by(holds.c.destination)
_until = bindparam("new_until", type_=BigInteger)
# `since_ms` comes first, because MySQL sets one column after the other and its value needs the old `until_ms`.
_CHANGE = (
    update(holds)
    .where(_this)
    .ordered_values(
        ("since_ms", case((holds.c.until_ms <= now, now), else_=holds.c.since_ms)),
        ("until_ms", _until),
        ("why", bindparam("new_why")),
    )
)
_RESUME = delete(holds).where(IS_ON_HOLD)


class Holds:
    """Begins and ends holds. A hold whose time is over stays in the table until its destination is held again."""

    def __init__(self, engine: Engine, writer: Writer) -> None:
        self._engine = engine
        self._dialect = dialect_of(engine)
        self._writer = writer

    def hold(self, destination: str, *, why: str, until_ms: int | None, now_ms: int) -> Hold:
        """Put a destination on hold. If it is held already, only the reason and the end change."""

        def hold(transaction: Transaction) -> Hold:
            new = {"destination": destination, "why": why, "since_ms": now_ms, "until_ms": until_ms}
            self._dialect.insert_or_add(transaction, holds, adds=None, **new)
            transaction.change(_CHANGE, destination=destination, now=now_ms, new_why=why, new_until=until_ms)
            return Hold(shown(destination), why, transaction.value(_SINCE, destination=destination), until_ms)

        return self._writer.run(hold, repeatable=True)

    def resume(self, destination: str, *, now_ms: int) -> bool:
        """End the hold of a destination. Return False if it is not held."""
        these = {"destination": destination, "now": now_ms}
        return bool(self._writer.run(lambda transaction: transaction.change(_RESUME, **these)))

    def lasting(self, *, now_ms: int) -> list[Hold]:
        """Return the holds that last, by name of the destination."""
        with reading(self._engine) as connection:
            return lasting(connection, now_ms=now_ms)


def lasting(connection: Connection, *, now_ms: int) -> list[Hold]:
    """Return the holds that last, by name of the destination."""
    return [Hold(shown(name), *hold) for name, *hold in connection.execute(_HOLDS, {"now": now_ms})]


def hold_of(transaction: Transaction, destination: str, *, now_ms: int) -> Hold | None:
    """Return the hold of a destination, if it lasts."""
    found = transaction.rows(_HOLD, destination=destination, now=now_ms)
    return Hold(shown(destination), *found[0]) if found else None
