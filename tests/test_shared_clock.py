"""The time on servers is the server's, so that hosts agree on what is due however wrong their own clocks are."""

import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path

import pytest
from freezegun import freeze_time

from builders import NOON, NOON_MS, ScriptedClient, row, rule_fired
from outbox import Outbox, clock
from outbox.clock import SharedClock

ROOT = Path(__file__).parent.parent
SERVER_MS = 1_700_000_000_000


class Machine:
    """A server's clock and this host's monotonic one, both of which a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server_ms = SERVER_MS
        self.monotonic_s = 100.0
        self.answer_takes_s = 0.0
        self.readings = 0
        monkeypatch.setattr(SharedClock, "_monotonic", lambda _: self.monotonic_s)
        self.clock = SharedClock(self.read_ms)

    def read_ms(self) -> int:
        self.readings += 1
        answer = self.server_ms
        self.pass_s(self.answer_takes_s)
        return answer

    def pass_s(self, seconds: float) -> None:
        self.monotonic_s += seconds
        self.server_ms += int(seconds * 1_000)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_the_time_is_the_servers(machine: Machine) -> None:
    assert machine.clock.now_ms() == SERVER_MS


def test_the_server_is_asked_once_in_ten_seconds_and_the_time_goes_on(machine: Machine) -> None:
    for _ in range(41):
        assert machine.clock.now_ms() == machine.server_ms
        machine.pass_s(0.25)
    assert machine.readings == 1
    machine.clock.now_ms()
    assert machine.readings == 2


def test_a_correction_of_the_servers_clock_is_followed_within_ten_seconds(machine: Machine) -> None:
    machine.clock.now_ms()
    machine.server_ms += 3_000
    machine.pass_s(10)
    assert machine.clock.now_ms() == machine.server_ms - 3_000
    machine.pass_s(0.25)
    assert machine.clock.now_ms() == machine.server_ms


def test_a_slow_answer_makes_the_time_no_earlier_than_the_servers(machine: Machine) -> None:
    machine.answer_takes_s = 0.5
    assert machine.server_ms <= machine.clock.now_ms() <= machine.server_ms + 500


def test_the_hosts_own_clock_changes_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong_by_ms in (-600_000, 600_000):
        own_ms = time.time_ns() // 1_000_000 + wrong_by_ms
        monkeypatch.setattr(clock, "now_ms", lambda own_ms=own_ms: own_ms)
        monkeypatch.setattr(SharedClock, "_system_ns", lambda _, own_ms=own_ms: own_ms * 1_000_000)
        assert machine.clock.now_ms() == SERVER_MS


@pytest.mark.parametrize("moved", [timedelta(days=-400), timedelta(seconds=-1), timedelta(seconds=1)])
def test_a_time_that_a_test_moves_counts_instead(machine: Machine, moved: timedelta) -> None:
    with freeze_time(datetime.now(timezone.utc) + moved):
        assert machine.clock.now_ms() == clock.now_ms()
    assert machine.clock.now_ms() == SERVER_MS


def test_a_frozen_time_can_be_ticked(machine: Machine) -> None:
    with freeze_time(NOON) as frozen:
        frozen.tick(61)
        assert machine.clock.now_ms() == NOON_MS + 61_000
    assert machine.readings == 0


@pytest.mark.servers
def test_the_servers_clock_tells_utc_in_milliseconds(outbox: Outbox) -> None:
    first = outbox._store._read_clock()
    times = [first, *(outbox._store._read_clock() for _ in range(5))]
    assert all(before <= after for before, after in pairwise(times))
    assert abs(first - time.time_ns() // 1_000_000) < 60_000


WRONG_HOST = """
import sys
from outbox import Outbox, RuleFired
from outbox import clock

url, wrong_by_ms = sys.argv[1], int(sys.argv[2])
true_ms, true_ns = clock.now_ms, clock.SharedClock._system_ns
clock.now_ms = lambda: true_ms() + wrong_by_ms
clock.SharedClock._system_ns = staticmethod(lambda: true_ns() + wrong_by_ms * 1_000_000)

class Client:
    logged_in = True
    def upload(self, batch):
        print(*(item.id for item in batch))

with Outbox(url) as outbox:
    outbox.flush(Client())
    fired_at = clock.datetime.now(clock.timezone.utc)
    print("enqueued", outbox.enqueue(RuleFired(rule_ids=[], session_id="s", fired_at=fired_at)))
"""


@pytest.mark.servers
@pytest.mark.parametrize("wrong_by_ms", [-600_000, 600_000])
def test_a_host_whose_clock_is_ten_minutes_off_changes_nothing(outbox: Outbox, url: str, wrong_by_ms: int) -> None:
    """It neither takes what another one holds, nor enqueues what is due ten minutes later or was due before."""
    held, waiting, due = outbox.enqueue_many([rule_fired()] * 3)
    now_ms = outbox._store.now_ms()
    with outbox.engine.begin() as connection:
        for row_id, status, at_ms in (
            (held, "sending", 60_000),
            (waiting, "pending", 300_000),
            (due, "pending", 0),
        ):
            connection.exec_driver_sql(
                f"UPDATE observation_events SET status = '{status}', next_attempt_at_ms = {now_ms + at_ms}"
                f" WHERE id = {row_id}"
            )
    other = subprocess.run(
        [sys.executable, "-c", WRONG_HOST, url, str(wrong_by_ms)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    uploaded, enqueued = other.stdout.splitlines()
    assert uploaded == str(due)
    new = row(outbox, int(enqueued.split()[1]))
    assert now_ms <= new.created_at_ms == new.next_attempt_at_ms <= outbox._store.now_ms()
    assert now_ms <= row(outbox, due).sent_at_ms <= new.created_at_ms
    assert outbox.flush(ScriptedClient()).sent == 1
