"""Wakes a sleeping worker: after an enqueue in this process and, on PostgreSQL, in any process.

This is not part of `store`, because it runs no transaction: it listens on its own connection for hours.
"""

from __future__ import annotations

import logging
import selectors
import socket
from contextlib import suppress
from typing import Any

from sqlalchemy import Engine

from outbox.failures import OutboxError
from outbox.records import Listener
from outbox.storage.dialects import dialect_of

log = logging.getLogger("outbox")

_PIECE_BYTES = 4096

# Prefer poll: the other selectors need a file descriptor, and the process may have none left.
_Selector: Any = getattr(selectors, "PollSelector", selectors.DefaultSelector)

# Keeps the parent's connections alive in a child: on collection a driver may close the connection, or warn.
_of_parents: list[Any] = []


class Wakeup:
    """Lets one thread sleep until any thread rings, the database notifies, or the time is over.

    It belongs to the process that created it. After a fork, the child calls `leave_to_parent` and creates its own.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # Other drivers and databases don't notify; there the worker polls.
        self._can_listen = True
        self._listener: Listener | None = None
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._is_rung = self._is_nudged = False

    def nudge(self) -> None:
        """End the current sleep, or the next one, as if its time were over."""
        if not self._is_nudged:
            self._is_nudged = True
            with suppress(OSError):  # the socket is closed
                self._sender.send(b"!")

    def ring(self) -> None:
        """End the current sleep at once, or the next one if no thread sleeps."""
        if not self._is_rung:
            self._is_rung = True
            with suppress(OSError):  # the socket is closed
                self._sender.send(b"!")

    def sleep(self, longest_s: float) -> bool:
        """Sleep at most `longest_s` seconds. Return True if woken, or if a notification may have been missed."""
        if self._can_listen and self._listener is None:
            self._listen()
            if self._listener is not None:
                return True  # notifications before LISTEN were missed
        with _Selector() as selector:
            selector.register(self._receiver, selectors.EVENT_READ)
            if self._listener is not None:
                selector.register(self._listener, selectors.EVENT_READ)
            rung = [key.fileobj for key, _ in selector.select(max(0.0, longest_s))]
        if self._receiver in rung:
            self._receiver.recv(_PIECE_BYTES)
        # Cleared before the caller looks for due events: a later ring must end the next sleep.
        self._is_nudged = False
        is_rung, self._is_rung = self._is_rung, False
        if self._listener is not None and self._listener in rung:
            is_rung = True
            if not self._listener.hear():
                self._stop_listening()
        return is_rung

    def close(self) -> None:
        """Close the sockets and the listening connection."""
        self._receiver.close()
        self._sender.close()
        self._stop_listening()

    def leave_to_parent(self) -> None:
        """In a forked child: drop the inherited sockets, and send nothing on the parent's connection."""
        self._receiver.close()
        self._sender.close()
        _of_parents.append(self._listener)

    def _listen(self) -> None:
        try:
            self._listener = dialect_of(self._engine).listen(self._engine)
        except OutboxError as error:
            # Only debug: the worker polls the same database and reports its errors.
            log.debug(
                "listening for notifications failed, the next sleep tries again: %s",
                error,
                extra={"event_name": "outbox.listening_failed"},
            )
        else:
            self._can_listen = self._listener is not None

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
