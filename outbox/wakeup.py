"""What a worker sleeps on: a wake-up in this process and, on PostgreSQL, a notification from any.

Beside `store`, because it is not a transaction: it waits on a connection of its own for hours.
"""

from __future__ import annotations

import logging
import selectors
import socket
from contextlib import suppress
from typing import Any

from sqlalchemy import Engine

from outbox.database import translated, use
from outbox.failures import OutboxError
from outbox.statements import CHANNEL

log = logging.getLogger("outbox")

_PIECE_BYTES = 4096

# Kept, for a driver may close a connection that is collected, or complain.
_of_parents: list[Any] = []


class Wakeup:
    """A bell that any thread rings and one at a time sleeps beside.

    It belongs to the process that made it: after a fork the child makes one of its own and leaves this one alone.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # With other drivers and databases nobody tells; whoever sleeps looks from time to time.
        self._can_listen = (engine.dialect.name, engine.dialect.driver) == ("postgresql", "psycopg")
        self._listening: Any = None
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._is_rung = False

    def ring(self) -> None:
        """End the sleep, or the next one, at once."""
        if not self._is_rung:
            self._is_rung = True
            with suppress(OSError):  # it is closed
                self._sender.send(b"!")

    def sleep(self, longest_s: float) -> bool:
        """Return True when it rings or PostgreSQL notifies, or may have; False after that many seconds."""
        if self._can_listen and self._listening is None:
            self._listen()
            if self._listening is not None:
                return True  # what was notified before is not told
        with selectors.DefaultSelector() as selector:
            selector.register(self._receiver, selectors.EVENT_READ)
            if self._listening is not None:
                selector.register(self._listening, selectors.EVENT_READ)
            rung = [key.fileobj for key, _ in selector.select(max(0.0, longest_s))]
        if self._receiver in rung:
            self._receiver.recv(_PIECE_BYTES)
        # Before what is due is looked for: whoever rings from now on rings for the next sleep.
        self._is_rung = False
        if self._listening in rung:
            self._hear()
        return bool(rung)

    def close(self) -> None:
        """Close the connection and all else."""
        self._receiver.close()
        self._sender.close()
        self._stop_listening()

    def leave_to_parent(self) -> None:
        """In a forked child: give up what was inherited, without a word on the connection of the parent."""
        self._receiver.close()
        self._sender.close()
        _of_parents.append(self._listening)

    def _listen(self) -> None:
        try:
            with use.inside(), translated(self._engine):
                pooled = self._engine.raw_connection()
                connection: Any = pooled.driver_connection
                pooled.detach()  # it does not come back
                try:
                    connection.rollback()
                    connection.autocommit = True
                    connection.execute(f"LISTEN {CHANNEL}")
                except BaseException:
                    connection.close()
                    raise
        except OutboxError as error:
            # Whoever sleeps here looks into the same database, and tells of what is wrong with it.
            log.debug(
                "listening failed, the next sleep tries again: %s",
                error,
                extra={"event_name": "outbox.listening_failed"},
            )
        else:
            self._listening = connection

    def _hear(self) -> None:
        try:
            self._listening.pgconn.consume_input()
            while self._listening.pgconn.notifies():
                pass
        except self._engine.dialect.loaded_dbapi.Error as error:
            log.debug(
                "the connection that listened is broken: %s", error, extra={"event_name": "outbox.listening_ended"}
            )
            self._stop_listening()

    def _stop_listening(self) -> None:
        if self._listening is not None:
            self._listening.close()
            self._listening = None
