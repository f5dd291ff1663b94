"""A process that is killed, wherever it is, loses nothing that it had accepted, and stops no other."""

import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command

from kill.nursery import Nursery
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


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    opened = Nursery(tmp_path_factory.mktemp("nursery"))
    yield opened
    opened.close()


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_lost_wherever_a_process_is_killed(name: str, nursery: Nursery, tmp_path: Path) -> None:
    program = PROGRAMS[name]
    template = tmp_path / "template.db"
    with Outbox.open(url_of(template)) as outbox:
        program.prepare(outbox)
    with (
        IngestServer() as server,
        IngestServer(poison="nothing is") as healthy,
        HttpClient(healthy.url, token=TOKEN) as client,
    ):
        program.answer(server)
        kill_at, survived = 0, False
        while not survived:
            kill_at += 1
            run = f"run-{kill_at}"
            file = tmp_path / f"{run}.db"
            shutil.copy(template, file)
            name_rows_after(file, run)
            report = nursery.run(name, file, server.url, run=run, kill_at=kill_at)
            survived = report.return_code == 0
            assert survived or report.return_code == -9
            check_what_is_left(file, told=report.ids, received=server.received.values())
            deliver_the_rest(file, client)
            check_the_end(file, told=report.ids, received=[*server.received.values(), *healthy.received.values()])
    print(f"{name}: killed at {kill_at - 1} steps")


def schema_of(file: Path) -> set[tuple[str, str | None]]:
    with closing(sqlite3.connect(file)) as connection:
        return {*connection.execute("SELECT name, sql FROM sqlite_master")}


@pytest.mark.parametrize("made_by", ["nobody", "an older release", "another program"])
def test_an_upgrade_is_done_as_a_whole_or_not_at_all(made_by: str, nursery: Nursery, tmp_path: Path) -> None:
    template = tmp_path / "template.db"
    MAKERS[made_by](template)
    before = schema_of(template)
    with Outbox.open(url_of(shutil.copy(template, tmp_path / "upgraded.db"))) as upgraded:
        old_rows = upgraded.pending_count()
    after = schema_of(tmp_path / "upgraded.db")
    assert before != after

    kill_at, survived = 0, False
    while not survived:
        kill_at += 1
        file = Path(shutil.copy(template, tmp_path / f"{kill_at}.db"))
        report = nursery.run("open", file, "", run="run", kill_at=kill_at)
        survived = report.return_code == 0
        assert survived or report.return_code == -9
        assert schema_of(file) in (before, after)
        with Outbox.open(url_of(file)) as outbox:
            assert outbox.pending_count() - old_rows in ({1} if report.ids else {0, 1})
        assert schema_of(file) == after
    print(f"upgrade of a file made by {made_by}: killed at {kill_at - 1} steps")


def make_nothing(file: Path) -> None:
    file.touch()


def make_baseline(file: Path) -> None:
    engine = open_engine(url_of(file))
    file.touch()
    with writing(engine) as connection:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "outbox_0001")
        connection.exec_driver_sql(OLD_ROW)
    engine.dispose()


def make_unversioned(file: Path) -> None:
    make_baseline(file)
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("DROP TABLE outbox_alembic_version")


OLD_ROW = """
INSERT INTO observation_events (event_type, occurred_at_ms, payload_json, created_at_ms)
VALUES ('rule_fired', 1, '{}', 1)
"""
MAKERS = {"nobody": make_nothing, "an older release": make_baseline, "another program": make_unversioned}
