"""The real outbox on a file of SQLite, for scenarios: the same ones that the model plays."""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from unittest import mock

from outbox import BatchItem, Outbox, Policy, RuleFired, clock, flusher
from outbox.storage import store
from outbox.waits import Look

from .play import Final, Tried, Upload
from .services import HOUR
from .virtual_time import VirtualTime


class RealPlace:
    """A file, and an `Outbox` for each flusher, as processes would have."""

    def __init__(self, time: VirtualTime, policy: Policy, file: Path) -> None:
        self._time = time
        self._policy = policy
        self._file = file
        self._outbox = Outbox.open(f"sqlite:///{file}", policy=policy)

    def enqueue(self, keys: Sequence[str]) -> list[int]:
        fired_at = datetime.fromtimestamp(self._time.now_ms / 1_000, timezone.utc)
        return self._outbox.enqueue_many(RuleFired(rule_ids=[], session_id=key, fired_at=fired_at) for key in keys)

    def add_tried(self, keys: Sequence[str], tried: Tried) -> None:
        row_ids = self.enqueue(keys)
        created_at_ms = self._time.now_ms - HOUR
        columns = {"created_at_ms": created_at_ms, "retry_count": tried.retry_count, "waits_for": tried.waits_for}
        columns |= {"suspected_at_ms": created_at_ms if tried.suspected else None}
        with sqlite3.connect(self._file) as connection:
            known = {name for _, name, *_ in connection.execute("PRAGMA table_info(observation_events)")}
            values = {name: value for name, value in columns.items() if name in known}
            assignments = ", ".join(f"{name} = :{name}" for name in values)
            connection.executemany(
                f"UPDATE observation_events SET {assignments} WHERE id = :row_id",
                [{"row_id": row_id, **values} for row_id in row_ids],
            )

    def flusher(self, name: str, upload: Upload) -> RealFlusher:
        return RealFlusher(Outbox(f"sqlite:///{self._file}", policy=self._policy), self._time, upload)

    def read(self) -> Mapping[str, Final]:
        with sqlite3.connect(self._file) as connection:
            rows = connection.execute("SELECT session_id, status, last_error FROM observation_events").fetchall()
        return {key: Final(status, last_error) for key, status, last_error in rows}


class RealFlusher:
    """One call of `Outbox.flush` at each look."""

    logged_in = True

    def __init__(self, outbox: Outbox, time: VirtualTime, upload: Upload) -> None:
        self._outbox = outbox
        self._time = time
        self._upload = upload

    def upload(self, batch: Sequence[BatchItem], /) -> None:
        failure = self._upload([item.event.session_id for item in batch])
        if failure is not None:
            raise failure

    def look(self) -> Look:
        report = self._outbox.flush(self)
        idle = not report.claimed and not report.skipped
        next_due_ms = self._outbox.store.views.next_due_ms(now_ms=self._time.now_ms) if idle else None
        return Look(report.goes_on, report.paused_until_ms, next_due_ms, has_failed=report.verdict is not None)


def _in_memory() -> Path | None:
    """Return a folder where nothing waits for a disk, if the system has one."""
    memory = Path("/dev/shm")  # noqa: S108 - it is where the database is fastest
    return memory if os.access(memory, os.W_OK) else None


@contextmanager
def real_places(policy: Policy) -> Iterator[Callable[[VirtualTime], RealPlace]]:
    """Yield what builds a place in a folder of its own, while the package sees the virtual time."""
    times: list[VirtualTime] = []

    def read_clock() -> int:
        return times[-1].now_ms

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(logging.getLogger("outbox"), "disabled", new=True))
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(dir=_in_memory(), ignore_cleanup_errors=True))
        )
        assert {flusher, store} <= {*sys.modules.values()}  # they are loaded on first use
        for module in [module for name, module in sys.modules.items() if name.startswith("outbox")]:
            if vars(module).get("now_ms") is clock.now_ms and module is not clock:
                stack.enter_context(mock.patch.object(module, "now_ms", read_clock))

        def build(time: VirtualTime) -> RealPlace:
            times.append(time)
            return RealPlace(time, policy, folder / f"{len(times)}.db")

        yield build
