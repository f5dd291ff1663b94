"""A real browser at a real console."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flask import Flask
from playwright.sync_api import Browser, expect, sync_playwright

from conditions import FOREVER_S
from outbox.web.serving import Server
from servers import MissingError, skip

CHROMIUM = shutil.which("chromium")

# How long a page is waited for. Playwright itself expects what a page shows within 5 s.
PATIENCE_MS = FOREVER_S * 1_000


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run Debian's Chromium. A test is skipped where there is none."""
    if CHROMIUM is None:
        skip(MissingError("there is no browser; Debian's package chromium has one"))
    with sync_playwright() as playwright:
        # Root has no sandbox. /dev/shm may be as small as Docker makes it.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments, timeout=4 * PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        yield browser
        browser.close()


@contextmanager
def served(app: Flask) -> Iterator[str]:
    """Serve a console as `outbox web` does; yield its URL. At the end, connections that are still open are closed."""
    server = Server(app, "127.0.0.1", 0)
    waitress: Any = server._server
    is_over = threading.Event()

    def serve() -> None:
        while not is_over.is_set():
            waitress.asyncore.loop(timeout=0.05, map=waitress._map, count=1)
        waitress.task_dispatcher.shutdown()
        waitress.asyncore.close_all(waitress._map)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        is_over.set()
        thread.join()
