"""A process that is killed, wherever it is, loses nothing that it had accepted, and stops no other."""

import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
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
from outbox.schema import alembic_config
from outbox.storage.engines import open_engine, writing
from outbox.testing.receiver import IngestServer
from servers import Servers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="this system cannot fork"),
]

EVERY_STEP = "OUTBOX_KILL_EVERY_STEP" in os.environ
"""Minutes rather than seconds."""

ON_SERVER = ("enqueue many", "enqueue in a session", "flush, 503 and then a probe")

SQL_STEPS = {"after COMMIT", "after close"}
SQLITE_STEPS = SQL_STEPS | {"after BEGIN IMMEDIATE"}
LONE_STEPS = {"after INSERT INTO", "after close"}
"""A lone row is committed by its INSERT."""
POSTGRESQL_STEPS = SQL_STEPS | {"within COMMIT"}
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


Database = AbstractContextManager[str]
"""The URL of a database, for as long as it is used."""


@contextmanager
def copy_of(template: Path) -> Iterator[str]:
    file = template.with_name("copy.db")
    if template.exists():
        shutil.copy(template, file)
    yield url_of(file)
    for left in template.parent.glob("copy.db*"):
        left.unlink()


def kill_everywhere(
    nursery: Nursery,
    program: str,
    prepared: Callable[[], Database],
    server: str,
    check: Callable[[str, Report], None],
) -> Report:
    """Kill the program at its steps, each time on a database like new; return what it told when it survived."""

    def run(kill_at: int) -> Report:
        number = f"run-{kill_at}"
        with prepared() as url:
            if program in PROGRAMS:
                name_rows_after(url, number)
            report = nursery.run(program, url, server, run=number, kill_at=kill_at)
            assert report.return_code in (0, -9)  # an answer arrives in more or fewer pieces, so the steps differ
            try:
                check(url, report)
            except AssertionError as error:
                raise AssertionError(f"killed at step {kill_at}, {report.killed_at}: {error}") from error
        return report

    survived = run(0)
    chosen = chosen_steps(survived.steps)
    for kill_at in chosen:
        run(kill_at)
    print(f"{program}: killed at {len(chosen)} of {len(survived.steps)} steps")
    return survived


def chosen_steps(steps: list[str]) -> list[int]:
    """Return the numbers of the last step of each name, or of all steps where there is time."""
    last = {name: number for number, name in enumerate(steps, 1)}
    return list(range(1, len(steps) + 1)) if EVERY_STEP else sorted(last.values())


class Revived(HttpClient):
    """A client of a service that works again, under another address."""

    def __init__(self, server: IngestServer, *, known_as: str) -> None:
        super().__init__(server.url, token=TOKEN)
        self._known_as = known_as

    @property
    def destination(self) -> str:
        return self._known_as


def kill_program(nursery: Nursery, name: str, prepared: Callable[[], Database]) -> set[str]:
    """Kill a program at all its steps, and return them."""
    program = PROGRAMS[name]
    with (
        IngestServer() as server,
        IngestServer(poison="nothing is") as healthy,
        Revived(healthy, known_as=server.url) as client,
    ):

        def check(url: str, report: Report) -> None:
            received = server.stored.values()
            check_what_is_left(url, told=report.ids, received=received, together=program.together)
            deliver_the_rest(url, client)
            received = [*server.stored.values(), *healthy.stored.values()]
            check_the_end(url, told=report.ids, received=received)

        @contextmanager
        def answered() -> Iterator[str]:
            if not server._script:  # else the last one was killed before it was answered
                program.answer(server)
            with prepared() as url:
                yield url

        return {*kill_everywhere(nursery, name, answered, server.url, check).steps}


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_lost_wherever_a_process_is_killed(name: str, nursery: Nursery, folder: Path) -> None:
    template = folder / f"{name}.db"
    with Outbox.open(url_of(template)) as outbox:
        PROGRAMS[name].prepare(outbox)
    steps = kill_program(nursery, name, lambda: copy_of(template))
    expected = LONE_STEPS if name == "enqueue" else SQLITE_STEPS
    assert steps >= expected | (SOCKET_STEPS if name.startswith("flush") else set())


@pytest.mark.parametrize("name", ON_SERVER)
def test_nothing_is_lost_on_a_server_wherever_a_process_is_killed(
    name: str, nursery: Nursery, servers: Servers
) -> None:
    @contextmanager
    def prepared() -> Iterator[str]:
        url = servers.empty_outbox("postgresql").render_as_string(hide_password=False)
        with Outbox.open(url) as outbox:
            PROGRAMS[name].prepare(outbox)
        yield url

    steps = kill_program(nursery, name, prepared)
    assert steps >= POSTGRESQL_STEPS | (SOCKET_STEPS if name.startswith("flush") else set())


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

    file = folder / "copy.db"

    def check(url: str, report: Report) -> None:
        assert schema_of(file) in (before, after)
        with Outbox.open(url) as outbox:
            assert outbox.pending_count() - old_rows in ({1} if report.ids else {0, 1})
        assert schema_of(file) == after

    survived = kill_everywhere(nursery, "open", lambda: copy_of(template), "", check)
    assert {*survived.steps} >= {
        "after BEGIN IMMEDIATE",
        "after COMMIT",
        "after CREATE TABLE",
        "after CREATE INDEX",
    } | SQLITE_STEPS
