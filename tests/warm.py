"""Runs modules of Python in forks of a process that has loaded the libraries: to load them took longer than most runs.

Run as a program it is that process: it reads a job a line, and answers with the return code of the fork.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path

# What the package and the tests import from elsewhere. The package itself comes from the folder of each job.
_LIBRARIES = (
    "alembic.command",
    "alembic.runtime.migration",
    "click",
    "msgspec",
    "requests",
    "sqlalchemy.dialects.sqlite",
    "sqlalchemy.orm",
    "transitions",
    "unittest.mock",
)


class Warm:
    """The process, a child of this one."""

    def __init__(self) -> None:
        # Only what a job brings along is to be found.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m` in a folder."""
        out, err = folder / "stdout", folder / "stderr"
        job = {"folder": str(folder), "arguments": [module, *arguments], "out": str(out), "err": str(err)}
        print(json.dumps(job), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return subprocess.CompletedProcess([module, *arguments], code, out.read_text(), err.read_text())

    def close(self) -> None:
        self._process.communicate()


def _run(folder: str, arguments: list[str], out: str, err: str) -> int:
    for number, name in ((1, out), (2, err)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    sys.path[0] = folder
    sys.argv = arguments
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _serve() -> None:
    for name in _LIBRARIES:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = _run(**json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
