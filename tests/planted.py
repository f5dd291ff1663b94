"""Copies of the package, each with one bug, for tests of the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import outbox


class Bug(NamedTuple):
    """A bug: in this file of the package this text, which is there once, is replaced."""

    file: str
    original: str
    mutant: str
    breaks: tuple[str, ...]
    """What may be found to be broken first."""
    first_seed: int = 0
    """Where the search begins: shortly before the world that notices it, so that the test takes seconds."""


def run_with(bug: Bug, folder: Path, tests: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m` in a folder that holds a copy of the package with the bug, and a copy of a package of tests."""
    package = Path(outbox.__file__).parent
    nothing_built = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, folder / "outbox", ignore=nothing_built)
    shutil.copytree(tests, folder / tests.name, ignore=nothing_built)
    if not (package / "migrations").is_dir():
        shutil.copytree(package.parent / "migrations", folder / "migrations", ignore=nothing_built)
    mutated = folder / "outbox" / bug.file
    text = mutated.read_text("utf-8")
    assert text.count(bug.original) == 1, f"{bug.file} no longer has what is changed"
    mutated.write_text(text.replace(bug.original, bug.mutant), "utf-8")
    # Only the copy is to be found, from where the program starts.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
