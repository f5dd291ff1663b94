"""A receiver of events that is killed, with SIGKILL, between its commit and its answer: once for each event.

`python -m kill.receiver MODULE NAME FOLDER` serves the WSGI application NAME of MODULE, prints its port, and notes in
FOLDER for which events it was killed. A forked child serves; its parent starts the next one.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the name of the base class
        pass


def killed_once(application: Callable[..., Iterable[bytes]], folder: Path) -> Callable[..., list[bytes]]:
    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        body = list(application(environ, start_response))
        note = folder / environ["HTTP_WEBHOOK_ID"]
        if not note.exists():
            note.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return body

    return answer


def main(module: str, name: str, folder: str) -> None:
    application = killed_once(getattr(importlib.import_module(module), name), Path(folder))
    server = make_server("127.0.0.1", 0, application, handler_class=_Silent)
    print(server.server_port, flush=True)
    while True:
        child = os.fork()
        if child == 0:
            server.serve_forever()
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
