"""A worker with eight uploads at once, and a service that takes 50 ms for each."""

from __future__ import annotations

import threading
from contextlib import suppress
from functools import partial

import requests

from benchmarks.end_to_end import HEADERS, PATH, bodies_of
from benchmarks.harness import Contestant, Table, compare, stopwatch
from benchmarks.lab import Lab, full_outbox
from benchmarks.sink import sink
from outbox import Hooks, HttpClient, Worker
from outbox.hooks import Settled

_UPLOADS, _BATCH, _TAKES_S = 8, 64, 0.05
_PATIENCE_S = 120


def measure(lab: Lab) -> list[Table]:
    number = lab.size(160) * _UPLOADS * _BATCH // 2
    with sink(_TAKES_S) as url:
        contestants = [
            Contestant("what eight uploads can carry", lambda: _UPLOADS * _BATCH / _TAKES_S),
            Contestant("eight threads with requests.Session().post alone", partial(_sessions, url, number)),
            *(
                Contestant(
                    f"Worker, synchronous={synchronous}",
                    partial(_ours, lab, url, synchronous, number),
                    at_least=0.9,
                )
                for synchronous in ("FULL", "NORMAL")
            ),
        ]
        rows = compare(contestants, rounds=lab.rounds(7))
    return [Table("A worker with eight uploads at once, a service of 50 ms", "events/s", rows)]


def _sessions(url: str, number: int) -> float:
    bodies = bodies_of(number)

    def post() -> None:
        with requests.Session() as session, suppress(IndexError):
            while True:
                session.post(url + PATH, data=bodies.pop(), headers=HEADERS).raise_for_status()

    threads = [threading.Thread(target=post) for _ in range(_UPLOADS)]
    with stopwatch() as watch:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return number / watch.seconds


def _ours(lab: Lab, url: str, synchronous: str, number: int) -> float:
    missing = [None] * number  # each thread removes what it sent, by a single call in C
    is_done = threading.Event()

    def count(settled: Settled) -> None:
        del missing[: settled.recorded]
        if not missing:
            is_done.set()

    with full_outbox(lab, synchronous, number) as outbox, HttpClient(url, token="my-token") as client:
        outbox.hooks.append(Hooks(on_sent=count))
        with stopwatch() as watch, Worker(outbox, client, concurrency=_UPLOADS):
            if not is_done.wait(_PATIENCE_S):
                raise AssertionError(f"{len(missing)} are not sent")
    return number / watch.seconds
