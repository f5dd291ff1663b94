"""Forks processes from one in which everything is imported already, so that a kill costs milliseconds.

Run as a program it is that one: it reads a job a line, and answers with the return code of the process.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outbox import Outbox

from .programs import APPLICATION, OPEN, PROGRAMS, Job
from .steps import Steps

TESTS = Path(__file__).parent.parent


@dataclass(frozen=True)
class Report:
    """What became of a process: -9 is killed."""

    return_code: int
    ids: list[int]
    """What enqueue returned to it."""
    killed_at: str
    steps: list[str]
    """All steps of one that survived."""


class Nursery:
    """The parent of the processes, itself a child of this one."""

    def __init__(self, folder: Path) -> None:
        path = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
        self._report = folder / "report"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kill.nursery"],
            env={**os.environ, "PYTHONPATH": path, "PGAPPNAME": APPLICATION},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, program: str, url: str, server: str, *, run: str, kill_at: int) -> Report:
        """Run a program until it ends or is killed at that step, counted from 1."""
        self._report.unlink(missing_ok=True)
        job = {"program": program, "url": url, "server": server, "run": run}
        line = json.dumps({"job": job, "kill_at": kill_at, "report": str(self._report)})
        print(line, file=self._process.stdin, flush=True)
        return_code = int(self._process.stdout.readline())
        told = [line.split(" ", 1) for line in self._report.read_text().splitlines()]
        return Report(
            return_code,
            ids=[int(fact) for kind, fact in told if kind == "id"],
            killed_at=" ".join(fact for kind, fact in told if kind == "killed"),
            steps=[fact for kind, fact in told if kind == "step"],
        )

    def close(self) -> None:
        self._process.communicate()


def _be_killed(job: dict[str, str], kill_at: int, report: str) -> None:
    out = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    steps = Steps(kill_at, lambda fact: os.write(out, f"{fact}\n".encode()))
    PROGRAMS.get(job["program"], OPEN).work(Job(**job, tell=steps.tell))
    steps.end()
    for name in steps.names:
        steps.tell(f"step {name}")


def _serve() -> None:
    Outbox.open("sqlite://").close()  # what an upgrade loads and compiles takes longer than the rest of a kill
    gc.freeze()
    gc.disable()
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                _be_killed(**order)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
