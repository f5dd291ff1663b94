"""Forks happen only while no connection is in use.

SQLite's locks belong to a process, but what it remembers of them is copied by a fork. A connection that the child
opens beside one that it inherited takes no locks of its own, and so the next process to close the file deletes the
write-ahead log under it: what the child commits from then on is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Lets threads in until one of them is about to fork; that one waits until it is alone."""

    def __init__(self) -> None:
        self._entrance = threading.RLock()
        self._left = threading.Condition()
        self._inside: set[int] = set()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Hold back the forks of other threads."""
        me = threading.get_ident()
        if me in self._inside:
            yield
            return
        try:
            with self._entrance:
                self._inside.add(me)
            yield
        finally:
            with self._left:
                self._inside.discard(me)
                self._left.notify_all()

    def shut(self, patience_ms: int) -> None:
        """Let nobody in any more, and wait so long at most for those inside to leave."""
        self._entrance.acquire()
        me = threading.get_ident()
        with self._left:
            self._left.wait_for(lambda: self._inside <= {me}, patience_ms / 1_000)

    def open(self) -> None:
        """Let threads in again."""
        self._entrance.release()

    def open_in_child(self) -> None:
        """Let threads in again, where the other ones are gone."""
        self._left = threading.Condition()
        self._inside &= {threading.get_ident()}
        self._entrance.release()
