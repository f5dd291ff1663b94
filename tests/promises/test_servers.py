"""What only database servers do: many hosts at once, conflicts, connections that break, and their own types."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from uuid import uuid4

import psycopg
import pymysql
import pytest
from freezegun import freeze_time
from sqlalchemy import URL, Engine, create_engine, event, make_url, text
from sqlalchemy.orm import Session

from builders import (
    DOWN,
    NOON,
    REVOKED,
    ROOT,
    ScriptedClient,
    add_row,
    refuse,
    refuse_third,
    row,
    rule_fired,
    statuses,
)
from conditions import until
from outbox import ObservationEvent, Outbox, OutcomeUnknown, Policy, StorageError, schema
from outbox.storage import engines, pings, transactions
from outbox.storage.engines import open_engine
from outbox.storage.tables import destinations
from servers import PrivatePostgresql, Server, Servers
from warm_python import WarmPython

pytestmark = pytest.mark.servers

SECRET = "s3cr3t"
LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"]


@pytest.fixture
def server(database: str, servers: Servers) -> Server:
    return servers.get(database)


@pytest.fixture
def empty(server: Server) -> Iterator[URL]:
    """A database of the test's own, without a schema."""
    with server.database() as made:
        yield made


@pytest.fixture
def host(url: str) -> Iterator[Callable[..., Engine]]:
    """Makes engines as an application would have them, with its own settings."""
    made: list[Engine] = []

    def make(**settings) -> Engine:
        made.append(create_engine(url, **settings))
        return made[-1]

    yield make
    for engine in made:
        engine.dispose()


def shown(url: str | URL) -> str:
    return make_url(url).render_as_string(hide_password=False)


# What happens before each call of the driver


class Watched:
    """Calls `before` with the connection and the statement before each one is run, "COMMIT" too."""

    before = staticmethod(lambda _connection, _statement: None)
    after_commit = staticmethod(lambda _connection: None)


class PsycopgCursor(psycopg.Cursor):
    def execute(self, query, *arguments, **options):
        Watched.before(self.connection, query)
        return super().execute(query, *arguments, **options)

    def executemany(self, query, *arguments, **options):
        Watched.before(self.connection, query)
        return super().executemany(query, *arguments, **options)


class PsycopgConnection(psycopg.Connection):
    def commit(self):
        Watched.before(self, "COMMIT")
        super().commit()
        Watched.after_commit(self)


class PymysqlCursor(pymysql.cursors.Cursor):
    def execute(self, query, args=None):
        Watched.before(self.connection, query)
        return super().execute(query, args)


class PymysqlConnection(pymysql.Connection):
    def commit(self):
        Watched.before(self, "COMMIT")
        super().commit()
        Watched.after_commit(self)


@pytest.fixture
def watched(outbox: Outbox, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outbox]:
    """The same outbox on connections that can be watched; whoever wants to sets `Watched.before`."""
    monkeypatch.setattr(Watched, "before", Watched.before)
    monkeypatch.setattr(Watched, "after_commit", Watched.after_commit)
    engine = open_engine(url)

    @event.listens_for(engine, "do_connect")
    def _connect(_dialect, _record, arguments, options):
        if engine.dialect.name == "postgresql":
            return PsycopgConnection.connect(*arguments, cursor_factory=PsycopgCursor, **options)
        return PymysqlConnection(*arguments, cursorclass=PymysqlCursor, **options)

    with Outbox(engine) as opened:
        opened.store.views.outbox_id()  # it is read once, at another time than what tests watch
        yield opened
    engine.dispose()


def in_several_calls(watched: Outbox) -> None:
    """Let a claim be a transaction of several calls also on PostgreSQL, as on the engine of a host."""
    del engines._own_engines[watched.engine]


def conflict(connection) -> Exception:
    if isinstance(connection, psycopg.Connection):
        return psycopg.errors.SerializationFailure("could not serialize access due to concurrent update")
    return pymysql.OperationalError(1213, "Deadlock found when trying to get lock; try restarting transaction")


def once(happen: Callable[..., object], at_call: int) -> list[str]:
    """Let it happen before the n-th call from now on; return the list that the statements are added to."""
    seen: list[str] = []

    def before(connection, statement):
        if statement == ";":  # the pool looks whether the connection is alive
            return
        seen.append(" ".join(statement.split()))
        if len(seen) == at_call:
            happen(connection)

    Watched.before = staticmethod(before)
    return seen


def raises_conflict(connection) -> None:
    raise conflict(connection)


# Several at once


DRAIN = """
import sys
from outbox import Outbox

class Client:
    logged_in = True
    has_begun = False
    def upload(self, batch):
        if not self.has_begun:
            # Once all have a batch, whoever was slow to begin has one too.
            self.has_begun = True
            print("ready", flush=True)
            sys.stdin.readline()
        for item in batch:
            print(item.id)

client = Client()
with Outbox(sys.argv[1]) as outbox:
    print("ready", flush=True)
    sys.stdin.readline()
    while outbox.pending_count():
        outbox.flush_all(client)
"""


def run_at_once(
    python: WarmPython, program: str, url: URL | str, processes: int, *, starts: int = 1
) -> list[list[str]]:
    """Run a program several times at once; return the lines that each printed after "ready".

    Nobody goes on until all have said that they are ready, as often as there are `starts`.
    """
    started = [
        subprocess.Popen(
            [*python.command, "-c", program, shown(url)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    for _ in range(starts):
        for one in started:
            assert one.stdout.readline() == "ready\n"
        for one in started:
            one.stdin.write("go\n")
            one.stdin.flush()
    outputs: list[list[str]] = [[] for _ in started]

    def read(one, lines):
        lines += one.communicate()[0].splitlines()

    readers = [threading.Thread(target=read, args=pair) for pair in zip(started, outputs, strict=True)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [one.returncode for one in started] == [0] * processes
    return outputs


def test_processes_that_drain_one_table_at_once_send_each_row_once(
    outbox: Outbox, url: str, warm_python: WarmPython
) -> None:
    ids = outbox.enqueue_many([rule_fired()] * 5_000)
    uploaded = run_at_once(warm_python, DRAIN, url, 4, starts=2)
    assert Counter(int(line) for lines in uploaded for line in lines) == Counter(ids)
    assert all(uploaded)
    assert Counter(statuses(outbox)) == {"sent": 5_000}


def test_two_flushers_at_once_share_what_is_due(watched: Outbox, outbox: Outbox) -> None:
    in_several_calls(watched)
    ids = outbox.enqueue_many([rule_fired()] * 150)
    other = ScriptedClient()
    reports = []

    def before(_connection, statement):
        if statement == "COMMIT" and not reports:
            reports.append(None)
            reports.append(outbox.flush(other))

    watched.store.now_ms()
    Watched.before = staticmethod(before)
    first = ScriptedClient()
    assert watched.flush(first).sent == reports[1].sent == 64
    assert (first.ids, other.ids) == ([ids[:64]], [ids[64:128]])


def test_no_claim_is_empty_while_a_row_is_due_that_nobody_holds(outbox: Outbox) -> None:
    outbox.enqueue_many([rule_fired()] * 1_500)
    now = outbox.store.now_ms()
    batch_size, flushers = 5, 12
    start = threading.Barrier(flushers)
    claimed: list[int] = []
    left_over: list[int] = []

    def work() -> None:
        start.wait()
        while rows := outbox.store.claims.claim(
            now_ms=now, lease_until_ms=now + 600_000, batch_size=batch_size
        ).rows:
            claimed.extend(row.id for row in rows)
        left_over.append(statuses(outbox).count("pending"))

    threads = [threading.Thread(target=work) for _ in range(flushers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(1, 1_501))
    # Claims that had not committed yet may have held that many.
    assert max(left_over) <= (flushers - 1) * batch_size


def test_a_claim_passes_any_number_of_rows_that_others_hold(outbox: Outbox) -> None:
    ids = outbox.enqueue_many([rule_fired()] * 100)
    now = outbox.store.now_ms()
    with outbox.engine.begin() as other:
        held = f"SELECT id FROM observation_events WHERE id <= {ids[-2]} ORDER BY id FOR UPDATE"
        assert len(other.exec_driver_sql(held).all()) == 99
        claimed = outbox.store.claims.claim(now_ms=now, lease_until_ms=now + 60_000, batch_size=3).rows
        assert [found.id for found in claimed] == ids[-1:]
        assert outbox.store.claims.claim(now_ms=now, lease_until_ms=now + 60_000, batch_size=3).rows == []


def test_a_claim_is_no_larger_than_a_batch_when_others_hold_a_part_of_the_oldest(outbox: Outbox) -> None:
    ids = outbox.enqueue_many([rule_fired()] * 20)
    now = outbox.store.now_ms()
    with outbox.engine.begin() as other:
        other.exec_driver_sql(f"SELECT id FROM observation_events WHERE id = {ids[1]} FOR UPDATE").all()
        claimed = outbox.store.claims.claim(now_ms=now, lease_until_ms=now + 60_000, batch_size=3).rows
    assert [found.id for found in claimed] == [ids[0], *ids[2:4]]


@pytest.mark.servers("mariadb")
@pytest.mark.parametrize("waiting", [0, 3, 300])
def test_a_claim_locks_only_the_rows_that_it_takes(watched: Outbox, server: Server, waiting: int) -> None:
    for _ in range(waiting):
        add_row(watched, next_attempt_at_ms=2**50)
    ids = watched.enqueue_many([rule_fired()] * 30)
    now = watched.store.now_ms()
    locked, changed = [], []

    def before(connection, statement):
        changed.extend([statement] * statement.startswith("UPDATE"))
        if statement == "COMMIT" and changed:
            transactions = "SELECT trx_rows_locked FROM information_schema.innodb_trx WHERE trx_mysql_thread_id ="
            # MariaDB fills this table at most every 0.1 s, so an earlier query would get the old rows.
            until(
                lambda: locked.extend(server.run(f"{transactions} {connection.thread_id()}")) or locked,
                pause_s=0.2,
            )

    Watched.before = staticmethod(before)
    claimed = watched.store.claims.claim(now_ms=now, lease_until_ms=now + 60_000, batch_size=10).rows
    assert [found.id for found in claimed] == ids[:10]
    assert locked == [(10,)]


@pytest.mark.parametrize("level", LEVELS)
def test_threads_on_a_hosts_engine_meet_no_conflict_at_any_isolation_level(
    outbox: Outbox, host, level: str
) -> None:
    outbox.enqueue_many([rule_fired()] * 500)
    clients = [ScriptedClient() for _ in range(4)]
    failures: list[BaseException] = []

    def work(client):
        try:
            hosted.flush_all(client)
            for _ in range(5):
                hosted.enqueue(rule_fired())
        except BaseException as error:
            failures.append(error)

    with Outbox(
        host(isolation_level=level), policy=Policy(max_rows=500, when_full="trim", batch_size=20)
    ) as hosted:
        threads = [threading.Thread(target=work, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        sent = Counter(row_id for client in clients for ids in client.ids for row_id in ids)
        assert set(sent.values()) == {1}
        assert hosted.stats().counts["sent"] + hosted.stats().counts["pending"] == 500
        assert hosted.stats().left_undelivered == 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.traced
def test_on_a_hosts_engine_many_events_are_written_all_or_none(outbox: Outbox, host, level: str) -> None:
    refuse(outbox, "DELETE", "observation_events", "no")
    engine = host(isolation_level=level)
    with Outbox(engine, policy=Policy(max_rows=1, when_full="trim")) as hosted:
        assert len(hosted.enqueue_many([rule_fired()] * 3)) == 3
    assert len(statuses(outbox)) == 3
    refuse_third(outbox)
    with Outbox(engine) as hosted, pytest.raises(StorageError, match="the third"):
        hosted.enqueue_many([rule_fired(), rule_fired(), rule_fired(session_id="third")])
    assert len(statuses(outbox)) == 3


def test_two_enqueues_far_over_the_cap_trim_what_one_would(watched: Outbox, outbox: Outbox, host) -> None:
    """In a host's session the queue is not capped, so the next two find the same rows too many."""
    with Session(host()) as session:
        outbox.enqueue_many([rule_fired()] * 200, session=session)
        session.commit()
    if outbox.engine.dialect.name != "postgresql":
        # Of a few rows, or if it believes so, MariaDB looks at each, and waits where one is locked.
        with outbox.engine.connect() as connection:
            connection.exec_driver_sql("ANALYZE TABLE observation_events").all()
    watched.policy = policy = Policy(max_rows=190, when_full="trim")
    others = [Outbox(outbox.engine, policy=policy)]

    def before(_connection, statement):
        if "outbox_alembic_version" in statement and others:  # it has counted, and does not trim yet
            others.pop().enqueue(rule_fired())

    Watched.before = staticmethod(before)
    watched.enqueue(rule_fired())
    assert others == []
    assert len(statuses(outbox)) == 190
    assert outbox.stats().left_undelivered == 12


@pytest.mark.parametrize(
    ("statement", "status", "operation"),
    [
        ("DELETE", "pending", lambda outbox: outbox.purge(event_type="rule_fired")),
        ("UPDATE", "abandoned", lambda outbox: outbox.requeue_abandoned(older_than=NOON)),
    ],
)
def test_rows_are_locked_before_an_operator_changes_them(
    watched: Outbox, outbox: Outbox, statement: str, status: str, operation
) -> None:
    add_row(watched, status=status, created_at_ms=0)
    unlocked = []

    def before(_connection, text):
        if text.startswith(f"{statement} ") and "observation_events" in text:
            with outbox.engine.connect() as other:
                found = other.exec_driver_sql("SELECT id FROM observation_events FOR UPDATE SKIP LOCKED")
                unlocked.append(found.all())

    Watched.before = staticmethod(before)
    assert operation(watched).total == 1
    assert unlocked == [[]]


def test_the_numbers_of_the_status_page_are_of_one_moment(watched: Outbox, outbox: Outbox) -> None:
    before = watched.stats()

    def enqueue_meanwhile(_connection, text):
        if "count(" in text:
            outbox.enqueue(rule_fired())

    Watched.before = staticmethod(enqueue_meanwhile)
    assert watched.stats().counts == before.counts
    Watched.before = staticmethod(lambda *_: None)
    assert watched.pending_count() > 0


OPEN = """
import sys
from dataclasses import replace
from datetime import datetime, timezone
from outbox import Outbox, RuleFired
print("ready", flush=True)
sys.stdin.readline()
with Outbox.open(sys.argv[1]) as outbox:
    print(outbox.enqueue(RuleFired(rule_ids=[], session_id="s", fired_at=datetime.now(timezone.utc))))
"""


def test_processes_that_open_one_empty_database_at_once_all_succeed(empty: URL, warm_python: WarmPython) -> None:
    opened = run_at_once(warm_python, OPEN, empty, 4)
    assert sorted(int(line) for lines in opened for line in lines) == [1, 2, 3, 4]


@pytest.mark.parametrize("level", ["SERIALIZABLE", "AUTOCOMMIT"])
def test_a_hosts_engines_that_upgrade_one_empty_database_at_once_all_succeed(empty: URL, level: str) -> None:
    engines = [create_engine(empty, isolation_level=level) for _ in range(4)]
    barrier = threading.Barrier(len(engines))
    before: list[str | None] = []

    def upgrade(engine):
        engine.connect().close()
        barrier.wait()
        before.append(schema.upgrade(engine))

    threads = [threading.Thread(target=upgrade, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(before) == 4
    with Outbox(engines[0]) as outbox:
        assert outbox.pending_count() == 0
    for engine in engines:
        engine.dispose()


@pytest.mark.servers("mariadb")  # PostgreSQL waits for ever
@pytest.mark.traced
def test_a_migration_that_waits_too_long_for_another_one_says_so(
    empty: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox.storage.dialects.mysql._MIGRATION_PATIENCE_S", 0)
    engine = open_engine(empty)
    with (
        schema.migrating(engine),
        pytest.raises(StorageError, match="another migration is still under way"),
    ):
        Outbox.open(empty)
    Outbox.open(empty).close()
    engine.dispose()


@pytest.mark.servers("mariadb")  # PostgreSQL keeps its lock until the commit
def test_a_migration_is_committed_before_another_one_is_let_in(empty: URL) -> None:
    engine, other = open_engine(empty), open_engine(empty)
    seen: list[str | None] = []

    @event.listens_for(engine, "before_cursor_execute")
    def _look(_connection, _cursor, statement, *_):
        if "RELEASE_LOCK" in statement:
            with other.connect() as connection:
                seen.append(schema.current_revision(connection))

    schema.upgrade(engine)
    assert seen == [schema.REVISIONS[-1]]
    engine.dispose()
    other.dispose()


# Conflicts and broken connections


OPERATIONS: dict[str, tuple[str, Callable[[Outbox], object]]] = {
    "enqueue": ("pending", lambda outbox: len(outbox.enqueue_many([rule_fired()] * 2))),
    "flush": ("pending", lambda outbox: outbox.flush(ScriptedClient())),
    "flush, server down": ("pending", lambda outbox: outbox.flush(ScriptedClient(DOWN))),
    "flush, token revoked": ("pending", lambda outbox: outbox.flush(ScriptedClient(REVOKED))),
    "retry": ("parked", lambda outbox: outbox.retry_now()),
    "requeue": ("abandoned", lambda outbox: outbox.requeue_abandoned(older_than=NOON).total),
}


def rehearse(watched: Outbox, operation: str, happen: Callable[..., object]) -> Iterator[tuple[str, bool]]:
    """Run an operation again and again, with trouble before its first call, its second, and so on.

    Give the statement that the trouble came before, and whether the operation did all or failed and did nothing.
    """
    status, run = OPERATIONS[operation]
    events = ObservationEvent.__table__
    expected = None
    at_call = 0
    while True:
        Watched.before = staticmethod(lambda *_: None)
        with watched.engine.begin() as connection:
            connection.execute(events.delete())
            connection.execute(destinations.delete())
        for _ in range(2):
            add_row(watched, status=status, created_at_ms=0)
        seen = once(happen, at_call)
        told = None
        result: object = None
        try:
            result = run(watched)
        except StorageError as error:
            told = str(error)
        Watched.before = staticmethod(lambda *_: None)
        after = Counter(statuses(watched))
        if at_call == 0:
            expected = (result, after)
        elif len(seen) < at_call:
            return
        elif told is None:
            assert (result, after) == expected, seen[at_call - 1]
        yield seen[at_call - 1] if at_call else "", told is None
        at_call += 1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_conflict_at_any_call_is_tried_again(watched: Outbox, operation: str) -> None:
    with freeze_time(NOON):
        results = list(rehearse(watched, operation, raises_conflict))
    assert len(results) >= 4
    assert [statement for statement, done in results if not done] == []


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_connection_that_is_killed_before_the_commit_costs_nothing(
    watched: Outbox, server: Server, url: str, operation: str
) -> None:
    with freeze_time(NOON):
        results = list(rehearse(watched, operation, lambda _: server.kill_connections(make_url(url))))
    assert len(results) >= 4
    assert {statement for statement, done in results if not done} <= {"COMMIT"}


@pytest.mark.traced
def test_a_server_that_never_stops_to_conflict_is_told_in_its_own_words(
    watched: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "waits_s", lambda _: iter([0] * 2))
    watched.enqueue(rule_fired())
    tries = []

    def before(connection, statement):
        if "observation_events" in statement:
            tries.append(statement)
            raise conflict(connection)

    Watched.before = staticmethod(before)
    with pytest.raises(StorageError, match="could not serialize|Deadlock found"):
        watched.retry_now()
    assert len(tries) == 3
    Watched.before = staticmethod(lambda *_: None)
    assert watched.flush(ScriptedClient()).sent == 1


@contextmanager
def losing_commits(server: Server, url: str, *, done: bool) -> Iterator[list[object]]:
    """Let the connection break at the next commit, before the server reads it or before the answer comes."""
    lost: list[object] = []

    def lose(connection, statement="COMMIT"):
        if statement == "COMMIT" and not lost:
            lost.append(connection)
            server.kill_connections(make_url(url))
            if done:
                connection.cursor().execute("SELECT 1")  # fails as the answer would have

    if done:
        Watched.after_commit = staticmethod(lose)
    else:
        Watched.before = staticmethod(lose)
    yield lost
    assert lost


@pytest.mark.parametrize("done", [True, False])
def test_a_commit_that_breaks_is_not_repeated_for_an_insert(
    watched: Outbox, outbox: Outbox, server: Server, url: str, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    monkeypatch.setattr(pings, "_TRUSTED_S", -1)  # the look at the end finds connections that broke just now
    watched.store.now_ms()
    with (
        losing_commits(server, url, done=done),
        pytest.raises(StorageError, match="broke during the commit, it is not known whether that was done"),
    ):
        watched.enqueue_many([rule_fired()] * 2)
    assert statuses(outbox) == ["pending", "pending"] * done


@pytest.mark.parametrize("done", [True, False])
def test_a_commit_that_breaks_is_repeated_for_a_settlement(
    watched: Outbox, server: Server, url: str, done: bool
) -> None:
    in_several_calls(watched)
    watched.enqueue_many([rule_fired()] * 2)

    def lose_the_next(_batch):
        breaking.append(losing_commits(server, url, done=done))
        breaking[0].__enter__()

    breaking: list = []
    report = watched.flush(ScriptedClient(lose_the_next))
    breaking[0].__exit__(None, None, None)
    assert report.sent == 2
    assert statuses(watched) == ["sent", "sent"]


@pytest.mark.servers("mariadb")
@pytest.mark.traced
def test_a_commit_is_unknown_if_its_server_left_the_cluster_meanwhile(watched: Outbox, outbox: Outbox) -> None:
    def leave(_connection) -> None:
        raise pymysql.OperationalError(1180, "Not connected to Primary Component")

    watched.store.now_ms()
    Watched.after_commit = staticmethod(leave)
    with pytest.raises(OutcomeUnknown, match="Not connected to Primary Component"):
        watched.enqueue(rule_fired())
    assert statuses(outbox) == ["pending"]


def test_a_delivery_of_any_number_of_rows_is_recorded_whole_or_not_at_all(outbox: Outbox) -> None:
    outbox.policy = Policy(batch_size=100)
    last = outbox.enqueue_many([rule_fired()] * 100)[-1]
    condition, words = f"NEW.status = 'sent' AND NEW.id = {last}", "the last one is refused"
    statements = {
        "postgresql": [
            "CREATE OR REPLACE FUNCTION refuse_last() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN IF {condition} THEN RAISE EXCEPTION '{words}'; END IF; RETURN NEW; END $$",
            "CREATE TRIGGER refuse_last BEFORE UPDATE ON observation_events"
            " FOR EACH ROW EXECUTE FUNCTION refuse_last()",
        ],
        "mysql": [
            "CREATE TRIGGER refuse_last BEFORE UPDATE ON observation_events FOR EACH ROW"
            f" IF {condition} THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = '{words}'; END IF"
        ],
    }
    with outbox.engine.begin() as connection:
        for statement in statements[outbox.engine.dialect.name.replace("mariadb", "mysql")]:
            connection.exec_driver_sql(statement)
    with pytest.raises(StorageError, match=words):
        outbox.flush(ScriptedClient())
    assert statuses(outbox) == ["sending"] * 100


@pytest.mark.servers("mariadb")  # on PostgreSQL a claim is one statement, as below
@pytest.mark.parametrize("done", [True, False])
def test_a_claim_whose_commit_breaks_is_repeated_and_costs_at_most_the_time_of_a_lease(
    watched: Outbox, server: Server, url: str, done: bool
) -> None:
    with freeze_time(NOON) as clock:
        watched.policy = replace(watched.policy, batch_size=2)  # the first transaction claims a full batch
        watched.enqueue_many([rule_fired()] * 2)
        watched.store.now_ms()
        client = ScriptedClient()
        with losing_commits(server, url, done=done):
            assert watched.flush(client).sent == (0 if done else 2)
        clock.tick(60)
        assert watched.flush(client).sent == (2 if done else 0)


@pytest.mark.servers("postgresql")
@pytest.mark.traced
def test_a_claim_whose_answer_is_lost_is_repeated_and_costs_the_time_of_a_lease(
    watched: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute, lost = PsycopgCursor.execute, []

    def lose(cursor, query, *arguments, **options):
        result = execute(cursor, query, *arguments, **options)
        if "MATERIALIZED" in query and not lost:
            lost.append(query)
            cursor.connection.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        return result

    monkeypatch.setattr(PsycopgCursor, "execute", lose)
    with freeze_time(NOON) as clock:
        watched.enqueue_many([rule_fired()] * 70)
        assert watched.flush_all(ScriptedClient()).sent == 6
        assert lost
        clock.tick(60)
        assert watched.flush(ScriptedClient()).sent == 64


def test_a_connection_that_the_server_ended_costs_no_enqueue(
    outbox: Outbox, server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pings, "_TRUSTED_S", inf)
    outbox.enqueue(rule_fired())
    assert server.kill_connections(make_url(url)) >= 1
    outbox.enqueue(rule_fired())
    assert statuses(outbox) == ["pending", "pending"]


@pytest.mark.parametrize("settings", [{}, {"pool_pre_ping": True}])
def test_idle_connections_of_a_hosts_that_were_killed_cost_no_event(
    outbox: Outbox, server: Server, url: str, host, settings: dict
) -> None:
    engine = host(pool_size=8, **settings)
    with Outbox(engine) as hosted:
        idle = [engine.connect() for _ in range(8)]
        for connection in idle:
            connection.close()
        assert server.kill_connections(make_url(url)) >= 8
        row_id = hosted.enqueue(rule_fired())
        assert hosted.flush(ScriptedClient()).sent == 1
        assert row(hosted, row_id).status == "sent"


def test_connections_that_are_killed_during_an_upload_cost_no_delivery(
    outbox: Outbox, server: Server, url: str
) -> None:
    outbox.enqueue_many([rule_fired()] * 3)
    report = outbox.flush(ScriptedClient(lambda _: server.kill_connections(make_url(url)) and None))
    assert report.sent == 3
    assert statuses(outbox) == ["sent"] * 3


def test_a_test_can_begin_right_after_one_that_killed_all_connections(servers: Servers, database: str) -> None:
    url = servers.empty_outbox(database)
    servers.get(database).kill_connections(url)
    assert servers.empty_outbox(database) == url


# A server that is not there


@pytest.mark.parametrize("opener", [Outbox, Outbox.open])
def test_a_server_that_is_down_is_told_without_the_password(server: Server, opener) -> None:
    down = server.url.set(
        port=1, host="127.0.0.1", username="app", password=f"{SECRET} p@ss/%41", database="events"
    )
    with pytest.raises(StorageError, match=r"app:\*\*\*@127\.0\.0\.1:1/events: .*127\.0\.0\.1") as caught:
        opener(down)
    assert_no_secret(caught.value)


def test_a_server_that_does_not_know_the_database_says_so_without_the_password(server: Server) -> None:
    unknown = server.url.set(password=f"{SECRET} p@ss/%41", database="outbox_no_such_database")
    with pytest.raises(StorageError, match="outbox_no_such_database|Access denied") as caught:
        Outbox.open(unknown)
    assert_no_secret(caught.value)


def test_an_error_of_a_statement_names_no_password(server: Server, url: str, outbox: Outbox) -> None:
    with outbox.engine.begin() as connection:
        connection.execute(text("DROP TABLE observation_events"))
    with pytest.raises(StorageError, match="observation_events") as caught:
        outbox.enqueue(rule_fired(session_id=SECRET))
    assert_no_secret(caught.value)


def assert_no_secret(error: BaseException) -> None:
    assert SECRET not in "".join(traceback.format_exception(error)) + repr(error)


@pytest.fixture
def private(servers: Servers) -> Iterator[PrivatePostgresql]:
    """A PostgreSQL that may be stopped."""
    with servers.private_postgresql() as started:
        yield started


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "waits_s", lambda _: iter([0] * 5))


@pytest.mark.slow
def test_a_server_that_goes_away_and_comes_back_is_used_without_a_restart(
    private: PrivatePostgresql, impatient, caplog: pytest.LogCaptureFixture
) -> None:
    with Outbox.open(private.url) as outbox, freeze_time(NOON) as clock:
        outbox.enqueue(rule_fired())
        private.stop()
        for operation in (lambda: outbox.enqueue(rule_fired()), outbox.stats, outbox.retry_now):
            with pytest.raises(StorageError, match="127.0.0.1"):
                operation()
        private.start()
        outbox.enqueue(rule_fired())

        # It goes away during an upload, and nobody knows any more what became of that.
        with caplog.at_level(logging.WARNING, "outbox"), pytest.raises(StorageError, match="127.0.0.1"):
            outbox.flush(ScriptedClient(lambda _: private.stop()))
        assert "releasing 2 events failed, their lease will run out" in caplog.text
        private.start()
        assert statuses(outbox) == ["sending"] * 2
        assert outbox.flush(ScriptedClient()).claimed == 0
        clock.tick(60)
        assert outbox.flush(ScriptedClient()).sent == 2


@pytest.mark.slow
def test_a_server_that_restarts_during_an_upload_costs_no_delivery(private: PrivatePostgresql) -> None:
    def restart(_batch):
        private.stop()
        private.start()

    with Outbox.open(private.url) as outbox:
        outbox.enqueue(rule_fired())
        assert outbox.flush(ScriptedClient(restart)).sent == 1
        assert statuses(outbox) == ["sent"]


@pytest.mark.slow
@pytest.mark.traced
def test_a_server_that_restarts_between_the_tries_is_waited_for(
    private: PrivatePostgresql, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            private.start()

    monkeypatch.setattr(transactions.time, "sleep", sleep)
    with Outbox(create_engine(upgraded(private.url))) as outbox:  # without a ping before each use
        outbox.enqueue(rule_fired())
        outbox.store.now_ms()
        private.stop()
        assert outbox.enqueue(rule_fired()) > 1
        outbox.engine.dispose()
    assert len(pauses) == 3


def upgraded(url: str) -> str:
    Outbox.open(url).close()
    return url


# Texts and types


def test_texts_of_any_length_and_script_come_back_as_they_were(outbox: Outbox) -> None:
    long = "ü€😀" * 20_000
    row_id = outbox.enqueue(rule_fired(session_id=long, file_path="Straße 😀"))
    found = row(outbox, row_id)
    assert (found.session_id, found.file_path) == (long, "Straße 😀")
    client = ScriptedClient()
    outbox.flush(client)
    assert client.batches[0][0].event.session_id == long


def test_a_payload_of_the_largest_size_is_kept_and_sent(outbox: Outbox) -> None:
    row_id = outbox.enqueue(rule_fired(rule_ids=["x" * (256 * 1024 - 200)]))
    found = row(outbox, row_id)
    assert 256 * 1024 - 200 < len(found.payload_json) <= 256 * 1024
    assert len(found.rule_ids_json) == 256 * 1024 - 200 + 4
    assert outbox.flush(ScriptedClient()).sent == 1


def test_a_nul_character_is_no_error(outbox: Outbox, database: str, host) -> None:
    kept = "a\ufffdb" if database == "postgresql" else "a\0b"
    ids = [outbox.enqueue(rule_fired(session_id="a\0b", rule_ids=["a\0b"]))]
    with Session(host()) as session:
        ids.append(outbox.enqueue(rule_fired(session_id="a\0b", rule_ids=["a\0b"]), session=session))
        session.commit()
    assert [row(outbox, row_id).session_id for row_id in ids] == [kept, kept]
    client = ScriptedClient()
    outbox.flush(client)
    assert [item.event.rule_ids for item in client.batches[0]] == [["a\0b"]] * 2


def test_event_types_that_differ_by_case_or_accent_are_different(outbox: Outbox) -> None:
    for event_type in ("order", "Order", "örder", "order"):
        add_row(outbox, event_type=event_type, status="sent", sent_at_ms=1)
    assert len(outbox.find(event_type="order")) == 2
    outbox.store.deletion.expire(sent_before_ms=2)
    assert {entry.event_type: entry.events for entry in outbox.stats().deleted} == {
        "order": 2,
        "Order": 1,
        "örder": 1,
    }


def test_columns_that_are_left_out_get_their_defaults(outbox: Outbox) -> None:
    with outbox.engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO observation_events (event_type, occurred_at_ms, payload_json, created_at_ms)"
                " VALUES ('rule_fired', 1, '{}', 1)"
            )
        )
    (found,) = outbox.find()
    assert (found.rule_ids_json, found.session_id, found.status) == ("[]", "", "pending")
    assert (found.retry_count, found.next_attempt_at_ms) == (0, 0)


# URLs


PLAIN = {"postgresql": ["postgresql"], "mariadb": ["mysql", "mariadb"]}


def test_a_url_needs_no_driver(outbox: Outbox, database: str) -> None:
    for name in PLAIN[database]:
        with Outbox.open(shown(outbox.engine.url.set(drivername=name))) as opened:
            opened.enqueue(rule_fired())
    assert outbox.flush(ScriptedClient()).sent == len(PLAIN[database])


@pytest.mark.servers("postgresql")
def test_a_schema_of_its_own_can_be_named_in_the_url(empty: URL) -> None:
    engine = create_engine(empty)
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA events"))
        connection.execute(text("CREATE TABLE observation_events (id integer)"))
    with Outbox.open(f"{shown(empty)}?options=-csearch_path%3Devents") as outbox:
        outbox.enqueue(rule_fired())
        assert outbox.flush(ScriptedClient()).sent == 1
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM observation_events")).scalar() == 0
        assert connection.execute(text("SELECT count(*) FROM events.observation_events")).scalar() == 1
    engine.dispose()


# Migrations


def test_migrations_and_models_agree_and_a_downgrade_keeps_every_event(empty: URL) -> None:
    from alembic import command  # noqa: PLC0415 - as the outbox does

    config = schema.alembic_config()
    config.set_main_option("sqlalchemy.url", shown(empty).replace("%", "%%"))
    with Outbox.open(empty) as outbox:
        ids = outbox.enqueue_many([rule_fired()] * 3)
    command.check(config)
    command.downgrade(config, "base")
    command.upgrade(config, "head")
    command.check(config)
    with Outbox(empty) as outbox:
        assert [found.id for found in outbox.find()] == ids


def test_an_upgrade_that_failed_half_way_can_be_repeated(empty: URL) -> None:
    engine = open_engine(empty)
    Outbox.open(engine).close()
    with engine.begin() as connection:
        connection.execute(text("UPDATE outbox_alembic_version SET version_num = 'outbox_0001'"))
    with Outbox.open(engine) as outbox:
        assert outbox.enqueue(rule_fired()) == 1
    engine.dispose()


@pytest.mark.traced
def test_the_models_alone_create_the_table_that_the_migrations_do(empty: URL) -> None:
    from alembic import command  # noqa: PLC0415 - as the outbox does

    Outbox.open(empty).close()
    engine = create_engine(empty)
    with engine.begin() as connection:
        ObservationEvent.metadata.drop_all(connection)
        ObservationEvent.metadata.create_all(connection)
    engine.dispose()
    config = schema.alembic_config()
    config.set_main_option("sqlalchemy.url", shown(empty).replace("%", "%%"))
    command.check(config)
    with Outbox(empty) as outbox:
        assert outbox.enqueue(rule_fired()) == 1


# Row-level security


@pytest.fixture
def restricted(outbox: Outbox, server: Server) -> Iterator[str]:
    """A database user whom row-level security applies to; no policy exists yet."""
    name = f"outbox_restricted_{os.getpid()}_{uuid4().hex[:6]}"
    server.run(f"CREATE ROLE {name} LOGIN")
    run(outbox, f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {name}")
    run(outbox, f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {name}")
    run(outbox, "ALTER TABLE observation_events ENABLE ROW LEVEL SECURITY")
    yield name
    run(outbox, "DROP POLICY IF EXISTS visible ON observation_events")
    run(outbox, "ALTER TABLE observation_events DISABLE ROW LEVEL SECURITY")
    run(outbox, f"DROP OWNED BY {name}")
    server.run(f"DROP ROLE {name}")


def run(outbox: Outbox, statement: str) -> None:
    with outbox.engine.begin() as connection:
        connection.exec_driver_sql(statement)


@pytest.mark.servers("postgresql")
@pytest.mark.parametrize(
    ("policy", "missing"),
    [
        (None, "SELECT, UPDATE, DELETE"),
        ("FOR SELECT USING (true)", "UPDATE, DELETE"),
        ("FOR ALL TO postgres USING (true)", "SELECT, UPDATE, DELETE"),
        ("FOR ALL TO {user} USING (true)", None),
        ("FOR ALL USING (true)", None),
    ],
)
@pytest.mark.traced
def test_row_level_security_without_a_policy_is_named_as_the_cause(
    outbox: Outbox, url: str, restricted: str, policy: str | None, missing: str | None
) -> None:
    outbox.enqueue(rule_fired())
    if policy is not None:
        run(outbox, f"CREATE POLICY visible ON observation_events {policy.format(user=restricted)}")
    assert outbox.stats().likely_cause is None  # the owner sees every row
    with Outbox(shown(make_url(url).set(username=restricted))) as limited:
        cause = limited.stats().likely_cause
        assert limited.flush(ScriptedClient()).sent == (missing is None)
    if missing is None:
        assert cause is None
    else:
        assert cause.startswith("row-level security hides events from this database user: ")
        assert f"has no policy for {missing};" in cause
