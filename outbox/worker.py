"""Background threads that deliver enqueued events."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from outbox.destinations import DEFAULT_DESTINATION, stored
from outbox.failures import ConfigurationError, OutboxError
from outbox.lanes import unbroken
from outbox.outbox import Outbox
from outbox.records import UploadClient
from outbox.storage import forks
from outbox.threads import Threads

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger("outbox")


class Worker:
    """Delivers events in background threads of this process.

    `client` is the client of the destination `default`, or a mapping from the names of destinations to their
    clients. The events of other destinations are left to other flushers.

    It wakes at once when this `Outbox` enqueues, and on PostgreSQL when any process enqueues. In other cases it
    polls, at least every `poll_interval_ms` while nothing fails; more than 20 000 counts as 20 000. `concurrency`
    is the number of batches that are sent at once; each uses a thread. There are at least as many threads as
    destinations, and each destination always has one, however long the uploads to the others take.

    The threads are daemons, so they do not delay the end of the program. Events that they held then are due again
    when their lease ends. `stop`, or the end of a `with` block, gives the events back at once. No exception ends a
    thread. If a thread dies all the same, the next `start` or enqueue replaces it. After a fork, the worker of the
    child starts with the child's first enqueue.

    The worker touches the file `heartbeat` while it lives, at most every ten seconds, so that
    `outbox health --heartbeat` can check it. `stop` does not remove the file. Each process needs its own file.
    """

    def __init__(
        self,
        outbox: Outbox,
        client: UploadClient | Mapping[str, UploadClient],
        *,
        concurrency: int = 1,
        poll_interval_ms: int = 5_000,
        heartbeat: str | os.PathLike[str] | None = None,
    ) -> None:
        for name, value in (("concurrency", concurrency), ("poll_interval_ms", poll_interval_ms)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"{name} is {value!r}, expected a whole number above 0")
        self._outbox = outbox
        self._clients = _by_destination(client)
        self._concurrency = concurrency
        self._poll_interval_ms = poll_interval_ms
        self._heartbeat = None if heartbeat is None else Path(heartbeat).absolute()
        self._lock = threading.Lock()
        self._threads: Threads | None = None
        self._starts_when_woken = False
        self._why_not_started: str | None = None
        self._process = forks.Process(in_child=self._begin_child)

    def start(self) -> None:
        """Start the threads, unless they run already. If a thread died, all threads are replaced.

        Raises `ConfigurationError` if the heartbeat file can't be written, `StorageError` in a process that was
        forked without Python's knowledge, and RuntimeError or OSError if no thread or socket is available.
        """
        self._process.check()
        self._outbox.wakers.add(self._wake)
        self._outbox.heartbeats.add(self._silent_ms)
        with self._lock:
            if self._threads is not None and not self._threads.is_alive():
                with unbroken:
                    log.warning(
                        "a thread of the worker died, new ones take over",
                        extra={"event_name": "outbox.worker_replaced"},
                    )
                self._threads.retire()
                self._threads = None
            if self._threads is None:
                self._threads = Threads(
                    self._outbox, self._clients, self._concurrency, self._poll_interval_ms, self._heartbeat
                )
            self._starts_when_woken = False
            self._why_not_started = None

    @property
    def is_alive(self) -> bool:
        """Whether the worker was started in this process and all its threads run. See also `silent_ms`."""
        threads = self._threads
        return threads is not None and threads.is_alive()

    @property
    def silent_ms(self) -> int | None:
        """Time since the last sign of life of the worker, in ms; None if it was not started in this process.

        The worker gives a sign of life at least every ten seconds while it waits, and before each upload. A value
        up to the longest upload, or the longest wait for a locked database, is normal.
        """
        threads = self._threads
        return None if threads is None else threads.silent_ms()

    def stop(self, timeout: float = 5.0) -> None:
        """Stop the threads. Return within `timeout` seconds.

        Batches that are being sent have four fifths of the time to finish. The events of unfinished batches are
        then released: they are due at once, for another worker or a later start. A thread that is still uploading
        ends after its upload.
        """
        self._outbox.wakers.discard(self._wake)
        self._outbox.heartbeats.discard(self._silent_ms)
        with self._lock:
            self._starts_when_woken = False
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.stop(timeout)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _silent_ms(self) -> int | None:
        return self.silent_ms

    def _wake(self) -> None:
        threads = self._threads
        # Skipped while another call starts the worker: in a signal handler, this thread itself may hold the lock.
        is_missing = self._starts_when_woken or not self._process.is_this()
        if (is_missing or (threads is not None and not threads.is_alive())) and not self._lock.locked():
            self._start_if_possible()
            threads = self._threads
        if threads is not None:
            threads.wakeup.ring()

    def _start_if_possible(self) -> None:
        """Start. Only log a failure, because the event is already recorded. The next enqueue tries again."""
        try:
            self.start()
        except (RuntimeError, OSError, OutboxError) as error:
            # RuntimeError: no thread is available, or the interpreter ends. OSError: no socket is available.
            # OutboxError: the heartbeat file can't be written.
            why = str(error)
            if why != self._why_not_started:
                self._why_not_started = why
                with unbroken:
                    log.warning(
                        "the worker can't start in this process, so other flushers must deliver: %s",
                        why,
                        extra={"event_name": "outbox.worker_not_started"},
                    )

    def _begin_child(self) -> None:
        self._lock = threading.Lock()
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.wakeup.leave_to_parent()
            self._starts_when_woken = True


def _by_destination(client: UploadClient | Mapping[str, UploadClient]) -> dict[str, UploadClient]:
    if not isinstance(client, Mapping):
        return {DEFAULT_DESTINATION: client}
    clients = {stored(name): one for name, one in client.items()}
    if not clients:
        raise ConfigurationError("client is an empty mapping, expected a client for each destination")
    return clients
