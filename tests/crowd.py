"""Threads that use an outbox at the same time, and what became of their calls."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from math import inf

from builders import rule_fired
from conditions import FOREVER_S, until
from outbox import Outbox


class Crowd:
    """Calls by name, each in a thread of its own, and what they returned or raised."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self.returned: dict[str, object] = {}

    def start(self, name: str, call: Callable[[], object]) -> None:
        def run() -> None:
            try:
                self.returned[name] = call()
            except BaseException as error:
                self.returned[name] = error

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()

    def join(self) -> dict[str, object]:
        for thread in self._threads:
            thread.join(FOREVER_S)
            assert not thread.is_alive(), "a thread hangs"
        return self.returned


class Queue(Crowd):
    """Calls that come while another one has the connection of the outbox, and wait until `go_on`."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self._writer = outbox.store._writer
        # An enqueue with a stale count would wait for the connection before it joins the others.
        outbox.store.bounds.count_undelivered()
        outbox.store.bounds._counts[""].undelivered._counted_s = inf
        is_held, self._goes_on = threading.Event(), threading.Event()

        def hold(_: object) -> None:
            is_held.set()
            self._goes_on.wait()

        self.start("holder", lambda: self._writer.run(hold, is_single=True))
        is_held.wait()

    def wait(self, name: str, call: Callable[[], object]) -> None:
        """Let a call wait for a shared commit, behind those before."""
        before = len(self._writer._group.calls)
        self.start(name, call)
        until(lambda: len(self._writer._group.calls) > before or name in self.returned)

    def go_on(self) -> dict[str, object]:
        """Let all go on; return what became of those that waited."""
        self._goes_on.set()
        self.join()
        del self.returned["holder"]
        return self.returned


def enqueuing(outbox: Outbox, name: str) -> Callable[[], object]:
    return lambda: outbox.enqueue(rule_fired(session_id=name))


def check_rows(url: str, returned: dict[str, object]) -> None:
    """Check that there is one event of each call that returned an id, and at most one of each other call."""
    connection = sqlite3.connect(url.removeprefix("sqlite:///"))
    rows = Counter(name for (name,) in connection.execute("SELECT session_id FROM observation_events"))
    connection.close()
    for name, one in returned.items():
        assert rows[name] == 1 if isinstance(one, int) else rows[name] <= 1, (name, one, rows[name])
    assert set(rows) <= set(returned)


def assert_unlocked(url: str) -> None:
    """Check that nobody holds the file's write lock."""
    connection = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=0, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    connection.close()
