import pytest

from outbox.failures import HttpFailure
from outbox.pauses import LONGEST_TRUSTED_MS, ClaimResult, SharedPause, pause_ms
from outbox.policy import Policy
from rule_builders import BROKEN, NOON_MS, REJECTED, REVOKED, SECOND, SLOW_DOWN, UNREACHABLE, WAIT_40_S

POLICY = Policy()
LEASE_MS = NOON_MS + 60 * SECOND


def failed(failure, *, lone: bool = False) -> ClaimResult:
    return ClaimResult(0, 0, failure, lone)


def done(
    pause: SharedPause, claim: ClaimResult, *, seen: int | None = None, probe_lease_ms: int | None = None
) -> SharedPause:
    seen = pause.number if seen is None else seen
    return pause.when_done(claim, seen=seen, probe_lease_ms=probe_lease_ms, now_ms=NOON_MS, policy=POLICY)


@pytest.mark.parametrize(
    ("failures", "seconds"), [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 20), (7, 20), (99, 20), (10**9, 20)]
)
def test_the_pause_doubles_with_each_failure_up_to_20_seconds(failures: int, seconds: int) -> None:
    assert pause_ms(failures, POLICY) == seconds * SECOND


def test_the_unit_of_the_pause_is_a_setting() -> None:
    assert [pause_ms(failures, Policy(pause_ms=5)) for failures in (1, 2, 3)] == [5, 10, 20]
    assert pause_ms(1, Policy(pause_ms=90_000)) == 20 * SECOND


@pytest.mark.parametrize("failure", [BROKEN, UNREACHABLE, REJECTED, REVOKED])
def test_a_claim_without_an_acceptance_pauses_the_destination(failure) -> None:
    pause = done(SharedPause(), failed(failure))
    assert pause == SharedPause(1, 1, NOON_MS + SECOND, last_error=str(failure))
    assert (pause.holds_until_ms, pause.needs_probe) == (NOON_MS + SECOND, False)


@pytest.mark.parametrize(
    ("failure", "seconds"),
    [
        (SLOW_DOWN, 60),
        (WAIT_40_S, 40),
        (HttpFailure(503, retry_after_ms=7_000), 7),
        (HttpFailure(429, retry_after_ms=300_000), 300),
    ],
)
@pytest.mark.parametrize("failures", [0, 5])
def test_a_delay_that_an_answer_names_is_the_pause_however_often_it_failed(failure, seconds, failures) -> None:
    pause = done(SharedPause(failures), failed(failure))
    assert pause == SharedPause(
        failures + 1, 1, NOON_MS + seconds * SECOND, is_asked=True, last_error=str(failure)
    )


def test_an_answer_that_asks_for_a_delay_pauses_even_if_rows_were_accepted() -> None:
    pause = done(SharedPause(), ClaimResult(3, 0, WAIT_40_S, False))
    assert (pause.failures, pause.until_ms) == (0, NOON_MS + 40 * SECOND)


@pytest.mark.parametrize("claim", [ClaimResult(1, 0, BROKEN, False), ClaimResult(0, 1, REJECTED, False)])
def test_a_claim_with_an_acceptance_or_a_proof_is_no_failure(claim) -> None:
    assert done(SharedPause(2, 2), claim) == SharedPause(2, 2)


def test_a_claim_that_tried_nothing_changes_nothing() -> None:
    assert done(SharedPause(2, 2), ClaimResult(0, 0, None, False)) == SharedPause(2, 2)


def test_failures_at_once_are_one_failure() -> None:
    first = done(SharedPause(), failed(BROKEN))
    assert done(first, failed(BROKEN), seen=0) == first


def test_a_delay_that_is_asked_for_at_once_lengthens_the_pause_and_never_shortens_it() -> None:
    longer = done(done(SharedPause(), failed(BROKEN)), failed(WAIT_40_S), seen=0)
    assert (longer.failures, longer.until_ms) == (1, NOON_MS + 40 * SECOND)
    again = done(longer, failed(HttpFailure(429, retry_after_ms=5_000)), seen=0)
    assert (again.failures, again.until_ms) == (1, NOON_MS + 40 * SECOND)


def test_a_lone_failure_counts_but_does_not_pause_unless_it_was_a_probe() -> None:
    lone = done(SharedPause(2, 2), failed(BROKEN, lone=True))
    assert (lone.failures, lone.number, lone.until_ms) == (3, 2, 0)
    probing = SharedPause(3, 3).when_probed(lease_until_ms=LEASE_MS, failed_before=True)
    probe = done(probing, failed(BROKEN, lone=True), probe_lease_ms=LEASE_MS)
    assert (probe.failures, probe.until_ms, probe.probe_until_ms) == (4, NOON_MS + 8 * SECOND, 0)


def test_after_three_failures_a_probe_is_due() -> None:
    assert [SharedPause(failures).needs_probe for failures in (0, 2, 3, 9)] == [False, False, True, True]


def test_others_wait_for_the_probe_until_its_lease_ends() -> None:
    probing = SharedPause(3, 3, NOON_MS - SECOND).when_probed(lease_until_ms=LEASE_MS, failed_before=False)
    assert probing.holds_until_ms == LEASE_MS


def test_probes_take_turns_and_start_with_the_newest_after_an_acceptance() -> None:
    pause = SharedPause(3, 3)
    assert not pause.next_probe_failed_before
    pause = pause.when_probed(lease_until_ms=LEASE_MS, failed_before=False)
    assert pause.next_probe_failed_before
    pause = done(pause, failed(BROKEN), probe_lease_ms=LEASE_MS)
    assert pause.next_probe_failed_before
    pause = pause.when_probed(lease_until_ms=LEASE_MS, failed_before=True)
    assert not pause.next_probe_failed_before
    assert not pause._replace(next_probe_failed_before=True).when_accepted(seen=3).next_probe_failed_before


def test_a_probe_that_proves_its_row_bad_lets_the_next_one_go() -> None:
    probing = SharedPause(5, 5).when_probed(lease_until_ms=LEASE_MS, failed_before=True)
    pause = done(probing, ClaimResult(0, 1, REJECTED, False), probe_lease_ms=LEASE_MS)
    assert (pause.failures, pause.holds_until_ms) == (5, 0)


def test_a_probe_ends_no_other_probe() -> None:
    probing = SharedPause(5, 5).when_probed(lease_until_ms=LEASE_MS, failed_before=True)
    tried_nothing = ClaimResult(0, 0, None, False)
    assert done(probing, tried_nothing, probe_lease_ms=LEASE_MS - 1).probe_until_ms == LEASE_MS


def test_an_acceptance_ends_the_pause_and_the_count() -> None:
    assert SharedPause(7, 7, LEASE_MS, last_error="x").when_accepted(seen=7) == SharedPause(number=7)
    assert SharedPause(7, 7, LEASE_MS, last_error="x").when_accepted(seen=6) == SharedPause(number=7)


def test_a_request_that_was_under_way_does_not_end_a_silence_that_was_asked_for_meanwhile() -> None:
    silent = done(SharedPause(2, 2), failed(WAIT_40_S))
    kept = silent.when_accepted(seen=2)
    assert (kept.failures, kept.until_ms) == (0, NOON_MS + 40 * SECOND)
    assert silent.when_accepted(seen=3) == SharedPause(number=3)


def test_a_pause_of_a_wrong_clock_is_over() -> None:
    far_ms = NOON_MS + LONGEST_TRUSTED_MS + 1
    wrong = SharedPause(failures=4, number=2, until_ms=far_ms, probe_until_ms=far_ms)
    assert wrong.trusted(NOON_MS) == SharedPause(failures=4, number=2)
    right = wrong._replace(until_ms=far_ms - 1, probe_until_ms=far_ms - 1)
    assert right.trusted(NOON_MS) == right
