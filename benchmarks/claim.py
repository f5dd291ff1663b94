"""What a claim of 64 costs, by how many rows wait, how, and for how many destinations."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from functools import partial

from benchmarks.backlog import CASES, Backlog, backlog
from benchmarks.harness import Contestant, Row, Table, compare
from benchmarks.lab import DATABASES, Lab


def measure(lab: Lab) -> list[Table]:
    few, many = 1_000, 2_000 if lab.quick else 1_000_000
    sizes = ((few, 1), (many, 1), (many, 10), (many, 1_000))
    tables = []
    for database, name in DATABASES.items():
        rows: list[Row] = []
        for case in CASES:
            at_most = None if case.name.startswith("(e)") else 2
            with ExitStack() as stack:
                contestants = [
                    Contestant(
                        f"{case.name}: {number:,} rows, {destinations:,} destinations",
                        partial(_median, stack.enter_context(backlog(lab, database, case, number, destinations))),
                        at_most=at_most if number == many else None,
                    )
                    for number, destinations in sizes
                ]
                rows += compare(contestants, rounds=lab.rounds(5))
        tables.append(Table(f"Claim of 64 on {name}, by the backlog", "ms", rows))
    return tables


def _median(found: Backlog) -> float:
    return statistics.median(found.claim_ms(9))
