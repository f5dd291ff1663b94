import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import HttpFailure, Policy, TransportFailure, UploadFailure
from outbox.decisions import (
    after_lone_failure,
    after_proof,
    after_refused_size,
    after_rejection,
    after_shared_failure,
    age_out_ms,
    is_proven,
)
from outbox.outcomes import WaitsFor
from rule_builders import (
    BROKEN,
    DAY,
    DOWN,
    FORBIDDEN,
    MINUTE,
    NOON_MS,
    REJECTED,
    REVOKED,
    SECOND,
    SLOW_DOWN,
    TOO_LARGE,
    UNREACHABLE,
    Row,
)

OWN, ORIGINAL = Policy(), Policy.original()


# Proof


@pytest.mark.parametrize(
    ("suspected_at_ms", "accepted_at_ms", "proof_ms", "expected"),
    [
        (None, NOON_MS, 600_000, False),
        (NOON_MS - 10 * MINUTE, None, 600_000, False),
        (NOON_MS - 10 * MINUTE, NOON_MS, 600_000, True),
        (NOON_MS - 10 * MINUTE + 1, NOON_MS, 600_000, False),
        (NOON_MS - 10 * MINUTE, NOON_MS - MINUTE, 600_000, True),
        (NOON_MS - 10 * MINUTE, NOON_MS - MINUTE - 1, 600_000, False),
        (NOON_MS - SECOND, NOON_MS - SECOND, 1_000, False),
        (NOON_MS - SECOND, NOON_MS - SECOND + 1, 1_000, True),
        (NOON_MS - SECOND, NOON_MS - 2 * SECOND, 1_000, False),
    ],
)
def test_a_suspect_is_proven(suspected_at_ms, accepted_at_ms, proof_ms, expected) -> None:
    row = Row(suspected_at_ms=suspected_at_ms)
    policy = Policy(proof_ms=proof_ms)
    assert is_proven(row, now_ms=NOON_MS, accepted_at_ms=accepted_at_ms, policy=policy) is expected


# What becomes of a row


def due(delay_ms: int, row_id: int = 5) -> int:
    return NOON_MS + delay_ms + (NOON_MS ^ row_id) % (delay_ms // 4)


def rescheduled(text: str, delay_ms: int, waits_for: str, **columns: int) -> tuple[str, dict[str, object]]:
    values = {"retry_count": 1, "last_error": text, "waits_for": waits_for, "suspected_at_ms": None, **columns}
    return "reschedule", {**values, "next_attempt_at_ms": due(delay_ms), "lost_leases": 0}


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (BROKEN, rescheduled("500 Internal Server Error", 120_000, "service")),
        (REJECTED, rescheduled("422 Unprocessable Entity", 120_000, "service")),
        (UNREACHABLE, rescheduled("transport: connection refused", 120_000, "service")),
        (HttpFailure(503, "Busy", retry_after_ms=200_000), rescheduled("503 Busy", 200_000, "delay")),
        (HttpFailure(503, "Busy", retry_after_ms=5_000), rescheduled("503 Busy", 120_000, "delay")),
        (HttpFailure(429, "Slow", retry_after_ms=40_000), rescheduled("429 Slow", 40_000, "delay", retry_count=0)),
        (HttpFailure(429, "Slow"), rescheduled("429 Slow", 60_000, "delay", retry_count=0)),
        (REVOKED, ("park", {"last_error": "401 Unauthorized", "lost_leases": 0})),
        (FORBIDDEN, ("park", {"last_error": "403 Forbidden", "lost_leases": 0})),
    ],
)
@pytest.mark.parametrize("policy", [OWN, ORIGINAL])
def test_what_a_shared_failure_does_to_a_row(failure, expected, policy) -> None:
    assert after_shared_failure(failure, Row(), now_ms=NOON_MS, policy=policy) == expected


@pytest.mark.parametrize(
    ("retry_count", "delay"),
    [(0, 120_000), (1, 240_000), (2, 480_000), (3, 960_000), (4, 1_920_000), (5, 1_920_000), (99, 1_920_000)],
)
def test_a_shared_failure_reschedules_by_the_backoff(retry_count: int, delay: int) -> None:
    outcome = after_shared_failure(DOWN, Row(retry_count=retry_count), now_ms=NOON_MS, policy=OWN)
    assert outcome == rescheduled("503 Service Unavailable", delay, "service", retry_count=retry_count + 1)


@pytest.mark.parametrize(
    ("failure", "delay"),
    [
        (HttpFailure(429, "Slow"), 60_000),
        (HttpFailure(429, "Slow", '{"retryAfterSec":40}'), 40_000),
        (HttpFailure(429, "Slow", '{"retryAfterSec":40}', retry_after_ms=7_000), 7_000),
        (HttpFailure(429, "Slow", retry_after_ms=300_001), 300_000),
        (HttpFailure(429, "Slow", retry_after_ms=2**70), 300_000),
        (HttpFailure(429, "Slow", retry_after_ms=0), 1_000),
        (HttpFailure(429, "Slow", retry_after_ms=-5), 1_000),
        (HttpFailure(503, "Slow", retry_after_ms=200_000), 200_000),
        (HttpFailure(503, "Slow", retry_after_ms=86_400_000), 300_000),
        (HttpFailure(503, "Slow", retry_after_ms=5_000), 120_000),
        (HttpFailure(503, "Slow", '{"retryAfterSec":180}'), 180_000),
        (HttpFailure(500, "Slow", retry_after_ms=200_000), 120_000),
    ],
)
def test_a_row_waits_for_the_delay_that_an_answer_names(failure: HttpFailure, delay: int) -> None:
    outcome = after_shared_failure(failure, Row(), now_ms=NOON_MS, policy=OWN)
    assert outcome.values["next_attempt_at_ms"] == due(delay)


@pytest.mark.parametrize(
    ("failure", "revived_at_ms", "expected"),
    [
        (TransportFailure("no route"), None, "aged-out: transport: no route"),
        (REJECTED, None, "aged-out: 422 Unprocessable Entity"),
        (DOWN, NOON_MS - 7 * DAY - 1, "aged-out: 503 Service Unavailable"),
        (DOWN, NOON_MS - 7 * DAY, "503 Service Unavailable"),
        (DOWN, NOON_MS - 99 * DAY, "aged-out: 503 Service Unavailable"),
    ],
)
def test_a_row_ages_from_its_creation_or_revival(failure, revived_at_ms, expected: str) -> None:
    row = Row(created_at_ms=NOON_MS - 7 * DAY - 1, revived_at_ms=revived_at_ms)
    outcome = after_shared_failure(failure, row, now_ms=NOON_MS, policy=OWN)
    assert outcome.values["last_error"] == expected


@pytest.mark.parametrize("status", [401, 422, 429, 503])
def test_an_error_text_is_cut_to_2048_characters(status: int) -> None:
    outcome = after_shared_failure(HttpFailure(status, "x" * 5_000), Row(), now_ms=NOON_MS, policy=OWN)
    assert len(outcome.values["last_error"]) == 2_048


def test_an_error_text_is_one_that_every_database_can_store() -> None:
    assert after_proof(HttpFailure(422, "a\0b", "c\ud800d")).values["last_error"] == "permanent: 422 a\ufffdb: c?d"


def test_a_shared_failure_is_the_services_unless_the_row_waited_for_row_and_keeps_that() -> None:
    row = Row(waits_for="row", suspected_at_ms=7)

    def columns(failure: UploadFailure, **how: bool) -> tuple[object, object]:
        values = after_shared_failure(failure, row, now_ms=NOON_MS, policy=OWN, **how).values
        return values["waits_for"], values["suspected_at_ms"]

    assert columns(BROKEN) == ("service", 7)
    assert columns(BROKEN, keeps_row=True) == ("row", 7)
    assert columns(SLOW_DOWN, keeps_row=True) == ("delay", 7)


@pytest.mark.parametrize(
    ("settle", "failure", "reason"),
    [
        (after_shared_failure, BROKEN, "aged-out: 500 Internal Server Error"),
        (after_shared_failure, SLOW_DOWN, "aged-out (rate-limited): 429 Too Many Requests"),
        (after_lone_failure, FORBIDDEN, "aged-out: 403 Forbidden"),
        (after_rejection, REJECTED, "aged-out: 422 Unprocessable Entity"),
    ],
)
def test_a_row_is_given_up_when_it_is_older_than_a_week(settle, failure, reason: str) -> None:
    week = Row(created_at_ms=NOON_MS - 7 * DAY)
    assert settle(failure, week, now_ms=NOON_MS, policy=OWN).trigger == "reschedule"
    older = Row(created_at_ms=NOON_MS - 7 * DAY - 1)
    assert settle(failure, older, now_ms=NOON_MS, policy=OWN) == (
        "abandon",
        {"last_error": reason, "lost_leases": 0},
    )
    revived = Row(created_at_ms=NOON_MS - 7 * DAY - 1, revived_at_ms=NOON_MS - DAY)
    assert settle(failure, revived, now_ms=NOON_MS, policy=OWN).trigger == "reschedule"


def test_a_parked_row_never_ages_out() -> None:
    ancient = Row(created_at_ms=0)
    assert after_shared_failure(REVOKED, ancient, now_ms=NOON_MS, policy=OWN).trigger == "park"


def test_a_row_that_failed_alone_waits_for_row_and_backs_off() -> None:
    outcome = after_lone_failure(FORBIDDEN, Row(retry_count=2), now_ms=NOON_MS, policy=OWN)
    assert outcome == rescheduled("403 Forbidden", 480_000, "row", retry_count=3)


def test_a_rejected_row_is_suspected_since_its_first_rejection() -> None:
    first = after_rejection(REJECTED, Row(), now_ms=NOON_MS, policy=OWN)
    assert first == rescheduled("422 Unprocessable Entity", 120_000, "proof", suspected_at_ms=NOON_MS)
    again = after_rejection(REJECTED, Row(suspected_at_ms=7), now_ms=NOON_MS, policy=OWN)
    assert again.values["suspected_at_ms"] == 7


def test_a_proven_row_is_abandoned_with_its_failure() -> None:
    assert after_proof(REJECTED) == (
        "abandon",
        {"last_error": "permanent: 422 Unprocessable Entity", "lost_leases": 0},
    )


def test_a_request_that_was_too_large_counts_against_no_row() -> None:
    outcome = after_refused_size(TOO_LARGE, Row(retry_count=1), now_ms=NOON_MS, policy=OWN)
    assert outcome == rescheduled("413 Content Too Large", 120_000, "service")


@given(
    status=st.integers(0, 700),
    retry_count=st.integers(0, 50),
    waits_for=st.sampled_from([None, *(kind.value for kind in WaitsFor)]),
    keeps_row=st.booleans(),
)
def test_a_row_is_never_abandoned_by_a_shared_failure_before_it_ages_out(
    status, retry_count, waits_for, keeps_row
):
    row = Row(retry_count=retry_count, waits_for=waits_for)
    outcome = after_shared_failure(HttpFailure(status), row, now_ms=NOON_MS, policy=OWN, keeps_row=keeps_row)
    assert outcome.trigger == ("park" if status in (401, 403) else "reschedule")


def test_the_age_of_a_scheduled_row_counts_from_its_time() -> None:
    row = Row(created_at_ms=1, revived_at_ms=2, not_before_ms=NOON_MS)
    assert age_out_ms(row, DAY) == NOON_MS + DAY
