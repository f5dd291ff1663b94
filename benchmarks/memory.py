"""The peak memory of a process that drains a table."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from benchmarks.backlog import CASES, backlog
from benchmarks.harness import Contestant, Table, compare
from benchmarks.lab import Lab


def measure(lab: Lab) -> list[Table]:
    few, many = lab.size(10_000), lab.size(1_000_000)
    contestants = [
        Contestant(f"draining {few:,} events", partial(_peak_mib, lab, few)),
        Contestant(f"draining {many:,} events", partial(_peak_mib, lab, many), at_most=1.1),
    ]
    return [Table("Peak memory, SQLite", "MiB", compare(contestants, rounds=1))]


def _peak_mib(lab: Lab, number: int) -> float:
    with backlog(lab, "sqlite", CASES[0], number) as found:
        command = [sys.executable, "-m", "benchmarks.drainer", str(found.url)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
    sent, peak = map(int, result.stdout.split())
    if sent != number:
        raise AssertionError(f"{sent} sent, expected {number}")
    return peak / 1024
