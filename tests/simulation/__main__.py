"""Run many worlds: `python -m tests.simulation 100000`; one: `--seed 17`; or every order of a small one: `--exhaustive`."""

from __future__ import annotations

import os
import sys
import time
from multiprocessing import get_context

import click

from .chaos import KINDS, TICKS, Case, run
from .exhaustive import ANSWERS, Scope, search
from .runs import report, run_chunk, run_seeds, theatre


@click.command(help=__doc__)
@click.argument("seeds", type=int, default=500)
@click.option("--first", default=0, help="The first seed.")
@click.option("--ticks", default=TICKS, help="How long each world goes on before it calms down.")
@click.option("--jobs", default=os.cpu_count() or 1, help="How many processes work on it.")
@click.option("--database", "server", help="The URL of a PostgreSQL server's administrator, instead of SQLite.")
@click.option("--as-found", is_flag=True, help="One process, and the first world that fails is not shrunk.")
@click.option("--seed", type=int, help="Run this one only, and show its trace.")
@click.option("--kinds", help=f"The kinds of trouble of --seed or --as-found: {', '.join(KINDS)}; or none.")
@click.option("--exhaustive", is_flag=True, help="Every order of a small world, whose size follows.")
@click.option("--answers", default=",".join(Scope.answers), help=f"Some of {', '.join(ANSWERS)}.")
@click.option("--rows", default=Scope.rows)
@click.option("--batch-size", default=Scope.batch_size)
@click.option("--flushers", default=Scope.flushers)
@click.option("--flushes", default=Scope.flushes)
@click.option("--crashes", default=Scope.crashes)
@click.option("--expiries", default=Scope.expiries)
def main(
    *,
    seeds: int,
    first: int,
    ticks: int,
    jobs: int,
    server: str | None,
    as_found: bool,
    seed: int | None,
    kinds: str | None,
    exhaustive: bool,
    answers: str,
    **size: int,
) -> None:
    chosen = None if kinds is None else frozenset(kinds.split(",")) & frozenset(KINDS)
    if exhaustive:
        _search(Scope(tuple(answers.split(",")), **size))
    elif seed is not None:
        _show(Case(seed, ticks, chosen), server)
    elif as_found:
        _, _, failed = run_seeds(first, first + seeds, ticks, chosen, server=server, shorten=False)
        _exit_with(None if failed is None else report(failed))
    else:
        _run(range(first, first + seeds), ticks, jobs, server)


def _search(scope: Scope) -> None:
    started = time.monotonic()
    with theatre() as stage:
        found = search(scope, stage)
    click.echo(f"{scope}: {found} in {time.monotonic() - started:.0f} s")


def _show(case: Case, server: str | None) -> None:
    with theatre(server) as stage:
        result = run(case, stage)
    click.echo("\n".join(result.trace))
    click.echo(
        f"{result.ticks} ticks, {result.commits} commits, trace {result.digest}, failure {result.failure!r}"
    )
    sys.exit(result.failure is not None)


def _run(seeds: range, ticks: int, jobs: int, server: str | None) -> None:
    started = time.monotonic()
    size = max(1, min(100, len(seeds) // jobs))
    chunks = [(at, min(at + size, seeds.stop), ticks, server) for at in seeds[::size]]
    done = all_ticks = commits = 0
    with get_context("spawn").Pool(jobs) as pool:
        for more, more_ticks, more_commits, failed in pool.imap_unordered(run_chunk, chunks):
            if failed is not None:
                pool.terminate()
                _exit_with(failed)
            done, all_ticks, commits = done + more, all_ticks + more_ticks, commits + more_commits
            per_second = done / (time.monotonic() - started)
            click.echo(f"{done} seeds, {all_ticks} ticks, {commits} commits, {per_second:.1f} seeds a second")


def _exit_with(failed: str | None) -> None:
    if failed is not None:
        click.echo(failed)
        sys.exit(1)


if __name__ == "__main__":
    main()
