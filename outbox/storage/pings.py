"""Connections to a server in our pool: they are given back without an open transaction, and still work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

from outbox.clock import monotonic_s

# A connection that worked within this time is not checked.
_TRUSTED_S = 0.1
_HAS_ENDED = "outbox_transaction_has_ended"


def ping_after_idling(engine: Engine, give_back: Callable[[Any], None]) -> None:
    """Replace a connection that broke while nobody used it. One in steady use is not checked each time.

    `give_back` resets a connection that returns to the pool.
    """

    @event.listens_for(engine, "checkin")
    def _note_the_time(connection: Any, record: ConnectionPoolEntry) -> None:
        record.info["idle_since"] = monotonic_s()
        if connection is not None:
            with suppress(engine.dialect.loaded_dbapi.Error):  # it is closed
                give_back(connection)

    @event.listens_for(engine, "checkout")
    def _ping(connection: Any, record: ConnectionPoolEntry, _proxy: object) -> None:
        if monotonic_s() - record.info.get("idle_since", inf) > _TRUSTED_S:
            try:
                is_alive = engine.dialect.do_ping(connection)
            except engine.dialect.loaded_dbapi.Error:
                is_alive = False
            if not is_alive:
                raise DisconnectionError


def roll_back_open_ones(engine: Engine) -> None:
    """Roll back when a connection is given back, unless its transaction ended as it should: `note_the_end`.

    SQLAlchemy itself always rolls back, which most drivers of MySQL turn into a round trip to the server.
    """

    @event.listens_for(engine, "reset")
    def _roll_back(connection: Any, record: ConnectionPoolEntry, about: PoolResetState) -> None:
        has_ended = record.info.pop(_HAS_ENDED, False) or about.transaction_was_reset
        if not has_ended and not about.terminate_only:
            connection.rollback()


def note_the_end(connection: Connection) -> None:
    """Note that the transaction was committed, and that the connection is given back next."""
    connection.info[_HAS_ENDED] = True
