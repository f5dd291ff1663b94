"""PostgreSQL: enqueue, and drain by several flushers at once, each a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import URL, make_url

from benchmarks.floors import drain_on_postgresql
from benchmarks.harness import Contestant, Table, compare, stopwatch
from benchmarks.lab import (
    INSERT_ON_POSTGRESQL,
    ROOMY,
    FreeUpload,
    Lab,
    conninfo,
    events,
    payloads,
    raw_postgresql,
    raw_rows,
)
from benchmarks.peers import ON_POSTGRESQL
from outbox import Outbox

_PATIENCE_S = 120


def measure(lab: Lab) -> list[Table]:
    few = lab.size(1_000)
    with lab.postgresql_database() as url:
        contestants = [
            Contestant("raw psycopg: INSERT, commit", partial(_raw_enqueue, url, few)),
            Contestant("outbox.enqueue", partial(_our_enqueue, url, few)),
            *(Contestant(peer.name, partial(_peer_enqueue, lab, peer, few)) for peer in ON_POSTGRESQL),
        ]
        tables = [Table("Enqueue on PostgreSQL", "events/s", compare(contestants, rounds=lab.rounds(5)))]
        number = lab.size(20_000)
        for flushers in (1, 4):
            contestants = [
                Contestant(
                    "raw psycopg: claim 64 with SKIP LOCKED, one UPDATE",
                    partial(_drain, url, number, flushers, _raw),
                ),
                Contestant("outbox.flush_all", partial(_drain, url, number, flushers, _ours), at_least=0.7),
            ]
            if flushers == 1:
                sizes = {"procrastinate": few, "pgqueuer": few * 5}
                contestants += [
                    Contestant(peer.name, partial(_peer_drain, lab, peer, sizes[peer.name]))
                    for peer in ON_POSTGRESQL
                ]
            rows = compare(contestants, rounds=lab.rounds(5))
            title = f"Drain on PostgreSQL, upload free, {flushers} flusher{'s' if flushers > 1 else ''}"
            tables.append(Table(title, "events/s", rows))
    return tables


def _raw_enqueue(url: URL, number: int) -> float:
    rows = raw_rows(number + 1)
    with raw_postgresql(url) as connection:
        _empty(url)
        connection.execute(INSERT_ON_POSTGRESQL, rows.pop())
        connection.commit()
        with stopwatch() as watch:
            for row in rows:
                connection.execute(INSERT_ON_POSTGRESQL, row).fetchone()
                connection.commit()
    return number / watch.seconds


def _our_enqueue(url: URL, number: int) -> float:
    given = events(number + 1)
    _empty(url)
    with Outbox(url, policy=ROOMY) as outbox:
        outbox.enqueue(given.pop())
        with stopwatch() as watch:
            for event in given:
                outbox.enqueue(event)
    return number / watch.seconds


def _peer_enqueue(lab: Lab, peer: Callable[..., Any], number: int) -> float:
    with lab.postgresql_database(empty=True) as url:
        queue = peer(conninfo(url))
        with stopwatch() as watch:
            queue.put_each(payloads(number))
    return number / watch.seconds


def _peer_drain(lab: Lab, peer: Callable[..., Any], number: int) -> float:
    with lab.postgresql_database(empty=True) as url:
        queue = peer(conninfo(url))
        queue.put_many(payloads(number))
        with stopwatch() as watch:
            queue.drain()
    return number / watch.seconds


def _empty(url: URL) -> None:
    with raw_postgresql(url) as connection:
        connection.execute("TRUNCATE observation_events")


def _drain(url: URL, number: int, flushers: int, drain: Callable[[str, Any], None]) -> float:
    """Let so many processes drain as many events, from a start together to the end of the last."""
    _empty(url)
    with raw_postgresql(url) as connection:
        rows = raw_rows(number, now_ms=1_700_000_000_000)
        connection.cursor().executemany(INSERT_ON_POSTGRESQL.removesuffix(" RETURNING id"), rows)
    with raw_postgresql(url, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE) observation_events")
    context = multiprocessing.get_context("spawn")
    together, times = context.Barrier(flushers, timeout=_PATIENCE_S), context.Queue()
    shown = url.render_as_string(hide_password=False)
    workers = [context.Process(target=_flusher, args=(drain, shown, together, times)) for _ in range(flushers)]
    for worker in workers:
        worker.start()
    spans = [times.get(timeout=_PATIENCE_S) for _ in workers]
    for worker in workers:
        worker.join()
    drained = sum(span[2] for span in spans)
    if drained != number:
        raise AssertionError(f"{drained} drained, expected {number}")
    return number / (max(span[1] for span in spans) - min(span[0] for span in spans))


def _flusher(drain: Callable[[str, Any], int], url: str, together: Any, times: Any) -> None:
    began, drained = drain(url, together)
    times.put((began, time.monotonic(), drained))


def _raw(url: str, together: Any) -> tuple[float, int]:
    with raw_postgresql(make_url(url)) as connection:
        connection.execute("SELECT 1")
        connection.commit()
        together.wait()
        return time.monotonic(), drain_on_postgresql(connection)


def _ours(url: str, together: Any) -> tuple[float, int]:
    with Outbox(url, policy=ROOMY) as outbox:
        together.wait()
        return time.monotonic(), outbox.flush_all(FreeUpload()).sent
