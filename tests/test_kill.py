"""A process that is killed, wherever it is, loses nothing that it had accepted, and stops no other."""

import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command

from kill.nursery import Nursery, Report
from kill.programs import (
    PROGRAMS,
    TOKEN,
    check_the_end,
    check_what_is_left,
    deliver_the_rest,
    name_rows_after,
    url_of,
)
from outbox import HttpClient, Outbox
from outbox.database import open_engine, writing
from outbox.receiver import IngestServer
from outbox.schema import alembic_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="this system cannot fork"),
]

SQL_STEPS = {"after BEGIN IMMEDIATE", "after COMMIT", "after close"}
SOCKET_STEPS = {"after connect", "within sendall", "after sendall", "after recv_into"}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    memory = Path("/dev/shm")  # noqa: S108 - what is killed is processes, not the power, so no disk is needed
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as made:
        yield Path(made)


@pytest.fixture(scope="module")
def nursery(folder: Path) -> Iterator[Nursery]:
    opened = Nursery(folder)
    yield opened
    opened.close()


def kill_everywhere(
    nursery: Nursery, program: str, template: Path, server: str, check: Callable[[Path, Report], None]
) -> Report:
    """Kill the program at its first step, at its second, until it survives; each time on a copy of the file."""
    kill_at = 0
    while True:
        kill_at += 1
        run = f"run-{kill_at}"
        file = template.with_name(f"{run}.db")
        if template.exists():
            shutil.copy(template, file)
            name_rows_after(file, run)
        report = nursery.run(program, file, server, run=run, kill_at=kill_at)
        assert report.return_code in (0, -9)
        try:
            check(file, report)
        except AssertionError as error:
            raise AssertionError(f"killed at step {kill_at}, {report.killed_at}: {error}") from error
        for left in template.parent.glob(f"{run}.db*"):
            left.unlink()
        if report.return_code == 0:
            print(f"{program}: killed at {kill_at - 1} steps")
            return report


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_lost_wherever_a_process_is_killed(name: str, nursery: Nursery, folder: Path) -> None:
    program = PROGRAMS[name]
    template = folder / f"{name}.db"
    with Outbox.open(url_of(template)) as outbox:
        program.prepare(outbox)
    with (
        IngestServer() as server,
        IngestServer(poison="nothing is") as healthy,
        HttpClient(healthy.url, token=TOKEN) as client,
    ):
        program.answer(server)

        def check(file: Path, report: Report) -> None:
            received = server.received.values()
            check_what_is_left(file, told=report.ids, received=received, together=program.together)
            deliver_the_rest(file, client)
            received = [*server.received.values(), *healthy.received.values()]
            check_the_end(file, told=report.ids, received=received)

        survived = kill_everywhere(nursery, name, template, server.url, check)
    assert {*survived.steps} >= SQL_STEPS | (SOCKET_STEPS if name.startswith("flush") else set())


def schema_of(file: Path) -> set[tuple[str, str | None]]:
    if not file.exists():
        return set()
    with closing(sqlite3.connect(file)) as connection:
        return {*connection.execute("SELECT name, sql FROM sqlite_master")}


def make_nothing(file: Path) -> None:
    pass


def make_baseline(file: Path) -> None:
    file.touch()
    engine = open_engine(url_of(file))
    with writing(engine) as connection:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "outbox_0001")
        connection.exec_driver_sql(
            "INSERT INTO observation_events (event_type, occurred_at_ms, payload_json, created_at_ms)"
            " VALUES ('rule_fired', 1, '{}', 1)"
        )
    engine.dispose()


def make_unversioned(file: Path) -> None:
    make_baseline(file)
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("DROP TABLE outbox_alembic_version")


@pytest.mark.parametrize("make", [make_nothing, make_baseline, make_unversioned])
def test_an_upgrade_is_done_as_a_whole_or_not_at_all(
    make: Callable[[Path], None], nursery: Nursery, folder: Path
) -> None:
    template = folder / f"{make.__name__}.db"
    make(template)
    before = schema_of(template)
    upgraded = folder / "upgraded.db"
    if template.exists():
        shutil.copy(template, upgraded)
    with Outbox.open(url_of(upgraded)) as outbox:
        old_rows = outbox.pending_count()
    after = schema_of(upgraded)
    upgraded.unlink()
    assert before != after

    def check(file: Path, report: Report) -> None:
        assert schema_of(file) in (before, after)
        with Outbox.open(url_of(file)) as outbox:
            assert outbox.pending_count() - old_rows in ({1} if report.ids else {0, 1})
        assert schema_of(file) == after

    survived = kill_everywhere(nursery, "open", template, "", check)
    assert {*survived.steps} >= {
        "after BEGIN IMMEDIATE",
        "after COMMIT",
        "after CREATE TABLE",
        "after CREATE INDEX",
    } | SQL_STEPS
