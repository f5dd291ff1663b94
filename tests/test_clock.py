import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from itertools import pairwise

import pytest
from freezegun import freeze_time
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine

from builders import NOON, NOON_MS, ROOT, ScriptedClient, row, rule_fired
from conditions import FOREVER_S, until
from outbox import Outbox, clock
from outbox.clock import SharedClock, monotonic_s, now_ms, utc


def test_the_time_is_the_systems() -> None:
    before = time.time_ns() // 1_000_000
    now = now_ms()
    assert before <= now <= time.time_ns() // 1_000_000


@pytest.mark.parametrize("offset_ms", [0, 1, 230, 231, 999, 1_001, 86_399_999])
def test_a_frozen_time_is_exact_to_the_millisecond(offset_ms: int) -> None:
    with freeze_time(NOON + timedelta(milliseconds=offset_ms)):
        assert now_ms() == NOON_MS + offset_ms


@settings(deadline=None)
@given(st.integers(0, 10**9))
def test_a_part_of_a_millisecond_is_left_out(microseconds: int) -> None:
    with freeze_time(NOON + timedelta(microseconds=microseconds)):
        assert now_ms() == NOON_MS + microseconds // 1_000


def test_a_frozen_time_stops_no_wait() -> None:
    with freeze_time(NOON):
        before = monotonic_s()
        while monotonic_s() == before:
            pass
    assert before < monotonic_s() < before + 60


LOADED_FROZEN = """
import pkgutil, sys, time, types
from freezegun import api, freeze_time

with freeze_time("2020-01-01") as frozen:
    import outbox, outbox.testing
    for module in pkgutil.iter_modules(outbox.__path__, "outbox."):
        if module.name != "outbox.__main__":
            __import__(module.name)
    from outbox.clock import SharedClock, monotonic_s, now_ms, utc
    assert now_ms() == 1_577_836_800_000
    frozen.tick(1)
    assert now_ms() == 1_577_836_801_000
    before = monotonic_s()
    while monotonic_s() == before:
        pass
    assert SharedClock(lambda: 1).now_ms() == 1_577_836_801_000  # a time that a test moves

assert abs(now_ms() - time.time() * 1_000) < 60_000
assert abs(monotonic_s() - time.monotonic()) < 60
assert 0 <= SharedClock(lambda: 1).now_ms() < 60_000
fakes = {value for name, value in vars(api).items() if name.startswith("fake_") and callable(value)}
fakes |= {api.FakeDatetime, api.FakeDate}
for name, module in sys.modules.items():
    if name.startswith("outbox"):
        for owner in (module, *(one for one in vars(module).values() if isinstance(one, type))):
            for attribute, value in vars(owner).items():
                if isinstance(value, (classmethod, staticmethod, types.MethodType)):
                    value = value.__func__
                assert not any(value is fake for fake in fakes), (name, owner, attribute)
"""


def test_no_module_keeps_the_clock_of_a_frozen_time_in_which_it_was_loaded() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED_FROZEN], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


SERVER_MS = 1_700_000_000_000


class Machine:
    """A server's clock and this host's monotonic one, both of which a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server_ms = SERVER_MS
        self.monotonic_s = 100.0
        self.answer_takes_s = 0.0
        self.readings = 0
        monkeypatch.setattr(clock, "monotonic_s", lambda: self.monotonic_s)
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
        monkeypatch.setattr(clock, "_system_ns", lambda own_ms=own_ms: own_ms * 1_000_000)
        assert machine.clock.now_ms() == SERVER_MS


@pytest.mark.parametrize("moved", [timedelta(days=-400), timedelta(seconds=-1), timedelta(seconds=1)])
def test_a_time_that_a_test_moves_counts_instead(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, moved: timedelta
) -> None:
    own = datetime.now(timezone.utc)
    with monkeypatch.context() as patch, freeze_time(own + moved):
        # Stands still, because on a slow machine it would reach the time that the test moved forward.
        patch.setattr(clock, "_system_ns", lambda: clock.epoch_ms(own) * 1_000_000)
        assert machine.clock.now_ms() == clock.now_ms()
    assert machine.clock.now_ms() == SERVER_MS


def test_a_frozen_time_can_be_ticked(machine: Machine) -> None:
    with freeze_time(NOON) as frozen:
        frozen.tick(61)
        assert machine.clock.now_ms() == NOON_MS + 61_000
    assert machine.readings == 0


@pytest.mark.servers
def test_the_servers_clock_tells_utc_in_milliseconds(outbox: Outbox) -> None:
    first = outbox.store._read_clock()
    times = [first, *(outbox.store._read_clock() for _ in range(5))]
    assert all(before <= after for before, after in pairwise(times))
    assert abs(first - time.time_ns() // 1_000_000) < 60_000


@pytest.mark.servers
def test_the_time_zone_of_a_session_does_not_change_the_servers_time(
    outbox: Outbox, url: str, database: str
) -> None:
    settings = {
        "postgresql": {"options": "-c timezone=Asia/Karachi"},
        "mariadb": {"init_command": "SET time_zone = '+05:00'"},
    }[database]
    engine = create_engine(url, connect_args=settings)
    with Outbox(engine) as hosted:
        assert abs(hosted.store._read_clock() - outbox.store._read_clock()) < 60_000
    engine.dispose()


WRONG_HOST = """
import sys
from outbox import Outbox, RuleFired
from outbox import clock

url, wrong_by_ms = sys.argv[1], int(sys.argv[2])
true_ms, true_ns = clock.now_ms, clock._system_ns
clock.now_ms = lambda: true_ms() + wrong_by_ms
clock._system_ns = lambda: true_ns() + wrong_by_ms * 1_000_000

class Client:
    logged_in = True
    def upload(self, batch):
        print(*(item.id for item in batch))

with Outbox(url) as outbox:
    outbox.flush(Client())
    fired_at = clock.dt.datetime.now(clock.dt.timezone.utc)
    print("enqueued", outbox.enqueue(RuleFired(rule_ids=[], session_id="s", fired_at=fired_at)))
"""


@pytest.mark.servers
@pytest.mark.parametrize("wrong_by_ms", [-600_000, 600_000])
def test_a_host_whose_clock_is_ten_minutes_off_changes_nothing(outbox: Outbox, url: str, wrong_by_ms: int) -> None:
    """It neither takes what another one holds, nor enqueues what is due ten minutes later or was due before."""
    held, waiting, due = outbox.enqueue_many([rule_fired()] * 3)
    now_ms = outbox.store.now_ms()
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
    # Each process is ahead of the server by as long as its look at the server's clock took.
    ahead_ms = FOREVER_S * 1_000
    assert now_ms - ahead_ms <= new.created_at_ms == new.next_attempt_at_ms <= outbox.store.now_ms() + ahead_ms
    assert now_ms - ahead_ms <= row(outbox, due).sent_at_ms <= new.created_at_ms
    until(lambda: outbox.flush(ScriptedClient()).sent == 1)


def test_a_number_that_is_no_date_stays_a_number() -> None:
    assert utc(NOON_MS) == "2026-11-24 12:00:00 UTC"
    assert utc(10**18) == f"{10**18} ms since 1970"
    assert utc("x") == "'x'"  # type: ignore[arg-type]
