"""The pytest plugin, which these tests use themselves, and its page of the documentation."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from builders import NOON, rule_fired
from outbox import ConfigurationError, FixOutcome, InvalidEvent, Outbox, TransportFailure
from outbox.clock import now_ms
from outbox.testing import Answer, Drop

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")


def run_python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OUTBOX_CAPTURE": "false"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "pytest", "-W", "error", "-p", "no:cacheprovider", *options, cwd=folder)


# The plugin


def test_an_installed_outbox_brings_the_plugin_along() -> None:
    assert "pytest_outbox" in {found.value for found in entry_points(group="pytest11")}


def test_a_run_that_uses_no_fixture_loads_nothing_for_it() -> None:
    loaded = run_python("-c", "import sys, pytest_outbox; print(*sys.modules)").stdout.split()
    assert "pytest_outbox" in loaded
    assert not {"outbox", "sqlalchemy", "msgspec", "requests", "freezegun"} & {*loaded}


def test_the_page_is_what_its_tests_do(tmp_path: Path) -> None:
    files = re.findall(r"^`(\w+\.py)`[^\n]*\n\n```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(files) == PAGE.count("```python") == 5
    for name, text in files:
        (tmp_path / name).write_text(text, encoding="utf-8")
    done = run_pytest(tmp_path)
    tests = sum(text.count("\ndef test_") for _, text in files)
    assert f" {tests} passed" in done.stdout, done.stdout


def test_a_failure_tells_what_the_server_saw(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL).group(1))
    (told,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    failing = re.search(r"^> +(.+)", told).group(1)
    (tmp_path / "test_shop.py").write_text(
        "from datetime import datetime, timezone\n"
        "from shop import ship\n"
        "def test_shop(outbox, outbox_server, outbox_client, outbox_time):\n"
        "    outbox_time.move_to(datetime(2026, 11, 24, 12, tzinfo=timezone.utc))\n"
        "    ship(outbox, 'o-18')\n"
        "    outbox_server.script(503)\n"
        "    outbox.flush_all(outbox_client)\n"
        "    outbox.retry_now()\n"
        "    outbox.flush_all(outbox_client)\n"
        f"    {failing}\n"
    )
    done = run_pytest(tmp_path)
    before, after = told.split("...\n")
    assert before in done.stdout
    assert after in done.stdout


# The outbox


def test_the_outbox_is_a_new_private_file_that_records(
    outbox: Outbox, outbox_url: str, tmp_path: Path, monkeypatch
) -> None:
    file = tmp_path / "outbox.db"
    assert outbox_url == f"sqlite:///{file}"
    assert outbox.find() == []
    assert outbox.enqueue(rule_fired()) == 1
    with Outbox(outbox_url) as other:
        assert other.pending_count() == 1
    if os.name == "posix":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


# The server


def test_each_scripted_answer_is_given_once(outbox: Outbox, outbox_server, outbox_client) -> None:
    outbox_server.script(503, Answer(429, headers={"Retry-After": "1"}), Drop(), 200)
    for _ in range(5):
        outbox.enqueue(rule_fired())
        outbox.retry_now()
        outbox.flush(outbox_client)
    assert [request.status for request in outbox_server.requests] == [503, 429, None, 200, 200]


@pytest.fixture
def fixed(outbox: Outbox, outbox_server, outbox_client) -> FixOutcome:
    """An event that the server has received."""
    event = FixOutcome(rule_id="r1", session_id="s1", accepted=True, occurred_at=NOON)
    outbox.enqueue(event)
    outbox.flush(outbox_client)
    return event


def test_an_event_is_received_when_all_of_it_is(fixed: FixOutcome, outbox_server) -> None:
    assert outbox_server.received(fixed)
    elsewhere = NOON.astimezone(timezone(timedelta(hours=2)))
    assert outbox_server.received(FixOutcome(rule_id="r1", session_id="s1", accepted=True, occurred_at=elsewhere))
    for other in ({"rule_id": "r2"}, {"file_path": "a.py"}, {"accepted": False}):
        fields = {"rule_id": "r1", "session_id": "s1", "accepted": True, "occurred_at": NOON, **other}
        assert not outbox_server.received(FixOutcome(**fields))


def test_a_field_too_many_makes_it_another_event(outbox: Outbox, outbox_server, outbox_client) -> None:
    outbox.enqueue({"event_type": "rule_fired", "rule_ids": [], "session_id": "s", "fired_at": NOON, "more": 1})
    outbox.flush(outbox_client)
    assert outbox_server.received({"session_id": "s", "more": 1})
    told = repr(outbox_server.received(rule_fired(rule_ids=[], session_id="s")))
    assert told == "<not received: of 1 rule_fired the nearest has more 1 instead of None>"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"event_type": "fix_outcome"},
        {"rule_id": "r1", "accepted": True},
        {"occurred_at": "2026-11-24T12:00:00Z"},
        {"occurred_at": NOON.astimezone(timezone(timedelta(hours=-5)))},
    ],
)
def test_a_mapping_is_received_when_one_event_has_all_of_it(fixed, outbox_server, fields) -> None:
    assert outbox_server.received(fields)
    assert repr(outbox_server.received(fields)) == "<received>"


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"event_type": "rule_fired"}, "no rule_fired among 1 event"),
        (rule_fired(), "no rule_fired among 1 event"),
        (
            {"event_type": "fix_outcome", "rule_id": "r2", "session_id": "s1"},
            "of 1 fix_outcome the nearest has rule_id 'r1' instead of 'r2'",
        ),
        (
            {"rule_id": "r2", "file_path": "a.py"},
            "of 1 in all the nearest has rule_id 'r1' instead of 'r2', file_path None instead of 'a.py'",
        ),
    ],
)
def test_what_was_not_received_tells_what_was(fixed, outbox_server, wanted, why: str) -> None:
    received = outbox_server.received(wanted)
    assert not received
    assert repr(received) == f"<not received: {why}>"


def test_the_nearest_event_has_the_fewest_differences(outbox: Outbox, outbox_server, outbox_client) -> None:
    outbox.enqueue_many(rule_fired(session_id=name, intent=intent) for name in "ab" for intent in "cd")
    outbox.flush(outbox_client)
    told = repr(outbox_server.received({"session_id": "b", "intent": "d", "file_path": "x.py"}))
    assert told == "<not received: of 4 in all the nearest has file_path None instead of 'x.py'>"


def test_nothing_is_received_from_requests_that_failed(outbox: Outbox, outbox_server, outbox_client) -> None:
    assert repr(outbox_server.received({})) == "<not received: 0 requests brought no event>"
    assert outbox_server.transcript() == "no request"
    outbox_server.script(503)
    outbox.enqueue(rule_fired())
    outbox.flush(outbox_client)
    assert repr(outbox_server.received(rule_fired())) == "<not received: 1 request brought no event>"
    assert outbox_server.transcript() == "POST /cloud/observations: 1 event, answered 503"


def test_the_transcript_ends_with_the_last_twenty(outbox: Outbox, outbox_server, outbox_client) -> None:
    for number in range(21):
        outbox.enqueue(rule_fired(session_id=f"s{number}" + "x" * 300))
        outbox.flush(outbox_client)
    lines = outbox_server.transcript().splitlines()
    assert len(lines) == 40
    assert all(len(line) <= 220 for line in lines)
    assert '"s1x' in lines[20]


@pytest.mark.parametrize("wrong", ["o-17", None, 17])
def test_what_is_no_event_is_refused(outbox_server, wrong) -> None:
    with pytest.raises(InvalidEvent, match="expected an Event or a mapping with event_type, got"):
        outbox_server.received(wrong)


# The time


def test_the_time_stands_still_from_now_and_moves_when_told(outbox_time) -> None:
    start = outbox_time.now
    assert start.utcoffset() == timedelta(0)
    assert outbox_time.now == datetime.now(timezone.utc) == start
    outbox_time.travel(days=1, hours=2, minutes=3, seconds=4, milliseconds=5)
    assert outbox_time.now - start == timedelta(days=1, hours=2, minutes=3, seconds=4, milliseconds=5)
    outbox_time.travel(days=-2)
    assert datetime.now(timezone.utc) < start
    outbox_time.move_to(NOON.astimezone(timezone(timedelta(hours=3))))
    assert outbox_time.now == datetime.now(timezone.utc) == NOON
    with pytest.raises(ConfigurationError, match=r"when is \w*atetime.*, expected a datetime with a time zone"):
        outbox_time.move_to(datetime(2026, 11, 24))


def test_the_time_starts_where_the_clock_is_and_goes_on_afterwards(request) -> None:
    before = now_ms()
    assert before <= int(request.getfixturevalue("outbox_time").now.timestamp() * 1_000)


def test_what_is_loaded_while_the_time_stands_still_waits_by_the_real_clock() -> None:
    program = """
import time
from outbox.testing import time_machine
real = time.monotonic
with time_machine():
    from outbox import HttpClient, Worker, deadline, worker
    import psycopg
print(deadline._Deadline._now is real and worker._Run._clock is real)
"""
    done = run_python("-W", "error", "-c", program)
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.contract
def test_a_rescheduled_event_is_due_after_the_way_through_time(
    outbox: Outbox, outbox_server, outbox_client, outbox_time
) -> None:
    outbox_server.script(Answer(429, headers={"Retry-After": "60"}))
    outbox.enqueue(rule_fired())
    outbox.flush(outbox_client)
    outbox_time.travel(seconds=59)
    assert outbox.flush(outbox_client).claimed == 0
    outbox_time.travel(seconds=16)
    assert outbox.flush(outbox_client).sent == 1
    assert outbox_server.received(rule_fired())


@pytest.mark.contract
def test_a_lease_runs_out_on_the_way_through_time(
    outbox: Outbox, outbox_server, outbox_client, outbox_time
) -> None:
    class Stuck:
        logged_in = True

        def upload(self, batch) -> None:
            outbox_time.travel(seconds=59)
            assert outbox.flush(outbox_client).claimed == 0
            outbox_time.travel(seconds=1)
            assert outbox.flush(outbox_client).sent == 1
            raise TransportFailure("too late")

    outbox.enqueue(rule_fired())
    assert outbox.flush(Stuck()).lost_leases == 1
    assert outbox.stats().counts["sent"] == 1
