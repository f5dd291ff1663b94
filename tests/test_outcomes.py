import inspect

import pytest

from outbox import ObservationEvent, outcomes
from outbox.lifecycle import moves
from outbox.outcomes import Outcome
from outbox.storage.claims import SETTLE

# What each move writes beside the status, as docs/lifecycle.md tells.
SETTLED = {"lost_leases": 0}
UNSUSPECTED = {"waits_for": None, "suspected_at_ms": None}
WRITTEN = {
    "claim": (outcomes.claim(lease_until_ms=9, lost_leases=1), {"next_attempt_at_ms": 9, "lost_leases": 1}),
    "deliver": (outcomes.deliver(sent_at_ms=9), {"sent_at_ms": 9, **SETTLED}),
    "reschedule": (
        outcomes.reschedule(
            retry_count=3, next_attempt_at_ms=9, last_error="422", waits_for="proof", suspected_at_ms=7
        ),
        {
            "retry_count": 3,
            "next_attempt_at_ms": 9,
            "last_error": "422",
            "waits_for": "proof",
            "suspected_at_ms": 7,
            **SETTLED,
        },
    ),
    "park": (outcomes.park(last_error="401"), {"last_error": "401", **SETTLED}),
    "abandon": (outcomes.abandon(last_error="422"), {"last_error": "422", **SETTLED}),
    "cancel": (outcomes.cancel(last_error="cancelled: no"), {"last_error": "cancelled: no"}),
    "release": (outcomes.release(next_attempt_at_ms=9), {"next_attempt_at_ms": 9, **SETTLED}),
    "unpark": (
        outcomes.unpark(row_id=5_007, now_ms=9, spread_ms=5_000),
        {"retry_count": 0, "last_error": None, "next_attempt_at_ms": 16, "revived_at_ms": 9, **UNSUSPECTED},
    ),
    "retry_now": (
        outcomes.retry_now(now_ms=9, is_parked=True),
        {"next_attempt_at_ms": 9, "revived_at_ms": 9, **UNSUSPECTED},
    ),
    "revive": (outcomes.revive(next_attempt_at_ms=9), {"next_attempt_at_ms": 9}),
    "requeue": (
        outcomes.requeue(now_ms=9),
        {"retry_count": 0, "last_error": None, "next_attempt_at_ms": 9, "revived_at_ms": 9, **UNSUSPECTED},
    ),
}


@pytest.mark.parametrize("trigger", WRITTEN)
def test_what_an_outcome_writes(trigger: str) -> None:
    outcome, columns = WRITTEN[trigger]
    assert outcome == (trigger, columns)
    assert columns.keys() <= {*ObservationEvent.__table__.columns.keys()}


def test_a_row_that_waited_keeps_its_age_when_it_is_retried() -> None:
    assert outcomes.retry_now(now_ms=9, is_parked=False) == ("retry_now", {"next_attempt_at_ms": 9})


def test_each_move_has_one_constructor() -> None:
    constructors = {
        name
        for name, function in inspect.getmembers(outcomes, inspect.isfunction)
        if inspect.get_annotations(function).get("return") == "Outcome" and not name.startswith("_")
    }
    assert constructors == set(WRITTEN) == set(moves())


@pytest.mark.parametrize("trigger", SETTLE)
def test_the_statement_of_an_outcome_sets_what_the_outcome_writes(trigger: str) -> None:
    text = str(SETTLE[trigger])
    outcome: Outcome = WRITTEN[trigger][0]
    columns = text.partition(" SET ")[2].partition(" WHERE ")[0].split(", ")
    assert {column.partition("=")[0] for column in columns} == {"status", *outcome.values}
