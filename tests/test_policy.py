from dataclasses import replace

import pytest

from outbox import ConfigurationError, HttpFailure, Policy, TransportFailure, UploadFailure, Verdict
from outbox.failures import ClientError
from outbox.policy import asked_delay_ms, is_recent, longest_wait_ms, may_be_one_rows, named_delay_ms, verdict
from rule_builders import (
    BROKEN,
    DOWN,
    FORBIDDEN,
    LATE,
    MINUTE,
    MISSING,
    NOON_MS,
    REJECTED,
    REVOKED,
    SECOND,
    SLOW_DOWN,
    UNREACHABLE,
    WAIT_40_S,
)

OWN, ORIGINAL = Policy(), Policy.original()


# The settings


@pytest.mark.parametrize("value", [0, -1, 1.5, "64", None, True])
def test_a_policy_refuses_what_is_no_positive_whole_number(value: object) -> None:
    with pytest.raises(ConfigurationError, match="batch_size is .*, expected a whole number from 1 to 2.53 - 1"):
        Policy(batch_size=value)


@pytest.mark.parametrize("field", ["max_sent", "max_undelivered", "max_rows", "keep_sent_ms"])
@pytest.mark.parametrize("value", [-1, 1.5, "64", False])
def test_a_policy_refuses_what_is_no_bound(field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"{field} is .*, expected a whole number from 0 to 2.53 - 1"):
        Policy(**{field: value})


def test_a_policy_knows_what_to_do_when_full() -> None:
    with pytest.raises(ConfigurationError, match="when_full is 'block', expected 'trim' or 'reject'"):
        Policy(when_full="block")


def test_what_a_policy_leaves_open_suits_the_database() -> None:
    names = ("max_sent", "max_undelivered", "max_rows", "keep_sent_ms")
    on_sqlite, on_servers = (Policy().on(is_shared=is_shared) for is_shared in (False, True))
    assert [getattr(on_sqlite, name) for name in names] == [10_000, 1_000_000, 0, 0]
    assert [getattr(on_servers, name) for name in names] == [0, 0, 0, 7 * 86_400_000]
    assert Policy().when_full == "reject"
    chosen = Policy(max_sent=3, max_undelivered=4, max_rows=5, keep_sent_ms=6)
    assert chosen.on(is_shared=False) == chosen.on(is_shared=True) == chosen


def test_the_original_keeps_10_000_rows_and_takes_changes() -> None:
    assert (ORIGINAL.max_rows, ORIGINAL.when_full, ORIGINAL.keep_sent_ms) == (10_000, "trim", 0)
    changed = Policy.original(max_rows=7, batch_size=3)
    assert (changed.max_rows, changed.batch_size, changed.is_original) == (7, 3, True)
    assert not OWN.is_original
    assert replace(ORIGINAL, batch_size=3).is_original


@pytest.mark.parametrize("field", ["proof_ms", "revive_limit"])
@pytest.mark.parametrize("build", [Policy, Policy.original])
def test_a_policy_refuses_a_wrong_number(build, field: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{field} is 0, expected a whole number"):
        build(**{field: 0})


@pytest.mark.parametrize("value", [(), (0,), (1_000, True), (1_000, 2.5), (1_000, 2**53), ("5s",)])
def test_a_policy_refuses_a_wrong_schedule(value: object) -> None:
    with pytest.raises(ConfigurationError, match="backoff_ms is .*, expected one or more whole numbers from 1 to"):
        Policy(backoff_ms=value)


@pytest.mark.parametrize("value", [0, "60000", [5_000]])
def test_a_policy_refuses_what_is_no_backoff(value: object) -> None:
    with pytest.raises(ConfigurationError, match="expected a whole number from 1 to 2.53 - 1, or a tuple of them"):
        Policy(backoff_ms=value)


def test_the_longest_wait_is_that_of_the_schedule_with_its_jitter() -> None:
    assert longest_wait_ms(OWN) == 1_920_000 * 5 // 4
    assert longest_wait_ms(Policy(backoff_ms=(1_000, 4_000_000, 2_000))) == 5_000_000
    assert longest_wait_ms(Policy(backoff_ms=(1_000,))) == 300_000 * 5 // 4


@pytest.mark.parametrize(
    ("verdicts", "named"),
    [
        ([409], r"verdicts is \[409\], expected a mapping from HTTP status to Verdict"),
        ({99: Verdict.TRANSIENT}, "verdicts has the key 99, expected an HTTP status, 100 to 599"),
        ({600: Verdict.TRANSIENT}, "verdicts has the key 600, expected"),
        ({"409": Verdict.TRANSIENT}, "verdicts has the key '409', expected"),
        ({409: "transient"}, r"verdicts\[409\] is 'transient', expected one of Verdict.TRANSIENT, "),
    ],
)
def test_a_policy_refuses_what_is_no_table_of_verdicts(verdicts: object, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        Policy(verdicts=verdicts)


def test_a_policy_keeps_its_table_of_verdicts() -> None:
    given = {409: Verdict.TRANSIENT}
    policy = Policy(verdicts=given)
    given[409] = Verdict.PERMANENT
    assert policy.verdicts == {409: Verdict.TRANSIENT}
    assert hash(policy) == hash(OWN)
    assert policy != OWN


# Verdicts

VERDICTS = [
    *((status, Verdict.TRANSIENT, Verdict.TRANSIENT) for status in (100, 199, 301, 308, 399, 408, 425)),
    *((status, Verdict.TRANSIENT, Verdict.PERMANENT) for status in (404, 405, 410)),
    *(
        (status, Verdict.PERMANENT, Verdict.PERMANENT)
        for status in (400, 402, 406, 407, 409, 411, 413, 422, 426, 499)
    ),
    *((status, Verdict.AUTH_BLOCKED, Verdict.AUTH_BLOCKED) for status in (401, 403)),
    (429, Verdict.RATE_LIMITED, Verdict.RATE_LIMITED),
    *((status, Verdict.TRANSIENT, Verdict.TRANSIENT) for status in (500, 502, 503, 504, 599, 600, 999, 0, -1)),
]


@pytest.mark.parametrize(("status", "own", "original"), VERDICTS)
def test_verdict_by_status(status: int, own: Verdict, original: Verdict) -> None:
    assert verdict(HttpFailure(status), OWN) is own
    assert verdict(HttpFailure(status), ORIGINAL) is original


@pytest.mark.parametrize(
    "failure", [UNREACHABLE, LATE, UploadFailure("odd"), ClientError("client error: KeyError: 1")]
)
def test_a_failure_without_an_answer_is_transient(failure) -> None:
    assert verdict(failure, OWN) is verdict(failure, ORIGINAL) is Verdict.TRANSIENT


@pytest.mark.parametrize("judged", Verdict)
@pytest.mark.parametrize("status", [100, 200, 302, 401, 404, 409, 429, 503, 599])
@pytest.mark.parametrize("build", [Policy, Policy.original])
def test_the_table_of_verdicts_overrides_the_default(build, status: int, judged: Verdict) -> None:
    policy = build(verdicts={status: judged})
    assert verdict(HttpFailure(status), policy) is judged
    assert verdict(REJECTED, policy) is Verdict.PERMANENT
    assert verdict(UNREACHABLE, policy) is Verdict.TRANSIENT


@pytest.mark.parametrize(
    ("failure", "named", "asked"),
    [
        (WAIT_40_S, 40 * SECOND, 40 * SECOND),
        (SLOW_DOWN, None, MINUTE),
        (HttpFailure(429, "", '{"retryAfterSec":40}', retry_after_ms=7_000), 7_000, 7_000),
        (HttpFailure(503, retry_after_ms=9_000), 9_000, 9_000),
        (HttpFailure(503, "", '{"retryAfterSec":3}'), 3_000, 3_000),
        (DOWN, None, None),
        (HttpFailure(500, retry_after_ms=9_000), None, None),
        (HttpFailure(422, "", '{"retryAfterSec":3}'), None, None),
        (UNREACHABLE, None, None),
    ],
)
def test_only_429_and_503_name_a_delay_and_429_has_one_anyway(failure, named, asked) -> None:
    assert named_delay_ms(failure, OWN) == named
    assert asked_delay_ms(failure, OWN) == asked


def test_an_answer_that_is_rate_limited_by_the_table_names_a_delay_like_a_429() -> None:
    policy = Policy(verdicts={420: Verdict.RATE_LIMITED, 429: Verdict.TRANSIENT})
    assert asked_delay_ms(HttpFailure(420), policy) == MINUTE
    assert asked_delay_ms(HttpFailure(420, retry_after_ms=9_000), policy) == 9_000
    assert asked_delay_ms(HttpFailure(420, "", '{"retryAfterSec":3}'), policy) == 3_000
    assert asked_delay_ms(SLOW_DOWN, policy) is None
    assert asked_delay_ms(WAIT_40_S, policy) == 40 * SECOND


# Whose failure it is

ONES = (BROKEN, DOWN, HttpFailure(599), MISSING, HttpFailure(405), HttpFailure(410), HttpFailure(408), LATE)
MAY_BE_ONE_ROWS = [
    *((failure, True, rows, 0, True) for failure in (REVOKED, FORBIDDEN) for rows in (1, 64)),
    *((failure, False, 64, 4, True) for failure in (REVOKED, FORBIDDEN)),
    *((failure, False, 64, 3, False) for failure in (REVOKED, FORBIDDEN)),
    *((failure, False, 1, 9, False) for failure in (REVOKED, FORBIDDEN)),
    *((failure, True, rows, 2, True) for failure in (*ONES, HttpFailure(425), ClientError()) for rows in (1, 64)),
    *((failure, True, rows, 1, False) for failure in ONES for rows in (1, 64)),
    *((failure, False, 2, 4, True) for failure in ONES),
    *((failure, False, 2, 3, False) for failure in ONES),
    *((failure, False, 1, 9, False) for failure in ONES),
    *(
        (failure, True, 64, 9, False)
        for failure in (
            SLOW_DOWN,
            WAIT_40_S,
            HttpFailure(503, retry_after_ms=1_000),
            UNREACHABLE,
            HttpFailure(302),
            HttpFailure(600),
            UploadFailure("odd"),
        )
    ),
]


@pytest.mark.parametrize(("failure", "works", "rows", "retry_count", "expected"), MAY_BE_ONE_ROWS)
def test_a_shared_failure_may_be_one_rows(failure, works, rows, retry_count, expected) -> None:
    case = {"works": works, "rows": rows, "retry_count": retry_count}
    assert may_be_one_rows(failure, policy=OWN, **case) is expected
    assert may_be_one_rows(failure, policy=ORIGINAL, **case) is False


@pytest.mark.parametrize(
    ("status", "judged", "expected"),
    [
        (409, Verdict.TRANSIENT, True),
        (401, Verdict.TRANSIENT, True),
        (302, Verdict.TRANSIENT, False),
        (302, Verdict.AUTH_BLOCKED, True),
        (500, Verdict.RATE_LIMITED, False),
        (500, Verdict.PERMANENT, False),  # the search has rules of its own for rejections
    ],
)
def test_the_table_of_verdicts_tells_whose_failure_it_may_be(status, judged, expected) -> None:
    policy = Policy(verdicts={status: judged})
    assert may_be_one_rows(HttpFailure(status), rows=9, retry_count=2, works=True, policy=policy) is expected


@pytest.mark.parametrize(
    ("accepted_at_ms", "expected"),
    [(None, False), (NOON_MS, True), (NOON_MS - MINUTE, True), (NOON_MS - MINUTE - 1, False)],
)
def test_a_destination_works_for_a_minute_after_an_acceptance(accepted_at_ms, expected) -> None:
    assert is_recent(accepted_at_ms, NOON_MS) is expected


def test_an_answer_of_a_plain_transport_failure_is_no_timeout() -> None:
    assert not may_be_one_rows(TransportFailure("reset"), rows=9, retry_count=9, works=True, policy=OWN)
