"""Where runs take place: folders, databases, and the events that go in."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime, timedelta, timezone
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
from sqlalchemy import URL
from typing_extensions import Self

from outbox import Outbox, Policy, RuleFired, schema
from outbox.events import encode
from outbox.new_rows import columns
from outbox.storage.engines import open_engine
from outbox.storage.inserts import INSERTED
from tests.servers import Server, postgresql

ROOMY = Policy(max_rows=10**9, when_full="trim")
"""A policy under which nothing is ever over the cap, and `enqueue` runs no query to find that out."""

_DIFFLORE = Path(__file__).parents[1] / "tests/data/difflore/difflore-0.2.0.db"

DATABASES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
"""Those whose behaviour under a backlog is measured, and their names."""

_COLUMNS = ", ".join(INSERTED)
INSERT_ON_SQLITE = f"INSERT INTO observation_events ({_COLUMNS}) VALUES ({', '.join('?' * len(INSERTED))})"
INSERT_ON_POSTGRESQL = INSERT_ON_SQLITE.replace("?", "%s") + " RETURNING id"


class Lab:
    """The place of one run. `quick` makes everything small, to see only that it works."""

    def __init__(self, *, quick: bool, largest: int) -> None:
        self.quick = quick
        self.largest = 1_000 if quick else largest
        self._stack = ExitStack()
        self._files = 0

    def __enter__(self) -> Self:
        self.folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="outbox-bench-")))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def size(self, wanted: int) -> int:
        return max(wanted // 100, 10) if self.quick else wanted

    def rounds(self, wanted: int) -> int:
        return 1 if self.quick else wanted

    @contextmanager
    def sqlite_file(self) -> Iterator[Path]:
        """A new file with the schema of the package, in a write-ahead log."""
        with self.empty_file() as path:
            shutil.copyfile(self._template, path)
            yield path

    @contextmanager
    def empty_file(self) -> Iterator[Path]:
        """A name for a new file; the file is deleted at the end, and all beside it."""
        self._files += 1
        folder = self.folder / str(self._files)
        folder.mkdir()
        yield folder / "bench.db"
        shutil.rmtree(folder)

    @contextmanager
    def difflores_file(self) -> Iterator[Path]:
        """A new file with the table and the indexes of difflore."""
        with self.empty_file() as path, closing(sqlite3.connect(path)) as made:
            with closing(sqlite3.connect(f"file:{_DIFFLORE}?immutable=1", uri=True)) as left:
                for (sql,) in left.execute("SELECT sql FROM sqlite_master WHERE name LIKE 'observation%'"):
                    made.execute(sql)
            yield path

    @cached_property
    def _template(self) -> Path:
        path = self.folder / "template.db"
        Outbox.open(f"sqlite:///{path}").close()
        return path

    @cached_property
    def server(self) -> Server:
        """The PostgreSQL that OUTBOX_TEST_POSTGRESQL_URL names, else one of the run's own, without fsync."""
        return self._stack.enter_context(postgresql())

    @contextmanager
    def postgresql_database(self, *, empty: bool = False) -> Iterator[URL]:
        """A new database on the server, with the schema of the package unless it is to be empty."""
        with self.server.database() as url:
            if not empty:
                engine = open_engine(url)
                schema.upgrade(engine)
                engine.dispose()
            yield url


def events(number: int) -> list[RuleFired]:
    """Events whose payload has about 300 bytes."""
    began = datetime(2026, 11, 24, 12, 0, tzinfo=timezone.utc)
    return [
        RuleFired(
            rule_ids=[f"no-float-money-{index % 50}", "prefer-decimal"],
            file_path=f"services/billing/src/invoices/module_{index % 100}/totals.py",
            intent="Round the totals of an invoice to cents before they are summed up, never after.",
            session_id=f"session-{index % 10}-3f2b8c1e",
            fired_at=began + timedelta(milliseconds=index),
        )
        for index in range(number)
    ]


def payloads(number: int) -> list[str]:
    return [encode(event)[1] for event in events(number)]


def raw_rows(number: int, *, now_ms: int = 1_800_000_000_000) -> list[tuple[Any, ...]]:
    """What an INSERT by hand writes for the same events."""
    rows = []
    for event in events(number):
        times = {"next_attempt_at_ms": now_ms, "created_at_ms": now_ms}
        row = {**columns(event, now_ms=now_ms), "payload_json": encode(event)[1], **times}
        rows.append(tuple(row[name] for name in INSERTED))
    return rows


@contextmanager
def raw_sqlite(path: Path, synchronous: str) -> Iterator[sqlite3.Connection]:
    """The driver alone."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    yield connection
    connection.close()


@contextmanager
def full_outbox(lab: Lab, synchronous: str, number: int) -> Iterator[Outbox]:
    """Yield an outbox on an SQLite file with as many due events."""
    with lab.sqlite_file() as path, Outbox(f"sqlite:///{path}", policy=ROOMY, synchronous=synchronous) as outbox:
        with raw_sqlite(path, synchronous) as connection:
            connection.executemany(INSERT_ON_SQLITE, raw_rows(number, now_ms=1_700_000_000_000))
            connection.commit()
        yield outbox


@contextmanager
def raw_postgresql(url: URL, *, autocommit: bool = False) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(conninfo(url), autocommit=autocommit) as connection:
        yield connection


def conninfo(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


class FreeUpload:
    """A client whose uploads cost nothing."""

    logged_in = True

    def upload(self, batch: object) -> None:
        pass


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
