"""Print which figures must be reached, and which came: the worst of each scenario's cases."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from outbox.policy import Policy

from .model import ModelPlace
from .play import Place, play
from .real import real_places
from .scenarios import NEVER, SCENARIOS, Bound, Scenario
from .virtual_time import VirtualTime


def shown(figure: float, bound: Bound) -> str:
    if abs(figure) > NEVER / 2:
        return "never"
    return f"{figure / bound.unit:.1f} s" if bound.unit > 1 else f"{figure:g}"


def must_be(bound: Bound) -> str:
    return f"{shown(bound.at_least, bound)} to {shown(bound.at_most, bound)}"


def print_figures(
    scenario: Scenario, case_name: str, build: Callable[[VirtualTime], Place], flushers: int, *, each: bool
) -> bool:
    """Play all cases whose name holds this; return whether every figure was reached."""
    came = defaultdict(list)
    for name, case in scenario.cases.items():
        if case_name not in name:
            continue
        for figure, value in scenario.measure(play(case, build, flushers)).items():
            came[figure].append((value, name))
            if each:
                print(f"    {name}: {figure} {shown(value, scenario.bounds[figure])}")
    is_reached = True
    for figure, values in came.items():
        bound = scenario.bounds[figure]
        best, worst = min(values), max(values)
        holds = bound.holds(best[0]) and bound.holds(worst[0])
        is_reached &= holds
        line = (
            scenario.name,
            flushers,
            f"{figure} {must_be(bound) if bound.at_least > 0 else '≤ ' + shown(bound.at_most, bound)}",
            f"{shown(best[0], bound)} to {shown(worst[0], bound)}"
            if best[0] != worst[0]
            else shown(worst[0], bound),
            worst[1] if holds else f"MISSED {worst[1]}",
        )
        print("|", " | ".join(map(str, line)), "|", flush=True)
    return is_reached


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flushers", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--only", default="", help="play scenarios whose name holds this text")
    parser.add_argument("--case", default="", help="play cases whose name holds this text")
    parser.add_argument("--each", action="store_true", help="print the figures of each case")
    parser.add_argument("--original", action="store_true", help="play under the policy of the original uploader")
    parser.add_argument("--real", action="store_true", help="play the outbox itself on SQLite, not the model")
    options = parser.parse_args()
    policy = Policy.original() if options.original else Policy()
    model = nullcontext(partial(ModelPlace, policy=policy))
    with real_places(replace(policy, max_rows=policy.max_rows or 0)) if options.real else model as build:
        print("| scenario | flushers | must be | came | worst case |\n| --- | --- | --- | --- | --- |")
        reached = [
            print_figures(scenario, options.case, build, flushers, each=options.each)
            for scenario in SCENARIOS
            if options.only in scenario.name
            for flushers in options.flushers
        ]
    return all(reached)


if __name__ == "__main__":
    sys.exit(not main())
