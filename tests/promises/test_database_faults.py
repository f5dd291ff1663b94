"""What goes wrong with the database itself: each fault is told in words, settles nothing by half, and can pass."""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from freezegun import freeze_time
from sqlalchemy import event

from builders import (
    DOWN,
    NOON,
    NOON_MS,
    OK,
    REJECTED,
    REVOKED,
    ROOT,
    ScriptedClient,
    add_row,
    rule_fired,
    statuses,
)
from outbox import Outbox, Policy, SchemaError, StorageError
from outbox.doctor import examine
from outbox.storage import sqlite_file
from outbox.storage.engines import open_engine


def path_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


def total(outbox: Outbox) -> int:
    """Rows there and rows counted in the ledger."""
    stats = outbox.stats()
    return sum(stats.counts.values()) + sum(entry.events for entry in stats.deleted)


# The n-th call of the driver


class FaultyConnection(sqlite3.Connection):
    """Fails at one call, counted over all connections of a test."""

    calls_left = 0
    message = ""

    def fail_in_turn(self) -> None:
        FaultyConnection.calls_left -= 1
        if FaultyConnection.calls_left == 0:
            raise sqlite3.OperationalError(self.message)

    def commit(self) -> None:
        if self.in_transaction:
            self.fail_in_turn()
        super().commit()

    def cursor(self, *arguments):
        return super().cursor(FaultyCursor)


class FaultyCursor(sqlite3.Cursor):
    def execute(self, *arguments):
        self.connection.fail_in_turn()
        return super().execute(*arguments)

    def executemany(self, *arguments):
        self.connection.fail_in_turn()
        return super().executemany(*arguments)


def faulty(url: str, **options) -> Outbox:
    engine = open_engine(url, synchronous="NORMAL")
    event.listen(engine, "do_connect", lambda *arguments: arguments[3].update(factory=FaultyConnection))
    opened = Outbox(engine, **options)
    opened._owns_engine = True
    return opened


SCENARIOS = {
    "enqueue": lambda outbox: outbox.enqueue(rule_fired()),
    "enqueue many": lambda outbox: outbox.enqueue_many([rule_fired()] * 3),
    "flush": lambda outbox: outbox.flush(ScriptedClient(OK)),
    "flush, server down": lambda outbox: outbox.flush(ScriptedClient(DOWN)),
    "flush, token revoked": lambda outbox: outbox.flush(ScriptedClient(REVOKED)),
    "flush, isolation": lambda outbox: outbox.flush(ScriptedClient(REJECTED, REJECTED, OK)),
    "retry": lambda outbox: outbox.retry_now(),
    "requeue": lambda outbox: outbox.requeue_abandoned(older_than=NOON_MS + 1),
    "purge": lambda outbox: outbox.purge(event_type="rule_fired"),
    "status": lambda outbox: outbox.stats(),
}


@pytest.mark.parametrize("message", ["disk I/O error", "database is locked", "database or disk is full"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_fault_at_any_call_is_told_and_settles_nothing_by_half(url: str, scenario: str, message: str) -> None:
    with freeze_time(NOON) as clock, Outbox.open(url, policy=Policy(max_rows=6, when_full="trim")) as healthy:
        healthy.enqueue_many([rule_fired(), rule_fired()])
        add_row(healthy, status="parked", last_error="401")
        add_row(healthy, status="abandoned", last_error="permanent")
        for status in ("sent", "sent"):
            add_row(healthy, status=status, sent_at_ms=1)
        shutil.copy(path_of(url), path_of(url).with_suffix(".origin"))
        healthy.engine.dispose()
        origin = path_of(url).read_bytes()

        call = 0
        while True:
            call += 1
            path_of(url).write_bytes(origin)
            FaultyConnection.message = message
            with faulty(url, policy=healthy.policy) as outbox:
                before = total(outbox)
                FaultyConnection.calls_left = call
                result, told = None, None
                try:
                    result = SCENARIOS[scenario](outbox)
                except StorageError as error:
                    told = str(error)
                assert told is None or re.search(f"{message}; .+", told)
                survived = FaultyConnection.calls_left > 0
                FaultyConnection.calls_left = 0

                # All of a batch went one way, or none of it.
                mine = Counter(statuses(outbox)[:2])
                if scenario.startswith("flush") and "isolation" not in scenario:
                    assert len(mine) == 1, (call, mine)
                added = total(outbox) - before
                if scenario == "enqueue":
                    assert added == (result is not None)
                elif scenario == "enqueue many":
                    assert added == (3 if result else 0)
                else:
                    assert added == 0

                # The fault is gone, and work goes on.
                clock.tick(8 * 3_600)
                outbox.retry_now()
                outbox.flush_all(ScriptedClient())
                assert not {"pending", "sending"} & {*statuses(outbox)[:2]}
                clock.move_to(NOON)
            if survived:
                break
        assert call > 2


# Disk and permissions


def in_a_child(program: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    header = """
import os, resource, sys
from datetime import datetime, timezone
from outbox import Outbox, RuleFired, StorageError
url = sys.argv[1]
def event(size=10):
    return RuleFired(rule_ids=["x" * size], session_id="s", fired_at=datetime.now(timezone.utc))
"""
    return subprocess.run(
        [sys.executable, "-c", header + program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_a_full_disk_is_told_and_what_was_accepted_stays(outbox: Outbox, url: str) -> None:
    """A file-size limit stands for the disk: it needs no privileges."""
    program = """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
with Outbox(url) as outbox:
    try:
        while True:
            print(outbox.enqueue(event(50_000)), flush=True)
    except StorageError as error:
        print(error, file=sys.stderr)
"""
    child = in_a_child(program, url)
    assert child.returncode == 0, child.stderr
    assert "make room" in child.stderr or "free space" in child.stderr
    accepted = [int(line) for line in child.stdout.split()]
    assert accepted
    assert [found.id for found in outbox.find()] == accepted
    assert outbox.enqueue(rule_fired()) == accepted[-1] + 1
    assert outbox.flush_all(ScriptedClient()).sent == len(accepted) + 1


def test_a_full_file_system_is_told_and_passes(tmp_path: Path) -> None:
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("only root can mount a small file system")
    try:
        with Outbox.open(f"sqlite:///{tmp_path}/outbox.db") as outbox:
            accepted = []
            with pytest.raises(StorageError, match="full; make room on the disk"):  # noqa: PT012 - until it fails
                while True:
                    accepted.append(outbox.enqueue(rule_fired(rule_ids=["x" * 20_000])))
            assert [found.id for found in outbox.find()] == accepted
            subprocess.run(["mount", "-o", "remount,size=8m", tmp_path], check=True)
            accepted.append(outbox.enqueue(rule_fired()))
            assert outbox.flush_all(ScriptedClient()).sent == len(accepted)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_file_that_may_only_be_read_is_told(outbox: Outbox, url: str) -> None:
    outbox.enqueue(rule_fired())
    outbox.close()
    read_only = f"{url.replace('sqlite:///', 'sqlite:///file:')}?mode=ro&uri=true"
    with Outbox(read_only) as opened:
        with pytest.raises(StorageError, match="readonly database; let this user write the file and its folder"):
            opened.enqueue(rule_fired())
        assert opened.pending_count() == 1
    assert outbox.enqueue(rule_fired()) == 2


def test_another_users_file_is_told() -> None:
    if os.geteuid():
        pytest.skip("only root can become another user")
    program = """
Outbox.open("sqlite://").close()  # loads what that user may not read
os.setgid(65534)
os.setuid(65534)
try:
    Outbox(url).enqueue(event())
except StorageError as error:
    print(error)
"""
    # Not in pytest's own folder: every run of pytest that starts closes it to other users.
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        url = f"sqlite:///{folder}/outbox.db"
        with Outbox.open(url) as outbox:
            child = in_a_child(program, url)
            assert (
                "unable to open database file; let this user read and write the file and its folder"
                in child.stdout
            )
            path_of(url).chmod(0o644)
            child = in_a_child(program, url)
            assert "let this user" in child.stdout, child.stderr
            assert outbox.enqueue(rule_fired()) == 1


def test_a_lock_that_outlasts_the_patience_is_told_and_passes(outbox: Outbox, url: str, monkeypatch) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_MS", 1)
    blocker = sqlite3.connect(path_of(url), isolation_level=None)
    with Outbox(url) as impatient:
        impatient.enqueue(rule_fired())
        blocker.execute("BEGIN IMMEDIATE")
        for operation in (
            lambda: impatient.enqueue(rule_fired()),
            lambda: impatient.flush(ScriptedClient()),
            impatient.retry_now,
        ):
            with pytest.raises(StorageError, match="database is locked; another program holds the write lock"):
                operation()
        blocker.execute("ROLLBACK")
        blocker.close()
        assert impatient.flush(ScriptedClient()).sent == 1


def test_a_lock_that_begins_during_an_upload_costs_no_delivery(outbox: Outbox, url: str, monkeypatch) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_MS", 1)
    blocker = sqlite3.connect(path_of(url), isolation_level=None)
    with freeze_time(NOON) as clock, Outbox(url) as impatient:
        impatient.enqueue(rule_fired())
        with pytest.raises(StorageError, match="locked"):
            impatient.flush(ScriptedClient(lambda _: blocker.execute("BEGIN IMMEDIATE") and None))
        blocker.execute("ROLLBACK")
        blocker.close()
        assert statuses(impatient) == ["sending"]
        clock.tick(60)
        assert impatient.flush(ScriptedClient()).sent == 1


@pytest.mark.traced
def test_a_damaged_file_is_told(outbox: Outbox, url: str) -> None:
    outbox.enqueue_many([rule_fired(rule_ids=["x" * 500])] * 200)
    outbox.close()
    content = bytearray(path_of(url).read_bytes())
    content[8_192:40_960] = b"\xa5" * (40_960 - 8_192)
    path_of(url).write_bytes(content)
    with (
        pytest.raises(StorageError, match="malformed; the file is damaged; `outbox doctor`"),
        Outbox(url) as damaged,
    ):
        damaged.flush_all(ScriptedClient())
    engine = open_engine(url)
    findings = {finding.check: finding for finding in examine(engine, Policy())}
    engine.dispose()
    worst = [finding for finding in findings.values() if not finding.is_well]
    assert worst
    assert "damaged" in worst[0].words


# A file that goes away


def test_a_deleted_file_is_noticed_before_an_event_is_lost(outbox: Outbox, url: str) -> None:
    outbox.enqueue(rule_fired())
    path_of(url).unlink()
    for operation in (lambda: outbox.enqueue(rule_fired()), outbox.stats, lambda: outbox.flush(ScriptedClient())):
        with pytest.raises(
            StorageError, match="there is no database .*outbox.db; restore it, or `outbox upgrade`"
        ):
            operation()
    assert not path_of(url).exists()


def test_a_restored_file_is_used_without_a_restart(outbox: Outbox, url: str) -> None:
    outbox.enqueue(rule_fired())
    outbox.engine.dispose()
    backup = path_of(url).read_bytes()
    outbox.enqueue(rule_fired())
    assert outbox.pending_count() == 2
    for name in path_of(url).parent.glob("outbox.db*"):
        name.unlink()
    path_of(url).write_bytes(backup)
    assert outbox.pending_count() == 1
    assert outbox.enqueue(rule_fired()) == 2
    assert outbox.flush_all(ScriptedClient()).sent == 2


@pytest.mark.contract
def test_a_schema_from_the_future_is_told(outbox: Outbox, url: str) -> None:
    with outbox.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE outbox_alembic_version SET version_num = 'outbox_9999'")
    with pytest.raises(SchemaError, match="upgrade observation-outbox"):
        Outbox(url)


def test_a_table_that_is_gone_is_told(outbox: Outbox) -> None:
    with outbox.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE observation_events")
    with pytest.raises(StorageError, match="no such table: observation_events; `outbox upgrade` creates what"):
        outbox.enqueue(rule_fired())
