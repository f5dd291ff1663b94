"""The pytest plugin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

from builders import ROOT

PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")


def run_python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OUTBOX_CAPTURE": "false"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "pytest", "-W", "error", "-p", "no:cacheprovider", *options, cwd=folder)


def test_an_installed_outbox_brings_the_plugin_along() -> None:
    assert "pytest_outbox" in {found.value for found in entry_points(group="pytest11")}


def test_a_run_that_uses_no_fixture_loads_nothing_for_it() -> None:
    loaded = run_python("-c", "import sys, pytest_outbox; print(*sys.modules)").stdout.split()
    assert "pytest_outbox" in loaded
    assert not {"outbox", "sqlalchemy", "msgspec", "requests", "freezegun"} & {*loaded}


def test_the_page_is_what_its_tests_do(tmp_path: Path) -> None:
    files = re.findall(r"^`(\w+\.py)`[^\n]*\n\n```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(files) == PAGE.count("```python") == 5
    for name, text in files:
        (tmp_path / name).write_text(text, encoding="utf-8")
    done = run_pytest(tmp_path)
    tests = sum(text.count("\ndef test_") for _, text in files)
    assert f" {tests} passed" in done.stdout, done.stdout


def test_a_failure_tells_what_the_server_saw(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL).group(1))
    (told,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    failing = re.search(r"^> +(.+)", told).group(1)
    (tmp_path / "test_shop.py").write_text(
        "from datetime import datetime, timezone\n"
        "from shop import ship\n"
        "def test_shop(outbox, outbox_server, outbox_client, outbox_time):\n"
        "    outbox_time.move_to(datetime(2026, 11, 24, 12, tzinfo=timezone.utc))\n"
        "    ship(outbox, 'o-18')\n"
        "    outbox_server.script(503)\n"
        "    outbox.flush_all(outbox_client)\n"
        "    outbox.retry_now()\n"
        "    outbox.flush_all(outbox_client)\n"
        f"    {failing}\n"
    )
    done = run_pytest(tmp_path)
    before, after = told.split("...\n")
    assert before in done.stdout
    assert after in done.stdout
