from __future__ import annotations

import gc
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from sqlalchemy import Dialect

from builders import NOON
from conditions import forget_earlier_threads
from outbox import HttpClient, Outbox
from outbox.storage import transactions
from outbox.testing import ScriptedServer, TimeMachine
from peers import certificate, forget_environment
from servers import NOT_TESTED, Servers, folder_in_memory
from storage import fourth_dialect  # noqa: F401 - registers it

# The entry point has loaded it already, but for a source tree that is not installed.
pytest_plugins = ["pytest_outbox"]

SERVERS = ("postgresql", "mariadb")

# How long an example takes says more about the machine than about the code.
settings.register_profile("outbox", deadline=None)
settings.load_profile("outbox")


def pytest_configure() -> None:
    """Put the files of the tests into memory if there is room."""
    memory = folder_in_memory()
    if memory is not None:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", memory)


def pytest_collection_finish() -> None:
    """Let no garbage collection walk what is loaded by now: that took a tenth of the time of the tests."""
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of the contract once for each database, but for those that speak SQLite's own language."""
    marker = metafunc.definition.get_closest_marker
    if "database" not in metafunc.fixturenames or marker("sqlite"):
        return
    only = marker("servers")
    # What a server answers hardly depends on the version of Python.
    servers = [
        pytest.param(name, marks=pytest.mark.slow) for name in (only.args if only and only.args else SERVERS)
    ]
    if only:
        metafunc.parametrize("database", servers, indirect=True)
    elif marker("contract"):
        fourth = [] if marker("programs") else [pytest.param("fourth", marks=pytest.mark.slow)]
        metafunc.parametrize("database", ["sqlite", *fourth, *servers], indirect=True)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Say in one line for each server that is not here what that costs, rather than in one for each test."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [NOT_TESTED.search(str(report.longrepr)) for report in skipped]
    if skipped:
        terminalreporter.stats["skipped"] = [
            report for report, why in zip(skipped, reasons, strict=True) if not why
        ]
    yield
    if skipped:
        terminalreporter.stats["skipped"] = skipped
    for reason, tests in Counter(why.group(1) for why in reasons if why).items():
        terminalreporter.write_line(f"{tests} tests not run: {reason}", yellow=True)


@pytest.fixture(autouse=True)
def _only_named_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the environment reaches a test, and no test reaches the user's own outbox."""
    forget_environment(monkeypatch)
    for name in (
        "OUTBOX_CAPTURE",
        "OUTBOX_CONFIG",
        "OUTBOX_DATABASE_URL",
        "OUTBOX_URL",
        "OUTBOX_TOKEN",
        "OUTBOX_TOKEN_FILE",
        "OUTBOX_HEARTBEAT",
        "OUTBOX_MAX_ROWS",
        "OUTBOX_MAX_UNDELIVERED",
        "OUTBOX_MAX_SENT",
        "OUTBOX_WHEN_FULL",
        "OUTBOX_KEEP_SENT",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture(autouse=True)
def _own_threads() -> None:
    forget_earlier_threads()


@pytest.fixture(scope="session", autouse=True)
def _compiled_once() -> Iterator[None]:
    """All outboxes of a run share what they compile: to compile it for each of them took a fifth of the run's time."""
    compiled: dict[Any, Any] = {}
    compile_one = transactions._Compiled

    def shared(statement: Any, dialect: Dialect) -> Any:
        can = (dialect.paramstyle, dialect.insert_returning, dialect.update_returning, dialect.server_version_info)
        key = (statement, type(dialect), *can)
        if key not in compiled:
            compiled[key] = compile_one(statement, dialect)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transactions, "_Compiled", shared)
        yield


@pytest.fixture(scope="session", autouse=True)
def _measuring() -> Iterator[str | None]:
    """What tells programs to measure coverage. It is taken away: to measure all that tests start costs minutes."""
    with pytest.MonkeyPatch.context() as patch:
        measuring = os.environ.get("COVERAGE_PROCESS_CONFIG")
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield measuring


@pytest.fixture
def measured(_measuring: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs that the test starts are measured: some lines run only at a terminal or after a signal."""
    if _measuring is not None:
        monkeypatch.setenv("COVERAGE_PROCESS_CONFIG", _measuring)


@pytest.fixture
def unmeasured() -> Iterator[None]:
    """Coverage pauses, for a search through many worlds: other tests reach each line, and measuring doubles its time."""
    here, in_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    yield
    threading.settrace(in_threads)
    sys.settrace(here)


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    found = Servers()
    yield found
    found.close()


@pytest.fixture
def database(request: pytest.FixtureRequest) -> str:
    """Which database the test runs on."""
    return getattr(request, "param", "sqlite")


@pytest.fixture
def url(database: str, tmp_path: Path, servers: Servers) -> str:
    """Where the test's outbox is or will be."""
    if database in ("sqlite", "fourth"):
        return f"{database}:///{tmp_path / 'outbox.db'}"
    return servers.empty_outbox(database).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the fourth database with the schema, to be copied as the plugin copies SQLite's."""
    file = tmp_path_factory.mktemp("fourth") / "outbox.db"
    Outbox.open(f"fourth:///{file}").close()
    return file


@pytest.fixture
def outbox_url(database: str, outbox_url: str, url: str, request: pytest.FixtureRequest) -> str:
    """The plugin's, on the database that the test runs on."""
    if database == "fourth":
        shutil.copy(request.getfixturevalue("template"), str(url).removeprefix("fourth:///"))
    return outbox_url if database == "sqlite" else url


@pytest.fixture(scope="session")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A certificate of this machine, for peers that speak TLS."""
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def server(outbox_server: ScriptedServer) -> ScriptedServer:
    return outbox_server


@pytest.fixture
def client(outbox_client: HttpClient) -> HttpClient:
    return outbox_client


@pytest.fixture
def noon(outbox_time: TimeMachine) -> TimeMachine:
    """The time, which stands still at NOON until the test moves it."""
    outbox_time.move_to(NOON)
    return outbox_time


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker tries again at once after a failure."""
    for name in ("waits._SHORTEST_BACKOFF_MS", "waits._LONGEST_BACKOFF_MS", "pauses.LONGEST_PAUSE_MS"):
        monkeypatch.setattr(f"outbox.{name}", 1)
