"""What is promised, held against every committed transaction.

What a row and a pause may become is told again in `moves` and `pauses`; only the table of moves is taken from the
package.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import TYPE_CHECKING, Any

from outbox import FlushReport, Policy
from outbox.lifecycle import moves as declared_moves

from . import choices, pauses
from .facts import (
    ABANDONMENT,
    ACCEPTANCE,
    ATOMICITY,
    BLAME,
    CONSERVATION,
    EXCLUSION,
    HOLD,
    ISOLATION,
    LOSS,
    MOVE,
    PAUSE,
    REPORT,
    Operation,
    Pause,
    Row,
    Violation,
)
from .losses import check_deleted
from .moves import OriginalMoves, OurMoves

if TYPE_CHECKING:
    from .server import Server
    from .stage import Process, Stage

_ROWS = f"SELECT {', '.join(Row._fields)} FROM observation_events ORDER BY id"
_LEDGER = """
    SELECT '', reason, status, event_type, events FROM observation_events_ledger
    UNION ALL SELECT destination, reason, status, event_type, events FROM observation_destinations_ledger
"""
_PAUSES = f"SELECT {', '.join(Pause._fields)} FROM observation_destinations"
_HOLDS = f"SELECT destination, coalesce(until_ms, {2**62}) FROM observation_holds"
# A trigger writes it down: an event may be deleted in the transaction that enqueued it.
_BORN = "SELECT id, destination FROM born"
_FAIL_OVER = """
    UPDATE observation_events
    SET status = 'pending', retry_count = 0, last_error = NULL, sent_at_ms = NULL,
        next_attempt_at_ms = :now, created_at_ms = :now
    WHERE id = (SELECT max(id) FROM observation_events)
"""


class Model:
    """The table as it was after the last commit, and who holds which row."""

    def __init__(
        self,
        observer: Any,
        policy: Policy,
        servers: Mapping[str, Server],
        *,
        equal_clocks: bool,
        shared: bool = False,
    ) -> None:
        self._observer = observer
        self.shared = shared
        """Whether transactions run at once, as on a server."""
        self.policy = policy
        self.servers = servers
        """By destination."""
        self.equal_clocks = equal_clocks
        self.rows: dict[int, Row] = {}
        self.rows, self.deleted, self.ever_inserted = self.read()
        self.pauses: dict[str, Pause] = {}
        self.pauses = self.read_pauses()
        self.holds = self.read_holds()
        """When the hold of a destination ends, or 0."""
        self.holders: dict[int, Operation] = {}
        moves = OriginalMoves if policy.is_original else OurMoves
        self._moves = {destination: moves(policy) for destination in servers}
        self.commits = 0
        self.seen: Counter[str] = Counter()

    def read(self) -> tuple[dict[int, Row], Counter[tuple[str, str, str, str]], dict[int, str]]:
        """Return the rows, how many were deleted, and for which destination each row was ever inserted."""
        # A row that is as it was stays the same object.
        known = self.rows
        rows = {
            row[0]: old if (old := known.get(row[0])) == row else Row._make(row)
            for row in self._observer.execute(_ROWS)
        }
        deleted = Counter({entry[:4]: entry[4] for entry in self._observer.execute(_LEDGER)})
        return rows, deleted, dict(self._observer.execute(_BORN).fetchall())

    def read_pauses(self) -> dict[str, Pause]:
        # As with rows: a pause that is as it was stays the same object.
        found = {destination: Pause(destination) for destination in self.servers}
        found |= {row[0]: Pause._make(row) for row in self._observer.execute(_PAUSES)}
        known = self.pauses
        return {name: old if (old := known.get(name)) == pause else pause for name, pause in found.items()}

    def read_holds(self) -> dict[str, int]:
        return {**dict.fromkeys(self.servers, 0), **dict(self._observer.execute(_HOLDS).fetchall())}

    def observe(self, process: Process, stage: Stage) -> None:
        """Check what the process has just committed."""
        before, deleted, ever_inserted, pauses_before = self.rows, self.deleted, self.ever_inserted, self.pauses
        self.rows, self.deleted, self.ever_inserted = self.read()
        self.pauses = self.read_pauses()
        self.commits += 1
        operation = process.operation
        if not self.shared:
            operation.pauses = [pauses_before[operation.destination]]
            operation.holds = [self.holds[operation.destination]]
        self._see_holds(stage)
        born = sorted(self.ever_inserted.keys() - ever_inserted.keys())
        operation.inserted += len(born)
        gone = [before[row_id] for row_id in before.keys() - self.rows.keys()]
        self._check_conservation()
        if born:
            self._check_born(operation, born)
        both = ((old, self.rows.get(row_id)) for row_id, old in before.items())
        changed = [(old, new) for old, new in both if new is not None and new is not old]
        changed_pauses = [old for name, old in pauses_before.items() if self.pauses[name] is not old]
        self._check_isolation(operation, [*gone, *(old for old, _ in changed), *changed_pauses])
        if gone or self.deleted != deleted:
            self._check_deleted(operation, gone, born, self.deleted - deleted)
        for row in gone:
            self.holders.pop(row.id, None)
        moves = self._check_changed(process, stage, before, changed) if changed else {}
        if "claim" in moves and min(operation.holds) > operation.now_ms:
            raise Violation(HOLD, f"at {operation.now_ms} {moves} in spite of a hold until {operation.holds}")
        for destination, old in pauses_before.items():
            is_own = destination == operation.destination
            self._check_pause(process, stage, old, claimed=len(moves.get("claim", ())) if is_own else 0)
        rules = self._moves[operation.destination]
        sent = [new.sent_at_ms or 0 for old, new in changed if new.status == "sent" != old.status]
        rules.accepted_at_ms = max(rules.accepted_at_ms, *sent, 0)

    def fail_over(self, now_ms: int) -> None:
        """Let the newest event be lost, and another one get its id."""
        self._observer.execute(_FAIL_OVER, {"now": now_ms})
        before, self.rows = self.rows, self.read()[0]
        for row_id, row in self.rows.items():
            if row != before[row_id]:
                self.holders.pop(row_id, None)

    # Conservation

    def _check_conservation(self) -> None:
        enqueued = Counter(self.ever_inserted.values())
        there = Counter(row.destination for row in self.rows.values())
        counted: Counter[str] = Counter()
        for (destination, *_), events in self.deleted.items():
            counted[destination] += events
        if enqueued != there + counted:
            raise Violation(CONSERVATION, f"{enqueued} were enqueued, {there} are there and {counted} are counted")

    def _check_born(self, operation: Operation, born: list[int]) -> None:
        if operation.kind not in ("enqueue", "session", "foreign"):
            raise Violation(MOVE, f"{operation.kind} inserted rows")
        for row_id in born:
            row = self.rows.get(row_id)
            if self.ever_inserted[row_id] not in operation.destinations:
                raise Violation(
                    ISOLATION,
                    f"{operation.kind} for {operation.destinations} inserted {self.ever_inserted[row_id]}",
                )
            if row is not None and operation.kind != "foreign":
                expected = row._replace(
                    status="pending", retry_count=0, last_error=None, sent_at_ms=None, revived_at_ms=None,
                    next_attempt_at_ms=row.created_at_ms, suspected_at_ms=None, waits_for=None, lost_leases=0,
                )  # fmt: skip
                if row != expected or row.created_at_ms not in operation.readings:
                    raise Violation(MOVE, f"enqueue wrote {row}")

    def _check_deleted(
        self, operation: Operation, gone: list[Row], born: list[int], entries: Counter[tuple[str, str, str, str]]
    ) -> None:
        for destination in sorted({*(row.destination for row in gone), *(entry[0] for entry in entries)}):
            reason = check_deleted(
                self.policy,
                operation,
                [row for row in gone if row.destination == destination],
                [row for row in self.rows.values() if row.destination == destination],
                [row_id for row_id in born if self.ever_inserted[row_id] == destination],
                Counter({entry[1:]: events for entry, events in entries.items() if entry[0] == destination}),
                shared=self.shared,
            )
            self.seen.update(f"{reason} {row.status}" for row in gone if row.destination == destination)

    # Isolation

    def _check_isolation(self, operation: Operation, changed: list[Row | Pause]) -> None:
        """Check that a flush, and what an enqueue trims, change nothing of another destination."""
        if operation.kind in ("retry_now", "requeue"):
            return  # those of an operator, for all destinations
        others = [one for one in changed if one.destination not in operation.destinations]
        if others:
            raise Violation(ISOLATION, f"{operation.kind} of {operation.destinations} changed {others}")

    def flush_begins(self, operation: Operation) -> None:
        """Note what is there when a flush begins."""
        operation.there, operation.pause = self.rows, self.pauses[operation.destination]

    def _check_nothing_waits(self, operation: Operation) -> None:
        """Check that a flush that claimed nothing left no row that was due, unless its own service is paused."""
        now, pause = operation.readings[0], self.pauses[operation.destination]
        if self.shared or pause is not operation.pause or pause.trusted(now).until_ms > now:
            return  # on a server a claim leaves what others lock
        waiting = [
            row
            for row_id, row in self.rows.items()
            if row is operation.there.get(row_id)
            and row.destination == operation.destination
            and row.status in ("pending", "sending")
            and row.next_attempt_at_ms <= now
        ]
        if waiting:
            raise Violation(ISOLATION, f"at {now} a flush left {waiting}, with the pauses {self.pauses}")

    # Moves

    def _check_changed(
        self, process: Process, stage: Stage, before: dict[int, Row], changed: list[tuple[Row, Row]]
    ) -> dict[str, set[int]]:
        operation = process.operation
        moves: dict[str, set[int]] = {}
        for old, new in changed:
            found = [trigger for trigger, leads in self._explanations(operation, old, new) if leads == new]
            if not found:
                self._say_why_not(operation, old, new)
            self._check_blame(old, new)
            moves.setdefault(found[0], set()).add(old.id)
            if found[0] in declared_moves():
                self._check_against_table(found[0], old, new)
        self._check_choice(operation, before, moves)
        if "claim" in moves:
            operation.claim = {row_id: before[row_id] for row_id in moves["claim"]}
            operation.requests = []
            operation.settlements = operation.given_up = operation.ended_failures = operation.probe_until_ms = 0
            operation.seen = {pause.pauses for pause in operation.pauses}
        for trigger, ids in moves.items():
            if trigger in ("claim", "renew"):
                operation.lease_ms = self.rows[min(ids)].next_attempt_at_ms
                self.holders.update(dict.fromkeys(ids, operation))
            else:
                for row_id in ids:
                    self.holders.pop(row_id, None)
        self._check_settled_at_once(operation, moves)
        self.seen.update(moves.keys())
        operation.moved.update({trigger: len(ids) for trigger, ids in moves.items()})
        operation.given_up += len(moves.get("abandon", ()))
        reasons = [(self.rows[row_id].last_error or "").partition(":")[0] for row_id in moves.get("abandon", ())]
        self.seen.update(f"abandon {reason}" for reason in reasons)
        self.seen["take over"] += sum(before[row_id].status == "sending" for row_id in moves.get("claim", ()))
        stage.note(
            process.name, "commits", ", ".join(f"{trigger} {sorted(ids)}" for trigger, ids in moves.items())
        )
        return moves

    def _explanations(self, operation: Operation, old: Row, new: Row) -> Iterator[tuple[str, Row]]:
        """Yield every trigger that this operation may pull on this row, with what the row must then be."""
        now = operation.now_ms if operation.readings else 0
        if operation.kind == "flush":
            yield from self._of_flusher(operation, old, now)
            if self._holds(operation, old):
                for trigger, leads in self._moves[old.destination].of(operation, old):
                    # How the text that can't be decoded is described is not told again.
                    is_undecodable = leads.last_error == "undecodable"
                    yield trigger, (leads._replace(last_error=new.last_error) if is_undecodable else leads)
        elif operation.kind == "retry_now":
            if old.status == "parked":
                yield (
                    "retry_now",
                    old.brought_back(now=now, due=now)._replace(
                        retry_count=old.retry_count, last_error=old.last_error
                    ),
                )
            elif old.status == "pending" and old.next_attempt_at_ms > now:
                yield "retry_now", old._replace(next_attempt_at_ms=now)
        elif operation.kind == "requeue" and old.status == "abandoned" and old.created_at_ms < operation.cutoff_ms:
            yield "requeue", old.brought_back(now=now, due=now)

    def _of_flusher(self, operation: Operation, old: Row, now: int) -> Iterator[tuple[str, Row]]:
        lease = now + self.policy.lease_ms
        if self._holds(operation, old):
            yield "renew", old._replace(next_attempt_at_ms=lease)
        if old.status in ("pending", "sending") and old.next_attempt_at_ms <= now:
            yield "claim", old._replace(status="sending", next_attempt_at_ms=lease, lost_leases=old.lost_again)
        if operation.delivered(old) and old.event in self.servers[old.destination].stored:
            yield "deliver", old._replace(status="sent", sent_at_ms=now, lost_leases=0)
        if old.status == "parked":
            yield "unpark", old.brought_back(now=now, due=now + old.id % self.policy.unpark_spread_ms)
        if not self.policy.is_original and old.status == "pending" and operation.accepted():
            ended = operation.ended_failures >= 3
            if old.waits_for in ("service", "proof") or (old.waits_for == "row" and ended):
                yield "revive", old._replace(next_attempt_at_ms=choices.revival(old, now, self.policy))

    def _holds(self, operation: Operation, row: Row) -> bool:
        if row.status != "sending":
            return False
        if self.holders.get(row.id) is operation:
            return True
        # The lease is a time. Where clocks differ, a row may pass through other hands and come under the very
        # lease of who lost it; where they agree, it can't, for each taker's lease lies behind the last one.
        by_chance = not self.equal_clocks and row.id in operation.claim
        by_chance = by_chance and row.next_attempt_at_ms == operation.lease_ms
        self.seen["same lease twice"] += by_chance
        operation.by_chance |= by_chance
        return by_chance

    def _check_against_table(self, trigger: str, old: Row, new: Row) -> None:
        move = declared_moves()[trigger]
        if old.status not in move.sources or new.status != move.target:
            raise Violation(MOVE, f"{trigger} is no move from {old.status} to {new.status}")

    def _check_blame(self, old: Row, new: Row) -> None:
        """Check that only its age made the flusher give up what the service would accept."""
        aged_out = (new.last_error or "").startswith("aged-out")
        if (
            new.status == "abandoned" != old.status
            and self.servers[new.destination].is_blameless
            and self.is_deliverable(new)
            and not aged_out
        ):
            raise Violation(BLAME, f"{new} was given up")

    def _check_choice(self, operation: Operation, before: dict[int, Row], moves: dict[str, set[int]]) -> None:
        """Check that a move that chooses its rows chose the right ones, and all of them."""
        if self.shared:
            # Each leaves what others hold, and does not see what they will commit.
            if len(moves.get("claim", ())) > self.policy.batch_size:
                raise Violation(MOVE, f"claimed {sorted(moves['claim'])}, more than a batch")
            return
        is_probe = self.pauses[operation.destination].probe_until_ms > operation.now_ms
        of_destination = [row for row in before.values() if row.destination == operation.destination]
        choices.check_choice(self.policy, operation, of_destination, moves, is_probe=is_probe)
        if {"retry_now", "requeue"} & moves.keys():
            (trigger,) = moves
            due = {row.id for row in before.values() if any(self._explanations(operation, row, row))}
            if moves[trigger] != due:
                raise Violation(MOVE, f"{trigger} took {sorted(moves[trigger])}, due were {sorted(due)}")

    def _check_settled_at_once(self, operation: Operation, moves: dict[str, set[int]]) -> None:
        settled = {trigger for trigger in moves if trigger in ("deliver", "reschedule", "park", "abandon")}
        undecodable = any("spoilt" in self.rows[row_id].payload_json for row_id in moves.get("abandon", ()))
        if settled and not undecodable:
            operation.settlements += 1
            # What is repeated, for its commit was lost, lands again only on a row that it holds by chance.
            if operation.settlements > 1 and not operation.by_chance:
                raise Violation(ATOMICITY, f"a second transaction for one answer: {moves}")

    def _say_why_not(self, operation: Operation, old: Row, new: Row) -> None:
        what = (
            f"{operation.kind} turned {old} into {new} with {operation.requests}, clock {operation.readings[-2:]}"
        )
        if new.status == "sent" and old.status != "sent":
            raise Violation(ACCEPTANCE, what)
        if old.status == "sending" and not self._holds(operation, old):
            raise Violation(EXCLUSION, what)
        if new.status == "abandoned":
            raise Violation(ABANDONMENT, what)
        raise Violation(MOVE, what)

    # Pauses

    def transaction_begins(self, operation: Operation) -> None:
        operation.pauses = [self.pauses[operation.destination]]
        operation.holds = [self.holds[operation.destination]]

    def _see_holds(self, stage: Stage) -> None:
        before, self.holds = self.holds, self.read_holds()
        for destination, ends_ms in self.holds.items():
            if ends_ms != before[destination]:
                self.seen["hold" if ends_ms else "end of a hold"] += 1
                for one in [one.operation for one in stage.processes]:
                    if one.destination == destination:
                        one.holds.append(ends_ms)

    def _check_pause(self, process: Process, stage: Stage, old: Pause, *, claimed: int) -> None:
        operation, new = process.operation, self.pauses[old.destination]
        is_probe = False
        if new != old:
            accepted_at_ms = self._moves[old.destination].accepted_at_ms
            # The times that the flusher read count, because its commit may have waited long for the lock.
            works = not self.equal_clocks or any(now - accepted_at_ms <= 60_000 for now in operation.readings)
            allowed = pauses.changes(operation, old, claimed, works=works, policy=self.policy)
            found = [] if self.policy.is_original else [name for name, leads in allowed if leads == new]
            if not found:
                raise Violation(
                    PAUSE,
                    f"{operation.kind} turned {old} into {new} with {operation.requests}, it saw {operation.seen},"
                    f" clock {operation.readings[-2:]}",
                )
            is_probe = found[0] == "probe"
            if found[0].startswith("resume"):
                operation.ended_failures = max(operation.ended_failures, old.failures)
            self.seen[found[0]] += 1
            stage.note(process.name, f"commits {found[0]}", new)
            for one in [one.operation for one in stage.processes]:
                if one.destination == old.destination:
                    one.pauses.append(new)
                    if one.probe_until_ms != new.probe_until_ms:
                        one.probe_until_ms = 0
        if is_probe:
            operation.probe_until_ms = new.probe_until_ms
        if claimed and not self.policy.is_original:
            pauses.check_claim(operation, claimed, is_probe=is_probe)

    # Beside the table

    def upload_starts(self, process: Process, stage: Stage) -> None:
        """Check that nobody else is uploading the same rows under a lease that still runs."""
        mine = process.operation
        if not self.equal_clocks or mine.lease_ms <= stage.now_ms:
            return
        for other in stage.processes:
            theirs = other.operation
            probing = mine.probe_until_ms > stage.now_ms < theirs.probe_until_ms
            probing = probing and mine.destination == theirs.destination
            if other is not process and theirs.uploading and probing and not other.doomed:
                raise Violation(PAUSE, f"{process.name} and {other.name} both probe")
            if other is not process and theirs.uploading and theirs.lease_ms > stage.now_ms and not other.doomed:
                shared = mine.uploads() & theirs.uploads()
                if shared:
                    raise Violation(EXCLUSION, f"{process.name} and {other.name} both upload {sorted(shared)}")

    def flushed(self, operation: Operation, report: FlushReport) -> None:
        """Check what a flush reports, and that it recorded what it saw accepted."""
        self.seen["lost lease"] += report.lost_leases
        outcomes = report.sent + report.rescheduled + report.parked + report.abandoned + report.lost_leases
        is_held = report.hold is not None
        if not report.claimed and not is_held and not (report.skipped or "").startswith("not logged in"):
            self._check_nothing_waits(operation)
        if outcomes != report.claimed:
            raise Violation(REPORT, f"{report.claimed} were claimed, {outcomes} have an outcome")
        if report.paused_until_ms is not None and report.paused_until_ms <= operation.now_ms:
            raise Violation(REPORT, f"at {operation.now_ms} it is paused until {report.paused_until_ms}")
        told = {"reschedule": report.rescheduled, "park": report.parked, "abandon": report.abandoned}
        for trigger, count in told.items():
            self.moved(operation, trigger, count)
        forgotten = [row.id for row in self.rows.values() if operation.delivered(row) and row.status != "sent"]
        if forgotten:
            raise Violation(ACCEPTANCE, f"{forgotten} were accepted, and are not sent")

    def moved(self, operation: Operation, trigger: str, count: int) -> None:
        """Check how many rows an operation says that it moved."""
        # Nobody who did not learn of a commit can tell what it did.
        if operation.moved[trigger] != count and not operation.commit_lost:
            raise Violation(
                REPORT, f"{trigger} of {count} rows is reported, of {operation.moved[trigger]} was done"
            )

    def enqueued(self, operation: Operation, ids: list[int]) -> None:
        """Check that what enqueue returned is durable, an id for each destination in turn."""
        for row_id, destination in zip(ids, cycle(operation.destinations), strict=False):
            if self.ever_inserted.get(row_id) != destination:
                raise Violation(LOSS, f"enqueue returned {row_id} for {destination!r}, which was not committed")

    def is_deliverable(self, row: Row) -> bool:
        """Tell whether the service would accept the event, if it were sent."""
        spoilt = "spoilt" in row.payload_json if self.policy.is_original else not row.decodable
        return not row.poison and not spoilt

    def undelivered(self) -> list[Row]:
        """Return the rows that ought to be delivered once nothing fails."""
        waiting = ("pending", "sending", "parked")
        return [row for row in self.rows.values() if row.status in waiting and self.is_deliverable(row)]
