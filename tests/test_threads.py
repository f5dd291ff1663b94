"""How long the threads of a worker wait, and that no exception ends one."""

from __future__ import annotations

import sys

import pytest

from builders import (
    REVOKED,
    ScriptedClient,
    all_sent,
    rule_fired,
)
from conditions import until, worker_threads
from outbox import (
    Outbox,
    Worker,
    lanes,
    threads,
)
from outbox.clock import now_ms


class StruckError(BaseException):
    """What another thread raises in a worker's, at any moment."""


class Strike:
    """Raises in the thread of a worker at one of its steps in the module of workers."""

    def __init__(self, at_step: int) -> None:
        self._at_step = at_step
        self.steps = 0
        self.struck_line: int | None = None

    def trace(self, frame, what, _):
        if frame.f_code.co_filename not in (threads.__file__, lanes.__file__):
            return None
        if what == "line":
            self.steps += 1
            if self.steps == self._at_step:
                self.struck_line = frame.f_lineno
                raise StruckError
        return self.trace

    def work(self, run: threads.Threads) -> None:
        before = sys.gettrace()
        try:
            sys.settrace(self.trace)
            WORK(run)
        except StruckError:
            return  # so that pytest says nothing of it
        finally:
            sys.settrace(before)


WORK = threads.Threads._work


@pytest.mark.slow
@pytest.mark.usefixtures("no_waits")
def test_an_exception_from_another_thread_at_any_step_ends_no_delivery(url: str, monkeypatch) -> None:
    """The thread goes on, also where it is struck while it tells of trouble, or the next enqueue replaces it."""
    step = 0
    fatal_lines: set[int | None] = set()
    with Outbox.open(url, synchronous="NORMAL") as outbox:
        while True:
            step += 1
            outbox.purge(older_than=now_ms() + 1)
            strike = Strike(step)
            monkeypatch.setattr(threads.Threads, "_work", lambda run, strike=strike: strike.work(run))
            client = ScriptedClient(REVOKED, ValueError("a bug"))
            background = Worker(outbox, client, poll_interval_ms=1)
            background.start()
            first = background._threads
            outbox.enqueue(rule_fired())
            until(lambda client=client: len(client.sizes) > 1 or outbox.retry_now() < 0 or not worker_threads())
            monkeypatch.setattr(threads.Threads, "_work", WORK)
            outbox.enqueue(rule_fired())
            until(lambda: all_sent(outbox) or outbox.retry_now() < 0)
            if background._threads is not first:
                fatal_lines.add(strike.struck_line)
            background.stop()
            if strike.steps < step:
                break
    until(lambda: not worker_threads())
    assert step > 80
    assert len(fatal_lines) < 12, "a strike ends the thread at too many lines"
