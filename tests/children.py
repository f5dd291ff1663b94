"""Forks of the test's own process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from conditions import FOREVER_S

can_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
# Later Pythons say so of every fork beside threads; whether it goes well is what is tested.
beside_threads = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


class Child:
    """A fork that does one thing after the other, each when it is told to."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(self._orders)
                signal.alarm(4 * FOREVER_S)  # a child that hangs must not outlive its test
                for action in actions:
                    os.read(orders, 1)
                    action()
                    os.write(answers, b"!")
                code = 0
            finally:
                os._exit(code)
        os.close(orders)
        os.close(answers)

    def act(self) -> None:
        os.write(self._orders, b"!")
        assert os.read(self._answers, 1) == b"!", "the child failed"

    def end(self) -> None:
        os.close(self._orders)
        os.close(self._answers)
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == 0
