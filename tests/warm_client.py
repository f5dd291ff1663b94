"""What a shell runs as `python`: the client of a warm process, which starts in hundredths of a second.

It hands its arguments, its environment and its standard streams to a fork of that process, passes signals on, and ends
as the fork ends. Other options than `-c` and `-m` are for the real Python, and so is a program with a closed standard
stream.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _ask(address: str, arguments: list[str]) -> None:
    """Let a fork run the program, and end as it ends."""
    is_known = bool(arguments) and (arguments[0] in ("-c", "-m") or not arguments[0].startswith("-"))
    if not is_known or any(stream is None for stream in (sys.stdin, sys.stdout, sys.stderr)):
        os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - it is this Python
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(address)
    folder = os.getcwd()  # noqa: PTH109 - pathlib would take longer to load
    job = {"arguments": arguments, "folder": folder, "environment": dict(os.environ)}
    socket.send_fds(peer, [b"job"], [0, 1, 2])
    peer.sendall(json.dumps(job).encode() + b"\n")
    for number in _PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: peer.send(bytes([number])))
    code = int(peer.makefile().readline() or 1)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    _ask(sys.argv[1], sys.argv[2:])
