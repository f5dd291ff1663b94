from __future__ import annotations

import pytest

from builders import add_row, rule_fired
from outbox.web import looks


@pytest.fixture
def clock(monkeypatch):
    """A monotonic clock that stands still."""
    clock = {"s": 1_000.0}
    monkeypatch.setattr(looks, "monotonic_s", lambda: clock["s"])
    return clock


@pytest.fixture
def seen(outbox):
    return looks.Looks(outbox, with_bodies=True)


def test_the_first_look_knows_no_rates(seen, clock):
    first = seen.look()
    assert (first.enqueued_per_s, first.sent_per_s) == (None, None)


def test_rates_count_deleted_events_too(seen, clock, outbox):
    outbox.enqueue(rule_fired())
    seen.look()
    outbox.purge(older_than=2**53)
    outbox.enqueue_many([rule_fired(), rule_fired()])
    add_row(outbox, status="sent", sent_at_ms=1)
    clock["s"] += 2
    look = seen.look()
    assert (look.enqueued_per_s, look.sent_per_s, look.over_s) == (1.5, 0.5, 2)
    assert [point.depth for point in look.points] == [1, 2]


def test_rates_cover_the_last_minute_only(seen, clock):
    for _ in range(5):
        seen.look()
        clock["s"] += 25
    assert seen.look().over_s == 50


def test_after_a_long_gap_the_rates_begin_again(seen, clock):
    seen.look()
    clock["s"] += 61
    look = seen.look()
    assert look.enqueued_per_s is None
    assert len(look.points) == 1


def test_many_readers_read_the_queue_once_a_second(seen, clock, outbox):
    first = seen.look()
    outbox.enqueue(rule_fired())
    clock["s"] += 0.9
    assert seen.look() is first
    clock["s"] += 0.1
    assert seen.look().stats.counts["pending"] == 1


def test_a_queue_that_is_slow_to_read_is_read_less_often(seen, clock, monkeypatch):
    read = seen._read

    def slow(at_s):
        clock["s"] += 2
        return read(at_s)

    monkeypatch.setattr(seen, "_read", slow)
    first = seen.look()
    clock["s"] += 19
    assert seen.look() is first
    clock["s"] += 1
    assert seen.look() is not first


def test_after_a_change_the_queue_is_read_again(seen, clock, outbox):
    seen.look()
    outbox.enqueue(rule_fired())
    seen.forget()
    assert seen.look().stats.counts["pending"] == 1
