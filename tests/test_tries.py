"""How the rows of a request failed."""

from __future__ import annotations

from builders import DOWN, NOON_MS, REJECTED, REVOKED
from outbox import Policy
from outbox.tries import Failed, failed

TIMES = {"now_ms": NOON_MS, "duration_ms": 12.6, "policy": Policy()}


def test_after_a_shared_failure_all_rows_failed_alike() -> None:
    down = Failed(NOON_MS, 13, "transient")
    assert failed([1, 2], DOWN, **TIMES) == {1: down, 2: down}


def test_of_an_answer_for_each_row_only_those_that_it_names_failed() -> None:
    rejected, revoked = Failed(NOON_MS, 13, "permanent"), Failed(NOON_MS, 13, "auth blocked")
    assert failed([1, 2, 3], {1: REJECTED, 3: REVOKED}, **TIMES) == {1: rejected, 3: revoked}
