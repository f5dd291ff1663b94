import os
import sqlite3
import sys
import threading

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from builders import ScriptedClient, refuse, rule_fired, statuses
from outbox import ConfigurationError, Outbox, StorageError
from outbox.storage import sqlite_file
from outbox.storage.engines import open_engine, reading, shown_url, writing


@pytest.mark.parametrize("value", ["outbox.db", "", "/tmp/outbox.db"])  # noqa: S108 - never opened
def test_a_plain_path_is_no_url(value: str) -> None:
    with pytest.raises(
        ConfigurationError, match="not an SQLAlchemy URL; expected one such as sqlite:///outbox.db"
    ):
        Outbox.open(value)


def test_a_database_in_memory_is_shared_by_threads() -> None:
    with Outbox.open("sqlite://") as outbox:
        threads = [threading.Thread(target=lambda: outbox.enqueue(rule_fired())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outbox.flush(ScriptedClient()).sent == 8


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


def test_a_reader_waits_for_no_writer(outbox: Outbox) -> None:
    outbox.enqueue(rule_fired())
    with writing(outbox.engine) as connection:
        connection.execute(text("DELETE FROM observation_events"))
        assert outbox.pending_count() == 1
    assert outbox.pending_count() == 0


def test_a_locked_database_is_a_storage_error(outbox: Outbox, url: str, monkeypatch) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_MS", 1)
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


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me@127.0.0.1:1/app?password=secret&application_name=shown",
        "postgresql://me@127.0.0.1:1/app?sslpassword=secret&application_name=shown",
        "mysql://me@127.0.0.1:1/app?password=secret&sql_mode=shown",
    ],
)
def test_a_password_among_the_options_of_the_url_is_not_shown(url: str) -> None:
    engine = open_engine(url)
    assert shown_url(engine).endswith("=shown")
    with pytest.raises(StorageError) as error, reading(engine):
        pass
    assert shown_url(engine) in str(error.value)
    assert "secret" not in str(error.value)
    engine.dispose()


def test_a_database_in_memory_tells_what_it_refuses() -> None:
    with Outbox.open("sqlite://") as outbox:
        refuse(outbox, "INSERT", "observation_events", "not today")
        with pytest.raises(StorageError, match="not today"):
            outbox.enqueue(rule_fired())
        assert statuses(outbox) == []


def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(ConfigurationError, match="driver is not installed: .*psycopg2"):
        open_engine("postgresql+psycopg2://localhost/none")
