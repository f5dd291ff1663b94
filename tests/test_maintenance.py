import re
import sqlite3
from contextlib import closing
from datetime import datetime, timedelta, timezone

import pytest
from sqlalchemy import create_engine, event

from builders import (
    DOWN,
    NOON,
    NOON_MS,
    REVOKED,
    ScriptedClient,
    add_row,
    columns_of,
    on_statement,
    refuse,
    row,
    rule_fired,
    statuses,
)
from outbox import ConfigurationError, Outbox, Policy, PurgeReport, RequeueReport, RuleFired, StorageError
from outbox.pauses import SharedPause
from outbox.storage import deletion, finding

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("noon")]

WEEK_MS = 7 * 86_400_000


def ids_of(outbox: Outbox) -> list[int]:
    return sorted(found.id for found in outbox.find(limit=100_000))


# Unpark


def test_a_success_brings_back_the_256_oldest_parked_rows(outbox: Outbox) -> None:
    young = [add_row(outbox, status="parked", last_error="401") for _ in range(50)]
    old = [add_row(outbox, status="parked", created_at_ms=NOON_MS - 1, retry_count=4) for _ in range(250)]
    outbox.enqueue(rule_fired())
    outbox.flush(ScriptedClient())
    assert {found.id for found in outbox.find(status="pending", limit=999)} == {*old, *young[:6]}
    for row_id in (old[0], young[5]):
        back = row(outbox, row_id)
        assert (back.retry_count, back.last_error) == (0, None)
        assert back.next_attempt_at_ms == NOON_MS + row_id % 5_000
        assert back.revived_at_ms == NOON_MS


def test_without_a_success_parked_rows_stay(outbox: Outbox) -> None:
    parked = add_row(outbox, status="parked")
    outbox.enqueue(rule_fired())
    outbox.flush(ScriptedClient(DOWN))
    assert row(outbox, parked).status == "parked"


# Retry now


def test_retry_now_makes_due_what_waits_or_is_parked(outbox: Outbox) -> None:
    waiting = add_row(outbox, next_attempt_at_ms=NOON_MS + 9, retry_count=3, last_error="503")
    due = add_row(outbox, next_attempt_at_ms=NOON_MS - 9)
    parked = add_row(outbox, status="parked", retry_count=2, last_error="401")
    others = [add_row(outbox, status=status, next_attempt_at_ms=NOON_MS + 9) for status in ("sending", "sent")]
    before = [columns_of(row(outbox, row_id)) for row_id in (due, *others)]

    assert outbox.retry_now() == 2

    assert [columns_of(row(outbox, row_id)) for row_id in (due, *others)] == before
    for row_id, retry_count, error, revived in ((waiting, 3, "503", None), (parked, 2, "401", NOON_MS)):
        now_due = row(outbox, row_id)
        assert (now_due.status, now_due.next_attempt_at_ms) == ("pending", NOON_MS)
        assert (now_due.retry_count, now_due.last_error, now_due.revived_at_ms) == (retry_count, error, revived)


# One destination


def test_what_an_operator_does_to_one_destination_leaves_the_others_alone(outbox: Outbox) -> None:
    kinds = (
        {"next_attempt_at_ms": NOON_MS + 9, "retry_count": 3},
        {"status": "parked"},
        {"status": "abandoned"},
        {"status": "sent", "sent_at_ms": NOON_MS},
    )
    rows = {
        destination: [add_row(outbox, destination=destination, **kind) for kind in kinds]
        for destination in ("", "billing", "search")
    }
    for destination in rows:
        outbox.store.pauses.change(destination, lambda _: SharedPause(failures=1, until_ms=NOON_MS + 1))
    others = [columns_of(row(outbox, row_id)) for row_id in rows["search"]]

    def found(destination: str) -> list[str]:
        return [one.status for one in outbox.find(destination=destination)]

    assert found("default") == found("billing") == ["pending", "parked", "abandoned", "sent"]
    for name in ("default", "billing"):
        assert outbox.retry_now(destination=name) == 2
        for dry_run in (True, False):
            report = outbox.requeue_abandoned(older_than=NOON_MS + 1, destination=name, dry_run=dry_run)
            assert report == RequeueReport(1, {"rule_fired": 1})
        assert found(name) == ["pending", "pending", "pending", "sent"]
        assert {one.next_attempt_at_ms for one in outbox.find(destination=name, status="pending")} == {NOON_MS}
        for dry_run in (True, False):
            purged = outbox.purge(older_than=NOON_MS + 1, destination=name, dry_run=dry_run)
            assert (purged.total, purged.undelivered) == (4, 3)
        assert found(name) == []
        assert name not in [pause.destination for pause in outbox.stats().pauses]
    assert [columns_of(row(outbox, row_id)) for row_id in rows["search"]] == others
    assert [pause.destination for pause in outbox.stats().pauses] == ["search"]
    assert (outbox.retry_now(), len(outbox.find())) == (2, 4)


@pytest.mark.parametrize(
    "operation", [Outbox.retry_now, Outbox.find, lambda outbox, **these: outbox.purge(older_than=0, **these)]
)
def test_a_name_that_no_destination_can_have_is_refused(outbox: Outbox, operation) -> None:
    with pytest.raises(ConfigurationError, match="^the destination is 'c r', expected a name"):
        operation(outbox, destination="c r")


# Pending count


def test_the_pending_count_is_what_is_on_its_way(outbox: Outbox) -> None:
    for status in ("pending", "pending", "sending", "sent", "parked", "abandoned"):
        add_row(outbox, status=status)
    assert outbox.pending_count() == 3


# Requeue


def test_requeue_brings_back_abandoned_rows_older_than_the_cutoff(outbox: Outbox) -> None:
    old = add_row(outbox, status="abandoned", created_at_ms=NOON_MS - 1, retry_count=3, last_error="aged-out: 503")
    add_row(outbox, status="abandoned", created_at_ms=NOON_MS - 1, event_type="fix_outcome")
    add_row(outbox, status="abandoned", created_at_ms=NOON_MS - 1)
    young = add_row(outbox, status="abandoned", created_at_ms=NOON_MS)
    parked = add_row(outbox, status="parked", created_at_ms=NOON_MS - 1)
    before = [columns_of(found) for found in outbox.find()]
    expected = RequeueReport(3, {"fix_outcome": 1, "rule_fired": 2})

    assert outbox.requeue_abandoned(older_than=NOON, dry_run=True) == expected
    assert [columns_of(found) for found in outbox.find()] == before

    report = outbox.requeue_abandoned(older_than=NOON_MS)
    assert report == expected
    assert list(report.per_type) == ["fix_outcome", "rule_fired"]
    back = row(outbox, old)
    assert (back.status, back.retry_count, back.last_error) == ("pending", 0, None)
    assert (back.next_attempt_at_ms, back.created_at_ms, back.revived_at_ms) == (NOON_MS, NOON_MS - 1, NOON_MS)
    assert (row(outbox, young).status, row(outbox, parked).status) == ("abandoned", "parked")
    assert outbox.requeue_abandoned(older_than=NOON_MS) == RequeueReport()


def test_a_cutoff_may_be_in_any_time_zone(outbox: Outbox) -> None:
    add_row(outbox, status="abandoned", created_at_ms=NOON_MS - 1)
    elsewhere = NOON.astimezone(timezone(timedelta(hours=-7)))
    assert outbox.requeue_abandoned(older_than=elsewhere).total == 1


@pytest.mark.parametrize("cutoff", [datetime(2026, 1, 1), 1.5, "yesterday", None, 2**63])
def test_a_cutoff_that_says_no_moment_is_refused(outbox: Outbox, cutoff: object) -> None:
    with pytest.raises(
        ConfigurationError, match="older_than is .*, expected a datetime with a time zone or epoch"
    ):
        outbox.requeue_abandoned(older_than=cutoff)


@pytest.mark.parametrize("how", ["unpark", "retry_now", "requeue"])
def test_a_row_that_is_brought_back_gets_a_full_new_chance(outbox: Outbox, noon, how: str) -> None:
    status = "abandoned" if how == "requeue" else "parked"
    old = add_row(outbox, status=status, created_at_ms=NOON_MS - 2 * WEEK_MS)
    if how == "unpark":
        outbox.enqueue(rule_fired())
        outbox.flush(ScriptedClient())
        noon.travel(seconds=5)
    elif how == "retry_now":
        outbox.retry_now()
    else:
        outbox.requeue_abandoned(older_than=NOON_MS)
    outbox.flush(ScriptedClient(DOWN))
    assert row(outbox, old).status == "pending"
    noon.travel(seconds=7 * 86_400 + 10)
    outbox.flush(ScriptedClient(DOWN))
    assert (row(outbox, old).status, row(outbox, old).last_error) == (
        "abandoned",
        "aged-out: 503 Service Unavailable",
    )


# Cap


def test_the_cap_deletes_sent_then_abandoned_then_the_oldest(url: str) -> None:
    with Outbox.open(url) as outbox:
        pending = [add_row(outbox, created_at_ms=NOON_MS - 100 + number) for number in range(3)]
        parked = add_row(outbox, status="parked", created_at_ms=NOON_MS - 99)
        abandoned = [add_row(outbox, status="abandoned", created_at_ms=NOON_MS - number) for number in (1, 2)]
        sent = [add_row(outbox, status="sent", sent_at_ms=NOON_MS - number) for number in (1, 3, 2)]
        order = [sent[1], sent[2], sent[0], abandoned[1], abandoned[0], pending[0], pending[1], parked, pending[2]]
        everything = set(ids_of(outbox))
        for deleted in range(1, len(order)):
            outbox.store.deletion.trim(Policy(max_rows=len(order) - deleted, when_full="trim"), now_ms=NOON_MS)
            assert everything - set(ids_of(outbox)) == set(order[:deleted])


def test_the_cap_holds_after_every_enqueue_and_flush(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_rows=100, when_full="trim")) as outbox:
        ids = outbox.enqueue_many([rule_fired()] * 100)
        outbox.flush(ScriptedClient())
        newest = outbox.enqueue(rule_fired())
        assert ids_of(outbox) == [*ids[1:], newest]
        for number in range(50):
            add_row(outbox, status="sent", sent_at_ms=number)
        outbox.flush(ScriptedClient(DOWN))
        assert len(ids_of(outbox)) == 100


def test_the_cap_is_reached_by_whole_slices(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletion, "TRIM_SLICE", 2)
    with Outbox.open(url, policy=Policy(max_rows=3, when_full="trim")) as outbox:
        for number in range(7):
            add_row(outbox, status="sent", sent_at_ms=NOON_MS - number)
        assert outbox.store.deletion.trim(outbox.policy, now_ms=NOON_MS) == 4
        assert len(ids_of(outbox)) == 3


def test_every_deleted_row_is_counted_in_the_same_transaction(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_rows=2, when_full="trim")) as outbox:
        add_row(outbox, status="sent", sent_at_ms=1)
        add_row(outbox, status="abandoned", event_type="fix_outcome")
        outbox.enqueue_many([rule_fired()] * 5)
        assert outbox.stats().deleted == [
            ("abandoned", "fix_outcome", "cap", 1),
            ("pending", "rule_fired", "cap", 3),
            ("sent", "rule_fired", "cap", 1),
        ]
        assert outbox.stats().left_undelivered == 4
        outbox.enqueue(rule_fired())
        assert outbox.stats().left_undelivered == 5
        assert len(ids_of(outbox)) + sum(entry.events for entry in outbox.stats().deleted) == 8


def test_a_trim_that_is_rolled_back_counts_nothing(url: str, caplog) -> None:
    with Outbox.open(url, policy=Policy(max_rows=1, when_full="trim")) as outbox:
        outbox.enqueue(rule_fired())
        refuse(outbox, "INSERT", "observation_events_ledger", "full")
        outbox.enqueue(rule_fired())
        assert len(ids_of(outbox)) == 2
        assert outbox.stats().deleted == []
        assert [record.event_name for record in caplog.records] == ["outbox.cap_failed"]


def warned(caplog) -> list[tuple[str, int]]:
    return [(record.event_name, record.events) for record in caplog.records if record.levelname == "WARNING"]


def test_undelivered_events_that_the_cap_deletes_are_warned_of_once_a_minute(
    url: str, caplog, monkeypatch
) -> None:
    now_s = 1.0
    monkeypatch.setattr(deletion, "monotonic_s", lambda: now_s)
    with Outbox.open(url, policy=Policy(max_rows=2, when_full="trim")) as outbox:
        add_row(outbox, status="sent", sent_at_ms=1)
        add_row(outbox, status="abandoned")
        outbox.enqueue(rule_fired())
        assert warned(caplog) == []  # what was sent may go
        outbox.enqueue(rule_fired())
        assert caplog.messages == [
            "events that were deleted before they were delivered: 1; the queue is over the policy's"
            " max_rows or max_undelivered, `outbox status` counts all deleted events"
        ]
        now_s = 60.9
        outbox.enqueue_many([rule_fired()] * 3)
        assert len(caplog.messages) == 1
        now_s = 61.0
        outbox.enqueue(rule_fired())
        assert warned(caplog)[1:] == [("outbox.deleted_undelivered", 4)]
        caplog.clear()
        now_s = 121.0
        outbox.store.deletion.trim(Policy(max_rows=1, when_full="trim"), now_ms=NOON_MS)
        assert warned(caplog) == [("outbox.deleted_undelivered", 1)]
        assert outbox.stats().left_undelivered == 6


def test_neither_rows_in_flight_nor_the_new_row_are_trimmed(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_rows=1, when_full="trim")) as outbox:
        in_flight = add_row(outbox, status="sending", next_attempt_at_ms=NOON_MS + 1, created_at_ms=1)
        lease_run_out = add_row(outbox, status="sending", next_attempt_at_ms=NOON_MS, created_at_ms=2)
        new = outbox.enqueue(rule_fired())
        assert ids_of(outbox) == [in_flight, new]
        assert lease_run_out not in ids_of(outbox)


@pytest.mark.traced
def test_a_new_row_is_not_trimmed_after_the_clock_was_set_back(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_rows=2, when_full="trim")) as outbox:
        old = [add_row(outbox, created_at_ms=NOON_MS + number) for number in (1, 2)]
        new = outbox.enqueue(rule_fired())
        assert ids_of(outbox) == [old[1], new]
        outbox.flush(ScriptedClient(DOWN))
        assert ids_of(outbox) == [old[1], new]


def test_an_enqueue_during_an_upload_trims_nothing_of_the_batch(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_rows=3, when_full="trim")) as outbox:
        ids = outbox.enqueue_many([rule_fired()] * 3)
        report = outbox.flush(ScriptedClient(lambda _: outbox.enqueue(rule_fired()) and None))
        assert report.sent == 3
        assert len(ids_of(outbox)) <= 3
        assert set(ids_of(outbox)) <= {*ids, ids[-1] + 1}


@pytest.mark.sqlite
def test_two_enqueues_at_once_trim_what_one_would(url: str) -> None:
    with (
        Outbox.open(url, policy=Policy(max_rows=10, when_full="trim")) as outbox,
        Outbox(url, policy=outbox.policy) as other,
    ):
        outbox.enqueue_many([rule_fired()] * 10)

        meanwhile = [rule_fired()]
        on_statement(outbox, lambda _: meanwhile and other.enqueue(meanwhile.pop()))
        outbox.enqueue(rule_fired())
        assert meanwhile == []
        assert len(ids_of(outbox)) == 10


# Purge


def ledger(outbox: Outbox) -> list[tuple[str, str, str, int]]:
    return [tuple(entry) for entry in outbox.stats().deleted]


def test_purge_deletes_in_every_state_what_fits_all_that_is_given(outbox: Outbox) -> None:
    old = {"created_at_ms": NOON_MS - 1}
    for status in ("pending", "sent", "sent", "parked", "abandoned"):
        add_row(outbox, status=status, sent_at_ms=NOON_MS, **old)
    kept = [add_row(outbox, event_type="fix_outcome", **old), add_row(outbox)]
    expected = PurgeReport(total=5, undelivered=3, per_type={"rule_fired": 5})

    assert outbox.purge(event_type="rule_fired", older_than=NOON, dry_run=True) == expected
    assert len(ids_of(outbox)) == 7
    assert ledger(outbox) == []

    assert outbox.purge(event_type="rule_fired", older_than=NOON) == expected
    assert ids_of(outbox) == kept
    assert outbox.stats().left_undelivered == 3
    assert ledger(outbox) == [
        ("abandoned", "rule_fired", "purge", 1),
        ("parked", "rule_fired", "purge", 1),
        ("pending", "rule_fired", "purge", 1),
        ("sent", "rule_fired", "purge", 2),
    ]
    assert outbox.purge(event_type="rule_fired", older_than=NOON) == PurgeReport()


def test_purge_by_one_condition_alone(outbox: Outbox) -> None:
    add_row(outbox, created_at_ms=NOON_MS - 1)
    add_row(outbox, created_at_ms=NOON_MS - 1, event_type="fix_outcome")
    add_row(outbox)
    young = add_row(outbox, event_type="fix_outcome")
    report = outbox.purge(older_than=NOON_MS)
    assert list(report.per_type.items()) == [("fix_outcome", 1), ("rule_fired", 1)]
    assert outbox.purge(event_type="rule_fired").total == 1
    assert ids_of(outbox) == [young]


def test_purge_of_an_empty_outbox_is_nothing(outbox: Outbox) -> None:
    assert outbox.purge(older_than=NOON) == PurgeReport()


@pytest.mark.parametrize("rows", [9, 10, 11])
@pytest.mark.parametrize("dry_run", [True, False])
def test_purge_goes_through_all_slices(outbox: Outbox, monkeypatch, rows: int, dry_run: bool) -> None:
    monkeypatch.setattr(finding, "SLICE", 5)
    outbox.enqueue_many([rule_fired()] * rows)
    kept = add_row(outbox, event_type="fix_outcome")
    assert outbox.purge(event_type="rule_fired", dry_run=dry_run) == PurgeReport(
        rows, rows, 0, {"rule_fired": rows}
    )
    if not dry_run:
        assert ids_of(outbox) == [kept]
        assert ledger(outbox) == [("pending", "rule_fired", "purge", rows)]


@pytest.mark.parametrize("dry_run", [True, False])
def test_purge_leaves_alone_what_is_being_sent(outbox: Outbox, dry_run: bool) -> None:
    held = add_row(outbox, status="sending", next_attempt_at_ms=NOON_MS + 1)
    lost = add_row(outbox, status="sending", next_attempt_at_ms=NOON_MS)
    waiting = add_row(outbox, next_attempt_at_ms=NOON_MS + 1)
    report = outbox.purge(event_type="rule_fired", dry_run=dry_run)
    assert report == PurgeReport(total=2, undelivered=2, in_flight=1, per_type={"rule_fired": 2})
    assert ids_of(outbox) == ([held, lost, waiting] if dry_run else [held])


def test_what_is_claimed_while_purge_looks_is_left_alone(outbox: Outbox, monkeypatch) -> None:
    ids = outbox.enqueue_many([rule_fired()] * 3)
    delete = outbox.store.acting._change

    def claim_one_and_delete(action, found, these):
        assert [one.id for one in found] == ids
        assert outbox.store.claims.claim(now_ms=NOON_MS, lease_until_ms=NOON_MS + 60_000, batch_size=1).rows
        return delete(action, found, these)

    monkeypatch.setattr(outbox.store.acting, "_change", claim_one_and_delete)
    assert outbox.purge(event_type="rule_fired") == PurgeReport(2, 2, 1, {"rule_fired": 2})
    assert ids_of(outbox) == ids[:1]


def test_what_is_gone_before_purge_deletes_it_is_counted_once(outbox: Outbox, monkeypatch) -> None:
    outbox.enqueue_many([rule_fired()] * 3)
    delete = outbox.store.acting._change
    monkeypatch.setattr(
        outbox.store.acting,
        "_change",
        lambda action, found, these: delete(action, found[:1], these) and delete(action, found, these),
    )
    assert outbox.purge(event_type="rule_fired").total == 2
    assert ledger(outbox) == [("pending", "rule_fired", "purge", 3)]


def test_what_is_enqueued_during_a_purge_stays(outbox: Outbox, monkeypatch) -> None:
    monkeypatch.setattr(finding, "SLICE", 1)
    outbox.enqueue_many([rule_fired()] * 2)
    meanwhile = [rule_fired()] * 2
    delete = outbox.store.acting._change

    def enqueue_and_delete(*found):
        outbox.enqueue_many([meanwhile.pop()] if meanwhile else [])
        return delete(*found)

    monkeypatch.setattr(outbox.store.acting, "_change", enqueue_and_delete)
    assert outbox.purge(event_type="rule_fired").total == 2
    assert len(ids_of(outbox)) == 2


def test_a_purge_that_fails_deletes_and_counts_nothing_of_the_slice(outbox: Outbox) -> None:
    outbox.enqueue(rule_fired())
    refuse(outbox, "INSERT", "observation_events_ledger", "no ledger today")
    with pytest.raises(StorageError, match="no ledger today"):
        outbox.purge(event_type="rule_fired")
    assert statuses(outbox) == ["pending"]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({}, "where, event_type and older_than are all None, expected one of them"),
        (
            {"event_type": RuleFired},
            "event_type is <class 'outbox.event_types.RuleFired'>, expected the name of a type",
        ),
        (
            {"older_than": datetime(2026, 1, 1)},
            "older_than is datetime.datetime(2026, 1, 1, 0, 0), expected a datetime with",
        ),
    ],
)
def test_a_purge_that_does_not_say_what_is_refused(outbox: Outbox, what: dict, words: str) -> None:
    outbox.enqueue(rule_fired())
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        outbox.purge(**what)
    assert statuses(outbox) == ["pending"]


def test_a_revoked_token_parks_and_a_new_login_brings_all_back(outbox: Outbox, noon) -> None:
    outbox.enqueue_many([rule_fired()] * 5)
    outbox.flush(ScriptedClient(REVOKED))
    assert statuses(outbox) == ["parked"] * 5
    noon.travel(seconds=3_600)
    outbox.enqueue(rule_fired())
    outbox.flush_all(ScriptedClient())
    noon.travel(seconds=5)
    outbox.flush_all(ScriptedClient())
    assert statuses(outbox) == ["sent"] * 6


@pytest.mark.sqlite
def test_a_flush_with_nothing_due_succeeds_if_the_look_for_maintenance_fails(url: str, caplog) -> None:
    engine = create_engine(url)

    @event.listens_for(engine, "connect")
    def refuse_delivery_times(connection: sqlite3.Connection, _: object) -> None:
        # The look alone reads them.
        connection.set_authorizer(
            lambda action, table, column, *_: sqlite3.SQLITE_DENY if column == "sent_at_ms" else sqlite3.SQLITE_OK
        )

    Outbox.open(url).close()
    with closing(Outbox(engine)) as outbox:
        report = outbox.flush(ScriptedClient())
    engine.dispose()
    assert (report.claimed, report.skipped) == (0, None)
    assert "looking after the queue failed, the next flush tries again" in caplog.text
