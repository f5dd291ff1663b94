"""A process that has loaded the package, and forks for each program of a shell: a Python that starts at once.

Run as a program, this is that process. It listens at the address that it is given. The shell runs `warm_client`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

_CLIENT = Path(__file__).with_name("warm_client.py")
# What the commands import.
_LOADED = (
    "alembic.config",
    "alembic.runtime.migration",
    "outbox.cli",
    "outbox.schema",
    "outbox.testing",
    "outbox.upload",
    "outbox.worker",
    "psycopg",
    "pymysql",
    "rich.live",
    "rich.table",
    "sqlalchemy.dialects.mysql.pymysql",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite",
    "unittest.mock",
)


class WarmPython:
    """The process, a child of this one. `command` is what a shell runs as `python`."""

    def __init__(self, root: Path, folder: Path) -> None:

        address = str(folder / "python")
        self._process = subprocess.Popen(
            [sys.executable, __file__, address],
            env={**os.environ, "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._process.stdout.readline()
        # Without the site it starts in half the time.
        self.command = [sys.executable, "-I", "-S", str(_CLIENT), address]

    def close(self) -> None:
        self._process.communicate()


def _become(arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> None:
    """Make this process what a Python is that starts with these arguments; run the program."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    is_unbuffered = bool(environment.get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115 - it stays open until the process ends
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = open(number, "w", closefd=False)  # noqa: SIM115 - it stays open until the process ends
        stream.reconfigure(line_buffering=number == 2 or os.isatty(number), write_through=is_unbuffered)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.stderr.reconfigure(errors="backslashreplace")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    kind, *rest = arguments
    found_in = str(Path(folder, kind).parent)
    path = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [{"-c": "", "-m": folder}.get(kind, found_in), *filter(None, path), *sys.path[1:]]
    sys.argv = [kind, *rest] if kind not in ("-c", "-m") else ["-c" if kind == "-c" else rest[0], *rest[1:]]
    if kind == "-c":
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102 - `python -c` does this
    elif kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(kind, run_name="__main__")


def _look_after(peer: socket.socket) -> None:
    """Run the client's program in a fork, pass signals on to it, and tell the client how it ended."""
    size, streams, _, _ = socket.recv_fds(peer, 4, 3)
    # Not a byte more: a signal may follow.
    job = json.loads(peer.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    child = os.fork()
    if child == 0:
        peer.close()
        return _become(**job, streams=streams)

    for stream in streams:
        os.close(stream)  # else whoever reads the other end would wait for this process too

    def pass_on() -> None:
        with suppress(ProcessLookupError):  # it has just ended
            while number := peer.recv(1):
                os.kill(child, number[0])
            os.kill(child, signal.SIGKILL)  # the client was killed

    threading.Thread(target=pass_on, daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(BrokenPipeError):
        peer.sendall(f"{code}\n".encode())
    os._exit(0)


def _serve(address: str) -> socket.socket:
    """Fork a process for each client; return in that one, with the client."""
    for name in _LOADED:
        importlib.import_module(name)
    sys.path.remove(os.environ["PYTHONPATH"])  # each program brings its own
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(20)
        print(flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who look after a program
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            peer, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                return peer
            peer.close()
    sys.exit()  # the tests are over


if __name__ == "__main__":
    _look_after(_serve(sys.argv[1]))
