import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete

from builders import (
    DOWN,
    NOON_MS,
    OK,
    REJECTED,
    REVOKED,
    SLOW_DOWN,
    Original,
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
from outbox import (
    ConfigurationError,
    FlushReport,
    HttpFailure,
    IllegalTransition,
    ObservationEvent,
    Outbox,
    Policy,
    StorageError,
    TransportFailure,
    Verdict,
    flusher,
    held_claim,
    hooks,
    isolation,
    maintenance,
    outcomes,
    search,
)
from outbox.upload.formats import Format, fit

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("noon")]

WEEK_MS = 7 * 86_400_000
FLUSHING = {module.__file__ for module in (flusher, held_claim, isolation, search, outcomes, maintenance, hooks)}


def enqueue(outbox: Outbox, count: int) -> list[int]:
    return outbox.enqueue_many([rule_fired()] * count)


def jittered(delay: int, row_id: int, now: int = NOON_MS) -> int:
    return now + delay + (now ^ row_id) % (delay // 4)


@pytest.fixture
def original(outbox_url: str) -> Iterator[Outbox]:
    """An outbox under the rules of the original uploader."""
    with Outbox.open(outbox_url, policy=Policy.original()) as opened:
        yield opened


# One batch


def test_without_a_login_nothing_is_touched(outbox: Outbox) -> None:
    (row_id,) = enqueue(outbox, 1)
    before = columns_of(row(outbox, row_id))
    client = ScriptedClient(logged_in=False)
    skipped = FlushReport(skipped="not logged in, the client has no credentials")
    assert outbox.flush(client) == outbox.flush_all(client) == skipped
    assert client.batches == []
    assert columns_of(row(outbox, row_id)) == before


def test_while_capture_is_off_nothing_is_touched(outbox: Outbox, monkeypatch) -> None:
    old = add_row(outbox, status="sent", sent_at_ms=NOON_MS - 10 * WEEK_MS)
    held, due = add_row(outbox, status="sending", next_attempt_at_ms=NOON_MS - 1), *enqueue(outbox, 1)
    before = [columns_of(row(outbox, row_id)) for row_id in (old, held, due)]
    client = ScriptedClient()
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    skipped = FlushReport(skipped="capture is off (OUTBOX_CAPTURE=false)")
    assert outbox.flush(client) == outbox.flush_all(client) == skipped
    assert client.batches == []
    assert [columns_of(row(outbox, row_id)) for row_id in (old, held, due)] == before
    monkeypatch.setenv("OUTBOX_CAPTURE", "true")
    assert outbox.flush(client).sent == 2


def test_capture_that_is_switched_off_ends_a_flush_after_its_batch(outbox: Outbox, monkeypatch) -> None:
    enqueue(outbox, 65)
    client = ScriptedClient()
    report = outbox.flush_all(client, progress=lambda _: monkeypatch.setenv("OUTBOX_CAPTURE", "false"))
    assert (report.sent, client.sizes, outbox.pending_count()) == (64, [64], 1)
    assert report.skipped == "capture is off (OUTBOX_CAPTURE=false)"


def test_what_is_tried_is_not_skipped(outbox: Outbox) -> None:
    for answer in (OK, DOWN):
        enqueue(outbox, 1)
        assert outbox.flush(ScriptedClient(answer)).skipped is None


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
    assert seen.count("COMMIT") == 3  # the pause, too


def test_no_transaction_is_open_during_an_upload(outbox: Outbox) -> None:
    enqueue(outbox, 1)
    outbox.flush(ScriptedClient(lambda _: enqueue(outbox, 1) and None))
    assert statuses(outbox) == ["sent", "pending"]


# What can't be decoded


UNKNOWN = '{"event_type":"order_lost"}'


def test_a_row_that_is_no_object_is_abandoned_and_the_others_go_on(outbox: Outbox) -> None:
    add_row(outbox, payload_json="{")
    add_row(outbox, payload_json="[1]")
    enqueue(outbox, 2)
    client = ScriptedClient()
    report = outbox.flush(client)
    assert (report.claimed, report.attempted, report.sent, report.abandoned) == (4, 2, 2, 2)
    assert client.ids == [[3, 4]]
    assert statuses(outbox) == ["abandoned", "abandoned", "sent", "sent"]
    assert row(outbox, 1).last_error == "permanent: decode observation event: Input data was truncated"
    assert row(outbox, 2).last_error == "permanent: decode observation event: expected `object`, got `array`"


@pytest.mark.parametrize("payload", [UNKNOWN, ' { "event_type" : "rule_fired", "n": 1e999 }\n', "{}"])
def test_any_object_is_sent_as_it_is_and_the_client_gets_a_mapping(outbox: Outbox, payload: str) -> None:
    add_row(outbox, payload_json=payload, event_type="order_lost")
    client = ScriptedClient()
    assert outbox.flush(client).sent == 1
    ((item,),) = client.batches
    assert item.payload_json == payload
    assert item.event == json.loads(payload)
    assert item.event is item.event


def test_the_original_abandons_what_it_does_not_know(outbox: Outbox, url: str) -> None:
    add_row(outbox, payload_json=UNKNOWN, event_type="order_lost")
    enqueue(outbox, 1)
    with Outbox(url, policy=Original()) as original:
        assert original.flush(ScriptedClient()).sent == 1
    assert statuses(outbox) == ["abandoned", "sent"]
    assert (
        row(outbox, 1).last_error == "permanent: decode observation event: event_type: invalid value 'order_lost'"
    )


def test_when_there_is_no_object_nothing_is_sent(outbox: Outbox) -> None:
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
    with Outbox.open(url, policy=Policy(max_rows=2, when_full="trim")) as outbox:
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
@pytest.mark.parametrize("policy", ["outbox", "original"])
def test_a_shared_verdict_holds_for_every_row_of_one_request(
    request, policy: str, failure, status: str, retry_count: int, delay: int | None
) -> None:
    outbox = request.getfixturevalue(policy)
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
    ],
)
def test_isolation(original: Outbox, rows: int, answers, sizes, result, ends) -> None:
    enqueue(original, rows)
    client = ScriptedClient(*answers)
    report = original.flush(client)
    assert client.sizes == sizes
    assert (report.attempted, report.sent) == result
    assert statuses(original) == ends


@pytest.mark.parametrize(
    ("rows", "answers", "sizes", "result", "ends"),
    [
        (2, (REJECTED,) * 3, [2, 1, 1], (2, 0), ["proof", "proof"]),
        (2, (REJECTED, OK, REJECTED), [2, 1, 1], (2, 1), ["sent", "proof"]),
        (2, (REJECTED, REJECTED, OK), [2, 1, 1], (2, 1), ["proof", "sent"]),
        (2, (REJECTED, OK, OK), [2, 1, 1], (2, 2), ["sent", "sent"]),
        (3, (REJECTED, REJECTED, SLOW_DOWN), [3, 1, 1], (3, 0), ["proof", "delay", "delay"]),
        # The service works, so the token of one row is no reason to stop.
        (3, (REJECTED, OK, REVOKED, OK), [3, 1, 1, 1], (3, 2), ["sent", "row", "sent"]),
        (3, (REJECTED, REJECTED, REVOKED), [3, 1, 1], (3, 0), ["proof", "parked", "parked"]),
        (1, (REJECTED,), [1], (1, 0), ["proof"]),
        (1, (DOWN,), [1], (1, 0), ["service"]),
        (8, (REJECTED, OK, REJECTED, *(OK,) * 6), [8, *(1,) * 8], (8, 7), ["sent", "proof", *["sent"] * 6]),
    ],
)
def test_isolation_blames_no_row_at_once(outbox: Outbox, rows: int, answers, sizes, result, ends) -> None:
    ids = enqueue(outbox, rows)
    client = ScriptedClient(*answers)
    report = outbox.flush(client)
    assert client.sizes == sizes
    assert (report.attempted, report.sent) == result
    found = [row(outbox, row_id) for row_id in ids]
    assert [one.waits_for if one.status == "pending" else one.status for one in found] == ends


def test_a_wholly_rejected_batch_is_transient(outbox: Outbox) -> None:
    ids = enqueue(outbox, 2)
    report = outbox.flush(ScriptedClient(*[REJECTED] * 3))
    assert (report.rescheduled, report.verdict) == (2, Verdict.TRANSIENT)
    for row_id in ids:
        settled = row(outbox, row_id)
        assert (settled.retry_count, settled.last_error) == (1, "422 Unprocessable Entity: bad row")
        assert settled.next_attempt_at_ms == jittered(120_000, row_id)


def test_a_shared_verdict_in_isolation_holds_for_candidates_too(original: Outbox) -> None:
    ids = enqueue(original, 3)
    original.flush(ScriptedClient(REJECTED, REJECTED, SLOW_DOWN))
    for row_id in ids:
        settled = row(original, row_id)
        assert (settled.retry_count, settled.last_error) == (0, str(SLOW_DOWN))
        assert settled.next_attempt_at_ms == jittered(40_000, row_id)


@pytest.mark.parametrize("bad", [0, 40])
def test_a_bad_row_of_64_costs_at_most_16_requests(original: Outbox, bad: int) -> None:
    """The tests of the search find it at each place."""
    ids = enqueue(original, 64)
    client = rejecting(ids[bad])
    report = original.flush(client)
    assert len(client.sizes) <= 16
    assert (report.sent, report.abandoned) == (63, 1)
    assert row(original, ids[bad]).last_error == "permanent: 422 Unprocessable Entity: bad row"
    assert [ids[bad]] in client.ids


def test_a_wholly_rejected_batch_of_64_costs_65_requests(original: Outbox) -> None:
    ids = enqueue(original, 64)
    client = rejecting(*ids)
    report = original.flush(client)
    assert client.sizes == [64, *[1] * 64]
    assert (report.sent, report.rescheduled, report.abandoned) == (0, 64, 0)


def test_a_row_is_only_abandoned_on_a_request_that_held_it_alone(original: Outbox) -> None:
    ids = enqueue(original, 40)
    bad = {ids[0], ids[7], ids[8], ids[39]}
    client = rejecting(*bad)
    original.flush(client)
    abandoned = {found.id for found in original.find(status="abandoned")}
    assert abandoned == bad
    assert all([row_id] in client.ids for row_id in bad)
    order = [row_id for ids_of_one in client.ids for row_id in ids_of_one if len(ids_of_one) == 1]
    assert order == sorted(order)


def test_what_isolation_accepted_is_recorded_at_once(outbox: Outbox) -> None:
    enqueue(outbox, 3)
    seen = []
    outbox.flush(ScriptedClient(REJECTED, OK, lambda _: seen.extend(statuses(outbox))))
    assert seen == ["sent", "sending", "sending"]


def test_a_row_whose_senders_died_is_sent_alone_even_if_another_program_rescheduled_it(
    outbox: Outbox, noon
) -> None:
    older, killer, newer = (add_row(outbox, lost_leases=lost) for lost in (0, 2, 1))
    client = ScriptedClient()
    report = outbox.flush(client)
    assert (report.claimed, report.sent, client.sizes) == (1, 1, [1])
    assert [row(outbox, row_id).status for row_id in (older, killer, newer)] == ["pending", "sent", "pending"]
    assert outbox.flush_all(client).sent == 2
    assert client.sizes == [1, 2]


# An answer for each event


class AnsweringClient:
    """Returns what a function makes of the batch."""

    logged_in = True

    def __init__(self, answer) -> None:
        self.answer = answer

    def upload(self, batch):
        return self.answer(batch)


def test_an_answer_for_each_event_settles_each_row_by_its_own(outbox: Outbox, noon) -> None:
    accepted, rejected, broken, slow, fine = enqueue(outbox, 5)
    failures = {
        rejected: HttpFailure(422, "Unprocessable Entity", "bad"),
        broken: HttpFailure(500, "Internal Server Error", ""),
        slow: HttpFailure(429, "Too Many Requests", "", retry_after_ms=40_000),
        fine: None,
    }
    report = outbox.flush(AnsweringClient(lambda _: failures))
    assert (report.attempted, report.sent, report.abandoned, report.rescheduled) == (5, 2, 1, 2)
    assert report.paused_until_ms is None
    found = {row_id: row(outbox, row_id) for row_id in (accepted, rejected, broken, slow, fine)}
    assert [one.status for one in found.values()] == ["sent", "abandoned", "pending", "pending", "sent"]
    assert found[rejected].last_error == "permanent: 422 Unprocessable Entity: bad"
    assert (found[broken].waits_for, found[broken].retry_count) == ("row", 1)
    assert (found[slow].waits_for, found[slow].retry_count) == ("delay", 0)
    assert 40_000 <= found[slow].next_attempt_at_ms - NOON_MS <= 50_000
    enqueue(outbox, 1)
    assert outbox.flush(ScriptedClient()).sent == 1  # nothing is paused


def test_an_answer_that_names_only_failures_blames_no_row(outbox: Outbox, noon) -> None:
    ids = enqueue(outbox, 3)
    failure = HttpFailure(422, "Unprocessable Entity", "")
    report = outbox.flush(AnsweringClient(lambda _: dict.fromkeys(ids, failure)))
    assert (report.sent, report.abandoned, report.rescheduled, report.paused_until_ms) == (0, 0, 3, None)
    assert {row(outbox, row_id).waits_for for row_id in ids} == {"proof"}


def test_an_answer_of_credentials_for_single_events_parks_them(outbox: Outbox, noon) -> None:
    ids = enqueue(outbox, 2)
    outbox.flush(AnsweringClient(lambda _: {ids[0]: REVOKED, ids[1]: DOWN}))
    assert statuses(outbox) == ["parked", "pending"]
    assert row(outbox, ids[1]).waits_for == "service"


@pytest.mark.parametrize(("failure", "retry_count"), [(REVOKED, 0), (DOWN, 2)])
def test_while_the_service_works_a_failure_of_a_single_event_is_its_own(
    outbox: Outbox, noon, failure: HttpFailure, retry_count: int
) -> None:
    """However the client tells it: as an answer for the event, or as the failure of its request."""
    for answer in (AnsweringClient(lambda batch: {batch[0].id: failure}), ScriptedClient(failure)):
        enqueue(outbox, 1)
        assert outbox.flush(ScriptedClient()).sent == 1
        row_id = add_row(outbox, retry_count=retry_count)
        outbox.flush(answer)
        assert (row(outbox, row_id).status, row(outbox, row_id).waits_for) == ("pending", "row")


@pytest.mark.parametrize(
    ("failure", "status", "waits_for"), [(REVOKED, "parked", None), (DOWN, "pending", "service")]
)
def test_an_answer_that_names_every_event_may_tell_of_the_service(
    outbox: Outbox, noon, failure: HttpFailure, status: str, waits_for: str | None
) -> None:
    """Otherwise a service that fails for a minute would blame the whole backlog."""
    enqueue(outbox, 1)
    assert outbox.flush(ScriptedClient()).sent == 1
    ids = [add_row(outbox, retry_count=4) for _ in range(2)]
    outbox.flush(AnsweringClient(lambda batch: {item.id: failure for item in batch}))
    assert [(row(outbox, one).status, row(outbox, one).waits_for) for one in ids] == [(status, waits_for)] * 2


def test_an_answer_in_an_isolation_takes_its_rows_out_of_the_search(outbox: Outbox, noon) -> None:
    ids = enqueue(outbox, 4)
    answers = [REJECTED, None, {ids[1]: HttpFailure(422, "Unprocessable Entity", "")}, None, None]
    sizes = []

    def answer(batch):
        sizes.append(len(batch))
        found = answers.pop(0)
        if isinstance(found, HttpFailure):
            raise found
        return found

    assert outbox.flush(AnsweringClient(answer)).sent == 3
    assert sizes == [4, 1, 1, 1, 1]
    assert row(outbox, ids[1]).waits_for == "proof"


def test_the_original_abandons_what_an_answer_rejects_beside_others(original: Outbox, noon) -> None:
    ids = enqueue(original, 3)
    failures = {ids[0]: HttpFailure(422, "Unprocessable Entity", ""), ids[1]: DOWN}
    assert original.flush(AnsweringClient(lambda _: failures)).sent == 1
    assert statuses(original) == ["abandoned", "pending", "sent"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda batch: {batch[0].id + 99: None}, "returned the id [0-9]+, which is not in the batch"),
        (lambda batch: {batch[0].id: "no"}, "returned a str for an event, expected None or an UploadFailure"),
        (lambda batch: [None], r"returned a list, expected None or a mapping"),
    ],
)
def test_an_answer_that_makes_no_sense_is_a_bug_of_the_client(outbox: Outbox, noon, answer, message: str) -> None:
    (row_id,) = enqueue(outbox, 1)
    with pytest.raises(ConfigurationError, match=message):
        outbox.flush(AnsweringClient(answer))
    waiting = row(outbox, row_id)
    assert waiting.status == "pending"
    assert waiting.last_error.startswith("client error: ConfigurationError: upload() returned")


class OneByOneClient(ScriptedClient):
    one_event_per_request = True

    def fit(self, batch) -> int:
        return 1


def test_a_client_that_sends_one_event_per_request_gets_the_claim_one_by_one(outbox: Outbox, noon) -> None:
    enqueue(outbox, 3)
    client = OneByOneClient()
    report = outbox.flush(client)
    assert (report.claimed, report.attempted, report.sent) == (3, 3, 3)
    assert client.sizes == [1, 1, 1]


def test_a_failure_of_the_service_releases_the_events_that_were_not_sent(outbox: Outbox, noon) -> None:
    _, second, *others = enqueue(outbox, 4)
    report = outbox.flush(OneByOneClient(OK, DOWN))
    assert (report.claimed, report.attempted, report.sent, report.rescheduled) == (2, 2, 1, 1)
    assert row(outbox, second).retry_count == 1
    assert all((row(outbox, i).status, row(outbox, i).retry_count) == ("pending", 0) for i in others)


def test_under_the_originals_rules_a_claim_is_one_event(outbox_url: str, noon) -> None:
    with Outbox(outbox_url, policy=Policy.original()) as original:
        enqueue(original, 3)
        client = OneByOneClient()
        assert original.flush(client).sent == 1
        assert original.flush_all(client).sent == 2
        assert client.sizes == [1, 1, 1]


# Requests have a size


class SizedClient(ScriptedClient):
    """A client whose requests hold at most `max_bytes` of payloads, or one event."""

    def __init__(self, *answers, max_bytes: int) -> None:
        super().__init__(*answers)
        self.max_bytes = max_bytes

    def fit(self, batch) -> int:
        return fit(Format(), [item.payload_json.encode() for item in batch], self.max_bytes)


def add_sized(outbox: Outbox, size: int, **columns) -> int:
    """Add an event whose payload has this many bytes."""
    return add_row(outbox, payload_json='{"a":"%s"}' % ("x" * (size - 8)), **columns)


def test_rows_that_do_not_fit_in_the_request_are_due_as_before_the_claim(outbox: Outbox) -> None:
    first = add_sized(outbox, 40, created_at_ms=NOON_MS - 9)
    others = [
        add_sized(outbox, 60, created_at_ms=NOON_MS - 8, next_attempt_at_ms=NOON_MS - 700),
        add_sized(outbox, 40, created_at_ms=NOON_MS - 7, next_attempt_at_ms=NOON_MS - 5, retry_count=3),
        add_sized(outbox, 40, created_at_ms=NOON_MS - 6, next_attempt_at_ms=NOON_MS, status="sending"),
    ]
    before = [columns_of(row(outbox, row_id)) for row_id in others]
    client = SizedClient(max_bytes=100)
    report = outbox.flush(client)
    assert client.ids == [[first]]
    assert report == FlushReport(claimed=1, attempted=1, sent=1, goes_on=True)
    after = [columns_of(row(outbox, row_id)) for row_id in others]
    assert after == [{**columns, "status": "pending"} for columns in before]


@pytest.mark.parametrize("waits_for", ["service", "delay", "proof", "row"])
def test_rows_that_failed_before_and_do_not_fit_are_due_as_before_the_claim(outbox: Outbox, waits_for) -> None:
    waiting = {"waits_for": waits_for, "retry_count": 2, "last_error": "503 Service Unavailable"}
    first, second = (
        add_sized(outbox, 40, created_at_ms=NOON_MS - age, next_attempt_at_ms=NOON_MS - 7 * age, **waiting)
        for age in (2, 1)
    )
    before = columns_of(row(outbox, second))
    client = SizedClient(max_bytes=50)
    assert outbox.flush(client).sent == 1
    assert client.ids == [[first]]
    after = columns_of(row(outbox, second))
    # The acceptance may bring rows forward that are due later, but this one is due.
    assert after == before


def test_flush_all_sends_as_many_requests_as_the_sizes_need(outbox: Outbox) -> None:
    ids = [add_sized(outbox, size) for size in (40, 40, 40, 500, 30, 30, 30, 30)]
    client, seen = SizedClient(max_bytes=100), []
    report = outbox.flush_all(client, progress=seen.append)
    assert client.ids == [ids[:2], ids[2:3], ids[3:4], ids[4:7], ids[7:]]
    assert (report.claimed, report.attempted, report.sent) == (8, 8, 8)
    assert [batch.claimed for batch in seen] == client.sizes


def test_claims_of_rows_that_do_not_fit_alternate_between_fresh_rows_and_others(outbox: Outbox) -> None:
    failed = [add_sized(outbox, 90, waits_for="service") for _ in range(3)]
    fresh = [add_sized(outbox, 90) for _ in range(3)]
    client = SizedClient(max_bytes=100)
    outbox.flush_all(client)
    assert client.ids == [[one] for pair in zip(fresh, failed, strict=True) for one in pair]


def test_an_invalid_row_takes_no_room_in_the_request(outbox: Outbox) -> None:
    bad, *good = add_row(outbox, payload_json="[]"), *(add_sized(outbox, 40) for _ in range(3))
    client = SizedClient(max_bytes=100)
    report = outbox.flush(client)
    assert client.ids == [good[:2]]
    assert (report.claimed, report.attempted, report.sent, report.abandoned) == (3, 2, 2, 1)
    assert [row(outbox, row_id).status for row_id in (bad, good[2])] == ["abandoned", "pending"]


def test_rows_that_do_not_fit_and_have_another_owner_are_left_to_it(outbox: Outbox, noon) -> None:
    enqueue(outbox, 3)

    def outlasted(_batch) -> int:
        noon.travel(seconds=61)
        assert outbox.flush(ScriptedClient(DOWN)).rescheduled == 3
        return 2

    client = ScriptedClient()
    client.fit = outlasted
    report = outbox.flush(client)
    assert client.batches == []
    assert (report.claimed, report.lost_leases) == (3, 3)
    assert row(outbox, 3).last_error == str(DOWN)


def test_a_refused_size_counts_against_no_row_and_the_rest_goes_on(outbox: Outbox) -> None:
    ids = enqueue(outbox, 5)
    too_large = HttpFailure(413, "Content Too Large")
    client = ScriptedClient(*[lambda batch: too_large if len(batch) > 2 else OK] * 5)
    client.fit = lambda _batch: 4
    report = outbox.flush_all(client)
    assert client.ids == [ids[:4], ids[:2], ids[2:4], ids[4:]]
    assert (report.sent, report.rescheduled, report.paused_until_ms) == (5, 0, None)
    assert {row(outbox, row_id).retry_count for row_id in ids} == {0}


def test_the_original_sends_the_whole_claim_in_one_request(original: Outbox) -> None:
    ids = enqueue(original, 3)
    client = SizedClient(max_bytes=1)
    assert original.flush(client).sent == 3
    assert client.ids == [ids]


@pytest.mark.parametrize("answer", [0, -1, None, "2", ZeroDivisionError("a bug")])
def test_a_bug_in_fit_reaches_the_caller_after_the_whole_claim_was_sent(outbox: Outbox, answer) -> None:
    def fitting(_batch):
        if isinstance(answer, Exception):
            raise answer
        return answer

    enqueue(outbox, 2)
    client = ScriptedClient()
    client.fit = fitting
    with pytest.raises((ConfigurationError, ZeroDivisionError), match=r"^(fit\(\) returned .*, expected|a bug$)"):
        outbox.flush(client)
    assert client.sizes == [2]
    assert statuses(outbox) == ["sent"] * 2


def test_an_error_of_requests_is_a_failure_of_the_upload(outbox: Outbox, noon) -> None:
    (row_id,) = enqueue(outbox, 1)

    def upload(_batch):
        response = requests.Response()
        response.status_code, response.reason = 503, "Service Unavailable"
        response.raise_for_status()

    assert outbox.flush(AnsweringClient(upload)).rescheduled == 1
    assert row(outbox, row_id).last_error == "503 Service Unavailable"


def test_the_policy_of_the_application_decides_what_a_status_means_and_how_long_to_wait(url: str, noon) -> None:
    policy = Policy(verdicts={409: Verdict.TRANSIENT}, backoff_ms=(5_000, 300_000))
    client = ScriptedClient(*[HttpFailure(409, "Conflict")] * 2)
    with Outbox.open(url, policy=policy) as outbox:
        ids = enqueue(outbox, 2)
        assert outbox.flush(client).rescheduled == 2
        assert [row(outbox, row_id).next_attempt_at_ms for row_id in ids] == [
            jittered(5_000, row_id) for row_id in ids
        ]
        noon.travel(seconds=7)
        assert outbox.flush(client).rescheduled == 2
    assert client.sizes == [2, 2]


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


@pytest.mark.parametrize("status", ["pending", "sending", "parked", "abandoned"])
def test_a_delivery_never_marks_another_event_that_got_the_id_again(outbox: Outbox, status: str) -> None:
    """A failover that lost rows makes the new primary give their ids out again."""
    kept, lost, crossed = (add_row(outbox, created_at_ms=NOON_MS - age) for age in (3, 2, 1))

    def fail_over(_batch):
        with outbox.engine.begin() as connection:
            connection.execute(delete(ObservationEvent).where(ObservationEvent.id.in_([lost, crossed])))
        # The second one is as old as an event of the batch that has another id.
        for row_id, created_at_ms in ((lost, NOON_MS), (crossed, NOON_MS - 3)):
            add_row(outbox, id=row_id, status=status, created_at_ms=created_at_ms)

    outbox.flush(ScriptedClient(fail_over))
    sent = [row_id for row_id in (kept, lost, crossed) if row(outbox, row_id).sent_at_ms is not None]
    assert sent == [kept]
    assert statuses(outbox).count("sent") == 1


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


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(1), GeneratorExit()])
@pytest.mark.parametrize("before", [(), (REJECTED, OK)])
def test_an_interrupt_releases_the_rows_and_reaches_the_caller(outbox: Outbox, noon, interrupt, before) -> None:
    ids = enqueue(outbox, 3)
    with pytest.raises(type(interrupt)):
        outbox.flush(ScriptedClient(*before, interrupt))
    sent = 1 if before else 0
    assert statuses(outbox) == ["sent"] * sent + ["pending"] * (3 - sent)
    released = row(outbox, ids[-1])
    assert (released.next_attempt_at_ms, released.retry_count, released.last_error) == (NOON_MS, 0, None)


class HostileError(Exception):
    def __str__(self) -> str:
        raise RecursionError


class HostileFailure(HttpFailure):
    def __str__(self) -> str:
        return self.nothing


def delayed_by_a_fraction() -> HttpFailure:
    failure = HttpFailure(429)
    failure.retry_after_ms = 2_000.5
    return failure


@pytest.mark.contract
@pytest.mark.parametrize(
    ("bug", "last_error"),
    [
        (
            delayed_by_a_fraction(),
            "client error: ConfigurationError: retry_after_ms is 2000.5, expected a whole number, in milliseconds, or None",
        ),
        (ValueError("a bug"), "client error: ValueError: a bug"),
        (ValueError("two\n  lines\0"), "client error: ValueError: two lines\ufffd"),
        (OSError(5, "Input/output error"), "client error: OSError: [Errno 5] Input/output error"),
        (ConfigurationError("token: none"), "client error: ConfigurationError: token: none"),
        (ValueError("it ends with:"), "client error: ValueError: it ends with:"),
        (ValueError(), "client error: ValueError"),
        (HostileError(), "client error: HostileError"),
        (
            HostileFailure(503),
            "client error: AttributeError: 'HostileFailure' object has no attribute 'nothing'",
        ),
        (LookupError("long" * 2_048), ("client error: LookupError: " + "long" * 2_048)[:2_048]),
        (
            LookupError("for url: https://me:pass@ingest.example.com/?token=abc"),
            "client error: LookupError: for url: https://[REDACTED-TOKEN]@ingest.example.com/?token=[REDACTED-TOKEN]",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_bug_of_the_client_reschedules_the_rows_and_reaches_the_caller(
    outbox: Outbox, noon, bug, last_error
) -> None:
    ids = enqueue(outbox, 2)
    raised = (AttributeError, ConfigurationError) if isinstance(bug, HttpFailure) else type(bug)
    with pytest.raises(raised):
        outbox.flush(ScriptedClient(bug))
    for row_id in ids:
        waiting = row(outbox, row_id)
        assert (waiting.status, waiting.retry_count, waiting.last_error) == ("pending", 1, last_error)
        assert 120_000 <= waiting.next_attempt_at_ms - NOON_MS < 150_000


def test_a_bug_of_the_client_holds_nothing_up(outbox: Outbox, noon) -> None:
    enqueue(outbox, 10)
    with pytest.raises(ValueError, match="a bug"):
        outbox.flush(ScriptedClient(ValueError("a bug")))
    noon.travel(seconds=1)
    new = enqueue(outbox, 1)
    client = ScriptedClient()
    assert outbox.flush(client).sent == 1
    assert client.ids == [new]  # the others are due within five seconds after that
    cause = "the upload client has a bug: it raised an exception that is not an UploadFailure"
    assert outbox.stats().likely_cause == (
        f"{cause} (client error: ValueError: a bug); 10 events are waiting; the next try is in 0 seconds"
    )


def test_a_bug_of_the_client_in_an_isolation_changes_nothing_that_is_settled(original: Outbox, noon) -> None:
    ids = enqueue(original, 4)
    with pytest.raises(ValueError, match="a bug"):
        original.flush(ScriptedClient(REJECTED, REJECTED, OK, ValueError("a bug")))
    assert statuses(original) == ["abandoned", "sent", "pending", "pending"]
    assert [row(original, row_id).retry_count for row_id in ids] == [0, 0, 1, 1]


def test_a_bug_of_the_client_ages_events_out(outbox: Outbox, noon) -> None:
    row_id = add_row(outbox, created_at_ms=NOON_MS - WEEK_MS - 1)
    with pytest.raises(ValueError, match="a bug"):
        outbox.flush(ScriptedClient(ValueError("a bug")))
    aged_out = row(outbox, row_id)
    assert (aged_out.status, aged_out.last_error) == ("abandoned", "aged-out: client error: ValueError: a bug")


def test_what_a_client_redacts_is_not_stored(outbox: Outbox) -> None:
    class Redacting(ScriptedClient):
        def redact(self, text: str) -> str:
            return text.replace("hunter2", "***")

    row_id = outbox.enqueue(rule_fired())
    with pytest.raises(LookupError):
        outbox.flush(Redacting(LookupError("the password hunter2")))
    assert row(outbox, row_id).last_error == "client error: LookupError: the password ***"


def test_what_the_server_took_is_recorded_even_when_recording_fails_once(outbox: Outbox) -> None:
    enqueue(outbox, 2)
    real_settle = outbox.store.claims.settle
    failures = [StorageError("locked")]

    def settle(outcomes, **named):
        chosen = list(outcomes)
        if chosen and chosen[0][1].trigger == "deliver" and failures:
            raise failures.pop()
        return real_settle(chosen, **named)

    outbox.store.claims.settle = settle
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


class TimeLimitError(Exception):
    """What a task queue raises in a thread, at any moment, when its time is over."""


class TimeLimited(ScriptedClient):
    """Accepts a batch; from then on the time limit strikes at one of the steps that are left of the flush."""

    def __init__(self, at_step: int | None) -> None:
        super().__init__()
        self._at_step = at_step
        self._is_known = False
        self.steps = 0

    def upload(self, batch) -> None:
        super().upload(batch)
        # Any frame that is entered from now on; and those that wait for this one, but not this one.
        sys.settrace(self._trace)
        frame = sys._getframe(1)
        while frame is not None and self._is_ours(frame):
            frame.f_trace = self._trace
            frame = frame.f_back

    def _is_ours(self, frame) -> bool:
        return frame.f_code.co_filename in FLUSHING

    def _trace(self, frame, what, _):
        if not self._is_ours(frame):
            return None
        # Before that nobody but the client knows that the batch was accepted.
        self._is_known |= frame.f_code.co_name == "accepted"
        if what == "line" and self._is_known:
            self.steps += 1
            if self.steps == self._at_step:
                sys.settrace(None)
                raise TimeLimitError
        return self._trace


@pytest.mark.slow
@pytest.mark.sqlite
def test_a_time_limit_after_an_upload_reaches_the_caller_and_what_was_sent_is_recorded(url: str) -> None:
    tracing = sys.gettrace()
    step = 1
    with Outbox.open(
        url, policy=Policy(max_rows=4, when_full="trim", keep_sent_ms=WEEK_MS), synchronous="NORMAL"
    ) as outbox:
        while True:
            with outbox.engine.begin() as connection:
                connection.exec_driver_sql("DELETE FROM observation_events")
            parked = add_row(outbox, status="parked")
            sent = enqueue(outbox, 2)
            for _ in range(3):
                add_row(outbox, status="sent", sent_at_ms=1)
            client = TimeLimited(step)
            try:
                outbox.flush(client)
            except TimeLimitError:
                assert {row(outbox, row_id).status for row_id in sent} == {"sent"}, step
                step += 1
            else:
                assert step == client.steps + 1 > 100
                break
            finally:
                sys.settrace(tracing)
        assert row(outbox, parked).status == "pending"


@pytest.mark.parametrize("trigger", ["requeue", "unpark", "explode"])
def test_an_illegal_move_of_a_held_row_raises_before_anything_is_written(
    outbox: Outbox, monkeypatch, trigger: str
) -> None:
    ids = enqueue(outbox, 2)
    illegal = outcomes.Outcome(trigger, {"last_error": "must not be written"})
    monkeypatch.setattr(search, "after_shared_failure", lambda *_, **__: illegal)
    with pytest.raises(IllegalTransition, match=f"{trigger} is not a move of an event that is 'sending'"):
        outbox.flush(ScriptedClient(DOWN))
    assert statuses(outbox) == ["pending"] * 2
    assert [row(outbox, row_id).last_error for row_id in ids] == [None, None]


@pytest.mark.parametrize(("part", "what"), [("views", "chores"), ("revival", "unpark"), ("deletion", "trim")])
def test_maintenance_that_fails_does_not_fail_the_flush(outbox: Outbox, caplog, part: str, what: str) -> None:
    enqueue(outbox, 2)
    if what == "unpark":
        add_row(outbox, status="parked")
    if what == "trim":
        outbox.policy = replace(outbox.policy, max_rows=1, when_full="trim")

    def fail(*_: object, **__: object) -> None:
        raise StorageError("locked")

    setattr(getattr(outbox.store, part), what, fail)
    with caplog.at_level(logging.WARNING, "outbox"):
        assert outbox.flush(ScriptedClient()).sent == 2
    assert "failed, the next flush tries again: locked" in caplog.text
    assert statuses(outbox)[:2] == ["sent", "sent"]


def test_a_pause_that_can_not_be_ended_does_not_fail_the_flush(outbox: Outbox, noon, caplog, monkeypatch) -> None:
    enqueue(outbox, 1)
    outbox.flush(ScriptedClient(DOWN))
    noon.travel(minutes=10)

    def fail(*_: object) -> None:
        raise StorageError("locked")

    monkeypatch.setattr(outbox.store.pauses, "change", fail)
    with caplog.at_level(logging.WARNING, "outbox"):
        assert outbox.flush(ScriptedClient()).sent == 1
    assert "resuming the queue failed, the next flush tries again: locked" in caplog.text
    assert statuses(outbox) == ["sent"]


# Batch after batch


def test_flush_all_goes_on_until_nothing_is_due(outbox: Outbox) -> None:
    enqueue(outbox, 150)
    seen = []
    client = ScriptedClient()
    report = outbox.flush_all(client, progress=seen.append)
    assert client.sizes == [64, 64, 22]
    assert (report.attempted, report.sent) == (150, 150)
    assert [batch.sent for batch in seen] == [64, 64, 22]


def test_all_numbers_of_reports_add_up() -> None:
    assert FlushReport(1, 2, 3, 4, 5, 6, 7) + FlushReport(10, 20, 30, 40, 50, 60, 70) == FlushReport(
        11, 22, 33, 44, 55, 66, 77
    )


@pytest.mark.parametrize("failure", [DOWN, SLOW_DOWN, REVOKED])
def test_flush_all_stops_at_a_verdict_for_all(original: Outbox, failure) -> None:
    enqueue(original, 150)
    client = ScriptedClient(OK, failure)
    report = original.flush_all(client)
    assert client.sizes == [64, 64]
    assert (report.attempted, report.sent) == (128, 64)
    assert report.failure == str(failure)


def test_flush_all_goes_past_single_bad_rows(original: Outbox) -> None:
    ids = enqueue(original, 150)
    report = original.flush_all(rejecting(ids[3], ids[100]))
    assert (report.sent, report.abandoned) == (148, 2)


def test_a_bad_row_before_the_first_acceptance_is_no_verdict_for_all(outbox: Outbox) -> None:
    ids = enqueue(outbox, 3)
    with Outbox(outbox.engine, policy=Policy.original(batch_size=2)) as small:
        client = rejecting(ids[0])
        report = small.flush_all(client)
    assert client.ids == [[ids[0], ids[1]], [ids[0]], [ids[1]], [ids[2]]]
    assert (report.sent, report.abandoned, report.verdict) == (2, 1, None)


def test_flush_all_stops_when_the_server_rejects_everything(outbox: Outbox) -> None:
    ids = enqueue(outbox, 20)
    with Outbox(outbox.engine, policy=Policy.original(batch_size=10)) as small:
        client = rejecting(*ids)
        assert small.flush_all(client).rescheduled == 10
    assert len(client.sizes) == 11


# The claim's choice

_TIMES = range(NOON_MS - 3, NOON_MS + 3)


@pytest.mark.sqlite
@pytest.mark.untraced
def test_a_claim_takes_the_oldest_of_all_that_is_due() -> None:
    statuses_and_times = st.tuples(
        st.sampled_from(("pending", "sending", "parked")), st.sampled_from(_TIMES), st.sampled_from(_TIMES)
    )

    @settings(max_examples=300)
    @given(rows=st.lists(statuses_and_times, max_size=12), batch_size=st.integers(1, 4))
    def check(rows: list[tuple[str, int, int]], batch_size: int) -> None:
        with crowded.engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM observation_events")
        due = []
        for status, created_at_ms, next_attempt_at_ms in rows:
            row_id = add_row(
                crowded, status=status, created_at_ms=created_at_ms, next_attempt_at_ms=next_attempt_at_ms
            )
            if status != "parked" and next_attempt_at_ms <= NOON_MS:
                due.append((created_at_ms, row_id))
        claimed = crowded.store.claims.claim(
            now_ms=NOON_MS, lease_until_ms=NOON_MS + 60_000, batch_size=batch_size, is_original=True
        )
        assert [(row.created_at_ms, row.id) for row in claimed.rows] == sorted(due)[:batch_size]

    with Outbox.open("sqlite://") as crowded:
        check()
