from __future__ import annotations

import ctypes
import gc
import os
import selectors
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from builders import ScriptedClient, rule_fired, statuses
from children import Child, beside_threads, can_fork
from conditions import until, worker_threads
from crowd import Crowd, enqueuing
from outbox import Outbox, StorageError, Worker
from outbox.storage import engines, forks

# What is in use at the fork belongs to a pool that is given up then, and is closed when it is collected. Such a test
# collects it itself, or a later one would be blamed.
gives_up_a_pool = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

pytestmark = can_fork


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks wait hardly at all for connections in use."""
    monkeypatch.setattr(forks, "_PATIENCE_S", 0.01)


@contextmanager
def in_use(crowd: Crowd, use: Callable[[], object] = forks.held_back) -> Iterator[threading.Event]:
    """Let another thread use a connection until the end of the block, or until the event is set."""
    is_in_use, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        with use():
            is_in_use.set()
            is_over.wait()

    crowd.start("in use", hold)
    is_in_use.wait()
    try:
        yield is_over
    finally:
        is_over.set()
        crowd.join()


def refused(call: Callable[[], object], match: str) -> Callable[[], None]:
    def check() -> None:
        with pytest.raises(StorageError, match=match):
            call()

    return check


# Forks of Python's


@beside_threads
def test_a_fork_waits_for_the_transactions_of_other_threads(outbox: Outbox) -> None:
    crowd = Crowd()

    def end_when_a_fork_waits() -> None:
        until(lambda: forks._forking)
        is_over.set()

    with in_use(crowd, lambda: engines.writing(outbox.engine)) as is_over:
        crowd.start("ends", end_when_a_fork_waits)
        child = Child(*[lambda: outbox.enqueue(rule_fired())] * 2)
    child.act()
    outbox.close()
    child.act()
    child.end()
    assert statuses(outbox) == ["pending"] * 2


@beside_threads
@gives_up_a_pool
@pytest.mark.usefixtures("impatient")
def test_a_fork_does_not_wait_for_ever_and_then_the_child_may_only_read(outbox: Outbox) -> None:
    with in_use(Crowd(), lambda: engines.writing(outbox.engine)):
        child = Child(
            outbox.pending_count,
            refused(lambda: outbox.enqueue(rule_fired()), "had this file open when it forked this process"),
            refused(lambda: engines.writing(outbox.engine).__enter__(), "had this file open"),
        )
        for _ in range(3):
            child.act()
        child.end()
    gc.collect()
    assert outbox.enqueue(rule_fired()) == 1


@beside_threads
@pytest.mark.usefixtures("impatient")
def test_a_fork_does_not_wait_for_ever_for_a_thread_that_writes(outbox: Outbox) -> None:
    crowd = Crowd()
    is_writing, is_over = threading.Event(), threading.Event()

    def write(_: object) -> None:
        is_writing.set()
        is_over.wait()

    crowd.start("writes", lambda: outbox.store._writer.run(write))
    is_writing.wait()
    child = Child(refused(lambda: outbox.enqueue(rule_fired()), "had this file open when it forked this process"))
    child.act()
    child.end()
    is_over.set()
    crowd.join()
    assert outbox.enqueue(rule_fired()) == 1


@gives_up_a_pool
def test_a_fork_within_a_transaction_of_its_own_thread_does_not_wait(outbox: Outbox) -> None:
    with engines.writing(outbox.engine):
        child = Child(outbox.pending_count)
        child.act()
        child.end()
    gc.collect()
    assert outbox.enqueue(rule_fired()) == 1


def test_a_child_forked_amid_an_enqueue_writes_nothing_on_the_connection_of_its_parent(outbox: Outbox) -> None:
    processes: list[int] = []

    def fork(_: object) -> str:
        processes.append(os.fork())
        return "committed"

    parent = os.getpid()
    try:
        outbox.store._writer.run(fork)
    except StorageError as error:
        os._exit(0 if "had this file open" in str(error) else 1)
    finally:
        if os.getpid() != parent:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(processes[0], 0)[1]) == 0
    assert outbox.enqueue(rule_fired()) == 1


@beside_threads
def test_a_fork_does_not_wait_for_a_thread_that_waits_for_the_write_lock(outbox: Outbox, url: str) -> None:
    outbox.enqueue(rule_fired())
    another_program = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    another_program.execute("BEGIN IMMEDIATE")
    crowd = Crowd()
    crowd.start("waits", enqueuing(outbox, "waits"))
    until(lambda: forks._in_use)
    child = Child()
    child.end()
    assert not crowd.returned
    another_program.close()
    assert crowd.join() == {"waits": 2}


@beside_threads
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_handler_that_raises_while_a_fork_waits_blocks_nobody(outbox: Outbox) -> None:
    def interrupt(*_: object) -> None:
        raise TimeoutError

    def interrupt_when_a_fork_waits() -> None:
        until(lambda: forks._forking)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

    outbox.enqueue(rule_fired())
    before = signal.signal(signal.SIGALRM, interrupt)
    crowd = Crowd()
    try:
        with in_use(crowd):
            crowd.start("interrupts", interrupt_when_a_fork_waits)
            child = Child(refused(lambda: outbox.enqueue(rule_fired()), "had this file open"))
            child.act()
            child.end()
    finally:
        signal.signal(signal.SIGALRM, before)
    crowd.start("stats", outbox.stats)
    crowd.start("enqueue", enqueuing(outbox, "enqueue"))
    assert crowd.join()["enqueue"] == 2
    assert not forks._forking


@beside_threads
def test_threads_that_come_while_python_forks_wait_for_its_end(outbox: Outbox) -> None:
    crowd = Crowd()
    forks._before_fork()
    crowd.start("enqueue", enqueuing(outbox, "enqueue"))
    crowd.start("stats", outbox.pending_count)
    with pytest.raises(AssertionError):
        until(lambda: crowd.returned, within_s=0.05)
    assert outbox.pending_count() == 0  # this thread itself need not
    forks._forking.clear()
    assert crowd.join()["enqueue"] == 1


@beside_threads
def test_two_threads_fork_one_after_the_other(outbox: Outbox) -> None:
    crowd = Crowd()
    forks._before_fork()
    crowd.start("forks", lambda: Child(lambda: outbox.enqueue(rule_fired())))
    with pytest.raises(AssertionError):
        until(lambda: crowd.returned, within_s=0.05)
    forks._forking.clear()
    child = crowd.join()["forks"]
    child.act()
    child.end()
    assert statuses(outbox) == ["pending"]


def test_a_use_that_was_interrupted_at_its_end_keeps_no_fork_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "leave", lambda _: None)
    with forks.held_back():
        pass
    monkeypatch.undo()
    assert len(forks._in_use) == 1
    forks._before_fork()
    forks._forking.clear()
    assert not forks._in_use


def test_a_fork_does_not_wait_for_threads_of_the_process_that_this_one_was_forked_from_unseen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Use:
        def is_over(self) -> bool:
            return False

    monkeypatch.setattr(forks._this, "id", 0)
    forks._in_use[Use()] = 0
    forks._before_fork()
    forks._forking.clear()
    assert not forks._in_use
    assert forks._this.is_this()


def test_a_child_has_connections_to_a_server_of_its_own() -> None:
    pytest.importorskip("psycopg")
    engine = engines.open_engine("postgresql+psycopg://127.0.0.1:1/none")
    inherited = engine.pool

    def check() -> None:
        assert engine.pool is not inherited

    child = Child(check)
    child.act()
    child.end()
    assert engine.pool is inherited


# Forks in C, of which Python knows nothing


@pytest.fixture
def forked_unseen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Child]:
    """Forks without a call of what was registered for that."""
    libc = ctypes.PyDLL(None)

    def fork(*actions: Callable[[], object]) -> Child:
        monkeypatch.setattr(os, "fork", libc.fork)
        try:
            return Child(*actions)
        finally:
            monkeypatch.undo()

    return fork


UNSEEN = "without Python's knowledge"


def test_in_a_process_that_was_forked_unseen_nothing_of_its_parent_is_used(
    outbox: Outbox, url: str, forked_unseen
) -> None:
    outbox.enqueue(rule_fired())
    outbox.stats()
    worker = Worker(outbox, ScriptedClient())
    server = engines.open_engine("postgresql+psycopg://127.0.0.1:1/none")
    actions = [
        refused(lambda: outbox.enqueue(rule_fired()), UNSEEN),
        refused(lambda: outbox.flush(ScriptedClient()), UNSEEN),
        refused(outbox.stats, UNSEEN),
        refused(worker.start, UNSEEN),
        refused(server.connect, UNSEEN),
        outbox.close,
    ]
    child = forked_unseen(*actions)
    for _ in actions:
        child.act()
    child.end()
    assert outbox.enqueue(rule_fired()) == 2


def test_a_file_that_was_open_in_the_parent_may_only_be_read_in_a_process_that_was_forked_unseen(
    outbox: Outbox, url: str, forked_unseen
) -> None:
    outbox.enqueue(rule_fired())

    def open_anew() -> None:
        with Outbox(url) as own:
            assert own.pending_count() == 1
            refused(lambda: own.enqueue(rule_fired()), "had this file open when it forked")()

    child = forked_unseen(open_anew)
    child.act()
    child.end()


def test_a_file_that_was_closed_before_a_fork_unseen_is_opened_in_the_child(
    outbox: Outbox, url: str, forked_unseen
) -> None:
    outbox.close()

    def open_anew() -> None:
        with Outbox(url) as own:
            own.enqueue(rule_fired())

    child = forked_unseen(open_anew)
    child.act()
    child.end()
    assert statuses(outbox) == ["pending"]


def test_a_worker_that_was_forked_unseen_says_so_when_it_is_woken(forked_unseen, caplog, outbox: Outbox) -> None:
    with Worker(outbox, ScriptedClient()) as worker:

        def wake() -> None:
            worker._wake()
            assert UNSEEN in caplog.text

        # A lock that the thread holds during the fork, such as that of the log, would stay locked in the child.
        (thread,) = worker_threads()
        until(lambda: sys._current_frames()[thread.ident].f_code.co_filename == selectors.__file__)
        child = forked_unseen(wake)
        child.act()
        child.end()
