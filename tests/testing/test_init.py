"""The pytest plugin, which these tests use themselves, and its page of the documentation."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from builders import NOON, ROOT, rule_fired
from outbox import ConfigurationError, FixOutcome, InvalidEvent, Outbox, TransportFailure
from outbox.clock import now_ms
from outbox.testing import Answer, Drop


def run_python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OUTBOX_CAPTURE": "false"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.usefixtures("measured")
def test_the_server_alone_needs_no_freezegun() -> None:
    program = """
import sys
sys.modules["freezegun"] = sys.modules["pytest"] = None  # as if they were not installed
from outbox import ConfigurationError, HttpClient, testing
class Item:
    id, event_id, payload_json = 1, "e", '{"a":1}'
with testing.ScriptedServer() as server, HttpClient(server.url, token="token-of-tests") as client:
    client.upload([Item])
print(server.events)
try:
    with testing.time_machine():
        pass
except ConfigurationError as error:
    print(error)
"""
    done = run_python("-W", "error", "-c", program)
    told = "time_machine needs freezegun: pip install 'observation-outbox[testing]'"
    assert (done.stdout, done.stderr) == (f"[{{'a': 1}}]\n{told}\n", "")


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


def test_the_server_shows_its_address(outbox_server) -> None:
    assert repr(outbox_server) == f"<server at {outbox_server.url}>"


def test_each_scripted_answer_is_given_once(outbox: Outbox, outbox_server, outbox_client) -> None:
    outbox_server.script(503, Answer(429, headers={"Retry-After": "1"}), Drop(), Drop(), 200)
    for _ in range(5):
        outbox.enqueue(rule_fired())
        outbox.retry_now()
        outbox.flush(outbox_client)
    assert [request.status for request in outbox_server.requests] == [503, 429, None, None, 200, 200]


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


@pytest.mark.parametrize("value", [object(), {1: object()}])
def test_a_field_that_json_can_not_hold_is_refused(outbox_server, value) -> None:
    with pytest.raises(InvalidEvent, match="^session_id is .*, expected a value that JSON can hold: "):
        outbox_server.received({"session_id": value})


@pytest.mark.parametrize("wrong", ["o-17", None, 17])
def test_what_is_no_event_is_refused(outbox_server, wrong) -> None:
    with pytest.raises(InvalidEvent, match="expected an Event, a mapping with event_type, .*, got"):
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


def test_a_driver_can_be_loaded_while_the_time_stands_still() -> None:
    program = """
from outbox.testing import time_machine
with time_machine():
    import psycopg
"""
    done = run_python("-W", "error", "-c", program)
    assert (done.stdout, done.stderr) == ("", "")


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
