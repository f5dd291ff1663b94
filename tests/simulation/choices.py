"""Which rows a move that chooses its rows has to choose, under each policy."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from outbox import Policy

from .facts import MINUTE_MS, MOVE, Operation, Row, Violation


def check_choice(
    policy: Policy, operation: Operation, before: Sequence[Row], moves: dict[str, set[int]], *, is_probe: bool
) -> None:
    """Check that a claim, an unpark and a revival took the right rows of a destination, and all of them."""
    for trigger, chosen in moves.items():
        if trigger == "claim":
            allowed = _claims(policy, before, operation.now_ms, is_probe=is_probe)
        elif trigger == "unpark":
            allowed = _unparks(policy, before, operation)
        elif trigger == "revive":
            allowed = [_revived(policy, before, chosen, operation.now_ms)]
        else:
            continue
        if chosen not in [{row.id for row in rows} for rows in allowed]:
            raise Violation(
                MOVE, f"{trigger} took {sorted(chosen)}, due were {[[row.id for row in rows] for rows in allowed]}"
            )


def _claims(policy: Policy, before: Sequence[Row], now: int, *, is_probe: bool) -> list[Sequence[Row]]:
    due = [row for row in before if row.status in ("pending", "sending") and row.next_attempt_at_ms <= now]
    oldest = sorted(due, key=lambda row: row.age)
    if policy.is_original:
        return [oldest[: policy.batch_size]]
    fresh = [row for row in oldest if not row.failed_before]
    failed = sorted(
        (row for row in oldest if row.failed_before), key=lambda row: (row.waits_for == "row", row.age)
    )
    # A row that its senders may have died of goes alone; not always first, if many leases have run out.
    alone = [row for row in failed if row.lost_again >= 2][:1]
    failed = [row for row in failed if row.lost_again < 2]
    if is_probe:
        # Rows that someone lost come after those that wait.
        fresh = [row for row in fresh if row.status == "pending"][-1:] or fresh[:1]
        return [fresh, alone, failed[:1]]
    return [fresh[: policy.batch_size], alone, failed[: policy.batch_size]]


def _unparks(policy: Policy, before: Sequence[Row], operation: Operation) -> list[Sequence[Row]]:
    parked = [row for row in before if row.status == "parked"]
    allowed: list[Sequence[Row]] = []
    if operation.accepted():
        allowed.append(sorted(parked, key=lambda row: row.age)[: policy.unpark_limit])
    if not policy.is_original:  # one a minute, while nothing else is due
        longest = sorted(parked, key=lambda row: (row.revived_at_ms or 0, row.age))
        allowed += [[row] for row in longest[:1]]
    return allowed


def _revived(policy: Policy, before: Sequence[Row], chosen: Collection[int], now: int) -> Sequence[Row]:
    kinds = {row.waits_for for row in before if row.id in chosen}
    late = [
        row
        for row in sorted(before, key=lambda row: row.age)
        if row.status == "pending" and row.waits_for in kinds and row.next_attempt_at_ms > latest(row, now, policy)
    ]
    return [row for kind in kinds for row in [row for row in late if row.waits_for == kind][: policy.revive_limit]]


def is_young(row: Row, now: int, policy: Policy) -> bool:
    """Tell whether it is a suspect for which it is too early to be proven."""
    suspected_at_ms = row.suspected_at_ms
    return row.waits_for == "proof" and suspected_at_ms is not None and now - suspected_at_ms < policy.proof_ms


def revival(row: Row, now: int, policy: Policy) -> int:
    """Return when a row is due that a success revives."""
    if is_young(row, now, policy):
        return now + MINUTE_MS + row.id % MINUTE_MS
    return now + row.id % policy.unpark_spread_ms


def latest(row: Row, now: int, policy: Policy) -> int:
    """Return the time after which a row has to be due, if a success is to revive it."""
    return now + (2 * MINUTE_MS if is_young(row, now, policy) else policy.unpark_spread_ms)
