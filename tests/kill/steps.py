"""The steps of a process: every SQL statement and every call on a socket, before and after it."""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg

_CHANGES = re.compile("INSERT|UPDATE|DELETE")


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
        _watch_psycopg(self.reach)
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


def _watch_psycopg(reach: Callable[[str], None]) -> None:
    """Watch psycopg, whose sockets are not Python's: also when a statement is sent and not answered yet.

    What only reads is no step: it is the same moment for the rest of the world before and after it.
    """
    doing: str | None = None

    def watch(kind: type, method: str, fixed_name: str | None = None) -> None:
        original = getattr(kind, method)

        def call(owner: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal doing
            name = fixed_name or _name(str(arguments[0]))
            if fixed_name is None and not _CHANGES.search(str(arguments[0])):
                return original(owner, *arguments, **options)
            reach(f"before {name}")
            outer, doing = doing, name
            result = original(owner, *arguments, **options)
            doing = outer
            reach(f"after {name}")
            return result

        setattr(kind, method, call)

    for method in ("execute", "executemany"):
        watch(psycopg.Cursor, method)
    for method, name in (("commit", "COMMIT"), ("rollback", "ROLLBACK"), ("close", "close")):
        watch(psycopg.Connection, method, name)

    wait = psycopg.Connection.wait

    def wait_watched(connection: Any, steps: Any, *arguments: Any) -> Any:
        def watched() -> Any:
            try:
                wanted = next(steps)
                while True:
                    if doing is not None:
                        reach(f"within {doing}")
                    wanted = steps.send((yield wanted))
            except StopIteration as end:
                return end.value

        return wait(connection, watched(), *arguments)

    psycopg.Connection.wait = wait_watched


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
