"""Processes and time as real programs have them: forks, workers, sudden ends, clocks that jump, other releases."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from contextlib import closing, contextmanager
from datetime import timedelta
from itertools import chain
from pathlib import Path

import pytest

from builders import DOWN, NOON, NOON_MS, OK, REJECTED, ROOT, ScriptedClient, row, rule_fired, statuses
from children import Child, beside_threads, can_fork
from conditions import FOREVER_S, until
from outbox import Outbox, Policy, SchemaError, events, registry, schema
from outbox.testing.answers import Answer, Hang

TOKEN = "token-of-tests"
HOUR_MS = 3_600_000


def python(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)


# --- forks ---


@can_fork
def test_what_a_child_enqueues_stays_when_its_parent_closes_the_file(outbox: Outbox, url: str) -> None:
    outbox.enqueue(rule_fired())
    child = Child(*[lambda: outbox.enqueue(rule_fired())] * 2)
    child.act()
    outbox.close()
    child.act()
    with Outbox(url) as another:
        assert statuses(another) == ["pending"] * 3
    child.end()


@can_fork
def test_what_a_daemon_enqueues_stays_when_the_program_that_started_it_ended(outbox: Outbox, url: str) -> None:
    def daemonize() -> None:
        with Outbox(url) as own:
            own.enqueue(rule_fired())
            daemon = Child(*[lambda: own.enqueue(rule_fired())] * 2)
            daemon.act()
        with Outbox(url) as another:
            another.enqueue(rule_fired())
        daemon.act()
        daemon.end()

    outbox.close()
    program = Child(daemonize)
    program.act()
    program.end()
    assert statuses(outbox) == ["pending"] * 4


@can_fork
def test_a_database_in_memory_is_copied_by_a_fork() -> None:
    with Outbox.open("sqlite://") as outbox:
        outbox.enqueue(rule_fired())

        def go_on() -> None:
            assert outbox.enqueue(rule_fired()) == 2
            assert outbox.flush(ScriptedClient()).sent == 2

        child = Child(go_on)
        child.act()
        child.end()
        assert statuses(outbox) == ["pending"]


@can_fork
@beside_threads
def test_a_child_forked_beside_an_upgrade_can_upgrade_too(tmp_path: Path, monkeypatch) -> None:
    is_done, was_forked = threading.Event(), threading.Event()
    migrating = schema.migrating

    @contextmanager
    def linger(engine):
        with migrating(engine) as connection:
            yield connection
        is_done.set()
        was_forked.wait()

    monkeypatch.setattr(schema, "migrating", linger)
    thread = threading.Thread(target=lambda: Outbox.open(f"sqlite:///{tmp_path / 'one.db'}").close())
    thread.start()
    is_done.wait()
    monkeypatch.undo()
    child = Child(lambda: Outbox.open(f"sqlite:///{tmp_path / 'two.db'}").enqueue(rule_fired()))
    was_forked.set()
    child.act()
    child.end()
    thread.join()


@can_fork
@beside_threads
def test_a_child_forked_while_a_thread_decodes_for_the_first_time_can_decode_too(monkeypatch) -> None:
    is_inside, was_forked = threading.Event(), threading.Event()

    def linger(_types):
        is_inside.set()
        was_forked.wait()

    monkeypatch.setattr(events._registry, "_decoder", None)
    monkeypatch.setattr(registry, "_union_decoder", linger)
    thread = threading.Thread(target=events.check_types)
    thread.start()
    is_inside.wait()
    child = Child(monkeypatch.undo, events.check_types)
    was_forked.set()
    thread.join()
    child.act()
    child.act()
    child.end()


@can_fork
@beside_threads
def test_parent_and_child_share_no_connection_to_the_server(outbox: Outbox, server, client) -> None:
    outbox.enqueue(rule_fired(session_id="before"))
    outbox.flush(client)

    def enqueue_and_flush() -> None:
        outbox.enqueue(rule_fired(session_id="child"))
        assert outbox.flush(client).sent == 1

    child = Child(enqueue_and_flush)
    child.act()
    outbox.enqueue(rule_fired(session_id="parent"))
    assert outbox.flush(client).sent == 1
    child.end()
    assert len(server.stored) == 3


@can_fork
@beside_threads
def test_a_child_forked_during_an_upload_flushes_what_is_left(outbox: Outbox, server, client) -> None:
    outbox.enqueue(rule_fired())
    server.script(Hang())
    reports = []
    thread = threading.Thread(target=lambda: reports.append(outbox.flush(client)))
    thread.start()
    until(lambda: server.requests)

    def enqueue_and_flush() -> None:
        outbox.enqueue(rule_fired(session_id="child"))
        report = outbox.flush(client)
        assert (report.claimed, report.sent) == (1, 1)

    child = Child(enqueue_and_flush)
    child.act()
    child.end()
    assert statuses(outbox) == ["sending", "sent"]
    server.stop()
    thread.join()
    assert reports[0].rescheduled == 1


@can_fork
@beside_threads
def test_forks_beside_threads_that_enqueue_and_flush_lose_nothing(outbox: Outbox, server, client) -> None:
    is_over = threading.Event()
    enqueued = Counter()

    def enqueue() -> None:
        while not is_over.is_set() and enqueued["thread"] < 5_000:  # above the cap, delivered events are deleted
            outbox.enqueue(rule_fired(session_id=f"thread {enqueued['thread']}"))
            enqueued["thread"] += 1

    def flush() -> None:
        while not is_over.is_set():
            outbox.flush(client)

    def enqueue_and_flush() -> None:
        for number in range(5):
            outbox.enqueue(rule_fired(session_id=f"{os.getpid()} {number}"))
        outbox.flush_all(client)

    threads = [threading.Thread(target=work) for work in (enqueue, flush, flush)]
    for thread in threads:
        thread.start()
    try:
        children = [Child(enqueue_and_flush) for _ in range(8)]
        for child in children:
            child.act()
            child.end()
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    outbox.flush_all(client)
    count = enqueued["thread"] + 5 * len(children)
    assert statuses(outbox) == ["sent"] * count
    assert len(server.stored) == count
    assert server.duplicates == 0


FORKS_DURING_THE_FIRST_FLUSH = """
import os, signal, sys, threading, time
from outbox import Outbox
from outbox.storage import forks

class Client:
    logged_in = True
    def upload(self, batch):
        pass

class Slow:
    def find_spec(self, name, *_):
        if name == "outbox.flusher":
            has_begun.set()
            end = time.monotonic() + 60
            while not forks._forking and time.monotonic() < end:
                time.sleep(0.001)

has_begun = threading.Event()
sys.meta_path.insert(0, Slow())
outbox = Outbox(sys.argv[1])
thread = threading.Thread(target=outbox.flush, args=(Client(),))
thread.start()
has_begun.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(120)
    outbox.flush(Client())
    os._exit(0)
thread.join()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@can_fork
def test_a_child_that_was_forked_during_the_first_flush_can_flush(outbox: Outbox, url: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKS_DURING_THE_FIRST_FLUSH, url]
    assert subprocess.run(command, timeout=4 * FOREVER_S, check=False).returncode == 0


# --- workers and sudden ends ---


def enqueue_in_a_worker(url: str, name: str) -> list[int]:
    with Outbox(url) as outbox:
        return [outbox.enqueue(rule_fired(session_id=f"{name} {number}")) for number in range(20)]


def test_spawned_workers_enqueue_to_one_file(outbox: Outbox, url: str) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        ids = pool.starmap(enqueue_in_a_worker, [(url, "a"), (url, "b"), (url, "c")])
        pool.close()
        pool.join()
    assert sorted(chain.from_iterable(ids)) == list(range(1, 61))
    assert outbox.flush(ScriptedClient()).sent == 60


def test_more_threads_than_pooled_connections_enqueue_at_once(outbox: Outbox) -> None:
    everyone = threading.Barrier(40)

    def enqueue() -> None:
        everyone.wait()
        outbox.enqueue(rule_fired())

    threads = [threading.Thread(target=enqueue) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses(outbox) == ["pending"] * 40


SUDDEN_END = """
import os, sys
from datetime import datetime, timezone
from outbox import Outbox, RuleFired
outbox = Outbox(sys.argv[1])
outbox.enqueue(RuleFired(rule_ids=[], session_id="last words", fired_at=datetime.now(timezone.utc)))
os._exit(7)
"""


def test_an_event_is_there_though_its_program_ends_at_once(outbox: Outbox, url: str) -> None:
    program = python(SUDDEN_END, url)
    program.communicate()
    assert program.returncode == 7
    assert row(outbox, 1).session_id == "last words"


FLUSH_AT_EXIT = """
import atexit, sys
from outbox import HttpClient, Outbox
url, server = sys.argv[1:]
outbox = Outbox(url)
client = HttpClient(server, token="token-of-tests")
atexit.register(lambda: print(outbox.flush_all(client).sent))
"""


def test_a_program_can_flush_at_its_exit(outbox: Outbox, url: str, server) -> None:
    outbox.enqueue_many([rule_fired()] * 3)
    assert python(FLUSH_AT_EXIT, url, server.url).communicate()[0] == "3\n"
    assert statuses(outbox) == ["sent"] * 3


# --- clocks that jump ---


def suspended_during_upload(noon, answer: object = OK) -> ScriptedClient:
    def upload(_batch):
        noon.travel(hours=5)
        return answer

    return ScriptedClient(upload)


def test_an_upload_that_outlives_a_suspension_counts(outbox: Outbox, noon) -> None:
    outbox.enqueue_many([rule_fired()] * 3)
    report = outbox.flush(suspended_during_upload(noon))
    assert (report.sent, report.lost_leases) == (3, 0)
    assert row(outbox, 1).sent_at_ms == NOON_MS + 5 * HOUR_MS


def test_an_upload_that_a_suspension_broke_is_tried_again_after_the_usual_delay(outbox: Outbox, noon) -> None:
    outbox.enqueue(rule_fired())
    report = outbox.flush(suspended_during_upload(noon, DOWN))
    assert (report.rescheduled, report.lost_leases) == (1, 0)
    waits_ms = row(outbox, 1).next_attempt_at_ms - (NOON_MS + 5 * HOUR_MS)
    assert 120_000 <= waits_ms < 150_000


def test_a_suspended_flusher_drops_what_another_one_has_taken_over(outbox: Outbox, noon) -> None:
    outbox.enqueue(rule_fired())

    def upload(_batch):
        noon.travel(hours=5)
        assert outbox.flush(ScriptedClient(REJECTED)).rescheduled == 1
        return DOWN

    assert outbox.flush(ScriptedClient(upload)).lost_leases == 1
    assert row(outbox, 1).waits_for == "proof"


def test_a_suspension_in_the_middle_of_an_isolation_renews_the_lease(outbox: Outbox, noon) -> None:
    outbox.enqueue_many([rule_fired()] * 3)
    client = suspended_during_upload(noon, REJECTED)
    client.answers += [REJECTED, OK, OK]
    report = outbox.flush(client)
    assert (report.sent, report.rescheduled, report.lost_leases) == (2, 1, 0)


def set_back(noon, hours: int) -> None:
    noon.move_to(NOON - timedelta(hours=hours))


@pytest.mark.parametrize("answer", [OK, DOWN, REJECTED])
def test_an_upload_during_which_the_clock_is_set_back_ends_as_usual(outbox: Outbox, noon, answer) -> None:
    outbox.enqueue(rule_fired())

    def upload(_batch):
        set_back(noon, 1)
        return answer

    report = outbox.flush(ScriptedClient(upload, answer))
    assert report.lost_leases == 0
    found = row(outbox, 1)
    assert found.status == {OK: "sent", DOWN: "pending", REJECTED: "pending"}[answer]
    if answer is DOWN:
        assert found.next_attempt_at_ms < NOON_MS - HOUR_MS + 150_000


def test_after_the_clock_was_set_back_new_events_go_at_once_and_old_ones_when_it_has_caught_up(
    outbox: Outbox, noon
) -> None:
    outbox.enqueue_many([rule_fired()] * 2)
    set_back(noon, 1)
    outbox.enqueue(rule_fired())
    assert outbox.flush(ScriptedClient()).sent == 1
    assert statuses(outbox) == ["pending", "pending", "sent"]
    noon.move_to(NOON - timedelta(milliseconds=1))
    assert outbox.flush(ScriptedClient()).claimed == 0
    noon.move_to(NOON)
    assert outbox.flush(ScriptedClient()).sent == 2


def test_an_operator_need_not_wait_until_a_clock_that_was_set_back_has_caught_up(outbox: Outbox, noon) -> None:
    outbox.enqueue_many([rule_fired()] * 2)
    set_back(noon, 1)
    assert outbox.retry_now() == 2
    assert outbox.flush(ScriptedClient()).sent == 2


def test_a_dead_flushers_rows_wait_for_its_lease_and_for_the_clock_to_catch_up_and_no_longer(
    outbox: Outbox, noon
) -> None:
    outbox.enqueue(rule_fired())
    outbox.store.claims.claim(now_ms=NOON_MS, lease_until_ms=NOON_MS + 60_000, batch_size=64)
    set_back(noon, 1)
    noon.travel(hours=1, seconds=59)
    assert outbox.flush(ScriptedClient()).claimed == 0
    noon.travel(seconds=1)
    assert outbox.flush(ScriptedClient()).sent == 1


def test_a_clock_set_back_ages_nothing(outbox: Outbox, noon) -> None:
    outbox.enqueue(rule_fired())
    noon.move_to(NOON - timedelta(days=30))
    outbox.retry_now()
    assert outbox.flush(ScriptedClient(DOWN)).rescheduled == 1


def test_events_that_a_clock_far_ahead_gave_up_come_back_with_a_full_new_chance(outbox: Outbox, noon) -> None:
    outbox.enqueue(rule_fired())
    noon.move_to(NOON + timedelta(days=4_000))
    assert outbox.flush(ScriptedClient(DOWN)).abandoned == 1
    noon.move_to(NOON)
    assert outbox.requeue_abandoned(older_than=NOON_MS + 1).total == 1
    assert outbox.flush(ScriptedClient(DOWN)).rescheduled == 1  # the pause of the wrong clock is over


@pytest.mark.parametrize("failures", [1, 3])
def test_a_pause_that_a_clock_far_ahead_began_holds_nothing_up(outbox: Outbox, noon, failures: int) -> None:
    for number in range(failures):
        noon.move_to(NOON + timedelta(days=4_000, hours=number))
        outbox.enqueue(rule_fired())
        outbox.flush(ScriptedClient(DOWN))
    noon.move_to(NOON)
    row_id = outbox.enqueue(rule_fired())
    outbox.flush(ScriptedClient())
    assert row(outbox, row_id).status == "sent"


def test_status_shows_no_pause_that_a_clock_far_ahead_began(outbox: Outbox, noon) -> None:
    outbox.enqueue(rule_fired())
    outbox.flush(ScriptedClient(DOWN))
    assert len(outbox.stats().pauses) == 1
    noon.move_to(NOON - timedelta(days=1))
    assert outbox.stats().pauses == []


# --- other releases on the same file ---

OLDER_PROGRAM = r"""
import http.client, json, sqlite3, sys, time
path, port, name = sys.argv[1:]
database = sqlite3.connect(path, isolation_level=None, timeout=30)
server = http.client.HTTPConnection("127.0.0.1", int(port))
now_ms = lambda: int(time.time() * 1_000)
for number in range(150):
    text = json.dumps({
        "event_type": "rule_fired", "rule_ids": ["r"], "session_id": f"{name} {number}",
        "fired_at": "2026-11-24T12:00:00.123456789Z",
    })
    now = now_ms()
    database.execute(
        "INSERT INTO observation_events (event_type, rule_id, rule_ids_json, session_id, file_path, occurred_at_ms,"
        " payload_json, status, next_attempt_at_ms, created_at_ms)"
        " VALUES ('rule_fired', NULL, '["r"]', ?, NULL, ?, ?, 'pending', ?, ?)",
        (f"{name} {number}", now, text, now, now),
    )
    if number % 10 == 9:
        lease = now_ms() + 60_000
        rows = database.execute(
            "UPDATE observation_events SET status = 'sending', next_attempt_at_ms = ? WHERE id IN ("
            " SELECT id FROM observation_events WHERE status IN ('pending', 'sending') AND next_attempt_at_ms <= ?"
            " ORDER BY created_at_ms, id LIMIT 64) RETURNING id, payload_json, retry_count",
            (lease, lease - 60_000),
        ).fetchall()
        if not rows:
            continue
        body = "[" + ",".join(row[1] for row in rows) + "]"
        server.request("POST", "/cloud/observations", body, {"Authorization": "Bearer token-of-tests"})
        answer = server.getresponse()
        answer.read()
        for row_id, _, retry_count in rows:
            if answer.status == 200:
                database.execute(
                    "UPDATE observation_events SET status = 'sent', sent_at_ms = ? WHERE id = ?", (now_ms(), row_id)
                )
            else:
                database.execute(
                    "UPDATE observation_events SET status = 'pending', retry_count = ?, next_attempt_at_ms = ?,"
                    " last_error = ? WHERE id = ? AND status = 'sending' AND next_attempt_at_ms = ?",
                    (retry_count + 1, now_ms() + 120_000, f"{answer.status} {answer.reason}", row_id, lease),
                )
        database.execute(
            "UPDATE observation_events SET status = 'pending', retry_count = 0, last_error = NULL,"
            " next_attempt_at_ms = ? + (id % 5000) WHERE id IN (SELECT id FROM observation_events"
            " WHERE status = 'parked' ORDER BY created_at_ms, id LIMIT 256)", (now_ms(),),
        )
        database.execute(
            "DELETE FROM observation_events WHERE id IN (SELECT id FROM observation_events"
            " ORDER BY CASE status WHEN 'sent' THEN 0 WHEN 'abandoned' THEN 1 ELSE 2 END, created_at_ms, id"
            " LIMIT max(0, (SELECT count(*) FROM observation_events) - 10000))"
        )
"""


def test_an_older_program_and_this_one_work_on_one_file(outbox: Outbox, url: str, server, client) -> None:
    path = url.removeprefix("sqlite:///")
    server.script(Answer(), Answer(503), Answer(), Answer(503))
    older = [python(OLDER_PROGRAM, path, server.url.rpartition(":")[2], name) for name in ("old a", "old b")]
    number = 0
    while any(program.poll() is None for program in older) or number < 100:
        if number < 5_000:  # above the cap, delivered events are deleted
            outbox.enqueue(rule_fired(session_id=f"new {number}"))
            number += 1
        outbox.flush(client)
    for program in older:
        program.communicate()
        assert program.returncode == 0
    outbox.retry_now()
    outbox.flush_all(client)
    count = number + 2 * 150
    assert statuses(outbox) == ["sent"] * count
    assert len(server.stored) == count
    assert server.duplicates == 0
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_program_goes_on_while_a_newer_release_upgrades_its_file(url: str) -> None:
    outbox = Outbox.open(url, policy=Policy.original())
    outbox.enqueue(rule_fired())
    outbox.flush(ScriptedClient(DOWN))
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as newer, newer:
        newer.execute("ALTER TABLE observation_events ADD COLUMN priority INTEGER")
        newer.execute(
            "CREATE INDEX observation_events_priority_idx ON observation_events (priority, created_at_ms)"
        )
        newer.execute("UPDATE outbox_alembic_version SET version_num = 'outbox_9999'")
    outbox.enqueue_many([rule_fired()] * 3)
    assert outbox.retry_now() == 1
    assert outbox.flush(ScriptedClient(REJECTED, REJECTED, OK, OK, OK)).sent == 3
    assert outbox.requeue_abandoned(older_than=row(outbox, 1).created_at_ms + 1).total == 1
    assert outbox.flush_all(ScriptedClient()).sent == 1
    assert [found.status for found in outbox.find()] == ["sent"] * 4
    assert outbox.stats().counts["sent"] == 4
    with pytest.raises(SchemaError, match="upgrade observation-outbox"):
        Outbox(url)
    outbox.close()
