"""`outbox status --watch`: what it draws, on a terminal and elsewhere."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from click.testing import Result

from builders import REVOKED, ROOT, ScriptedClient, add_row, heeding_ctrl_c, rule_fired
from command_line import runner
from outbox import Outbox, Policy
from outbox.cli import main, watch
from outbox.cli.watch import Look, draw_curves, sparkline
from outbox.stats import Stats

pytestmark = pytest.mark.usefixtures("measured")

EVERY_S = 4


@pytest.fixture
def watched(url: str, monkeypatch) -> Callable[..., Result]:
    """Watch while one step after the other is done, then press Ctrl-C."""

    def run(*options: str, steps: tuple[Callable[[], object], ...]) -> Result:
        now_s = 100.0
        left = [*steps]

        def sleep(interval_s: float) -> None:
            nonlocal now_s
            now_s += interval_s
            if not left:
                raise KeyboardInterrupt
            left.pop(0)()

        monkeypatch.setattr(watch, "monotonic_s", lambda: now_s)
        monkeypatch.setattr(watch, "_sleep", sleep)
        return runner().invoke(main, ["--database", url, "status", "--watch", *options])

    return run


def without_time(line: str) -> str:
    return line.partition(" UTC: ")[2]


def test_without_a_terminal_it_prints_one_line_each_time_and_ctrl_c_ends_it_well(
    outbox: Outbox, watched: Callable[..., Result]
) -> None:
    result = watched(
        str(EVERY_S),
        steps=(
            lambda: outbox.enqueue_many([rule_fired()] * 8),
            lambda: outbox.flush(ScriptedClient()),
            lambda: None,
        ),
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert [without_time(line) for line in result.stdout.splitlines()] == [
        "0 pending, 0 sending, 0 sent, 0 parked, 0 abandoned",
        "8 pending, 0 sending, 0 sent, 0 parked, 0 abandoned; 2.0 enqueued/s, 0.0 sent/s",
        "0 pending, 0 sending, 8 sent, 0 parked, 0 abandoned; 0.0 enqueued/s, 2.0 sent/s",
        "0 pending, 0 sending, 8 sent, 0 parked, 0 abandoned; 0.0 enqueued/s, 0.0 sent/s",
    ]


def test_what_is_deleted_or_brought_back_counts_once(url: str, watched: Callable[..., Result]) -> None:
    with Outbox.open(url, policy=Policy(max_rows=4, when_full="trim")) as outbox:

        def fill_and_send() -> None:
            outbox.enqueue_many([rule_fired()] * 4)
            outbox.flush(ScriptedClient())

        def trim_the_sent() -> None:
            outbox.enqueue_many([rule_fired()] * 4)

        def park_and_retry() -> None:
            outbox.flush(ScriptedClient(REVOKED))
            outbox.retry_now()

        result = watched(str(EVERY_S), steps=(fill_and_send, trim_the_sent, park_and_retry))
    assert [line.partition("; ")[2] for line in result.stdout.splitlines()[1:]] == [
        "1.0 enqueued/s, 1.0 sent/s",
        "1.0 enqueued/s, 0.0 sent/s",
        "0.0 enqueued/s, 0.0 sent/s",
    ]


def test_json_is_one_document_each_time_two_seconds_apart_if_not_said(
    outbox: Outbox, url: str, watched: Callable[..., Result]
) -> None:
    result = watched("--json", steps=(lambda: outbox.enqueue(rule_fired()),))
    first, second = map(json.loads, result.stdout.splitlines())
    assert (first["enqueued_per_s"], first["sent_per_s"]) == (None, None)
    assert (second["enqueued_per_s"], second["sent_per_s"]) == (0.5, 0)
    assert (second["counts"]["pending"], second["database"]) == (1, url)


@pytest.mark.parametrize("interval", ["0", "3601", "x"])
def test_an_interval_that_can_not_be_is_misuse(outbox: Outbox, url: str, interval: str) -> None:
    assert runner().invoke(main, ["--database", url, "status", "--watch", interval]).exit_code == 2


class Terminal:
    """A real one, beside which a process runs."""

    def __init__(self, url: str):
        self._ours, theirs = pty.openpty()
        command = (sys.executable, "-m", "outbox", "--database", url, "status", "--watch", "1")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        with heeding_ctrl_c():
            self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self.shown = ""

    def read_until(self, text: str) -> None:
        while text not in self.shown:
            self.shown += os.read(self._ours, 4096).decode(errors="replace")

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(timeout=240)
        os.close(self._ours)
        return code


@pytest.mark.slow
def test_on_a_terminal_it_draws_curves_until_ctrl_c(outbox: Outbox, url: str) -> None:
    add_row(outbox, event_type="od\x1b[31md")
    terminal = Terminal(url)
    terminal.read_until("Ctrl-C stops")
    outbox.enqueue_many([rule_fired()] * 2)
    terminal.read_until("depth                3  ")
    terminal.read_until("█")
    terminal.read_until("od\\x1b[31md")
    outbox.flush_all(ScriptedClient())
    terminal.read_until("depth                0  ")
    assert "/s" in terminal.shown
    assert terminal.interrupt() == 0


def look(**numbers: float | None) -> Look:
    stats = Stats({}, {}, {}, None, None, 0, [], 0, {}, [], [], None, None)
    return Look(**{"stats": stats, "depth": 0, "enqueued_per_s": None, "sent_per_s": None, **numbers})


def test_curves_keep_their_newest_end_where_the_terminal_is_narrow() -> None:
    curves = {"depth": [9, 1, 2], "enqueued": [0, 0, 1], "sent": [0, 0, 0]}
    drawn = draw_curves(look(depth=2, enqueued_per_s=1.0, sent_per_s=0.0), curves, width=26, encoding="utf-8")
    assert drawn.split("\n") == [
        "depth                2  ▄█",
        "enqueued         1.0/s   █",
        "sent             0.0/s    ",
    ]


def test_a_curve_shows_the_smallest_number_and_only_zero_is_blank() -> None:
    assert sparkline([0, 0.001, 4, 8], "utf-8") == " ▁▄█"
    assert sparkline([0, 0], "utf-8") == "  "
    assert sparkline([0, 0.001, 8], "ascii") == " .@"
