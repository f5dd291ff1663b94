"""Enqueue, one durable commit an event."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from benchmarks.harness import Contestant, Table, compare, stopwatch
from benchmarks.lab import INSERT_ON_SQLITE, ROOMY, Lab, events, payloads, raw_rows, raw_sqlite
from benchmarks.peers import ON_SQLITE, PersistQueue
from outbox import Outbox, Policy

_CAP = 10_000
_THREADS = 16


def measure(lab: Lab) -> list[Table]:
    tables = []
    for synchronous, number, at_least in (("FULL", lab.size(1_000), 0.9), ("NORMAL", lab.size(4_000), 0.7)):
        contestants = [
            Contestant("raw sqlite3: INSERT, commit", partial(_raw, lab, synchronous, number)),
            Contestant("outbox.enqueue", partial(_ours, lab, synchronous, number), at_least=at_least),
            *(Contestant(peer.name, partial(_peer, lab, peer, synchronous, number)) for peer in ON_SQLITE),
        ]
        rows = compare(contestants, rounds=lab.rounds(7))
        tables.append(Table(f"Enqueue on SQLite, synchronous={synchronous}", "events/s", rows))
    number = lab.size(4_000)
    contestants = [
        Contestant(PersistQueue.name, partial(_peer, lab, PersistQueue, "NORMAL", number)),
        Contestant("outbox.enqueue", partial(_ours, lab, "NORMAL", number), at_least=0.7),
    ]
    rows = compare(contestants, rounds=lab.rounds(7))
    tables.append(Table("Enqueue and the fastest other library, synchronous=NORMAL", "events/s", rows))
    for synchronous, number in (("FULL", lab.size(1_000)), ("NORMAL", lab.size(2_000))):
        at_least = 0.9 if synchronous == "FULL" else None
        contestants = [
            Contestant("below the cap", partial(_at_cap, lab, synchronous, number, None)),
            *(
                Contestant(
                    f"at the cap, all {status}", partial(_at_cap, lab, synchronous, number, status), at_least
                )
                for status in ("sent", "pending")
            ),
        ]
        rows = compare(contestants, rounds=lab.rounds(7))
        tables.append(Table(f"Enqueue at the cap of {_CAP:,} rows, synchronous={synchronous}", "events/s", rows))
    number = lab.size(1_000)
    contestants = [
        Contestant("raw sqlite3: INSERT, commit, one thread", partial(_raw, lab, "FULL", number)),
        Contestant("outbox.enqueue, one thread", partial(_ours, lab, "FULL", number)),
        Contestant(f"outbox.enqueue, {_THREADS} threads", partial(_threads, lab, number * 2), at_least=2.5),
    ]
    rows = compare(contestants, rounds=lab.rounds(7))
    tables.append(Table("Enqueue by many threads at once, synchronous=FULL", "events/s", rows))
    return tables


def _raw(lab: Lab, synchronous: str, number: int) -> float:
    rows = raw_rows(number)
    with lab.sqlite_file() as path, raw_sqlite(path, synchronous) as connection:

        def put(row: object) -> None:
            connection.execute(INSERT_ON_SQLITE, row)
            connection.commit()

        return number / _one_by_one(put, rows)


def _ours(lab: Lab, synchronous: str, number: int) -> float:
    given = events(number)
    with lab.sqlite_file() as path, Outbox(f"sqlite:///{path}", policy=ROOMY, synchronous=synchronous) as outbox:
        return number / _one_by_one(outbox.enqueue, given)


def _at_cap(lab: Lab, synchronous: str, number: int, status: str | None) -> float:
    """Enqueue into a table of as many rows, full of rows in one status, or with room left."""
    given = events(number)
    policy = Policy(max_rows=_CAP if status else 10 * _CAP, when_full="trim")
    with lab.sqlite_file() as path:
        with raw_sqlite(path, synchronous) as connection:
            connection.executemany(INSERT_ON_SQLITE, raw_rows(_CAP, now_ms=1_700_000_000_000))
            if status == "sent":
                connection.execute("UPDATE observation_events SET status = 'sent', sent_at_ms = created_at_ms")
            connection.commit()
        with Outbox(f"sqlite:///{path}", policy=policy, synchronous=synchronous) as outbox:
            return number / _one_by_one(outbox.enqueue, given)


def _peer(lab: Lab, peer: Callable[..., object], synchronous: str, number: int) -> float:
    given = payloads(number)
    with lab.empty_file() as path:
        queue = peer(path, synchronous)
        seconds = _one_by_one(queue.put, given)
        queue.close()
        return number / seconds


def _one_by_one(put: Callable[..., object], given: list[object]) -> float:
    put(given[0])  # it is connected now
    with stopwatch() as watch:
        for one in given:
            put(one)
    return watch.seconds


def _threads(lab: Lab, number: int) -> float:
    shares = [events(number // _THREADS) for _ in range(_THREADS)]
    together = threading.Barrier(_THREADS + 1)

    def work(outbox: Outbox, given: list[object]) -> None:
        outbox.enqueue(given[0])  # it has its connection now
        together.wait()
        for event in given:
            outbox.enqueue(event)

    with lab.sqlite_file() as path, Outbox(f"sqlite:///{path}", policy=ROOMY) as outbox:
        threads = [threading.Thread(target=work, args=(outbox, share)) for share in shares]
        for thread in threads:
            thread.start()
        together.wait()
        with stopwatch() as watch:
            for thread in threads:
                thread.join()
        return sum(map(len, shares)) / watch.seconds
