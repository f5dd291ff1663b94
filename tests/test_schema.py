import logging
import os
import re
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, text
from sqlalchemy.exc import IntegrityError

from builders import ROOT, ScriptedClient, rule_fired, statuses
from outbox import Outbox, Policy, SchemaError, StorageError, schema
from outbox.storage.engines import migrating, open_engine
from outbox.storage.tables import Base
from warm_python import WarmPython

DIFFLORE_DDL = """
CREATE TABLE observation_events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    event_type TEXT NOT NULL,
    rule_id TEXT,
    rule_ids_json TEXT NOT NULL DEFAULT '[]',
    session_id TEXT NOT NULL DEFAULT '',
    file_path TEXT,
    occurred_at_ms INTEGER NOT NULL,
    payload_json TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'pending',
    retry_count INTEGER NOT NULL DEFAULT 0,
    next_attempt_at_ms INTEGER NOT NULL DEFAULT 0,
    last_error TEXT,
    created_at_ms INTEGER NOT NULL,
    sent_at_ms INTEGER
);
CREATE INDEX observation_events_pending_idx ON observation_events (status, next_attempt_at_ms, created_at_ms);
CREATE INDEX observation_events_recent_idx ON observation_events (event_type, session_id, occurred_at_ms);
"""

DIFFLORE_INSERT = """
INSERT INTO observation_events
    (event_type, rule_id, rule_ids_json, session_id, file_path, occurred_at_ms, payload_json, status,
     next_attempt_at_ms, created_at_ms)
VALUES ('rule_fired', NULL, '["r1"]', 's1', NULL, 1700000000123,
        '{"event_type":"rule_fired","rule_ids":["r1"],"session_id":"s1","fired_at":"2023-11-14T22:13:20.123456789Z",'
        || '"from_the_future":true}', 'pending', 1700000000123, 1700000000123)
"""


def file_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


def query(url: str, statement: str) -> list[tuple]:
    connection = sqlite3.connect(file_of(url))
    try:
        return connection.execute(statement).fetchall()
    finally:
        connection.close()


def execute(url: str, script: str) -> None:
    connection = sqlite3.connect(file_of(url))
    connection.executescript(script)
    connection.close()


def table_text(url: str) -> str:
    return query(url, "SELECT sql FROM sqlite_master WHERE name = 'observation_events'")[0][0]


def alembic_here(url: str) -> Config:
    config = Config(ROOT / "alembic.ini")
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


# Open and check


def test_a_database_without_schema_is_refused_and_says_what_to_do(url: str) -> None:
    sqlite3.connect(file_of(url)).close()
    with pytest.raises(
        SchemaError, match="has no outbox schema; `outbox upgrade` or Outbox.open\\(\\) creates it"
    ):
        Outbox(url)
    assert query(url, "SELECT * FROM sqlite_master") == []


def test_a_file_that_is_not_there_is_refused_and_not_created(url: str) -> None:
    with pytest.raises(SchemaError, match="there is no database .*outbox.db; check the URL, or create it"):
        Outbox(url)
    assert not file_of(url).exists()


def test_an_older_schema_is_refused(url: str) -> None:
    command.upgrade(alembic_here(url), "outbox_0001")
    with pytest.raises(SchemaError, match="has the schema outbox_0001, this program needs outbox_"):
        Outbox(url)


@pytest.mark.parametrize("opener", [Outbox, Outbox.open])
def test_a_newer_schema_says_that_this_program_is_too_old(url: str, opener) -> None:
    Outbox.open(url).close()
    execute(url, "UPDATE outbox_alembic_version SET version_num = 'outbox_9999'")
    with pytest.raises(
        SchemaError, match="has the schema outbox_9999, this program is too old for it: .* upgrade obse"
    ):
        opener(url)


def test_opening_needs_alembic_only_for_an_upgrade(url: str) -> None:
    Outbox.open(url).close()
    program = (
        f"import sys; from outbox import Outbox; Outbox.open({url!r}).close(); assert 'alembic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_a_new_file_belongs_to_its_owner_only(url: str) -> None:
    before = os.umask(0)
    try:
        with Outbox.open(url) as outbox:
            outbox.enqueue(rule_fired())
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in file_of(url).parent.iterdir()}
    finally:
        os.umask(before)
    assert {name: mode for name, mode in modes.items() if name.startswith("outbox.db")} == {
        "outbox.db": 0o600,
        "outbox.db-wal": 0o600,
        "outbox.db-shm": 0o600,
    }


def test_without_a_database_the_per_user_file_is_used(tmp_path: Path) -> None:
    with Outbox.open() as outbox:
        path = Path(outbox.engine.url.database)
        assert path == tmp_path / "data" / "observation-outbox" / "outbox.db"
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="can't create the database .*no/outbox.db: No such file or directory"):
        Outbox.open(f"sqlite:///{tmp_path}/no/outbox.db")


def test_a_file_that_is_no_database_is_named_and_left_alone(url: str) -> None:
    file_of(url).write_text("not a database, just some notes of somebody" * 50)
    for opener in (Outbox, Outbox.open):
        with pytest.raises(StorageError, match="outbox.db: file is not a database"):
            opener(url)
    assert file_of(url).read_text().startswith("not a database")


def test_a_percent_sign_and_a_space_in_the_path_are_fine(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/50%25 off %s.db"
    with Outbox.open(url) as outbox:
        assert outbox.enqueue(rule_fired()) == 1


# Migrations


def test_migrations_and_models_agree(outbox: Outbox, url: str) -> None:
    command.check(alembic_here(url))


def test_migrations_give_the_declared_table_to_the_letter(outbox: Outbox, tmp_path: Path) -> None:
    declared = f"sqlite:///{tmp_path}/declared.db"
    engine = create_engine(declared)
    Base.metadata.create_all(engine)
    engine.dispose()

    def parts(url: str) -> dict[str, set[str]]:
        found = query(url, "SELECT name, sql FROM sqlite_master WHERE name LIKE 'observation_%'")
        return {name: set(re.split(r",\s+", " ".join(sql.split()).removesuffix(" )"))) for name, sql in found}

    assert parts(str(outbox.engine.url)) == parts(declared)


def test_the_known_revisions_are_those_of_the_scripts() -> None:
    script = ScriptDirectory.from_config(schema.alembic_config())
    assert [revision.revision for revision in script.walk_revisions()][::-1] == list(schema.REVISIONS)
    assert script.get_heads() == [schema.REVISIONS[-1]]


@pytest.mark.parametrize("revision", schema.REVISIONS)
@pytest.mark.untraced
def test_ids_stay_unique_through_every_migration(url: str, revision: str) -> None:
    config = alembic_here(url)
    command.upgrade(config, revision)
    assert "PRIMARY KEY AUTOINCREMENT" in table_text(url)
    assert "observation_events_status_check" in table_text(url)
    command.upgrade(config, "head")
    command.downgrade(config, revision)
    assert "PRIMARY KEY AUTOINCREMENT" in table_text(url)
    assert query(url, "SELECT version_num FROM outbox_alembic_version") == [(revision,)]


def test_a_downgrade_and_upgrade_keep_every_event(url: str) -> None:
    with Outbox.open(url) as outbox:
        ids = outbox.enqueue_many([rule_fired()] * 3)
    config = alembic_here(url)
    command.downgrade(config, "base")
    assert len(query(url, "SELECT id FROM observation_events")) == 3
    command.upgrade(config, "head")
    with Outbox(url) as outbox:
        assert [found.id for found in outbox.find()] == ids
        assert outbox.flush(ScriptedClient()).sent == 3


@pytest.mark.untraced
def test_the_ledger_survives_a_downgrade_and_an_upgrade(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_rows=1, when_full="trim")) as outbox:
        outbox.enqueue_many([rule_fired()] * 4)
        counted = outbox.stats().deleted
    assert counted == [("pending", "rule_fired", "cap", 3)]
    for revision in (*schema.REVISIONS[-2::-1], "base"):
        command.downgrade(alembic_here(url), revision)
        command.upgrade(alembic_here(url), "head")
        with Outbox(url) as outbox:
            assert outbox.stats().deleted == counted


def test_sql_for_a_database_administrator_can_be_written(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    command.upgrade(alembic_here(url), "head", sql=True)
    written = capsys.readouterr().out
    assert "CREATE TABLE observation_events" in written
    assert "revived_at_ms" in written
    assert not file_of(url).exists()


@pytest.mark.servers("postgresql")
def test_on_postgresql_the_table_has_settings_of_a_queue_until_a_downgrade(url: str, outbox: Outbox) -> None:
    def settings() -> list[str]:
        with outbox.engine.connect() as connection:
            query = "SELECT unnest(reloptions) FROM pg_class WHERE oid = 'observation_events'::regclass ORDER BY 1"
            return list(connection.execute(text(query)).scalars())

    tuned = ["autovacuum_vacuum_cost_delay=0", "autovacuum_vacuum_scale_factor=0.01"]
    assert settings() == tuned
    command.check(alembic_here(url))
    command.downgrade(alembic_here(url), "outbox_0003")
    assert settings() == []
    command.upgrade(alembic_here(url), "head")
    assert settings() == tuned


@pytest.mark.parametrize("how", ["-x", "environment"])
def test_the_alembic_command_works_from_the_checkout(url: str, how: str) -> None:
    named = ["-x", f"database={url}"] if how == "-x" else []
    environment = os.environ | ({} if named else {"OUTBOX_DATABASE_URL": url})
    others = [["check"], ["downgrade", "-1"], ["upgrade", "head"]] if named else []
    for words in (["upgrade", "head"], *others):
        subprocess.run(
            [sys.executable, "-m", "alembic", *named, *words],
            check=True,
            cwd=ROOT,
            env=environment,
            capture_output=True,
        )
    assert query(url, "SELECT version_num FROM outbox_alembic_version") == [(schema.REVISIONS[-1],)]


def test_an_upgrade_leaves_the_hosts_logging_alone(url: str) -> None:
    before = (logging.getLogger().handlers[:], logging.getLogger().level, logging.getLogger("host").disabled)
    Outbox.open(url).close()
    assert (
        logging.getLogger().handlers[:],
        logging.getLogger().level,
        logging.getLogger("host").disabled,
    ) == before


def test_a_failing_migration_leaves_nothing_behind(url: str) -> None:
    # The second revision fails, for a table has the name of its index.
    execute(
        url,
        DIFFLORE_DDL + DIFFLORE_INSERT + "; CREATE TABLE observation_events_sent_idx (id)",
    )
    before = query(url, "SELECT * FROM sqlite_master")
    with pytest.raises(StorageError, match="there is already a table named observation_events_sent_idx"):
        Outbox.open(url)
    assert query(url, "SELECT * FROM sqlite_master") == before
    execute(url, "DROP TABLE observation_events_sent_idx")
    with Outbox.open(url) as outbox:
        assert outbox.pending_count() == 1


def test_a_table_of_that_name_with_other_columns_is_refused(url: str) -> None:
    execute(url, "CREATE TABLE observation_events (id INTEGER PRIMARY KEY, status TEXT)")
    with pytest.raises(SchemaError, match="observation_events is there, but without event_type, rule_id"):
        Outbox.open(url)
    assert query(url, "SELECT name FROM sqlite_master") == [("observation_events",)]


def test_a_lost_version_is_found_again(url: str) -> None:
    with Outbox.open(url) as outbox:
        outbox.enqueue(rule_fired())
    execute(url, "DELETE FROM outbox_alembic_version")
    with Outbox.open(url) as outbox:
        assert outbox.flush(ScriptedClient()).sent == 1
    command.check(alembic_here(url))


# Difflore's file


def test_a_difflore_file_is_adopted_without_touching_a_row(url: str) -> None:
    execute(url, DIFFLORE_DDL + DIFFLORE_INSERT)
    execute(
        url,
        """INSERT INTO observation_events (event_type, occurred_at_ms, payload_json, status, created_at_ms, last_error,
           retry_count, sent_at_ms) VALUES ('fix_outcome', 5, '{', 'sent', 5, NULL, 0, 9),
           ('fix_outcome', 6, '{', 'parked', 6, '401 Unauthorized', 2, NULL)""",
    )
    before = query(url, "SELECT * FROM observation_events ORDER BY id")
    original_columns = table_text(url)

    with Outbox.open(url) as outbox:
        after = query(url, "SELECT * FROM observation_events ORDER BY id")
        assert [found[: len(known)] for found, known in zip(after, before, strict=True)] == before
        assert {found[len(before[0]) :] for found in after} == {(None, None, None, 0, "", None, None, None)}
        assert table_text(url).startswith(original_columns.removesuffix(")").rstrip())

        client = ScriptedClient()
        assert outbox.flush(client).sent == 1
        assert '"from_the_future":true' in client.batches[0][0].payload_json

        execute(url, DIFFLORE_INSERT)
        execute(
            url,
            "INSERT INTO observation_events (event_type, occurred_at_ms, payload_json, created_at_ms)"
            " SELECT event_type, occurred_at_ms, payload_json, created_at_ms FROM observation_events WHERE id = 1",
        )
        assert outbox.flush(client).sent == 2
        assert statuses(outbox)[-2:] == ["sent", "sent"]


# Many at once


def test_threads_that_open_one_new_file_at_once_all_succeed(url: str) -> None:
    barrier = threading.Barrier(8)
    ids: list[int] = []

    def start() -> None:
        barrier.wait()
        with Outbox.open(url) as outbox:
            ids.append(outbox.enqueue(rule_fired()))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ids) == list(range(1, 9))


def test_threads_that_open_different_new_files_at_once_all_succeed(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    ids: list[int] = []

    def start(number: int) -> None:
        barrier.wait()
        with Outbox.open(f"sqlite:///{tmp_path}/{number}.db") as outbox:
            ids.append(outbox.enqueue(rule_fired()))

    threads = [threading.Thread(target=start, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ids == [1] * 8


@pytest.mark.slow
def test_processes_that_open_one_new_file_at_once_all_succeed(
    url: str, tmp_path: Path, warm_python: WarmPython
) -> None:
    program = f"""
import sys
from outbox import Outbox, RuleFired
from datetime import datetime, timezone
print("ready", flush=True)
sys.stdin.readline()
with Outbox.open({url!r}) as outbox:
    event = RuleFired(rule_ids=[], session_id="s", fired_at=datetime.now(timezone.utc))
    print(outbox.enqueue(event))
"""
    processes = [
        subprocess.Popen(
            [*warm_python.command, "-c", program],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    outputs = []
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0
        outputs.append(int(output))
    assert sorted(outputs) == list(range(1, 9))


# Beside an application's own schema


def test_a_hosts_engine_can_be_upgraded_and_its_own_history_stays(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('host_42')"))
    schema.upgrade(engine)
    schema.upgrade(engine)
    with Outbox.open(engine) as outbox:
        assert outbox.enqueue(rule_fired()) == 1
    with engine.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == "host_42"
    engine.dispose()


def test_a_hosts_autogenerate_does_not_see_our_tables(outbox: Outbox) -> None:
    metadata = MetaData()
    Table("orders", metadata, Column("id", Integer, primary_key=True))
    metadata.create_all(outbox.engine)
    with outbox.engine.connect() as connection:
        seen = MigrationContext.configure(connection, opts={"include_name": schema.exclude_name})
        assert compare_metadata(seen, metadata) == []
        unfiltered = MigrationContext.configure(connection)
        assert "observation_events" in str(compare_metadata(unfiltered, metadata))


def test_our_own_check_does_not_see_the_hosts_tables(outbox: Outbox, url: str) -> None:
    execute(url, "CREATE TABLE orders (id INTEGER PRIMARY KEY); CREATE INDEX orders_idx ON orders (id)")
    command.check(alembic_here(url))


def test_a_hosts_engine_stays_open_when_its_schema_is_too_new(url: str) -> None:
    Outbox.open(url).close()
    execute(url, "UPDATE outbox_alembic_version SET version_num = 'outbox_9999'")
    engine = create_engine(url)
    pool = engine.pool
    with pytest.raises(SchemaError, match="outbox_9999"):
        Outbox.open(engine)
    assert engine.pool is pool
    engine.dispose()


def test_an_engine_of_ours_can_be_upgraded_by_hand(url: str) -> None:
    engine = open_engine(url)
    schema.upgrade(engine)
    with engine.connect() as connection:
        assert schema.current_revision(connection) == schema.REVISIONS[-1]
    engine.dispose()
    Outbox(url).close()


def test_an_upgrade_says_nothing_in_the_log_of_the_host(tmp_path: Path) -> None:
    program = """
import logging, sys
logging.basicConfig(level=logging.INFO)
from outbox import Outbox
Outbox.open(sys.argv[1]).close()
logging.getLogger("alembic.runtime.migration").info("of the host's own migrations")
"""
    url = f"sqlite:///{tmp_path / 'outbox.db'}"
    done = subprocess.run(
        [sys.executable, "-c", program, url], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stderr == "INFO:alembic.runtime.migration:of the host's own migrations\n"


def test_during_an_upgrade_the_warnings_and_the_other_threads_of_alembic_are_heard(caplog) -> None:
    log = logging.getLogger("alembic.runtime.migration")
    caplog.set_level(logging.INFO)
    with schema._quiet_alembic():
        log.info("a step")
        log.warning("a warning")
        other = threading.Thread(target=log.info, args=("of another thread",))
        other.start()
        other.join()
    assert caplog.messages == ["a warning", "of another thread"]


# Destinations, ids and holds

BASELINE_INSERT = (
    "INSERT INTO observation_events (event_type, occurred_at_ms, payload_json, created_at_ms)"
    " VALUES ('fix_outcome', 5, '{}', 5)"
)
INSERT_WITH_ID = (
    "INSERT INTO observation_events (event_type, occurred_at_ms, payload_json, created_at_ms, destination, event_id)"
    " VALUES ('fix_outcome', 5, '{}', 5, :destination, :event_id)"
)


def identities(outbox: Outbox) -> list[str]:
    with outbox.engine.connect() as connection:
        return list(connection.execute(text("SELECT id FROM observation_outbox")).scalars())


def insert_with_id(outbox: Outbox, destination: str, event_id: str | None) -> None:
    with outbox.engine.begin() as connection:
        connection.execute(text(INSERT_WITH_ID), {"destination": destination, "event_id": event_id})


@pytest.mark.contract
def test_rows_of_a_program_that_knows_no_destinations_go_to_the_default_one(outbox: Outbox) -> None:
    with outbox.engine.begin() as connection:
        connection.execute(text(BASELINE_INSERT))
        new = text("SELECT destination, event_id, not_before_ms, trace_context FROM observation_events")
        assert connection.execute(new).all() == [("", None, None, None)]


@pytest.mark.contract
def test_an_event_id_is_unique_in_its_destination_and_compared_byte_by_byte(outbox: Outbox) -> None:
    apart = [
        ("", None),
        ("", None),
        ("", "order-1"),
        ("", "ORDER-1"),
        ("billing", "order-1"),
        ("Billing", "order-1"),
    ]
    for destination, event_id in apart:
        insert_with_id(outbox, destination, event_id)
    for destination, event_id in apart[2:]:
        with pytest.raises(IntegrityError):
            insert_with_id(outbox, destination, event_id)
    assert len(outbox.find()) == len(apart)


@pytest.mark.contract
def test_a_database_has_one_id(outbox: Outbox) -> None:
    (found,) = identities(outbox)
    assert str(UUID(found)) == found


@pytest.mark.servers
@pytest.mark.parametrize("where", ["sqlite", "server"])
@pytest.mark.untraced
def test_the_id_survives_a_downgrade_and_an_upgrade(outbox: Outbox, tmp_path: Path, where: str) -> None:
    with Outbox.open(f"sqlite:///{tmp_path}/other.db") if where == "sqlite" else outbox as this:
        before = identities(this)
        move_schema(this, command.downgrade, "outbox_0006")
        move_schema(this, command.upgrade, "head")
        assert identities(this) == before


@pytest.mark.servers
@pytest.mark.parametrize("where", ["sqlite", "server"])
def test_no_downgrade_mixes_undelivered_events_of_several_destinations(
    outbox: Outbox, tmp_path: Path, where: str
) -> None:
    with Outbox.open(f"sqlite:///{tmp_path}/other.db") if where == "sqlite" else outbox as this:
        insert_with_id(this, "", "order-1")
        insert_with_id(this, "billing", "order-1")
        with pytest.raises(SchemaError, match="^1 undelivered events belong to destinations such as 'billing'"):
            move_schema(this, command.downgrade, "outbox_0006")
        with this.engine.begin() as connection:
            connection.execute(text("UPDATE observation_events SET status = 'sent' WHERE destination = 'billing'"))
        move_schema(this, command.downgrade, "outbox_0006")
        move_schema(this, command.upgrade, "head")
        assert [found.status for found in this.find()] == ["pending", "sent"]


def move_schema(outbox: Outbox, move: Callable[[Config, str], None], revision: str) -> None:
    config = schema.alembic_config()
    with migrating(outbox.engine) as connection:
        config.attributes["connection"] = connection
        move(config, revision)
