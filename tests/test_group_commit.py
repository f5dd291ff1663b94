import os
import signal
import threading
from collections.abc import Callable

import pytest

from builders import rule_fired, statuses
from outbox import Outbox, Policy, QueueFull, StorageError, group_commit
from outbox.group_commit import GroupCommit
from test_processes import Child, beside_threads, can_fork


class Busy:
    """Threads that want their work committed while one of them is at it, until `end`."""

    def __init__(self, commit: Callable[[list[str]], list[str]]) -> None:
        self._commit = commit
        self._goes_on = threading.Event()
        self.group = GroupCommit(self._wait_and_commit)
        self.returned: dict[str, object] = {}
        self._threads: list[threading.Thread] = []
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
        for thread in self._threads:
            thread.join()
        assert self.returned.pop("first") == "FIRST"
        return self.returned

    def _start(self, work: str) -> None:
        self._threads.append(threading.Thread(target=self._run, args=(work,)))
        self._threads[-1].start()

    def _run(self, work: str) -> None:
        try:
            self.returned[work] = self.group.run(work)
        except BaseException as error:
            self.returned[work] = error

    def _wait_and_commit(self, works: list[str]) -> list[str]:
        if works == ["first"]:
            self._goes_on.wait()
        else:
            works = self._commit(works)
        return [work.upper() for work in works]


def test_who_waits_is_committed_together_and_gets_an_own_result() -> None:
    groups: list[list[str]] = []

    def commit(works: list[str]) -> list[str]:
        groups.append(works)
        return works

    busy = Busy(commit)
    busy.wait("a", "b", "c")
    assert busy.end() == {"a": "A", "b": "B", "c": "C"}
    assert groups == [["a", "b", "c"]]


def test_a_group_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "_LARGEST_GROUP", 2)
    groups: list[list[str]] = []

    def commit(works: list[str]) -> list[str]:
        groups.append(works)
        return works

    busy = Busy(commit)
    busy.wait(*"abcde")
    assert busy.end() == {"a": "A", "b": "B", "c": "C", "d": "D", "e": "E"}
    assert groups == [["a", "b"], ["c", "d"], ["e"]]


def test_a_group_that_fails_is_done_one_by_one_and_only_who_is_to_blame_is_told() -> None:
    def commit(works: list[str]) -> list[str]:
        if "bad" in works:
            raise ValueError("bad")
        return works

    busy = Busy(commit)
    busy.wait("a", "bad", "c")
    returned = busy.end()
    assert isinstance(returned.pop("bad"), ValueError)
    assert returned == {"a": "A", "c": "C"}


def test_work_that_a_leader_took_on_and_came_to_grief_with_is_done_by_others() -> None:
    class Grief(BaseException):
        pass

    came: list[list[str]] = []

    def commit(works: list[str]) -> list[str]:
        came.append(works)
        if len(came) == 1:
            raise Grief
        return works

    busy = Busy(commit)
    busy.wait("a", "b", "c")
    returned = busy.end()
    assert isinstance(returned.pop("a"), Grief)
    assert returned == {"b": "B", "c": "C"}
    assert came == [["a", "b", "c"], ["b", "c"]]


def test_the_main_thread_takes_on_no_work_of_others() -> None:
    groups: list[list[str]] = []

    def commit(works: list[str]) -> list[str]:
        groups.append(works)
        return works

    busy = Busy(commit)
    busy.wait("a", "b")
    assert busy.group.run("own") == "OWN"
    assert groups == [["own"]]
    busy.end()
    assert groups == [["own"], ["a", "b"]]


@can_fork
@beside_threads
def test_who_waits_in_the_parent_is_not_committed_in_a_child() -> None:
    groups: list[list[str]] = []

    def commit(works: list[str]) -> list[str]:
        groups.append(works)
        return works

    busy = Busy(commit)
    busy.wait("parents")

    def run_in_a_thread_of_the_child() -> None:
        thread = threading.Thread(target=busy.group.run, args=("childs",))
        thread.start()
        thread.join()
        assert groups == [["childs"]]

    child = Child(run_in_a_thread_of_the_child)
    child.act()
    child.end()
    busy.end()
    assert groups == [["parents"]]


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
    connection = outbox._store._writer.kept.get(survives_power_cut=True)
    connection.set_trace_callback(interrupt)
    try:
        outbox.enqueue(rule_fired())
    finally:
        connection.set_trace_callback(None)
        signal.signal(signal.SIGUSR1, before)
    assert len(told) == 1
    assert "this thread itself holds the write lock" in told[0]
    assert statuses(outbox) == ["pending"]
