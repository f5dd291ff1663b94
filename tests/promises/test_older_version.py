"""A program of an older version goes on beside this one, after this one upgraded the database.

`data/older/outbox.zip` holds the modules of the version before destinations, as they were.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from alembic import command

from builders import ScriptedClient, rule_fired
from outbox import Outbox, schema
from outbox.storage.engines import migrating, open_engine

OLDER = Path(__file__).parents[1] / "data" / "older"
REVISION = "outbox_0006"

pytestmark = [pytest.mark.contract, pytest.mark.programs]


class Program:
    """The older version, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.answer()

    def answer(self) -> Any:
        line = self._process.stdout.readline()
        assert line, self._process.stderr.read()
        return json.loads(line)

    def begin(self, *words: object) -> None:
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()

    def do(self, *words: object) -> Any:
        self.begin(*words)
        return self.answer()


@pytest.fixture
def place(url: str) -> str:
    """The URL of a database whose schema is the last one that the older version knows."""
    engine = open_engine(url)
    schema.upgrade(engine)
    config = schema.alembic_config()
    with migrating(engine) as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, REVISION)
    engine.dispose()
    return url


@pytest.fixture
def older(place: str, tmp_path: Path) -> Iterator[Program]:
    shutil.unpack_archive(OLDER / "outbox.zip", tmp_path / "older")
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, OLDER / "program.py", place],
        env={"PYTHONPATH": str(tmp_path / "older"), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
    ) as process:
        yield Program(process)
        process.stdin.close()
        assert process.wait() == 0, process.stderr.read()


def test_all_that_an_older_version_does_works_after_the_upgrade(older: Program, place: str) -> None:
    ids = older.do("enqueue", 3)
    with Outbox.open(place) as outbox:
        for answer, status in (
            ("unauthorized", "parked"),
            ("down", "pending"),
            ("slow down", "pending"),
            ("rejected", "pending"),
            ("accepted", "sent"),
        ):
            assert older.do("flush", answer) == (ids if status == "sent" else [])
            assert {outbox.get(row_id).status for row_id in ids} == {status}
            assert older.do("overdue") is False
            assert older.do("pending") == outbox.pending_count()
            older.do("retry")
            older.do("flush all", "accepted")
            assert {outbox.get(row_id).status for row_id in ids} == {"sent"}
            ids = older.do("enqueue", 3)
        assert older.do("counts") == outbox.stats().counts
        assert older.do("find") == [found.id for found in outbox.find()]
        assert older.do("requeue") == 0
        assert older.do("purge") == 18
        assert outbox.stats().deleted == [
            ("pending", "rule_fired", "purge", 3),
            ("sent", "rule_fired", "purge", 15),
        ]


def test_both_versions_drain_one_queue_and_send_each_event_once(older: Program, place: str) -> None:
    with Outbox.open(place) as outbox:
        ids = [*older.do("enqueue", 300), *outbox.enqueue_many([rule_fired()] * 300)]
        client = ScriptedClient()

        def drain() -> None:
            while outbox.flush_all(client).sent:
                pass

        older.begin("flush all", "accepted")
        here = Thread(target=drain)
        here.start()
        sent_there = older.answer()
        here.join()
        drain()
        sent_here = [row_id for batch in client.ids for row_id in batch]
        assert sorted(sent_there + sent_here) == ids
        assert outbox.stats().left_undelivered == 0


def test_what_one_version_leaves_the_other_one_sends(older: Program, place: str) -> None:
    with Outbox.open(place) as outbox:
        theirs = older.do("enqueue", 3)
        older.do("flush", "unauthorized")
        ours = outbox.enqueue_many([rule_fired()] * 3)
        assert outbox.retry_now() == 3
        assert sorted(older.do("flush all", "accepted")) == theirs + ours
