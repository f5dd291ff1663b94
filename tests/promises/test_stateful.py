"""The whole outbox against a model of a few lines, over sequences of calls that hypothesis makes up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from itertools import count, cycle
from pathlib import Path

import pytest
from freezegun import freeze_time
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import literal, select, union_all

from builders import DOWN, NOON, NOON_MS, OK, REJECTED, REVOKED, SLOW_DOWN, ScriptedClient, rule_fired
from outbox import Outbox, Policy, Where
from outbox.destinations import shown
from outbox.storage.engines import reading
from outbox.storage.tables import destinations_ledger, ledger
from servers import Servers

MAX_ROWS = 12
DESTINATIONS = ["default", "billing"]
DESTINATION = st.sampled_from(DESTINATIONS)
WHERE = st.builds(
    Where, status=st.sampled_from(["pending", "parked", "abandoned", "sent"]), destination=DESTINATION
)


class OutboxMachine(RuleBasedStateMachine):
    """The model: for each row its destination, its status, when it is due, and the failures so far."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.time = freeze_time(NOON)
        self.clock = self.time.start()
        self.now = NOON_MS
        self.outbox = Outbox.open(
            url, policy=Policy.original(max_rows=MAX_ROWS, batch_size=4), synchronous="NORMAL"
        )
        self.destination: dict[int, str] = {}
        self.status: dict[int, str] = {}
        self.due: dict[int, int] = {}
        self.failures: dict[int, int] = {}
        self.created: dict[int, int] = {}
        self.deleted: Counter[str] = Counter()
        self.accepted: set[int] = set()

    def teardown(self) -> None:
        self.outbox.close()
        self.time.stop()

    def of(self, destination: str) -> list[int]:
        return [row_id for row_id in self.status if self.destination[row_id] == destination]

    def delete(self, row_id: int) -> None:
        del self.status[row_id]
        self.deleted[self.destination[row_id]] += 1

    def cap(self, destination: str) -> None:
        def rank(row_id: int) -> tuple[int, int, int]:
            order = {"sent": 0, "abandoned": 1}.get(self.status[row_id], 2)
            return order, self.due[row_id] if order == 0 else 0, row_id

        rows = self.of(destination)
        for row_id in sorted(rows, key=rank)[: max(0, len(rows) - MAX_ROWS)]:
            self.delete(row_id)

    def unpark(self, destination: str) -> None:
        for row_id in [found for found in self.of(destination) if self.status[found] == "parked"]:
            self.status[row_id] = "pending"
            self.failures[row_id] = 0
            self.due[row_id] = self.now + row_id % 5_000

    def jittered(self, delay: int, row_id: int) -> int:
        return self.now + delay + (self.now ^ row_id) % (delay // 4)

    @rule(events=st.integers(1, 5), to=st.sampled_from([["default"], ["billing"], DESTINATIONS]))
    def enqueue(self, events: int, to: list[str]) -> None:
        ids = self.outbox.enqueue_many([rule_fired()] * events, to=to)
        assert len(ids) == events * len(to)
        for row_id, destination in zip(ids, cycle(to), strict=False):
            self.destination[row_id] = destination
            self.status[row_id], self.due[row_id], self.failures[row_id] = "pending", self.now, 0
            self.created[row_id] = self.now
        for destination in to:
            self.cap(destination)

    @rule(seconds=st.sampled_from([1, 60, 600, 4_000]))
    def wait(self, seconds: int) -> None:
        self.clock.tick(timedelta(seconds=seconds))
        self.now += seconds * 1_000

    def batch(self, destination: str) -> list[int]:
        rows = self.of(destination)
        return sorted(r for r in rows if self.status[r] == "pending" and self.due[r] <= self.now)[:4]

    @rule(answer=st.sampled_from([OK, DOWN, SLOW_DOWN, REVOKED]), destination=DESTINATION)
    def flush(self, answer, destination: str) -> None:
        batch = self.batch(destination)
        report = self.outbox.flush(ScriptedClient(answer), destination=destination)
        assert report.attempted == len(batch)
        for row_id in batch:
            if answer is OK:
                self.status[row_id], self.due[row_id] = "sent", self.now
                self.accepted.add(row_id)
            elif answer is REVOKED:
                self.status[row_id] = "parked"
            elif answer is SLOW_DOWN:
                self.due[row_id] = self.jittered(40_000, row_id)
            else:
                self.failures[row_id] += 1
                self.due[row_id] = self.jittered(60_000 << min(self.failures[row_id], 5), row_id)
        if batch and answer is OK:
            self.unpark(destination)
        if batch:
            self.cap(destination)

    @rule(poison=st.sets(st.integers(0, 3)), destination=DESTINATION)
    def flush_with_bad_rows(self, poison: set[int], destination: str) -> None:
        batch = self.batch(destination)
        bad = {row_id for index, row_id in enumerate(batch) if index in poison}
        client = ScriptedClient()
        client.answers = [lambda sent: REJECTED if {item.id for item in sent} & bad else OK] * 9
        report = self.outbox.flush(client, destination=destination)
        assert report.sent == len(batch) - len(bad)
        if bad and len(bad) == len(batch) > 1:
            for row_id in bad:
                self.failures[row_id] += 1
                self.due[row_id] = self.jittered(60_000 << min(self.failures[row_id], 5), row_id)
        else:
            for row_id in batch:
                self.status[row_id] = "abandoned" if row_id in bad else "sent"
                self.due[row_id] = self.now
            if set(batch) - bad:
                self.unpark(destination)
        if batch:
            self.cap(destination)

    @rule()
    def retry_now(self) -> None:
        changed = 0
        for row_id, status in self.status.items():
            if status == "parked" or (status == "pending" and self.due[row_id] > self.now):
                self.status[row_id], self.due[row_id] = "pending", self.now
                changed += 1
        assert self.outbox.retry_now() == changed

    @precondition(lambda self: "abandoned" in self.status.values())
    @rule()
    def requeue(self) -> None:
        back = [row_id for row_id, status in self.status.items() if status == "abandoned"]
        assert self.outbox.requeue_abandoned(older_than=self.now + 1).total == len(back)
        for row_id in back:
            self.status[row_id], self.due[row_id], self.failures[row_id] = "pending", self.now, 0

    @rule(age_ms=st.sampled_from([600_000, 4_000_000]))
    def purge(self, age_ms: int) -> None:
        old = [row_id for row_id in self.status if self.created[row_id] < self.now - age_ms]
        assert self.outbox.purge(older_than=self.now - age_ms).total == len(old)
        for row_id in old:
            self.delete(row_id)

    def matching(self, where: Where) -> list[int]:
        assert where.statuses is not None
        return [row_id for row_id in self.of(str(where.destination)) if self.status[row_id] in where.statuses]

    @rule(where=WHERE)
    def retry(self, where: Where) -> None:
        found = [row_id for row_id in self.matching(where) if self.status[row_id] in ("pending", "parked")]
        found = [row_id for row_id in found if self.status[row_id] == "parked" or self.due[row_id] > self.now]
        assert self.outbox.retry(where).total == len(found)
        for row_id in found:
            self.status[row_id], self.due[row_id] = "pending", self.now

    @rule(where=WHERE)
    def abandon(self, where: Where) -> None:
        found = [row_id for row_id in self.matching(where) if self.status[row_id] in ("pending", "parked")]
        assert self.outbox.abandon(where=where, reason="no longer wanted").total == len(found)
        for row_id in found:
            self.status[row_id] = "abandoned"

    @rule(where=WHERE)
    def purge_what_matches(self, where: Where) -> None:
        found = self.matching(where)
        assert self.outbox.purge(where=where).total == len(found)
        for row_id in found:
            self.delete(row_id)

    @rule(where=WHERE)
    def replace(self, where: Where) -> None:
        found = self.matching(where)
        report = self.outbox.replace(dict.fromkeys(found, rule_fired()))
        assert report.replaced.keys() == {row_id for row_id in found if self.status[row_id] != "sent"}
        for old, new in report.replaced.items():
            self.delete(old)
            self.destination[new] = self.destination[old]
            self.status[new], self.due[new], self.failures[new] = "pending", self.now, 0
            self.created[new] = self.now

    @invariant()
    def the_table_is_as_the_model_says(self) -> None:
        found = {row.id: row for row in self.outbox.find(limit=1_000)}
        assert {row_id: row.status for row_id, row in found.items()} == self.status
        assert {i: r.next_attempt_at_ms for i, r in found.items() if r.status == "pending"} == {
            row_id: self.due[row_id] for row_id, status in self.status.items() if status == "pending"
        }
        assert {row_id: row.destination or "default" for row_id, row in found.items()} == {
            row_id: self.destination[row_id] for row_id in self.status
        }
        stats = self.outbox.stats()
        assert sum(entry.events for entry in stats.deleted) == self.deleted.total()
        assert sum(stats.counts.values()) == len(found)
        assert self.counted() == self.deleted

    def counted(self) -> Counter[str]:
        """Return how many events of each destination the ledgers count."""
        of_default = select(literal(""), ledger.c.events)
        of_others = select(destinations_ledger.c.destination, destinations_ledger.c.events)
        found: Counter[str] = Counter()
        with reading(self.outbox.engine) as connection:
            for destination, events in connection.execute(union_all(of_default, of_others)):
                found[shown(destination)] += events
        return found


@pytest.fixture
def fresh_url(database: str, tmp_path: Path, servers: Servers) -> Callable[[], str]:
    """Give the URL of an empty database, as often as it is called."""
    number = count()
    if database in {"sqlite", "fourth"}:
        return lambda: f"{database}:///{tmp_path}/{next(number)}.db"
    return lambda: servers.empty_outbox(database).render_as_string(hide_password=False)


@pytest.mark.contract
def test_every_sequence_of_calls_does_what_the_model_says(database: str, fresh_url) -> None:
    examples, steps = (42, 40) if database == "sqlite" else (6, 25)
    run_state_machine_as_test(
        lambda: OutboxMachine(fresh_url()),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
