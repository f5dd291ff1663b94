"""Checks that pooled connections to a server still work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry

from outbox.clock import monotonic_s

# A connection that worked within this time is not checked.
_TRUSTED_S = 0.1


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
