import logging
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import (
    DOWN,
    NOON_MS,
    OK,
    REJECTED,
    REVOKED,
    SLOW_DOWN,
    ScriptedClient,
    add_row,
    columns_of,
    on_statement,
    refuse,
    rejecting,
    row,
    rule_fired,
    statuses,
)
from outbox import ConfigurationError, FlushReport, Outbox, Policy, StorageError, TransportFailure
from outbox.policy import Verdict

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("noon")]

WEEK_MS = 7 * 86_400_000


def enqueue(outbox: Outbox, count: int) -> list[int]:
    return outbox.enqueue_many([rule_fired()] * count)


def jittered(delay: int, row_id: int, now: int = NOON_MS) -> int:
    return now + delay + (now ^ row_id) % (delay // 4)


# One batch


def test_without_a_login_nothing_is_touched(outbox: Outbox) -> None:
    (row_id,) = enqueue(outbox, 1)
    before = columns_of(row(outbox, row_id))
    client = ScriptedClient(logged_in=False)
    assert outbox.flush(client) == outbox.flush_all(client) == FlushReport()
    assert client.batches == []
    assert columns_of(row(outbox, row_id)) == before


def test_while_capture_is_off_nothing_is_touched(outbox: Outbox, monkeypatch) -> None:
    old = add_row(outbox, status="sent", sent_at_ms=NOON_MS - 10 * WEEK_MS)
    held, due = add_row(outbox, status="sending", next_attempt_at_ms=NOON_MS - 1), *enqueue(outbox, 1)
    before = [columns_of(row(outbox, row_id)) for row_id in (old, held, due)]
    client = ScriptedClient()
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    assert outbox.flush(client) == outbox.flush_all(client) == FlushReport()
    assert client.batches == []
    assert [columns_of(row(outbox, row_id)) for row_id in (old, held, due)] == before
    monkeypatch.setenv("OUTBOX_CAPTURE", "true")
    assert outbox.flush(client).sent == 2


def test_capture_that_is_switched_off_ends_a_flush_after_its_batch(outbox: Outbox, monkeypatch) -> None:
    enqueue(outbox, 65)
    client = ScriptedClient()
    report = outbox.flush_all(client, progress=lambda _: monkeypatch.setenv("OUTBOX_CAPTURE", "false"))
    assert (report.sent, client.sizes, outbox.pending_count()) == (64, [64], 1)


def test_an_empty_queue_sends_nothing(outbox: Outbox) -> None:
    client = ScriptedClient()
    assert outbox.flush(client) == FlushReport()
    assert client.batches == []


def test_a_batch_is_the_64_oldest_by_creation_then_id(outbox: Outbox) -> None:
    young = [add_row(outbox, created_at_ms=NOON_MS) for _ in range(40)]
    old = [add_row(outbox, created_at_ms=NOON_MS - 1) for _ in range(40)]
    client = ScriptedClient()
    report = outbox.flush(client)
    assert (report.claimed, report.attempted, report.sent) == (64, 64, 64)
    assert client.ids == [[*old, *young[:24]]]


def test_a_batch_item_has_what_a_client_needs(outbox: Outbox) -> None:
    (row_id,) = enqueue(outbox, 1)
    client = ScriptedClient()
    outbox.flush(client)
    ((item,),) = client.batches
    assert (item.id, item.event_type, item.event) == (row_id, "rule_fired", rule_fired())
    assert item.payload_json == row(outbox, row_id).payload_json


def test_rows_are_claimed_under_a_lease_of_a_minute(outbox: Outbox) -> None:
    (row_id,) = enqueue(outbox, 1)
    seen = []
    outbox.flush(ScriptedClient(lambda _: seen.append(row(outbox, row_id))))
    assert (seen[0].status, seen[0].next_attempt_at_ms) == ("sending", NOON_MS + 60_000)


@pytest.mark.parametrize(
    ("status", "offset", "taken"),
    [
        ("pending", 0, True),
        ("pending", 1, False),
        ("sending", 0, True),
        ("sending", 1, False),
        ("sent", 0, False),
        ("parked", 0, False),
        ("abandoned", 0, False),
    ],
)
def test_only_due_rows_and_run_out_leases_are_claimed(
    outbox: Outbox, status: str, offset: int, taken: bool
) -> None:
    add_row(outbox, status=status, next_attempt_at_ms=NOON_MS + offset)
    assert outbox.flush(ScriptedClient()).sent == int(taken)


def test_all_accepted_rows_get_one_time(outbox: Outbox, noon) -> None:
    ids = enqueue(outbox, 3)
    noon.travel(seconds=5)
    outbox.flush(ScriptedClient(lambda _: noon.travel(seconds=2) and None))
    assert {row(outbox, row_id).sent_at_ms for row_id in ids} == {NOON_MS + 7_000}


@pytest.mark.sqlite
def test_a_flush_is_a_claim_and_a_settlement_and_maintenance(outbox: Outbox) -> None:
    enqueue(outbox, 64)
    seen: list[str] = []
    on_statement(outbox, seen.append)
    outbox.flush(ScriptedClient())
    assert seen.count("COMMIT") == 2
    enqueue(outbox, 64)
    seen.clear()
    outbox.flush(ScriptedClient(DOWN))
    assert seen.count("COMMIT") == 2


def test_no_transaction_is_open_during_an_upload(outbox: Outbox) -> None:
    enqueue(outbox, 1)
    outbox.flush(ScriptedClient(lambda _: enqueue(outbox, 1) and None))
    assert statuses(outbox) == ["sent", "pending"]


# What can't be decoded


def test_an_undecodable_row_is_abandoned_and_the_others_go_on(outbox: Outbox) -> None:
    add_row(outbox, payload_json="{")
    add_row(outbox, payload_json='{"event_type":"order_lost"}', event_type="order_lost")
    enqueue(outbox, 2)
    client = ScriptedClient()
    report = outbox.flush(client)
    assert (report.claimed, report.attempted, report.sent, report.abandoned) == (4, 2, 2, 2)
    assert client.ids == [[3, 4]]
    assert statuses(outbox) == ["abandoned", "abandoned", "sent", "sent"]
    assert row(outbox, 1).last_error == "permanent: decode observation event: Input data was truncated"
    assert (
        row(outbox, 2).last_error == "permanent: decode observation event: event_type: invalid value 'order_lost'"
    )


def test_when_nothing_can_be_decoded_nothing_is_sent(outbox: Outbox) -> None:
    add_row(outbox, payload_json="[]")
    client = ScriptedClient()
    report = outbox.flush(client)
    assert (report.attempted, report.sent, report.abandoned) == (0, 0, 1)
    assert client.batches == []


@pytest.mark.sqlite
def test_text_that_is_not_utf8_spoils_its_own_row_only(outbox: Outbox) -> None:
    enqueue(outbox, 2)
    with outbox.engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE observation_events SET payload_json = CAST(x'7bff' AS TEXT) WHERE id = 1"
        )
    assert outbox.flush(ScriptedClient()).sent == 1
    assert statuses(outbox) == ["abandoned", "sent"]


@pytest.mark.sqlite
def test_a_payload_that_is_no_text_spoils_its_own_row_only(outbox: Outbox) -> None:
    enqueue(outbox, 2)
    with outbox.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE observation_events SET payload_json = CAST('{}' AS BLOB) WHERE id = 1")
    assert outbox.flush(ScriptedClient()).sent == 1
    assert row(outbox, 1).last_error == "permanent: decode observation event: the payload is bytes, expected text"


def test_a_client_cannot_change_what_is_settled(outbox: Outbox) -> None:
    enqueue(outbox, 2)
    seen = []
    outbox.flush(ScriptedClient(lambda batch: seen.append(type(batch))))
    assert seen == [tuple]
    assert statuses(outbox) == ["sent", "sent"]


@pytest.mark.parametrize("payload", [None, "{"])
def test_every_flush_caps_the_queue(url: str, payload: str | None) -> None:
    with Outbox.open(url, policy=Policy(max_rows=2)) as outbox:
        for _ in range(5):
            add_row(outbox, next_attempt_at_ms=NOON_MS + 9)
        if payload:
            add_row(outbox, payload_json=payload)
        outbox.flush(ScriptedClient())
        assert len(statuses(outbox)) == 2


# Shared verdicts


@pytest.mark.parametrize(
    ("failure", "status", "retry_count", "delay"),
    [
        (DOWN, "pending", 1, 120_000),
        (TransportFailure("refused"), "pending", 1, 120_000),
        (SLOW_DOWN, "pending", 0, 40_000),
        (REVOKED, "parked", 0, None),
    ],
)
def test_a_shared_verdict_holds_for_every_row_of_one_request(
    outbox: Outbox, failure, status: str, retry_count: int, delay: int | None
) -> None:
    ids = enqueue(outbox, 64)
    client = ScriptedClient(failure)
    report = outbox.flush(client)
    assert client.sizes == [64]
    assert (report.attempted, report.sent) == (64, 0)
    assert report.rescheduled + report.parked == 64
    assert report.failure == str(failure)
    for row_id in ids:
        settled = row(outbox, row_id)
        assert (settled.status, settled.retry_count, settled.last_error) == (status, retry_count, str(failure))
        expected = NOON_MS + 60_000 if delay is None else jittered(delay, row_id)
        assert settled.next_attempt_at_ms == expected


def test_the_delay_counts_from_the_answer(outbox: Outbox, noon) -> None:
    (row_id,) = enqueue(outbox, 1)

    def slow(_):
        noon.travel(seconds=30)
        return SLOW_DOWN

    outbox.flush(ScriptedClient(slow))
    assert row(outbox, row_id).next_attempt_at_ms == jittered(40_000, row_id, NOON_MS + 30_000)


# Isolation


@pytest.mark.parametrize(
    ("rows", "answers", "sizes", "result", "ends"),
    [
        (2, (REJECTED,) * 3, [2, 1, 1], (2, 0), ["pending", "pending"]),
        (2, (REJECTED, OK, REJECTED), [2, 1, 1], (2, 1), ["sent", "abandoned"]),
        (2, (REJECTED, REJECTED, OK), [2, 1, 1], (2, 1), ["abandoned", "sent"]),
        (2, (REJECTED, OK, OK), [2, 1, 1], (2, 2), ["sent", "sent"]),
        (3, (REJECTED, REJECTED, SLOW_DOWN), [3, 1, 1], (3, 0), ["pending"] * 3),
        # Parked, and brought back at once, for the claim had a success.
        (3, (REJECTED, OK, REVOKED), [3, 1, 1], (3, 1), ["sent", "pending", "pending"]),
        (3, (REJECTED, REJECTED, REVOKED), [3, 1, 1], (3, 0), ["parked"] * 3),
        (1, (REJECTED, REJECTED), [1, 1], (1, 0), ["abandoned"]),
        (1, (REJECTED, OK), [1, 1], (1, 1), ["sent"]),
        (1, (REJECTED, DOWN), [1, 1], (1, 0), ["pending"]),
        (8, (REJECTED, OK, REJECTED, *(OK,) * 6), [8, *(1,) * 8], (8, 7), ["sent", "abandoned", *["sent"] * 6]),
        (9, (REJECTED, OK, OK), [9, 1, 8], (9, 9), ["sent"] * 9),
        (
            9,
            (REJECTED, REJECTED, OK, REJECTED, OK, REJECTED, REJECTED, OK, OK),
            [9, 1, 1, 7, 3, 4, 2, 1, 1, 2],
            (9, 8),
            ["abandoned", *["sent"] * 8],
        ),
        (9, (REJECTED, OK, REJECTED, DOWN), [9, 1, 8, 4], (9, 1), ["sent", *["pending"] * 8]),
    ],
)
def test_isolation(outbox: Outbox, rows: int, answers, sizes, result, ends) -> None:
    enqueue(outbox, rows)
    client = ScriptedClient(*answers)
    report = outbox.flush(client)
    assert client.sizes == sizes
    assert (report.attempted, report.sent) == result
    assert statuses(outbox) == ends


def test_a_wholly_rejected_batch_is_transient(outbox: Outbox) -> None:
    ids = enqueue(outbox, 2)
    report = outbox.flush(ScriptedClient(*[REJECTED] * 3))
    assert (report.rescheduled, report.verdict) == (2, Verdict.TRANSIENT)
    for row_id in ids:
        settled = row(outbox, row_id)
        assert (settled.retry_count, settled.last_error) == (1, "422 Unprocessable Entity: bad row")
        assert settled.next_attempt_at_ms == jittered(120_000, row_id)


def test_a_shared_verdict_in_isolation_holds_for_candidates_too(outbox: Outbox) -> None:
    ids = enqueue(outbox, 3)
    outbox.flush(ScriptedClient(REJECTED, REJECTED, SLOW_DOWN))
    for row_id in ids:
        settled = row(outbox, row_id)
        assert (settled.retry_count, settled.last_error) == (0, str(SLOW_DOWN))
        assert settled.next_attempt_at_ms == jittered(40_000, row_id)


@pytest.mark.sqlite
@pytest.mark.parametrize("bad", range(64))
def test_any_bad_row_of_64_costs_at_most_16_requests(outbox: Outbox, bad: int) -> None:
    one_bad_row_of_64(outbox, bad)


@pytest.mark.parametrize("bad", [0, 40])
def test_a_bad_row_of_64_costs_at_most_16_requests_on_every_database(outbox: Outbox, bad: int) -> None:
    one_bad_row_of_64(outbox, bad)


def one_bad_row_of_64(outbox: Outbox, bad: int) -> None:
    ids = enqueue(outbox, 64)
    client = rejecting(ids[bad])
    report = outbox.flush(client)
    assert len(client.sizes) <= 16
    assert (report.sent, report.abandoned) == (63, 1)
    assert row(outbox, ids[bad]).last_error == "permanent: 422 Unprocessable Entity: bad row"
    assert [ids[bad]] in client.ids


def test_a_wholly_rejected_batch_of_64_costs_65_requests(outbox: Outbox) -> None:
    ids = enqueue(outbox, 64)
    client = rejecting(*ids)
    report = outbox.flush(client)
    assert client.sizes == [64, *[1] * 64]
    assert (report.sent, report.rescheduled, report.abandoned) == (0, 64, 0)


def test_a_row_is_only_abandoned_on_a_request_that_held_it_alone(outbox: Outbox) -> None:
    ids = enqueue(outbox, 40)
    bad = {ids[0], ids[7], ids[8], ids[39]}
    client = rejecting(*bad)
    outbox.flush(client)
    abandoned = {found.id for found in outbox.find(status="abandoned")}
    assert abandoned == bad
    assert all([row_id] in client.ids for row_id in bad)
    order = [row_id for ids_of_one in client.ids for row_id in ids_of_one if len(ids_of_one) == 1]
    assert order == sorted(order)


def test_what_isolation_accepted_is_recorded_at_once(outbox: Outbox) -> None:
    enqueue(outbox, 3)
    seen = []
    outbox.flush(ScriptedClient(REJECTED, OK, lambda _: seen.extend(statuses(outbox))))
    assert seen == ["sent", "sending", "sending"]


# Leases


def test_a_long_isolation_keeps_its_lease_alive(outbox: Outbox, noon) -> None:
    ids = enqueue(outbox, 8)
    leases = []

    def slow(_):
        leases.append(row(outbox, ids[-1]).next_attempt_at_ms - (NOON_MS + 40_000 * len(leases)))
        assert outbox.flush(ScriptedClient()).claimed == 0
        noon.travel(seconds=40)
        return REJECTED if len(leases) == 1 else OK

    report = outbox.flush(ScriptedClient(*[slow] * 9))
    assert (report.sent, report.lost_leases) == (8, 0)
    assert all(lease >= 45_000 for lease in leases)


def test_rows_with_another_owner_are_left_to_it(outbox: Outbox, noon) -> None:
    enqueue(outbox, 3)
    other = ScriptedClient(DOWN)

    def outlasted(_):
        noon.travel(seconds=61)
        assert outbox.flush(other).claimed == 3
        return REVOKED

    report = outbox.flush(ScriptedClient(outlasted))
    assert (report.attempted, report.sent, report.parked, report.lost_leases) == (3, 0, 0, 3)
    assert statuses(outbox) == ["pending"] * 3
    assert row(outbox, 1).last_error == str(DOWN)


def test_a_lease_lost_during_isolation_ends_it(outbox: Outbox, noon) -> None:
    enqueue(outbox, 3)

    def outlasted(_):
        noon.travel(seconds=61)
        assert outbox.flush(ScriptedClient(DOWN)).rescheduled == 3
        return REJECTED

    client = ScriptedClient(outlasted)
    report = outbox.flush(client)
    assert client.sizes == [3]
    assert (report.lost_leases, report.rescheduled) == (3, 0)


def test_a_delivery_is_recorded_whoever_owns_the_row(outbox: Outbox, noon) -> None:
    (row_id,) = enqueue(outbox, 1)

    def outlasted(_):
        noon.travel(seconds=61)
        outbox.flush(ScriptedClient(REVOKED))
        assert row(outbox, row_id).status == "parked"

    report = outbox.flush(ScriptedClient(outlasted))
    assert (report.sent, report.lost_leases) == (1, 0)
    assert row(outbox, row_id).status == "sent"


@pytest.mark.sqlite
def test_a_claim_that_waited_for_the_database_renews_its_lease_first(outbox: Outbox, noon) -> None:
    (row_id,) = enqueue(outbox, 1)
    on_statement(outbox, lambda statement: statement == "COMMIT" and not leases and noon.travel(seconds=20))
    leases = []
    outbox.flush(ScriptedClient(lambda _: leases.append(row(outbox, row_id).next_attempt_at_ms)))
    assert leases == [NOON_MS + 80_000]


@pytest.mark.sqlite
def test_a_renewal_that_waited_for_the_database_counts_from_its_end(outbox: Outbox, noon) -> None:
    ids = enqueue(outbox, 2)
    seen, leases = [], []

    def waited(statement):
        seen.append(statement)
        if statement == "BEGIN IMMEDIATE" and seen.count(statement) == 2:
            noon.travel(seconds=30)

    on_statement(outbox, waited)

    def slow(_):
        noon.travel(seconds=40)
        return REJECTED

    outbox.flush(ScriptedClient(slow, lambda _: leases.append(row(outbox, ids[0]).next_attempt_at_ms)))
    assert leases == [NOON_MS + 70_000 + 60_000]


@pytest.mark.sqlite
def test_a_claim_that_lost_its_lease_before_the_upload_sends_nothing(outbox: Outbox, noon) -> None:
    enqueue(outbox, 1)

    seen, taken = [], []

    def outlasted(statement):
        seen.append(statement)
        if statement == "COMMIT" and seen.count("COMMIT") == 1:
            noon.travel(seconds=61)
        if seen.count("BEGIN IMMEDIATE") == 2 and not taken:
            with Outbox(outbox.engine.url) as other:
                taken.append(other.flush(ScriptedClient()).sent)

    on_statement(outbox, outlasted)
    client = ScriptedClient()
    report = outbox.flush(client)
    assert taken == [1]
    assert client.batches == []
    assert (report.attempted, report.sent, report.lost_leases) == (1, 0, 1)


def test_a_deadline_that_could_outlast_the_lease_is_refused(outbox: Outbox) -> None:
    enqueue(outbox, 1)
    client = ScriptedClient()
    client.deadline_ms = 45_001
    with pytest.raises(ConfigurationError, match="deadline_ms is 45001, expected at most 45000"):
        outbox.flush(client)
    assert statuses(outbox) == ["pending"]
    client.deadline_ms = 45_000
    assert outbox.flush(client).sent == 1


# Interrupts and bugs


@pytest.mark.parametrize("bug", [KeyboardInterrupt(), SystemExit(1), ValueError("bug"), MemoryError()])
@pytest.mark.parametrize("before", [(), (REJECTED, OK)])
def test_an_exception_releases_the_rows_and_reaches_the_caller(outbox: Outbox, noon, bug, before) -> None:
    ids = enqueue(outbox, 3)
    with pytest.raises(type(bug)):
        outbox.flush(ScriptedClient(*before, bug))
    sent = 1 if before else 0
    assert statuses(outbox) == ["sent"] * sent + ["pending"] * (3 - sent)
    released = row(outbox, ids[-1])
    assert (released.next_attempt_at_ms, released.retry_count, released.last_error) == (NOON_MS, 0, None)


def test_what_the_server_took_is_recorded_even_when_recording_fails_once(outbox: Outbox) -> None:
    enqueue(outbox, 2)
    real_settle = outbox._store.settle
    failures = [StorageError("locked")]

    def settle(outcomes, **named):
        chosen = list(outcomes)
        if chosen and chosen[0][1].trigger == "deliver" and failures:
            raise failures.pop()
        return real_settle(chosen, **named)

    outbox._store.settle = settle
    with pytest.raises(StorageError, match="locked"):
        outbox.flush(ScriptedClient())
    assert statuses(outbox) == ["sent", "sent"]


def test_when_even_the_release_fails_the_first_error_is_told(outbox: Outbox, caplog) -> None:
    enqueue(outbox, 2)

    def broken(_):
        refuse(outbox, "UPDATE", "observation_events", "stuck")
        raise ValueError("bug")

    with caplog.at_level(logging.WARNING, "outbox"), pytest.raises(ValueError, match="bug"):
        outbox.flush(ScriptedClient(broken))
    assert "releasing 2 events failed, their lease will run out" in caplog.text
    assert statuses(outbox) == ["sending", "sending"]


@pytest.mark.parametrize("what", ["chores", "unpark", "trim"])
def test_maintenance_that_fails_does_not_fail_the_flush(outbox: Outbox, caplog, what: str) -> None:
    enqueue(outbox, 2)
    if what == "unpark":
        add_row(outbox, status="parked")
    if what == "trim":
        outbox.policy = replace(outbox.policy, max_rows=1)

    def fail(*_: object, **__: object) -> None:
        raise StorageError("locked")

    setattr(outbox._store, what, fail)
    with caplog.at_level(logging.WARNING, "outbox"):
        assert outbox.flush(ScriptedClient()).sent == 2
    assert "failed, the next one will try again: locked" in caplog.text
    assert statuses(outbox)[:2] == ["sent", "sent"]


# Batch after batch


def test_flush_all_goes_on_until_nothing_is_due(outbox: Outbox) -> None:
    enqueue(outbox, 150)
    seen = []
    client = ScriptedClient()
    report = outbox.flush_all(client, progress=seen.append)
    assert client.sizes == [64, 64, 22]
    assert (report.attempted, report.sent) == (150, 150)
    assert [batch.sent for batch in seen] == [64, 64, 22]


@pytest.mark.parametrize("failure", [DOWN, SLOW_DOWN, REVOKED])
def test_flush_all_stops_at_a_verdict_for_all(outbox: Outbox, failure) -> None:
    enqueue(outbox, 150)
    client = ScriptedClient(OK, failure)
    report = outbox.flush_all(client)
    assert client.sizes == [64, 64]
    assert (report.attempted, report.sent) == (128, 64)
    assert report.failure == str(failure)


def test_flush_all_goes_past_single_bad_rows(outbox: Outbox) -> None:
    ids = enqueue(outbox, 150)
    report = outbox.flush_all(rejecting(ids[3], ids[100]))
    assert (report.sent, report.abandoned) == (148, 2)


def test_flush_all_stops_when_the_server_rejects_everything(outbox: Outbox) -> None:
    ids = enqueue(outbox, 20)
    with Outbox(outbox.engine, policy=Policy(batch_size=10)) as small:
        client = rejecting(*ids)
        assert small.flush_all(client).rescheduled == 10
    assert len(client.sizes) == 11


# The claim's choice

_TIMES = range(NOON_MS - 3, NOON_MS + 3)


@pytest.mark.sqlite
@settings(max_examples=300)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(("pending", "sending", "parked")), st.sampled_from(_TIMES), st.sampled_from(_TIMES)
        ),
        max_size=12,
    ),
    batch_size=st.integers(1, 4),
)
def test_a_claim_takes_the_oldest_of_all_that_is_due(rows: list[tuple[str, int, int]], batch_size: int) -> None:
    with Outbox.open("sqlite://") as crowded:
        due = []
        for status, created_at_ms, next_attempt_at_ms in rows:
            row_id = add_row(
                crowded, status=status, created_at_ms=created_at_ms, next_attempt_at_ms=next_attempt_at_ms
            )
            if status != "parked" and next_attempt_at_ms <= NOON_MS:
                due.append((created_at_ms, row_id))
        claimed = crowded._store.claim(now_ms=NOON_MS, lease_ms=NOON_MS + 60_000, batch_size=batch_size)
        assert [(row.created_at_ms, row.id) for row in claimed.rows] == sorted(due)[:batch_size]
