import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import NOON_MS
from outbox import ConfigurationError, HttpFailure, ObservationEvent, Policy, TransportFailure, UploadFailure
from outbox.policy import Verdict, backoff, decide, jitter, retry_after, verdict

DAY_MS = 86_400_000
WEEK_MS = 7 * DAY_MS


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        *((status, Verdict.TRANSIENT) for status in (100, 199, 200, 204, 301, 302, 304, 308, 399)),
        (400, Verdict.PERMANENT),
        (401, Verdict.AUTH_BLOCKED),
        (402, Verdict.PERMANENT),
        (403, Verdict.AUTH_BLOCKED),
        (404, Verdict.PERMANENT),
        (407, Verdict.PERMANENT),
        (408, Verdict.TRANSIENT),
        (409, Verdict.PERMANENT),
        (413, Verdict.PERMANENT),
        (422, Verdict.PERMANENT),
        (425, Verdict.TRANSIENT),
        (426, Verdict.PERMANENT),
        (429, Verdict.RATE_LIMITED),
        (499, Verdict.PERMANENT),
        *((status, Verdict.TRANSIENT) for status in (500, 502, 503, 504, 599, 600, 999, 0, -1)),
    ],
)
def test_verdict_by_status(status: int, expected: Verdict) -> None:
    assert verdict(HttpFailure(status)) is expected


def test_a_failure_without_status_is_transient() -> None:
    assert verdict(TransportFailure("connection refused")) is Verdict.TRANSIENT
    assert verdict(UploadFailure("odd")) is Verdict.TRANSIENT


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (-1, 60_000),
        (0, 60_000),
        (1, 120_000),
        (2, 240_000),
        (3, 480_000),
        (4, 960_000),
        (5, 1_920_000),
        (6, 1_920_000),
        (2**40, 1_920_000),
    ],
)
def test_backoff(count: int, expected: int) -> None:
    assert backoff(count) == expected


@pytest.mark.parametrize(
    ("base", "seed", "expected"),
    [(120_000, 31_234, 1_234), (40_000, 9_999, 9_999), (40_000, 10_000, 0), (3, 99, 0), (0, 99, 0), (-8, 7, 0)],
)
def test_jitter(base: int, seed: int, expected: int) -> None:
    assert jitter(base, seed) == expected


@given(base=st.integers(-(2**63), 2**63), seed=st.integers(-(2**63), 2**64))
def test_jitter_is_never_negative_and_below_a_quarter(base: int, seed: int) -> None:
    assert 0 <= jitter(base, seed) < max(1, base // 4)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"data":{"retryAfterSec":55}}', 55_000),
        ("RATE_LIMITED: rate_limited", None),
        ('"retryAfterSec":99999', 300_000),
        ('"retryAfterSec":0', 1_000),
        ('{"retryAfterSec":null,"foo":7}', None),
        ('"xretryAfterSec":7', None),
        ('{"xretryAfterSec":7}', None),
        ('{"retryAfterSec":40}', 40_000),
        ('{"retryAfterSec":-3}', 1_000),
        ('{"retryAfterSec":"40"}', None),
        ('{"retryAfterSec":1.5}', None),
        ('{"retryAfterSec":true}', None),
        ('[[{"a":[{"retryAfterSec":7}]}]]', 7_000),
        ('{"a":{"retryAfterSec":5},"retryAfterSec":7}', 7_000),
        ('{"a":{"b":{"retryAfterSec":1}},"c":{"retryAfterSec":2}}', 2_000),
        ('{"retryAfterSec":null,"a":{"retryAfterSec":9}}', 9_000),
        ('{"error":"slow","retryAfterSec" : 12, "detail":"cut off he', 12_000),
        ('{"retryAfterSec":\n\t30', 30_000),
        ('{"retryAfterSec":"soon", "x', None),
        ('{"retryAfterSec":' + "9" * 5_000 + "}", 300_000),
        ('{"retryAfterSec":5,"x":NaN}', 5_000),
        ("[" * 60_000, None),
        ("", None),
        ("\ud800", None),
    ],
)
def test_retry_after_of_a_body(body: str, expected: int | None) -> None:
    assert retry_after(body) == expected


@given(st.text())
def test_retry_after_of_any_text_is_none_or_within_the_clamp(body: str) -> None:
    assert retry_after(body) is None or 1_000 <= retry_after(body) <= 300_000


@given(st.integers(), st.text(alphabet=" \t\n"), st.integers(0, 40))
def test_retry_after_survives_being_cut_off(seconds: int, space: str, cut: int) -> None:
    whole = f'{{"retryAfterSec"{space}:{space}{abs(seconds)},"detail":"{"x" * 40}"}}'
    expected = min(max(abs(seconds) * 1_000, 1_000), 300_000)
    assert retry_after(whole) == retry_after(whole[: len(whole) - 1 - cut]) == expected


def judge(failure: UploadFailure, *, now: int = NOON_MS, judged: Verdict | None = None, **columns: int | None):
    known = {"id": 5, "retry_count": 0, "created_at_ms": NOON_MS, "revived_at_ms": None, **columns}
    return decide(judged or verdict(failure), failure, ObservationEvent(**known), now_ms=now, policy=Policy())


def due(now: int, delay: int, row_id: int = 5) -> int:
    return now + delay + (now ^ row_id) % (delay // 4)


@pytest.mark.parametrize(
    ("retry_count", "delay"),
    [(0, 120_000), (1, 240_000), (2, 480_000), (3, 960_000), (4, 1_920_000), (5, 1_920_000), (99, 1_920_000)],
)
def test_a_transient_failure_reschedules_by_the_backoff(retry_count: int, delay: int) -> None:
    outcome = judge(HttpFailure(503, "Service Unavailable"), retry_count=retry_count)
    assert outcome == (
        "reschedule",
        {
            "retry_count": retry_count + 1,
            "next_attempt_at_ms": due(NOON_MS, delay),
            "last_error": "503 Service Unavailable",
        },
    )


@pytest.mark.parametrize(
    ("failure", "delay"),
    [
        (HttpFailure(429, "Too Many Requests"), 60_000),
        (HttpFailure(429, "Too Many Requests", '{"retryAfterSec":40}'), 40_000),
        (HttpFailure(429, "Too Many Requests", '{"retryAfterSec":40}', retry_after_ms=7_000), 7_000),
        (HttpFailure(429, "Too Many Requests", retry_after_ms=300_000), 300_000),
    ],
)
def test_a_rate_limit_reschedules_by_the_delay_asked_for(failure: HttpFailure, delay: int) -> None:
    outcome = judge(failure, retry_count=2)
    assert outcome.trigger == "reschedule"
    assert outcome.values["next_attempt_at_ms"] == due(NOON_MS, delay)
    assert outcome.values["retry_count"] == 2


@pytest.mark.parametrize(
    ("failure", "delay"),
    [
        (HttpFailure(503, retry_after_ms=200_000), 200_000),
        (HttpFailure(503, retry_after_ms=5_000), 120_000),
        (HttpFailure(503, "", '{"retryAfterSec":180}'), 180_000),
        (HttpFailure(500, retry_after_ms=200_000), 120_000),
    ],
)
def test_on_503_the_delay_asked_for_is_the_least(failure: HttpFailure, delay: int) -> None:
    assert judge(failure).values["next_attempt_at_ms"] == due(NOON_MS, delay)


@pytest.mark.parametrize(
    ("failure", "judged", "age", "expected"),
    [
        (HttpFailure(503, "Busy"), None, WEEK_MS, ("reschedule", "503 Busy")),
        (HttpFailure(503, "Busy"), None, WEEK_MS + 1, ("abandon", "aged-out: 503 Busy")),
        (TransportFailure("no route"), None, WEEK_MS + 1, ("abandon", "aged-out: transport: no route")),
        (HttpFailure(429, "Slow"), None, WEEK_MS, ("reschedule", "429 Slow")),
        (HttpFailure(429, "Slow"), None, WEEK_MS + 1, ("abandon", "aged-out (rate-limited): 429 Slow")),
        (HttpFailure(401, "No"), None, 99 * WEEK_MS, ("park", "401 No")),
        (HttpFailure(422, "Bad"), None, 0, ("abandon", "permanent: 422 Bad")),
        (HttpFailure(422, "Bad"), None, 99 * WEEK_MS, ("abandon", "permanent: 422 Bad")),
        (HttpFailure(422, "Bad"), Verdict.TRANSIENT, 0, ("reschedule", "422 Bad")),
        (HttpFailure(422, "Bad"), Verdict.TRANSIENT, WEEK_MS + 1, ("abandon", "aged-out: 422 Bad")),
    ],
)
def test_what_a_failure_does_to_a_row(failure, judged, age, expected) -> None:
    outcome = judge(failure, judged=judged, now=NOON_MS + age)
    assert (outcome.trigger, outcome.values["last_error"]) == expected


def test_a_revived_row_ages_from_its_revival() -> None:
    late = NOON_MS + WEEK_MS + 1
    assert judge(HttpFailure(503), now=late, revived_at_ms=NOON_MS + 1).trigger == "reschedule"
    assert judge(HttpFailure(503), now=late, revived_at_ms=NOON_MS).trigger == "abandon"
    assert judge(HttpFailure(503), now=late, revived_at_ms=NOON_MS - DAY_MS).trigger == "abandon"


@pytest.mark.parametrize("status", [401, 422, 429, 503])
def test_an_error_text_is_cut_to_2048_characters(status: int) -> None:
    error = judge(HttpFailure(status, "x" * 5_000)).values["last_error"]
    assert len(error) == 2_048


def test_an_error_text_is_one_that_every_database_can_store() -> None:
    assert judge(HttpFailure(422, "a\0b", "c\ud800d")).values["last_error"] == "permanent: 422 a\ufffdb: c?d"


@pytest.mark.parametrize("value", [0, -1, 1.5, "64", None, True])
def test_a_policy_refuses_what_is_no_positive_whole_number(value: object) -> None:
    with pytest.raises(ConfigurationError, match="batch_size is .*, expected a whole number from 1 on"):
        Policy(batch_size=value)


@pytest.mark.parametrize("field", ["max_rows", "keep_sent_ms"])
@pytest.mark.parametrize("value", [-1, 1.5, "64", False])
def test_a_policy_refuses_what_is_no_bound(field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"{field} is .*, expected a whole number from 0 on"):
        Policy(**{field: value})


def test_a_policy_knows_what_to_do_when_full() -> None:
    with pytest.raises(ConfigurationError, match="when_full is 'block', expected 'trim' or 'reject'"):
        Policy(when_full="block")


def test_what_a_policy_leaves_open_suits_the_database() -> None:
    on_sqlite, on_servers = (Policy().on(is_shared=is_shared) for is_shared in (False, True))
    assert (on_sqlite.max_rows, on_sqlite.keep_sent_ms) == (10_000, 0)
    assert (on_servers.max_rows, on_servers.keep_sent_ms) == (0, 7 * 86_400_000)
    chosen = Policy(max_rows=5, keep_sent_ms=6)
    assert chosen.on(is_shared=False) == chosen.on(is_shared=True) == chosen


def test_failure_texts() -> None:
    assert str(HttpFailure(401, "Unauthorized", '{"error":"session_revoked"}')) == (
        '401 Unauthorized: {"error":"session_revoked"}'
    )
    assert str(HttpFailure(503, "Service Unavailable")) == "503 Service Unavailable"
    assert str(HttpFailure(599)) == "599"
    assert str(TransportFailure("connection refused")) == "transport: connection refused"
