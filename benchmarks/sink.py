"""The least HTTP server that takes a POST: `python -m benchmarks.sink SECONDS`.

It answers each POST after so many seconds. It prints its port, and ends with its input.

It is a process of its own, so that it takes no time from the client's.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from socket import create_server, socket

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


@contextmanager
def sink(takes_s: float = 0.0) -> Iterator[str]:
    """Run one; yield its URL."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.sink", str(takes_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.stdin.close()


def _serve(connection: socket, takes_s: float) -> None:
    with connection:
        received = b""
        while True:
            head, found, rest = received.partition(b"\r\n\r\n")
            length = _LENGTH.search(head)
            missing = (int(length[1]) if length else 0) - len(rest)
            if found and missing <= 0:
                time.sleep(takes_s)
                connection.sendall(_ANSWER)
                received = rest[len(rest) + missing :]
                continue
            more = connection.recv(1 << 18)
            if not more:
                return
            received += more


def _main() -> None:
    server = create_server(("127.0.0.1", 0), backlog=100)
    print(server.getsockname()[1], flush=True)

    def accept() -> None:
        while True:
            threading.Thread(target=_serve, args=(server.accept()[0], float(sys.argv[1])), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    _main()
