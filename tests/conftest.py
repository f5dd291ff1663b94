from __future__ import annotations

import gc
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import freezegun.api
import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy import Dialect

import outbox
from builders import NOON
from conditions import forget_earlier_threads
from outbox import HttpClient, Outbox
from outbox.clock import SharedClock
from outbox.storage import transactions
from outbox.storage.store import Store
from outbox.testing import ScriptedServer, TimeMachine
from peers import certificate, forget_environment
from servers import NOT_TESTED, Servers, folder_in_memory
from storage import fourth_dialect  # noqa: F401 - registers it
from warm import Warm
from warm_python import WarmPython

# The entry point has loaded it already, but for a source tree that is not installed.
pytest_plugins = ["pytest_outbox"]

SERVERS = ("postgresql", "mariadb")

HERE = Path(__file__).parent
# Not importable by this name: the program, and the pytest plugin.
NOT_LOADED = {"outbox.__main__", "outbox.testing.pytest_outbox"}
# Folders whose tests run without coverage: other tests reach the same lines.
UNTRACED = {"policy_model", "promises", "simulation"}
# Folders whose tests take seconds each.
BEGINS = {"policy_model", "simulation"}

# How long an example takes, or its generation, says more about the machine than about the code.
settings.register_profile("outbox", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("outbox")


def pytest_configure(config: pytest.Config) -> None:
    """Put the files of the tests into memory if there is room, and read no certificates."""
    # Otherwise each program that a test starts would compile the package again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    if config.getoption("dist", "no") != "no":
        sys.settrace(None)  # this process only hands out the tests, so there is nothing to measure in it
    memory = folder_in_memory()
    if memory is not None:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", memory)
    # Each connection of PyMySQL reads the system's certificates, which takes 20 ms. No test needs them.
    os.environ["SSL_CERT_FILE"] = os.devnull


def pytest_collection_finish() -> None:
    """Let no garbage collection walk what is loaded by now: that took a tenth of the time of the tests."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Import all modules under coverage: a test without coverage may be the first to import one. Then pause it."""
    if sys.gettrace() is not None:
        for found in walk_packages(outbox.__path__, f"{outbox.__name__}."):
            if found.name not in NOT_LOADED:
                import_module(found.name)
    with _untraced():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take seconds each, so that all workers end at about the same time."""
    items.sort(key=lambda item: BEGINS.isdisjoint(item.path.relative_to(HERE).parts))


@contextmanager
def _untraced() -> Iterator[None]:
    here, in_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    try:
        yield
    finally:
        threading.settrace(in_threads)
        sys.settrace(here)


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
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """Pause coverage for tests that do not need it, because coverage doubles the time of a test."""
    with nullcontext() if _is_traced(item) else _untraced():
        return (yield)


def _is_traced(item: pytest.Item) -> bool:
    marker = item.get_closest_marker
    if marker("traced") or marker("untraced"):
        return marker("traced") is not None
    # On SQLite, a contract test already reaches every line that is not for another database.
    case = None if marker("servers") else getattr(item, "callspec", None)
    is_repeated = marker("contract") and case and case.params.get("database", "sqlite") != "sqlite"
    return not is_repeated and UNTRACED.isdisjoint(item.path.relative_to(HERE).parts)


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
    compile_one = transactions.Compiled

    def shared(statement: Any, dialect: Dialect) -> Any:
        can = (dialect.paramstyle, dialect.insert_returning, dialect.update_returning, dialect.server_version_info)
        key = (statement, type(dialect), *can)
        if key not in compiled:
            compiled[key] = compile_one(statement, dialect)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transactions, "Compiled", shared)
        yield


_latest_ms = [0]
_MOST_AHEAD_MS = 5_000


@pytest.fixture(autouse=True)
def _new_time() -> None:
    _latest_ms[0] = 0


@pytest.fixture(scope="session", autouse=True)
def _clocks_agree() -> Iterator[None]:
    """No outbox of this process sees an earlier time of a server than another one saw before.

    Each reads the server's clock by itself, and is ahead of it by as long as that took. On a busy machine, what one
    enqueues would not be due yet for another one that the test lets flush at once.
    """
    read = SharedClock.now_ms

    def never_earlier(clock: SharedClock) -> int:
        found = read(clock)
        is_of_a_store = isinstance(getattr(clock._read_ms, "__self__", None), Store)
        if is_of_a_store and not freezegun.api.freeze_factories:
            # A clock that is further apart is set wrong on purpose.
            if not found < _latest_ms[0] < found + _MOST_AHEAD_MS:
                _latest_ms[0] = found
            return _latest_ms[0]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedClock, "now_ms", never_earlier)
        yield


@pytest.fixture(scope="session", autouse=True)
def _frozen_quickly() -> Iterator[None]:
    """freezegun lists the names of every module each time; to count them takes 2 ms instead of 10."""
    look = freezegun.api._get_cached_module_attributes
    known: dict[int, tuple[int, list[tuple[str, Any]]]] = {}

    def clocks_of(module: Any) -> list[tuple[str, Any]]:
        names = len(getattr(module, "__dict__", ()))
        count, clocks = known.get(id(module), (-1, []))
        if count != names:
            clocks = look(module)
            known[id(module)] = names, clocks
        return clocks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(freezegun.api, "_get_cached_module_attributes", clocks_of)
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


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    found = Servers()
    yield found
    found.close()


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    started = Warm()
    yield started
    started.close()


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    started = WarmPython(HERE.parent, tmp_path_factory.mktemp("warm"))
    yield started
    started.close()


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
