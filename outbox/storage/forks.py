"""Forks. Before a fork by Python, this module closes connections. A fork by C code is noticed afterwards.

SQLite's locks belong to a process, but a fork copies what SQLite remembers of them. A connection that the child
opens while it has an inherited one to the same file takes no locks of its own. The next process that closes the
file then deletes the write-ahead log, and what the child commits after that is lost. So no connection to a SQLite
file is open while Python forks: the fork waits until none is in use, and closes them all.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from sqlalchemy import QueuePool

from outbox.clock import monotonic_s
from outbox.failures import StorageError

_PATIENCE_S = 30.0
"""How long a fork waits for connections in use."""
_POLL_S = 0.001

_processes: weakref.WeakValueDictionary[int, Process] = weakref.WeakValueDictionary()

# Single calls in C change these two. So an exception that a signal handler or another thread raises in the middle
# of this module can't block a thread for ever.
_forking: dict[str, int] = {}
_in_use: dict[Use, int] = {}


class Use(Protocol):
    """A use of a connection, which an exception from outside can end at any moment."""

    def is_over(self) -> bool:
        """Return whether the connection is no longer in use."""


class Process:
    """The process that its owner belongs to, and what the owner does when Python forks.

    `before_fork` closes what the child must not inherit, while no other thread uses a connection. `in_child` gives
    up what belongs to the parent, and to threads that the fork has not copied. From then on the owner belongs to
    the child.
    """

    def __init__(
        self,
        *,
        before_fork: Callable[[], object] | None = None,
        in_child: Callable[[], object] | None = None,
    ) -> None:
        self.id = os.getpid()
        self.before_fork = before_fork
        self.in_child = in_child
        _processes[id(self)] = self

    def is_this(self) -> bool:
        """Return whether this is the current process."""
        return os.getpid() == self.id

    def check(self) -> None:
        """Raise `StorageError` in a process that was forked without Python's knowledge."""
        if os.getpid() != self.id:  # `is_this()` would be one call more for each enqueue
            raise StorageError(
                f"process {self.id} forked this process, {os.getpid()}, without Python's knowledge; what the"
                " parent opened can't be used here. Open outboxes and start workers after the fork: in uWSGI set"
                " `lazy-apps = true`, or do it in a function that is decorated with @postfork"
            )


_this = Process()


class OwnPool(QueuePool):
    """A pool that hands out connections in its own process only."""

    __module__ = QueuePool.__module__  # so that its log lines come under SQLAlchemy's settings

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._process = Process()

    def connect(self) -> Any:
        """Return a connection. Raises `StorageError` in a process that was forked without Python's knowledge."""
        self._process.check()
        return super().connect()


@contextmanager
def held_back() -> Iterator[None]:
    """Delay the forks of other threads while a connection is in use."""
    token = _Token()
    use = _UseOf(token)
    try:
        enter(use)
        yield
    finally:
        leave(use)


class _Token:
    """Lives as long as the call that made it."""


class _UseOf:
    def __init__(self, token: _Token) -> None:
        self._token = weakref.ref(token)

    def is_over(self) -> bool:
        return self._token() is None


def enter(use: Use) -> None:
    """Delay the forks of other threads until `leave`, or until the use is over."""
    me = threading.get_ident()
    while True:
        _in_use[use] = me
        if _forking.get("by", me) == me:
            return
        leave(use)
        time.sleep(_POLL_S)


def leave(use: Use) -> None:
    """Let forks continue."""
    _in_use.pop(use, None)


def _before_fork() -> None:
    me = threading.get_ident()
    if not _this.is_this():
        _in_use.clear()  # by threads that a fork in C has not copied
        _this.id = os.getpid()
    deadline = monotonic_s() + _PATIENCE_S
    while (_forking.setdefault("by", me) != me or _others_use_connections(me)) and monotonic_s() < deadline:
        time.sleep(_POLL_S)
    for process in _all_processes():
        if process.before_fork is not None:
            process.before_fork()


def _others_use_connections(me: int) -> bool:
    for use in list(_in_use):
        if use.is_over():
            leave(use)
    return any(user != me for user in list(_in_use.values()))


def _after_fork_in_child() -> None:
    _forking.clear()
    me = threading.get_ident()
    for use, user in list(_in_use.items()):
        if user != me:
            leave(use)
    for process in _all_processes():
        process.id = os.getpid()
        if process.in_child is not None:
            process.in_child()


def _all_processes() -> list[Process]:
    return [process for found in _processes.valuerefs() if (process := found()) is not None]


if sys.platform != "win32":
    # In the parent, no Python function: an interrupt could occur before it has done anything.
    os.register_at_fork(before=_before_fork, after_in_parent=_forking.clear, after_in_child=_after_fork_in_child)
