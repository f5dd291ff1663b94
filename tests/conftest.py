from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from builders import NOON
from outbox import HttpClient
from outbox.testing import ScriptedServer, TimeMachine
from servers import NOT_TESTED, Servers

# The entry point has loaded it already, but for a source tree that is not installed.
pytest_plugins = ["pytest_outbox"]

SERVERS = ("postgresql", "mariadb")

# How long an example takes says more about the machine than about the code.
settings.register_profile("outbox", deadline=None)
settings.load_profile("outbox")


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
        metafunc.parametrize("database", ["sqlite", *servers], indirect=True)


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
    for name in ("OUTBOX_CAPTURE", "OUTBOX_DATABASE_URL", "OUTBOX_URL", "OUTBOX_TOKEN", "OUTBOX_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


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
    if database == "sqlite":
        return f"sqlite:///{tmp_path / 'outbox.db'}"
    return servers.empty_outbox(database).render_as_string(hide_password=False)


@pytest.fixture
def outbox_url(database: str, outbox_url: str, url: str) -> str:
    """The plugin's, on the database that the test runs on."""
    return outbox_url if database == "sqlite" else url


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
