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

    def pass_on(number: int, _: object) -> None:
        try:  # noqa: SIM105 - contextlib would take longer to load
            peer.send(bytes([number]))
        except OSError:  # the fork has just ended, and how it did is on its way
            pass

    # A signal may come as soon as the program runs, and must not end this process. It can only follow the job.
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    for number in _PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    peer.connect(address)
    folder = os.getcwd()  # noqa: PTH109 - pathlib would take longer to load
    job = json.dumps({"arguments": arguments, "folder": folder, "environment": dict(os.environ)}).encode()
    socket.send_fds(peer, [len(job).to_bytes(4, "big")], [0, 1, 2])
    peer.sendall(job)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    code = int(peer.makefile().readline() or 1)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    _ask(sys.argv[1], sys.argv[2:])
