"""Running worlds, seed after seed."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from .chaos import TICKS, Case, Result, run, shrink
from .on_sqlite import SQLiteTheatre
from .theatre import Theatre

LAST_STEPS = 60


@contextmanager
def theatre(server: str | None = None) -> Iterator[Theatre]:
    """Open a theatre on a server of PostgreSQL, else on SQLite, in memory where the system has such a place."""
    if server is not None:
        from .on_postgresql import PostgreSQLTheatre  # noqa: PLC0415 - SQLite needs no driver

        with closing(PostgreSQLTheatre(server)) as stage:
            yield stage
        return
    memory = Path("/dev/shm")  # noqa: S108 - it is where the database is fastest
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where, ignore_cleanup_errors=True) as folder:
        yield SQLiteTheatre(Path(folder))


def run_seeds(
    first: int,
    last: int,
    ticks: int = TICKS,
    kinds: frozenset[str] | None = None,
    *,
    server: str | None = None,
    shorten: bool = True,
) -> tuple[int, int, Result | None]:
    """Run seeds until one fails; return the ticks, the commits and the failed world, shrunk."""
    all_ticks = commits = 0
    with theatre(server) as stage:
        for seed in range(first, last):
            result = run(Case(seed, ticks, kinds), stage)
            all_ticks += result.ticks
            commits += result.commits
            if result.failure is not None:
                return all_ticks, commits, shrink(result, stage) if shorten else result
    return all_ticks, commits, None


def report(result: Result) -> str:
    case = result.case
    kinds = ",".join(sorted(case.chosen_kinds()))
    where = " --database URL" if result.shared else ""
    return "\n".join(
        [
            *result.trace[-LAST_STEPS:],
            *traceback.format_exception(result.failure),
            f"seed {case.seed} breaks {result.failure}",
            f"again: python -m tests.simulation --seed {case.seed} --ticks {case.ticks} --kinds {kinds or 'none'}{where}",
            f"trace {result.digest}",
        ]
    )


def run_chunk(chunk: tuple[int, int, int, str | None]) -> tuple[int, int, int, str | None]:
    """Run seeds in a process of a pool: tell how many they were, the ticks, the commits and what failed."""
    first, last, ticks, server = chunk
    all_ticks, commits, failed = run_seeds(first, last, ticks, server=server)
    return last - first, all_ticks, commits, None if failed is None else report(failed)
