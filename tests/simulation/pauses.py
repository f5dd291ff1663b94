"""How the pause of a destination may change, and who may send in spite of it. The original knows no pauses."""

from __future__ import annotations

from collections.abc import Iterator

from outbox import Policy, UploadFailure

from .facts import PAUSE, Operation, Pause, Violation, asked_ms, is_auth, is_permanent, status_of

_PROBE_AFTER = 3
_LONGEST_MS = 20_000
_UNPARK_EVERY_MS = 60_000


def check_claim(operation: Operation, claimed: int, *, is_probe: bool) -> None:
    """Check that a claim respects the pauses that it may have seen."""
    now = operation.now_ms
    free = [pause for pause in operation.pauses if pause.trusted(now).until_ms <= now]
    if not free:
        raise Violation(PAUSE, f"at {now} {claimed} rows were claimed in spite of {operation.pauses}")
    if is_probe and claimed > 1:
        raise Violation(PAUSE, f"{claimed} rows are a probe")
    if not is_probe and all(pause.failures >= _PROBE_AFTER for pause in free):
        raise Violation(PAUSE, f"{claimed} rows were claimed after {free}, which needs a probe")


def changes(
    operation: Operation, old: Pause, claimed: int, *, works: bool, policy: Policy
) -> Iterator[tuple[str, Pause]]:
    """Yield every change that this operation may make, with what the pause must then be."""
    over = old._replace(failures=0, paused_until_ms=0, is_asked=0, probe_until_ms=0, probe_failed_before=0)
    if operation.kind == "retry_now":
        yield "end of all pauses", over
    if operation.kind != "flush":
        return
    now = operation.now_ms
    if now - old.unparked_at_ms >= _UNPARK_EVERY_MS or old.unparked_at_ms > now:
        yield "idle unpark", old._replace(unparked_at_ms=now)
    trusted = old.trusted(now)
    if trusted != old:
        yield "end of what a wrong clock began", trusted
    if claimed and old.failures >= _PROBE_AFTER and trusted.until_ms <= now:
        for turn in (0, 1):
            yield "probe", trusted._replace(probe_until_ms=now + policy.lease_ms, probe_failed_before=turn)
    if operation.accepted():
        if not old.is_asked or old.pauses in operation.seen:
            yield "resume", over._replace(last_error="")
        if old.is_asked and operation.seen != {old.pauses}:
            yield "resume in spite of a delay", old._replace(failures=0)
    was_probe = old.probe_until_ms == operation.probe_until_ms > 0
    ended = trusted._replace(probe_until_ms=0) if was_probe else trusted
    failure = operation.last_failure
    if was_probe and (failure is None or operation.accepted() or operation.gives_back):
        yield "end of probe", ended
    if failure is not None:
        yield from _after_failure(operation, ended, failure, works=works, was_probe=was_probe, policy=policy)


def _after_failure(
    operation: Operation, old: Pause, failure: UploadFailure, *, works: bool, was_probe: bool, policy: Policy
) -> Iterator[tuple[str, Pause]]:
    now, asked = operation.now_ms, asked_ms(failure)
    is_failure = not operation.accepted() and not operation.given_up
    may_count = {old.pauses in operation.seen and is_failure}
    if len(operation.seen) > 1 and is_failure:
        may_count.add(False)
    if operation.given_up and not operation.accepted():
        may_count.add(old.pauses in operation.seen)  # what was abandoned for its age proves nothing
    for counts in may_count:
        pause = old
        if counts:
            pause = old._replace(failures=old.failures + 1, last_error=str(failure))
        begun = pause._replace(pauses=pause.pauses + 1, last_error=str(failure))
        if asked is not None:
            until_ms = max(old.paused_until_ms, now + asked)
            yield ("pause" if counts else "late pause"), begun._replace(paused_until_ms=until_ms, is_asked=1)
            continue
        if not counts:
            yield "late failure", pause
            continue
        delay = min(policy.pause_ms << min(pause.failures - 1, 30), _LONGEST_MS)
        yield "pause", begun._replace(paused_until_ms=now + delay, is_asked=0)
        if not was_probe and works and _may_be_one_rows(operation, failure):
            yield "lone failure", pause


def _may_be_one_rows(operation: Operation, failure: UploadFailure) -> bool:
    """Tell whether the only row of a claim may have caused a failure, while the service works."""
    rows = [row for row in operation.claim.values() if row.decodable]
    if len(rows) != 1 or is_permanent(failure, original=False):
        return False
    status = status_of(failure)
    is_servers = 500 <= status <= 599 or status in (404, 405, 408, 410, 425) or "client error" in str(failure)
    return is_auth(failure) or (rows[0].retry_count >= 2 and is_servers)
