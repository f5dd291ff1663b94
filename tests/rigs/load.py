"""Enqueuers and flushers that work at the same time, and what became of their events."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count, takewhile
from math import inf

from sqlalchemy import URL, select

from builders import rule_fired
from conditions import until
from outbox import BatchItem, ObservationEvent, Outbox, Policy, StorageError
from outbox.storage.engines import reading

IS_FULL = bool(os.environ.get("OUTBOX_RIGS_FULL"))

# Shorter than the lease of the default policy: a row that waits for its end is not delivered in time.
PATIENCE_S = 50
# How soon servers agree that one of them is gone, or one of them takes over, depends on the machine. The full set, which
# runs on a machine of its own, has the default patience.
_PATIENT = Policy() if IS_FULL else Policy(enqueue_patience_ms=30_000)
SHORT_LEASE = replace(_PATIENT, lease_ms=20_000)
VERY_SHORT_LEASE = replace(_PATIENT, lease_ms=5_000)
_IDLE_S = 0.02
_events = ObservationEvent.__table__.c


def events(in_ci: int, full: int) -> int:
    """Return how many events a scenario has, in the shortened set and in the full one."""
    return full if IS_FULL else in_ci


class Load:
    """Threads with an outbox of their own each. An event is known by its event id.

    A claim that nobody knows of, because its COMMIT was cut off, waits for the end of its lease. No upload lasts
    as long as a lease, so an event that is uploaded twice was uploaded under valid leases.
    """

    def __init__(self, policy: Policy = _PATIENT) -> None:
        self._policy = policy
        self.accepted: list[str] = []
        self.uploaded: Counter[str] = Counter()
        self.errors: list[str] = []
        self.worked_at: dict[str, float] = {}
        """When each thread had its last success."""
        self._lock = threading.Lock()
        self._is_enough = threading.Event()
        self._is_over = threading.Event()
        self._enqueuers: list[threading.Thread] = []
        self._flushers: list[threading.Thread] = []
        self.logged_in = True  # the load is the client of its flushers, too

    def upload(self, batch: tuple[BatchItem, ...]) -> None:
        assert all(item.event.session_id == item.event_id for item in batch)
        with self._lock:
            self.uploaded.update(item.event_id for item in batch)

    def enqueue(self, url: str | URL, name: str, at_most: float = inf, *, every_s: float = 0) -> None:
        """Start an enqueuer, which goes on until it is told that it is enough."""

        def work(outbox: Outbox) -> None:
            for number in takewhile(lambda number: number < at_most, count()):
                self._enqueue_one(outbox, f"{name}-{number}")
                self.worked_at[name] = time.monotonic()
                if self._is_enough.wait(every_s):
                    return

        self._start(self._enqueuers, url, name, work)

    def _enqueue_one(self, outbox: Outbox, event_id: str) -> None:
        try:
            outbox.enqueue(rule_fired(session_id=event_id), event_id=event_id)
            self.accepted.append(event_id)
        except StorageError as error:
            self.errors.append(f"enqueue: {error}")

    def flush(self, url: str | URL, name: str) -> None:
        """Start a flusher, which goes on until the end of the load."""

        def work(outbox: Outbox) -> None:
            while not self._is_over.is_set():
                try:
                    report = outbox.flush(self)
                    self.worked_at[name] = time.monotonic()
                    if report.claimed == 0:
                        self._is_over.wait(_IDLE_S)
                except StorageError as error:
                    self.errors.append(f"flush: {error}")

        self._start(self._flushers, url, name, work)

    def _start(
        self, threads: list[threading.Thread], url: str | URL, name: str, work: Callable[[Outbox], None]
    ) -> None:
        def run() -> None:
            try:
                if isinstance(url, Outbox):
                    work(url)
                else:
                    with Outbox(url, policy=self._policy) as outbox:
                        work(outbox)
            except BaseException as error:
                self.errors.append(f"{name}: {error!r}")

        thread = threading.Thread(target=run, name=name, daemon=True)
        threads.append(thread)
        thread.start()

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for a condition. If it does not come about, end the threads and say what happened."""
        try:
            until(condition, PATIENCE_S)
        except AssertionError:
            self.stop()
            raise AssertionError(f"{self.figures()}; errors: {self.errors[:5]}") from None

    def until_more(self, number: int) -> None:
        """Wait until so many more events are accepted."""
        before = len(self.accepted)
        self.until(lambda: len(self.accepted) >= before + number)

    def until_all_went_on(self, after: Callable[[], object]) -> float:
        """Wait until each thread had a success after this, such as a promotion; return within how many seconds."""
        since = time.monotonic()
        after()
        done = time.monotonic()
        names = [thread.name for thread in self._enqueuers + self._flushers]
        self.until(lambda: all(self.worked_at.get(name, -inf) > done for name in names))
        return time.monotonic() - since

    def enough(self) -> None:
        self._is_enough.set()

    def until_sent(self, url: str | URL) -> None:
        """Wait until the enqueuers are done and every row is sent; then end the flushers."""
        self.until(lambda: not any(thread.is_alive() for thread in self._enqueuers))
        with Outbox(url) as outbox:
            self.until(lambda: set(rows(outbox).values()) <= {"sent"})
        self.stop()

    def stop(self) -> None:
        self._is_enough.set()
        self._is_over.set()
        for thread in self._enqueuers + self._flushers:
            thread.join()

    @property
    def lost(self) -> set[str]:
        """The accepted events that were never uploaded."""
        return {*self.accepted} - {*self.uploaded}

    @property
    def twice(self) -> dict[str, int]:
        return {name: times for name, times in self.uploaded.items() if times > 1}

    def figures(self) -> str:
        return (
            f"{len(self.accepted)} accepted, {len(self.uploaded)} delivered, {len(self.twice)} twice,"
            f" {len(self.lost)} lost, {len(self.errors)} errors"
        )

    def show(self, what: str, more: str = "") -> None:
        """Print the figures: `pytest -rP` shows them."""
        print(f"{what}: {self.figures()}{more}")
        print(*self.errors, sep="\n")


def rows(outbox: Outbox) -> dict[str, str]:
    """Return the status of each row by its event id; nothing while the server does not answer."""
    with suppress(StorageError), reading(outbox.engine) as connection:
        found = connection.execute(select(_events.event_id, _events.status))
        return {row.event_id: row.status for row in found}
    return {"": "not known"}
