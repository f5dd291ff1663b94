"""The failed tries of an event: which are kept, for how long, and what they cost events that never fail."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace

import pytest
from sqlalchemy import event, func, insert, select

from builders import DOWN, NOON_MS, OK, REJECTED, REVOKED, SLOW_DOWN, ScriptedClient, add_row, row, rule_fired
from outbox import HttpFailure, Outbox, Policy, Try, outcomes
from outbox.storage.engines import reading, writing
from outbox.storage.tables import tries
from outbox.tries import Failed

DAY_MS = 86_400_000

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("noon")]


def fail(outbox: Outbox, noon, *, times: int = 1) -> None:
    """Let each row fail so often, a minute after the other, always with its batch."""
    for _ in range(times):
        noon.travel(minutes=1)
        outbox.retry_now()
        assert outbox.flush(ScriptedClient(SLOW_DOWN)).rescheduled


def kept(outbox: Outbox) -> int:
    with reading(outbox.engine) as connection:
        return connection.scalar(select(func.count()).select_from(tries)) or 0


def minutes(outbox: Outbox, row_id: int) -> list[float]:
    return [(one.tried_at_ms - NOON_MS) / 60_000 for one in outbox.tries(row_id)]


# What is kept


@pytest.mark.parametrize(
    ("failure", "verdict"), [(DOWN, "transient"), (SLOW_DOWN, "rate limited"), (REVOKED, "auth blocked")]
)
@pytest.mark.traced
def test_a_shared_failure_is_a_try_of_each_event(outbox: Outbox, failure: HttpFailure, verdict: str) -> None:
    ids = outbox.enqueue_many([rule_fired()] * 3)
    outbox.flush(ScriptedClient(failure))
    for row_id in ids:
        (one,) = outbox.tries(row_id)
        assert one == Try(one.tried_at_ms, one.duration_ms, socket.gethostname(), verdict, str(failure))
        assert one.tried_at_ms >= NOON_MS
        assert 0 <= one.duration_ms < 60_000
        assert one.failure == row(outbox, row_id).last_error


def test_the_try_that_abandons_an_event_is_kept_with_the_reason(outbox: Outbox) -> None:
    old = add_row(outbox, created_at_ms=NOON_MS - 8 * DAY_MS)
    outbox.flush(ScriptedClient(DOWN))
    assert row(outbox, old).status == "abandoned"
    assert [(one.verdict, one.failure) for one in outbox.tries(old)] == [
        ("transient", "aged-out: 503 Service Unavailable")
    ]


def test_each_event_of_an_answer_has_its_own_failure(outbox: Outbox) -> None:
    accepted, down, rejected = outbox.enqueue_many([rule_fired()] * 3)
    client = ScriptedClient()
    client.upload = lambda _batch: {accepted: None, down: DOWN, rejected: REJECTED}  # type: ignore[method-assign]
    outbox.flush(client)
    assert outbox.tries(accepted) == []
    assert [one.verdict for one in outbox.tries(down)] == ["transient"]
    assert [(one.verdict, one.failure) for one in outbox.tries(rejected)] == [
        ("permanent", row(outbox, rejected).last_error)
    ]


def test_a_rejected_row_that_is_found_has_a_try_and_the_others_have_none(outbox: Outbox) -> None:
    bad, *good = outbox.enqueue_many([rule_fired()] * 4)
    outbox.flush(ScriptedClient(*[lambda batch: REJECTED if bad in {item.id for item in batch} else OK] * 9))
    assert [one.verdict for one in outbox.tries(bad)] == ["permanent"]
    assert kept(outbox) == 1
    assert {row(outbox, row_id).status for row_id in good} == {"sent"}


def test_the_last_five_tries_of_each_event_are_kept(outbox: Outbox, noon) -> None:
    ids = outbox.enqueue_many([rule_fired()] * 2)
    fail(outbox, noon, times=7)
    assert [minutes(outbox, row_id) for row_id in ids] == [[3, 4, 5, 6, 7]] * 2
    assert kept(outbox) == 10


def test_the_tries_stay_when_the_event_is_sent_or_returned_to_the_queue(outbox: Outbox) -> None:
    row_id = outbox.enqueue(rule_fired())
    outbox.flush(ScriptedClient(REVOKED))
    outbox.retry_now()
    assert len(outbox.tries(row_id)) == 1
    outbox.flush(ScriptedClient())
    assert row(outbox, row_id).status == "sent"
    assert [one.verdict for one in outbox.tries(row_id)] == ["auth blocked"]


def test_nothing_is_kept_of_what_was_not_tried(outbox: Outbox) -> None:
    add_row(outbox, payload_json="oops")
    assert outbox.flush(ScriptedClient()).abandoned == 1
    outbox.enqueue(rule_fired())
    with pytest.raises(KeyboardInterrupt):
        outbox.flush(ScriptedClient(KeyboardInterrupt()))
    assert kept(outbox) == 0


def test_a_failure_whose_lease_was_lost_leaves_no_try(outbox: Outbox) -> None:
    row_id = add_row(outbox, status="sending", next_attempt_at_ms=NOON_MS + 9)
    other = add_row(outbox, status="sending", next_attempt_at_ms=NOON_MS + 8)
    failures = {one: Failed(NOON_MS, 1, "auth blocked") for one in (row_id, other)}
    settled = outbox.store.claims.settle(
        [(one, outcomes.park(last_error="401")) for one in (row_id, other)],
        lease_until_ms=NOON_MS + 9,
        created_at_ms={},
        failed=failures,
    )
    assert settled.landed.total() == 1
    assert kept(outbox) == 0


@pytest.mark.traced
def test_an_event_that_got_the_id_of_another_has_no_tries(outbox: Outbox) -> None:
    """After a failover that lost rows, a server gives their ids to other events."""
    row_id = add_row(outbox)
    old = {"row_id": row_id, "created_at_ms": NOON_MS - 1, "tried_at_ms": NOON_MS, "duration_ms": 1}
    with writing(outbox.engine) as connection:
        connection.execute(insert(tries).values(host="h", verdict="transient", failure="503", **old))
    assert outbox.tries(row_id) == []
    outbox.purge(older_than=NOON_MS + 1)
    assert kept(outbox) == 1  # the event never failed, so its deletion does not look


@pytest.mark.parametrize("row_id", [-1, 0, 17, 2**63])
def test_an_event_that_is_not_there_has_no_tries(outbox: Outbox, row_id: int) -> None:
    assert outbox.tries(row_id) == []


@pytest.mark.sqlite
def test_the_name_of_the_host_is_cut_and_can_be_stored(outbox: Outbox, monkeypatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "h\udcff" + "x" * 300)
    row_id = outbox.enqueue(rule_fired())
    outbox.flush(ScriptedClient(DOWN))
    assert outbox.tries(row_id)[0].host == "h?" + "x" * 189


# Deleted with the event


def cap(outbox: Outbox) -> None:
    with Outbox(outbox.engine, policy=Policy(max_rows=1, when_full="trim")) as capped:
        capped.enqueue(rule_fired())


def bound(outbox: Outbox) -> None:
    with Outbox(outbox.engine, policy=Policy(max_undelivered=1, when_full="trim")) as bounded:
        bounded.enqueue(rule_fired())


def sent(outbox: Outbox, noon, **policy: int | None) -> None:
    """Let the events be sent, and the next flush delete them."""
    outbox.policy = replace(outbox.policy, **policy)
    outbox.retry_now()
    outbox.flush_all(ScriptedClient())
    noon.travel(days=1)
    outbox.enqueue_many([rule_fired()] * 2)
    outbox.flush_all(ScriptedClient())


WAYS: dict[str, Callable[..., object]] = {
    "cap": lambda outbox, _: cap(outbox),
    "max_undelivered": lambda outbox, _: bound(outbox),
    "max_sent": lambda outbox, noon: sent(outbox, noon, max_sent=1, keep_sent_ms=None),
    "retention": lambda outbox, noon: sent(outbox, noon, max_sent=None, keep_sent_ms=DAY_MS // 2),
    "purge": lambda outbox, _: outbox.purge(event_type="rule_fired"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.traced
def test_the_tries_are_deleted_with_the_event(outbox: Outbox, noon, way: str) -> None:
    ids = outbox.enqueue_many([rule_fired()] * 3)
    outbox.flush(ScriptedClient(SLOW_DOWN))
    assert kept(outbox) == 3
    WAYS[way](outbox, noon)
    assert [outbox.get(row_id) for row_id in ids] == [None] * 3
    assert kept(outbox) == 0


def test_the_tries_of_a_requeued_event_are_deleted_with_it(outbox: Outbox) -> None:
    """Its `last_error` is gone, so its deletion must go by when it was revived."""
    old = add_row(outbox, created_at_ms=NOON_MS - 8 * DAY_MS)
    outbox.flush(ScriptedClient(DOWN))
    outbox.requeue_abandoned(older_than=NOON_MS)
    assert (row(outbox, old).last_error, kept(outbox)) == (None, 1)
    outbox.purge(event_type="rule_fired")
    assert kept(outbox) == 0


# What it costs


@pytest.fixture
def statements(outbox: Outbox) -> list[str]:
    """The statements that name the table of tries. Our own engine of a file is not seen; this one is the host's."""
    seen: list[str] = []

    @event.listens_for(outbox.engine, "before_cursor_execute")
    def note(_connection, _cursor, statement: str, *_: object) -> None:
        if "observation_tries" in statement:
            seen.append(statement.split(maxsplit=1)[0])

    return seen


@pytest.mark.servers
def test_an_event_that_is_accepted_at_the_first_try_costs_nothing(
    outbox: Outbox, noon, statements: list[str]
) -> None:
    outbox.enqueue_many([rule_fired()] * 100)
    outbox.flush_all(ScriptedClient())
    noon.travel(days=8)
    outbox.flush_all(ScriptedClient())  # deletes the oldest
    outbox.enqueue(rule_fired())
    outbox.purge(event_type="rule_fired")
    assert statements == []


@pytest.mark.servers
def test_a_shared_failure_is_one_insert(outbox: Outbox, noon, statements: list[str]) -> None:
    outbox.enqueue_many([rule_fired()] * 64)
    outbox.flush(ScriptedClient(SLOW_DOWN))
    assert statements == ["INSERT"]
    noon.travel(minutes=2)
    outbox.retry_now()
    outbox.flush(ScriptedClient(SLOW_DOWN))
    assert statements == ["INSERT", "DELETE", "INSERT"]
    assert kept(outbox) == 128


def test_the_latest_tries_of_all_destinations_are_known(outbox: Outbox, noon) -> None:
    for destination, failure in (("billing", DOWN), ("search", SLOW_DOWN), ("billing", SLOW_DOWN)):
        noon.travel(minutes=1)
        outbox.retry_now()
        outbox.enqueue(rule_fired(), to=destination)
        outbox.flush(ScriptedClient(failure), destination=destination)
    latest = outbox.store.tries.latest()
    assert {name: [one.failure[:3] for one in found] for name, found in latest.items()} == {
        "billing": ["429", "503"],
        "search": ["429"],
    }
    assert [*outbox.store.tries.latest(most=1)] == ["billing"]
    outbox.purge(older_than=2**52)
    assert outbox.store.tries.latest() == {}
