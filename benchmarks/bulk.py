"""Enqueue of many in one transaction, and inside the caller's session."""

from __future__ import annotations

from functools import partial

from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from benchmarks.harness import Contestant, Table, compare, stopwatch
from benchmarks.lab import INSERT_ON_SQLITE, ROOMY, Lab, events, raw_rows, raw_sqlite
from outbox import ObservationEvent, Outbox
from outbox.storage.inserts import INSERTED


def measure(lab: Lab) -> list[Table]:
    many, some = lab.size(10_000), lab.size(1_000)
    in_bulk = [
        Contestant("raw sqlite3: executemany, commit", partial(_executemany, lab, many)),
        Contestant("raw sqlite3: execute each for its id, commit", partial(_execute_each, lab, many)),
        Contestant("outbox.enqueue_many, with ids", partial(_enqueue_many, lab, many), at_least=0.75),
    ]
    in_session = [
        Contestant("session.add, flush, by hand", partial(_by_hand, lab, some)),
        Contestant("outbox.enqueue(event, session=session)", partial(_in_session, lab, some), at_least=1.0),
    ]
    return [
        Table(
            f"Enqueue of {many:,} in one transaction, synchronous=FULL",
            "events/s",
            compare(in_bulk, rounds=lab.rounds(7)),
        ),
        Table(
            f"Enqueue in the caller's session, {some:,} in one transaction",
            "events/s",
            compare(in_session, rounds=lab.rounds(7)),
        ),
    ]


def _executemany(lab: Lab, number: int) -> float:
    rows = raw_rows(number)
    with lab.sqlite_file() as path, raw_sqlite(path, "FULL") as connection:
        with stopwatch() as watch:
            connection.executemany(INSERT_ON_SQLITE, rows)
            connection.commit()
        return number / watch.seconds


def _execute_each(lab: Lab, number: int) -> float:
    rows = raw_rows(number)
    with lab.sqlite_file() as path, raw_sqlite(path, "FULL") as connection:
        with stopwatch() as watch:
            ids = [connection.execute(INSERT_ON_SQLITE, row).lastrowid for row in rows]
            connection.commit()
        return len(ids) / watch.seconds


def _enqueue_many(lab: Lab, number: int) -> float:
    given = events(number)
    with lab.sqlite_file() as path, Outbox(f"sqlite:///{path}", policy=ROOMY) as outbox:
        with stopwatch() as watch:
            ids = outbox.enqueue_many(given)
        return len(ids) / watch.seconds


def _by_hand(lab: Lab, number: int) -> float:
    """Of rows whose columns were worked out before, the payload's JSON too."""
    rows = [dict(zip(INSERTED, row, strict=True)) for row in raw_rows(number)]
    with lab.sqlite_file() as path:
        engine = create_engine(f"sqlite:///{path}")
        with Session(engine) as session:
            session.connection()
            ids = []
            with stopwatch() as watch:
                for row in rows:
                    added = ObservationEvent(**row)
                    session.add(added)
                    session.flush()
                    ids.append(added.id)
                session.commit()
        engine.dispose()
        return len(ids) / watch.seconds


def _in_session(lab: Lab, number: int) -> float:
    given = events(number)
    with lab.sqlite_file() as path:
        engine = create_engine(f"sqlite:///{path}")
        with Outbox(engine, policy=ROOMY) as outbox, Session(engine) as session:
            session.connection()
            with stopwatch() as watch:
                for event in given:
                    outbox.enqueue(event, session=session)
                session.commit()
        engine.dispose()
        return number / watch.seconds
