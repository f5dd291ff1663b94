"""A real browser at a real console."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flask import Flask
from playwright.sync_api import Browser, sync_playwright

from outbox.web.serving import Server
from servers import MissingError, skip

CHROMIUM = shutil.which("chromium")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run Debian's Chromium. A test is skipped where there is none."""
    if CHROMIUM is None:
        skip(MissingError("there is no browser; Debian's package chromium has one"))
    with sync_playwright() as playwright:
        # Root has no sandbox. /dev/shm may be as small as Docker makes it.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@contextmanager
def served(app: Flask) -> Iterator[str]:
    """Serve a console as `outbox web` does; yield its URL."""
    server = Server(app, "127.0.0.1", 0)
    waitress: Any = server._server
    waitress.adj.asyncore_loop_timeout = 0.05  # so that it soon sees that it was closed
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        waitress.close()
        thread.join()
        waitress.task_dispatcher.shutdown()
