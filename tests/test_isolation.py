from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.failures import HttpFailure, UploadFailure
from outbox.isolation import isolate
from outbox.policy import Policy, Verdict, verdict
from rule_builders import (
    BROKEN,
    DAY,
    FORBIDDEN,
    HOUR,
    LATE,
    MINUTE,
    MISSING,
    NOON_MS,
    REJECTED,
    REVOKED,
    SECOND,
    SLOW_DOWN,
    TOO_LARGE,
    UNREACHABLE,
    WAIT_40_S,
    Answer,
    Row,
    failing,
    rejecting,
    rows,
    run,
)
from search_figures import requests, samples

OK = None
JUST_NOW = NOON_MS - SECOND
LONG_AGO = NOON_MS - HOUR
PROVABLE = {"suspected_at_ms": NOON_MS - 10 * MINUTE}

any_policy = pytest.mark.parametrize("policy", [Policy(), Policy.original()], ids=["own", "original"])


# Under every policy


@any_policy
def test_a_claim_that_is_accepted_is_one_request(policy) -> None:
    done = run(rows(64), [OK], policy)
    assert done.sizes == [64]
    assert done.ids("deliver") == list(range(1, 65))
    assert done.search.result == (64, 0, None, False)


@any_policy
def test_a_claim_without_rows_is_no_request(policy) -> None:
    assert run([], [], policy).sizes == []


@any_policy
def test_a_429_holds_for_the_whole_claim(policy) -> None:
    done = run(rows(64, retry_count=9), [SLOW_DOWN], policy, accepted_at_ms=JUST_NOW)
    assert done.sizes == [64]
    assert set(done.waiting().values()) == {"delay"}
    assert {outcome.values["retry_count"] for outcome in done.outcomes.values()} == {9}


@any_policy
def test_a_claim_of_up_to_eight_rows_is_searched_row_by_row(policy) -> None:
    assert run(rows(8, **PROVABLE), rejecting(2, 7), policy).sizes == [8] + [1] * 8


@any_policy
@pytest.mark.parametrize("size", range(9, 65))
@pytest.mark.untraced
def test_one_bad_row_costs_at_most_16_requests(policy, size: int) -> None:
    counts = [requests({bad}, size, policy, failure=REJECTED) for bad in range(size)]
    assert max(counts) <= 16
    assert sum(counts) / size <= min(14, size + 1)


@any_policy
@pytest.mark.parametrize(("bad", "at_most"), [(2, 20), (4, 29), (8, 44), (16, 64), (21, 71), (32, 67), (64, 65)])
@pytest.mark.untraced
def test_many_bad_rows_of_64_cost_hardly_more_than_one_by_one(policy, bad: int, at_most: int) -> None:
    counts = [requests(chosen, 64, policy, failure=REJECTED, suspected=True) for chosen in samples(64, bad, 100)]
    assert sum(counts) / len(counts) <= at_most
    assert max(counts) <= 86


@any_policy
def test_a_rejected_half_is_not_sent_whole_again(policy) -> None:
    done = run(rows(16, **PROVABLE), rejecting(16), policy)
    assert done.parts == [
        tuple(range(1, 17)),
        (1,),
        (2,),
        (3, 4),
        (5, 6, 7, 8),
        # Of the eight that are left one is bad, so the first half of them is next.
        (9, 10, 11, 12),
        (13, 14),
        (15,),
        (16,),
    ]


@any_policy
def test_rows_behind_a_bad_row_go_together_again(policy) -> None:
    done = run(rows(16, **PROVABLE), rejecting(4, 5), policy)
    assert done.parts[1:] == [
        (1,),
        (2,),
        (3, 4),
        (3,),
        (4,),
        (5,),
        (6,),
        (7,),
        (8,),
        (9, 10),
        (11, 12),
        (13, 14, 15),
        (16,),
    ]


@any_policy
def test_rows_with_another_owner_are_left_out(policy) -> None:
    search = isolate(rows(12), policy)
    search.drop([12], now_ms=NOON_MS)
    whole = search.next_part()
    assert [row.id for row in whole] == list(range(1, 12))
    search.rejected(whole, REJECTED, now_ms=NOON_MS)
    search.accepted(search.next_part(), now_ms=NOON_MS)
    search.accepted(search.next_part(), now_ms=NOON_MS)
    search.rejected(search.next_part(), REJECTED, now_ms=NOON_MS)
    search.drop([3, 5, 6, 7], now_ms=NOON_MS)
    assert [row.id for row in search.next_part()] == [4]
    assert [row_id for row_id, _ in search.take_outcomes()] == [1, 2]


@any_policy
def test_a_search_that_loses_its_last_rows_settles_those_that_were_tried(policy) -> None:
    search = isolate(rows(3, suspected_at_ms=1), policy)
    search.rejected(search.next_part(), REJECTED, now_ms=NOON_MS)
    search.rejected(search.next_part(), REJECTED, now_ms=NOON_MS)
    search.drop([2, 3], now_ms=NOON_MS)
    assert search.next_part() == ()
    assert [row_id for row_id, _ in search.take_outcomes()] == [1]


@any_policy
def test_a_claim_that_loses_all_its_rows_is_over(policy) -> None:
    search = isolate(rows(3), policy)
    search.drop([1, 2, 3], now_ms=NOON_MS)
    assert search.next_part() == ()
    assert search.take_outcomes() == []


FAILURES = (REJECTED, BROKEN, MISSING, REVOKED, FORBIDDEN, TOO_LARGE, SLOW_DOWN, UNREACHABLE, LATE)


@any_policy
@given(
    answers=st.lists(st.sampled_from((None, None, *FAILURES)), max_size=200),
    size=st.integers(1, 40),
    retry_count=st.integers(0, 5),
    suspected_at_ms=st.sampled_from((None, LONG_AGO)),
    accepted_at_ms=st.sampled_from((None, LONG_AGO, JUST_NOW)),
)
def test_whatever_is_answered_each_row_gets_one_outcome_and_no_blame_for_others(
    policy, answers, size, retry_count, suspected_at_ms, accepted_at_ms
) -> None:
    accepted: set[int] = set()
    rejected_alone: set[int] = set()
    script = iter(answers)

    def answer(ids: tuple[int, ...]) -> UploadFailure | None:
        failure = next(script, None)
        if failure is None:
            accepted.update(ids)
        elif len(ids) == 1 and verdict(failure, policy) is Verdict.PERMANENT:
            rejected_alone.update(ids)
        return failure

    claimed = rows(size, retry_count=retry_count, suspected_at_ms=suspected_at_ms)
    done = run(claimed, answer, policy, accepted_at_ms=accepted_at_ms)
    assert set(done.outcomes) == {row.id for row in claimed}
    assert set(done.ids("deliver")) == accepted
    assert set(done.ids("abandon")) <= rejected_alone
    assert len(done.parts) <= 2 * size + 8
    result = done.search.result
    assert (result.accepted, result.proven) == (len(accepted), len(done.ids("abandon")))
    assert result.failure is next((f for f in reversed(answers[: len(done.parts)]) if f is not None), None)


@pytest.mark.parametrize(
    ("last", "waits_for"), [(BROKEN, {2: "service", 3: "row"}), (SLOW_DOWN, {2: "delay", 3: "delay"})]
)
def test_a_shared_failure_that_stops_the_search_leaves_rows_that_wait_for_themselves(last, waits_for) -> None:
    claimed = [Row(1), Row(2), Row(3, waits_for="row")]
    done = run(claimed, [REJECTED, REJECTED, last])
    assert done.waiting() == {1: "proof", **waits_for}


# The original


@pytest.mark.parametrize(
    ("claimed", "answers", "sizes", "sent", "abandoned", "waiting"),
    [
        (2, [REJECTED] * 3, [2, 1, 1], [], [], {1: "service", 2: "service"}),
        (2, [REJECTED, OK, REJECTED], [2, 1, 1], [1], [2], {}),
        (3, [REJECTED, REJECTED, WAIT_40_S], [3, 1, 1], [], [], {1: "delay", 2: "delay", 3: "delay"}),
        (1, [REJECTED, REJECTED], [1, 1], [], [1], {}),
        (1, [REJECTED, OK], [1, 1], [1], [], {}),
        (1, [REJECTED, BROKEN], [1, 1], [], [], {1: "service"}),
        (3, [REJECTED, REJECTED, OK, REJECTED], [3, 1, 1, 1], [2], [1, 3], {}),
        (3, [REJECTED, OK, BROKEN], [3, 1, 1], [1], [], {2: "service", 3: "service"}),
        (3, [MISSING, MISSING, OK, OK], [3, 1, 1, 1], [2, 3], [1], {}),
        (3, [BROKEN], [3], [], [], {1: "service", 2: "service", 3: "service"}),
        (3, [TOO_LARGE, OK, OK, TOO_LARGE], [3, 1, 1, 1], [1, 2], [3], {}),
    ],
)
def test_the_original_settles_a_rejected_claim(claimed, answers, sizes, sent, abandoned, waiting) -> None:
    done = run(rows(claimed), answers, Policy.original(), accepted_at_ms=JUST_NOW)
    assert (done.sizes, done.ids("deliver"), done.ids("abandon")) == (sizes, sent, abandoned)
    assert done.waiting() == waiting


def test_the_original_parks_every_row_that_is_not_settled_when_credentials_are_refused() -> None:
    done = run(rows(3), [REJECTED, REJECTED, REVOKED], Policy.original())
    assert done.ids("park") == [1, 2, 3]


def test_the_original_abandons_each_row_with_its_own_failure() -> None:
    first, second = HttpFailure(422, "First"), HttpFailure(400, "Second")
    done = run(rows(3), [REJECTED, first, second, OK], Policy.original())
    assert [done.outcomes[row_id].values["last_error"] for row_id in (1, 2)] == [
        "permanent: 422 First",
        "permanent: 400 Second",
    ]


def test_the_original_treats_rows_as_failed_if_nothing_was_accepted() -> None:
    first, second = HttpFailure(422, "First"), HttpFailure(400, "Second")
    done = run(rows(2), [REJECTED, first, second], Policy.original())
    assert [done.outcomes[row_id].values["last_error"] for row_id in (1, 2)] == ["422 First", "400 Second"]
    assert {outcome.values["retry_count"] for outcome in done.outcomes.values()} == {1}


def one_by_one(size: int, bad: set[int]) -> tuple[set[int], set[int], set[int]]:
    """Return what the original's own order makes of a claim: delivered, abandoned, rescheduled."""
    everything = set(range(1, size + 1))
    good = everything - bad
    if not bad:
        return everything, set(), set()
    if not good and size > 1:
        return set(), set(), everything
    return good, bad, set()


@pytest.mark.parametrize("size", range(1, 8))
def test_the_order_of_requests_changes_no_outcome_of_the_original_in_small_claims(size: int) -> None:
    for count in range(size + 1):
        for bad in combinations(range(1, size + 1), count):
            done = run(rows(size), rejecting(*bad), Policy.original())
            outcomes = tuple(set(done.ids(trigger)) for trigger in ("deliver", "abandon", "reschedule"))
            assert outcomes == one_by_one(size, {*bad})


@given(size=st.integers(9, 64), share=st.floats(0, 1), seed=st.integers())
def test_the_order_of_requests_changes_no_outcome_of_the_original(size: int, share: float, seed: int) -> None:
    random = Random(seed)  # noqa: S311 - it has to be the same every time
    bad = {row_id for row_id in range(1, size + 1) if random.random() < share}
    done = run(rows(size), rejecting(*bad), Policy.original())
    outcomes = tuple(set(done.ids(trigger)) for trigger in ("deliver", "abandon", "reschedule"))
    assert outcomes == one_by_one(size, bad)


# Rejections under our rules


def test_a_claim_of_one_row_is_not_sent_again() -> None:
    done = run(rows(1), [REJECTED])
    assert done.waiting() == {1: "proof"}
    assert done.outcomes[1].values["suspected_at_ms"] == NOON_MS
    assert done.search.result == (0, 0, REJECTED, False)


def test_an_acceptance_settles_no_row_that_was_tried_before_it() -> None:
    done = run(rows(3, **PROVABLE), [REJECTED, REJECTED, OK, REJECTED])
    assert (done.ids("deliver"), done.ids("abandon")) == ([2], [3])
    assert done.waiting() == {1: "proof"}


def test_a_suspect_is_abandoned_after_an_acceptance_that_the_database_knows() -> None:
    done = run(rows(3, **PROVABLE), [REJECTED] * 4, accepted_at_ms=NOON_MS - MINUTE)
    assert done.ids("abandon") == [1, 2, 3]
    assert done.search.result == (0, 3, REJECTED, False)
    assert not done.search.result.is_failure


def test_an_acceptance_of_this_claim_proves_too_until_a_minute_has_passed() -> None:
    answers = [REJECTED, OK, REJECTED, REJECTED]
    assert run(rows(3, **PROVABLE), answers, step_ms=30 * SECOND).ids("abandon") == [2, 3]
    late = run(rows(3, **PROVABLE), answers, step_ms=30 * SECOND + 1)
    assert (late.ids("abandon"), late.waiting()) == ([2], {3: "proof"})


def test_rows_of_a_rejected_part_are_not_blamed() -> None:
    done = run(rows(20), [REJECTED, *[REJECTED] * 8])
    assert done.sizes == [20] + [1] * 8
    assert done.waiting() == {row_id: "proof" if row_id <= 8 else "service" for row_id in range(1, 21)}
    assert {outcome.values["retry_count"] for outcome in done.outcomes.values()} == {1}


def test_the_search_ends_after_eight_requests_in_vain() -> None:
    assert run(rows(64), rejecting(*range(1, 65))).sizes == [64] + [1] * 8


def test_an_acceptance_or_a_proof_starts_the_count_of_requests_in_vain_again() -> None:
    accepted = run(rows(64), [REJECTED, *[REJECTED] * 7, OK, *[REJECTED] * 8])
    assert accepted.sizes == [64, *[1] * 16]
    answers = [REJECTED, *[REJECTED] * 8]
    proven = run(
        [*rows(7), Row(8, **PROVABLE), *rows(30)[8:]], [*answers, *[REJECTED] * 8], accepted_at_ms=JUST_NOW
    )
    assert proven.sizes == [30, *[1] * 16]
    assert proven.ids("abandon") == [8]


def test_a_search_that_ends_early_shares_its_last_failure() -> None:
    answers = [REJECTED, *[REJECTED] * 7, BROKEN]
    done = run(rows(20, retry_count=2), answers, accepted_at_ms=JUST_NOW)
    assert done.outcomes[20].values["last_error"] == "500 Internal Server Error"
    assert done.waiting()[8] == "row"


def test_a_search_that_ends_early_on_401_parks_the_rows_that_were_not_tried() -> None:
    answers = [REJECTED, *[REJECTED] * 7, REVOKED]
    done = run(rows(20), answers, accepted_at_ms=JUST_NOW)
    assert done.ids("park") == list(range(9, 21))
    assert done.waiting()[8] == "row"


def test_rows_that_waited_for_row_keep_it_if_they_were_not_tried_alone() -> None:
    done = run(rows(10, waits_for="row"), [REJECTED] * 9)
    assert [done.waiting()[row_id] for row_id in (9, 10)] == ["row", "row"]


def test_rows_that_are_too_old_are_given_up_without_proof_but_that_shows_nothing_of_the_destination() -> None:
    done = run(rows(2, created_at_ms=NOON_MS - 8 * DAY), [REJECTED] * 3)
    assert done.ids("abandon") == [1, 2]
    assert done.outcomes[1].values["last_error"] == "aged-out: 422 Unprocessable Entity"
    assert done.search.result.is_failure


# Shared failures that may be one row's


@pytest.mark.parametrize("failure", [BROKEN, MISSING, LATE, HttpFailure(425)])
@pytest.mark.parametrize(
    ("accepted_at_ms", "retry_count", "is_searched"),
    [
        (JUST_NOW, 2, True),
        (JUST_NOW, 1, False),
        (NOON_MS - MINUTE, 2, True),
        (NOON_MS - MINUTE - 1, 2, False),
        (None, 3, False),
        (None, 4, True),
        (LONG_AGO, 4, True),
    ],
)
def test_a_claim_is_searched_if_its_oldest_row_failed_often(failure, accepted_at_ms, retry_count, is_searched):
    claimed = [Row(1, retry_count=retry_count), *rows(64)[1:]]
    done = run(claimed, rejecting(64, failure=failure), accepted_at_ms=accepted_at_ms)
    assert (len(done.sizes) > 1) is is_searched
    assert done.ids("deliver") == (list(range(1, 64)) if is_searched else [])
    assert done.waiting()[64] == ("row" if is_searched else "service")


@pytest.mark.parametrize("failure", [REVOKED, FORBIDDEN])
def test_refused_credentials_are_one_rows_while_the_destination_works(failure) -> None:
    done = run(rows(21), rejecting(11, failure=failure), accepted_at_ms=JUST_NOW)
    assert len(done.ids("deliver")) == 20
    assert done.waiting() == {11: "row"}
    assert run(rows(21), [failure]).ids("park") == list(range(1, 22))


@pytest.mark.parametrize("accepted_at_ms", [None, LONG_AGO])
def test_a_row_whose_credentials_are_refused_is_parked_unless_the_claim_gets_another_accepted(
    accepted_at_ms,
) -> None:
    answers = [REVOKED, REVOKED, REVOKED, OK]
    done = run(rows(3, retry_count=4), answers, accepted_at_ms=accepted_at_ms)
    assert done.waiting() == {1: "row", 2: "row"}
    answers = [REVOKED, REVOKED, REVOKED, REVOKED]
    assert run(rows(3, retry_count=4), answers, accepted_at_ms=accepted_at_ms).ids("park") == [1, 2, 3]


def test_a_row_that_failed_alone_a_while_after_the_last_acceptance_waits_for_the_service() -> None:
    answers = [BROKEN, OK, BROKEN, BROKEN]
    done = run(rows(3, retry_count=4), answers, step_ms=40 * SECOND)
    assert done.waiting() == {2: "row", 3: "service"}


def test_a_lone_row_waits_for_row_if_its_destination_works() -> None:
    done = run([Row(1, retry_count=2)], [BROKEN], accepted_at_ms=JUST_NOW)
    assert done.waiting() == {1: "row"}
    assert done.search.result == (0, 0, BROKEN, True)
    refused = run([Row(1)], [FORBIDDEN], accepted_at_ms=JUST_NOW)
    assert (refused.waiting(), refused.search.result.is_lone_failure) == ({1: "row"}, True)


def test_a_lone_row_is_not_suspected_without_a_recent_acceptance() -> None:
    done = run([Row(1, retry_count=9)], [BROKEN])
    assert done.waiting() == {1: "service"}
    assert not done.search.result.is_lone_failure
    assert run([Row(1, retry_count=9)], [REVOKED]).ids("park") == [1]


@pytest.mark.parametrize("failure", [WAIT_40_S, SLOW_DOWN, HttpFailure(503, retry_after_ms=9_000)])
def test_an_answer_that_names_a_delay_ends_the_search(failure) -> None:
    done = run(rows(12), [REJECTED, REJECTED, OK, failure])
    assert done.ids("deliver") == [2]
    assert done.waiting() == {1: "proof", **dict.fromkeys(range(3, 13), "delay")}


def test_before_the_first_acceptance_a_failure_that_is_nobodys_ends_the_search() -> None:
    done = run(rows(12), [REJECTED, REJECTED, UNREACHABLE], accepted_at_ms=JUST_NOW)
    assert done.waiting() == {1: "proof", **dict.fromkeys(range(2, 13), "service")}
    fresh = run(rows(12), [REJECTED, REJECTED, BROKEN], accepted_at_ms=JUST_NOW)
    assert fresh.waiting() == done.waiting()


def test_after_the_first_acceptance_any_failure_counts_only_for_its_request() -> None:
    done = run(rows(4), [REJECTED, OK, UNREACHABLE, BROKEN, OK])
    assert done.ids("deliver") == [1, 4]
    assert done.waiting() == {2: "row", 3: "row"}


@pytest.mark.parametrize("failures", [(REJECTED, BROKEN), (BROKEN, REJECTED)])
def test_one_search_finds_rejections_and_failures(failures) -> None:
    first, second = failures
    answer: Answer = failing(first=(first, {10}), second=(second, {40}))
    done = run(rows(64, retry_count=2), answer, accepted_at_ms=JUST_NOW)
    assert len(done.ids("deliver")) == 62
    assert done.waiting() == {10: "proof", 40: "row"} if first is REJECTED else {10: "row", 40: "proof"}


# Requests that are too large


def too_large_above(at_most: int) -> Answer:
    return lambda ids: TOO_LARGE if len(ids) > at_most else None


def test_a_413_halves_the_claim_from_the_start() -> None:
    done = run(rows(64), too_large_above(16))
    assert done.sizes == [64, 32, 16, 16, 16, 16]
    assert len(done.ids("deliver")) == 64
    assert run(rows(50), too_large_above(20)).sizes == [50, 25, 12, 12, 12, 12, 2]


def test_a_413_on_one_row_is_a_rejection_of_that_row() -> None:
    done = run(rows(64), rejecting(20, failure=TOO_LARGE))
    assert len(done.ids("deliver")) == 63
    assert done.waiting() == {20: "proof"}
    assert done.outcomes[20].values["retry_count"] == 1
    assert run([Row(1)], [TOO_LARGE]).waiting() == {1: "proof"}


def test_a_413_halves_the_claim_whatever_the_policy_says_of_a_lone_413() -> None:
    done = run(rows(64), too_large_above(16), Policy(verdicts={413: Verdict.TRANSIENT}))
    assert done.sizes == [64, 32, 16, 16, 16, 16]
    assert len(done.ids("deliver")) == 64


def test_a_413_while_a_bad_row_is_searched_bounds_the_parts_that_follow() -> None:
    done = run(rows(40), [REJECTED, OK, OK, OK, TOO_LARGE, *[OK] * 18])
    assert done.sizes == [40, 1, 1, 2, 4, *[2] * 18]


def test_a_413_within_a_rejected_part_tells_nothing_of_its_rows() -> None:
    done = run(rows(12), [REJECTED, OK, OK, OK, TOO_LARGE, *[OK] * 4])
    assert done.sizes == [12, 1, 1, 2, 4, 2, 2, 2, 2]


def test_a_search_that_ends_early_on_a_413_counts_no_failure_of_the_rows_that_were_not_tried() -> None:
    done = run(rows(40, retry_count=1), [REJECTED, *[OK] * 4, *[REJECTED] * 7, TOO_LARGE])
    assert done.sizes == [40, 1, 1, 2, 4, 8, 4, 2, 1, 4, 2, 1, 2]
    assert done.waiting() == {9: "proof", 10: "proof", **dict.fromkeys(range(11, 41), "service")}
    assert [done.outcomes[row_id].values["retry_count"] for row_id in (9, 10, 11, 40)] == [2, 2, 1, 1]


# The verdict


@pytest.mark.parametrize(
    ("claimed", "answers", "own", "original"),
    [
        (2, [OK], None, None),
        (2, [BROKEN], Verdict.TRANSIENT, Verdict.TRANSIENT),
        (2, [SLOW_DOWN], Verdict.RATE_LIMITED, Verdict.RATE_LIMITED),
        (2, [REVOKED], Verdict.AUTH_BLOCKED, Verdict.AUTH_BLOCKED),
        (2, [REJECTED] * 3, Verdict.TRANSIENT, Verdict.TRANSIENT),
        (2, [REJECTED, OK, REJECTED], None, None),
        (3, [REJECTED, OK, SLOW_DOWN], Verdict.RATE_LIMITED, Verdict.RATE_LIMITED),
    ],
)
def test_the_verdict_is_that_of_a_failure_that_holds_for_the_claim(claimed, answers, own, original) -> None:
    assert run(rows(claimed), answers).search.verdict is own
    assert run(rows(claimed), answers, Policy.original()).search.verdict is original


def test_a_row_that_failed_alone_says_nothing_of_the_claim_to_come() -> None:
    done = run(rows(1, retry_count=2), [BROKEN], accepted_at_ms=JUST_NOW)
    assert (done.search.result.is_lone_failure, done.search.verdict) == (True, None)
    assert run(rows(1), [REJECTED]).search.verdict is Verdict.TRANSIENT
    revoked = [REVOKED] * 9
    assert run(rows(9, retry_count=4), revoked).search.verdict is Verdict.AUTH_BLOCKED


# Where each request holds one row


def singly(claimed, answers, **options):
    return run(claimed, answers, one_by_one=True, **options)


def test_rows_are_sent_one_after_the_other() -> None:
    done = singly(rows(3), [OK] * 3)
    assert done.parts == [(1,), (2,), (3,)]
    assert done.ids("deliver") == [1, 2, 3]


def test_a_rejection_concerns_its_row_alone() -> None:
    done = singly(rows(3), [OK, REJECTED, OK])
    assert done.ids("deliver") == [1, 3]
    assert done.waiting() == {2: "proof"}
    assert done.search.verdict is None
    assert done.search.not_sent == 0


def test_a_suspect_that_is_rejected_again_among_accepted_rows_is_abandoned() -> None:
    assert singly(rows(2, **PROVABLE), [OK, REJECTED]).ids("abandon") == [2]


@pytest.mark.parametrize(
    ("failure", "expected", "judged"),
    [(BROKEN, "service", Verdict.TRANSIENT), (SLOW_DOWN, "delay", Verdict.RATE_LIMITED)],
)
def test_a_failure_of_the_service_ends_it_and_releases_what_was_not_sent(failure, expected, judged) -> None:
    done = singly(rows(4), [OK, failure])
    assert done.ids("deliver") == [1]
    assert done.waiting() == {2: expected}
    assert done.ids("release") == [3, 4]
    assert done.search.verdict is judged
    assert done.search.not_sent == 2


def test_a_failure_that_may_be_one_rows_ends_nothing() -> None:
    done = singly(rows(3, retry_count=2), [OK, BROKEN, OK])
    assert done.ids("deliver") == [1, 3]
    assert done.waiting() == {2: "row"}


def test_rejections_only_end_it_after_eight_requests() -> None:
    done = singly(rows(20), [REJECTED] * 8)
    assert set(done.waiting().values()) == {"proof"}
    assert done.ids("release") == list(range(9, 21))
    assert done.search.result.is_failure
    assert not done.search.result.is_lone_failure


def test_a_token_that_is_rejected_at_once_parks_one_row() -> None:
    done = singly(rows(3), [REVOKED])
    assert done.ids("park") == [1]
    assert done.ids("release") == [2, 3]


def test_the_last_failure_says_whether_one_row_failed_alone() -> None:
    done = singly(rows(1, retry_count=2), [BROKEN], accepted_at_ms=JUST_NOW)
    assert done.search.result.is_lone_failure
    done = singly(rows(2, retry_count=2), [BROKEN, REJECTED], accepted_at_ms=JUST_NOW)
    assert not done.search.result.is_lone_failure
