"""From the SQLite file to an HTTP server on loopback, one flusher, batches of 64."""

from __future__ import annotations

import http.client
from functools import partial

import requests

from benchmarks.floors import CLAIM_ON_DIFFLORES, drain_on_sqlite
from benchmarks.harness import Contestant, Table, compare, stopwatch
from benchmarks.lab import INSERT_ON_SQLITE, Lab, full_outbox, payloads, raw_rows, raw_sqlite
from benchmarks.sink import sink
from outbox import HttpClient

HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer my-token"}
PATH = "/cloud/observations"
_TITLE = "End to end over HTTP on loopback, one flusher"


def measure(lab: Lab) -> list[Table]:
    number = lab.size(10_000)
    with sink() as url:
        contestants = [
            Contestant("requests.Session().post of the same bodies", partial(_session, url, number)),
            Contestant("http.client, the same bodies", partial(_http_client, url, number)),
            Contestant("outbox.flush_all", partial(_ours, lab, url, "FULL", number), at_least=0.5),
        ]
        tables = [Table(f"{_TITLE}, of the posts alone", "events/s", compare(contestants, rounds=lab.rounds(7)))]
        for synchronous in ("FULL", "NORMAL"):
            contestants = [
                Contestant(
                    "raw sqlite3 around that post, difflore's table: claim 64, one UPDATE",
                    partial(_raw, lab, url, synchronous, number),
                ),
                Contestant("outbox.flush_all", partial(_ours, lab, url, synchronous, number), at_least=1.5),
            ]
            rows = compare(contestants, rounds=lab.rounds(7))
            tables.append(Table(f"{_TITLE}, synchronous={synchronous}", "events/s", rows))
    return tables


def bodies_of(number: int) -> list[bytes]:
    """Return the bodies of requests with 64 events each."""
    all_of_them = payloads(number)
    return [f"[{','.join(all_of_them[first : first + 64])}]".encode() for first in range(0, number, 64)]


def _session(url: str, number: int) -> float:
    bodies = bodies_of(number)
    with requests.Session() as session:
        session.post(url + PATH, data=b"[]", headers=HEADERS).raise_for_status()
        with stopwatch() as watch:
            for body in bodies:
                session.post(url + PATH, data=body, headers=HEADERS).raise_for_status()
    return number / watch.seconds


def _http_client(url: str, number: int) -> float:
    bodies = bodies_of(number)
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.connect()
    with stopwatch() as watch:
        for body in bodies:
            connection.request("POST", PATH, body, HEADERS)
            connection.getresponse().read()
    connection.close()
    return number / watch.seconds


def _raw(lab: Lab, url: str, synchronous: str, number: int) -> float:
    """What a program of a few lines does, one after the other, without any library but requests."""
    with (
        lab.difflores_file() as path,
        raw_sqlite(path, synchronous) as connection,
        requests.Session() as session,
    ):
        connection.executemany(INSERT_ON_SQLITE, raw_rows(number))
        connection.commit()

        def post(texts: list[str]) -> None:
            body = f"[{','.join(texts)}]".encode()
            session.post(url + PATH, data=body, headers=HEADERS).raise_for_status()

        post([])
        with stopwatch() as watch:
            drained = drain_on_sqlite(connection, CLAIM_ON_DIFFLORES, post)
    if drained != number:
        raise AssertionError(f"{drained} sent, expected {number}")
    return number / watch.seconds


def _ours(lab: Lab, url: str, synchronous: str, number: int) -> float:
    with full_outbox(lab, synchronous, number) as outbox, HttpClient(url, token="my-token") as client:
        client.upload([])
        with stopwatch() as watch:
            report = outbox.flush_all(client)
    if report.sent != number:
        raise AssertionError(f"{report.sent} sent, expected {number}")
    return number / watch.seconds
