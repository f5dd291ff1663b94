import subprocess
import sys
import threading
from collections import Counter
from datetime import datetime, timedelta, timezone

import pytest
from freezegun import freeze_time

from builders import REJECTED, ROOT, ScriptedClient, row, rule_fired, statuses
from outbox import FlushReport, Outbox, Policy, flusher, held_claim
from outbox.testing import TimeMachine
from warm_python import WarmPython

pytestmark = pytest.mark.contract


FLUSHER = """
import sys
from outbox import HttpClient, Outbox
url, server = sys.argv[1:]
with Outbox(url) as outbox, HttpClient(server, token="token-of-tests") as client:
    print("ready", flush=True)
    sys.stdin.readline()
    while outbox.pending_count():
        outbox.flush_all(client)
"""

ENQUEUER = """
import sys
from datetime import datetime, timezone
from outbox import Outbox, RuleFired
url, name = sys.argv[1:]
with Outbox(url) as outbox:
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(100):
        now = datetime.now(timezone.utc)
        outbox.enqueue(RuleFired(rule_ids=[], session_id=f"{name}-{number}", fired_at=now))
"""


def start(python: WarmPython, program: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*python.command, "-c", program, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run_at_once(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0


@pytest.mark.sqlite  # on servers: test_servers.py
def test_processes_that_flush_one_file_at_once_send_each_row_once(
    outbox: Outbox, url: str, server, warm_python: WarmPython
) -> None:
    outbox.enqueue_many(rule_fired(session_id=f"s{number}") for number in range(2_000))
    run_at_once([start(warm_python, FLUSHER, url, server.url) for _ in range(4)])
    assert sum(request.events for request in server.requests) == len(server.stored) == 2_000
    assert Counter(statuses(outbox)) == {"sent": 2_000}


@pytest.mark.programs
def test_processes_that_enqueue_and_flush_at_once_lose_nothing(
    outbox: Outbox, url: str, server, client, warm_python: WarmPython
) -> None:
    outbox.enqueue(rule_fired())
    flushers = [start(warm_python, FLUSHER, url, server.url) for _ in range(2)]
    enqueuers = [start(warm_python, ENQUEUER, url, str(number)) for number in range(3)]
    run_at_once([*enqueuers, *flushers])
    outbox.flush_all(client)
    assert len(server.stored) == 301
    assert Counter(statuses(outbox)) == {"sent": 301}


def test_threads_share_one_outbox_and_one_client(outbox: Outbox, server, client) -> None:
    outbox.enqueue_many(rule_fired(session_id=f"s{number}") for number in range(1_000))
    threads = [threading.Thread(target=outbox.flush_all, args=(client,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(request.events for request in server.requests) == len(server.stored) == 1_000
    assert Counter(statuses(outbox)) == {"sent": 1_000}


def test_threads_that_enqueue_at_the_cap_trim_to_it_exactly(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_rows=50, when_full="trim"), synchronous="NORMAL") as outbox:

        def enqueue() -> None:
            for _ in range(25):
                outbox.enqueue(rule_fired())

        threads = [threading.Thread(target=enqueue) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(statuses(outbox)) == 50
        assert outbox.stats().left_undelivered == 150


KILLED = """
import os, sys
from outbox import Outbox
class Client:
    logged_in = True
    def upload(self, batch):
        os._exit(9)
Outbox(sys.argv[1]).flush(Client())
"""


@pytest.mark.programs
def test_what_a_killed_flusher_held_is_sent_by_the_next_after_the_lease(
    outbox: Outbox, url: str, warm_python: WarmPython
) -> None:
    row_id = outbox.enqueue(rule_fired())
    killed = start(warm_python, KILLED, url)
    killed.communicate()
    assert killed.returncode == 9
    held = row(outbox, row_id)
    assert held.status == "sending"
    lease_end = datetime.fromtimestamp(0, timezone.utc) + timedelta(milliseconds=held.next_attempt_at_ms)
    with freeze_time(lease_end - timedelta(milliseconds=1)):
        assert outbox.flush(ScriptedClient()).claimed == 0
    with freeze_time(lease_end):
        assert outbox.flush(ScriptedClient()).sent == 1
    assert row(outbox, row_id).retry_count == 0


class Announced:
    """A lock that tells when somebody has to wait for it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.is_waited_for = threading.Event()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.is_waited_for.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class LetsGo:
    """Flushes three rows, of which the first is bad; another thread lets go of the claim at one step of it."""

    def __init__(self, outbox: Outbox, time: TimeMachine, at_step: int | None) -> None:
        self._outbox = outbox
        self._time = time
        self._at_step = at_step
        self._claim: held_claim.HeldClaim | None = None
        self._begun = self._ended = threading.Event()
        self.steps = 0
        self.uploads_afterwards: list[list[int]] = []
        self.report = self._flush()

    def upload(self, batch) -> None:
        ids = [item.id for item in batch]
        if self._ended.is_set():
            self.uploads_afterwards.append(ids)
        self._time.travel(seconds=8)  # the lease has to be renewed
        if self._bad in ids:
            raise REJECTED

    logged_in = True

    def _flush(self) -> FlushReport:
        self._bad, *_ = self._outbox.enqueue_many([rule_fired()] * 3)
        tracing = sys.gettrace()
        try:
            return flusher.flush(self._outbox.store, self._outbox.policy, self, self._on_claim)
        finally:
            sys.settrace(tracing)
            if self._at_step is not None and self.steps > self._at_step:  # else there was no such step this time
                self._ended.wait()

    def _on_claim(self, let_go) -> None:
        self._claim = let_go.__self__
        self._claim._lock = Announced()
        sys.settrace(self._trace)

    def _trace(self, frame, what, _):
        if frame.f_code.co_filename not in (flusher.__file__, held_claim.__file__):
            return None
        if what == "line":
            if self.steps == self._at_step:
                self._let_go()
            self.steps += 1
        return self._trace

    def _let_go(self) -> None:
        self._ended = threading.Event()

        def let_go() -> None:
            self._claim.let_go()
            self._ended.set()
            self._claim._lock.is_waited_for.set()

        threading.Thread(target=let_go).start()
        self._claim._lock.is_waited_for.wait()


@pytest.mark.slow
@pytest.mark.sqlite
def test_what_another_thread_lets_go_at_any_moment_is_let_go(outbox: Outbox, outbox_time) -> None:
    steps = LetsGo(outbox, outbox_time, None).steps
    assert Counter(statuses(outbox)) == {"sent": 2, "pending": 1}
    for step in range(steps):
        with outbox.engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM observation_events")
        flushed = LetsGo(outbox, outbox_time, step)
        found = statuses(outbox)
        assert set(found) <= {"pending", "sent"}, step
        # What was about to be sent is sent; nothing is sent after that.
        assert len(flushed.uploads_afterwards) <= 1, step
        assert flushed.report.lost_leases == 0, step
