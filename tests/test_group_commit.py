import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from sqlalchemy import event

from builders import OK, ScriptedClient, rule_fired, statuses
from outbox import Outbox, Policy, QueueFull, StorageError, database, group_commit, sqlite
from outbox.group_commit import GroupCommit
from outbox.transaction import NotBegunError
from test_processes import Child, beside_threads, can_fork


class Grief(BaseException):
    """What another thread, or a signal, raises in one."""


class Busy:
    """Threads that want their work committed while one of them is at it, until `end`."""

    def __init__(self, commit: Callable[[list[str]], object] = list) -> None:
        self._commit = commit
        self.groups: list[list[str]] = []
        self._goes_on = threading.Event()
        self.group = GroupCommit(self._wait_and_commit, everyones=NotBegunError)
        self.returned: dict[str, object] = {}
        self.strikes: type[BaseException] = Grief
        self.threads: dict[str, threading.Thread] = {}
        self._start("first")
        while not self.group._is_led or self.group._waiting:
            pass

    def wait(self, *works: str) -> None:
        """Let a thread each wait, in this order."""
        for work in works:
            self._start(work)
            while work not in [call.work for call in self.group._waiting]:
                pass

    def end(self) -> dict[str, object]:
        """Let all go on; return what each work but the first one came to."""
        self._goes_on.set()
        for thread in self.threads.values():
            thread.join(20)
            assert not thread.is_alive()
        assert self.returned.pop("first") == "FIRST"
        return self.returned

    def _start(self, work: str) -> None:
        self.threads[work] = threading.Thread(target=self._run, args=(work,), daemon=True)
        self.threads[work].start()

    def _run(self, work: str) -> None:
        try:
            self.returned[work] = self.group.run(work)
        except BaseException as error:
            self.returned[work] = error

    def _wait_and_commit(self, works: list[str], committed: Callable[[list[str]], None]) -> None:
        if works == ["first"]:
            self._goes_on.wait()
        else:
            self.groups.append(works)
            self._commit(works)
        committed([work.upper() for work in works])
        if "struck after the commit" in works:
            raise self.strikes


def test_who_waits_is_committed_together_and_gets_an_own_result() -> None:
    busy = Busy()
    busy.wait("a", "b", "c")
    assert busy.end() == {"a": "A", "b": "B", "c": "C"}
    assert busy.groups == [["a", "b", "c"]]


def test_a_group_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "_LARGEST_GROUP", 2)
    busy = Busy()
    busy.wait(*"abcde")
    assert busy.end() == {"a": "A", "b": "B", "c": "C", "d": "D", "e": "E"}
    assert busy.groups == [["a", "b"], ["c", "d"], ["e"]]


def test_a_group_that_fails_is_done_one_by_one_and_only_who_is_to_blame_is_told() -> None:
    def commit(works: list[str]) -> None:
        if "bad" in works:
            raise ValueError("bad")

    busy = Busy(commit)
    busy.wait("a", "bad", "c")
    returned = busy.end()
    assert isinstance(returned.pop("bad"), ValueError)
    assert returned == {"a": "A", "c": "C"}


def test_where_the_transaction_could_not_begin_none_is_tried_by_itself() -> None:
    def commit(_: list[str]) -> None:
        raise NotBegunError("locked")

    busy = Busy(commit)
    busy.wait("a", "b", "c")
    assert [type(error) for error in busy.end().values()] == [NotBegunError] * 3
    assert busy.groups == [["a", "b", "c"]]


@pytest.mark.parametrize("strikes", [Grief, TimeoutError])
def test_what_is_committed_is_done_though_its_leader_was_struck_right_then(strikes: type[BaseException]) -> None:
    busy = Busy()
    busy.strikes = strikes
    busy.wait("struck after the commit", "b", "c")
    returned = busy.end()
    assert isinstance(returned.pop("struck after the commit"), strikes)
    assert returned == {"b": "B", "c": "C"}
    assert busy.groups == [["struck after the commit", "b", "c"]]


@pytest.mark.parametrize("struck", "abcd")
def test_a_thread_that_is_struck_as_it_wakes_holds_up_nobody(monkeypatch: pytest.MonkeyPatch, struck: str) -> None:
    def sleep(call: group_commit._Call[str, str]) -> None:
        unstruck(call)
        if call.work == struck:
            raise Grief

    unstruck = group_commit._Call.sleep
    monkeypatch.setattr(group_commit._Call, "sleep", sleep)
    busy = Busy()
    busy.wait(*"abcd")
    returned = busy.end()
    assert isinstance(returned.pop(struck), Grief)
    assert returned == {work: work.upper() for work in "abcd" if work != struck}
    assert not busy.group._is_led


def test_a_thread_that_is_struck_before_its_turn_begins_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = GroupCommit[str, str](lambda works, committed: committed(works), everyones=NotBegunError)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            group.run("struck")
        except BaseException as error:
            raised.append(error)

    class Striking:
        def __enter__(self) -> None:
            raise Grief

        def __exit__(self, *_: object) -> None:
            pass

    lock = group._lock
    monkeypatch.setattr(group, "_lock", Striking())
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    monkeypatch.setattr(group, "_lock", lock)
    assert [type(error) for error in raised] == [Grief]
    assert together(lambda: group.run("a")) == ["a"]


def test_who_is_struck_while_still_waiting_is_not_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(call: group_commit._Call[str, str]) -> None:
        if call.work == "b" and "b" not in busy.returned:
            raise Grief
        unstruck(call)

    unstruck = group_commit._Call.sleep
    monkeypatch.setattr(group_commit._Call, "sleep", sleep)
    busy = Busy()
    busy.wait("a")
    busy._start("b")
    while "b" not in busy.returned:
        pass
    busy.wait("c")
    returned = busy.end()
    assert isinstance(returned.pop("b"), Grief)
    assert returned == {"a": "A", "c": "C"}
    assert busy.groups == [["a", "c"]]


def test_who_is_struck_while_another_thread_commits_its_work_wakes_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    committing, struck = threading.Event(), threading.Event()

    def commit(_: list[str]) -> None:
        committing.set()
        struck.wait()

    def sleep(call: group_commit._Call[str, str]) -> None:
        if call.work == "b" and not struck.is_set():
            committing.wait()
            struck.set()
            raise Grief
        unstruck(call)

    unstruck = group_commit._Call.sleep
    monkeypatch.setattr(group_commit._Call, "sleep", sleep)
    busy = Busy(commit)
    busy.wait("a", "b", "c")
    returned = busy.end()
    assert isinstance(returned.pop("b"), Grief)
    assert returned == {"a": "A", "c": "C"}


def test_work_that_a_leader_took_on_and_came_to_grief_with_is_done_by_others() -> None:
    def commit(_: list[str]) -> None:
        if len(busy.groups) == 1:
            raise Grief

    busy = Busy(commit)
    busy.wait("a", "b", "c")
    returned = busy.end()
    assert isinstance(returned.pop("a"), Grief)
    assert returned == {"b": "B", "c": "C"}
    assert busy.groups == [["a", "b", "c"], ["b", "c"]]


def test_the_main_thread_takes_on_no_work_of_others() -> None:
    busy = Busy()
    busy.wait("a", "b")
    assert busy.group.run("own") == "OWN"
    assert busy.groups == [["own"]]
    busy.end()
    assert busy.groups == [["own"], ["a", "b"]]


@can_fork
@beside_threads
def test_who_waits_in_the_parent_is_not_committed_in_a_child() -> None:
    busy = Busy()
    busy.wait("parents")

    def run_in_a_thread_of_the_child() -> None:
        # Before any thread of the child comes: of several at once, each would begin anew.
        assert not busy.group._waiting
        assert not busy.group._is_led
        thread = threading.Thread(target=busy.group.run, args=("childs",))
        thread.start()
        thread.join()
        assert busy.groups == [["childs"]]

    child = Child(run_in_a_thread_of_the_child)
    child.act()
    child.end()
    busy.end()
    assert busy.groups == [["parents"]]


# In an outbox


def together(*calls: Callable[[], object]) -> list[object]:
    """Make each call in a thread of its own, all at once; return what they return or raise."""
    returned: list[object] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(number: int, call: Callable[[], object]) -> None:
        barrier.wait()
        try:
            returned[number] = call()
        except Exception as error:
            returned[number] = error

    threads = [threading.Thread(target=run, args=one) for one in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return returned


def test_threads_that_enqueue_at_once_get_ids_of_their_own_events(outbox: Outbox) -> None:
    calls = [lambda name=name: outbox.enqueue(rule_fired(session_id=name)) for name in "abcdefgh" * 8]
    ids = together(*calls)
    assert len(set(ids)) == 64
    assert [outbox.get(row_id).session_id for row_id in ids] == list("abcdefgh" * 8)


def test_of_threads_that_enqueue_at_once_only_those_without_room_are_refused(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_rows=20, when_full="reject"), synchronous="NORMAL") as full:
        returned = together(*[lambda: full.enqueue_many([rule_fired()] * 3) for _ in range(10)])
        refused = [one for one in returned if isinstance(one, QueueFull)]
        assert len(refused) == 4
        assert statuses(full) == ["pending"] * 18


def test_a_signal_handler_that_enqueues_in_the_middle_of_an_insert_is_told(outbox: Outbox) -> None:
    told: list[str] = []

    def handle(*_: object) -> None:
        with pytest.raises(StorageError) as raised:
            outbox.enqueue(rule_fired())
        told.append(str(raised.value))

    def interrupt(statement: str) -> None:
        if statement.startswith("INSERT") and not told:
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    connection = outbox._store._writer.kept.get(is_nested=False, survives_power_cut=True)
    connection.set_trace_callback(interrupt)
    try:
        outbox.enqueue(rule_fired())
    finally:
        connection.set_trace_callback(None)
        signal.signal(signal.SIGUSR1, before)
    assert len(told) == 1
    assert "this thread itself holds the write lock" in told[0]
    assert statuses(outbox) == ["pending"]


# Interrupts in the main thread


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


def test_what_is_committed_is_told_though_an_interrupt_strikes_right_then(outbox: Outbox) -> None:
    told: list[str] = []
    with interrupting_after("_in_turn", "commit"):
        outbox._store._writer.run(lambda _: "done", committed=told.append)
    assert told == ["done"]


def test_an_interrupt_while_ids_are_read_leaves_nothing_that_hinders_later_commits(outbox: Outbox) -> None:
    with interrupting_after("rows", "execute") as failed:
        outbox.enqueue_many([rule_fired()] * 4)
    assert outbox.enqueue(rule_fired()) == 1
    assert failed[0].__traceback__  # who handles it has that, and so the cursor


def test_a_transaction_that_was_interrupted_as_it_was_rolled_back_is_ended_by_the_next(
    outbox: Outbox, url: str
) -> None:
    outbox._store._writer.kept.get(is_nested=False, survives_power_cut=True).execute("BEGIN IMMEDIATE")
    assert outbox.enqueue(rule_fired()) == 1
    with Outbox(url) as another:
        assert another.enqueue(rule_fired()) == 2


def test_after_an_interrupted_flush_events_are_still_synced(outbox: Outbox, url: str) -> None:
    with Outbox(url, synchronous="FULL") as synced:
        synced.enqueue(rule_fired())
        with interrupting_after("get", "execute"):
            synced.flush(ScriptedClient(OK))
        synced.enqueue(rule_fired())
        connection = synced._store._writer.kept._connection
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


# The kept connection


def test_a_locked_file_is_nobodys_own_failure(outbox: Outbox, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_MS", 1)
    locked = pytest.raises(NotBegunError, match="another program holds the write lock")
    with Outbox(url) as impatient, database.writing(outbox.engine), locked:
        impatient.enqueue(rule_fired())


@can_fork
def test_an_outbox_that_is_opened_during_a_fork_waits_for_its_end(outbox: Outbox, url: str) -> None:
    opened: list[Outbox] = []
    thread = threading.Thread(target=lambda: opened.append(Outbox(url)))
    database._close_files()
    try:
        thread.start()
        while thread.is_alive() and sys._current_frames()[thread.ident or 0].f_code.co_name != "inside":
            pass
    finally:
        database._go_on()
    thread.join()
    with opened[0] as another:
        assert together(lambda: another.enqueue(rule_fired()), outbox.pending_count)[0] == 1


def test_events_that_a_trigger_leaves_out_are_not_mixed_up_with_others(outbox: Outbox) -> None:
    with database.writing(outbox.engine) as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER left_out BEFORE INSERT ON observation_events WHEN new.session_id = 'b'"
            " BEGIN SELECT RAISE(IGNORE); END"
        )
    with pytest.raises(StorageError, match="a trigger of the database left out some of 4 events"):
        outbox.enqueue_many([rule_fired(session_id=name) for name in "abcd"])
    assert statuses(outbox) == []


def test_a_file_that_is_replaced_while_it_is_opened_is_noticed(outbox: Outbox, url: str, tmp_path: Path) -> None:
    path = sqlite.sqlite_file(outbox.engine.url)
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
