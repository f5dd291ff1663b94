"""What no other tool checks about the shape of the package, read from its syntax trees."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "outbox"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

LONGEST = 320
LONG = {
    "cli/display.py",  # tables of words
}

pytestmark = pytest.mark.slow  # they read the source, which is the same on every Python

PLACES = {
    "alembic": ("schema.py",),
    "click": ("cli/",),
    "flask": ("web/",),
    "http.server": ("testing/",),
    "opentelemetry": ("spans.py", "meter.py"),
    "prometheus_client": ("metrics.py", "cli/sending.py"),
    "pytest": ("testing/",),
    "requests": ("upload/",),
    "rich": ("cli/",),
    "socketserver": ("testing/",),
    "transitions": ("lifecycle.py",),
    "urllib3": ("upload/",),
    "waitress": ("web/",),
    "werkzeug": ("web/",),
}
"""The libraries that only some modules may know. import-linter checks those that other modules could bring along."""

TESTS = Path(__file__).parents[1]
MIRRORED = (
    "test_*.py",
    "cli/test_*.py",
    "storage/test_*.py",
    "testing/test_*.py",
    "upload/test_*.py",
    "web/test_*.py",
)
OF_FOLDERS = {"test_benchmarks.py", "test_docs.py", "test_examples.py"}
TESTED_WITH = {
    "__main__.py": "test_init.py",
    "capture.py": "test_outbox.py",
    "held_claim.py": "test_flusher.py",
    "records.py": "test_flusher.py",
    "spans.py": "test_tracing.py",
    "search.py": "test_isolation.py",
    "search_order.py": "test_isolation.py",
    "cli/demo_stage.py": "cli/test_demo.py",
    "cli/endings.py": "cli/test_sending.py",
    "cli/filters.py": "cli/test_listing.py",
    "measures.py": "test_metrics.py",
    "operations.py": "test_outbox.py",
    "storage/claimed.py": "test_flusher.py",
    "storage/claims.py": "test_flusher.py",
    "storage/column_types.py": "test_schema.py",
    "storage/counts.py": "storage/test_bounds.py",
    "storage/deletion.py": "test_maintenance.py",
    "storage/dialects/mysql.py": "promises/test_servers.py",
    "storage/dialects/postgresql.py": "promises/test_servers.py",
    "storage/dialects/sqlite.py": "storage/test_sqlite_file.py",
    "storage/due_times.py": "storage/test_sqlite_claims.py",
    "storage/figures.py": "test_stats.py",
    "storage/indexes.py": "promises/test_growth.py",
    "storage/intake.py": "test_outbox.py",
    "storage/pings.py": "promises/test_servers.py",
    "storage/postgresql_listener.py": "test_wakeup.py",
    "storage/revival.py": "test_maintenance.py",
    "storage/row_counts.py": "storage/test_bounds.py",
    "storage/sql.py": "test_maintenance.py",
    "storage/sqlite_calls.py": "storage/test_sqlite_writer.py",
    "storage/store.py": "test_flusher.py",
    "storage/tables.py": "test_schema.py",
    "storage/transactions.py": "promises/test_servers.py",
    "storage/views.py": "test_outbox.py",
    "testing/answers.py": "testing/test_receiver.py",
    "testing/body.py": "testing/test_receiver.py",
    "testing/server.py": "testing/test_receiver.py",
    "upload/adapter.py": "upload/test_client.py",
    "upload/endpoint.py": "upload/test_client.py",
    "upload/secrets.py": "upload/test_auth.py",
    "web/console.py": "web/test_init.py",
    "web/errors.py": "web/test_security.py",
    "web/login.py": "web/test_security.py",
    "web/serving.py": "cli/test_console.py",
}
"""The modules without a test file of their own, and where their tests stand."""

OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in OF_NAMED_TUPLES


def own_names(tree: ast.ClassDef) -> set[str]:
    """Return the private names that a class defines: in its body, or as attributes of `self`."""
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}:
                names.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def reaches(tree: ast.AST, own: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield each use of a private name that belongs to another module or class."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"from {node.module} import {name.name}" for name in node.names if is_private(name.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            is_self = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls", "mcs"}
            is_super = isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
            if not is_self and not is_super and node.attr not in own:
                yield f"{ast.unparse(node)} in line {node.lineno}"
        inner = own | own_names(node) if isinstance(node, ast.ClassDef) else own
        yield from reaches(node, inner)


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (node.module, *(f"{node.module}.{name.name}" for name in node.names))


@cache
def imported_by(file: str) -> frozenset[str]:
    return frozenset(imported(ast.parse(FILES[file].read_text())))


@pytest.mark.parametrize(
    "program",
    [
        "from outbox.events import _registry",
        "from outbox import events\nevents._registry",
        "def f(row):\n    return row._status",
        "class A:\n    def f(self, other):\n        return other._b",
    ],
)
def test_the_check_finds_private_names_of_others(program: str) -> None:
    assert list(reaches(ast.parse(program)))


@pytest.mark.parametrize(
    "program",
    [
        "class A:\n    def f(self):\n        self._a = self._b",
        "class A:\n    def f(self, other):\n        self._a = other._a",
        "row._replace(a=1).__class__",
    ],
)
def test_the_check_accepts_own_private_names(program: str) -> None:
    assert not list(reaches(ast.parse(program)))


@pytest.mark.parametrize("file", FILES)
def test_no_module_reaches_into_the_private_names_of_another(file: str) -> None:
    text = FILES[file].read_text()
    # A library may leave no other way; then the line says so.
    excepted = [f"line {number}" for number, line in enumerate(text.splitlines(), 1) if "noqa: SLF001 - " in line]
    assert [found for found in reaches(ast.parse(text)) if not found.endswith(tuple(excepted))] == []


def test_no_file_is_too_long() -> None:
    lines = {file: len(path.read_text().splitlines()) for file, path in FILES.items()}
    assert {file: count for file, count in lines.items() if count > LONGEST and file not in LONG} == {}


@pytest.mark.parametrize("library", PLACES)
def test_a_library_is_imported_in_its_place_only(library: str) -> None:
    found = {
        file for file in FILES for name in imported_by(file) if name == library or name.startswith(f"{library}.")
    }
    assert found
    assert [file for file in found if not file.startswith(PLACES[library])] == []


@pytest.mark.parametrize("file", FILES)
def test_each_exception_to_a_check_has_its_reason(file: str) -> None:
    exceptions = re.findall(r"# (?:noqa|type: ignore).*", FILES[file].read_text())
    without = [one for one in exceptions if not re.search(r"noqa: [\w, ]+ - [\w`]|ignore\[[\w, -]+\]\s+# \w", one)]
    assert without == []


def test_each_module_has_its_tests_at_the_same_path() -> None:
    """What has no module of its name cuts across: it stands in `promises`, or is about a folder beside the package."""
    expected = {
        file: (Path(file).parent / f"test_{Path(file).stem.strip('_')}.py").as_posix()
        for file in FILES
        if file not in {"storage/__init__.py", "upload/__init__.py"}
    }
    without = {file for file, test in expected.items() if not (TESTS / test).is_file()}
    assert without - TESTED_WITH.keys() == set()
    assert all((TESTS / test).is_file() for test in TESTED_WITH.values())
    mirrored = {path.relative_to(TESTS).as_posix() for folder in MIRRORED for path in TESTS.glob(folder)}
    assert mirrored - set(expected.values()) == OF_FOLDERS


DATABASES = {"sqlite", "postgresql", "postgres", "mysql", "mariadb"}
PLACE_OF_DEFAULT = "storage/engines.py"  # the URL of the default file


def asks_for_database(tree: ast.AST) -> Iterator[str]:
    """Yield each place where the code names a database, or compares the name of SQLAlchemy's dialect or driver."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in DATABASES:
            yield f"{node.value!r} in line {node.lineno}"
        elif isinstance(node, (ast.Compare, ast.Subscript)):
            for part in ast.walk(node):
                is_of_dialect = isinstance(part, ast.Attribute) and ast.unparse(part.value).endswith("dialect")
                if is_of_dialect and part.attr in {"name", "driver"}:
                    yield f"{ast.unparse(part)} in line {node.lineno}"


@pytest.mark.parametrize(
    "program",
    [
        "engine.dialect.name == name",
        "STATEMENTS[connection.dialect.name]",
        "dialect.driver in drivers",
        "if name == 'mysql': pass",
    ],
)
def test_the_check_finds_questions_for_a_database(program: str) -> None:
    assert list(asks_for_database(ast.parse(program)))


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("storage/dialects/")])
def test_only_dialects_ask_for_a_database(file: str) -> None:
    found = list(asks_for_database(ast.parse(FILES[file].read_text())))
    assert len(found) == (file == PLACE_OF_DEFAULT), found
