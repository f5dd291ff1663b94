"""The life of one claim: claim, upload, settle. The rules are in policy and isolation, the SQL is in the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from outbox import capture, maintenance
from outbox.destinations import DEFAULT_DESTINATION
from outbox.events import check_types
from outbox.failures import ConfigurationError
from outbox.held_claim import HeldClaim
from outbox.holds import hold_in_words
from outbox.hooks import Hooks
from outbox.isolation import isolate
from outbox.policy import Policy
from outbox.records import NOT_LOGGED_IN, Claim, FlushReport, UploadClient
from outbox.storage.store import Store


def flush_all(  # noqa: PLR0913 - what only a facade gives is optional
    store: Store,
    policy: Policy,
    client: UploadClient,
    progress: Callable[[FlushReport], object] | None,
    *,
    destination: str = DEFAULT_DESTINATION,
    hooks: Sequence[Hooks] = (),
) -> FlushReport:
    """Send batches until nothing is due or the service fails. Call `progress` after each batch."""
    total = FlushReport()
    while True:
        report = flush(store, policy, client, destination=destination, hooks=hooks)
        total += report
        if report.claimed == 0:
            return total
        if progress is not None:
            progress(report)
        if not report.goes_on:
            return total


def flush(  # noqa: PLR0913 - what only a worker needs is optional
    store: Store,
    policy: Policy,
    client: UploadClient,
    on_claim: Callable[[Callable[[], None]], object] | None = None,
    *,
    destination: str = DEFAULT_DESTINATION,
    hooks: Sequence[Hooks] = (),
    before_upload: Callable[[], object] | None = None,
) -> FlushReport:
    """Send one batch of a destination.

    An exception that is no `UploadFailure` reaches the caller. If the client raised it, the rows are settled first
    as after an answer with status 500. An interrupt, such as KeyboardInterrupt, releases the rows. `on_claim`
    receives a function that releases the rows early. Another thread may call that function at any time.
    `before_upload` is called before each request.
    """
    if capture.is_off():
        return FlushReport(skipped=capture.IS_OFF)
    if not client.logged_in:
        store.login_problems[destination] = NOT_LOGGED_IN
        return FlushReport(skipped=NOT_LOGGED_IN)
    store.login_problems.pop(destination, None)
    _refuse_long_deadline(policy, client)
    if policy.is_original:
        check_types()
    one_by_one = bool(getattr(client, "one_event_per_request", False))
    now = store.now_ms()
    lease_until_ms = now + policy.lease_ms
    claimed = store.claims.claim(
        now_ms=now,
        lease_until_ms=lease_until_ms,
        # `Policy.original()` judges a claim by the answer to all of its events.
        batch_size=1 if one_by_one and policy.is_original else policy.batch_size,
        destination=destination,
        is_original=policy.is_original,
    )
    if not claimed.rows:
        return _nothing_claimed(store, policy, claimed, now_ms=now)
    claim = HeldClaim(store, policy, client, claimed, lease_until_ms)
    try:
        if on_claim is not None:
            on_claim(claim.let_go)
        batch = claim.take_batch(one_by_one=one_by_one)
        search = isolate(batch, policy, one_by_one=one_by_one)
        while part := claim.next_part(search):
            if before_upload is not None:
                before_upload()
            claim.send(part, search)
        claim.settle(search.take_outcomes())  # outcomes of rows that depended on rows whose lease was lost
        _look_after(store, policy, claim)
        report = claim.report(search, claim.end(search.result), attempted=len(batch) - search.not_sent)
    except BaseException as error:
        claim.let_go()
        claim.raise_bug(error)
        raise
    finally:
        claim.tell(hooks)
    claim.raise_bug()
    return report


def _look_after(store: Store, policy: Policy, claim: HeldClaim) -> None:
    """Do the maintenance that is due. A failure is only logged; the next flush tries again."""
    now = store.now_ms()
    chores = maintenance.due_chores(store, policy, claim.destination, now_ms=now, seen=claim.chores_row)
    if chores is None:
        return
    if claim.sent:
        if chores.is_troubled:
            claim.end_pause()
        maintenance.bring_back(store, policy, chores, now_ms=now, ended_failures=claim.ended_failures)
    maintenance.delete(store, policy, chores, now_ms=now)


def _refuse_long_deadline(policy: Policy, client: UploadClient) -> None:
    deadline_ms = getattr(client, "deadline_ms", None)
    at_most = policy.lease_ms * 3 // 4
    if isinstance(deadline_ms, int) and deadline_ms > at_most:
        raise ConfigurationError(
            f"the client's deadline_ms is {deadline_ms}, expected at most {at_most}:"
            f" three quarters of the policy's lease_ms {policy.lease_ms}, or an upload could outlast its lease"
        )


def _nothing_claimed(store: Store, policy: Policy, claimed: Claim, *, now_ms: int) -> FlushReport:
    pause, hold = claimed.pause, claimed.hold
    is_paused = hold is not None or pause.holds_until_ms > now_ms
    chores = maintenance.due_chores(store, policy, claimed.destination, now_ms=now_ms)
    if chores is not None:
        if not is_paused:
            maintenance.try_parked(store, policy, chores, now_ms=now_ms)
        maintenance.delete(store, policy, chores, now_ms=now_ms)
    if hold is not None:
        return FlushReport(skipped=hold_in_words(hold), hold=hold)
    if not is_paused:
        return FlushReport()
    return FlushReport(
        failure=pause.last_error,
        paused_until_ms=pause.holds_until_ms,
        skipped=f"paused, the service failed or asked to slow down: {pause.last_error}",
    )
