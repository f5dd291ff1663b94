"""Drain: claim, an upload that costs nothing, settle, until nothing is due."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.floors import CLAIM_ON_DIFFLORES, drain_on_sqlite
from benchmarks.harness import Contestant, Table, compare, stopwatch
from benchmarks.lab import INSERT_ON_SQLITE, FreeUpload, Lab, full_outbox, payloads, raw_rows, raw_sqlite
from benchmarks.peers import ON_SQLITE


def measure(lab: Lab) -> list[Table]:
    tables = []
    number, few = lab.size(10_000), lab.size(1_000)
    for synchronous in ("FULL", "NORMAL"):
        contestants = [
            Contestant(
                "raw sqlite3, difflore's table: claim 64, one UPDATE", partial(_theirs, lab, synchronous, number)
            ),
            Contestant("the same on our table", partial(_raw, lab, synchronous, number)),
            Contestant("outbox.flush_all", partial(_ours, lab, synchronous, number), at_least=1.5),
            *(Contestant(peer.name, partial(_peer, lab, peer, synchronous, few)) for peer in ON_SQLITE),
        ]
        rows = compare(contestants, rounds=lab.rounds(7))
        tables.append(Table(f"Drain on SQLite, upload free, synchronous={synchronous}", "events/s", rows))
    return tables


def _theirs(lab: Lab, synchronous: str, number: int) -> float:
    with lab.difflores_file() as path, raw_sqlite(path, synchronous) as connection:
        connection.executemany(INSERT_ON_SQLITE, raw_rows(number))
        connection.commit()
        with stopwatch() as watch:
            drained = drain_on_sqlite(connection, CLAIM_ON_DIFFLORES)
    return _rate(drained, number, watch.seconds)


def _raw(lab: Lab, synchronous: str, number: int) -> float:
    with lab.sqlite_file() as path, raw_sqlite(path, synchronous) as connection:
        connection.executemany(INSERT_ON_SQLITE, raw_rows(number))
        connection.commit()
        with stopwatch() as watch:
            drained = drain_on_sqlite(connection)
    return _rate(drained, number, watch.seconds)


def _ours(lab: Lab, synchronous: str, number: int) -> float:
    with full_outbox(lab, synchronous, number) as outbox, stopwatch() as watch:
        report = outbox.flush_all(FreeUpload())
    return _rate(report.sent, number, watch.seconds)


def _peer(lab: Lab, peer: Callable[..., object], synchronous: str, number: int) -> float:
    with lab.empty_file() as path:
        queue = peer(path, synchronous)
        for payload in payloads(number):
            queue.put(payload)
        with stopwatch() as watch:
            queue.drain()
        queue.close()
    return number / watch.seconds


def _rate(drained: int, expected: int, seconds: float) -> float:
    if drained != expected:
        raise AssertionError(f"{drained} drained, expected {expected}")
    return expected / seconds
