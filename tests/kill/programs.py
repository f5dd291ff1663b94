"""What the processes do that are killed, and what must hold of the database that they leave."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone

from sqlalchemy import Connection, NullPool, create_engine, inspect, text
from sqlalchemy.orm import Session

from outbox import HttpClient, Outbox, Policy, RuleFired
from outbox.clock import SharedClock, now_ms
from outbox.storage import store
from outbox.testing.answers import Answer, Drop
from outbox.testing.receiver import IngestServer

TOKEN = "token-of-tests"
POISON = "poison"
RUN = "name-of-the-run"
APPLICATION = "to-be-killed"
"""Under this name PostgreSQL knows the processes."""

HOUR_MS = 3_600_000


@dataclass(frozen=True)
class Job:
    """What a process is told."""

    program: str
    url: str
    server: str
    run: str
    """A name that no other process has; it is in all the events."""
    tell: Callable[[str], None]


@dataclass(frozen=True)
class Program:
    work: Callable[[Job], None]
    prepare: Callable[[Outbox], object] = lambda outbox: None
    """Fills the database before the process starts."""
    answer: Callable[[IngestServer], None] = lambda server: None
    """Tells the server how to answer the process."""
    together: int = 1
    """How many events are enqueued as one, all or none."""


def url_of(file: object) -> str:
    return f"sqlite:///{file}"


def event(run: str, name: object) -> RuleFired:
    return RuleFired(rule_ids=[], session_id=f"{run} {name}", fired_at=datetime.now(timezone.utc))


def flush_one_batch(job: Job) -> None:
    with Outbox(job.url) as outbox, HttpClient(job.server, token=TOKEN) as client:
        outbox.flush(client)


def flush_all(job: Job) -> None:
    with (
        Outbox(job.url, policy=Policy(batch_size=2)) as outbox,
        HttpClient(job.server, token=TOKEN) as client,
    ):
        outbox.flush_all(client)


def let_time_fly() -> None:
    times = itertools.count(now_ms(), 10_000)
    store.now_ms = lambda: next(times)
    SharedClock.now_ms = lambda _: next(times)


def flush_while_time_flies(job: Job) -> None:
    let_time_fly()
    flush_one_batch(job)


def flush_and_probe(job: Job) -> None:
    let_time_fly()
    with (
        Outbox(job.url, policy=Policy(batch_size=2)) as outbox,
        HttpClient(job.server, token=TOKEN) as client,
    ):
        for _ in range(2):
            outbox.flush(client)


def flush_over_the_cap(job: Job) -> None:
    policy = Policy(batch_size=2, max_rows=4, when_full="trim")
    with Outbox(job.url, policy=policy) as outbox, HttpClient(job.server, token=TOKEN) as client:
        outbox.flush_all(client)


def enqueue_singly(job: Job) -> None:
    with Outbox(job.url) as outbox:
        for number in range(3):
            job.tell(f"id {outbox.enqueue(event(job.run, number))}")


def enqueue_in_groups(job: Job) -> None:
    with Outbox(job.url) as outbox:
        for group in range(2):
            ids = outbox.enqueue_many(event(job.run, f"{group} {number}") for number in range(3))
            for row_id in ids:
                job.tell(f"id {row_id}")


def enqueue_in_a_session(job: Job) -> None:
    with Outbox(job.url) as outbox, Session(outbox.engine) as session:
        for number in range(3):
            session.execute(text("INSERT INTO orders VALUES (:number)"), {"number": number})
            row_id = outbox.enqueue(event(job.run, number), session=session)
            if number == 1:
                session.rollback()
            else:
                session.commit()
                job.tell(f"id {row_id}")


def enqueue_at_the_cap(job: Job) -> None:
    with Outbox(job.url, policy=Policy(max_rows=3, when_full="trim")) as outbox:
        for number in range(3):
            job.tell(f"id {outbox.enqueue(event(job.run, number))}")


def operate(job: Job) -> None:
    with Outbox(job.url) as outbox:
        outbox.retry_now()
        outbox.requeue_abandoned(older_than=now_ms() + 1)


def open_and_enqueue(job: Job) -> None:
    with Outbox.open(job.url) as outbox:
        job.tell(f"id {outbox.enqueue(event(job.run, 'first'))}")


def fill(*statuses: str) -> Callable[[Outbox], None]:
    """Let the database hold rows in these states; `poison` is a pending one that the server rejects."""

    def prepare(outbox: Outbox) -> None:
        for number, status in enumerate(statuses):
            row_id = outbox.enqueue(event(RUN, f"{status} {number}"))
            if status != POISON:
                set_status(outbox, row_id, status)

    return prepare


def set_status(outbox: Outbox, row_id: int | None, status: str) -> None:
    sent_at = "created_at_ms" if status == "sent" else "NULL"
    with outbox.engine.begin() as connection:
        connection.execute(
            text(f"UPDATE observation_events SET status = :status, sent_at_ms = {sent_at} WHERE id = :id"),
            {"status": status, "id": row_id},
        )


def add_orders(outbox: Outbox) -> None:
    with outbox.engine.begin() as connection:
        connection.execute(text("CREATE TABLE orders (number INTEGER)"))


def store_without_an_answer(server: IngestServer) -> None:
    server.script(*[Drop(stores=True)] * 1_000)


WAITING = ("pending",) * 3
PROGRAMS = {
    "enqueue": Program(enqueue_singly),
    "enqueue many": Program(enqueue_in_groups, together=3),
    "enqueue in a session": Program(enqueue_in_a_session, prepare=add_orders),
    "enqueue at the cap": Program(enqueue_at_the_cap, prepare=fill("sent", "abandoned", "pending")),
    "flush, accepted": Program(flush_all, prepare=fill(*WAITING, "parked")),
    "flush, one bad row first": Program(flush_one_batch, prepare=fill(POISON, *WAITING)),
    "flush, all rows bad": Program(flush_one_batch, prepare=fill(POISON, POISON)),
    "flush, halving": Program(flush_one_batch, prepare=fill(*WAITING, *WAITING, POISON, *WAITING)),
    "flush, renewing the lease": Program(flush_while_time_flies, prepare=fill(POISON, *WAITING)),
    "flush, 503": Program(flush_one_batch, prepare=fill(*WAITING), answer=lambda server: server.set_mode("down")),
    "flush, 503 and then a probe": Program(
        flush_and_probe, prepare=fill(*WAITING), answer=lambda server: server.script(Answer(503))
    ),
    "flush, 429": Program(
        flush_one_batch,
        prepare=fill(*WAITING),
        answer=lambda server: server.set_mode("overloaded", retry_after_sec=40),
    ),
    "flush, 401": Program(
        flush_one_batch, prepare=fill(*WAITING), answer=lambda server: server.set_mode("revoked")
    ),
    "flush, no answer": Program(
        flush_one_batch, prepare=fill(*WAITING), answer=lambda server: server.set_mode("drop")
    ),
    "flush, stored but not acknowledged": Program(
        flush_one_batch, prepare=fill(*WAITING), answer=store_without_an_answer
    ),
    "flush, over the cap": Program(
        flush_over_the_cap, prepare=fill("sent", "sent", "abandoned", *WAITING)
    ),
    "retry and requeue": Program(operate, prepare=fill("parked", "abandoned", *WAITING)),
}  # fmt: skip
OPEN = Program(open_and_enqueue)

_OTHERS = text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid != pg_backend_pid()"
    f" AND application_name = '{APPLICATION}'"
)


@contextmanager
def looking_at(url: str) -> Iterator[Connection]:
    """Open a database past the outbox, in one transaction; on a server, once the dead have left it."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            while connection.scalar(_OTHERS):
                connection.execute(text("SELECT pg_stat_clear_snapshot()"))
        yield connection


def name_rows_after(url: str, run: str) -> None:
    """Make the events of a prepared database those of one run, so that no other run's can be taken for them."""
    with looking_at(url) as connection:
        rename = text("UPDATE observation_events SET payload_json = replace(payload_json, :old, :new)")
        connection.execute(rename, {"old": RUN, "new": run})


def check_what_is_left(url: str, *, told: Collection[int], received: Collection[str], together: int = 1) -> None:
    """Hold what a killed process left against what it had said: ids that enqueue returned."""
    with looking_at(url) as connection:

        def column(query: str) -> list:
            return list(connection.scalars(text(query)))

        ids = column("SELECT id FROM observation_events")
        deleted = sum(column("SELECT events FROM observation_events_ledger"))
        if connection.dialect.name == "sqlite":  # ids leave gaps elsewhere
            assert column("PRAGMA integrity_check") == ["ok"]
            ever = sum(column("SELECT seq FROM sqlite_sequence WHERE name = 'observation_events'"))
            assert ever == len(ids) + deleted, "a row left that is not counted"
            assert max(told, default=0) <= ever
        assert (len(ids) + deleted) % together == 0, "a part of what is enqueued as one"
        assert len({*told} - {*ids}) <= deleted, "an event is gone that enqueue accepted"
        delivered = column(
            "SELECT payload_json FROM observation_events WHERE status = 'sent' AND created_at_ms < sent_at_ms"
        )
        assert {*delivered} <= {*received}, "a row is called sent that the server has not got"
        if inspect(connection).has_table("orders"):
            committed = column("SELECT count(*) FROM orders")
            assert committed == [len(ids)], "an event without its order, or the reverse"


def deliver_the_rest(url: str, client: HttpClient) -> None:
    """Flush when leases, delays and pauses have run out, as often as it takes."""
    with looking_at(url) as connection:
        for earlier in (
            "UPDATE observation_events SET next_attempt_at_ms = next_attempt_at_ms - :hour",
            "UPDATE observation_destinations"
            " SET paused_until_ms = paused_until_ms - :hour, probe_until_ms = probe_until_ms - :hour",
        ):
            connection.execute(text(earlier), {"hour": HOUR_MS})
    with Outbox(url, policy=Policy(unpark_spread_ms=1)) as outbox:
        assert outbox.flush_all(client).paused_until_ms is None, "a dead flusher's pause or probe goes on"
        outbox.retry_now()
        outbox.flush_all(client)


def check_the_end(url: str, *, told: Collection[int], received: Collection[str]) -> None:
    """Hold what is there when all is delivered against what a killed process had said."""
    with looking_at(url) as connection:
        found = connection.execute(text("SELECT id, status, payload_json FROM observation_events"))
        rows = {row_id: (status, payload) for row_id, status, payload in found}
    for row_id, (status, payload) in rows.items():
        if status == "abandoned":
            assert POISON in payload or " abandoned " in payload
        else:
            assert status == "sent", f"row {row_id} is {status}"
    for row_id in told:
        if row_id in rows:
            assert rows[row_id][1] in received, f"event {row_id} never arrived"
