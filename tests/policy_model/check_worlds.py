"""Play worlds with the outbox itself: `python -m tests.policy_model.check_worlds 0 100`, seeds; or the name of one."""

from __future__ import annotations

import sys

from outbox import Policy

from .play import play
from .real import real_places
from .worlds import NAMED, Violation, World, check, draw

# So small that the bound on delivered rows is reached.
POLICY = Policy(max_sent=20)


def broken(world: World, policy: Policy = POLICY, *, flushers: int = 1) -> Violation | None:
    """Return which promise is broken in a world."""
    with real_places(policy) as build:
        history = play(world.case, build, flushers)
    try:
        check(world, history)
    except Violation as violation:
        return violation
    return None


def main(*arguments: str) -> bool:
    named = [(name, NAMED[name]()) for name in arguments if name in NAMED]
    seeds = [] if named else range(*map(int, arguments))
    worlds = [*named, *((f"seed {seed}", draw(seed)) for seed in seeds)]
    found = [(name, broken(world, flushers=1 if named else 2)) for name, world in worlds]
    for name, violation in found:
        print(f"{name}: {violation or 'nothing is broken'}", flush=True)
    return any(violation for _, violation in found)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
