"""Whole stories over real HTTP, with the time moved by freezegun."""

import pytest

from builders import NOON, NOON_MS, row, rule_fired, statuses
from outbox import HttpClient, Outbox
from outbox.testing import Answer, Drop

pytestmark = pytest.mark.contract


def distinct(outbox: Outbox, count: int) -> list[int]:
    return outbox.enqueue_many(rule_fired(session_id=f"s{number}") for number in range(count))


def test_events_survive_an_outage_of_hours(outbox: Outbox, server, client, noon) -> None:
    distinct(outbox, 100)
    server.set_mode("down")
    for _ in range(6 * 12):
        outbox.flush_all(client)
        noon.travel(minutes=5)
    assert server.events == []

    server.set_mode("ok")
    for _ in range(12):
        outbox.flush_all(client)
        noon.travel(minutes=5)
    assert len(server.events) == 100
    assert (outbox.stats().pauses, outbox.stats().likely_cause) == ([], None)


def test_a_rate_limit_is_waited_for(outbox: Outbox, server, client, noon) -> None:
    (row_id,) = distinct(outbox, 1)
    server.script(Answer(429, body='{"error":"slow down","retryAfterSec":55}'))
    report = outbox.flush(client)
    assert (report.sent, report.rescheduled) == (0, 1)
    due = NOON_MS + 55_000 + (NOON_MS ^ row_id) % 13_750
    assert row(outbox, row_id).next_attempt_at_ms == due
    noon.travel(seconds=(due - NOON_MS) / 1_000 - 0.001)
    assert outbox.flush(client).claimed == 0
    noon.travel(seconds=0.001)
    assert outbox.flush(client).sent == 1


def test_a_revoked_token_parks_and_a_login_delivers(outbox: Outbox, server, client, noon) -> None:
    server.token = "token-of-tests"
    distinct(outbox, 3)
    with HttpClient(server.url, token="old-token-of-tests") as revoked:
        assert outbox.flush_all(revoked).parked == 3
    assert statuses(outbox) == ["parked"] * 3
    assert "old-token" not in row(outbox, 1).last_error
    assert row(outbox, 1).last_error.startswith("401 Unauthorized: ")
    noon.travel(seconds=12 * 60)
    assert "the service rejected the token 12 minutes ago" in outbox.stats().likely_cause
    assert "3 events are parked" in outbox.stats().likely_cause

    assert outbox.retry_now() == 3
    assert outbox.flush_all(client).sent == 3


def test_two_poisoned_rows_do_not_hold_up_the_rest(outbox: Outbox, server, client, noon) -> None:
    distinct(outbox, 30)
    outbox.enqueue_many(rule_fired(session_id=f"poison {number}") for number in range(2))
    outbox.enqueue_many(rule_fired(session_id=f"later {number}") for number in range(32))
    report = outbox.flush_all(client)
    assert (report.attempted, report.sent, report.abandoned) == (64, 62, 0)
    assert len(server.events) == 62
    for minute in range(20):
        outbox.enqueue(rule_fired(session_id=f"minute {minute}"))
        outbox.flush_all(client)
        noon.travel(seconds=60)
    assert statuses(outbox).count("abandoned") == 2
    for abandoned in outbox.find(status="abandoned"):
        assert abandoned.session_id.startswith("poison")
        assert abandoned.last_error.startswith("permanent: 422 ")


def test_a_batch_that_was_stored_but_not_acknowledged_is_stored_once(outbox: Outbox, server, client, noon) -> None:
    distinct(outbox, 5)
    server.script(Drop(stores=True))
    assert outbox.flush(client).rescheduled == 5
    assert len(server.events) == 5
    noon.travel(seconds=3_600)
    assert outbox.flush(client).sent == 5
    assert len(server.events) == 5
    first, second = (request.headers["Idempotency-Key"] for request in server.requests)
    assert first == second


def test_what_is_stored_is_what_goes_on_the_wire(outbox: Outbox, server, client) -> None:
    row_id = outbox.enqueue(
        {"event_type": "rule_fired", "rule_ids": ["ü"], "session_id": "s", "fired_at": NOON, "x": 1}
    )
    outbox.flush(client)
    assert list(server.stored.values()) == [row(outbox, row_id).payload_json]
