import subprocess
import sys
import threading
from collections import Counter
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from freezegun import freeze_time

from builders import ScriptedClient, row, rule_fired, statuses
from outbox import Outbox, Policy

pytestmark = pytest.mark.contract

ROOT = Path(__file__).parent.parent

FLUSHER = """
import sys
from outbox import HttpClient, Outbox
url, server = sys.argv[1:]
with Outbox(url) as outbox, HttpClient(server, token="token-of-tests") as client:
    print("ready", flush=True)
    sys.stdin.readline()
    while outbox.pending_count():
        outbox.flush_all(client)
"""

ENQUEUER = """
import sys
from datetime import datetime, timezone
from outbox import Outbox, RuleFired
url, name = sys.argv[1:]
with Outbox(url) as outbox:
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(100):
        now = datetime.now(timezone.utc)
        outbox.enqueue(RuleFired(rule_ids=[], session_id=f"{name}-{number}", fired_at=now))
"""


def start(program: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run_at_once(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0


@pytest.mark.sqlite  # on servers: test_servers.py
def test_processes_that_flush_one_file_at_once_send_each_row_once(outbox: Outbox, url: str, server) -> None:
    outbox.enqueue_many(rule_fired(session_id=f"s{number}") for number in range(2_000))
    run_at_once([start(FLUSHER, url, server.url) for _ in range(4)])
    assert sum(request.events for request in server.requests) == len(server.stored) == 2_000
    assert Counter(statuses(outbox)) == {"sent": 2_000}


def test_processes_that_enqueue_and_flush_at_once_lose_nothing(outbox: Outbox, url: str, server, client) -> None:
    outbox.enqueue(rule_fired())
    flushers = [start(FLUSHER, url, server.url) for _ in range(2)]
    enqueuers = [start(ENQUEUER, url, str(number)) for number in range(3)]
    run_at_once([*enqueuers, *flushers])
    outbox.flush_all(client)
    assert len(server.stored) == 301
    assert Counter(statuses(outbox)) == {"sent": 301}


def test_threads_share_one_outbox_and_one_client(outbox: Outbox, server, client) -> None:
    outbox.enqueue_many(rule_fired(session_id=f"s{number}") for number in range(1_000))
    threads = [threading.Thread(target=outbox.flush_all, args=(client,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(request.events for request in server.requests) == len(server.stored) == 1_000
    assert Counter(statuses(outbox)) == {"sent": 1_000}


def test_threads_that_enqueue_at_the_cap_trim_to_it_exactly(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_rows=50), synchronous="NORMAL") as outbox:

        def enqueue() -> None:
            for _ in range(25):
                outbox.enqueue(rule_fired())

        threads = [threading.Thread(target=enqueue) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(statuses(outbox)) == 50
        assert outbox.stats().left_undelivered == 150


KILLED = """
import os, sys
from outbox import Outbox
class Client:
    logged_in = True
    def upload(self, batch):
        os._exit(9)
Outbox(sys.argv[1]).flush(Client())
"""


def test_what_a_killed_flusher_held_is_sent_by_the_next_after_the_lease(outbox: Outbox, url: str) -> None:
    row_id = outbox.enqueue(rule_fired())
    killed = start(KILLED, url)
    killed.communicate()
    assert killed.returncode == 9
    held = row(outbox, row_id)
    assert held.status == "sending"
    lease_end = datetime.fromtimestamp(0, timezone.utc) + timedelta(milliseconds=held.next_attempt_at_ms)
    with freeze_time(lease_end - timedelta(milliseconds=1)):
        assert outbox.flush(ScriptedClient()).claimed == 0
    with freeze_time(lease_end):
        assert outbox.flush(ScriptedClient()).sent == 1
    assert row(outbox, row_id).retry_count == 0
