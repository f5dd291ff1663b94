"""Tables with a backlog, made by the database itself, in the five ways in which rows can wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from sqlalchemy import URL

from benchmarks.lab import Lab, payloads, raw_postgresql, raw_sqlite
from outbox.clock import now_ms
from outbox.storage.engines import open_engine
from outbox.storage.store import Store

_ENQUEUED = "created_at_ms"
_HOURS_MS = 10 * 3_600_000
"""How long from now the rows that are backed off become due."""


class Case(NamedTuple):
    """Which rows failed, when row `i` of `n` is next due, and when a claimed row was due before, all as SQL."""

    name: str
    failed: str
    next_attempt: str
    due: str


# Row i is created 2n - i ms ago; one that failed and is due again is due since n ms after that.
_FRESH, _RETRIED, _BACKED_OFF = "{now} - 2 * {n} + i", "{now} - {n} + i", "{now} + {later} + i"
_ALL_BUT_TEN, _OLDEST_HALF = "i <= {n} - 10", "i <= {n} / 2"
CASES = (
    Case("(a) all due, none tried", "i < 0", _FRESH, _ENQUEUED),
    Case(
        "(b) all backed off, 10 new ones due",
        _ALL_BUT_TEN,
        f"CASE WHEN {_ALL_BUT_TEN} THEN {_BACKED_OFF} ELSE {_FRESH} END",
        _ENQUEUED,
    ),
    Case("(c) all tried before and due again", "i > 0", _RETRIED, f"{_ENQUEUED} + {{n}}"),
    Case(
        "(d) oldest half backed off, newest half not tried",
        _OLDEST_HALF,
        f"CASE WHEN {_OLDEST_HALF} THEN {_BACKED_OFF} ELSE {_FRESH} END",
        _ENQUEUED,
    ),
    Case(
        "(e) oldest half backed off, newest half due again",
        "i > 0",
        f"CASE WHEN {_OLDEST_HALF} THEN {_BACKED_OFF} ELSE {_RETRIED} END",
        f"{_ENQUEUED} + {{n}}",
    ),
)

_NUMBERS = {
    "sqlite": "WITH RECURSIVE numbers(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM numbers WHERE i < {n}) ",
    "postgresql": "WITH numbers AS (SELECT generate_series(1::bigint, {n}) AS i) ",
}
_FILL = """
    INSERT INTO observation_events (
        event_type, rule_ids_json, session_id, occurred_at_ms, payload_json, created_at_ms, retry_count,
        next_attempt_at_ms, waits_for, destination
    )
    SELECT 'rule_fired', '["no-float-money-1"]', 's1', {now}, '{payload}', {now} - 2 * {n} + i,
        CASE WHEN {failed} THEN 1 ELSE 0 END, {next_attempt}, CASE WHEN {failed} THEN 'service' END,
        CASE WHEN i % {destinations} = 0 THEN '' ELSE 'service-' || (i % {destinations}) END
    FROM numbers
"""
_PUT_BACK = """
    UPDATE observation_events SET status = 'pending', sent_at_ms = NULL, next_attempt_at_ms = {due}
    WHERE id IN ({ids})
"""


class Backlog:
    """A table with so many rows, and how to claim from it and put that back."""

    def __init__(self, store: Store, connection: Any, case: Case, number: int) -> None:
        self.url = store.engine.url
        self._store = store
        self._connection = connection
        self._due = case.due.format(n=number)
        self._number = number

    def claim_ms(self, times: int) -> list[float]:
        """Claim a batch so many times, and put it back each time; return how long each claim took."""
        taken = []
        for _ in range(times):
            now = now_ms()
            began = time.perf_counter()
            rows = self._store.claims.claim(now_ms=now, lease_until_ms=now + 60_000, batch_size=64).rows
            taken.append((time.perf_counter() - began) * 1_000)
            if not rows:
                raise AssertionError("nothing was due")
            self.put_back([row.id for row in rows])
        return taken

    def put_back(self, ids: list[int]) -> None:
        self._run(_PUT_BACK.format(due=self._due, ids=", ".join(map(str, ids))))

    def cut(self) -> None:
        """Delete what came later."""
        self._run(f"DELETE FROM observation_events WHERE id > {self._number}")

    def _run(self, statement: str) -> None:
        self._connection.execute(statement)
        self._connection.commit()


@contextmanager
def backlog(lab: Lab, database: str, case: Case, number: int, destinations: int = 1) -> Iterator[Backlog]:
    """A new database with so many rows that wait in that way, for so many destinations in turn."""
    values = {"n": number, "destinations": destinations, "now": now_ms(), "later": _HOURS_MS}
    fill = _NUMBERS[database].format(**values) + _FILL.format(
        payload=payloads(1)[0],
        failed=case.failed.format(**values),
        next_attempt=case.next_attempt.format(**values),
        **values,
    )
    if database == "sqlite":
        with lab.sqlite_file() as path, raw_sqlite(path, "NORMAL") as connection:
            connection.execute(fill)
            connection.commit()
            with _store(URL.create("sqlite", database=str(path))) as store:
                yield Backlog(store, connection, case, number)
    else:
        with lab.postgresql_database() as url:
            with raw_postgresql(url, autocommit=True) as connection:
                connection.execute(fill)
                connection.execute("VACUUM (ANALYZE) observation_events")
            with raw_postgresql(url) as connection, _store(url) as store:
                yield Backlog(store, connection, case, number)


@contextmanager
def _store(url: URL) -> Iterator[Store]:
    # NORMAL, so that the time of a sync does not hide what the search costs.
    engine = open_engine(url, synchronous="NORMAL")
    yield Store(engine)
    engine.dispose()
