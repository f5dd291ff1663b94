"""How the rates and the claim hold up as the table grows."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from functools import partial

from benchmarks.backlog import CASES, Backlog, backlog
from benchmarks.harness import Contestant, Table, compare, stopwatch
from benchmarks.lab import DATABASES, ROOMY, FreeUpload, Lab, events
from outbox import BatchItem, Outbox

_BATCHES = 10


def measure(lab: Lab) -> list[Table]:
    sizes = [1_000]
    while sizes[-1] < lab.largest:
        sizes.append(sizes[-1] * 10)
    tables = []
    for database, name in DATABASES.items():
        with ExitStack() as stack:
            found = {size: stack.enter_context(backlog(lab, database, CASES[0], size)) for size in sizes}
            for what, unit, run in (
                ("claim of 64", "ms", _claim),
                ("enqueue", "events/s", partial(_enqueue, lab.size(1_000))),
                ("drain", "events/s", _drain),
            ):
                contestants = [
                    Contestant(f"{size:,} rows wait", partial(run, found[size]), at=size) for size in sizes
                ]
                rows = compare(contestants, rounds=lab.rounds(5))
                tables.append(Table(f"Growth on {name}: {what}", unit, rows))
    return tables


def _claim(found: Backlog) -> float:
    return statistics.median(found.claim_ms(9))


def _enqueue(number: int, found: Backlog) -> float:
    given = events(number)
    with Outbox(found.url, policy=ROOMY, synchronous="NORMAL") as outbox:
        outbox.enqueue(given[0])
        with stopwatch() as watch:
            for event in given:
                outbox.enqueue(event)
    found.cut()
    return number / watch.seconds


class _Remembering(FreeUpload):
    def __init__(self) -> None:
        self.ids: list[int] = []

    def upload(self, batch: tuple[BatchItem, ...]) -> None:
        self.ids += [item.id for item in batch]


def _drain(found: Backlog) -> float:
    client = _Remembering()
    with Outbox(found.url, policy=ROOMY, synchronous="NORMAL") as outbox, stopwatch() as watch:
        for _ in range(_BATCHES):
            outbox.flush(client)
    found.put_back(client.ids)
    return len(client.ids) / watch.seconds
