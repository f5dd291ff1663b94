"""The simulation notices what it is for: each of these bugs, put into a copy of the package, fails within its seeds."""

import re
from pathlib import Path

import pytest

from planted import Bug, run_with
from servers import Servers
from warm import Warm

from .facts import (
    ABANDONMENT,
    ACCEPTANCE,
    ATOMICITY,
    BLAME,
    CONSERVATION,
    DELETION,
    EXCLUSION,
    HOLD,
    ISOLATION,
    LIVENESS,
    LOSS,
    MOVE,
    PAUSE,
)

pytestmark = pytest.mark.slow

SEEDS = 300
SEEDS_ON_SERVER = 60

_ALL = "columns.destination >= of_destination.right"

_FENCE = "return by_id(move(outcome).where(this_row, held))"


def _without_fence(trigger: str, first_seed: int = 0, kinds: str = "") -> Bug:
    fence = f'held if outcome.trigger != "{trigger}" else lease_until > 0'
    return Bug("storage/sql.py", _FENCE, _FENCE.replace("held)", f"{fence})"), (EXCLUSION,), first_seed, kinds)


MUTATIONS = {
    "reschedule without its fence": _without_fence("reschedule", 7, "leap,jump,down,database"),
    "park without its fence": _without_fence("park", 29, "leap,jump,auth,database,crash"),
    "abandon without its fence": _without_fence("abandon", 2, "leap,jump,poison,database"),
    "release without its fence": _without_fence("release", 31, "leap,jump,down,database"),
    "renew without its fence": Bug(
        "storage/claims.py",
        ".where(this_row, is_one_of(unindexed_status, Status.SENDING), held)",
        '.where(this_row, is_one_of(unindexed_status, Status.SENDING), bindparam("lease_until") > 0)',
        (MOVE, EXCLUSION),
        first_seed=2,
    ),
    "deliver only what is still being sent": Bug(
        "storage/claimed.py",
        "MOVE_TO_SENT.where(these_events)",
        """MOVE_TO_SENT.where(these_events, columns.status == "sending")""",
        (ACCEPTANCE,),
        first_seed=67,
        kinds="leap,jump,lost-answer,database",
    ),
    "claim of no lease that ran out": Bug(
        "lifecycle.py",
        '"claim", "source": [pending, sending]',
        '"claim", "source": [pending]',
        (MOVE, LIVENESS),
    ),
    "retry now pulls rows from under a flusher": Bug(
        "storage/revival.py",
        "RETRY_PARKED = move(outcomes.retry_now(now_ms=now, is_parked=True)).where(has_status(Status.PARKED))",
        'RETRY_PARKED = columns.id.table.update().values(status="pending", next_attempt_at_ms=now, revived_at_ms=now).where(\n'
        "    has_status(Status.PARKED, Status.SENDING)\n)",
        (MOVE, EXCLUSION),
    ),
    "the cap deletes rows in flight": Bug(
        "storage/sql.py",
        "not_in_flight = or_(columns.status != literal(Status.SENDING), columns.next_attempt_at_ms <= now)",
        "not_in_flight = now > 0",
        (EXCLUSION,),
    ),
    "the cap counts nothing": Bug(
        "storage/deletion.py",
        "        deleted = Counter((row.destination, row.status, row.event_type) for row in rows)\n",
        "        deleted = Counter()\n",
        (CONSERVATION,),
    ),
    "claim without a lease": Bug(
        "flusher.py",
        "lease_until_ms = now + policy.lease_ms\n    claimed",
        "lease_until_ms = now\n    claimed",
        (MOVE, EXCLUSION),
    ),
    "claim of what others hold": Bug(
        "flusher.py",
        "now_ms=now,\n        lease_until_ms=lease_until_ms",
        "now_ms=now + policy.lease_ms,\n        lease_until_ms=lease_until_ms",
        (MOVE, EXCLUSION, PAUSE),
    ),
    "aged out after exactly a week": Bug(
        "decisions.py",
        "return now_ms > age_out_ms(",
        "return now_ms >= age_out_ms(",
        (ABANDONMENT,),
        first_seed=9,
        kinds="leap,down",
    ),
    "no answer means sent": Bug(
        "held_claim.py",
        "                return failure\n        except",
        "                if hasattr(failure, 'status'):\n                    return failure\n                failures = {}\n        except",
        (ACCEPTANCE, MOVE),
        first_seed=2,
    ),
    "a row is given up at its first rejection": Bug(
        "isolation.py",
        "if is_proven(row, now_ms=now_ms, accepted_at_ms=self._accepted_at_ms, policy=self._policy):",
        "if self._accepted_at_ms is not None:",
        (ABANDONMENT,),
    ),
    "a server that rejects everything costs the events": Bug(
        "isolation.py",
        "        if self._undecided:\n            self.verdict = Verdict.TRANSIENT\n",
        "        self._prove_undecided()\n",
        (BLAME, ABANDONMENT),
        first_seed=21,
        kinds="drift",
    ),
    "the bound on delivered rows deletes others": Bug(
        "storage/bounds.py",
        "Bound(destination, SENT_ROWS, self._steps[:1]",
        "Bound(destination, SENT_ROWS, self._steps[2:]",
        (DELETION,),
        first_seed=2,
    ),
    "a settlement in two transactions": Bug(
        "storage/claims.py",
        "            settled = self._write(settle, is_single=is_one_delivery and self._dialect.delivers_at_once)\n",
        """            everything, deliveries = deliveries, []
            settled = self._write(settle, is_single=False)
            deliveries, by_trigger = everything, {}
            settled.landed.update(self._write(settle, is_single=False).landed)
""",
        (ATOMICITY,),
        first_seed=21,
    ),
    "the pause is ignored": Bug(
        "storage/claims.py",
        "            if pause.holds_until_ms > now_ms:\n                return Claim([], pause)\n",
        "",
        (PAUSE,),
    ),
    "the hold is ignored": Bug(
        "storage/claims.py",
        "            if hold is not None:\n                return Claim([], pause, hold=hold)\n",
        "",
        (HOLD,),
        first_seed=8,
    ),
    "a probe as large as any batch": Bug(
        "storage/claims.py",
        "_replace(at_most=1, is_newest",
        "_replace(is_newest",
        (PAUSE, MOVE),
        first_seed=34,
        kinds="down,leap",
    ),
    "a failure from before the pause lengthens it": Bug(
        "pauses.py",
        "claim.is_failure and seen == self.number",
        "claim.is_failure",
        (PAUSE,),
        first_seed=2,
    ),
    "a failure does not pause": Bug(
        "pauses.py",
        "return _begun(pause, now_ms + pause_ms(pause.failures, policy), failure, is_asked=False)",
        "return pause",
        (PAUSE,),
    ),
    "any success revives rows that failed alone": Bug(
        "revival.py",
        "ROWS_REVIVED_AFTER = 3",
        "ROWS_REVIVED_AFTER = 0",
        (MOVE,),
        first_seed=4,
        kinds="drift,poison",
    ),
    "an insert that is tried again after a lost commit": Bug(
        "storage/intake.py",
        "insert, repeatable=repeatable, is_single=is_single",
        "insert, repeatable=True, is_single=is_single",
        (LOSS,),
        first_seed=8,
        kinds="lost-commit,host",
    ),
    "a claim takes rows of other destinations": Bug(
        "storage/sqlite_claims.py",
        "return select(*place).where(of_destination, *conditions)",
        f"return select(*place).where({_ALL}, *conditions)",
        (ISOLATION,),
    ),
    "a success unparks rows of other destinations": Bug(
        "storage/revival.py",
        "_is_parked = and_(of_destination, ",
        f"_is_parked = and_({_ALL}, ",
        (ISOLATION,),
        kinds="auth",
    ),
    "a success revives rows of other destinations": Bug(
        "storage/revival.py",
        "columns.suspected_at_ms).where(\n        of_destination,",
        f"columns.suspected_at_ms).where(\n        {_ALL},",
        (ISOLATION,),
        first_seed=20,
    ),
    "the cap deletes rows of other destinations": Bug(
        "storage/sql.py",
        "found.where(is_one_of(unindexed_status, *statuses), of_destination)",
        f"found.where(is_one_of(unindexed_status, *statuses), {_ALL})",
        (ISOLATION, CONSERVATION),
    ),
    "a pause is written for other destinations": Bug(
        "storage/pauses.py",
        "update(destinations).where(this_destination).values({",
        'update(destinations).where(_known.destination >= bindparam("destination")).values({',
        (ISOLATION,),
        first_seed=20,
    ),
    "a pause of the default destination holds up the others": Bug(
        "storage/claims.py",
        "            if hold is not None:\n                return Claim([], pause, hold=hold)\n",
        "            if hold is not None:\n                return Claim([], pause, hold=hold)\n"
        "            pause = max((pause_and_hold(transaction, one, now_ms=now_ms)[0] for one in (destination, '')),"
        " key=lambda one: one.holds_until_ms)\n",
        (ISOLATION,),
        first_seed=10,
    ),
    "what is deleted is counted for the default destination": Bug(
        "storage/deletion.py",
        "if destination == DEFAULT_DESTINATION:\n                self._dialect.insert_or_add(transaction, ledger",
        "if destination is not None:\n                self._dialect.insert_or_add(transaction, ledger",
        (CONSERVATION,),
    ),
    "events are recorded for the default destination": Bug(
        "storage/intake.py",
        "return rows if destination == DEFAULT_DESTINATION else [{**row,",
        "return rows if destination is not None else [{**row,",
        (ISOLATION, LOSS),
    ),
}


MUTATIONS_ON_SERVER = {
    "claim that waits for another claim and takes its rows too": Bug(
        "storage/due_rows.py",
        "LOCK_ROWS_IF_DUE = by_id(\n    lock(",
        "LOCK_ROWS_IF_DUE = by_id(\n    (",
        (MOVE, EXCLUSION),
    ),
    "a host's own clock": Bug(
        "storage/store.py",
        "self.now_ms = SharedClock(self._read_clock).now_ms if self.is_shared else now_ms",
        "self.now_ms = now_ms",
        (MOVE, EXCLUSION, PAUSE),
    ),
    "a claim on a server takes rows of other destinations": Bug(
        "storage/postgresql_claims.py",
        "due = due.where(of_destination, *conditions)",
        f"due = due.where({_ALL}, *conditions)",
        (ISOLATION,),
        first_seed=12,
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_is_noticed(name: str, tmp_path: Path, warm: Warm) -> None:
    check_is_noticed(MUTATIONS[name], warm, tmp_path, str(SEEDS))


@pytest.mark.parametrize("name", MUTATIONS_ON_SERVER)
def test_a_bug_that_only_a_server_has_is_noticed(name: str, tmp_path: Path, warm: Warm, servers: Servers) -> None:
    url = servers.get("postgresql").url.render_as_string(hide_password=False)
    check_is_noticed(
        MUTATIONS_ON_SERVER[name], warm, tmp_path, str(SEEDS_ON_SERVER), "--ticks", "700", "--database", url
    )


def check_is_noticed(mutation: Bug, warm: Warm, tmp_path: Path, *arguments: str) -> None:
    first = ("--first", str(mutation.first_seed), *(("--kinds", mutation.kinds) if mutation.kinds else ()))
    told = run_with(
        mutation, warm, tmp_path, Path(__file__).parent, "simulation", *arguments, *first, "--as-found"
    )
    assert told.returncode == 1, f"no world fails\n{told.stderr}"
    found = re.search(r"^seed (\d+) breaks (\d+ [a-z ,]+):", told.stdout, re.MULTILINE)
    assert found is not None, told.stdout + told.stderr
    assert found.group(2) in mutation.breaks
    print(f"noticed by seed {found.group(1)}: {found.group(2)}")
