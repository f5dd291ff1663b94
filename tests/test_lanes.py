"""When a worker looks at one of its destinations, and what it logs about trouble there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from builders import ScriptedClient
from outbox import FlushReport, Verdict, lanes
from outbox.lanes import Lane
from outbox.waits import Look

NEVER_MS = 3_600_000
FAILED, IDLE, SENT = Look(has_failed=True), Look(), Look(goes_on=True)


@pytest.fixture
def lane() -> Lane:
    return Lane("billing", ScriptedClient(), NEVER_MS)


def test_the_wait_grows_only_while_looks_come_out_the_same_way(lane: Lane, monkeypatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(lanes, "wait_ms", lambda _, *, rounds, **__: seen.append(rounds) or 0)
    for look in (FAILED, FAILED, IDLE, IDLE, SENT, IDLE, FAILED):
        lane.plan(look, 0)
    assert seen == [0, 1, 0, 1, 2, 0, 0]


def waits(lane: Lane) -> bool:
    return lane.left_s > 0


@pytest.fixture
def long_waits(monkeypatch) -> None:
    monkeypatch.setattr(lanes, "wait_ms", lambda look, **_: 0 if look.goes_on else NEVER_MS)


@pytest.mark.usefixtures("long_waits")
def test_an_event_that_comes_during_a_look_is_looked_for_again(lane: Lane) -> None:
    lane.begin_look()
    lane.plan(IDLE, 0)
    assert waits(lane)
    lane.begin_look()
    lane.wake()
    lane.plan(IDLE, 0)
    assert not waits(lane)
    lane.begin_look()
    lane.plan(IDLE, 0)
    assert waits(lane)


@pytest.mark.usefixtures("long_waits")
@pytest.mark.parametrize("look", [FAILED, Look(paused_until_ms=1)])
def test_nothing_shortens_the_wait_after_a_failure(lane: Lane, look: Look) -> None:
    lane.plan(look, 0)
    lane.wake()
    lane.plan(SENT, 0)
    assert waits(lane)


def can_be_taken_by_another_thread(lane: Lane) -> bool:
    with ThreadPoolExecutor(1) as other:
        return other.submit(lambda: lane.turn.acquire(blocking=False) and lane.give_up_turn() is None).result()


def test_a_lane_in_trouble_is_tried_alone(lane: Lane) -> None:
    for is_troubled in (False, True):
        for _ in range(2):  # a thread that stays in its lane takes the turn again
            lane.turn.acquire()
        if is_troubled:
            lane.say_trouble(Verdict.TRANSIENT, "down", until_sent=True)
        assert lane.pass_turn_on() is not is_troubled
        assert can_be_taken_by_another_thread(lane) is not is_troubled
        lane.give_up_turn()
        assert can_be_taken_by_another_thread(lane)


@pytest.mark.parametrize(("destination", "to"), [("billing", " to billing"), ("", "")])
def test_trouble_and_its_end_name_the_destination_once(destination: str, to: str, caplog) -> None:
    lane = Lane(destination, ScriptedClient(), NEVER_MS)
    down = FlushReport(verdict=Verdict.TRANSIENT, failure="503 Down")
    for report in (down, down, FlushReport(), FlushReport(sent=1), FlushReport(sent=1)):
        lane.report(report)
    assert caplog.messages == [f"can't deliver{to}: 503 Down", f"delivering{to} again"]
    assert {record.destination for record in caplog.records} == {destination or "default"}
