"""The worker in the background, on real databases, with real threads and processes."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from builders import (
    DOWN,
    OK,
    REJECTED,
    REVOKED,
    ROOT,
    ScriptedClient,
    add_row,
    all_sent,
    refuse,
    row,
    rule_fired,
    statuses,
)
from children import Child, beside_threads, can_fork
from conditions import FOREVER_S, until, worker_threads
from outbox import (
    ConfigurationError,
    HttpFailure,
    Outbox,
    Policy,
    UploadFailure,
    Worker,
    lanes,
    threads,
)
from outbox.clock import now_ms
from outbox.pauses import SharedPause
from outbox.waits import Look, wait_ms
from outbox.wakeup import Wakeup
from servers import Servers

TOKEN = "token-of-tests"
NEVER_MS = 3_600_000
LOOKS = 15


def told(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def is_idle(look: Look) -> bool:
    return look._replace(next_due_ms=None) == Look()


@pytest.fixture
def no_polling(monkeypatch) -> None:
    """Let a worker that was not woken for a while sleep for an hour; one that was woken looks a few times."""
    wait_ms = lanes.wait_ms

    def wait(look: Look, *, rounds: int, **options) -> int:
        if not is_idle(look):
            return wait_ms(look, rounds=rounds, **options)
        return 20 if rounds < LOOKS - 1 else NEVER_MS

    monkeypatch.setattr(lanes, "wait_ms", wait)


@contextmanager
def idle(outbox: Outbox, client, **options) -> Iterator[Worker]:
    """A worker that has looked at the queue, and sleeps; it keeps what its looks saw."""
    plan = lanes.Lane.plan

    def planned(lane, look, now_ms) -> None:
        plan(lane, look, now_ms)
        started.looks.append(look)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes.Lane, "plan", planned)
        started = Worker(outbox, client, **{"poll_interval_ms": NEVER_MS, **options})
        started.looks = []
        started.start()
        try:
            until(lambda: started.looks[LOOKS - 1 if lanes.wait_ms is not wait_ms else 0 :])
            yield started
        finally:
            started.stop()


class Gated:
    """A client whose uploads wait until they are let through."""

    logged_in = True

    def __init__(self, failure: UploadFailure | None = None) -> None:
        self.arrived = threading.Semaphore(0)
        self.gate = threading.Event()
        self.threads: list[int] = []
        self._failure = failure

    def upload(self, batch) -> None:
        self.threads.append(threading.get_ident())
        self.arrived.release()
        assert self.gate.wait(FOREVER_S)
        if self._failure is not None:
            raise self._failure

    def wait_for_upload(self) -> None:
        assert self.arrived.acquire(timeout=FOREVER_S)


# --- how long it waits ---


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"concurrency": True}, {"poll_interval_ms": 0.5}])
def test_settings_that_can_not_work_are_refused(outbox: Outbox, options) -> None:
    with pytest.raises(ConfigurationError, match="expected a whole number above 0"):
        Worker(outbox, ScriptedClient(), **options)


# --- what wakes it ---


@pytest.mark.contract
@pytest.mark.usefixtures("no_polling")
def test_an_enqueue_wakes_it(outbox: Outbox) -> None:
    with idle(outbox, ScriptedClient()):
        for _ in range(3):
            outbox.enqueue(rule_fired())
            until(lambda: all_sent(outbox))


@pytest.mark.contract
@pytest.mark.usefixtures("no_polling")
@pytest.mark.parametrize("scoped", [False, True])
def test_the_commit_of_the_callers_session_wakes_it(outbox: Outbox, monkeypatch, scoped: bool) -> None:
    monkeypatch.setattr(Wakeup, "_can_listen", False, raising=False)
    make = sessionmaker(outbox.engine)
    session = scoped_session(make) if scoped else make()
    with idle(outbox, ScriptedClient()):
        outbox.enqueue(rule_fired(), session=session)
        session.rollback()
        for _ in range(2):
            outbox.enqueue_many([rule_fired()] * 2, session=session)
            outbox.enqueue(rule_fired(), session=session)
            session.commit()
            until(lambda: all_sent(outbox))
    session.close()
    assert len(statuses(outbox)) == 6


@pytest.mark.usefixtures("no_polling")
def test_what_is_made_due_again_wakes_it(outbox: Outbox) -> None:
    outbox.enqueue_many([rule_fired()] * 2)
    outbox.flush(ScriptedClient(DOWN))
    with idle(outbox, ScriptedClient()):
        outbox.retry_now()
        until(lambda: all_sent(outbox))


@pytest.mark.usefixtures("no_polling")
def test_once_woken_it_looks_again_for_what_is_due_a_little_later_by_its_clock(outbox: Outbox) -> None:
    with idle(outbox, ScriptedClient()) as running:
        add_row(outbox, next_attempt_at_ms=now_ms() + 100)
        running._wake()
        until(lambda: all_sent(outbox))


def test_it_comes_upon_what_another_process_enqueues(outbox: Outbox, url: str) -> None:
    with idle(outbox, ScriptedClient(), poll_interval_ms=1), Outbox(url) as another:
        another.enqueue(rule_fired())
        until(lambda: all_sent(outbox))


@pytest.mark.servers("postgresql")
@pytest.mark.usefixtures("no_polling")
def test_postgresql_tells_of_what_anybody_enqueues(outbox: Outbox, url: str) -> None:
    with idle(outbox, ScriptedClient(), concurrency=2), Outbox(url) as another:
        another.enqueue(rule_fired())
        until(lambda: all_sent(outbox))
        with Session(another.engine) as session:
            ids = another.enqueue_many([rule_fired()] * 3, session=session)
            assert ids == sorted(ids)
            session.commit()
        until(lambda: all_sent(outbox))


@pytest.mark.servers("postgresql")
@pytest.mark.usefixtures("no_polling", "no_waits")
def test_it_listens_anew_when_its_connection_broke(outbox: Outbox, url: str, servers: Servers) -> None:
    with idle(outbox, ScriptedClient()) as running, Outbox(url) as another:
        before = running._threads.wakeup._listener
        assert servers.get("postgresql").kill_connections(outbox.engine.url)
        until(lambda: running._threads.wakeup._listener not in {before, None})
        another.enqueue(rule_fired())
        until(lambda: all_sent(outbox))


# --- several at once ---


@pytest.mark.usefixtures("no_polling")
def test_others_deliver_while_one_is_held_up(url: str) -> None:
    client = Gated()
    with Outbox.open(url, policy=Policy(batch_size=1)) as outbox, idle(outbox, client, concurrency=3):
        outbox.enqueue_many([rule_fired()] * 5)
        for _ in range(3):
            client.wait_for_upload()
        assert sorted(statuses(outbox)) == ["pending"] * 2 + ["sending"] * 3
        client.gate.set()
        until(lambda: all_sent(outbox))


@pytest.mark.usefixtures("no_waits")
def test_one_alone_tries_while_nothing_can_be_delivered(url: str) -> None:
    together, at_once, most = threading.Barrier(4), threading.Semaphore(1), []

    def fail_together(_batch):
        together.wait(FOREVER_S)  # so that all have claimed before the first one fails
        return DOWN

    def fail(_batch):
        most.append(at_once.acquire(blocking=False))
        threading.Event().wait(0.001)  # long enough for another one to come in
        at_once.release()
        return DOWN

    client = ScriptedClient(*[fail_together] * 4, *[fail] * 16)
    with Outbox.open(url, policy=Policy(batch_size=1)) as outbox:
        outbox.enqueue_many([rule_fired()] * 30)
        with Worker(outbox, client, concurrency=4, poll_interval_ms=1):
            until(lambda: len(most) == 16 and all_sent_or_waiting(outbox))
    assert most == [True] * 16


def all_sent_or_waiting(outbox: Outbox) -> bool:
    return outbox.overdue_ms() == 0 and "sending" not in statuses(outbox)


def test_no_enqueue_shortens_the_pause_after_a_failure(outbox: Outbox, monkeypatch) -> None:
    for name in ("outbox.waits._LONGEST_WAIT_MS", "outbox.pauses.LONGEST_PAUSE_MS"):
        monkeypatch.setattr(name, NEVER_MS)
    outbox.policy = replace(outbox.policy, pause_ms=NEVER_MS)
    monkeypatch.setattr(threads, "_BEAT_S", 0.01)
    client = Gated(DOWN)
    with idle(outbox, client, concurrency=2) as running:
        bell, (lane,) = running._threads.wakeup, running._threads._lanes
        waits: list[int] = []
        is_asleep, has_failed = threading.Event(), threading.Event()
        sleep = bell.sleep

        def sleep_until_one_failed(longest_s: float) -> bool:
            waits.append(threading.get_ident())
            if client.threads and waits[-1] not in client.threads:
                # This one keeps the turn. If it looked once more, the one that failed could take its place.
                is_asleep.set()
                assert has_failed.wait(FOREVER_S)
            return sleep(longest_s)

        bell.sleep = sleep_until_one_failed
        outbox.enqueue(rule_fired())
        client.wait_for_upload()
        assert is_asleep.wait(FOREVER_S)
        client.gate.set()
        until(lambda: lane._failed_rounds)
        has_failed.set()
        outbox.enqueue(rule_fired())
        waits.clear()
        until(lambda: len(waits) > 2)
        assert waits[-1] not in client.threads
        assert statuses(outbox) == ["pending"] * 2


# --- what it says ---


@pytest.mark.usefixtures("no_waits")
def test_it_says_once_that_it_can_not_deliver_and_once_that_it_can(outbox: Outbox, caplog) -> None:
    client = ScriptedClient(DOWN, DOWN, DOWN, OK, OK, HttpFailure(404, "Not Found"), OK)
    with idle(outbox, client) as running:
        for sent in range(1, 8):
            outbox.enqueue(rule_fired())
            until(lambda sent=sent: len(client.sizes) >= sent)  # a success also brings back what is parked
            running.looks.clear()
            # A look that finds nothing shows nothing of the server.
            until(lambda: any(map(is_idle, running.looks)))
    assert told(caplog) == [
        "can't deliver: 503 Service Unavailable",
        "delivering again",
        "can't deliver: 404 Not Found",
        "delivering again",
    ]


@pytest.mark.parametrize("for_ms", [None, NEVER_MS])
def test_a_hold_is_told_of_once_and_the_worker_goes_on_after_it(
    outbox: Outbox, url: str, caplog, for_ms: int | None
) -> None:
    client = ScriptedClient()
    with Outbox(url) as other:
        other.hold("default", why="a deploy", for_ms=for_ms)
        with Worker(outbox, client, poll_interval_ms=20):
            until(lambda: "can't deliver: an operator put default on hold" in caplog.text)
            other.enqueue(rule_fired())
            outbox.retry_now()
            other.hold("default", why="a long deploy", for_ms=for_ms)
            until(lambda: ": a long deploy; `outbox resume default` ends the hold" in caplog.text)
            assert client.batches == []
            other.resume("default")
            until(lambda: all_sent(outbox))
    assert caplog.text.count("can't deliver") == 2
    until(lambda: "delivering again" in caplog.text)


def test_during_a_hold_no_enqueue_lets_a_worker_look(outbox: Outbox, monkeypatch) -> None:
    outbox.hold("default", why="a deploy")
    monkeypatch.setattr("outbox.waits._LONGEST_WAIT_MS", NEVER_MS)
    with idle(outbox, ScriptedClient()) as running:
        outbox.enqueue_many([rule_fired()] * 2)
        until(lambda: running._threads._lanes[0]._is_woken)
        assert len(running.looks) == 1
        assert running.looks[0].paused_until_ms == outbox.stats().holds[0].ends_ms


@pytest.mark.servers("postgresql")
def test_a_pause_that_another_host_began_is_told_of_and_over_when_it_is_ended(
    outbox: Outbox, url: str, caplog
) -> None:
    client = ScriptedClient()
    with Outbox(url) as other:
        paused = SharedPause(number=1, until_ms=other.store.now_ms() + NEVER_MS // 2, last_error="429 Slow")
        other.store.pauses.change("", lambda _: paused)
        other.enqueue(rule_fired())
        with Worker(outbox, client, poll_interval_ms=100):
            until(lambda: "can't deliver: 429 Slow" in caplog.text)
            assert client.batches == []
            other.retry_now()
            until(lambda: statuses(other) == ["sent"])
    assert caplog.text.count("can't deliver") == 1
    until(lambda: "delivering again" in caplog.text)


@pytest.mark.servers
def test_the_end_of_a_pause_is_awaited_by_the_servers_clock(outbox: Outbox, monkeypatch) -> None:
    paused_until_ms = outbox.store.now_ms() + NEVER_MS
    outbox.store.pauses.change("", lambda pause: pause._replace(until_ms=paused_until_ms))
    outbox.enqueue(rule_fired())
    wait_ms, left_ms = lanes.wait_ms, []

    def wait(look: Look, *, now_ms: int, **options) -> int:
        left_ms.append(look.paused_until_ms - now_ms)
        return wait_ms(look, now_ms=now_ms, **options)

    monkeypatch.setattr(lanes, "wait_ms", wait)
    monkeypatch.setattr(threads, "now_ms", lambda: paused_until_ms)  # this host's clock is an hour ahead
    with Worker(outbox, ScriptedClient()):
        until(lambda: left_ms)
    assert left_ms[0] > NEVER_MS // 2


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize("bug", [RuntimeError("a bug"), SystemExit(3)])
def test_an_exception_is_logged_and_does_not_end_it(outbox: Outbox, caplog, bug: BaseException) -> None:
    with idle(outbox, ScriptedClient(bug, bug, OK), poll_interval_ms=1) as running:
        outbox.enqueue(rule_fired())
        until(lambda: told(caplog))
        running.looks.clear()
        # A look that finds nothing, because the row waits, shows nothing of the client.
        until(lambda: isinstance(bug, SystemExit) or any(map(is_idle, running.looks)))
        until(lambda: all_sent(outbox) or outbox.retry_now() < 0)
        until(lambda: told(caplog)[1:])
    assert told(caplog) == [f"can't deliver: {bug}", "delivering again"]
    assert caplog.records[0].exc_info[1] is bug


@pytest.mark.usefixtures("no_waits")
def test_after_an_exception_a_look_that_goes_well_is_the_recovery(outbox: Outbox, caplog) -> None:
    class HasBadStart(ScriptedClient):
        logged_in = property(lambda self: bool(self.answers or self.answers.append(OK) or 1 / 0), lambda *_: None)

    with idle(outbox, HasBadStart()):
        until(lambda: told(caplog)[1:])
    assert told(caplog) == ["can't deliver: division by zero", "delivering again"]


@pytest.mark.contract
@pytest.mark.usefixtures("no_waits")
def test_a_database_that_fails_is_told_of_in_words_and_tried_again(outbox: Outbox, caplog) -> None:
    refuse(outbox, "UPDATE", "observation_events", "not today")
    with idle(outbox, ScriptedClient(), poll_interval_ms=1):
        outbox.enqueue(rule_fired())
        until(lambda: told(caplog))
        drop = "DROP TRIGGER refuse" + (" ON observation_events" if "postgresql" in str(outbox.engine.url) else "")
        with outbox.engine.begin() as connection:
            connection.exec_driver_sql(drop)
        until(lambda: all_sent(outbox))
        until(lambda: told(caplog)[1:])
    first, second = told(caplog)
    assert first.startswith("can't deliver: ")
    assert "not today" in first
    assert second == "delivering again"
    assert not caplog.records[0].exc_info


def test_without_a_login_it_says_so_and_waits_for_it(outbox: Outbox, caplog) -> None:
    client = ScriptedClient(logged_in=False)
    with idle(outbox, client, poll_interval_ms=1):
        outbox.enqueue(rule_fired())
        until(lambda: told(caplog))
        assert statuses(outbox) == ["pending"]
        client.logged_in = True
        until(lambda: told(caplog)[1:])
    assert told(caplog) == ["can't deliver: not logged in, the client has no credentials", "delivering again"]
    assert all_sent(outbox)


@pytest.mark.usefixtures("no_waits")
def test_while_capture_is_off_it_says_so_once_and_delivers_afterwards(outbox: Outbox, caplog, monkeypatch) -> None:
    row_id = outbox.enqueue(rule_fired())
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    with idle(outbox, ScriptedClient(), poll_interval_ms=1) as background:
        until(lambda: len(background.looks) > 2)
        assert row(outbox, row_id).status == "pending"
        monkeypatch.delenv("OUTBOX_CAPTURE")
        until(lambda: told(caplog)[1:])
    capture_is_off = "can't deliver: capture is off (OUTBOX_CAPTURE=false)"
    assert told(caplog) == [capture_is_off, "delivering again"]
    assert all_sent(outbox)


def test_with_an_empty_queue_it_says_that_capture_is_on_again(outbox: Outbox, caplog, monkeypatch) -> None:
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    with idle(outbox, ScriptedClient(), poll_interval_ms=1):
        until(lambda: told(caplog))
        monkeypatch.delenv("OUTBOX_CAPTURE")
        until(lambda: told(caplog)[1:])
    assert told(caplog)[1] == "delivering again"


# --- what does not end it ---


@pytest.fixture
def hostile_log(request, outbox: Outbox) -> Iterator[logging.Logger]:
    """The log, at its most talkative, with a filter that raises."""
    log = logging.getLogger("outbox")

    def refuse_all(record: logging.LogRecord) -> bool:
        raise request.param(record.getMessage())

    log.addFilter(refuse_all)
    level, _ = log.level, log.setLevel(logging.DEBUG)
    yield log
    log.removeFilter(refuse_all)
    log.setLevel(level)


@pytest.mark.usefixtures("no_waits", "hostile_log")
@pytest.mark.parametrize("hostile_log", [ValueError, SystemExit], indirect=True)
def test_a_filter_of_the_log_that_raises_does_not_end_it(outbox: Outbox) -> None:
    """Neither in a batch, nor where it tells of trouble or of its end."""
    with idle(outbox, ScriptedClient(OK, REVOKED, OK, OK), poll_interval_ms=1):
        (thread,) = worker_threads()
        for sent in range(1, 4):
            outbox.enqueue(rule_fired())
            until(lambda sent=sent: "sending" not in statuses(outbox) and outbox.overdue_ms() == 0)
        until(lambda: all_sent(outbox) or outbox.retry_now() < 0)
        assert thread.is_alive()


def test_without_a_file_descriptor_left_it_delivers(url: str) -> None:
    program = """
import errno, os, sys, threading
from outbox import Outbox, Worker
from builders import ScriptedClient, rule_fired
from conditions import until

outbox, client = Outbox.open(sys.argv[1]), ScriptedClient()
worker = Worker(outbox, client)
worker.start()
outbox.enqueue(rule_fired())
until(lambda: client.sizes == [1])
taken = []
try:
    while True:
        taken.append(os.dup(0))
except OSError as error:
    assert error.errno == errno.EMFILE
for sent in range(2, 6):
    outbox.enqueue(rule_fired())
    until(lambda: sum(client.sizes) == sent)
for one in taken:
    os.close(one)
worker.stop()
"""
    done = run_program(program, url)
    assert (done.returncode, done.stderr) == (0, "")
    with Outbox(url) as outbox:
        assert statuses(outbox) == ["sent"] * 5


FEW_FILES = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"


def run_program(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"{FEW_FILES}\n{program}", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        check=False,
        capture_output=True,
        text=True,
        timeout=4 * FOREVER_S,
    )


@can_fork
def test_a_child_without_a_file_descriptor_left_enqueues_and_delivers_when_there_is_one(url: str) -> None:
    program = """
import errno, os, sys
from outbox import Outbox, Worker
from builders import ScriptedClient, rule_fired
from conditions import until

outbox, client = Outbox.open(sys.argv[1]), ScriptedClient()
worker = Worker(outbox, client)
worker.start()
outbox.enqueue(rule_fired())
until(lambda: client.sizes == [1])
is_stopped, stopped = os.pipe()
if child := os.fork():
    worker.stop()  # it would deliver the events of the child
    os.close(stopped)
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status))
os.close(stopped)
os.read(is_stopped, 1)
os.close(is_stopped)
outbox.pending_count()
taken = []
try:
    while True:
        taken.append(os.dup(0))
except OSError as error:
    assert error.errno == errno.EMFILE
os.close(taken.pop())  # a worker needs two to sleep on
for _ in range(2):
    assert outbox.enqueue(rule_fired())
assert not worker.is_alive
for one in taken:
    os.close(one)
outbox.enqueue(rule_fired())
until(lambda: sum(client.sizes) == 4)
worker.stop()
os._exit(0)
"""
    done = run_program(program, url)
    assert done.returncode == 0, done.stderr
    assert re.sub(r"(?m)^.*(Warning: This process|os\.fork).*\n", "", done.stderr) == (
        "the worker can't start in this process, so other flushers must deliver: [Errno 24] Too many open files\n"
    )
    with Outbox(url) as outbox:
        assert statuses(outbox) == ["sent"] * 4


WORK = threads.Threads._work


@pytest.mark.parametrize("how", ["start", "enqueue"])
def test_a_thread_that_died_is_replaced(outbox: Outbox, monkeypatch, caplog, how: str) -> None:
    client = ScriptedClient()
    background = Worker(outbox, client, concurrency=2)
    with monkeypatch.context() as patch:
        patch.setattr(threads.Threads, "_take_turns", lambda run: None)
        background.start()
        for thread in background._threads._threads:
            thread.join()
    assert not background.is_alive
    if how == "start":
        background.start()
    outbox.enqueue(rule_fired())
    until(lambda: all_sent(outbox))
    assert background.is_alive
    assert len(worker_threads()) == 2
    background.stop()
    assert told(caplog) == ["a thread of the worker died, new ones take over"]


@pytest.mark.usefixtures("hostile_log")
@pytest.mark.parametrize("hostile_log", [ValueError], indirect=True)
def test_no_filter_of_the_log_fails_an_enqueue_that_replaces_a_thread(outbox: Outbox, monkeypatch) -> None:
    background = Worker(outbox, ScriptedClient())
    with monkeypatch.context() as patch:
        patch.setattr(threads.Threads, "_take_turns", lambda run: None)
        background.start()
        background._threads._threads[0].join()
    outbox.enqueue(rule_fired())
    assert background.is_alive
    background.stop()


def test_of_several_threads_the_others_finish_what_they_send_when_one_died(outbox: Outbox, monkeypatch) -> None:
    client = Gated()
    works = [WORK, lambda run: None]
    monkeypatch.setattr(threads.Threads, "_work", lambda run: works.pop(0)(run) if works else WORK(run))
    outbox.enqueue(rule_fired())
    background = Worker(outbox, client, concurrency=2)
    background.start()
    client.wait_for_upload()
    until(lambda: not background.is_alive)
    outbox.enqueue(rule_fired())
    client.wait_for_upload()
    client.gate.set()
    until(lambda: all_sent(outbox))
    background.stop()
    assert len(client.threads) == 2
    until(lambda: not worker_threads())


# --- its signs of life ---


def test_it_gives_signs_of_life_while_it_waits(outbox: Outbox, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(threads, "_BEAT_S", 0.01)
    heartbeat = tmp_path / "alive"
    monkeypatch.chdir(tmp_path)
    background = Worker(outbox, ScriptedClient(), poll_interval_ms=NEVER_MS, heartbeat="alive")
    monkeypatch.chdir("/")
    assert (background.is_alive, background.silent_ms) == (False, None)
    with background:
        assert background.is_alive
        seen = set()
        until(lambda: len(seen) > 5 or seen.add(background._threads._seen_at))
        os.utime(heartbeat, (1, 1))
        until(lambda: heartbeat.stat().st_mtime > 1)
        assert abs(now_ms() - heartbeat.stat().st_mtime_ns / 1e6) < FOREVER_S * 1_000
        assert 0 <= background.silent_ms < FOREVER_S * 1_000
    assert (background.is_alive, background.silent_ms) == (False, None)


def test_it_is_silent_while_an_upload_hangs_and_gives_a_sign_before_each(outbox: Outbox, monkeypatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(threads, "monotonic_s", lambda: now_s)
    gates = [Gated(REJECTED), Gated()]
    uploads = [gate.upload for gate in gates]
    client = ScriptedClient(*uploads)
    outbox.policy = Policy.original()  # sends a claim of one row again
    outbox.enqueue(rule_fired())
    with Worker(outbox, client) as background:
        for gate in gates:
            gate.wait_for_upload()
            assert background.silent_ms == 0
            now_s += 3_600
            assert background.silent_ms == 3_600_000
            assert background.is_alive
            gate.gate.set()
        until(lambda: all_sent(outbox))
        until(lambda: background.silent_ms == 0)


def test_the_heartbeat_is_touched_at_most_every_ten_seconds(outbox: Outbox, monkeypatch, tmp_path: Path) -> None:
    now_s = 100.0
    monkeypatch.setattr(threads, "monotonic_s", lambda: now_s)
    heartbeat = tmp_path / "alive"
    with idle(outbox, ScriptedClient(), poll_interval_ms=1, heartbeat=heartbeat) as running:
        os.utime(heartbeat, (1, 1))
        now_s = 109.9
        seen = len(running.looks)
        until(lambda: len(running.looks) > seen + 3)
        assert heartbeat.stat().st_mtime == 1
        now_s = 110.0
        until(lambda: heartbeat.stat().st_mtime > 1)


def test_a_heartbeat_that_can_not_be_written_is_refused_at_the_start_and_endured_later(
    outbox: Outbox, monkeypatch, tmp_path: Path, caplog
) -> None:
    caplog.set_level(logging.DEBUG, "outbox")
    monkeypatch.setattr(threads, "_BEAT_S", 0.01)
    folder = tmp_path / "run"
    background = Worker(outbox, ScriptedClient(), heartbeat=folder / "alive")
    words = (
        f"heartbeat is {str(folder / 'alive')!r}, expected a file that can be written: No such file or directory"
    )
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        background.start()
    assert not background.is_alive
    folder.mkdir()
    with background:
        folder.rename(tmp_path / "elsewhere")
        until(lambda: words in caplog.text)
        outbox.enqueue(rule_fired())
        until(lambda: all_sent(outbox))


# --- how it ends ---


def test_it_can_be_started_and_stopped_again_and_again(outbox: Outbox) -> None:
    client = ScriptedClient()
    background = Worker(outbox, client, concurrency=2)
    background.stop()
    for sent in (1, 2):
        background.start()
        background.start()
        assert len(worker_threads()) == 2
        outbox.enqueue(rule_fired())
        until(lambda sent=sent: statuses(outbox) == ["sent"] * sent)
        background.stop()
        background.stop()
        until(lambda: not worker_threads())
    outbox.enqueue(rule_fired())
    assert statuses(outbox) == ["sent", "sent", "pending"]


def test_a_stop_waits_for_what_is_being_sent(outbox: Outbox) -> None:
    client = Gated()
    with idle(outbox, client) as running:
        outbox.enqueue(rule_fired())
        client.wait_for_upload()
        stopping = threading.Thread(target=running.stop, args=(FOREVER_S,))
        stopping.start()
        until(lambda: running._threads is None)
        client.gate.set()
        stopping.join()
        assert all_sent(outbox)


@pytest.mark.contract
def test_a_stop_gives_back_what_takes_too_long_and_still_records_its_delivery(outbox: Outbox) -> None:
    client = Gated()
    with idle(outbox, client) as running:
        outbox.enqueue(rule_fired())
        client.wait_for_upload()
        run = running._threads
        running.stop(1)
        until(lambda: statuses(outbox) == ["pending"])
        client.gate.set()
        until(lambda: all_sent(outbox))
        run._threads[0].join()


def test_what_a_stop_gave_back_is_not_sent_by_who_held_it(outbox: Outbox) -> None:
    gated = Gated()
    client = ScriptedClient(REJECTED, gated.upload)  # the second upload is of the first row, alone
    outbox.enqueue_many([rule_fired()] * 3)
    with Worker(outbox, client) as running:
        gated.wait_for_upload()
        run = running._threads
        running.stop(0.5)
        until(lambda: statuses(outbox) == ["pending"] * 3)
        gated.gate.set()
        run._threads[0].join()
    assert client.sizes == [3, 1]
    assert statuses(outbox) == ["sent", "pending", "pending"]


def test_what_is_claimed_when_it_is_stopped_is_given_back_unsent(outbox: Outbox) -> None:
    background: list[Worker] = []

    class StopsBeforeTheClaim(ScriptedClient):
        logged_in = property(lambda self: bool(stop()), lambda self, value: None)

    def stop() -> bool:
        if outbox.pending_count() and not stopping.is_alive():
            stopping.start()
            until(lambda: background[0]._threads is None)
            until(run._stopping.is_set)
        return True

    client = StopsBeforeTheClaim()
    with idle(outbox, client) as running:
        background.append(running)
        run = running._threads
        stopping = threading.Thread(target=running.stop, args=(FOREVER_S,))
        outbox.enqueue(rule_fired())
        until(lambda: not run._threads[0].is_alive())
        stopping.join()
    assert client.sizes == []
    assert statuses(outbox) == ["pending"]


def test_a_start_that_gets_too_few_threads_leaves_none(outbox: Outbox, monkeypatch) -> None:
    start, started = threading.Thread.start, []

    def start_two(thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    background = Worker(outbox, ScriptedClient(), concurrency=3)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_two)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            background.start()
    for thread in started:
        thread.join(FOREVER_S)
        assert not thread.is_alive()
    with background:
        outbox.enqueue(rule_fired())
        until(lambda: all_sent(outbox))


def test_it_does_not_keep_the_interpreter_from_ending(url: str, server) -> None:
    program = """
import sys
from outbox import HttpClient, Outbox, Policy, Worker
from builders import rule_fired
HOUR_MS = 3_600_000
outbox = Outbox.open(sys.argv[1], policy=Policy(lease_ms=2 * HOUR_MS))
client = HttpClient(sys.argv[2], token="t", read_timeout_ms=HOUR_MS, deadline_ms=HOUR_MS)
Worker(outbox, client).start()
outbox.enqueue(rule_fired())
while not sys.stdin.read(1):
    pass
"""
    server.set_mode("hang")
    with subprocess.Popen(
        [sys.executable, "-c", program, url, server.url],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        stdin=subprocess.PIPE,
    ) as host:
        with Outbox.open(url) as outbox:
            until(lambda: statuses(outbox) == ["sending"])
        host.communicate(b"!", timeout=FOREVER_S)  # far less than the deadline of an upload
    assert host.returncode == 0


# --- forks ---


@can_fork
@beside_threads
@pytest.mark.contract
@pytest.mark.usefixtures("no_polling")
def test_it_starts_anew_in_a_child_that_enqueues_and_goes_on_in_the_parent(outbox: Outbox, server, client) -> None:
    with idle(outbox, client) as running:

        def enqueue_and_wait() -> None:
            outbox.enqueue(rule_fired())
            until(lambda: all_sent(outbox))
            assert running._threads is not inherited

        inherited = running._threads
        outbox.enqueue(rule_fired())
        until(lambda: all_sent(outbox))
        child = Child(enqueue_and_wait, running.stop)
        running.stop()  # so that it is the child that delivers
        child.act()
        running.start()
        child.act()
        child.end()
        outbox.enqueue(rule_fired())
        until(lambda: statuses(outbox) == ["sent"] * 3)


@can_fork
@beside_threads
@pytest.mark.servers("postgresql")
@pytest.mark.usefixtures("no_polling")
def test_a_child_leaves_the_connection_on_which_its_parent_listens_alone(outbox: Outbox, url: str) -> None:
    with idle(outbox, ScriptedClient()) as running, Outbox(url) as another:
        listening = running._threads.wakeup._listener
        child = Child(lambda: outbox.enqueue(rule_fired()), running.stop)
        child.act()
        child.act()
        child.end()
        another.enqueue(rule_fired())
        until(lambda: all_sent(outbox))
        assert running._threads.wakeup._listener is listening


@can_fork
@beside_threads
def test_a_child_that_enqueues_nothing_has_no_worker(outbox: Outbox) -> None:
    unstarted = Worker(outbox, ScriptedClient())
    with idle(outbox, ScriptedClient()) as running:

        def look() -> None:
            assert running._threads is None
            running.stop()
            outbox.enqueue(rule_fired())
            assert running._threads is None
            assert unstarted._threads is None

        child = Child(look)
        child.act()
        child.end()


def test_an_enqueue_succeeds_where_no_thread_can_be_started_any_more(outbox: Outbox, monkeypatch, caplog) -> None:
    def refuse_to_start(_thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with idle(outbox, ScriptedClient()) as running:
        pass
    outbox.wakers.add(running._wake)
    running._starts_when_woken = True  # as in a child
    monkeypatch.setattr(threading.Thread, "start", refuse_to_start)
    for _ in range(2):
        assert outbox.enqueue(rule_fired())
    assert told(caplog) == [
        "the worker can't start in this process, so other flushers must deliver: can't create new thread at interpreter shutdown"
    ]
