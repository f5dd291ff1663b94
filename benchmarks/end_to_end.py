"""From the SQLite file to an HTTP server on loopback, one flusher, batches of 64."""

from __future__ import annotations

import http.client
from functools import partial

import requests

from benchmarks.floors import drain_on_sqlite
from benchmarks.harness import Contestant, Table, compare, stopwatch
from benchmarks.lab import INSERT_ON_SQLITE, ROOMY, Lab, payloads, raw_rows, raw_sqlite
from benchmarks.sink import sink
from outbox import HttpClient, Outbox

_HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer my-token"}
_PATH = "/cloud/observations"


def measure(lab: Lab) -> list[Table]:
    number = lab.size(10_000)
    with sink() as url:
        contestants = [
            Contestant("requests.Session().post of the same bodies", partial(_session, url, number)),
            Contestant("http.client, the same bodies", partial(_http_client, url, number)),
            Contestant(
                "raw sqlite3 around that post: claim 64, one UPDATE, NORMAL", partial(_raw, lab, url, number)
            ),
            Contestant(
                "outbox.flush_all, synchronous=FULL", partial(_ours, lab, url, "FULL", number), at_least=0.5
            ),
            Contestant("outbox.flush_all, synchronous=NORMAL", partial(_ours, lab, url, "NORMAL", number)),
        ]
        rows = compare(contestants, rounds=lab.rounds(7))
    return [Table("End to end over HTTP on loopback, one flusher", "events/s", rows)]


def _bodies(number: int) -> list[bytes]:
    all_of_them = payloads(number)
    return [f"[{','.join(all_of_them[first : first + 64])}]".encode() for first in range(0, number, 64)]


def _session(url: str, number: int) -> float:
    bodies = _bodies(number)
    with requests.Session() as session:
        session.post(url + _PATH, data=b"[]", headers=_HEADERS).raise_for_status()
        with stopwatch() as watch:
            for body in bodies:
                session.post(url + _PATH, data=body, headers=_HEADERS).raise_for_status()
    return number / watch.seconds


def _http_client(url: str, number: int) -> float:
    bodies = _bodies(number)
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.connect()
    with stopwatch() as watch:
        for body in bodies:
            connection.request("POST", _PATH, body, _HEADERS)
            connection.getresponse().read()
    connection.close()
    return number / watch.seconds


def _raw(lab: Lab, url: str, number: int) -> float:
    """What a program of a few lines does, one after the other, without any library but requests."""
    with lab.sqlite_file() as path, raw_sqlite(path, "NORMAL") as connection, requests.Session() as session:
        connection.executemany(INSERT_ON_SQLITE, raw_rows(number))
        connection.commit()

        def post(texts: list[str]) -> None:
            body = f"[{','.join(texts)}]".encode()
            session.post(url + _PATH, data=body, headers=_HEADERS).raise_for_status()

        post([])
        with stopwatch() as watch:
            drained = drain_on_sqlite(connection, post)
    if drained != number:
        raise AssertionError(f"{drained} sent, expected {number}")
    return number / watch.seconds


def _ours(lab: Lab, url: str, synchronous: str, number: int) -> float:
    with (
        lab.sqlite_file() as path,
        Outbox(f"sqlite:///{path}", policy=ROOMY, synchronous=synchronous) as outbox,
        HttpClient(url, token="my-token") as client,
    ):
        with raw_sqlite(path, synchronous) as connection:
            connection.executemany(INSERT_ON_SQLITE, raw_rows(number, now_ms=1_700_000_000_000))
            connection.commit()
        client.upload([])
        with stopwatch() as watch:
            report = outbox.flush_all(client)
    if report.sent != number:
        raise AssertionError(f"{report.sent} sent, expected {number}")
    return number / watch.seconds
