"""Worlds from seeds: nothing that is promised breaks in any of them, and a seed always gives the same world."""

import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from servers import Servers

from .chaos import Case, run, shrink
from .facts import ACCEPTANCE, Violation
from .model import Model
from .runs import report, run_seeds, theatre

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SEEDS = 130
WELL_KNOWN = 60
WITH_PROBES = 82
"""A world in which a service fails often enough for probes."""
WITH_A_DEATH_BEFORE_AN_UPLOAD = 178
AT_ONCE = 35
TICKS = 1_200
TICKS_ON_SERVER = 700
ON_SERVER = (*range(15), 42, 58, 62)
"""The last three have what is rare in the others: a late pause, the end of all pauses, and retention."""


@pytest.mark.parametrize("first", range(WELL_KNOWN, SEEDS, AT_ONCE))
def test_every_promise_holds_in_every_world(first: int) -> None:
    ticks, commits, failed = run_seeds(first, first + AT_ONCE, TICKS)
    assert failed is None, report(failed)
    assert ticks > AT_ONCE * TICKS
    assert commits > AT_ONCE * 10


@pytest.fixture
def administrator(servers: Servers) -> str:
    return servers.get("postgresql").url.render_as_string(hide_password=False)


def test_every_promise_holds_in_worlds_on_a_server(administrator: str) -> None:
    seen: Counter[str] = Counter()
    with theatre(administrator) as stage:
        for seed in ON_SERVER:
            result = run(Case(seed, TICKS_ON_SERVER), stage)
            assert result.failure is None, report(result)
            seen += result.seen
    wanted = {
        *("pause", "late pause", "resume", "end of all pauses", "revive"),
        *("hold", "end of a hold"),
        *("wait for a lock", "take over", "lost lease", "renew", "unpark", "release"),
        *("cap pending", "retention sent"),
    }
    assert wanted <= seen.keys()


def test_every_promise_holds_in_worlds_that_know_what_they_are_for() -> None:
    """A simulation in which nothing goes wrong finds nothing."""
    seen: Counter[str] = Counter()
    with theatre() as stage:
        for seed in (*range(WELL_KNOWN), WITH_PROBES, WITH_A_DEATH_BEFORE_AN_UPLOAD):
            result = run(Case(seed, TICKS), stage)
            assert result.failure is None, report(result)
            seen += result.seen
    wanted = {
        *("claim", "take over", "renew", "lost lease"),
        *("pause", "late pause", "probe", "resume", "end of all pauses", "revive", "max_sent sent"),
        *("hold", "end of a hold"),
        *("deliver", "reschedule", "park", "unpark", "release", "retry_now", "requeue"),
        *("abandon permanent", "abandon aged-out", "abandon aged-out (rate-limited)"),
        *("cap sent", "cap abandoned", "cap pending", "cap parked", "cap sending"),
        *("death before upload", "death after upload", "death before COMMIT", "death after COMMIT"),
        *("death after UPDATE", "death after INSERT"),
        *(f"{number} destinations" for number in (1, 2, 3, 4)),
    }
    assert wanted <= seen.keys()


@pytest.mark.parametrize(("seed", "hash_seed"), [(3, "1"), (17, "2")])
def test_a_seed_gives_the_same_world_byte_for_byte(seed: int, hash_seed: str) -> None:
    with theatre() as stage:
        first, second = run(Case(seed), stage), run(Case(seed), stage)
    assert first.trace == second.trace
    assert _digest_elsewhere(seed, hash_seed) == first.digest


def test_a_seed_gives_the_same_world_on_a_server(administrator: str) -> None:
    with theatre(administrator) as stage:
        first, second = (run(Case(11, TICKS_ON_SERVER), stage) for _ in range(2))
    assert first.trace == second.trace
    assert first.seen["wait for a lock"] > 0


def test_seeds_give_different_worlds() -> None:
    with theatre() as stage:
        assert len({run(Case(seed, 300), stage).digest for seed in range(10)}) == 10


def test_a_failing_world_is_shrunk_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real_check = Model._check_against_table

    def refuse_third_park(self: Model, trigger: str, old: object, new: object) -> None:
        real_check(self, trigger, old, new)
        if trigger == "park" and self.seen["park"] >= 2:
            raise Violation(ACCEPTANCE, "made up")

    monkeypatch.setattr(Model, "_check_against_table", refuse_third_park)
    with theatre() as stage:
        failing = (result for seed in range(50) if (result := run(Case(seed), stage)).failure is not None)
        worlds = [(failed, shrink(failed, stage)) for failed in islice(failing, 2)]
        for failed, shortest in worlds:
            assert shortest.ticks <= failed.ticks
            assert shortest.case.ticks < failed.case.ticks
            assert "auth" in shortest.case.kinds
            assert shortest.case.kinds <= failed.case.chosen_kinds()
            assert run(shortest.case, stage).digest == shortest.digest
            assert f"--seed {shortest.case.seed} --ticks {shortest.case.ticks}" in report(shortest)
            assert "3 sent means accepted: made up" in report(shortest)
    assert any(shortest.case.kinds < failed.case.chosen_kinds() for failed, shortest in worlds)
    assert min(shortest.case.ticks for _, shortest in worlds) < TICKS / 2


def _digest_elsewhere(seed: int, hash_seed: str) -> str:
    command = [sys.executable, "-m", f"{__package__}", "--seed", str(seed)]
    told = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    return told.stdout.split("trace ")[-1].split(",")[0]
