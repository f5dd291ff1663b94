"""A PostgreSQL primary with a standby, which takes over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from builders import ScriptedClient, rule_fired, statuses
from outbox import Outbox
from rigs.load import IS_FULL, SHORT_LEASE, VERY_SHORT_LEASE, Load, events, rows
from rigs.standby import Pair, pair
from servers import MissingError, skip

pytestmark = [pytest.mark.rig, pytest.mark.slow]


@pytest.fixture
def two() -> Iterator[Pair]:
    """A primary and a standby with an empty outbox."""
    try:
        with pair() as started:
            Outbox.open(started.url).close()
            started.catch_up()
            yield started
    except MissingError as missing:
        skip(missing)


def start(load: Load, two: Pair) -> None:
    for number in range(2):
        load.enqueue(two.url, f"e{number}", every_s=0.01)
    for number in range(3):
        load.flush(two.url, f"f{number}")
    load.until_more(events(50, 300))


def finish(load: Load, two: Pair, what: str, more: str = "") -> None:
    load.until_more(events(50, 300))
    load.enough()
    load.until_sent(two.url)
    load.show(what, more)


def test_everybody_goes_on_after_a_planned_switchover(two: Pair) -> None:
    load = Load()
    start(load, two)
    two.make_read_only()
    took_s = load.until_all_went_on(two.promote)
    finish(load, two, "planned switchover", f", everybody went on within {took_s:.2f} s of the promotion")
    assert load.errors == []
    assert load.uploaded == dict.fromkeys(load.accepted, 1)
    assert took_s < 2 or not IS_FULL


def test_a_synchronous_failover_loses_nothing(two: Pair) -> None:
    two.make_synchronous()
    load = Load(SHORT_LEASE)
    start(load, two)
    two.kill()
    took_s = load.until_all_went_on(two.promote)
    finish(load, two, "synchronous failover", f", everybody went on within {took_s:.2f} s of the promotion")
    assert load.errors == []
    assert load.uploaded == dict.fromkeys(load.accepted, 1)


def test_an_asynchronous_failover_loses_what_the_standby_never_had_and_nothing_else(two: Pair) -> None:
    load = Load(VERY_SHORT_LEASE)
    start(load, two)
    two.cut()
    with Outbox(two.standby_url) as outbox:
        heard = {*rows(outbox)}
    load.until_more(events(50, 300))
    two.kill()
    load.until_all_went_on(two.promote)
    load.until_more(events(50, 300))
    load.enough()
    load.until_sent(two.url)
    with Outbox(two.url) as outbox:
        kept = {*rows(outbox)}
    lost = {*load.accepted} - kept
    load.show("asynchronous failover", f", {len(lost)} rows lost")
    assert lost
    assert not lost & heard
    assert kept <= {*load.uploaded}


def test_no_event_is_sent_by_the_upload_of_another_one_whose_row_id_it_has(two: Pair) -> None:
    """A flusher uploads events that the new primary never had. The new primary gives their row ids to others."""

    def fail_over(batch) -> None:
        two.kill()
        two.promote()
        with Outbox(two.url) as outbox:
            again = outbox.enqueue_many([rule_fired()] * 200)
        assert {item.id for item in batch} & {*again}

    two.cut()
    client = ScriptedClient(fail_over)
    with Outbox(two.url) as outbox:
        outbox.enqueue_many([rule_fired()] * 200)
        outbox.flush(client)
        assert statuses(outbox) == ["pending"] * 200
        outbox.flush_all(client)
        assert statuses(outbox) == ["sent"] * 200
    assert sum(client.sizes[1:]) == 200
