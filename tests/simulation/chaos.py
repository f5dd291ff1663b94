"""One world a seed: several flushers, programs that enqueue, an operator, and whatever can go wrong.

A seed first chooses which kinds of trouble its world knows at all, so that rare ones are not drowned by the others.
Each concern draws from a stream of its own: leaving out one kind changes the others as little as possible, which is
what makes a failing world shrink.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import cycle

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox import FixOutcome, Outbox, Policy, RuleFired, StorageError
from outbox.destinations import shown

from . import weather
from .facts import LIVENESS, LOSS, MINUTE_MS, REPORT, WEEK_MS, Row, Violation
from .model import Model
from .server import Client
from .stage import NOON_MS, Director, Fault, Process, Stage
from .theatre import Theatre
from .weather import AUTH, BUG, DOWN, DRIFT, LIMIT, LOST_ANSWER, Bug, Weather

NOON = datetime(2026, 11, 24, 12, 0, tzinfo=timezone.utc)

CRASH, DATABASE, DEADLOCK, DISCONNECT, LOST_COMMIT = "crash", "database", "deadlock", "disconnect", "lost-commit"
SKEW, JUMP, LEAP = "skew", "jump", "leap"
POISON, SPOILT, HOST, OPERATOR, CAP = "poison", "spoilt", "host", "operator", "cap"
KINDS = (
    CRASH, DATABASE, DEADLOCK, DISCONNECT, LOST_COMMIT, LOST_ANSWER, SKEW, JUMP, LEAP, DOWN, LIMIT, AUTH, DRIFT, BUG,
    POISON, SPOILT, HOST, OPERATOR, CAP,
)  # fmt: skip
DESTINATIONS = ("", "billing", "search", "archive")
TICKS = 1_500

_GIVEN_UP = ("40001", "40P01")

# The longest back-off with its jitter, the lease of whoever died last, and parked rows that come back two by two.
_GRACE_MS = 1_920_000 * 5 // 4 + 60_000 + 60 // 2 * 5_000
# The longest pause, and a probe that died. The original knows neither.
_GRACE_OF_PAUSE_MS = 300_000 + 60_000


@dataclass(frozen=True)
class Case:
    """One world. Without `kinds` the seed chooses them."""

    seed: int
    ticks: int = TICKS
    kinds: frozenset[str] | None = None

    def chosen_kinds(self) -> frozenset[str]:
        if self.kinds is not None:
            return self.kinds
        draw = stream(self.seed, "kinds")
        share = draw.choice((0.3, 0.6, 0.9))
        return frozenset(kind for kind in KINDS if draw.random() < share)

    @property
    def is_original(self) -> bool:
        """Whether its policy is the original's: that of every other seed."""
        return self.seed % 2 == 1


@dataclass(frozen=True)
class Result:
    case: Case
    ticks: int
    commits: int
    trace: Sequence[str]
    failure: BaseException | None
    shared: bool
    """Whether it was on a server."""
    seen: Counter[str]
    """How often what happened that a world has to know, or else nothing was tried."""

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()

    @property
    def broken(self) -> str:
        """What was broken; worlds that break the same are taken for one bug."""
        return getattr(self.failure, "invariant", type(self.failure).__name__)


def stream(seed: int, name: str) -> random.Random:
    return random.Random(f"{seed} {name}")  # noqa: S311 - it has to be the same every time


class World(Director):
    """Decides from the seed alone."""

    def __init__(self, case: Case, theatre: Theatre) -> None:
        self.case = case
        self.kinds = case.chosen_kinds()
        self._theatre = theatre
        self._schedule, self._trouble, self._time, self.work, self._routing, self._holding = (
            stream(case.seed, name) for name in ("schedule", "trouble", "time", "work", "routing", "holding")
        )
        shape = stream(case.seed, "shape")
        self.policy = self._policy(shape)
        self._flushers = shape.choice((1, 2, 2, 3, 4))
        self._stay = shape.choice((0.0, 0.5, 0.9))
        self._fault_rate = shape.choice((0.002, 0.01, 0.03))
        self._crash_rate = shape.choice((0.001, 0.004, 0.02))
        # On SQLite an engine of ours is written through one connection, a host's through its pool.
        self._on_hosts_engines = not theatre.is_shared and shape.random() < 0.5
        self.calm = False
        self.weathers = self._weathers()
        self._sick = ""
        """The destination whose trouble goes on for a while when everything else has calmed down."""
        self._deadline_ms = 0
        self._last: Process | None = None

    def _policy(self, shape: random.Random) -> Policy:
        build = Policy.original if self.case.is_original else Policy
        limits = {"batch_size": shape.choice((1, 2, 3, 8, 9, 16, 24)), "unpark_limit": shape.choice((2, 256))}
        cap = shape.choice((4, 9, 20, 40))
        if CAP in self.kinds or self.case.is_original:
            return build(**limits, max_rows=cap if CAP in self.kinds else 60, when_full="trim", max_sent=0)
        return build(**limits, max_sent=cap, revive_limit=limits["unpark_limit"])

    def _weathers(self) -> dict[str, Weather]:
        """Half of the worlds have one destination. Of several, each has some of the world's kinds of trouble."""
        seed, draw = self.case.seed, stream(self.case.seed, "destinations")
        number = draw.choice((1, 1, 1, 2, 3, 4))
        if number == 1:
            return {"": Weather(stream(seed, "weather"), self.kinds)}
        return {
            destination: Weather(
                stream(seed, f"weather {destination}"),
                self.kinds & {kind for kind in weather.KINDS if draw.random() < 0.5},
            )
            for destination in DESTINATIONS[:number]
        }

    def run(self) -> Result:
        failure = None
        with self._theatre.empty_database() as observer:
            # On a server all go by its clock, however wrong their own are.
            shared = self._theatre.is_shared
            equal_clocks = shared or not {SKEW, JUMP} & self.kinds
            self.model = Model(
                observer,
                self.policy.on(is_shared=shared),
                {destination: one.server for destination, one in self.weathers.items()},
                equal_clocks=equal_clocks,
                shared=shared,
            )
            self.model.seen[f"{len(self.weathers)} destinations"] += 1
            stage = Stage(self, self.model)
            try:
                stage.play(self._cast())
                self._check_end()
            except Exception as error:
                failure = error
        commits, seen = self.model.commits, self.model.seen
        return Result(self.case, stage.ticks, commits, stage.trace, failure, self._theatre.is_shared, seen)

    def _cast(self) -> list[Process]:
        lives: list[tuple[str, Callable[[Process], None]]] = [("writer", self._write)]
        lives += [(f"flusher{number}", self._flush) for number in range(self._flushers)]
        if HOST in self.kinds:
            lives.append(("host", self._host))
        if SPOILT in self.kinds:
            lives.append(("foreign", self._insert_past_us))
        if OPERATOR in self.kinds:
            lives.append(("operator", self._operate))
        cast = [
            Process(name, self._theatre.seat(name, of_host=name == "host" or self._on_hosts_engines), life)
            for name, life in lives
        ]
        if SKEW in self.kinds:
            for process in cast:
                process.clock_offset_ms = self._time.choice(
                    (0, 0, 1, -1, 700, -60_000, 60_000, 61_500, -3_600_000)
                )
        return cast

    # What the processes do

    def _open(self, process: Process) -> Outbox:
        while True:
            try:
                return Outbox(process.engine, policy=self.policy)
            except StorageError:
                process.rest()

    def _flush(self, process: Process) -> None:
        outbox = self._open(process)
        idle = 0
        for destination in cycle(self._routing.sample([*self.weathers], len(self.weathers))):
            client = Client(process, self.weathers[destination].server)
            operation = process.begin("flush", destinations=(destination,))
            self.model.flush_begins(operation)
            flush = outbox.flush_all if self.work.random() < 0.2 else outbox.flush
            try:
                report = flush(client, destination=shown(destination))
            except (StorageError, Bug, KeyboardInterrupt) as error:
                if not operation.troubled:
                    raise
                process.stage.note(process.name, "gets", type(error).__name__)
                process.rest()
                continue
            process.stage.note(process.name, "reports", report)
            self.model.flushed(operation, report)
            process.begin("rest")
            idle = 0 if report.claimed else idle + 1
            if idle == len(self.weathers) or (not self.calm and self.work.random() < 0.3):
                idle = 0
                process.rest()
            else:
                process.pause("goes on")

    def _write(self, process: Process) -> None:
        outbox = self._open(process)
        while True:
            stuck = self._stuck() if self.calm else []
            if self.calm and not stuck:
                process.rest()
                continue
            if self.calm and self.work.random() < 0.5:
                # A new event may be the oldest by its clock, so that a full queue drops it before it is sent.
                process.begin("retry_now")
                outbox.retry_now()
                continue
            operation = process.begin("enqueue", destinations=stuck or self._some_destinations())
            to = [shown(destination) for destination in operation.destinations]
            events = self._events()
            try:
                ids = outbox.enqueue_many(events, to=to) if len(events) > 1 else outbox.enqueue(events[0], to=to)
            except StorageError:
                if not operation.troubled:
                    raise
                if operation.inserted and not operation.commit_lost:
                    raise Violation(LOSS, "enqueue failed, and yet inserted rows") from None
            else:
                if operation.inserted != len(events) * len(to):
                    raise Violation(LOSS, f"{len(events)} events for {to} inserted {operation.inserted} rows")
                self.model.enqueued(operation, ids)
            process.rest()

    def _host(self, process: Process) -> None:
        """Enqueue in a transaction of its own, with an engine of its own."""
        outbox = self._open(process)
        while not self.calm:
            operation = process.begin("session", destinations=self._some_destinations())
            to = [shown(destination) for destination in operation.destinations]
            try:
                # Without begin(), a session whose commit fails gives its connection back with the transaction open.
                with Session(process.engine) as session, session.begin() as transaction:
                    ids = [
                        row_id
                        for event in self._events()
                        for row_id in outbox.enqueue(event, session=session, to=to)
                    ]
                    if operation.inserted:
                        raise Violation(LOSS, "enqueue committed the caller's transaction")
                    if self.work.random() < 0.3:
                        transaction.rollback()
                        ids = []
            except (DBAPIError, StorageError):
                if not operation.troubled:
                    raise
            else:
                if operation.inserted != len(ids):
                    raise Violation(LOSS, f"the caller committed {len(ids)} rows, {operation.inserted} are there")
                self.model.enqueued(operation, ids)
            process.rest()

    def _insert_past_us(self, process: Process) -> None:
        """Insert as an older program does, now and then what is no object, or of no known type."""
        statement = text(
            "INSERT INTO observation_events (event_type, occurred_at_ms, payload_json, next_attempt_at_ms, created_at_ms)"
            " VALUES ('rule_fired', :now, :payload, :now, :now)"
        )
        sound = '{"event_type":"rule_fired","rule_ids":["r1"],"session_id":"s1","fired_at":"2026-11-24T12:00:00Z"}'
        while not self.calm:
            process.begin("foreign")
            payload = self.work.choice((sound, "spoilt", '{"event_type":"spoilt"}'))
            with suppress(DBAPIError), process.engine.begin() as connection:
                now = process.read_clock()
                connection.execute(statement, {"now": now, "payload": payload})
            process.rest()

    def _operate(self, process: Process) -> None:
        outbox = self._open(process)
        while not self.calm:
            self._hold_or_resume(process, outbox)
            kind = self.work.choice(("retry_now", "requeue", "look"))
            cutoff_ms = process.stage.now_ms + self.work.choice((1, -1_000, -600_000))
            operation = process.begin(kind, cutoff_ms=cutoff_ms)
            try:
                if kind == "retry_now":
                    self.model.moved(operation, kind, outbox.retry_now())
                elif kind == "requeue":
                    dry_run = self.work.random() < 0.2
                    report = outbox.requeue_abandoned(older_than=cutoff_ms, dry_run=dry_run)
                    if not dry_run:
                        self.model.moved(operation, kind, report.total)
                else:
                    outbox.stats()
                    outbox.pending_count()
            except StorageError:
                if not operation.troubled:
                    raise
            process.rest()
        for destination, ends_ms in self.model.holds.items():
            if ends_ms:
                process.begin("resume", destinations=(destination,))
                outbox.resume(shown(destination))

    def _hold_or_resume(self, process: Process, outbox: Outbox) -> None:
        """End a hold, or begin one now and then. It is the next one's turn soon, or little else would happen."""
        held = [destination for destination, ends_ms in self.model.holds.items() if ends_ms]
        if not held and self._holding.random() < 0.8:
            return
        (destination,) = held[:1] or self._holding.sample([*self.weathers], 1)
        operation = process.begin("resume" if held else "hold", destinations=(destination,))
        try:
            if held:
                outbox.resume(shown(destination))
            else:
                for_ms = self._holding.choice((None, 1_000, 60_000))
                outbox.hold(shown(destination), why="a deploy", for_ms=for_ms)
        except StorageError:
            if not operation.troubled:
                raise

    def _some_destinations(self) -> list[str]:
        return self._routing.sample([*self.weathers], self._routing.randint(1, len(self.weathers)))

    def _events(self) -> list[RuleFired | FixOutcome]:
        count = self.work.choice((1, 1, 1, 2, 3, 8, 20))
        return [self._event() for _ in range(1 if self.calm else count)]

    def _event(self) -> RuleFired | FixOutcome:
        poison = not self.calm and POISON in self.kinds and self.work.random() < 0.15
        session_id = "poison" if poison else "s1"
        if self.work.random() < 0.5:
            return RuleFired(rule_ids=["r1"], session_id=session_id, fired_at=NOON)
        return FixOutcome(rule_id="r1", session_id=session_id, accepted=True, occurred_at=NOON)

    # What happens when

    def choose(self) -> Process | None:
        stage = self.stage
        stage.ticks += 1
        if stage.ticks > self.case.ticks and not self.calm:
            self._calm_down()
        if not self.calm:
            self._stir()
        runnable = stage.runnable()
        while not runnable:
            if not self.calm or self._undelivered():
                self._let_time_pass()
            elif self.weathers[self._sick].calm:
                return None
            else:
                self._calm_down_too()
            runnable = stage.runnable()
        if self._last in runnable and self._schedule.random() < self._stay:
            return self._last
        self._last = self._schedule.choice(runnable)
        return self._last

    def database_fault(self, process: Process, step: str) -> Fault | None:
        if self.calm or self._trouble.random() >= self._fault_rate:
            return None
        faults = []
        if DATABASE in self.kinds:
            faults.append("database is locked" if step == "BEGIN IMMEDIATE" else f"disk I/O error at {step}")
        faults += [kind for kind in (DEADLOCK, DISCONNECT) if kind in self.kinds]
        if not faults:
            return None
        fault = self._trouble.choice(faults)
        given_up = self._trouble.choice(_GIVEN_UP) if self.model.shared else _GIVEN_UP[0]
        return Fault(
            fault,
            sqlstate=given_up if fault == DEADLOCK else None,
            breaks_connection=fault == DISCONNECT,
        )

    def lost_commit(self, process: Process) -> Fault | None:
        if self.calm or LOST_COMMIT not in self.kinds or self._trouble.random() >= self._fault_rate:
            return None
        breaks = self.model.shared or self._trouble.random() < 0.5
        return Fault("broke while it committed", breaks_connection=breaks)

    def _stir(self) -> None:
        stage = self.stage
        roll = self._time.random()
        if roll < 0.04:
            self._let_time_pass()
        elif roll < 0.045 and JUMP in self.kinds:
            process = self._time.choice(stage.processes)
            process.clock_offset_ms += self._time.choice((-3_600_000, -60_000, -1_000, 1_000, 60_000, 3_600_000))
            stage.note(process.name, "clock jumps to", process.clock_offset_ms)
        if CRASH in self.kinds and self._trouble.random() < self._crash_rate:
            uploading = [process for process in stage.processes if process.operation.uploading]
            preferred = uploading if self._trouble.random() < 0.5 else []
            self._trouble.choice(preferred or stage.processes).doomed = True
        for one in self.weathers.values():
            one.stir()

    def _let_time_pass(self) -> None:
        stage = self.stage
        stage.now_ms += self._until_due() if self.calm else self._some_time()
        stage.note("time", "is", stage.now_ms - NOON_MS)
        stage.wake()

    def _some_time(self) -> int:
        roll = self._time.random()
        if roll < 0.5:
            return self._time.randint(1, 400)
        if roll < 0.55:
            return 61_000
        return self._to_a_boundary() or self._time.randint(1, 30_000)

    def _to_a_boundary(self) -> int | None:
        """Return how far it is to a moment at which some row changes its nature, or a millisecond beside it."""
        draw = self._time
        if not self.model.rows:
            return None
        uploading = [process for process in self.stage.processes if process.operation.uploading]
        process = draw.choice(uploading or self.stage.processes)
        ids = process.operation.requests[-1].ids if uploading else tuple(self.model.rows)
        row = self.model.rows.get(draw.choice(ids))
        if row is None:
            return None
        boundary = row.next_attempt_at_ms
        pause = self.model.pauses[row.destination]
        if pause.until_ms and draw.random() < 0.3:
            boundary = draw.choice((pause.paused_until_ms, pause.probe_until_ms))
        if LEAP in self.kinds and draw.random() < 0.3:
            boundary = row.gave_chance_at() + WEEK_MS
        now = self.stage.now_ms + (0 if self.model.shared else process.clock_offset_ms)
        distance = boundary + draw.choice((-1, 0, 0, 0, 1)) - now
        return distance if distance > 0 else None

    # The end: nothing fails any more

    def _calm_down(self) -> None:
        """Let nothing fail any more, except one of several destinations: it must not hold up the others."""
        stage = self.stage
        self.calm = True
        self._sick = self._routing.choice([*self.weathers])
        for destination, one in self.weathers.items():
            if destination == self._sick and len(self.weathers) > 1:
                one.settle_in()
            else:
                one.calm_down()
        for process in stage.processes:
            process.clock_offset_ms = 0
        stage.wake()
        stage.note("world", "calms down")
        self._set_deadline()

    def _calm_down_too(self) -> None:
        self.weathers[self._sick].calm_down()
        self.stage.wake()
        self.stage.note(self._sick, "calms down")
        self._set_deadline()

    def _set_deadline(self) -> None:
        self._deadline_ms = (
            max(self.stage.now_ms, self.stage.furthest_ms)
            + _GRACE_MS
            + _GRACE_OF_PAUSE_MS * (not self.case.is_original)
        )

    def _undelivered(self) -> dict[str, list[Row]]:
        """Return the rows that ought to be delivered, of each destination that has calmed down and has some."""
        found: dict[str, list[Row]] = {}
        for row in self.model.undelivered():
            if self.weathers[row.destination].calm:
                found.setdefault(row.destination, []).append(row)
        return found

    def _stuck(self) -> list[str]:
        # To the original what is parked waits for a success or for an operator; when nothing else is left, someone
        # has to do that.
        if not self.case.is_original:
            return []
        found = self._undelivered()
        return [destination for destination, rows in found.items() if {row.status for row in rows} == {"parked"}]

    def _until_due(self) -> int:
        now, found = self.stage.now_ms, self._undelivered()
        if now > self._deadline_ms:
            raise Violation(LIVENESS, f"still there at {now}: {found}")
        return max(1, min(self._next_try_ms(destination, rows) for destination, rows in found.items()) - now)

    def _next_try_ms(self, destination: str, rows: list[Row]) -> int:
        pause = self.model.pauses[destination]
        due = [row.next_attempt_at_ms for row in rows if row.status != "parked"]
        # A parked row is tried each minute, if nothing else is due.
        unparked_ms = self.stage.now_ms if self.case.is_original else pause.unparked_at_ms + MINUTE_MS
        return max(min(due, default=unparked_ms), pause.until_ms)

    def _check_end(self) -> None:
        for row in self.model.rows.values():
            if row.status == "sent" and row.event not in self.weathers[row.destination].server.stored:
                raise Violation(LOSS, f"{row} is nowhere")
        with Outbox(self._theatre.seat("flusher0").engine, policy=self.policy) as outbox:
            seen = outbox.stats()
            if sum(entry.events for entry in seen.deleted) + sum(seen.counts.values()) != len(
                self.model.ever_inserted
            ):
                raise Violation(REPORT, f"of {len(self.model.ever_inserted)} events stats() knows {seen}")


def run(case: Case, theatre: Theatre) -> Result:
    return World(case, theatre).run()


def shrink(result: Result, theatre: Theatre) -> Result:
    """Return a shorter world that breaks the same promise: fewer kinds of trouble, fewer ticks."""
    best = result

    def still_breaks(ticks: int, kinds: frozenset[str]) -> bool:
        nonlocal best
        found = run(replace(best.case, ticks=ticks, kinds=kinds), theatre)
        if found.failure is None or found.broken != result.broken or found.ticks > best.ticks:
            return False
        # What fails before the world calms down needs no tick behind it.
        best = replace(found, case=replace(found.case, ticks=min(ticks, found.ticks)))
        return True

    kinds = result.case.chosen_kinds()
    for kind in KINDS:
        if kind in kinds and still_breaks(best.case.ticks, kinds - {kind}):
            kinds -= {kind}
    step = best.case.ticks // 2
    while step:
        if step > best.case.ticks or not still_breaks(best.case.ticks - step, kinds):
            step //= 2
    still_breaks(best.case.ticks, kinds)
    return best
