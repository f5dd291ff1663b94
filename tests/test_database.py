import os
import re
import sqlite3
import threading
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from builders import REVOKED, ScriptedClient, on_statement, refuse, rule_fired, statuses
from outbox import ConfigurationError, Outbox, StorageError, sqlite
from outbox.database import open_engine, reading, writing
from outbox.sqlite import create_file, sqlite_file


def pragma(outbox: Outbox, name: str) -> object:
    with reading(outbox.engine) as connection:
        return connection.exec_driver_sql(f"PRAGMA {name}").scalar()


@pytest.mark.parametrize(("synchronous", "level"), [("FULL", 2), ("NORMAL", 1)])
def test_our_files_are_in_wal_mode_and_synced_as_asked(url: str, synchronous, level: int) -> None:
    with Outbox.open(url, synchronous=synchronous) as outbox:
        assert pragma(outbox, "journal_mode") == "wal"
        assert pragma(outbox, "synchronous") == level
        assert pragma(outbox, "busy_timeout") == 30_000


def test_full_sync_is_the_default(url: str) -> None:
    with Outbox.open(url) as outbox:
        assert pragma(outbox, "synchronous") == 2


@pytest.mark.parametrize("value", ["full", "OFF", None])
def test_another_way_to_sync_is_refused(url: str, value) -> None:
    with pytest.raises(ConfigurationError, match="synchronous is .*, expected 'FULL' or 'NORMAL'"):
        Outbox.open(url, synchronous=value)


@pytest.mark.parametrize("value", ["outbox.db", "", "/tmp/outbox.db"])  # noqa: S108 - never opened
def test_a_plain_path_is_no_url(value: str) -> None:
    with pytest.raises(
        ConfigurationError, match="not an SQLAlchemy URL; expected one such as sqlite:///outbox.db"
    ):
        Outbox.open(value)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///a.db", Path("a.db")),
        ("sqlite:////var/a.db", Path("/var/a.db")),
        ("sqlite:///file:a.db?mode=rwc&uri=true", Path("a.db")),
        ("sqlite://", None),
        ("sqlite:///:memory:", None),
        ("sqlite:///file:shared?mode=memory&cache=shared&uri=true", None),
        ("postgresql+psycopg://localhost/test", None),
    ],
)
def test_the_file_of_a_url(url: str, path: Path | None) -> None:
    assert sqlite_file(make_url(url)) == path


def test_a_database_in_memory_is_shared_by_threads() -> None:
    with Outbox.open("sqlite://") as outbox:
        threads = [threading.Thread(target=lambda: outbox.enqueue(rule_fired())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outbox.flush(ScriptedClient()).sent == 8


def test_creating_no_file_for_a_database_in_memory_is_fine() -> None:
    create_file(make_url("sqlite://"))


def test_a_writer_takes_the_lock_before_it_reads(outbox: Outbox, url: str) -> None:
    with writing(outbox.engine) as connection:
        connection.execute(text("SELECT 1"))
        other = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.close()


def test_a_writer_on_a_hosts_engine_takes_the_lock_before_it_reads(outbox: Outbox, url: str) -> None:
    host = create_engine(url)
    with writing(host) as connection:
        connection.execute(text("SELECT 1"))
        other = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.close()
    host.dispose()


def test_a_hosts_own_way_to_begin_is_kept(outbox: Outbox, url: str) -> None:
    host = create_engine(url)

    @event.listens_for(host, "connect")
    def _manual(connection, _):
        connection.isolation_level = None

    @event.listens_for(host, "begin")
    def _begin(connection):
        connection.exec_driver_sql("BEGIN")

    with Outbox(host) as hosted:
        hosted.enqueue(rule_fired())
        assert hosted.flush(ScriptedClient()).sent == 1
    host.dispose()


def test_a_transaction_that_the_hosts_engine_began_is_used(outbox: Outbox, url: str) -> None:
    host = create_engine(url)

    @event.listens_for(host, "checkout")
    def _begin(connection, *_):
        connection.isolation_level = None
        connection.execute("BEGIN")

    with Outbox(host) as hosted:
        hosted.enqueue(rule_fired())
        assert hosted.flush(ScriptedClient()).sent == 1
    host.dispose()


def test_text_that_is_not_utf8_spoils_its_own_row_only_on_a_hosts_engine_too(outbox: Outbox, url: str) -> None:
    outbox.enqueue_many([rule_fired()] * 2)
    with writing(outbox.engine) as connection:
        connection.exec_driver_sql(
            "UPDATE observation_events SET payload_json = CAST(x'7bff' AS TEXT) WHERE id = 1"
        )
    host = create_engine(url)
    with Outbox(host) as hosted:
        assert hosted.flush(ScriptedClient()).sent == 1
    with host.connect() as connection:
        assert connection.connection.dbapi_connection.text_factory is str
    host.dispose()
    assert statuses(outbox) == ["abandoned", "sent"]


def test_a_reader_waits_for_no_writer(outbox: Outbox) -> None:
    outbox.enqueue(rule_fired())
    with writing(outbox.engine) as connection:
        connection.execute(text("DELETE FROM observation_events"))
        assert outbox.pending_count() == 1
    assert outbox.pending_count() == 0


def test_a_locked_database_is_a_storage_error(outbox: Outbox, url: str, monkeypatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_MS", 1)
    blocker = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with Outbox(url) as impatient, pytest.raises(StorageError, match="outbox.db: database is locked"):
        impatient.enqueue(rule_fired())
    blocker.execute("ROLLBACK")
    blocker.close()
    assert statuses(outbox) == []


def test_an_error_names_neither_statement_nor_values(outbox: Outbox) -> None:
    with outbox.engine.begin() as connection:
        connection.execute(text("DROP TABLE observation_events"))
    with pytest.raises(StorageError) as caught:
        outbox.enqueue(rule_fired(session_id="secret session"))
    assert "no such table" in str(caught.value)
    assert "secret" not in str(caught.value) + str(caught.value.__cause__)


def test_an_exhausted_pool_is_a_storage_error(outbox: Outbox) -> None:
    with pytest.raises(StorageError, match="outbox.db: no connection"), writing(outbox.engine):
        raise PoolTimeoutError("no connection")


def test_switching_to_wal_is_tried_again_while_others_do_the_same() -> None:
    class Busy:
        OperationalError = sqlite3.OperationalError
        refusals = 3

        def execute(self, _):
            if self.refusals:
                self.refusals -= 1
                raise sqlite3.OperationalError("database is locked")

    busy = Busy()
    sqlite._enter_wal(busy)
    assert busy.refusals == 0


def test_switching_to_wal_gives_up_with_the_databases_own_words(monkeypatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_MS", 20)

    class Stuck:
        OperationalError = sqlite3.OperationalError

        def execute(self, _):
            raise sqlite3.OperationalError("database is locked")

    with pytest.raises(sqlite3.OperationalError, match="locked"):
        sqlite._enter_wal(Stuck())

    class Broken(Stuck):
        def execute(self, _):
            raise sqlite3.OperationalError("disk I/O error")

    with pytest.raises(sqlite3.OperationalError, match="I/O"):
        sqlite._enter_wal(Broken())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_parent_and_child_go_on_after_a_fork(outbox: Outbox) -> None:
    outbox.enqueue(rule_fired())
    inherited = outbox.engine.pool
    child = os.fork()
    if child == 0:
        worked = outbox.engine.pool is not inherited and outbox.enqueue(rule_fired()) == 2
        os._exit(0 if worked else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert outbox.enqueue(rule_fired()) == 3
    assert outbox.flush(ScriptedClient()).sent == 3


def test_a_server_url_needs_its_driver_only_when_it_is_used() -> None:
    engine = open_engine("postgresql+psycopg://user:secret@127.0.0.1:1/test")
    assert engine.dialect.name == "postgresql"
    with pytest.raises(StorageError, match=r"user:\*\*\*@127.0.0.1"), reading(engine):
        pass
    engine.dispose()


def test_what_is_enqueued_waits_for_the_disk_and_what_a_flusher_writes_does_not(url: str) -> None:
    with Outbox.open(url) as outbox:
        synced = {"": 2}
        seen: list[str] = []

        def watch(statement: str) -> None:
            found = re.fullmatch(r"PRAGMA synchronous = (\d)", statement)
            if found:
                synced[""] = int(found[1])
            seen.append(f"{statement.split(maxsplit=1)[0]} {synced['']}")

        on_statement(outbox, watch)
        outbox.enqueue(rule_fired())
        outbox.flush(ScriptedClient(REVOKED))
        outbox.enqueue(rule_fired())
        outbox.flush(ScriptedClient())
        outbox.retry_now()
        outbox.requeue_abandoned(older_than=0)
    writing = [one for one in seen if one.startswith(("INSERT", "UPDATE", "COMMIT"))]
    enqueued, flushed = ["INSERT 2", "COMMIT 2"], ["UPDATE 1", "COMMIT 1"]
    unparked = ["UPDATE 1", "COMMIT 1"]
    retried, requeued = ["UPDATE 2", "UPDATE 2", "COMMIT 2"], ["COMMIT 2"]
    assert writing == [*enqueued, *flushed * 2, *enqueued, *flushed * 2, *unparked, *retried, *requeued]


def test_a_database_in_memory_tells_what_it_refuses() -> None:
    with Outbox.open("sqlite://") as outbox:
        refuse(outbox, "INSERT", "observation_events", "not today")
        with pytest.raises(StorageError, match="not today"):
            outbox.enqueue(rule_fired())
        assert statuses(outbox) == []
