"""What the documentation shows is run, or checked where it can't be run here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from outbox import events
from outbox.cli import main
from outbox.testing import ScriptedServer

ROOT = Path(__file__).parent.parent
EXAMPLE_SERVER = "https://ingest.example.com"
PAGES = [
    "README.md",
    "docs/lifecycle.md",
    "docs/host-database.md",
    "docs/worker.md",
    "docs/observing.md",
    "docs/privacy.md",
    "docs/scaling.md",
]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def commands(page: str) -> list[str]:
    return [line[2:] for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]


@pytest.fixture
def server(outbox_server: ScriptedServer) -> ScriptedServer:
    outbox_server.token = "my-token"
    return outbox_server


def test_the_code_of_the_readme_runs(server: ScriptedServer, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    # The event types that the page defines go with this test.
    registry = events._Registry()
    for known in events.event_types().values():
        registry.add(known)
    monkeypatch.setattr(events, "_registry", registry)
    namespace: dict[str, object] = {}
    for block in blocks("README.md", "python"):
        exec(compile(block.replace(EXAMPLE_SERVER, server.url), "README.md", "exec"), namespace)  # noqa: S102 - our own
    assert capsys.readouterr().out == "1 sent; all is well\n"
    assert len(server.events) == 1
    assert namespace["outbox"].pending_count() == 1
    namespace["outbox"].close()
    namespace["engine"].dispose()


def test_the_code_about_the_worker_runs(server: ScriptedServer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks("docs/worker.md", "python"):
        exec(compile(block.replace(EXAMPLE_SERVER, server.url), "worker.md", "exec"), namespace)  # noqa: S102 - our own
    namespace["outbox"].flush_all(namespace["client"])
    assert len(server.events) == 1
    namespace["outbox"].close()
    namespace["client"].close()


def test_the_code_about_scaling_sends_each_tenant_to_one_partition(tmp_path: Path) -> None:
    namespace: dict[str, object] = {"urls": [f"sqlite:///{tmp_path}/{number}.db" for number in range(3)]}
    (block,) = blocks("docs/scaling.md", "python")
    exec(compile(block, "scaling.md", "exec"), namespace)  # noqa: S102 - our own
    outbox_of = namespace["outbox_of"]
    assert {outbox_of(f"tenant-{number}") for number in range(50)} == {*namespace["outboxes"]}
    assert outbox_of("tenant-1") is outbox_of("tenant-1")
    for outbox in namespace["outboxes"]:
        outbox.close()


def shell(lines: list[str], folder: Path) -> str:
    """Run the commands of a page in a folder, and return what they print."""
    result = subprocess.run(
        [
            "bash",
            "-c",
            "\n".join(["set -euo pipefail", f'outbox() {{ "{sys.executable}" -m outbox "$@"; }}', *lines]),
        ],
        cwd=folder,
        env=os.environ | {"HOME": str(folder), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_shell_commands_of_the_readme_run(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / ".token").write_text("my-token\n")
    run = [line for line in commands("README.md") if not line.startswith(("make ", "pip "))]
    said = shell([line.replace(EXAMPLE_SERVER, server.url) for line in run], tmp_path)
    assert len(server.events) == 1
    assert "sent" in said


def test_what_the_page_about_privacy_shows_redacts_and_purges(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    redacting, wiping = (compile(block, "privacy.md", "exec") for block in blocks("docs/privacy.md", "python"))
    exec(redacting, namespace)  # noqa: S102 - our own
    assert capsys.readouterr().out == "*.py\n"
    assert "shop" not in namespace["outbox"].get(1).payload_json
    said = shell(commands("docs/privacy.md"), tmp_path)
    assert said.startswith("0 would be purged, 0 of them undelivered\n1 purged, 1 of them undelivered\n")
    assert "deleted so far, 1 of them undelivered:" in said
    exec(wiping, namespace)  # noqa: S102 - our own
    left = [file.read_bytes() for file in tmp_path.glob("outbox.db*")]
    assert left
    assert not [data for data in left if b"no-float-money" in data]


def test_the_make_targets_and_the_package_of_the_readme_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"`?make ([a-z]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {"demo", "test", "check"} <= {*named}
    assert {*named} <= {*targets}
    project = re.search(r'^name = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"pip install {project.group(1)}" in commands("README.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_the_docs_name_exists(page: str) -> None:
    named = re.findall(r"`outbox ([a-z]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert named
    assert {*named} <= {*main.commands}


@pytest.mark.parametrize("page", [*PAGES, "docs/testing.md"])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / target).exists(), target
