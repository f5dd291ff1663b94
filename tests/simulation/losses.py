"""What may be deleted of a destination, and in which order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from outbox import Policy

from .facts import CONSERVATION, DELETION, EXCLUSION, MOVE, WEEK_MS, Operation, Row, Violation


def check_deleted(
    policy: Policy,
    operation: Operation,
    gone: Sequence[Row],
    left: Collection[Row],
    born: Sequence[int],
    entries: Counter[tuple[str, str, str]],
    *,
    shared: bool,
) -> str:
    """Check what a transaction deleted of a destination, and that it counted it; return for what reason it did."""
    # Rows that came and went in one transaction were never seen; they are counted as pending.
    there = {row.id for row in left}
    unseen = sum(row_id not in there for row_id in born)
    reason = next(iter(entries))[0] if entries else "none"
    seen = Counter((row.status, row.event_type) for row in gone)
    counted = Counter({entry[1:]: events for entry, events in entries.items()})
    if not seen <= counted or counted.total() != seen.total() + unseen:
        raise Violation(CONSERVATION, f"deleted {dict(seen)} and {unseen} new ones, counted {dict(counted)}")
    if operation.kind not in ("enqueue", "flush"):
        raise Violation(MOVE, f"{operation.kind} deleted rows")
    now = operation.now_ms
    for row in gone:
        if row.status == "sending" and row.next_attempt_at_ms > now:
            raise Violation(EXCLUSION, f"at {now} a row in flight was deleted: {row}")
    undelivered = [row for row in gone if row.status != "sent"]
    if not policy.max_rows and (undelivered or unseen):
        raise Violation(DELETION, f"{reason} deleted {undelivered} and {unseen} new ones")
    if reason == "retention":
        early = [row for row in gone if row.status != "sent" or (row.sent_at_ms or 0) >= now - WEEK_MS]
        if early or not shared:
            raise Violation(CONSERVATION, f"at {now} {early} did not stay for a week")
    elif shared:
        pass  # where several are trimmed at once, each leaves what another one holds
    elif reason == "max_sent":
        kept = [row for row in left if row.status == "sent"]
        if kept and min(map(_place, kept)) < max(map(_place, gone)):
            raise Violation(CONSERVATION, f"{gone} were deleted before older ones that were delivered")
    else:
        _check_order_of_cap(policy.max_rows or 0, gone, left, born, now=now, unseen=unseen)
    return reason


def _place(row: Row) -> tuple[int, int, int]:
    if row.status == "sent":
        return 0, row.sent_at_ms or 0, row.id
    return (1 if row.status == "abandoned" else 2), *row.age


def _check_order_of_cap(
    max_rows: int, gone: Sequence[Row], left: Collection[Row], born: Sequence[int], *, now: int, unseen: int
) -> None:
    own = set(born[-max_rows:])  # an enqueue deletes none of its own rows, if these are not too many

    def deletable(row: Row) -> bool:
        return row.id not in own and (row.status != "sending" or row.next_attempt_at_ms <= now)

    kept = [row for row in left if deletable(row)]
    if len(left) < max_rows or (len(left) > max_rows and kept):
        raise Violation(
            CONSERVATION,
            f"the cap of {max_rows} left {len(left)} rows, of them deletable {kept}, deleted {gone} at {now}, own {born}",
        )
    last = max(map(_place, gone), default=(2, 0, 0) if unseen else (0, 0, 0))
    early = [row for row in kept if _place(row) < last]
    if early:
        raise Violation(CONSERVATION, f"the cap should have deleted {early[0]} before {gone}")
