"""What an operator does to the events that match; a row in flight is never touched."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from builders import DOWN, NOON_MS, ScriptedClient, add_row, columns_of, row, rule_fired, statuses
from outbox import ActionReport, BatchItem, ConfigurationError, Outbox, PurgeReport, Where
from outbox.pauses import SharedPause
from outbox.storage import finding

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("noon")]

LEASE = 60_000
ACTIONS: dict[str, Callable[..., Any]] = {
    "retry": Outbox.retry,
    "requeue": Outbox.requeue,
    "abandon": lambda outbox, where, **these: outbox.abandon(where=where, reason="not wanted", **these),
    "purge": lambda outbox, where, **these: outbox.purge(where=where, **these),
}
# Where each action starts from.
SOURCES = {"retry": "parked", "requeue": "abandoned", "abandon": "pending", "purge": "sent"}


def one_of_each(outbox: Outbox, **columns: Any) -> dict[str, int]:
    """A row in each situation, by its name."""
    return {
        "due": add_row(outbox, **columns),
        "waiting": add_row(outbox, next_attempt_at_ms=NOON_MS + 9, retry_count=2, last_error="503", **columns),
        "scheduled": add_row(outbox, next_attempt_at_ms=NOON_MS + 9, not_before_ms=NOON_MS + 9, **columns),
        "in flight": add_row(outbox, status="sending", next_attempt_at_ms=NOON_MS + 1, **columns),
        "lease over": add_row(outbox, status="sending", next_attempt_at_ms=NOON_MS, **columns),
        "sent": add_row(outbox, status="sent", sent_at_ms=NOON_MS, **columns),
        "parked": add_row(outbox, status="parked", last_error="401", suspected_at_ms=1, **columns),
        "abandoned": add_row(outbox, status="abandoned", last_error="permanent: 422", retry_count=3, **columns),
    }


@pytest.mark.parametrize(
    ("action", "changed"),
    [
        ("retry", {"waiting", "parked"}),
        ("requeue", {"abandoned"}),
        ("abandon", {"due", "waiting", "scheduled", "parked"}),
        ("purge", {"due", "waiting", "scheduled", "lease over", "sent", "parked", "abandoned"}),
    ],
)
def test_an_action_changes_the_rows_its_move_starts_from_and_none_in_flight(
    outbox: Outbox, action: str, changed: set[str]
) -> None:
    rows = one_of_each(outbox)
    before = {name: columns_of(row(outbox, row_id)) for name, row_id in rows.items()}

    dry = ACTIONS[action](outbox, Where(), dry_run=True)
    assert {name: columns_of(row(outbox, row_id)) for name, row_id in rows.items()} == before

    report = ACTIONS[action](outbox, Where())
    assert report == dry
    assert (report.total, report.in_flight, report.per_type) == (len(changed), 1, {"rule_fired": len(changed)})
    after = {
        name: found and columns_of(found) for name, row_id in rows.items() if (found := outbox.get(row_id)) or 1
    }
    assert {name for name in rows if after[name] != before[name]} == changed
    again = ACTIONS[action](outbox, Where())
    assert (again.total, again.in_flight) == (0, 1)


def test_retry_and_requeue_write_what_their_moves_write(outbox: Outbox) -> None:
    rows = one_of_each(outbox)
    outbox.retry(Where())
    outbox.requeue(Where())
    waiting, parked, abandoned = (row(outbox, rows[name]) for name in ("waiting", "parked", "abandoned"))
    assert (waiting.next_attempt_at_ms, waiting.retry_count, waiting.revived_at_ms) == (NOON_MS, 2, None)
    assert (parked.status, parked.last_error, parked.revived_at_ms) == ("pending", "401", NOON_MS)
    assert parked.suspected_at_ms is None
    assert (abandoned.status, abandoned.last_error, abandoned.retry_count) == ("pending", None, 0)
    assert abandoned.revived_at_ms == NOON_MS


def test_abandoned_events_say_why(outbox: Outbox) -> None:
    row_id = outbox.enqueue(rule_fired())
    assert outbox.abandon(where=Where(ids=[row_id]), reason="wrong price") == ActionReport(1, 0, {"rule_fired": 1})
    assert (row(outbox, row_id).status, row(outbox, row_id).last_error) == ("abandoned", "cancelled: wrong price")


def test_purged_events_are_counted_in_the_ledger(outbox: Outbox) -> None:
    outbox.enqueue_many([rule_fired()] * 3)
    kept = outbox.enqueue(rule_fired(session_id="kept"))
    assert outbox.purge(where=Where(contains='"session_id":"s1"')) == PurgeReport(3, 3, 0, {"rule_fired": 3})
    assert [tuple(entry) for entry in outbox.stats().deleted] == [("pending", "rule_fired", "purge", 3)]
    assert [found.id for found in outbox.find()] == [kept]


@pytest.mark.parametrize("action", ACTIONS)
def test_an_action_keeps_to_the_conditions(outbox: Outbox, action: str) -> None:
    source = {"status": SOURCES[action], "last_error": "401 no", "sent_at_ms": 1}
    wanted = add_row(
        outbox, **source, destination="billing", event_type="note", payload_json='{"event_type":"x17"}'
    )
    others = [
        add_row(outbox, **{**source, "last_error": "other"}),
        add_row(outbox, **source),
    ]
    before = [columns_of(row(outbox, one)) for one in others]
    for where in (
        Where(ids=[wanted]),
        Where(destination="billing"),
        Where(event_type="note"),
        Where(contains="x17"),
        Where(contains="x17", failure="401", status=source["status"]),
    ):
        assert ACTIONS[action](outbox, where, dry_run=True).per_type == {"note": 1}
    for nothing in (Where(status=[]), Where(contains="nowhere")):
        assert ACTIONS[action](outbox, nothing).total == 0
    assert ACTIONS[action](outbox, Where(contains="x17")).total == 1
    assert [columns_of(row(outbox, one)) for one in others] == before


@pytest.mark.parametrize("action", ACTIONS)
def test_an_action_goes_through_all_slices(outbox: Outbox, monkeypatch, action: str) -> None:
    monkeypatch.setattr(finding, "SLICE", 2)
    monkeypatch.setattr(finding, "_PAGE", 4)
    for _ in range(8):
        add_row(outbox, status=SOURCES[action], sent_at_ms=1)
    read: list[int] = []
    assert ACTIONS[action](outbox, Where(), progress=read.append).total == 8
    assert read == [2, 2, 2, 2]


@pytest.mark.parametrize("action", ACTIONS)
def test_a_row_that_is_claimed_before_it_is_locked_stays(outbox: Outbox, monkeypatch, action: str) -> None:
    found = add_row(outbox, status=SOURCES[action], sent_at_ms=1, next_attempt_at_ms=NOON_MS + 5)
    change = outbox.store.acting._change

    def claimed_meanwhile(acted, rows, these):
        with outbox.engine.begin() as connection:
            text = f"UPDATE observation_events SET status = 'sending', next_attempt_at_ms = {NOON_MS + LEASE}"
            connection.exec_driver_sql(text)
        return change(acted, rows, these)

    monkeypatch.setattr(outbox.store.acting, "_change", claimed_meanwhile)
    report = ACTIONS[action](outbox, Where())
    assert (report.total, report.in_flight, statuses(outbox)) == (0, 1, ["sending"])
    assert row(outbox, found).next_attempt_at_ms == NOON_MS + LEASE


@pytest.mark.parametrize(
    "meanwhile", ["status = 'abandoned'", "last_error = 'another'", f"next_attempt_at_ms = {NOON_MS}"]
)
def test_a_row_that_no_longer_matches_when_it_is_locked_stays(outbox: Outbox, monkeypatch, meanwhile: str) -> None:
    found = add_row(outbox, last_error="503", next_attempt_at_ms=NOON_MS + 5)
    change = outbox.store.acting._change

    def changed_meanwhile(acted, rows, these):
        with outbox.engine.begin() as connection:
            connection.exec_driver_sql(f"UPDATE observation_events SET {meanwhile}")
        return change(acted, rows, these)

    monkeypatch.setattr(outbox.store.acting, "_change", changed_meanwhile)
    assert outbox.purge(where=Where(status="pending", failure="503", due_after=NOON_MS)) == PurgeReport()
    assert outbox.get(found) is not None


def paused(outbox: Outbox) -> list[str]:
    return [pause.destination for pause in outbox.store.views.pauses(now_ms=NOON_MS)]


@pytest.mark.parametrize(
    ("where", "still_paused"),
    [
        ({}, []),
        ({"destination": "default"}, ["a"]),
        ({"destination": "a"}, [""]),
        ({"event_type": "note"}, [""]),
        ({"ids": [10**6]}, ["", "a"]),
    ],
)
def test_retry_ends_the_pauses_of_what_it_retries(outbox: Outbox, where: dict, still_paused: list[str]) -> None:
    for destination in ("", "a"):
        outbox.store.pauses.change(
            destination, lambda _: SharedPause(failures=1, number=1, until_ms=NOON_MS + 9, last_error="503")
        )
    add_row(outbox, destination="a", event_type="note")  # it is due, and only the pause holds it
    outbox.retry(Where(**where), dry_run=True)
    assert paused(outbox) == ["", "a"]
    outbox.retry(Where(**where))
    assert paused(outbox) == still_paused


def test_what_is_retried_is_sent_by_the_next_flush(outbox: Outbox) -> None:
    ids = outbox.enqueue_many([rule_fired()] * 3)
    outbox.flush(ScriptedClient(DOWN))
    assert outbox.retry(Where(ids=ids[1:])) == ActionReport(2, 0, {"rule_fired": 2})
    client = ScriptedClient()
    outbox.flush(client)
    assert client.ids == [ids[1:]]


def test_retrying_and_requeuing_wake_a_worker(outbox: Outbox) -> None:
    woken: list[int] = []
    outbox.wakers.add(lambda: woken.append(1))
    outbox.retry(Where())
    outbox.requeue(Where())
    assert len(woken) == 2


def test_an_action_names_what_it_needs(outbox: Outbox) -> None:
    for wrong, words in (
        (lambda: outbox.retry(None), "where is None, expected a Where"),
        (lambda: outbox.abandon(reason="x"), "where is None, expected a Where"),
        (lambda: outbox.abandon(1, "x", dry_run=True), "where is None, expected a Where"),
        (lambda: outbox.abandon(1, "x", where=Where()), "row_id and where are both given"),
        (lambda: outbox.abandon(where=Where(), reason=" "), "reason is ' ', expected a text"),
        (lambda: outbox.purge(where=Where(), event_type="x"), "where and event_type are both given"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            wrong()


def test_no_action_ever_touches_a_row_in_flight(outbox: Outbox) -> None:
    """Operators act on everything and replace the newest, again and again, while events come in and are sent."""
    done = threading.Event()
    acted: Counter[str] = Counter()

    def operate() -> None:
        while not done.is_set():
            for name, act in ACTIONS.items():
                few = [found.id for found in outbox.find(limit=5, newest_first=True)]
                acted["replace"] += len(outbox.replace(dict.fromkeys(few, rule_fired())).replaced)
                acted[name] += act(outbox, Where()).total

    held: list[str] = []

    def look(batch: list[BatchItem]) -> None:
        found = [outbox.get(item.id) for item in batch]
        held.extend("gone" if one is None else one.status for one in found)

    operator = threading.Thread(target=operate)
    operator.start()
    try:
        for _ in range(40):
            outbox.enqueue_many([rule_fired()] * 9)
            assert outbox.flush(ScriptedClient(look)).lost_leases == 0
            if len(held) > 50 and acted["purge"] and acted["replace"]:
                break
    finally:
        done.set()
        operator.join()
    assert {*held} == {"sending"}
