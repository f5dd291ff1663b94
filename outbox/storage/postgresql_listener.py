"""The connection that PostgreSQL notifies of new events."""

from __future__ import annotations

import logging
from typing import Any

from sqlalchemy import Engine

from outbox.records import Listener
from outbox.storage import forks
from outbox.storage.engines import translated
from outbox.storage.postgresql_connections import is_behind_pooler

log = logging.getLogger("outbox")

CHANNEL = "observation_events"
"""The channel that the commit of new events notifies.

Outboxes in other schemas share it: a flusher that wakes for their events finds none.
"""


class _Listener:
    """A connection that runs LISTEN."""

    def __init__(self, connection: Any, error: type[Exception]) -> None:
        self._connection = connection
        self._error = error

    def fileno(self) -> int:
        return int(self._connection.fileno())

    def hear(self) -> bool:
        try:
            self._connection.pgconn.consume_input()
            while self._connection.pgconn.notifies():
                pass
        except self._error as error:
            log.debug(
                "the connection that listened is broken: %s", error, extra={"event_name": "outbox.listening_ended"}
            )
            return False
        return True

    def close(self) -> None:
        self._connection.close()


def listen(engine: Engine) -> Listener | None:
    """Return a connection of its own that listens, or None behind a pooler."""
    with forks.held_back(), translated(engine):
        pooled = engine.raw_connection()
        connection: Any = pooled.driver_connection
        pooled.detach()  # it is never returned to the pool
        try:
            connection.rollback()
            connection.autocommit = True
            if is_behind_pooler(connection):
                # The pooler would deliver the notifications to any of its clients.
                connection.close()
                return None
            connection.execute(f"LISTEN {CHANNEL}")
        except BaseException:
            connection.close()
            raise
    return _Listener(connection, engine.dialect.loaded_dbapi.Error)
