"""The pytest plugin: fixtures for tests of programs that use outbox.

It is loaded in every run of pytest where it is installed, so each fixture imports what it needs when it is used.
A module of its own, because to import one of the package `outbox` is to import SQLAlchemy.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from outbox import HttpClient, Outbox
    from outbox.testing import ScriptedServer, TimeMachine


@pytest.fixture(scope="session")
def _outbox_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Migrate one file; to copy it takes a tenth of the time."""
    from outbox import Outbox

    file = tmp_path_factory.mktemp("outbox") / "outbox.db"
    Outbox.open(f"sqlite:///{file}", synchronous="NORMAL").close()
    return file


@pytest.fixture
def _outbox_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record, also where the environment switches that off. A test may override either of the two that use it."""
    monkeypatch.delenv("OUTBOX_CAPTURE", raising=False)


@pytest.fixture
def outbox_url(_outbox_template: Path, _outbox_records: None, tmp_path: Path) -> str:
    """The URL of the outbox's database: a new SQLite file in `tmp_path`, migrated. Override it for another."""
    return f"sqlite:///{shutil.copy(_outbox_template, tmp_path / 'outbox.db')}"


@pytest.fixture
def outbox(outbox_url: str, _outbox_records: None) -> Iterator[Outbox]:
    """An open outbox on `outbox_url`, which records whatever OUTBOX_CAPTURE says."""
    from outbox import Outbox

    with Outbox.open(outbox_url, synchronous="NORMAL") as opened:
        yield opened


@pytest.fixture
def outbox_server(request: pytest.FixtureRequest) -> Iterator[ScriptedServer]:
    """A real ingest server on this machine: `script(503, 200)` its answers, ask what it has `received(event)`."""
    from outbox.testing import ScriptedServer

    with ScriptedServer() as server:
        yield server
    request.node.add_report_section("teardown", "outbox_server", server.transcript())


@pytest.fixture
def outbox_client(outbox_server: ScriptedServer) -> Iterator[HttpClient]:
    """A client of `outbox_server` that is logged in."""
    from outbox import HttpClient

    with HttpClient(outbox_server.url, token="token-of-tests") as client:
        yield client


@pytest.fixture
def outbox_time() -> Iterator[TimeMachine]:
    """The time, which stands still until the test says `travel(minutes=5)`: due times and leases move along."""
    from outbox.testing import time_machine

    with time_machine() as machine:
        yield machine
