"""The outbox itself meets services as they are: nothing that they would accept is lost, blamed or stuck."""

from pathlib import Path

import pytest

from outbox import Policy
from planted import Bug, run_with
from warm import Warm

from .check_worlds import broken
from .worlds import BLAME, LOSS, NAMED, RECOVERY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PLANTED = {
    "what was accepted long ago is a proof": (
        "a schema change",
        Bug(
            "decisions.py",
            "        and suspected_at_ms < accepted_at_ms\n        and is_recent(accepted_at_ms, now_ms)\n",
            "",
            (BLAME,),
        ),
    ),
    "the bound on delivered rows deletes others": (
        "a missing route",
        Bug(
            "storage/bounds.py",
            "Bound(destination, SENT_ROWS, self._steps[:1]",
            "Bound(destination, SENT_ROWS, self._steps[2:]",
            (LOSS,),
        ),
    ),
    "a success revives nothing": (
        "a schema change",
        Bug("maintenance.py", "chores.is_any_failed and not policy.is_original", "chores is None", (RECOVERY,)),
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_nothing_is_lost_blamed_or_stuck(name: str) -> None:
    assert broken(NAMED[name]()) is None


def test_the_original_blames_events_for_a_missing_route() -> None:
    violation = broken(NAMED["a missing route"](), Policy.original())
    assert violation is not None
    assert violation.promise == BLAME


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_noticed(name: str, tmp_path: Path, warm: Warm) -> None:
    world, bug = PLANTED[name]
    told = run_with(bug, warm, tmp_path, Path(__file__).parent, "policy_model.check_worlds", world)
    assert told.returncode == 1, told.stderr
    assert told.stdout.startswith(f"{world}: {bug.breaks[0]}"), told.stdout + told.stderr
