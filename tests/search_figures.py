"""How many requests the search needs to find the bad rows of a claim. `python -m tests.policy_model.search_figures` prints them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from random import Random

from outbox.failures import HttpFailure, UploadFailure
from outbox.isolation import isolate
from outbox.policy import Policy

NOW_MS = 1_795_521_600_000
HALF_AN_HOUR = 30 * 60 * 1_000


@dataclass(frozen=True)
class Row:
    """A row as the search sees it."""

    id: int
    retry_count: int = 0
    created_at_ms: int = NOW_MS
    revived_at_ms: int | None = None
    not_before_ms: int | None = None
    suspected_at_ms: int | None = None
    waits_for: str | None = None


def requests(
    bad: Collection[int], size: int, policy: Policy, *, failure: UploadFailure, suspected: bool = False
) -> int:
    """Return how many requests a claim takes whose whole is rejected, the first one included."""
    suspected_at_ms = NOW_MS - HALF_AN_HOUR if suspected else None
    search = isolate([Row(number, 3, suspected_at_ms=suspected_at_ms) for number in range(size)], policy)
    count = 0
    while part := search.next_part():
        count += 1
        if count == 1 or any(row.id in bad for row in part):
            search.rejected(part, failure, now_ms=NOW_MS, accepted_at_ms=NOW_MS - 1)
        else:
            search.accepted(part, now_ms=NOW_MS)
    return count


def halving(bad: Collection[int], size: int) -> int:
    """Return what the plain order takes: row by row until one is accepted, then all others, halved when rejected."""
    parts = [[number] for number in reversed(range(size))]
    count, is_accepted = 1, False
    while parts:
        part = parts.pop()
        count += 1
        if not bad.isdisjoint(part) and len(part) > 1:
            middle = len(part) // 2
            parts += [part[middle:], part[:middle]]
        elif bad.isdisjoint(part) and not is_accepted:
            is_accepted = True
            rest = [number for single in reversed(parts) for number in single]
            parts = [rest] if rest else []
    return count


def samples(size: int, count: int, number: int, seed: int = 1) -> list[frozenset[int]]:
    """Return sets of bad rows: at the start, at the end, evenly spread, and at random."""
    spread = frozenset(place * size // count for place in range(count)) if count else frozenset()
    chosen = [frozenset(range(count)), frozenset(range(size - count, size)), spread]
    random = Random(seed)  # noqa: S311 - it has to be the same every time
    return chosen + [frozenset(random.sample(range(size), count)) for _ in range(number)]


def main(number: int = 2_000) -> None:
    rejected, failed = HttpFailure(422), HttpFailure(500)
    orders: Sequence[tuple[str, Callable[[frozenset[int]], int]]] = (
        ("halving", lambda bad: halving(bad, 64)),
        ("original", lambda bad: requests(bad, 64, Policy.original(), failure=rejected)),
        ("own, proven", lambda bad: requests(bad, 64, Policy(), failure=rejected, suspected=True)),
        ("own, first rejection", lambda bad: requests(bad, 64, Policy(), failure=rejected)),
        ("own, 500", lambda bad: requests(bad, 64, Policy(), failure=failed)),
    )
    print("| bad of 64 |", " | ".join(f"{name}: mean, worst" for name, _ in orders), "|")
    for count in range(65):
        row = []
        for _, order in orders:
            counts = [order(bad) for bad in samples(64, count, number)]
            row.append(f"{sum(counts) / len(counts):.1f}, {max(counts)}")
        print(f"| {count} |", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
