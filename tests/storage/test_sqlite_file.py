"""SQLite's files: where they are, how they are opened, and what is said when that fails."""

import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import URL, create_engine, make_url

from builders import REVOKED, ScriptedClient, on_statement, rule_fired, statuses
from outbox import ConfigurationError, Outbox, Policy, StorageError
from outbox.storage import sqlite_file
from outbox.storage.engines import reading, writing
from outbox.storage.sqlite_file import create_file, file_of


def uri(name: str) -> URL:
    """Return the URL of a database whose name SQLite reads as a URI."""
    return URL.create("sqlite", database=name, query={"uri": "true"})


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


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///a.db", Path("a.db")),
        ("sqlite:////var/a.db", Path("/var/a.db")),
        ("sqlite:///file:a.db?mode=rwc&uri=true", Path("a.db")),
        (uri("file:a%20b.db?mode=ro"), Path("a b.db")),
        ("sqlite:///file:a.db", Path("file:a.db")),
        ("sqlite://", None),
        ("sqlite:///:memory:", None),
        ("sqlite:///?timeout=5", None),
        ("sqlite:///file::memory:?uri=true", None),
        ("sqlite:///file:?uri=true", None),
        (uri("file:shared?mode=memory"), None),
        ("sqlite:///file:/shared?vfs=memdb&uri=true", None),
        ("sqlite:///file:shared?mode=memory&cache=shared&uri=true", None),
    ],
)
def test_the_file_of_a_url(url: str | URL, path: Path | None) -> None:
    assert file_of(make_url(url)) == path


@pytest.mark.parametrize("url", ["sqlite:///outbox.db", uri("file:out%62ox.db"), uri("file:outbox.db?mode=rwc")])
def test_a_relative_path_keeps_its_meaning_when_the_program_changes_its_directory(
    url: str | URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "ho me?", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(home)
    Outbox.open(url).close()
    with Outbox(url) as outbox:
        monkeypatch.chdir(elsewhere)
        assert outbox.enqueue(rule_fired()) == 1
    assert not list(elsewhere.iterdir())
    with Outbox(URL.create("sqlite", database=str(home / "outbox.db"))) as outbox:
        assert outbox.pending_count() == 1


def test_a_relative_path_without_a_current_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigurationError, match="expected an absolute path, such as .*: No such file"):
        Outbox.open("sqlite:///outbox.db")


def test_creating_no_file_for_a_database_in_memory_is_fine() -> None:
    create_file(make_url("sqlite://"))


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


def test_switching_to_wal_is_tried_again_while_others_do_the_same() -> None:
    class Busy:
        OperationalError = sqlite3.OperationalError
        refusals = 3

        def execute(self, _):
            if self.refusals:
                self.refusals -= 1
                raise sqlite3.OperationalError("database is locked")

    busy = Busy()
    sqlite_file._enter_wal(busy)
    assert busy.refusals == 0


def test_switching_to_wal_gives_up_with_the_databases_own_words(monkeypatch) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_MS", 20)

    class Stuck:
        OperationalError = sqlite3.OperationalError

        def execute(self, _):
            raise sqlite3.OperationalError("database is locked")

    with pytest.raises(sqlite3.OperationalError, match="locked"):
        sqlite_file._enter_wal(Stuck())

    class Broken(Stuck):
        def execute(self, _):
            raise sqlite3.OperationalError("disk I/O error")

    with pytest.raises(sqlite3.OperationalError, match="I/O"):
        sqlite_file._enter_wal(Broken())


def test_a_file_in_another_journal_mode_that_is_being_read_is_waited_for_once(url: str, monkeypatch) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_MS", 50)
    Outbox.open(url).close()
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as reader:
        reader.execute("PRAGMA journal_mode = DELETE")
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM observation_events").fetchall()
        tries: list[str] = []
        enter = sqlite_file._enter_wal

        def enter_and_count(connection) -> None:
            connection.set_trace_callback(tries.append)
            enter(connection)

        monkeypatch.setattr(sqlite_file, "_enter_wal", enter_and_count)
        with pytest.raises(StorageError, match="database is locked"):
            Outbox(url)
    assert len(tries) <= 2


def statements_and_levels(outbox: Outbox) -> list[str]:
    """Return a list that gets the first word of each statement to come, and what PRAGMA synchronous is then."""
    level = 2
    seen: list[str] = []

    def watch(statement: str) -> None:
        nonlocal level
        found = re.fullmatch(r"PRAGMA synchronous = (\d)", statement)
        if found:
            level = int(found[1])
        seen.append(f"{statement.split(maxsplit=1)[0]} {level}")

    on_statement(outbox, watch)
    return seen


@pytest.mark.parametrize("policy", [Policy(max_sent=1), Policy(max_sent=None, keep_sent_ms=1)])
def test_what_a_flusher_deletes_does_not_wait_for_the_disk(url: str, outbox_time, policy: Policy) -> None:
    with Outbox.open(url, policy=policy) as outbox:
        outbox.enqueue_many([rule_fired(), rule_fired()])
        outbox.flush(ScriptedClient())
        outbox_time.travel(seconds=1)
        outbox.enqueue(rule_fired())
        seen = statements_and_levels(outbox)
        outbox.flush(ScriptedClient())
        assert outbox.stats().counts["sent"] == 1
    assert "DELETE 1" in seen
    assert {one for one in seen if one.startswith("COMMIT")} == {"COMMIT 1"}


# The time stands still, so that the second flush comes during the pause after the first one.
@pytest.mark.usefixtures("noon")
def test_what_is_enqueued_waits_for_the_disk_and_what_a_flusher_writes_does_not(url: str) -> None:
    with Outbox.open(url) as outbox:
        seen = statements_and_levels(outbox)
        outbox.enqueue(rule_fired())
        outbox.flush(ScriptedClient(REVOKED))
        outbox.enqueue(rule_fired())
        outbox.flush(ScriptedClient())
        outbox.retry_now()
        outbox.requeue_abandoned(older_than=0)
    writing = [one for one in seen if one.startswith(("INSERT", "UPDATE", "COMMIT"))]
    enqueued, claimed = ["INSERT 2"], ["UPDATE 1", "COMMIT 1"]  # a lone row is committed by its INSERT
    parked_with_its_try = ["UPDATE 1", "INSERT 1", "COMMIT 1"]
    paused, looked_at_pause = ["INSERT 1", "UPDATE 1", "COMMIT 1"], ["COMMIT 1"]
    retried, requeued = [*["UPDATE 2"] * 3, "COMMIT 2"], ["COMMIT 2"]
    assert writing == [
        *enqueued,
        *claimed,
        *parked_with_its_try,
        *paused,
        *enqueued,
        *looked_at_pause,
        *retried,
        *requeued,
    ]
