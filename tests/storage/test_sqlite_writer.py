from __future__ import annotations

import _thread
import contextlib
import gc
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

import pytest
from sqlalchemy import event, select

from builders import OK, ScriptedClient, rule_fired, statuses
from conditions import until
from crowd import Crowd, Queue, check_rows, enqueuing
from outbox import Outbox, Policy, QueueFull, StorageError
from outbox.storage import engines, sqlite_calls, sqlite_file, sqlite_writer
from outbox.storage.sql import columns
from outbox.storage.transactions import read

FULL, NORMAL = 2, 1


class Grief(BaseException):
    """What is raised in a thread from outside."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads look again at once."""
    monkeypatch.setattr(sqlite_writer, "_LOOK_AGAIN_S", 0.01)


def writing(outbox: Outbox):
    return outbox.store._writer.run


@pytest.fixture
def statements(outbox: Outbox) -> list[str]:
    """What runs on the connection that writes."""
    ran: list[str] = []
    writing(outbox)(lambda transaction: transaction._run("SELECT 1", ()).connection.set_trace_callback(ran.append))
    ran.clear()
    return ran


@contextmanager
def held_by_another_program(url: str) -> Iterator[None]:
    connection = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    yield
    connection.close()


# Shared commits


def test_calls_that_wait_at_the_same_time_are_committed_together(outbox: Outbox, statements: list[str]) -> None:
    queue = Queue(outbox)
    for name in "abc":
        queue.wait(name, enqueuing(outbox, name))
    statements.clear()
    ids = queue.go_on()
    assert {name: outbox.get(row_id).session_id for name, row_id in ids.items()} == {name: name for name in "abc"}
    assert statements.count("COMMIT") == 1


def test_a_call_that_comes_alone_waits_for_nobody(outbox: Outbox) -> None:
    assert [outbox.enqueue(rule_fired()) for _ in range(3)] == [1, 2, 3]
    assert not outbox.store._writer._group.calls


def test_where_a_shared_transaction_fails_only_the_call_to_blame_is_told(outbox: Outbox) -> None:
    def fail(_: object) -> None:
        raise QueueFull("bad")

    queue = Queue(outbox)
    queue.wait("a", enqueuing(outbox, "a"))
    queue.wait("bad", lambda: writing(outbox)(fail, shares_commit=True))
    queue.wait("c", enqueuing(outbox, "c"))
    returned = queue.go_on()
    assert isinstance(returned.pop("bad"), QueueFull)
    assert {outbox.get(row_id).session_id for row_id in returned.values()} == {"a", "c"}
    assert statuses(outbox) == ["pending"] * 2


def test_of_threads_that_enqueue_at_once_only_those_without_room_are_refused(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_rows=20, when_full="reject"), synchronous="NORMAL") as full:
        queue = Queue(full)
        for number in range(10):
            queue.wait(str(number), lambda: full.enqueue_many([rule_fired()] * 3))
        returned = queue.go_on().values()
        assert [type(one) for one in returned].count(QueueFull) == 4
        assert statuses(full) == ["pending"] * 18


def test_after_a_shared_transaction_failed_the_rows_are_counted_again_at_the_cap(url: str) -> None:
    def fail(_: object) -> None:
        raise QueueFull("bad")

    with Outbox.open(url, policy=Policy(max_rows=5, when_full="trim")) as capped, Outbox(url) as another:
        capped.enqueue_many([rule_fired()] * 6)
        another.enqueue_many([rule_fired()] * 3)
        queue = Queue(capped)
        queue.wait("a", enqueuing(capped, "a"))
        queue.wait("bad", lambda: writing(capped)(fail, shares_commit=True))
        assert isinstance(queue.go_on()["bad"], QueueFull)
        assert len(statuses(capped)) == 5


def test_while_another_program_holds_the_write_lock_all_wait_and_are_then_told_together(
    outbox: Outbox, url: str, statements: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_MS", 250)
    queue = Queue(outbox)
    for name in "abc":
        queue.wait(name, enqueuing(outbox, name))
    with held_by_another_program(url):
        returned = queue.go_on()
    assert [str(one).partition(": ")[2] for one in returned.values()] == [
        "database is locked; another program holds the write lock; end it or wait for it, then try again"
    ] * 3
    assert all(isinstance(one, StorageError) for one in returned.values())
    assert statuses(outbox) == []


def test_a_delivery_that_waited_in_vain_is_not_tried_without_the_query_for_chores(
    outbox: Outbox, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_MS", 250)
    outbox.enqueue(rule_fired())
    write, writes = outbox.store.claims._write, []
    monkeypatch.setattr(
        outbox.store.claims, "_write", lambda *call, **how: writes.append(call) or write(*call, **how)
    )
    with ExitStack() as stack:
        client = ScriptedClient(lambda _: stack.enter_context(held_by_another_program(url)))
        with pytest.raises(StorageError, match="database is locked"):
            outbox.flush(client)
    assert len(writes) == 2  # the delivery, and once more as the claim is given up
    assert statuses(outbox) == ["sending"]


def test_calls_that_waited_for_another_program_are_committed_when_it_is_done(outbox: Outbox, url: str) -> None:
    queue = Queue(outbox)
    for name in "abc":
        queue.wait(name, enqueuing(outbox, name))
    with held_by_another_program(url):
        queue._goes_on.set()
        until(lambda: "holder" in queue.returned)
    assert sorted(queue.go_on().values()) == [1, 2, 3]


# Exceptions from outside


@pytest.mark.parametrize("kind", [Grief, TimeoutError])
def test_what_a_thread_came_to_grief_with_is_committed_by_others(
    outbox: Outbox, kind: type[BaseException]
) -> None:
    def come_to_grief(_: object) -> None:
        raise kind

    queue = Queue(outbox)
    queue.wait("struck", lambda: writing(outbox)(come_to_grief, shares_commit=True))
    queue.wait("b", enqueuing(outbox, "b"))
    queue.wait("c", enqueuing(outbox, "c"))
    returned = queue.go_on()
    assert type(returned.pop("struck")) is kind
    assert sorted(returned.values()) == [1, 2]


def test_a_call_that_was_interrupted_while_it_waited_is_not_committed(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Turn:
        def acquire(self, timeout: float) -> bool:
            raise Grief

    queue = Queue(outbox)
    queue.wait("a", enqueuing(outbox, "a"))
    group = outbox.store._writer._group
    with monkeypatch.context() as patched:
        patched.setattr(group, "turn", Turn())
        queue.start("struck", enqueuing(outbox, "struck"))
        until(lambda: "struck" in queue.returned)
    returned = queue.go_on()
    assert isinstance(returned.pop("struck"), Grief)
    assert returned == {"a": 1}
    assert statuses(outbox) == ["pending"]


@pytest.mark.usefixtures("quick")
def test_a_call_that_another_thread_is_about_to_commit_is_not_committed_twice(outbox: Outbox, url: str) -> None:
    writer = outbox.store._writer
    is_under_way, goes_on = threading.Event(), threading.Event()

    def write(_: object) -> int:
        is_under_way.set()
        goes_on.wait()
        return 0

    queue = Queue(outbox)
    queue.wait("slow", lambda: writer.run(write, shares_commit=True))
    queue.wait("b", enqueuing(outbox, "b"))
    queue._goes_on.set()
    is_under_way.wait()
    permit, writer._permit = writer._permit, sqlite_calls.Permit()  # as if the slow one were believed gone
    until(lambda: writer._permit.attempt is not sqlite_calls.NO_ATTEMPT)  # the other one looked again
    goes_on.set()
    returned = queue.go_on()
    permit.close()
    assert sorted(returned) == ["b", "slow"]
    check_rows(url, {name: row_id for name, row_id in returned.items() if name != "slow"})


@pytest.mark.usefixtures("quick")
def test_where_a_thread_is_gone_with_the_lock_held_and_a_transaction_open_others_go_on(
    outbox: Outbox, url: str
) -> None:
    outbox.enqueue(rule_fired(session_id="before"))
    left = outbox.store._writer._permit

    def go() -> None:
        left.lock.acquire()
        left.attempt = sqlite_calls.Attempt(sys._getframe())
        left.kept.connection.execute("BEGIN IMMEDIATE")

    crowd = Crowd()
    crowd.start("goes", go)
    crowd.join()
    for name in "abc":
        crowd.start(name, enqueuing(outbox, name))
    returned = crowd.join() | {"before": 1}
    del returned["goes"]
    assert sorted(returned.values()) == [1, 2, 3, 4]
    check_rows(url, returned)


def test_a_transaction_whose_connection_was_closed_by_a_thread_that_took_over_is_run_again(outbox: Outbox) -> None:
    writer = outbox.store._writer
    tries: list[object] = []

    def write(transaction) -> int:
        tries.append(transaction)
        if len(tries) == 1:
            permit, writer._permit = writer._permit, sqlite_calls.Permit()
            permit.close()
        return transaction._run("SELECT 1", ()).fetchone()[0]

    assert writer.run(write) == 1
    assert len(tries) == 2


# Signal handlers, in the main thread


@contextmanager
def handling(handler: Callable[[], object]) -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, lambda *_: handler())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_handler_that_enqueues_in_the_middle_of_an_insert_is_told(
    outbox: Outbox, statements: list[str]
) -> None:
    told: list[str] = []

    def enqueue() -> None:
        with pytest.raises(StorageError) as raised:
            outbox.enqueue(rule_fired())
        told.append(str(raised.value))

    def write(transaction) -> None:
        transaction._run("DELETE FROM observation_events", ())
        os.kill(os.getpid(), signal.SIGUSR1)

    with handling(enqueue):
        writing(outbox)(write)
    assert len(told) == 1
    assert "this thread itself holds the write lock" in told[0]
    assert statuses(outbox) == []


def test_a_signal_handler_that_enqueues_during_a_query_is_not_hindered_by_what_another_program_wrote(
    outbox: Outbox, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_MS", 250)
    outbox.enqueue_many([rule_fired()] * 2)
    connection = outbox.store._writer._permit.kept.connection
    ids: list[int] = []

    def enqueue() -> None:
        connection.set_progress_handler(None, 0)
        with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as another, another:
            another.execute("UPDATE observation_events SET session_id = 'another'")
        ids.append(outbox.enqueue(rule_fired()))

    with handling(enqueue):
        # It is written in C, so Python calls the handler only when the query has returned, as for a real signal.
        connection.set_progress_handler(partial(_thread.interrupt_main, signal.SIGUSR1), 1)
        found = read(outbox.store._writer, lambda transaction: transaction.rows(select(columns.id)))
    assert found == [(1,), (2,)]
    assert ids == [3]


class Handler:
    """Calls a function at every instruction of the writer, as a signal handler may be called there."""

    def __init__(self, handle: Callable[[], object]) -> None:
        self._handle = handle
        self._seen: set[tuple[int, int]] = set()
        self.is_done = False

    def run(self, call: Callable[[], object]) -> object:
        self.is_done = True
        before = sys.gettrace()  # that of the coverage, perhaps
        sys._getframe().f_trace_opcodes = True  # Python 3.12 looks whether any frame wants that
        sys.settrace(self._trace)
        try:
            return call()
        finally:
            sys.settrace(before)

    def _trace(self, frame: FrameType, what: str, _: object) -> Callable[..., object] | None:
        code = frame.f_code
        if code.co_filename not in {sqlite_writer.__file__, sqlite_calls.__file__}:
            return None
        frame.f_trace_opcodes = True
        instruction = (code.co_firstlineno, frame.f_lasti)
        if what == "opcode" and instruction not in self._seen:
            self._seen.add(instruction)
            self.is_done = False
            with contextlib.suppress(StorageError):
                self._handle()
            sys.settrace(None)  # once a call
            frame.f_trace_opcodes = False
            return None
        return self._trace


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_enqueue_is_synced_though_a_signal_handler_flushes_at_any_instruction_of_it(url: str) -> None:
    with Outbox.open(url, synchronous="FULL") as outbox:
        ran: list[str] = []
        handler = Handler(lambda: outbox.flush(ScriptedClient(OK)))
        number = 0
        while not handler.is_done:
            outbox.flush(ScriptedClient(OK))
            kept = outbox.store._writer._permit.kept
            kept.connection.set_trace_callback(ran.append)
            assert handler.run(lambda: outbox.enqueue(rule_fired()))
            number += 1
        assert number > 100
    gc.collect()  # connections that the handler opened while another one was being opened
    synchronous = NORMAL
    is_in_transaction = False
    for statement in ran:
        if statement.startswith("PRAGMA synchronous"):
            synchronous = int(statement[-1])
        if statement.startswith("INSERT INTO observation_events"):
            is_enqueue = True
            assert synchronous == FULL or is_in_transaction
        if statement.startswith(("COMMIT", "ROLLBACK")):
            assert synchronous == FULL or not is_enqueue
            is_in_transaction = False
        if statement.startswith("BEGIN"):
            is_enqueue = False
            is_in_transaction = True


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [1, 2])
def test_an_enqueue_returns_its_own_ids_though_a_signal_handler_enqueues_at_any_instruction_of_it(
    outbox: Outbox, url: str, number: int
) -> None:
    returned: dict[str, object] = {}

    def handle() -> None:
        name = f"handler {len(returned)}"
        returned[name] = outbox.enqueue(rule_fired(session_id=name))

    handler = Handler(handle)
    calls = 0
    while not handler.is_done:
        calls += 1
        names = [f"call {calls} {place}" for place in range(number)]
        ids = handler.run(lambda names=names: outbox.enqueue_many([rule_fired(session_id=name) for name in names]))
        returned |= zip(names, ids, strict=True)
    assert calls > 100
    gc.collect()  # as above
    sessions = {name: outbox.get(row_id).session_id for name, row_id in returned.items()}
    assert sessions == {name: name for name in returned}
    check_rows(url, returned)


@contextmanager
def interrupting_after(function: str, called: str) -> Iterator[list[BaseException]]:
    """Interrupt a function of ours right after it called one of the driver's; what it raised is in the list then."""
    failed: list[BaseException] = []

    def profile(frame: FrameType, what: str, returning: object) -> None:
        if (what, frame.f_code.co_name, getattr(returning, "__name__", "")) == ("c_return", function, called):
            raise KeyboardInterrupt

    try:
        sys.setprofile(profile)
        yield failed
    except KeyboardInterrupt as interrupt:
        failed.append(interrupt)
    finally:
        sys.setprofile(None)
    assert failed, f"{function} never called {called}"


def test_an_interrupt_while_ids_are_read_leaves_nothing_that_hinders_later_commits(outbox: Outbox) -> None:
    with interrupting_after("run", "execute") as failed:
        outbox.enqueue_many([rule_fired()] * 4)
    assert outbox.enqueue(rule_fired()) == 1
    assert failed[0].__traceback__  # who handles it has that, and so the cursor


def test_a_transaction_that_an_interrupted_call_left_open_is_rolled_back_by_the_next(
    outbox: Outbox, url: str
) -> None:
    outbox.enqueue(rule_fired())
    outbox.store._writer._permit.kept.connection.execute("BEGIN IMMEDIATE")
    assert outbox.enqueue(rule_fired()) == 2
    with Outbox(url) as another:
        assert another.enqueue(rule_fired()) == 3


def test_after_an_interrupted_flush_events_are_still_synced(outbox: Outbox, url: str) -> None:
    with Outbox(url, synchronous="FULL") as synced:
        synced.enqueue(rule_fired())
        with interrupting_after("_connected", "execute"):
            synced.flush(ScriptedClient(OK))
        synced.enqueue(rule_fired())
        connection = synced.store._writer._permit.kept.connection
        assert connection.execute("PRAGMA synchronous").fetchone() == (FULL,)


# The connection


def test_disposing_of_the_engine_closes_the_connection_and_the_next_use_opens_another(outbox: Outbox) -> None:
    outbox.enqueue(rule_fired())
    outbox.close()
    assert outbox.store._writer._permit.kept is None
    assert outbox.enqueue(rule_fired()) == 2


@pytest.mark.usefixtures("quick")
def test_closing_waits_for_the_thread_that_writes(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = outbox.store._writer
    outbox.enqueue(rule_fired())
    kept = writer._permit.kept
    queue = Queue(outbox)
    tries = threading.Event()
    take = writer._take

    def take_and_tell(permit, wait_s: float) -> bool:
        is_taken = take(permit, wait_s)
        tries.set()
        return is_taken

    monkeypatch.setattr(writer, "_take", take_and_tell)
    queue.start("close", outbox.close)
    tries.wait()
    queue.go_on()
    assert writer._permit.kept is None
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        kept.connection.execute("SELECT 1")


def test_closing_in_the_middle_of_a_transaction_of_the_same_thread_does_not_wait(outbox: Outbox) -> None:
    def close(transaction) -> int:
        outbox.close()
        return transaction._run("SELECT 1", ()).fetchone()[0]

    assert writing(outbox)(close) == 1


def test_events_that_a_trigger_leaves_out_are_not_mixed_up_with_others(outbox: Outbox) -> None:
    with engines.writing(outbox.engine) as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER left_out BEFORE INSERT ON observation_events WHEN new.session_id = 'b'"
            " BEGIN SELECT RAISE(IGNORE); END"
        )
    with pytest.raises(StorageError, match="a trigger of the database left out some of 4 events"):
        outbox.enqueue_many([rule_fired(session_id=name) for name in "abcd"])
    assert statuses(outbox) == []


def add_trigger(outbox: Outbox, trigger: str) -> None:
    with engines.writing(outbox.engine) as connection:
        connection.exec_driver_sql(f"CREATE TRIGGER interfering {trigger}")


@pytest.mark.parametrize("is_later", [False, True])
def test_a_lone_event_that_a_trigger_leaves_out_is_an_error(outbox: Outbox, *, is_later: bool) -> None:
    outbox.enqueue(rule_fired())
    add_trigger(outbox, "BEFORE INSERT ON observation_events BEGIN SELECT RAISE(IGNORE); END")
    if not is_later:
        outbox.close()
    with pytest.raises(StorageError, match="^a trigger of the database left out some of 1 events$"):
        outbox.enqueue(rule_fired())
    assert statuses(outbox) == ["pending"]


def test_a_lone_event_that_a_trigger_refuses_is_not_recorded(outbox: Outbox) -> None:
    add_trigger(outbox, "AFTER INSERT ON Observation_Events BEGIN SELECT RAISE(FAIL, 'not this one'); END")
    outbox.close()
    with pytest.raises(StorageError, match="not this one"):
        outbox.enqueue(rule_fired())
    assert statuses(outbox) == []


def test_a_file_that_is_replaced_while_it_is_opened_is_noticed(outbox: Outbox, url: str, tmp_path: Path) -> None:
    path = sqlite_file.file_of(outbox.engine.url)
    with Outbox.open(f"sqlite:///{tmp_path / 'new.db'}"):
        pass  # its log is gone when it is closed
    outbox.close()

    @event.listens_for(outbox.engine, "checkout", once=True)
    def replace(*_: object) -> None:
        for log in path.parent.glob(f"{path.name}-*"):
            log.unlink()
        (tmp_path / "new.db").replace(path)

    with contextlib.suppress(StorageError):
        outbox.enqueue(rule_fired())  # it may come too late for this one
    row_id = outbox.enqueue(rule_fired())
    with Outbox(url) as another:
        assert another.get(row_id) is not None


@pytest.mark.parametrize("deleted", [["wal"], ["shm"], ["wal", "shm"]])
def test_events_reach_the_file_though_its_log_was_deleted_under_the_running_program(
    outbox: Outbox, url: str, deleted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_writer, "_LOOK_AT_LOG_S", 0)
    path = url.removeprefix("sqlite:///")
    outbox.stats()  # a pooled connection is open, too
    outbox.enqueue(rule_fired(session_id="before"))
    for name in deleted:
        Path(f"{path}-{name}").unlink()
    outbox.enqueue(rule_fired(session_id="after"))
    count = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute('SELECT count(*) FROM observation_events'))"
    another_program = subprocess.run(
        [sys.executable, "-c", count, path], capture_output=True, text=True, check=True
    )
    assert another_program.stdout == "(2,)\n"
    assert outbox.pending_count() == 2


def test_the_log_is_looked_for_once_a_second_at_most(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox.enqueue(rule_fired())
    monkeypatch.setattr(sqlite_file.OpenFile, "has_lost_log", lambda _: pytest.fail("looked"))
    monkeypatch.setattr(sqlite_writer, "_LOOK_AT_LOG_S", 3_600)
    outbox.enqueue(rule_fired())


class _Unconfigurable(sqlite3.Connection):
    """Takes the busy timeout of the pool, but not that of the writer."""

    def cursor(self, *arguments):
        return super().cursor(_UnconfigurableCursor)


class _UnconfigurableCursor(sqlite3.Cursor):
    def execute(self, statement, *arguments):
        # Python 3.10 calls this for the pool's, too.
        if statement.startswith("PRAGMA busy_timeout") and not statement.endswith(
            f" {sqlite_file.BUSY_TIMEOUT_MS}"
        ):
            raise sqlite3.OperationalError("disk I/O error")
        return super().execute(statement, *arguments)


def test_a_connection_that_cannot_be_set_up_is_closed(outbox: Outbox) -> None:
    opened: list[sqlite3.Connection] = []
    outbox.engine.dispose()
    event.listen(outbox.engine, "do_connect", lambda *arguments: arguments[3].update(factory=_Unconfigurable))
    event.listen(outbox.engine, "connect", lambda connection, _record: opened.append(connection))
    with pytest.raises(StorageError, match="disk I/O error"):
        outbox.enqueue(rule_fired())
    (connection,) = opened
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.commit()
