"""Kill processes at random while others work on the same database: `python -m tests.kill 1000`."""

from __future__ import annotations

import heapq
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.orm import Session

from outbox import HttpClient, Outbox, Policy
from outbox.testing.answers import Answer, Drop
from outbox.testing.receiver import IngestServer

from .programs import HOUR_MS, POISON, TOKEN, event, looking_at, url_of
from .steps import Steps

# A lease of a second or two, or the rows of each that is killed would be out of the game for a minute.
POLICY = Policy(
    batch_size=16,
    lease_ms=2_000,
    backoff_ms=10,
    rate_limit_ms=10,
    pause_ms=10,
    max_rows=500,
    when_full="trim",
    unpark_spread_ms=10,
)
DEADLINE_MS = 1_500
QUEUE_AT_MOST = 100
STEPS_AT_MOST = 3_000
LIFE_AT_MOST_S = 1.0


class Weather(IngestServer):
    """Mostly it answers as usual."""

    def _usual(self, *request):
        usual = super()._usual(*request)
        if usual.status != 200:
            return usual
        bad = [Answer(503), Drop(), Drop(stores=True), Answer(429, body='{"retryAfterSec":1}'), Answer(401)]
        return random.choices([usual, *bad], weights=[90, 3, 2, 3, 1, 1])[0]  # noqa: S311 - no secret


class Life:
    """What one process does until it is killed."""

    def __init__(self, url: str, server: str, name: str, tell: Callable[[str], None]) -> None:
        self.url, self.server, self.name, self.tell = url, server, name, tell
        self.chance = random.Random(name)  # noqa: S311 - no secret

    def enqueue(self) -> None:
        with Outbox(self.url, policy=POLICY) as outbox:
            number = 0
            while True:
                while outbox.pending_count() > QUEUE_AT_MOST:
                    pause()
                names = [f"{number} {self._kind()} {part}" for part in range(self.chance.choice((1, 1, 1, 5)))]
                if self.chance.random() < 0.3:
                    ids = self._enqueue_with_orders(outbox, names)
                elif len(names) == 1:
                    ids = [outbox.enqueue(event(self.name, names[0]))]
                else:
                    ids = outbox.enqueue_many(event(self.name, name) for name in names)
                for row_id, name in zip(ids, names, strict=True):
                    self.tell(json.dumps([row_id, f"{self.name} {name}"]))
                number += 1

    def _enqueue_with_orders(self, outbox: Outbox, names: list[str]) -> list[int]:
        names[:] = [f"order {name}" for name in names]
        with Session(outbox.engine) as session, session.begin():
            session.execute(
                text("INSERT INTO orders VALUES (:name)"), [{"name": f"{self.name} {name}"} for name in names]
            )
            return outbox.enqueue_many((event(self.name, name) for name in names), session=session)

    def _kind(self) -> str:
        return POISON if self.chance.random() < 0.02 else "good"

    def flush(self) -> None:
        with (
            Outbox(self.url, policy=POLICY) as outbox,
            HttpClient(self.server, token=TOKEN, deadline_ms=DEADLINE_MS) as client,
        ):
            while True:
                if not outbox.flush(client).claimed:
                    pause()


def pause() -> None:
    threading.Event().wait(0.005)


def fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


class Arena:
    """Keeps enqueuers and flushers alive, and kills them."""

    def __init__(self, folder: Path, url: str, seed: int) -> None:
        self.database = url
        self.kills: Counter[str] = Counter()
        self._told = folder / "told"
        self._store = folder / "store"
        self._chance = random.Random(seed)  # noqa: S311 - no secret
        self._alive: dict[int, str] = {}
        self._doomed: list[tuple[float, int]] = []
        self._born = 0
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        self._told.touch()
        with Outbox.open(self.database) as outbox, outbox.engine.begin() as connection:
            connection.execute(text("CREATE TABLE orders (name TEXT)"))
        self._start_server()

    def _start_server(self) -> None:
        self._from_server, say = os.pipe()
        stopped, self._stop_server = os.pipe()

        def serve() -> None:
            os.close(self._stop_server)
            with Weather(token=TOKEN, store=self._store) as server:
                os.write(say, server.url.encode())
                os.read(stopped, 1)
                os.write(say, json.dumps(server.summary()).encode())

        self._server = fork(serve)
        os.close(stopped)
        self.url = os.read(self._from_server, 1_000).decode()

    def end_server(self) -> dict[str, int]:
        os.close(self._stop_server)
        summary = json.loads(os.read(self._from_server, 1_000))
        os.waitpid(self._server, 0)
        return summary

    def fight(self, kills: int) -> None:
        for role in ("enqueue", "flush") * 3:
            self._start(role)
        while self.kills.total() < kills:
            wait_s = self._doomed[0][0] - time.monotonic() if self._doomed else 1
            if wait_s > 0:
                signal.sigtimedwait({signal.SIGCHLD}, wait_s)
            else:
                os.kill(heapq.heappop(self._doomed)[1], signal.SIGKILL)
            for pid in list(self._alive):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    fate = self._alive.pop(pid)
                    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
                        sys.exit(f"a process ended by itself: {fate}")
                    self.kills[fate] += 1
                    self._start(fate.split()[0])
        for pid in self._alive:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _start(self, role: str) -> None:
        self._born += 1
        name = f"process-{self._born}"
        by_step = self._chance.random() < 0.5
        step = int(STEPS_AT_MOST ** self._chance.random()) if by_step else 0

        def live() -> None:
            # Held open here, the server would not notice that the parent closed it.
            os.close(self._stop_server)
            told = os.open(self._told, os.O_WRONLY | os.O_APPEND)
            steps = Steps(step, lambda fact: os.write(told, f"{fact}\n".encode()))
            getattr(Life(self.database, self.url, name, steps.tell), role)()

        pid = fork(live)
        self._alive[pid] = f"{role} at a {'step' if by_step else 'time'}"
        if not by_step:
            heapq.heappush(self._doomed, (time.monotonic() + LIFE_AT_MOST_S * self._chance.random(), pid))

    def deliver_the_rest(self) -> None:
        with (
            Outbox(self.database, policy=POLICY) as outbox,
            HttpClient(self.url, token=TOKEN, deadline_ms=DEADLINE_MS) as client,
        ):
            outbox.retry_now()
            while outbox.pending_count():
                # Its acceptance proves that the service rejects an event that is left.
                outbox.enqueue(event("the rest", "good"))
                with outbox.engine.begin() as connection:
                    connection.execute(
                        text(
                            "UPDATE observation_events SET next_attempt_at_ms = next_attempt_at_ms - :hour,"
                            " suspected_at_ms = suspected_at_ms - :hour"
                        ),
                        {"hour": HOUR_MS},
                    )
                outbox.flush_all(client)
                outbox.retry_now()

    def check(self) -> dict[str, object]:
        lines = self._told.read_text().splitlines()
        told = dict(json.loads(line) for line in lines if not line.startswith("killed "))
        arrived = {json.loads(line)["session_id"] for line in self._store.read_text().splitlines()}
        with looking_at(self.database) as connection:
            rows = connection.execute(text("SELECT id, status, session_id FROM observation_events")).fetchall()
            by_status = text(
                "SELECT status, CAST(sum(events) AS INTEGER) FROM observation_events_ledger GROUP BY status"
            )
            ledger = dict(connection.execute(by_status).fetchall())
            orders = {*connection.scalars(text("SELECT name FROM orders"))}
            ever = len(rows) + sum(ledger.values())
            if connection.dialect.name == "sqlite":  # ids leave gaps elsewhere
                assert connection.scalar(text("PRAGMA integrity_check")) == "ok"
                last = connection.scalar(text("SELECT seq FROM sqlite_sequence WHERE name = 'observation_events'"))
                assert ever == last, "a row left that is not counted"
        assert ledger.keys() <= {"sent", "abandoned"}, "the cap took what was still to be sent"
        status = {name: state for _, state, name in rows}
        assert {*status.values()} <= {"sent", "abandoned"}
        wanted = {name for name in told.values() if POISON not in name}
        assert wanted <= arrived, "an event never arrived that enqueue accepted"
        assert {name for name, state in status.items() if state == "sent"} <= arrived
        assert not any(POISON in name for name in arrived)
        poisoned = {name for name in told.values() if POISON in name}
        assert {name for name in orders if POISON not in name} == {
            name for name in arrived | {*status} if " order " in name and POISON not in name
        }, "an event without its order, or the reverse"
        return {
            "events ever enqueued": ever,
            "of them enqueue had returned": len(told),
            "delivered": len(arrived),
            "rejected": len(poisoned),
            "deleted by the cap": sum(ledger.values()),
        }


@contextmanager
def database(server: str | None, folder: Path) -> Iterator[str]:
    """Make a database on a server of PostgreSQL, else a file of SQLite."""
    if server is None:
        yield url_of(folder / "outbox.db")
        return
    url = make_url(server).set(drivername="postgresql+psycopg")
    name = f"kill_{os.getpid()}"
    administrator = create_engine(url, isolation_level="AUTOCOMMIT")
    with administrator.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    administrator.dispose()  # what is forked from here on has to inherit no connection
    try:
        yield url.set(database=name).render_as_string(hide_password=False)
    finally:
        with administrator.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        administrator.dispose()


@click.command(help=__doc__)
@click.argument("kills", type=int, default=1_000)
@click.option("--database", "server", help="The URL of a PostgreSQL server's administrator, instead of SQLite.")
@click.option("--seed", type=int, help="decides who is killed when, but not how they are scheduled")
def main(kills: int, server: str | None, seed: int | None) -> None:
    seed = random.randrange(2**32) if seed is None else seed  # noqa: S311 - no secret
    click.echo(f"seed {seed}")
    with tempfile.TemporaryDirectory() as folder, database(server, Path(folder)) as url:
        arena = Arena(Path(folder), url, seed)
        arena.fight(kills)
        arena.deliver_the_rest()
        summary = arena.end_server()
        for what, count in [*sorted(arena.kills.items()), *arena.check().items()]:
            click.echo(f"{what}: {count}")
        click.echo(f"requests: {summary['requests']}, events that came again: {summary['duplicates']}")


if __name__ == "__main__":
    main()
