"""The pytest plugin: fixtures for tests of programs that use outbox.

Every run of pytest loads this module, so each fixture imports what it needs only when it is used. The module is
not part of the package `outbox`, because importing that package imports SQLAlchemy.
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
    """Create one migrated file. Copying it takes a tenth of the time of a migration."""
    from outbox import Outbox

    file = tmp_path_factory.mktemp("outbox") / "outbox.db"
    Outbox.open(f"sqlite:///{file}", synchronous="NORMAL").close()
    return file


@pytest.fixture
def _outbox_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn capture on. Both `outbox` and `outbox_url` use this fixture, because a test may override either."""
    monkeypatch.delenv("OUTBOX_CAPTURE", raising=False)


@pytest.fixture
def outbox_url(_outbox_template: Path, _outbox_records: None, tmp_path: Path) -> str:
    """The URL of the test's database: a new migrated SQLite file in `tmp_path`. Override it to use another one."""
    return f"sqlite:///{shutil.copy(_outbox_template, tmp_path / 'outbox.db')}"


@pytest.fixture
def outbox(outbox_url: str, _outbox_records: None) -> Iterator[Outbox]:
    """An open outbox on `outbox_url`. It records even if OUTBOX_CAPTURE=false."""
    from outbox import Outbox

    with Outbox.open(outbox_url, synchronous="NORMAL") as opened:
        yield opened


@pytest.fixture
def outbox_server(request: pytest.FixtureRequest) -> Iterator[ScriptedServer]:
    """A real HTTP server on this machine. `script(503, 200)` sets answers; `received(event)` checks an event."""
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
    """The frozen time. `travel(minutes=5)` moves it, and with it due times and leases."""
    from outbox.testing import time_machine

    with time_machine() as machine:
        yield machine
