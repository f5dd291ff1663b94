"""The peak memory of a process that drains a table, `python -m benchmarks.memory URL`."""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import partial

from benchmarks.backlog import CASES, backlog
from benchmarks.harness import Contestant, Table, compare
from benchmarks.lab import ROOMY, FreeUpload, Lab
from outbox import Outbox


def measure(lab: Lab) -> list[Table]:
    few, many = lab.size(10_000), lab.size(1_000_000)
    contestants = [
        Contestant(f"draining {few:,} events", partial(_peak_mib, lab, few)),
        Contestant(f"draining {many:,} events", partial(_peak_mib, lab, many), at_most=1.1),
    ]
    return [Table("Peak memory, SQLite", "MiB", compare(contestants, rounds=1))]


def _peak_mib(lab: Lab, number: int) -> float:
    with backlog(lab, "sqlite", CASES[0], number) as found:
        command = [sys.executable, "-m", "benchmarks.memory", str(found.url)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
    sent, peak = map(int, result.stdout.split())
    if sent != number:
        raise AssertionError(f"{sent} sent, expected {number}")
    return peak / 2**20


def _main(url: str) -> None:
    with Outbox(url, policy=ROOMY, synchronous="NORMAL") as outbox:
        sent = outbox.flush_all(FreeUpload()).sent
    unit = 1 if sys.platform == "darwin" else 1024
    print(sent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


if __name__ == "__main__":
    _main(sys.argv[1])
