"""Run many worlds: `python -m tests.simulation 100000`, or one: `python -m tests.simulation --seed 17`."""

from __future__ import annotations

import os
import sys
import time
from multiprocessing import get_context

import click

from .chaos import KINDS, TICKS, Case, run
from .runs import run_chunk, theatre


@click.command(help=__doc__)
@click.argument("seeds", type=int, default=500)
@click.option("--first", default=0, help="the first seed")
@click.option("--ticks", default=TICKS, help="how long each world goes on before it calms down")
@click.option("--jobs", default=os.cpu_count() or 1, help="how many processes work on it")
@click.option("--seed", type=int, help="run this one only, and show its trace")
@click.option("--kinds", help=f"the kinds of trouble of that one: {', '.join(KINDS)}; or none")
def main(seeds: int, first: int, ticks: int, jobs: int, seed: int | None, kinds: str | None) -> None:
    if seed is not None:
        chosen = None if kinds is None else frozenset(kinds.split(",")) & frozenset(KINDS)
        with theatre() as stage:
            result = run(Case(seed, ticks, chosen), stage)
        click.echo("\n".join(result.trace))
        click.echo(
            f"{result.ticks} ticks, {result.commits} commits, trace {result.digest}, failure {result.failure!r}"
        )
        sys.exit(result.failure is not None)
    started = time.monotonic()
    size = max(1, min(100, seeds // jobs))
    chunks = [(at, min(at + size, first + seeds), ticks) for at in range(first, first + seeds, size)]
    done = all_ticks = commits = 0
    with get_context("spawn").Pool(jobs) as pool:
        for more, more_ticks, more_commits, failed in pool.imap_unordered(run_chunk, chunks):
            done, all_ticks, commits = done + more, all_ticks + more_ticks, commits + more_commits
            if failed is not None:
                pool.terminate()
                click.echo(failed)
                sys.exit(1)
            per_second = done / (time.monotonic() - started)
            click.echo(f"{done} seeds, {all_ticks} ticks, {commits} commits, {per_second:.1f} seeds a second")


if __name__ == "__main__":
    main()
