"""Make the pictures of the page about the console: `python docs/screenshots.py`.

It needs Debian's package `chromium`. The events are made up; more of them come while the pictures are taken.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from outbox import BatchItem, HttpFailure, Outbox, UploadFailure
from outbox.clock import now_ms
from outbox.storage.engines import writing
from outbox.storage.sql import events
from outbox.web import create_app
from outbox.web.serving import Server

FOLDER = Path(__file__).resolve().parent
MINUTE_MS = 60_000
SECONDS_OF_TRAFFIC = 24
SECONDS_BETWEEN_TRIES = 3
TYPES = ("order_placed", "order_placed", "order_shipped", "invoice_paid", "order_placed")
DESTINATIONS = ("", "", "billing", "search")
BURSTS = (False, False, False, True, True)
"""In which steps orders are delivered, again and again."""

DOWN = HttpFailure(503, "Service Unavailable")
REJECTED = HttpFailure(422, "Unprocessable Entity", "amount must be positive")


class Service:
    """A client that accepts everything, or fails in the same way each time."""

    logged_in = True

    def __init__(self, failure: UploadFailure | None = None) -> None:
        self.failure = failure

    def upload(self, _batch: Sequence[BatchItem], /) -> None:
        """Accept, or fail."""
        if self.failure is not None:
            raise self.failure


def fill(outbox: Outbox) -> None:
    """Record the past of a shop: events that were delivered, rejected or wait for a service that is down."""
    now = now_ms()
    rows: list[dict[str, Any]] = []
    for number in range(1, 1_900):
        # Multiples of a large number spread the events over two days, in the same way for all pictures.
        created_ms = now - 3 * MINUTE_MS - number * 7_919_131 % (2 * 24 * 60 * MINUTE_MS)
        event_type = TYPES[number % len(TYPES)]
        order = {"event_type": event_type, "order": f"o-{number}", "total": {"amount": "49.90", "currency": "EUR"}}
        row = {
            "event_type": event_type,
            "destination": DESTINATIONS[number % len(DESTINATIONS)],
            "payload_json": json.dumps(
                {**order, "items": [{"sku": "shoes-42", "count": 1}]}, separators=(",", ":")
            ),
            "occurred_at_ms": created_ms,
            "created_at_ms": created_ms,
            "next_attempt_at_ms": created_ms,
            "status": "sent",
            "last_error": None,
            "retry_count": 0,
            "sent_at_ms": created_ms + 200 + number * 997 % 3_800,
        }
        if number % 200 == 0:
            failed = {"status": "abandoned", "last_error": f"permanent: {REJECTED}", "retry_count": 2}
            row |= {**failed, "sent_at_ms": None, "event_type": "invoice_paid", "destination": "billing"}
        rows.append(row)
    with writing(outbox.engine) as connection:
        connection.execute(events.insert(), rows)
    for number in range(37):
        outbox.enqueue({"event_type": "invoice_paid", "order": f"o-{1_900 + number}"}, to="billing")
    for _ in range(3):
        outbox.retry_now()
        outbox.flush(Service(DOWN), destination="billing")
        time.sleep(SECONDS_BETWEEN_TRIES)
    outbox.hold("search", why="the index moves to new machines", for_ms=90 * MINUTE_MS)


def trade(outbox: Outbox, is_over: threading.Event) -> None:
    """Enqueue orders, and deliver them in bursts, until it is over."""
    for step, is_in_burst in enumerate(cycle(BURSTS)):
        if is_over.wait(0.25):
            return
        outbox.enqueue_many(
            [{"event_type": "order_placed", "order": f"o-{step}-{place}"} for place in range(1 + step * 5 % 8)]
        )
        outbox.enqueue({"event_type": "invoice_paid", "order": f"o-{step}"}, to="billing")
        outbox.flush(Service(DOWN), destination="billing")
        if is_in_burst:
            outbox.flush(Service())


@contextmanager
def served(outbox: Outbox) -> Iterator[str]:
    """Serve the console to this machine, in a thread that ends with the program."""
    server = Server(create_app(outbox, may_enter=lambda _: True), "127.0.0.1", 0)
    threading.Thread(target=server.run, daemon=True).start()
    yield f"http://127.0.0.1:{server.port}"


def take(page: Page, name: str) -> None:
    """Write a picture of the window."""
    page.screenshot(path=FOLDER / f"console-{name}.png")


def main() -> None:
    """Take the pictures."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("there is no chromium; Debian's package chromium has it")
    is_over = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the pictures show the URL of the database
        outbox = Outbox.open("sqlite:///shop.db")
        fill(outbox)
        trading = threading.Thread(target=trade, args=(outbox, is_over))
        trading.start()
        with served(outbox) as url, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            light = browser.new_page(viewport={"width": 1180, "height": 820}, color_scheme="light")
            light.goto(url)
            light.wait_for_timeout(SECONDS_OF_TRAFFIC * 1_000)
            take(light, "overview")
            light.goto(f"{url}/events?status=abandoned")
            for place in (0, 1, 3):
                light.get_by_role("checkbox", name="Select event").nth(place).check()
            take(light, "events")
            dark = browser.new_page(viewport={"width": 1180, "height": 820}, color_scheme="dark")
            dark.goto(f"{url}/events?status=pending&destination=billing&order=oldest")
            dark.get_by_role("row").nth(1).get_by_role("link").click()
            take(dark, "event")
            browser.close()
        is_over.set()
        trading.join()
        outbox.close()
        os.chdir(FOLDER)


if __name__ == "__main__":
    main()
