"""The worker in the background, on real databases, with real threads and processes."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib import request as urlrequest

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from builders import DOWN, OK, REJECTED, REVOKED, ScriptedClient, add_row, refuse, row, rule_fired, statuses
from outbox import (
    ConfigurationError,
    FlushReport,
    Outbox,
    Policy,
    UploadFailure,
    Worker,
    wakeup,
    worker,
)
from outbox.clock import now_ms
from outbox.database import open_engine
from outbox.policy import Verdict
from outbox.wakeup import Wakeup
from outbox.worker import wait_ms
from servers import Servers
from test_processes import Child, beside_threads, can_fork

ROOT = Path(__file__).parent.parent
TOKEN = "token-of-tests"
FOREVER_S = 30
NEVER_MS = 3_600_000
LOOKS = 15

SENT = FlushReport(claimed=64, attempted=64, sent=64)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + FOREVER_S
    while not condition():
        assert time.monotonic() < end, "it never came about"
        threading.Event().wait(0.002)


def all_sent(outbox: Outbox) -> bool:
    return set(statuses(outbox)) == {"sent"}


def told(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def no_polling(monkeypatch) -> None:
    """Let a worker that was not woken for a while sleep for an hour; one that was woken looks a few times."""
    wait_ms = worker.wait_ms

    def wait(report, rounds, **options) -> int:
        if report != FlushReport():
            return wait_ms(report, rounds, **options)
        return 20 if rounds < LOOKS - 1 else NEVER_MS

    monkeypatch.setattr(worker, "wait_ms", wait)


@pytest.fixture
def no_pauses(monkeypatch) -> None:
    monkeypatch.setattr(worker, "_SHORTEST_PAUSE_MS", 1)
    monkeypatch.setattr(worker, "_LONGEST_PAUSE_MS", 1)


@contextmanager
def idle(outbox: Outbox, client, **options) -> Iterator[Worker]:
    """A worker that has looked at the queue, and sleeps; it keeps the reports of its looks."""
    plan = worker._Run._plan

    def planned(run, report, now_ms) -> None:
        plan(run, report, now_ms)
        started.reports.append(report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker._Run, "_plan", planned)
        started = Worker(outbox, client, **{"poll_interval_ms": NEVER_MS, **options})
        started.reports = []
        started.start()
        try:
            until(lambda: started.reports[LOOKS - 1 if worker.wait_ms is not wait_ms else 0 :])
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


@pytest.mark.parametrize(
    ("report", "rounds", "expected"),
    [
        (SENT, 0, 0),
        (FlushReport(claimed=1, abandoned=1), 0, 0),
        (FlushReport(), 0, 100),
        (FlushReport(), 1, 200),
        (FlushReport(), 5, 3_200),
        (FlushReport(), 6, 5_000),
        (FlushReport(), 10**9, 5_000),
        (None, 0, 1_000),
        (None, 3, 8_000),
        (None, 10**9, 60_000),
        *[(FlushReport(claimed=64, verdict=one), 1, 2_000) for one in Verdict],
        (FlushReport(paused_until_ms=4_000), 9, 4_000),
        (FlushReport(paused_until_ms=60_000), 9, 5_000),
        (FlushReport(paused_until_ms=0), 9, 100),
    ],
)
def test_the_wait_follows_from_the_report(report: FlushReport | None, rounds: int, expected: int) -> None:
    assert wait_ms(report, rounds, poll_interval_ms=5_000, now_ms=0) == expected


def test_a_pause_is_up_to_a_quarter_longer_by_the_time() -> None:
    pauses = {wait_ms(None, 0, poll_interval_ms=5_000, now_ms=now) for now in range(1_000)}
    assert (min(pauses), max(pauses), len(pauses)) == (1_000, 1_249, 250)


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
@pytest.mark.usefixtures("no_polling", "no_pauses")
def test_it_listens_anew_when_its_connection_broke(outbox: Outbox, url: str, servers: Servers) -> None:
    with idle(outbox, ScriptedClient()) as running, Outbox(url) as another:
        before = running._run.wakeup._listening
        assert servers.get("postgresql").kill_connections(outbox.engine.url)
        until(lambda: running._run.wakeup._listening not in {before, None})
        another.enqueue(rule_fired())
        until(lambda: all_sent(outbox))


@pytest.mark.servers("postgresql")
@pytest.mark.parametrize("fault", ["there is no such database", "the statement is refused"])
def test_who_can_not_listen_sleeps_all_the_same(outbox: Outbox, monkeypatch, fault: str) -> None:
    engine = outbox.engine
    if fault == "the statement is refused":
        monkeypatch.setattr(wakeup, "CHANNEL", "no name")
    else:
        engine = open_engine(engine.url.set(database="outbox_that_is_not_there"))
    bell = Wakeup(engine)
    bell.sleep(0)
    bell.ring()
    bell.sleep(FOREVER_S)
    bell.close()
    bell.ring()
    engine.dispose()


@pytest.mark.servers("postgresql")
def test_a_transaction_in_two_phases_notifies_of_nothing_for_it_could_not_be_prepared(outbox: Outbox) -> None:
    statements: list[str] = []
    event.listen(outbox.engine, "before_cursor_execute", lambda *seen: statements.append(seen[2]))
    for twophase in (False, True):
        with Session(outbox.engine, twophase=twophase) as session:
            assert outbox.enqueue(rule_fired(), session=session)
    assert ["pg_notify" in statement for statement in statements if "INSERT" in statement] == [True, False]


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


@pytest.mark.usefixtures("no_pauses")
def test_one_alone_tries_while_nothing_can_be_delivered(url: str) -> None:
    at_once, most = threading.Semaphore(1), []

    def fail(_batch):
        most.append(at_once.acquire(blocking=False))
        threading.Event().wait(0.001)  # long enough for another one to come in
        at_once.release()
        return DOWN

    client = ScriptedClient(DOWN, *[fail] * 20)
    with Outbox.open(url, policy=Policy(batch_size=1)) as outbox:
        outbox.enqueue_many([rule_fired()] * 30)
        with Worker(outbox, client, concurrency=4, poll_interval_ms=1):
            until(lambda: all_sent_or_waiting(outbox))
    assert len(most) == 20
    assert most[4:] == [True] * 16  # the others had begun when the first one failed


def all_sent_or_waiting(outbox: Outbox) -> bool:
    return outbox.overdue_ms() == 0 and "sending" not in statuses(outbox)


def test_no_enqueue_shortens_the_pause_after_a_failure(outbox: Outbox, monkeypatch) -> None:
    monkeypatch.setattr(worker, "_SHORTEST_PAUSE_MS", NEVER_MS)
    monkeypatch.setattr(worker, "_LONGEST_PAUSE_MS", NEVER_MS)
    client = Gated(DOWN)
    with idle(outbox, client, concurrency=2) as running:
        stopping = running._run._stopping
        waits: list[tuple[int, float]] = []
        wait = stopping.wait
        stopping.wait = lambda seconds: waits.append((threading.get_ident(), seconds)) or wait(seconds)
        outbox.enqueue(rule_fired())
        client.wait_for_upload()
        until(lambda: running._run._idle_rounds > 1)  # the other one has looked, too, and is asleep
        client.gate.set()
        until(lambda: running._run._failed_rounds)
        outbox.enqueue(rule_fired())
        until(lambda: waits[-1][1] > 1_000)
        assert waits[-1][0] not in client.threads
        assert statuses(outbox) == ["pending"] * 2


# --- what it says ---


@pytest.mark.usefixtures("no_pauses")
def test_it_says_once_that_it_can_not_deliver_and_once_that_it_can(outbox: Outbox, caplog) -> None:
    client = ScriptedClient(DOWN, DOWN, DOWN, OK, OK, REVOKED, OK)
    with idle(outbox, client) as running:
        for sent in range(1, 8):
            outbox.enqueue(rule_fired())
            until(lambda sent=sent: len(client.sizes) == sent)
            running.reports.clear()
            # A look that finds nothing shows nothing of the server.
            until(lambda: any(report == FlushReport() for report in running.reports))
    assert told(caplog) == [
        "can't deliver: 503 Service Unavailable",
        "delivering again",
        "can't deliver: 401 Unauthorized",
        "delivering again",
    ]


@pytest.mark.servers("postgresql")
def test_a_pause_that_another_host_began_is_told_of_and_over_when_it_is_ended(
    outbox: Outbox, url: str, caplog
) -> None:
    client = ScriptedClient()
    client.destination = "https://ingest.example.com"
    with Outbox(url) as other:
        other._store.pause(
            client.destination, seen=0, until_ms=other._store.now_ms() + NEVER_MS, last_error="429 Slow"
        )
        other.enqueue(rule_fired())
        with Worker(outbox, client, poll_interval_ms=100):
            until(lambda: "can't deliver: 429 Slow" in caplog.text)
            assert client.batches == []
            other.retry_now()
            until(lambda: statuses(other) == ["sent"])
    assert caplog.text.count("can't deliver") == 1
    until(lambda: "delivering again" in caplog.text)


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("bug", [RuntimeError("a bug"), SystemExit(3)])
def test_an_exception_is_logged_and_does_not_end_it(outbox: Outbox, caplog, bug: BaseException) -> None:
    with idle(outbox, ScriptedClient(bug, bug, OK)):
        outbox.enqueue(rule_fired())
        until(lambda: all_sent(outbox))
        until(lambda: told(caplog)[1:])
    assert told(caplog) == [f"can't deliver: {bug}", "delivering again"]
    assert caplog.records[0].exc_info[1] is bug


@pytest.mark.usefixtures("no_pauses")
def test_after_an_exception_a_look_that_goes_well_is_the_recovery(outbox: Outbox, caplog) -> None:
    class HasBadStart(ScriptedClient):
        logged_in = property(lambda self: bool(self.answers or self.answers.append(OK) or 1 / 0), lambda *_: None)

    with idle(outbox, HasBadStart()):
        until(lambda: told(caplog)[1:])
    assert told(caplog) == ["can't deliver: division by zero", "delivering again"]


@pytest.mark.contract
@pytest.mark.usefixtures("no_pauses")
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
    assert told(caplog) == ["can't deliver: not logged in, the client has no token", "delivering again"]
    assert all_sent(outbox)


@pytest.mark.usefixtures("no_pauses")
def test_while_capture_is_off_it_says_so_once_and_delivers_afterwards(outbox: Outbox, caplog, monkeypatch) -> None:
    row_id = outbox.enqueue(rule_fired())
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    with idle(outbox, ScriptedClient(), poll_interval_ms=1) as background:
        until(lambda: len(background.reports) > 2)
        assert row(outbox, row_id).status == "pending"
        monkeypatch.delenv("OUTBOX_CAPTURE")
        until(lambda: told(caplog)[1:])
    paused = "can't deliver: delivery is paused, capture is off (OUTBOX_CAPTURE=false)"
    assert told(caplog) == [paused, "delivering again"]
    assert all_sent(outbox)


def test_with_an_empty_queue_it_says_that_capture_is_on_again(outbox: Outbox, caplog, monkeypatch) -> None:
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    with idle(outbox, ScriptedClient(), poll_interval_ms=1):
        until(lambda: told(caplog))
        monkeypatch.delenv("OUTBOX_CAPTURE")
        until(lambda: told(caplog)[1:])
    assert told(caplog)[1] == "delivering again"


# --- how it ends ---


def test_it_can_be_started_and_stopped_again_and_again(outbox: Outbox) -> None:
    client = ScriptedClient()
    background = Worker(outbox, client, concurrency=2)
    background.stop()
    for sent in (1, 2):
        background.start()
        background.start()
        assert len([one for one in threading.enumerate() if one.name == "outbox-worker"]) == 2
        outbox.enqueue(rule_fired())
        until(lambda sent=sent: statuses(outbox) == ["sent"] * sent)
        background.stop()
        background.stop()
        until(lambda: not [one for one in threading.enumerate() if one.name == "outbox-worker"])
    outbox.enqueue(rule_fired())
    assert statuses(outbox) == ["sent", "sent", "pending"]


def test_a_stop_waits_for_what_is_being_sent(outbox: Outbox) -> None:
    client = Gated()
    with idle(outbox, client) as running:
        outbox.enqueue(rule_fired())
        client.wait_for_upload()
        stopping = threading.Thread(target=running.stop, args=(FOREVER_S,))
        stopping.start()
        until(lambda: running._run is None)
        client.gate.set()
        stopping.join()
        assert all_sent(outbox)


@pytest.mark.contract
def test_a_stop_gives_back_what_takes_too_long_and_still_records_its_delivery(outbox: Outbox) -> None:
    client = Gated()
    with idle(outbox, client) as running:
        outbox.enqueue(rule_fired())
        client.wait_for_upload()
        run = running._run
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
        run = running._run
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
            until(lambda: background[0]._run is None)
            until(run._stopping.is_set)
        return True

    client = StopsBeforeTheClaim()
    with idle(outbox, client) as running:
        background.append(running)
        run = running._run
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
from outbox import HttpClient, Outbox, Worker
from builders import rule_fired
outbox, client = Outbox.open(sys.argv[1]), HttpClient(sys.argv[2], token="t")
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
            assert running._run is not inherited

        inherited = running._run
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
        listening = running._run.wakeup._listening
        child = Child(lambda: outbox.enqueue(rule_fired()), running.stop)
        child.act()
        child.act()
        child.end()
        another.enqueue(rule_fired())
        until(lambda: all_sent(outbox))
        assert running._run.wakeup._listening is listening


@can_fork
@beside_threads
def test_a_child_that_enqueues_nothing_has_no_worker(outbox: Outbox) -> None:
    unstarted = Worker(outbox, ScriptedClient())
    with idle(outbox, ScriptedClient()) as running:

        def look() -> None:
            assert running._run is None
            running.stop()
            outbox.enqueue(rule_fired())
            assert running._run is None
            assert unstarted._run is None

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
    assert outbox.enqueue(rule_fired())
    assert told(caplog) == [
        "the worker can't start in this process, events are left to others: can't create new thread at interpreter shutdown"
    ]


GUNICORN_APP = """
import os
from outbox import HttpClient, Outbox, Worker
from builders import rule_fired

outbox = Outbox.open(os.environ["DATABASE"])
Worker(outbox, HttpClient(os.environ["SERVER"], token="t"), poll_interval_ms=3_600_000).start()

def app(environ, start_response):
    outbox.enqueue(rule_fired(session_id=environ["PATH_INFO"]))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]
"""


@pytest.mark.skipif(sys.platform == "win32", reason="gunicorn does not run here")
@pytest.mark.slow
@pytest.mark.contract
@pytest.mark.parametrize("options", [["--preload"], []])
def test_it_delivers_from_the_forks_of_gunicorn(outbox: Outbox, url: str, tmp_path: Path, options, server) -> None:
    (tmp_path / "app.py").write_text(GUNICORN_APP)
    command = [sys.executable, "-m", "gunicorn", "--workers", "2", "--bind", "127.0.0.1:0", *options, "app:app"]
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "DATABASE": url, "SERVER": server.url}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as gunicorn:
        lines = []
        try:
            for line in gunicorn.stderr:
                lines.append(line)
                if address := re.search("Listening at: (http://[0-9.:]+)", line):
                    break
            answered_by = set()
            requests = 0
            while len(answered_by) < 2 or requests < 10:
                requests += 1
                with urlrequest.urlopen(f"{address[1]}/{requests}") as answer:  # noqa: S310 - our own server
                    answered_by.add(answer.read())
            until(lambda: len(server.stored) == requests)
        finally:
            gunicorn.send_signal(signal.SIGTERM)
            _, rest = gunicorn.communicate(timeout=FOREVER_S)
    assert gunicorn.returncode == 0
    assert "Traceback" not in "".join(lines) + rest
    assert "can't deliver" not in "".join(lines) + rest
