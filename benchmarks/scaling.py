"""What docs/scaling.md tells in figures: `python -m benchmarks.scaling [TOPIC …] [--quick]`, from the checkout.

Topics: bloat, claim, cost, drain, enqueue; all where none is named. `bloat EVENTS KEPT SETTINGS` runs only these.
PostgreSQL and MariaDB are those that OUTBOX_TEST_POSTGRESQL_URL and OUTBOX_TEST_MARIADB_URL name, or those that
tests find or start; bloat and cost start a PostgreSQL of their own, because they set its parameters.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import URL, Connection, create_engine, text

from outbox import HttpClient, Outbox, Policy, RuleFired, schema
from outbox.clock import now_ms
from outbox.storage.engines import open_engine
from outbox.storage.store import Store
from outbox.testing.receiver import IngestServer
from tests.servers import START, PrivatePostgresql

QUICK = "--quick" in sys.argv
ROOMY = Policy(max_rows=0, keep_sent_ms=0)
PATIENCE_S = 600
_SPAWN = multiprocessing.get_context("spawn")


def size(wanted: int) -> int:
    return max(wanted // 200, 128) if QUICK else wanted


def rounds(wanted: int) -> int:
    return 1 if QUICK else wanted


def an_event(number: int) -> RuleFired:
    """An event whose payload has about 300 bytes."""
    return RuleFired(
        rule_ids=[f"no-float-money-{number % 50}", "prefer-decimal"],
        file_path=f"services/billing/src/invoices/module_{number % 100}/totals.py",
        intent="Round the totals of an invoice to cents before they are summed up, never after.",
        session_id=f"session-{number}-3f2b8c1e",
        fired_at=datetime.now(timezone.utc),
    )


class Free:
    """A client whose uploads cost nothing."""

    logged_in = True

    def upload(self, batch: object) -> None:
        pass


@contextmanager
def databases(*names: str) -> Iterator[dict[str, URL]]:
    """A new database with our schema on each."""
    with ExitStack() as stack:
        found = {}
        for name in names:
            if name == "sqlite":
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="outbox-bench-"))
                found[name] = URL.create("sqlite", database=str(Path(folder) / "bench.db"))
            else:
                found[name] = stack.enter_context(stack.enter_context(START[name]()).database())
            engine = open_engine(found[name])
            schema.upgrade(engine)
            engine.dispose()
        yield found


def run(connection: Connection, statement: str) -> Any:
    return connection.execute(text(statement))


# Claim: by how many rows wait, and how

# When row i of n is due next: it was created 2n - i ms ago; one that was tried is due since n ms after that.
_FRESH, _RETRIED, _BACKED_OFF = "{now} - 2 * {n} + i", "{now} - {n} + i", "{now} + 36000000 + i"
CASES = {
    "a": _FRESH,
    "b": f"CASE WHEN i <= {{n}} - 10 THEN {_BACKED_OFF} ELSE {_FRESH} END",
    "c": _RETRIED,
    "d": f"CASE WHEN i <= {{n}} / 2 THEN {_BACKED_OFF} ELSE {_FRESH} END",
    "e": f"CASE WHEN i <= {{n}} / 2 THEN {_BACKED_OFF} ELSE {_RETRIED} END",
}
_COUNT_TO = {
    "sqlite": "WITH RECURSIVE numbers(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM numbers WHERE i < {n})",
    "postgresql": "WITH numbers AS (SELECT generate_series(1::bigint, {n}) AS i)",
}
_PREPARE = {
    "sqlite": ("DELETE FROM observation_events", "PRAGMA optimize"),
    "postgresql": ("TRUNCATE observation_events", "VACUUM (ANALYZE) observation_events"),
}
_FILL = """
    INSERT INTO observation_events (event_type, rule_ids_json, session_id, occurred_at_ms, payload_json, status,
        created_at_ms, retry_count, next_attempt_at_ms, sent_at_ms)
    {numbers} SELECT 'rule_fired', '["no-float-money-1"]', 's1', {now}, '{payload}', '{status}',
        {now} - 2 * {n} + i, 0, {next_attempt}, {sent_at} FROM numbers
"""


def fill(connection: Connection, number: int, *, case: str = "a", sent_at: str = "NULL") -> None:
    """Let the database write that many rows, undelivered ones unless they were sent at some time."""
    dialect = connection.dialect.name
    values = {"n": number, "now": now_ms()}
    clean, settle = _PREPARE[dialect]
    run(connection, clean)
    run(
        connection,
        _FILL.format(
            numbers=_COUNT_TO[dialect].format(**values),
            payload="x" * 300,
            status="pending" if sent_at == "NULL" else "sent",
            next_attempt=CASES[case].format(**values),
            sent_at=sent_at,
            **values,
        ),
    )
    run(connection, settle)


def claim() -> None:
    sizes = [1_000, 2_000] if QUICK else [1_000, 10_000, 100_000, 1_000_000]
    with databases("sqlite", "postgresql") as found:
        for name, url in found.items():
            print(f"\nclaim of 64 on {name}, ms, median of 15 (greatest)")
            print("| case |", *(f"{number:,} rows |" for number in sizes))
            # NORMAL, so that the time of a sync does not hide what the search costs.
            engine = open_engine(url, **({"synchronous": "NORMAL"} if name == "sqlite" else {}))
            other = create_engine(engine.url, isolation_level="AUTOCOMMIT")
            with other.connect() as connection:
                for case in CASES:
                    cells = []
                    for number in sizes:
                        fill(connection, number, case=case)
                        taken = _claim_ms(Store(engine), connection, 15)
                        cells.append(f"{statistics.median(taken):.2f} ({max(taken):.1f}) |")
                    print(f"| {case} |", *cells, flush=True)
            other.dispose()
            engine.dispose()


def _claim_ms(store: Store, connection: Connection, times: int) -> list[float]:
    taken = []
    for _ in range(times):
        now = now_ms()
        began = time.perf_counter()
        rows = store.claims.claim(now_ms=now, lease_until_ms=now + 60_000, batch_size=64).rows
        taken.append((time.perf_counter() - began) * 1_000)
        if not rows:
            raise AssertionError("nothing was due")
        ids = ", ".join(str(row.id) for row in rows)
        # Not the time at which each was due, but one that is as far in the past.
        run(
            connection,
            f"UPDATE observation_events SET status = 'pending', next_attempt_at_ms = {now - 1}"
            f" WHERE id IN ({ids})",
        )
    return taken


# Several processes at once


def together(work: Callable[..., int], processes: int, *arguments: Any) -> float:
    """Let so many processes do the work from one start; return how many events they did in a second."""
    start, done = _SPAWN.Barrier(processes + 1, timeout=PATIENCE_S), _SPAWN.Queue()
    started = [_SPAWN.Process(target=_work, args=(work, start, done, arguments)) for _ in range(processes)]
    for process in started:
        process.start()
    start.wait()
    began = time.perf_counter()
    number = sum(done.get(timeout=PATIENCE_S) for _ in started)
    taken = time.perf_counter() - began
    for process in started:
        process.join()
    return number / taken


def _work(work: Callable[..., int], start: Any, done: Any, arguments: tuple[Any, ...]) -> None:
    done.put(work(start, *arguments))


def _table(title: str, ways: dict[str, Callable[[int], float]]) -> None:
    """Print the median rate of each way for 1, 2, 4 and 8 processes, and its ratio to that of one."""
    counts = (1, 2, 4, 8)
    rates: dict[tuple[str, int], list[float]] = {(name, count): [] for name in ways for count in counts}
    for number in range(rounds(3)):
        # Forwards and backwards, so that what else the machine does falls on all alike.
        for name, count in sorted(rates, reverse=number % 2 == 1):
            rates[name, count].append(ways[name](count))
    print(f"\n{title}, events/s (ratio to one process)")
    print("| |", *(f"{count} |" for count in counts))
    for name in ways:
        medians = [statistics.median(rates[name, count]) for count in counts]
        print(f"| {name} |", *(f"{median:,.0f} ({median / medians[0]:.2f}) |" for median in medians), flush=True)


def drain() -> None:
    number = size(20_000)
    with databases("postgresql", "mariadb") as found, _receiver() as receiver:
        for name, url in found.items():
            ways: dict[str, Callable[[int], float]] = {}
            if name == "postgresql":
                ways["psycopg by hand, batches of 64"] = partial(_drain, url, number, _by_hand)
            for batch_size in (64, 500):
                ways[f"outbox, batches of {batch_size}"] = partial(_drain, url, number, _flush, batch_size, None)
                if name == "postgresql":
                    prepared = partial(_drain, url, number, _flush_prepared, batch_size, None)
                    ways[f"outbox, batches of {batch_size}, prepared"] = prepared
            ways["outbox, batches of 64, over HTTP"] = partial(_drain, url, number, _flush, 64, receiver)
            _table(f"drain of {number:,} on {name}", ways)


def _drain(url: URL, number: int, work: Callable[..., int], *arguments_and_count: Any) -> float:
    *arguments, count = arguments_and_count
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        run(connection, "TRUNCATE TABLE observation_events")
    with Outbox(url, policy=ROOMY) as outbox:
        outbox.enqueue_many([an_event(one) for one in range(number)])
    with engine.connect() as connection:
        run(
            connection,
            "VACUUM ANALYZE observation_events"
            if engine.dialect.name == "postgresql"
            else "ANALYZE TABLE observation_events",
        )
    rate = together(work, count, url.render_as_string(hide_password=False), *arguments)
    with engine.connect() as connection:
        sent = run(connection, "SELECT count(*) FROM observation_events WHERE status = 'sent'").scalar()
    engine.dispose()
    if sent != number:
        raise AssertionError(f"{sent} sent, expected {number}")
    return rate


def _flush(start: Any, url: str, batch_size: int, server: str | None) -> int:
    policy = Policy(batch_size=batch_size, max_rows=0, keep_sent_ms=0)
    with ExitStack() as stack:
        client: Any = stack.enter_context(HttpClient(server, token="t")) if server else Free()
        outbox = stack.enter_context(Outbox(url, policy=policy))
        outbox.pending_count()  # connects
        start.wait()
        return outbox.flush_all(client).sent


def _flush_prepared(start: Any, url: str, batch_size: int, server: str | None) -> int:
    return _flush(start, f"{url}?prepare_threshold=5", batch_size, server)


_CLAIM_BY_HAND = """
    WITH chosen AS MATERIALIZED (
        SELECT id FROM observation_events WHERE status IN ('pending', 'sending') AND next_attempt_at_ms <= %(now)s
        ORDER BY created_at_ms, id LIMIT 64 FOR UPDATE SKIP LOCKED
    )
    UPDATE observation_events e SET status = 'sending', next_attempt_at_ms = %(now)s + 60000 FROM chosen
    WHERE e.id = chosen.id RETURNING e.id, e.event_type, e.payload_json, e.retry_count, e.created_at_ms
"""
_SETTLE_BY_HAND = "UPDATE observation_events SET status = 'sent', sent_at_ms = %s WHERE id = ANY(%s)"


def _by_hand(start: Any, url: str) -> int:
    drained = 0
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        start.wait()
        while rows := connection.execute(_CLAIM_BY_HAND, {"now": now_ms()}).fetchall():
            connection.execute(_SETTLE_BY_HAND, (now_ms(), [row[0] for row in rows]))
            drained += len(rows)
    return drained


def enqueue() -> None:
    number = size(3_000)
    with databases("postgresql", "mariadb") as found:
        for name, url in found.items():
            ways: dict[str, Callable[[int], float]] = {"one commit each": partial(_enqueue, url, number, 1)}
            ways["1,000 in one commit"] = partial(_enqueue, url, number * 8, 1_000)
            if name == "postgresql":
                ways["one commit each, prepared"] = partial(_enqueue, url, number, 1, "?prepare_threshold=5")
                ways["psycopg by hand, one commit each"] = partial(_enqueue, url, number, 0)
            _table(f"enqueue on {name}", ways)


def _enqueue(url: URL, number: int, at_once: int, *options_and_count: Any) -> float:
    *options, count = options_and_count
    engine = create_engine(url)
    with engine.begin() as connection:
        run(connection, "TRUNCATE TABLE observation_events")
    engine.dispose()
    shown = "".join([url.render_as_string(hide_password=False), *options])
    return together(_write, count, shown, number // count, at_once)


_INSERT_BY_HAND = """
    INSERT INTO observation_events (event_type, rule_ids_json, session_id, occurred_at_ms, payload_json,
        next_attempt_at_ms, created_at_ms)
    VALUES ('rule_fired', '[]', 's1', %(now)s, %(payload)s, %(now)s, %(now)s)
    RETURNING id
"""


def _write(start: Any, url: str, number: int, at_once: int) -> int:
    if not at_once:
        return _write_by_hand(start, url, number)
    events = [an_event(one) for one in range(number)]
    with Outbox(url, policy=ROOMY) as outbox:
        outbox.pending_count()  # connects
        start.wait()
        if at_once == 1:
            for event in events:
                outbox.enqueue(event)
        else:
            for first in range(0, number, at_once):
                outbox.enqueue_many(events[first : first + at_once])
    return number


def _write_by_hand(start: Any, url: str, number: int) -> int:
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        start.wait()
        for _ in range(number):
            connection.execute(_INSERT_BY_HAND, {"now": now_ms(), "payload": "x" * 300}).fetchone()
    return number


# What an event costs, from its enqueue to its deletion: this depends little on what else the machine does


class Meter:
    """The write-ahead log and the CPU time of a PostgreSQL of our own, and the CPU time of this process."""

    def __init__(self, server: PrivatePostgresql, connection: Connection) -> None:
        self._postmaster = (server.data / "postmaster.pid").read_text().split()[0]
        self._connection = connection
        self._last = self._read()

    def _read(self) -> tuple[float, float, float]:
        position = run(self._connection, "SELECT pg_current_wal_insert_lsn() - '0/0'").scalar()
        return float(position), self._server_s() * 1e6, time.process_time() * 1e6

    def _server_s(self) -> float:
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(FileNotFoundError, ProcessLookupError):
                found = path.read_text().rpartition(")")[2].split()
                if path.parent.name == self._postmaster:
                    ticks += sum(map(int, found[11:15]))  # its own, and those of processes that have ended
                elif found[1] == self._postmaster:
                    ticks += sum(map(int, found[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def step(self) -> tuple[float, float, float]:
        """Return what was used since the last step: bytes, server's and client's microseconds."""
        before, self._last = self._last, self._read()
        wal, server, client = (after - then for after, then in zip(self._last, before, strict=True))
        return wal, server, client


def cost() -> None:
    number = size(40_000)
    steps = ("enqueue", "claim, upload, settle", "delete", "vacuum")
    with PrivatePostgresql() as server, _receiver() as receiver:
        engine = create_engine(server.url, isolation_level="AUTOCOMMIT")
        Outbox.open(server.url).close()
        print("\nan event on postgresql: bytes of WAL / CPU microseconds of the server / of the client")
        print("| events a commit | batch | upload |", *(f"{step} |" for step in (*steps, "all")))
        with engine.connect() as connection:
            # Full-page images come on top: how many depends on how much of a table is touched between checkpoints.
            run(connection, "ALTER SYSTEM SET full_page_writes = off")
            run(connection, "SELECT pg_reload_conf()")
            for at_once, batch_size, url in (
                (1, 64, None),
                (1_000, 64, None),
                (1_000, 64, receiver),
                (1_000, 500, receiver),
            ):
                meter = Meter(server, connection)
                used = [*_life(meter, connection, server.url, number, (at_once, batch_size, url))]
                used.append(tuple(map(sum, zip(*used, strict=True))))
                cells = [" / ".join(f"{value / number:,.0f}" for value in step) + " |" for step in used]
                print(f"| {at_once:,} | {batch_size:,} | {'HTTP' if url else 'free'} |", *cells, flush=True)
        engine.dispose()


def _life(
    meter: Meter, connection: Connection, url: str, number: int, variant: tuple[int, int, str | None]
) -> Iterator[tuple[float, float, float]]:
    at_once, batch_size, receiver = variant
    run(connection, "TRUNCATE observation_events")
    run(connection, "CHECKPOINT")
    events = [an_event(one) for one in range(number)]
    with ExitStack() as stack:
        client: Any = stack.enter_context(HttpClient(receiver, token="t")) if receiver else Free()
        outbox = stack.enter_context(Outbox(url, policy=Policy(batch_size=batch_size, max_rows=0, keep_sent_ms=0)))
        meter.step()
        for first in range(0, number, at_once):
            outbox.enqueue_many(events[first : first + at_once])
        yield meter.step()
        outbox.flush_all(client)
        yield meter.step()
        while outbox.store.deletion.expire(sent_before_ms=now_ms() + 60_000):  # deletion is measured alone
            pass
        yield meter.step()
        run(connection, "VACUUM observation_events")
        yield meter.step()


@contextmanager
def _receiver() -> Iterator[str]:
    """An ingest server in a process of its own."""
    here, there = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_receive, args=(there,))
    process.start()
    yield here.recv()
    here.send(None)
    process.join()


def _receive(pipe: Any) -> None:
    with IngestServer() as server:
        pipe.send(server.url)
        pipe.recv()


# Bloat: events that come and go

NAPTIME_S = 5
"""So often the server looks whether a table needs vacuum. Its default, a minute, would be the whole run."""
_STEP = 1_000
_TUNED = "autovacuum_vacuum_cost_delay = 0, autovacuum_vacuum_scale_factor = 0.01"
SETTINGS = {
    "server's defaults": "",
    "no cost delay": "autovacuum_vacuum_cost_delay = 0",
    "scale 0.01": "autovacuum_vacuum_scale_factor = 0.01",
    "both, as migrated": _TUNED,
    "both, fillfactor 50": f"{_TUNED}, fillfactor = 50",
    "both, index cleanup": f"{_TUNED}, vacuum_index_cleanup = on",
    "autovacuum off": "autovacuum_enabled = off",
    "a transaction stays open": "",
}


def bloat() -> None:
    numbers = [int(word) for word in sys.argv[2:] if word.isdigit()] or [size(1_000_000), 0, size(1_000_000)]
    labels = [word for word in sys.argv[2:] if word in SETTINGS] or SETTINGS
    with PrivatePostgresql() as server:
        admin = create_engine(server.url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            run(connection, f"ALTER SYSTEM SET autovacuum_naptime = '{NAPTIME_S}s'")
            run(connection, "SELECT pg_reload_conf()")
            for kept in numbers[1:]:
                print(
                    f"\nchurn of {numbers[0]:,} events beside {kept:,} that stay, autovacuum every {NAPTIME_S} s"
                )
                print(
                    "| settings | events/s | dead rows, most | table MB | indexes MB | claim's index MB"
                    " | search ms, median | most | vacuums | HOT of updates |"
                )
                for label in labels:
                    run(connection, "DROP DATABASE IF EXISTS churn WITH (FORCE)")
                    run(connection, "CREATE DATABASE churn")
                    _churn(admin.url.set(database="churn"), numbers[0], kept, label)
        admin.dispose()


def _churn(url: URL, number: int, kept: int, label: str) -> None:
    """Enqueue, deliver and delete; look at the table at every fourth step."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    dead, sizes, searches, spent = [], [], [], 0.0
    with (
        Outbox.open(url, policy=Policy(batch_size=_STEP, max_rows=0, keep_sent_ms=2_000)) as outbox,
        engine.connect() as connection,
        create_engine(url).connect() as reader,
    ):
        run(
            connection,
            "ALTER TABLE observation_events RESET (autovacuum_vacuum_cost_delay,"
            " autovacuum_vacuum_scale_factor, fillfactor, vacuum_index_cleanup)",
        )
        if SETTINGS[label]:
            run(connection, f"ALTER TABLE observation_events SET ({SETTINGS[label]})")
        if kept:
            fill(connection, kept, sent_at=f"{now_ms() + 10**9}")
        if label == "a transaction stays open":
            reader.execution_options(isolation_level="REPEATABLE READ")
            run(reader, "SELECT count(*) FROM observation_events")
        for step in range(number // _STEP):
            began = time.perf_counter()
            outbox.enqueue_many([an_event(one) for one in range(_STEP)])
            spent += time.perf_counter() - began
            if step % 4 == 3:
                searches.append(_search_ms(connection))
                dead.append(_look(connection, "n_dead_tup"))
                sizes.append([_look(connection, f"pg_{what}") for what in _SIZES])
            began = time.perf_counter()
            outbox.flush(Free())
            spent += time.perf_counter() - began
        vacuums, hot, updates = (
            _look(connection, what) for what in ("autovacuum_count", "n_tup_hot_upd", "n_tup_upd")
        )
    engine.dispose()
    megabytes = [f"{max(found) / 1e6:,.0f} |" for found in zip(*sizes, strict=True)]
    print(
        f"| {label} | {number / spent:,.0f} | {max(dead):,} |",
        *megabytes,
        f"{statistics.median(searches):.1f} | {max(searches):.1f} | {vacuums} | {hot / updates:.1%} |",
        flush=True,
    )


_SIZES = (
    "table_size(relid)",
    "indexes_size(relid)",
    "relation_size('observation_events_untried_idx')",
)


def _look(connection: Connection, what: str) -> int:
    found = run(connection, f"SELECT {what} FROM pg_stat_user_tables WHERE relname = 'observation_events'")
    return int(found.scalar())


def _search_ms(connection: Connection) -> float:
    """How long it takes to find a batch, which is what dead rows slow down."""
    began = time.perf_counter()
    run(
        connection,
        "SELECT id FROM observation_events WHERE status IN ('pending', 'sending')"
        f" AND next_attempt_at_ms <= {now_ms()} ORDER BY created_at_ms, id LIMIT 64",
    ).all()
    return (time.perf_counter() - began) * 1_000


TOPICS = {topic.__name__: topic for topic in (bloat, claim, cost, drain, enqueue)}

if __name__ == "__main__":
    for name in [word for word in sys.argv[1:] if word in TOPICS] or TOPICS:
        TOPICS[name]()
