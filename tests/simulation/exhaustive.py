"""Every order of a small world: two flushers, two rows, a crash and a lease that runs out, each at any step.

A path is a list of choices; it is played from the start, for a process can't be put back to an earlier step. Where a
path comes to a state that another one was in, it ends, for what follows is known.

It runs under each policy. A transaction is one step. Whoever writes holds the lock from BEGIN IMMEDIATE to COMMIT and the flushers read nothing
outside of it, so nobody can come in between, and a crash inside of it leaves what one just before it leaves. What
a flush does behind its settlement, but for the pause, is left out: with so few rows there is little to bring back.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter
from typing import TypeVar
from unittest import mock

from outbox import BatchItem, HttpFailure, Outbox, Policy, TransportFailure, maintenance

from .facts import LIVENESS, Violation
from .model import Model
from .server import Answer, Client, Server
from .stage import AFTER_UPLOAD, BEFORE_UPLOAD, NOON_MS, Director, Process, Stage
from .theatre import Theatre

T = TypeVar("T")

_BEGINNING = 0
_STEPS = {"before BEGIN IMMEDIATE", BEFORE_UPLOAD, AFTER_UPLOAD, "rest"}
_LONG_ENOUGH_MS = 3 * 60 * 60 * 1_000

_START = """
    BEGIN IMMEDIATE;
    DELETE FROM observation_events;
    DELETE FROM sqlite_sequence;
    DELETE FROM observation_destinations;
    DELETE FROM born;
    INSERT INTO observation_events (event_type, payload_json, occurred_at_ms, next_attempt_at_ms, created_at_ms)
    VALUES {rows};
    COMMIT;
"""
_PAYLOAD = '{"event_type":"rule_fired","rule_ids":[],"session_id":"s1","fired_at":"2026-11-24T12:00:00Z"}'
_ROW = f"('rule_fired', '{_PAYLOAD}', {NOON_MS}, {NOON_MS}, {NOON_MS})"

ANSWERS = {
    "ok": Answer,
    "permanent": lambda: Answer(HttpFailure(422, "No"), stored=False),
    "transient": lambda: Answer(HttpFailure(503, "Later"), stored=False),
    "lost": lambda: Answer(TransportFailure("reset by peer")),
}


@dataclass(frozen=True)
class Scope:
    """How small the world is."""

    answers: tuple[str, ...] = ("ok", "permanent", "transient")
    rows: int = 2
    batch_size: int = 2
    flushers: int = 2
    flushes: int = 1
    crashes: int = 1
    expiries: int = 1
    failovers: int = 0
    original: bool = False


@dataclass
class Search:
    """What was visited so far, and what is still to be tried."""

    scope: Scope
    outboxes: dict[str, Outbox]
    followers: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """What each state leads to, by the hashes of both."""
    ends: set[int] = field(default_factory=set)
    paths: int = 0
    steps: int = 0
    to_try: list[tuple[int, list[int]]] = field(default_factory=lambda: [(_BEGINNING, [])])

    def interleavings(self) -> int:
        """Return how many ways lead from the beginning to an end."""

        @cache
        def ways(state: int) -> int:
            return 1 if state in self.ends else sum(ways(follower) for follower in self.followers[state])

        return ways(_BEGINNING)

    def __str__(self) -> str:
        return (
            f"{len(self.followers)} states in {self.interleavings()} interleavings with {len(self.ends)} ends,"
            f" in {self.paths} paths of {self.steps} steps"
        )


def search(scope: Scope, theatre: Theatre) -> Search:
    """Visit every state; raise the first violation, with the steps that lead to it."""
    build = Policy.original if scope.original else Policy
    policy = build(batch_size=scope.batch_size).on(is_shared=False)
    with ExitStack() as stack:
        observer = stack.enter_context(theatre.empty_database())
        stack.enter_context(mock.patch.object(maintenance, "due_chores", return_value=None))
        names = [f"flusher{number}" for number in range(scope.flushers)]
        found = Search(scope, {name: Outbox(theatre.seat(name).engine, policy=policy) for name in names})
        while found.to_try:
            path = _Path(found, *found.to_try.pop())
            path.play(theatre, observer, policy)
            found.paths += 1
            found.steps += path.stage.ticks
    return found


class _Path(Director):
    """Plays the choices that it is given, and from there on always the first one."""

    def __init__(self, found: Search, came_from: int, prefix: list[int]) -> None:
        self._search = found
        self._came_from = came_from
        self._prefix = prefix
        self._taken: list[int] = []
        self._crashes, self._expiries = found.scope.crashes, found.scope.expiries
        self._failovers = found.scope.failovers
        self._flushes = dict.fromkeys(found.outboxes, found.scope.flushes)
        self._is_known = self._calm = False
        self._server = Server(self._answer, is_blameless=not found.scope.original)

    def play(self, theatre: Theatre, observer: sqlite3.Connection, policy: Policy) -> None:
        observer.executescript(_START.format(rows=", ".join([_ROW] * self._search.scope.rows)))
        model = Model(observer, policy, {"": self._server}, equal_clocks=True)
        stage = Stage(self, model)
        try:
            stage.play([Process(name, theatre.seat(name), self._live) for name in self._search.outboxes])
        except Violation as violation:
            raise Violation(violation.invariant, "\n".join([str(violation), *stage.trace])) from violation

    def stops(self, step: str) -> bool:
        return step in _STEPS

    def choose(self) -> Process | None:
        stage = self.stage
        stage.ticks += 1
        while not self._calm and not self._is_known:
            runnable = stage.runnable()
            if not runnable:
                return self._end()
            what, process = self._pick(self._options(runnable))
            if what == "expiry":
                self._expiries -= 1
                stage.now_ms += Policy.lease_ms
                stage.note("time", "passes")
                continue
            if what == "failover":
                self._failovers -= 1
                stage.now_ms += 1
                stage.model.fail_over(stage.now_ms)
                stage.note("the newest event", "is lost, another one gets its id")
                continue
            if what == "crash":
                self._crashes -= 1
                self._flushes[process.name] += 1
                process.doomed = True
            return None if self._is_known else process
        return self._drain() if self._calm else None

    def _options(self, runnable: list[Process]) -> list[tuple[str, Process]]:
        options = [("run", process) for process in runnable]
        if self._crashes:
            options += [("crash", process) for process in runnable if process.operation.kind == "flush"]
        if self._expiries:
            options.append(("expiry", runnable[0]))
        if self._failovers:
            options.append(("failover", runnable[0]))
        return options

    def _live(self, process: Process) -> None:
        client = Client(process, self._server)
        # Whose turn it is, a process has to find out anew.
        claims = self._search.outboxes[process.name].store.claims
        claims._turns[""].took_failed = True
        while True:
            if not self._flushes[process.name] and not self._calm:
                process.rest()
                continue
            self._flushes[process.name] -= 1
            process.begin("flush")
            claimed = self._search.outboxes[process.name].flush(client).claimed
            process.begin("rest")
            if self._calm and not claimed:
                process.rest()
            else:
                process.pause("rest")

    def _answer(self, _batch: Sequence[BatchItem]) -> Answer:
        return ANSWERS["ok" if self._calm else self._pick(self._search.scope.answers)]()

    def _pick(self, options: Sequence[T]) -> T:
        depth = len(self._taken)
        choice = self._prefix[depth] if depth < len(self._prefix) else 0
        if depth >= len(self._prefix) and not self._is_known:
            state = self._arrive()
            self._is_known = state in self._search.followers
            if not self._is_known:
                others = range(1, len(options))
                self._search.to_try += [(state, [*self._taken, other]) for other in others]
                self._search.followers[state] = []
        self._taken.append(choice)
        return options[choice]

    def _arrive(self) -> int:
        state = hash(self._state())
        self._search.followers[self._came_from].append(state)
        self._came_from = state
        return state

    def _state(self) -> Hashable:
        """Return all that what follows depends on.

        A process is deterministic: where it stands and all that it knows follow from what it was told since it began
        its flush, by the clock, the database and the server.
        """
        return (
            self.stage.now_ms,
            self._crashes,
            self._expiries,
            self._failovers,
            tuple(sorted(self.stage.model.rows.items(), key=itemgetter(0))),
            self.stage.model.pauses[""],
            tuple(sorted(self._server.stored)),
            # Sorted, for who of them is who makes no difference.
            tuple(sorted(hash(self._told(process)) for process in self.stage.processes)),
        )

    def _told(self, process: Process) -> Hashable:
        operation = process.operation
        return (
            tuple(sorted(row_id for row_id, owner in self.stage.model.holders.items() if owner is operation)),
            process.at,
            process.idle,
            process.doomed,
            self._flushes[process.name],
            self._search.outboxes[process.name].store.claims._turns[""].took_failed,
            tuple(operation.readings),
            tuple(operation.results),
            tuple((request.ids, request.on_its_way) for request in operation.requests),
        )

    def _end(self) -> Process | None:
        """Go on without trouble from an end that is new, to see that everything is delivered."""
        end = self._arrive()
        if end in self._search.ends:
            return None
        self._search.ends.add(end)
        self._calm = True
        self.stage.wake()
        return self._drain()

    def _drain(self) -> Process | None:
        stage = self.stage
        while not stage.runnable():
            undelivered = stage.model.undelivered()
            if not undelivered:
                return None
            due_ms = max(min(row.next_attempt_at_ms for row in undelivered), stage.model.pauses[""].until_ms)
            stage.now_ms = max(stage.now_ms + 1, due_ms)
            stage.wake()
            if stage.now_ms > NOON_MS + _LONG_ENOUGH_MS:
                raise Violation(LIVENESS, f"still there: {undelivered}")
        return stage.runnable()[0]
