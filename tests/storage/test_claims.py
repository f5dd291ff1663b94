"""Which rows a claim takes, in which order; and which rows a success brings back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, event, literal_column, select

from builders import NOON_MS, OK, ScriptedClient, add_row, row, rule_fired, statuses
from outbox import Outbox, Policy
from outbox.outcomes import WaitsFor
from outbox.storage.dialects import dialect_of
from outbox.storage.tables import ObservationEvent

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("noon")]

MINUTE_MS = 60_000
LATER_MS = NOON_MS + 30 * MINUTE_MS


def add(outbox: Outbox, *kinds: str | None, **columns: int | str) -> list[int]:
    """Add rows that are due, each older than the next; one for each reason to wait, None for a fresh one."""
    before = len(statuses(outbox))
    return [
        add_row(outbox, created_at_ms=NOON_MS - 1_000 + before + number, waits_for=waits_for, **columns)
        for number, waits_for in enumerate(kinds)
    ]


def claim(outbox: Outbox, batch_size: int = 3, now_ms: int = NOON_MS) -> list[int]:
    claimed = outbox.store.claims.claim(now_ms=now_ms, lease_until_ms=now_ms + MINUTE_MS, batch_size=batch_size)
    return [found.id for found in claimed.rows]


def test_claims_alternate_between_fresh_rows_and_rows_that_failed_before(outbox: Outbox) -> None:
    failed, fresh = add(outbox, *["service"] * 5), add(outbox, *[None] * 5)
    claims = [claim(outbox) for _ in range(5)]
    assert claims == [fresh[:3], failed[:3], fresh[3:], failed[3:], []]


def test_the_other_kind_is_taken_if_there_is_none_of_the_one(outbox: Outbox) -> None:
    failed = add(outbox, *["service"] * 5)
    assert [claim(outbox) for _ in range(2)] == [failed[:3], failed[3:]]
    assert claim(outbox) == []
    fresh = add(outbox, None)
    assert claim(outbox) == fresh


def test_a_claim_knows_when_rows_were_due_that_were_due_before_they_were_created(outbox: Outbox) -> None:
    due = {add(outbox, None, next_attempt_at_ms=at)[0]: at for at in (0, 5)}
    due |= dict.fromkeys(add(outbox, None, next_attempt_at_ms=NOON_MS - 1_000 + 2), NOON_MS - 1_000 + 2)
    claimed = outbox.store.claims.claim(now_ms=NOON_MS, lease_until_ms=NOON_MS + MINUTE_MS, batch_size=3)
    assert claimed.due_at_ms == due


@pytest.mark.parametrize("waits_for", [None, *(kind.value for kind in WaitsFor)])
@pytest.mark.parametrize("is_original", [False, True])
def test_a_claim_knows_when_each_row_was_due(outbox: Outbox, waits_for: str | None, *, is_original: bool) -> None:
    columns: list[dict[str, int | str]] = [{}, {"status": "sending", "lost_leases": 0}]
    due = {
        add(outbox, waits_for, next_attempt_at_ms=NOON_MS - 7 * number, **one)[0]: NOON_MS - 7 * number
        for number, one in enumerate(columns)
    }
    claimed = outbox.store.claims.claim(
        now_ms=NOON_MS, lease_until_ms=NOON_MS + MINUTE_MS, batch_size=3, is_original=is_original
    )
    assert {found.id for found in claimed.rows} == {*due}
    assert claimed.due_at_ms == due


def test_where_nothing_failed_claims_look_for_fresh_rows_first(outbox: Outbox) -> None:
    outbox.store.claims.take_turns(is_any_failed=False)
    failed, fresh = add(outbox, "service"), add(outbox, *[None] * 4)
    assert [claim(outbox) for _ in range(3)] == [fresh[:3], fresh[3:], failed]


def test_rows_that_wait_for_row_come_after_the_others_that_failed_before(outbox: Outbox) -> None:
    first, second, third, fourth = add(outbox, "row", "service", "row", "proof")
    assert [claim(outbox) for _ in range(2)] == [[second, fourth, first], [third]]


@pytest.mark.parametrize("waits_for", [None, *(kind.value for kind in WaitsFor)])
def test_rows_that_are_due_are_found_behind_those_that_are_not(outbox: Outbox, waits_for: str | None) -> None:
    add(outbox, *[waits_for] * 4, next_attempt_at_ms=LATER_MS)
    due = add(outbox, *[waits_for] * 4)
    assert [claim(outbox) for _ in range(3)] == [due[:3], due[3:], []]


def test_to_the_original_all_rows_are_one_kind(outbox: Outbox) -> None:
    ids = add(outbox, "row", None, "service", None, "proof", "delay")
    outbox.policy = Policy.original(batch_size=4)
    client = ScriptedClient()
    outbox.flush_all(client)
    assert client.ids == [ids[:4], ids[4:]]


def test_a_row_whose_senders_died_twice_is_claimed_alone(outbox: Outbox) -> None:
    ids = add(outbox, None, None, "service")
    for lost in (0, 1):
        claimed = [
            *claim(outbox, now_ms=NOON_MS + lost * MINUTE_MS),
            *claim(outbox, now_ms=NOON_MS + lost * MINUTE_MS),
        ]
        assert sorted(claimed) == ids
        assert [row(outbox, row_id).lost_leases for row_id in ids] == [lost] * 3
    alone = [claim(outbox, now_ms=NOON_MS + 2 * MINUTE_MS) for _ in range(4)]
    assert alone == [*([row_id] for row_id in ids), []]
    assert [row(outbox, row_id).lost_leases for row_id in ids] == [2] * 3


@pytest.mark.traced
def test_a_row_whose_senders_died_twice_holds_up_no_other(outbox: Outbox) -> None:
    (first,) = add(outbox, None)
    (dangerous,) = add(outbox, None, status="sending", lost_leases=1)
    (last,) = add(outbox, None)
    assert [claim(outbox) for _ in range(2)] == [[first, last], [dangerous]]


@pytest.mark.parametrize("answer", [OK, KeyboardInterrupt()])
def test_any_settlement_clears_the_lost_leases(outbox: Outbox, answer) -> None:
    (row_id,) = add(outbox, None, status="sending", lost_leases=3)
    if answer is OK:
        outbox.flush(ScriptedClient())
    else:
        with pytest.raises(KeyboardInterrupt):
            outbox.flush(ScriptedClient(answer))
    assert row(outbox, row_id).lost_leases == 0


_TIMES = range(NOON_MS - 3, NOON_MS + 3)


@pytest.fixture(scope="module")
def crowded() -> Iterator[Outbox]:
    with Outbox.open("sqlite:///file:claims?mode=memory&uri=true") as opened:
        yield opened


@pytest.mark.sqlite
@settings(max_examples=60)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(("pending", "sending", "parked")),
            st.sampled_from((None, "service", "proof", "row")),
            st.sampled_from(_TIMES),
            st.sampled_from(_TIMES),
        ),
        max_size=12,
    ),
    batch_size=st.integers(1, 4),
)
@pytest.mark.untraced
def test_a_claim_takes_the_first_of_its_kind_that_are_due(crowded: Outbox, rows, batch_size: int) -> None:
    with crowded.engine.begin() as connection:
        connection.execute(delete(ObservationEvent))
    crowded.store.claims._turns[""].took_failed = True  # fresh rows are next
    kinds: dict[bool, list[tuple[bool, int, int]]] = {False: [], True: []}
    for status, waits_for, created_at_ms, due_ms in rows:
        row_id = add_row(
            crowded,
            status=status,
            waits_for=waits_for,
            created_at_ms=created_at_ms,
            next_attempt_at_ms=due_ms,
        )
        if status != "parked" and due_ms <= NOON_MS:
            kinds[waits_for is not None].append((waits_for == "row", created_at_ms, row_id))
    first, second = ([row_id for *_, row_id in sorted(kinds[kind])[:batch_size]] for kind in (False, True))
    found = [claim(crowded, batch_size) for _ in range(2)]
    assert found[0] == (first or second)
    if first and second:
        assert found[1] == second


# What a success brings back


def due_times(outbox: Outbox, ids: list[int]) -> list[int]:
    return [row(outbox, row_id).next_attempt_at_ms for row_id in ids]


def revive(outbox: Outbox, *, ended_failures: int = 0, **settings: int) -> int:
    return outbox.store.revival.revive(now_ms=NOON_MS, policy=Policy(**settings), ended_failures=ended_failures)


def test_a_success_revives_the_oldest_rows_that_are_due_later(outbox: Outbox) -> None:
    ids = add(outbox, "service", "delay", "row", "service", "service", next_attempt_at_ms=LATER_MS)
    soon = add(outbox, "service", next_attempt_at_ms=NOON_MS + 5_000)
    assert revive(outbox, revive_limit=2, ended_failures=2) == 2
    due = [NOON_MS + row_id for row_id in ids]
    assert due_times(outbox, ids) == [due[0], LATER_MS, LATER_MS, due[3], LATER_MS]
    assert revive(outbox, revive_limit=2, ended_failures=3) == 2
    assert due_times(outbox, ids) == [due[0], LATER_MS, due[2], due[3], due[4]]
    assert due_times(outbox, soon) == [NOON_MS + 5_000]
    assert revive(outbox, ended_failures=3) == 0


def test_a_success_brings_suspects_forward_and_makes_those_due_that_can_be_proven(outbox: Outbox) -> None:
    young = add(outbox, "proof", next_attempt_at_ms=LATER_MS, suspected_at_ms=NOON_MS - MINUTE_MS)
    old = add(outbox, "proof", next_attempt_at_ms=LATER_MS, suspected_at_ms=NOON_MS - 10 * MINUTE_MS)
    odd = add(outbox, "proof", next_attempt_at_ms=LATER_MS)
    soon = add(outbox, "proof", next_attempt_at_ms=NOON_MS + 2 * MINUTE_MS, suspected_at_ms=NOON_MS - MINUTE_MS)
    assert revive(outbox) == 3
    assert due_times(outbox, young) == [NOON_MS + MINUTE_MS + young[0]]
    assert due_times(outbox, [*old, *odd]) == [NOON_MS + row_id for row_id in (*old, *odd)]
    assert due_times(outbox, soon) == [NOON_MS + 2 * MINUTE_MS]


def test_a_revived_row_keeps_its_failures(outbox: Outbox) -> None:
    (row_id,) = add(outbox, "service", next_attempt_at_ms=LATER_MS, retry_count=4, last_error="503")
    outbox.enqueue(rule_fired())
    assert outbox.flush(ScriptedClient()).sent == 1
    revived = row(outbox, row_id)
    assert (revived.next_attempt_at_ms, revived.retry_count, revived.last_error, revived.waits_for) == (
        NOON_MS + row_id,
        4,
        "503",
        "service",
    )


def test_the_original_revives_nothing(outbox: Outbox) -> None:
    (row_id,) = add(outbox, "service", next_attempt_at_ms=LATER_MS)
    outbox.policy = Policy.original()
    outbox.enqueue(rule_fired())
    assert outbox.flush(ScriptedClient()).sent == 1
    assert due_times(outbox, [row_id]) == [LATER_MS]


def test_one_parked_row_a_minute_is_tried_in_turn_while_nothing_is_due(outbox: Outbox, noon) -> None:
    ids = [add_row(outbox, status="parked", created_at_ms=NOON_MS - age) for age in (3, 2, 1)]
    tried = []
    for _ in range(5):
        outbox.flush(ScriptedClient())
        outbox.flush(ScriptedClient())
        unparked = [found.id for found in outbox.find(status="pending")]
        tried += unparked
        for row_id in unparked:
            park(outbox, row_id)
        noon.travel(seconds=60)
    assert tried == [*ids, *ids[:2]]


def test_a_clock_that_was_set_back_keeps_no_parked_row_back(outbox: Outbox, noon) -> None:
    first, _ = (add_row(outbox, status="parked", created_at_ms=NOON_MS - age) for age in (2, 1))
    outbox.flush(ScriptedClient())
    park(outbox, first)
    noon.travel(seconds=-3_600)
    outbox.flush(ScriptedClient())
    assert statuses(outbox) == ["parked", "pending"]


def park(outbox: Outbox, row_id: int) -> None:
    table = ObservationEvent.__table__
    with outbox.engine.begin() as connection:
        connection.execute(table.update().where(table.c.id == row_id).values(status="parked"))


def test_a_parked_row_gets_a_full_new_chance(outbox: Outbox) -> None:
    row_id = add_row(
        outbox,
        status="parked",
        retry_count=3,
        last_error="401",
        waits_for="proof",
        suspected_at_ms=NOON_MS - 1,
    )
    outbox.flush(ScriptedClient())
    unparked = row(outbox, row_id)
    assert (unparked.status, unparked.retry_count, unparked.last_error) == ("pending", 0, None)
    assert (unparked.waits_for, unparked.suspected_at_ms, unparked.revived_at_ms) == (None, None, NOON_MS)


def test_a_good_row_waits_for_no_row_that_failed_before(outbox: Outbox) -> None:
    failed = add(outbox, *chain.from_iterable([["proof", "row"]] * 100))
    (good,) = add(outbox, None)
    client = ScriptedClient()
    outbox.flush(client)
    assert client.ids == [[good]]
    outbox.flush(client)
    assert client.ids[1] == failed[:128:2]


def statements(outbox: Outbox) -> list[str]:
    found: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        found.append(statement)

    event.listen(outbox.engine, "before_cursor_execute", note)
    return found


@pytest.mark.servers("postgresql", "mariadb")
def test_a_flush_that_finds_nothing_takes_three_statements(outbox: Outbox) -> None:
    add(outbox, None, *WaitsFor, next_attempt_at_ms=LATER_MS)
    outbox.flush(ScriptedClient())
    run = statements(outbox)
    assert outbox.flush(ScriptedClient()).claimed == 0
    assert len(run) == 3  # the claim, the query whether a row is due, and the query for chores


@pytest.mark.servers("postgresql", "mariadb")
def test_a_flush_of_one_event_takes_few_statements(outbox: Outbox) -> None:
    outbox.flush(ScriptedClient())
    outbox.enqueue(rule_fired())
    run = statements(outbox)
    assert outbox.flush(ScriptedClient()).sent == 1
    by_claim_and_delivery = {"postgresql": 2, "mysql": 5}
    assert len(run) == by_claim_and_delivery[outbox.engine.dialect.name]


ROWS = [
    {"status": status, "lost_leases": lost_leases, "waits_for": waits_for, **times}
    for (status, lost_leases), waits_for, times in product(
        (("pending", 0), ("sending", 0), ("sending", 1), ("parked", 0), ("sent", 0), ("abandoned", 0)),
        (None, *WaitsFor, "a", "later", "z"),
        (
            {"next_attempt_at_ms": NOON_MS},
            {"next_attempt_at_ms": NOON_MS, "created_at_ms": NOON_MS + 9},
            {"next_attempt_at_ms": LATER_MS},
            {"next_attempt_at_ms": 2**53},
            {"next_attempt_at_ms": 2**53, "created_at_ms": 2**53},
            {"next_attempt_at_ms": NOON_MS, "created_at_ms": 2**53},
            {"next_attempt_at_ms": LATER_MS, "created_at_ms": 2**53},
        ),
    )
]


@pytest.mark.servers("postgresql", "mariadb")
def test_whether_a_row_is_due_agrees_with_what_a_claim_finds(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(row: dict[str, Any]) -> int:
        with outbox.engine.begin() as connection:
            connection.execute(delete(ObservationEvent))
        add_row(outbox, **row)
        outbox.store.claims.take_turns(is_any_failed=True)
        return len(claim(outbox))

    seen = [found(row) for row in ROWS]
    monkeypatch.setattr(dialect_of(outbox.engine), "is_any_due", None)
    assert seen == [found(row) for row in ROWS]
    assert {0, 1} == set(seen)


@pytest.mark.sqlite
@pytest.mark.servers("postgresql", "mariadb")
def test_a_delivery_is_recorded_even_if_the_query_for_chores_fails(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outbox.enqueue(rule_fired())
    monkeypatch.setattr(outbox.store.views, "_chores", select(literal_column("no_such_column")))
    assert outbox.flush(ScriptedClient()).sent == 1
    assert statuses(outbox) == ["sent"]
    assert "looking after the queue failed" in caplog.text
