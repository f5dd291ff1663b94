"""docs/receive.md: a service that follows it does the work of each event once, although events arrive twice."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import requests

from builders import ROOT, run_code, statuses
from outbox import NO_AUTH, HttpClient, Outbox, StandardWebhooks

pytest.importorskip("flask")
pytest.importorskip("django")
pytestmark = pytest.mark.slow

SECRET = "whsec_c2VjcmV0LW9mLXRyaWFscw=="
EVENTS = 200
APPLICATIONS = {"receive_flask": "app", "receive_django": "application"}
# The tables of each, as their frameworks name them.
TABLES = {
    "receive_flask": ("received_events", "shipments"),
    "receive_django": ("warehouse_receivedevent", "warehouse_shipment"),
}


@pytest.fixture(params=list(APPLICATIONS))
def module(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A folder with a file for each event for which the receiver was killed."""
    folder = tmp_path / "killed"
    folder.mkdir()
    return folder


@pytest.fixture
def address(module: str, tmp_path: Path, killed: Path) -> Iterator[str]:
    """Where the receiver of the example listens."""
    file = tmp_path / "warehouse.db"
    environment = {
        **os.environ,
        "WEBHOOK_SECRET": SECRET,
        "DATABASE_URL": f"sqlite:///{file}",
        "DATABASE_FILE": str(file),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), str(ROOT / "tests")]),
    }
    arguments = ["-m", "kill.receiver", module, APPLICATIONS[module], killed]
    with subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/events"
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def sender(address: str) -> HttpClient:
    return HttpClient(address, path="", auth=NO_AUTH, format="single", sign=StandardWebhooks(SECRET))


def shipped(module: str, tmp_path: Path) -> tuple[int, list[int]]:
    received, shipments = TABLES[module]
    with closing(sqlite3.connect(tmp_path / "warehouse.db")) as connection:
        (number,) = connection.execute(f"SELECT count(*) FROM {received}").fetchone()
        return number, [
            one for (one,) in connection.execute(f"SELECT order_id FROM {shipments} ORDER BY order_id")
        ]


def test_a_receiver_that_is_killed_before_each_answer_does_each_work_once(
    outbox: Outbox, address: str, module: str, killed: Path, tmp_path: Path
) -> None:
    """Each event arrives twice: its sender saw no answer the first time."""
    outbox.enqueue_many({"event_type": "order_placed", "order_id": number} for number in range(EVENTS))
    with sender(address) as client:
        for _ in range(3 * EVENTS):
            if outbox.flush(client).failure is None and outbox.pending_count() == 0:
                break
            outbox.retry_now()
    assert statuses(outbox) == ["sent"] * EVENTS
    assert len(list(killed.iterdir())) == EVENTS
    assert shipped(module, tmp_path) == (EVENTS, list(range(EVENTS)))


def test_a_request_without_a_valid_signature_is_refused_and_does_nothing(
    address: str, module: str, tmp_path: Path, killed: Path
) -> None:
    (killed / "e-1").touch()
    headers = {"webhook-id": "e-1", "webhook-timestamp": "1", "webhook-signature": "v1,bm9uZQ=="}
    assert requests.post(address, json={"order_id": 1}, headers=headers, timeout=30).status_code == 401
    assert shipped(module, tmp_path) == (0, [])


def test_the_page_shows_what_the_examples_do_and_their_sender() -> None:
    page = (ROOT / "docs" / "receive.md").read_text(encoding="utf-8")
    flask, client, django = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert flask in (ROOT / "examples" / "receive_flask.py").read_text(encoding="utf-8")
    assert django in (ROOT / "examples" / "receive_django.py").read_text(encoding="utf-8")
    run_code(client, "docs/receive.md", {})
