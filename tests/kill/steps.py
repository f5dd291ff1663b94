"""The steps of a process: every SQL statement and every call on a socket, before and after it."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any


class Steps:
    """Counts steps, and kills the process at one of them. Counting starts when it is made.

    Before a step is the same moment for the rest of the world as after the last one, unless the process told
    something in between; then it is not counted.
    """

    def __init__(self, kill_at: int, write: Callable[[str], object]) -> None:
        self.names: list[str] = []
        self._kill_at = kill_at
        self._write = write
        self._watches = True
        self._is_new = True
        _watch_sqlite(self.reach)
        _watch_sockets(self.reach)

    def tell(self, fact: str) -> None:
        self._write(fact)
        self._is_new = True

    def reach(self, name: str) -> None:
        if not self._watches:
            return
        is_before = name.startswith("before ")
        if self._is_new or not is_before:
            self.names.append(name)
            if len(self.names) == self._kill_at:
                self._write(f"killed {name}")
                os.kill(os.getpid(), signal.SIGKILL)
        self._is_new = is_before

    def end(self) -> None:
        """What the process does from now on, to save its coverage say, is none of its steps."""
        self._watches = False


def _watch_sqlite(reach: Callable[[str], None]) -> None:
    cursor_class = _watched_cursor(reach)

    class Connection(sqlite3.Connection):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            # Called for each statement, also for those that commit and roll back, just before SQLite runs it.
            self.set_trace_callback(lambda statement: reach(f"before {_name(statement)}"))

        def cursor(self, factory: type[sqlite3.Cursor] = cursor_class) -> Any:
            return super().cursor(factory)

        def execute(self, statement: str, *arguments: Any) -> Any:
            return self.cursor().execute(statement, *arguments)

        def commit(self) -> None:
            was_open = self.in_transaction
            super().commit()
            if was_open:
                reach("after COMMIT")

        def rollback(self) -> None:
            was_open = self.in_transaction
            super().rollback()
            if was_open:
                reach("after ROLLBACK")

        def close(self) -> None:
            # The last one to close brings the write-ahead log into the file.
            reach("before close")
            super().close()
            reach("after close")

    sqlite3.dbapi2.connect = partial(sqlite3.connect, factory=Connection)


def _watched_cursor(reach: Callable[[str], None]) -> type[sqlite3.Cursor]:
    class Cursor(sqlite3.Cursor):
        def execute(self, statement: str, *arguments: Any) -> Any:
            result = super().execute(statement, *arguments)
            reach(f"after {_name(statement)}")
            return result

        def executemany(self, statement: str, *arguments: Any) -> Any:
            result = super().executemany(statement, *arguments)
            reach(f"after {_name(statement)}")
            return result

    return Cursor


def _name(statement: str) -> str:
    return " ".join(statement.split()[:2])


def _watch_sockets(reach: Callable[[str], None]) -> None:
    def watched(method: str) -> Callable[..., Any]:
        original = getattr(socket.socket, method)

        def call(sock: socket.socket, *arguments: Any) -> Any:
            reach(f"before {method}")
            result = original(sock, *arguments)
            reach(f"after {method}")
            return result

        return call

    for method in ("connect", "recv", "recv_into", "send"):
        setattr(socket.socket, method, watched(method))

    send_all = socket.socket.sendall

    def in_halves(sock: socket.socket, data: Any, *flags: int) -> None:
        data = memoryview(data)
        half = len(data) // 2
        reach("before sendall")
        send_all(sock, data[:half], *flags)
        reach("within sendall")
        send_all(sock, data[half:], *flags)
        reach("after sendall")

    socket.socket.sendall = in_halves
