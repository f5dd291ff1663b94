"""The simulation notices what it is for: each of these bugs, put into a copy of the package, fails within its seeds."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import outbox
from servers import Servers

from .model import (
    ABANDONMENT,
    ACCEPTANCE,
    ATOMICITY,
    CONSERVATION,
    EXCLUSION,
    LIVENESS,
    LOSS,
    MOVE,
    PAUSE,
)

pytestmark = pytest.mark.slow

SEEDS = 300
SEEDS_ON_SERVER = 60

_FENCE = "return statement.where(_this_row, _held) if declared.fenced else statement"


class Mutation(NamedTuple):
    file: str
    original: str
    mutant: str
    breaks: tuple[str, ...]


def _without_fence(trigger: str) -> Mutation:
    fence = f'_held if trigger != "{trigger}" else bindparam("lease") > 0'
    return Mutation("statements.py", _FENCE, _FENCE.replace("_held", fence), (EXCLUSION,))


MUTATIONS = {
    "reschedule without its fence": _without_fence("reschedule"),
    "park without its fence": _without_fence("park"),
    "abandon without its fence": _without_fence("abandon"),
    "release without its fence": _without_fence("release"),
    "renew without its fence": Mutation(
        "statements.py",
        ".where(_this_row, _in(_unindexed_status, Status.SENDING), _held)",
        '.where(_this_row, _in(_unindexed_status, Status.SENDING), bindparam("lease") > 0)',
        (MOVE, EXCLUSION),
    ),
    "deliver only what is still being sent": Mutation(
        "statements.py",
        'move("deliver").where(_these_rows)',
        'move("deliver").where(_these_rows, _in(_c.status, Status.SENDING))',
        (ACCEPTANCE,),
    ),
    "claim without a lease": Mutation(
        "flusher.py",
        "lease_ms = now + policy.lease_ms\n    claimed",
        "lease_ms = now\n    claimed",
        (MOVE, EXCLUSION),
    ),
    "claim of what others hold": Mutation(
        "flusher.py",
        "store.claim(\n        now_ms=now,",
        "store.claim(\n        now_ms=now + policy.lease_ms,",
        (MOVE, EXCLUSION),
    ),
    "claim of no lease that ran out": Mutation(
        "lifecycle.py",
        'Move("claim", (PENDING, SENDING), SENDING',
        'Move("claim", (PENDING,), SENDING',
        (MOVE, LIVENESS),
    ),
    "retry now pulls rows from under a flusher": Mutation(
        "statements.py",
        'move("retry_now", status=_c.status)\n    .where(_in(_c.status, Status.PARKED))',
        'update(events)\n    .values(status="pending")\n    .where(_in(_c.status, Status.PARKED, Status.SENDING))',
        (MOVE, EXCLUSION),
    ),
    "the cap deletes rows in flight": Mutation(
        "statements.py",
        "not_in_flight = or_(_c.status != _literal(Status.SENDING), _c.next_attempt_at_ms <= _now)",
        "not_in_flight = _now > 0",
        (EXCLUSION,),
    ),
    "the cap counts nothing": Mutation(
        "store.py",
        "        deleted = Counter((row.status, row.event_type) for row in rows)\n",
        "        deleted = Counter()\n",
        (CONSERVATION,),
    ),
    "aged out after exactly a week": Mutation(
        "policy.py", "> policy.max_age_ms", ">= policy.max_age_ms", (ABANDONMENT,)
    ),
    "no answer means sent": Mutation(
        "flusher.py",
        "        except UploadFailure as failure:\n            return failure\n",
        "        except UploadFailure as failure:\n            if hasattr(failure, 'status'):\n                return failure\n",
        (ACCEPTANCE,),
    ),
    "a rejected batch is abandoned as a whole": Mutation(
        "flusher.py", "return self._isolate(batch)", "pass", (ABANDONMENT,)
    ),
    "a server that rejects everything costs the events": Mutation(
        "flusher.py",
        "self._settle(self._judge(Verdict.TRANSIENT, candidates))",
        "self._settle(self._judge(Verdict.PERMANENT, candidates))",
        (ABANDONMENT,),
    ),
    "a settlement in two transactions": Mutation(
        "store.py",
        "        return self._writer.run(settle, repeatable=True, is_single=is_single, survives_power_cut=False)\n",
        """        everything, delivered = delivered, {}
        landed = self._writer.run(settle, repeatable=True)
        delivered, by_trigger = everything, {}
        return landed + self._writer.run(settle, repeatable=True)
""",
        (ATOMICITY,),
    ),
    "an insert that is tried again after a lost commit": Mutation(
        "store.py",
        "return self._writer.run(partial(insert, trims=True), committed=committed)",
        "return self._writer.run(partial(insert, trims=True), committed=committed, repeatable=True)",
        (LOSS,),
    ),
}


MUTATIONS_ON_SERVER = {
    "claim that waits for another claim and takes its rows too": Mutation(
        "statements.py",
        "chosen = _lock(due.with_only_columns(_c.id))",
        "chosen = due.with_only_columns(_c.id)",
        (MOVE, EXCLUSION),
    ),
    "a host's own clock": Mutation(
        "store.py",
        "self.now_ms = SharedClock(self._read_clock).now_ms if self.is_shared else now_ms",
        "self.now_ms = now_ms",
        (MOVE, EXCLUSION),
    ),
    "the pause is ignored": Mutation(
        "store.py",
        "            if pause.until_ms > now:\n                return Claim([], pause)\n",
        "            if pause.until_ms > now:\n                return Claim(self._claim(transaction, now=now, lease=lease, batch_size=batch_size))\n",
        (PAUSE,),
    ),
    "a second probe": Mutation(
        "statements.py",
        "destinations.c.paused_until_ms <= _now, destinations.c.probe_until_ms <= _now",
        "destinations.c.paused_until_ms <= _now",
        (PAUSE,),
    ),
    "a probe as large as any batch": Mutation("store.py", "min(probe_size, batch_size)", "batch_size", (PAUSE,)),
    "a failure from before ends the probe": Mutation(
        "store.py", "is_latest = there.failures == seen", "is_latest = True", (PAUSE,)
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_is_noticed(name: str, tmp_path: Path) -> None:
    check_is_noticed(MUTATIONS[name], tmp_path, str(SEEDS))


@pytest.mark.parametrize("name", MUTATIONS_ON_SERVER)
def test_a_bug_that_only_a_server_has_is_noticed(name: str, tmp_path: Path, servers: Servers) -> None:
    url = servers.get("postgresql").url.render_as_string(hide_password=False)
    check_is_noticed(
        MUTATIONS_ON_SERVER[name], tmp_path, str(SEEDS_ON_SERVER), "--ticks", "700", "--database", url
    )


def check_is_noticed(mutation: Mutation, tmp_path: Path, *arguments: str) -> None:
    _copy_everything(tmp_path)
    mutated = tmp_path / "outbox" / mutation.file
    text = mutated.read_text("utf-8")
    assert text.count(mutation.original) == 1, f"{mutation.file} no longer has what is changed"
    mutated.write_text(text.replace(mutation.original, mutation.mutant), "utf-8")
    # Only the copy is to be found, from where the program starts.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "simulation", *arguments, "--as-found"]
    told = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert told.returncode == 1, f"no world fails\n{told.stderr}"
    found = re.search(r"^seed (\d+) breaks (\d+ [a-z ,]+):", told.stdout, re.MULTILINE)
    assert found is not None, told.stdout + told.stderr
    assert found.group(2) in mutation.breaks
    print(f"noticed after {int(found.group(1)) + 1} seeds: {found.group(2)}")


def _copy_everything(folder: Path) -> None:
    package = Path(outbox.__file__).parent
    nothing_built = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, folder / "outbox", ignore=nothing_built)
    shutil.copytree(Path(__file__).parent, folder / "simulation", ignore=nothing_built)
    if not (package / "migrations").is_dir():
        shutil.copytree(package.parent / "migrations", folder / "migrations", ignore=nothing_built)
