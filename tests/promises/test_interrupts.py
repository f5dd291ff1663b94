"""Exceptions from outside, at every point of what threads share: none hangs anybody, loses an event or doubles one.

The time limit of a task queue raises such an exception in another thread, a signal handler in the main thread.
"""

from __future__ import annotations

import ctypes
import gc
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import FrameType

import pytest

from builders import rule_fired
from conditions import until
from crowd import Crowd, Queue, assert_unlocked, check_rows, enqueuing
from outbox import Outbox
from outbox.storage import forks, sqlite_calls, sqlite_writer

STRIKES = 150
_CRITICAL = {sqlite_writer.__file__, sqlite_calls.__file__, forks.__file__}


class Strike(BaseException):
    """What is raised from outside."""


class Striker:
    """Strikes a call at the first instruction of the critical modules that it has not struck yet."""

    def __init__(self) -> None:
        self._struck: set[tuple[str, int, int]] = set()
        self.is_done = False
        """Whether the latest call met no strike."""

    def run(self, call: Callable[[], object]) -> object:
        """Return what the call returns, or the exception that it raises."""
        self.is_done = True
        before = sys.gettrace()  # that of the coverage, perhaps
        sys._getframe().f_trace_opcodes = True  # Python 3.12 looks whether any frame wants that
        sys.settrace(self._trace)
        try:
            return call()
        except BaseException as error:
            return error
        finally:
            sys.settrace(before)

    def _trace(self, frame: FrameType, what: str, _: object) -> Callable[..., object] | None:
        code = frame.f_code
        if code.co_filename not in _CRITICAL:
            return None
        frame.f_trace_opcodes = True
        instruction = (code.co_filename, code.co_firstlineno, frame.f_lasti)
        if what == "opcode" and instruction not in self._struck:
            self._struck.add(instruction)
            self.is_done = False
            raise Strike
        return self._trace

    @property
    def strikes(self) -> int:
        return len(self._struck)


# A connection that was being opened when the strike came is closed when it is collected, which Python 3.13 reports.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sqlite_writer, "_LOOK_AGAIN_S", 0.01)
    yield
    gc.collect()


def test_a_strike_at_any_instruction_of_a_lone_enqueue_hangs_nobody(outbox: Outbox, url: str) -> None:
    striker = Striker()
    returned: dict[str, object] = {}
    while not striker.is_done:
        crowd = Crowd()
        name = f"struck {striker.strikes}"
        crowd.start(name, lambda name=name: striker.run(enqueuing(outbox, name)))
        crowd.join()
        crowd.start(f"after {name}", enqueuing(outbox, f"after {name}"))
        returned |= crowd.join()
        assert isinstance(returned[f"after {name}"], int)
    assert striker.strikes > 80
    check_rows(url, returned)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.traced
def test_a_strike_at_any_instruction_of_an_enqueue_among_others_hangs_nobody(
    outbox: Outbox, url: str, place: int
) -> None:
    striker = Striker()
    returned: dict[str, object] = {}
    while not striker.is_done:
        queue = Queue(outbox)
        names = [f"{striker.strikes} {number}" for number in range(3)]
        struck = names[place]
        for name in names:
            call = enqueuing(outbox, name)
            queue.wait(name, (lambda call=call: striker.run(call)) if name == struck else call)
        returned |= queue.go_on()
        queue.start(f"after {struck}", enqueuing(outbox, f"after {struck}"))
        returned |= queue.join()
        assert all(isinstance(one, int) for name, one in queue.returned.items() if name != struck)
    assert striker.strikes > 80
    check_rows(url, returned)


def test_a_second_interrupt_leaves_the_write_lock_free(outbox: Outbox, url: str) -> None:
    striker = Striker()

    def write(transaction) -> None:
        transaction._run("DELETE FROM observation_events", ())
        raise KeyboardInterrupt

    while not striker.is_done:
        # In a thread of its own: a strike can leave its exception behind, as the context of the thread's next ones.
        with ThreadPoolExecutor(1) as pool:
            raised = pool.submit(lambda: type(striker.run(lambda: outbox.store._writer.run(write)))).result()
        assert raised in {Strike, KeyboardInterrupt}
        assert_unlocked(url)
    assert striker.strikes > 80
    assert outbox.enqueue(rule_fired()) == 1


# As they come in fact: between two instructions, when the interpreter looks


@pytest.mark.untraced  # CPython 3.11 can crash when such exceptions strike traced threads
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the last ones may come late
def test_exceptions_from_another_thread_hang_nobody(outbox: Outbox, url: str) -> None:
    draw = random.Random(1)  # noqa: S311 - of a test
    crowd = Crowd()
    returned: dict[str, object] = {}
    is_over = threading.Event()

    def enqueue_for_ever(name: str) -> None:
        number = 0
        while not is_over.is_set():
            number += 1
            this = f"{name} {number}"
            returned[this] = None
            returned[this] = outbox.enqueue(rule_fired(session_id=this))

    def enqueue(name: str) -> None:
        while not is_over.is_set():
            with suppress(Strike):
                enqueue_for_ever(f"{name} {len(returned)}")

    for name in "abcd":
        crowd.start(name, lambda name=name: enqueue(name))
    strike = ctypes.pythonapi.PyThreadState_SetAsyncExc
    for _ in range(STRIKES):
        enough = len(returned) + draw.randrange(6)
        strike(ctypes.c_ulong(draw.choice(crowd._threads).ident), ctypes.py_object(Strike))
        until(lambda enough=enough: len(returned) >= enough)
    is_over.set()
    crowd.join()
    assert outbox.enqueue(rule_fired(session_id="last"))
    check_rows(url, {**returned, "last": 0})
