"""Copies of the package, each with one bug, for tests of the tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import outbox
from warm import Warm


class Bug(NamedTuple):
    """A bug: in this file of the package this text, which is there once, is replaced."""

    file: str
    original: str
    mutant: str
    breaks: tuple[str, ...]
    """What may be found to be broken first."""
    first_seed: int = 0
    """Where the search begins: shortly before the world that notices it, so that the test takes seconds."""
    kinds: str = ""
    """The kinds of trouble of all worlds in the search. Given if too few other worlds notice the bug."""


def run_with(bug: Bug, warm: Warm, folder: Path, tests: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m` in a folder that holds a copy of the package with the bug, and a copy of a package of tests."""
    package = Path(outbox.__file__).parent
    # With what is compiled: to compile it again takes longer than most bugs take to be noticed.
    shutil.copytree(package, folder / "outbox")
    shutil.copytree(tests, folder / tests.name)
    if not (package / "migrations").is_dir():
        shutil.copytree(package.parent / "migrations", folder / "migrations")
    mutated = folder / "outbox" / bug.file
    for compiled in mutated.parent.glob(f"__pycache__/{mutated.stem}.*"):
        compiled.unlink()
    text = mutated.read_text("utf-8")
    assert text.count(bug.original) == 1, f"{bug.file} no longer has what is changed"
    mutated.write_text(text.replace(bug.original, bug.mutant), "utf-8")
    return warm.run(folder, *arguments)
