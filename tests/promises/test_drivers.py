"""Every driver that hosts use, with every isolation setting: what the outbox says is done is done, and the host's own
settings are left as they were."""

from __future__ import annotations

import sqlite3
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from inspect import isbuiltin, ismethod, signature
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.engine.default import DefaultDialect

from builders import DOWN, NOON, ScriptedClient, refuse_third, rule_fired
from outbox import ConfigurationError, Outbox, Policy, StorageError
from outbox.storage import transactions
from outbox.storage.engines import open_engine
from servers import MissingError, Servers, skip

LEVELS = ("REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT")


def autocommit_by_attribute(engine: Engine) -> None:
    event.listen(engine, "connect", lambda connection, _record: setattr(connection, "autocommit", True))


def begins_itself(engine: Engine) -> None:
    """SQLAlchemy's recipe for SQLite."""
    event.listen(engine, "connect", lambda connection, _record: setattr(connection, "isolation_level", None))
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))


class As312(sqlite3.Connection):
    """Does on an older Python what `autocommit=` of 3.12 does."""

    def __init__(self, *arguments, autocommit: bool, **options) -> None:
        super().__init__(*arguments, **options)
        self.isolation_level = None
        self.autocommit = autocommit
        self._begin()

    def commit(self) -> None:
        if not self.autocommit:
            self.execute("COMMIT")
            self._begin()

    def rollback(self) -> None:
        if not self.autocommit:
            self.execute("ROLLBACK")
            self._begin()

    def _begin(self) -> None:
        if not self.autocommit:
            self.execute("BEGIN")


# The drivers of each database, the module of each, and how hosts let the driver itself commit each statement.
DRIVERS: dict[str, dict[str, tuple[str, Any]]] = {
    "postgresql": {
        "postgresql+psycopg": ("psycopg", {"autocommit": True}),
        "postgresql+psycopg2": ("psycopg2", autocommit_by_attribute),
        "postgresql+pg8000": ("pg8000", autocommit_by_attribute),
    },
    "mariadb": {
        "mysql+pymysql": ("pymysql", {"autocommit": True}),
        "mysql+mysqldb": ("MySQLdb", {"autocommit": True}),
        "mysql+mysqlconnector": ("mysql.connector", {"autocommit": True}),
        "mysql+mariadbconnector": ("mariadb", {"autocommit": True}),
        "mariadb+pymysql": ("pymysql", {"autocommit": True}),
    },
}
# Where the setting skips the driver's own rollback, nobody else ends a transaction that failed.
SKIPS_ROLLBACK = {"skip_autocommit_rollback": True}
CAN_SKIP_ROLLBACK = "skip_autocommit_rollback" in signature(DefaultDialect).parameters

OURS: dict[str, Any] = {}
"""The settings of an engine that the outbox makes of a URL."""

SQLITE: dict[str, tuple[dict[str, Any], Any]] = {
    "default": ({}, None),
    **{level: ({"isolation_level": level}, None) for level in ("SERIALIZABLE", "READ UNCOMMITTED", "AUTOCOMMIT")},
    "driver begins nothing": ({"connect_args": {"isolation_level": None}}, None),
    "driver begins IMMEDIATE": ({"connect_args": {"isolation_level": "IMMEDIATE"}}, None),
    "begins itself": ({}, begins_itself),
}
for autocommit in (True, False):
    options: dict[str, Any] = {"autocommit": autocommit}
    if sys.version_info < (3, 12):
        options = {"factory": partial(As312, autocommit=autocommit)}
    SQLITE[f"autocommit={autocommit}"] = ({"connect_args": options}, None)
if CAN_SKIP_ROLLBACK:
    SQLITE["AUTOCOMMIT, no rollback"] = ({"isolation_level": "AUTOCOMMIT", **SKIPS_ROLLBACK}, None)


def table() -> Iterator[Any]:
    for name, (settings, prepare) in SQLITE.items():
        marks = pytest.mark.traced if name == "autocommit=False" else ()
        yield pytest.param("sqlite", "sqlite", "sqlite3", settings, prepare, id=f"sqlite-{name}", marks=marks)
    for database, drivers in DRIVERS.items():
        for driver, (module, autocommit) in drivers.items():
            cases: dict[str, tuple[dict[str, Any], Any]] = {
                "default": ({}, None),
                **{level: ({"isolation_level": level}, None) for level in LEVELS},
                "driver's autocommit": ({}, autocommit)
                if callable(autocommit)
                else ({"connect_args": autocommit}, None),
            }
            if CAN_SKIP_ROLLBACK:
                cases["AUTOCOMMIT, no rollback"] = ({"isolation_level": "AUTOCOMMIT", **SKIPS_ROLLBACK}, None)
            if driver == "mariadb+pymysql":
                cases = {"default": ({}, None)}
            if driver.endswith("psycopg2"):
                cases["batches"] = ({"executemany_mode": "values_plus_batch"}, None)
            for name, (settings, prepare) in cases.items():
                case = (database, driver, module, settings, prepare)
                marks = [pytest.mark.slow, *([pytest.mark.traced] if name == "batches" else [])]
                yield pytest.param(*case, id=f"{driver}-{name}", marks=marks)


@pytest.fixture
def host(url: str, driver: str, module: str, settings: dict[str, Any], prepare: Any) -> Iterator[Engine]:
    """The host's engine; the fixture `outbox` has a driver and connections of its own."""
    try:
        import_module(module)
    except ImportError:
        skip(MissingError(f"no driver {module}; pip installs it from the groups drivers and compiled-drivers"))
    name = make_url(url).set(drivername=driver)
    engine = open_engine(name) if settings is OURS else create_engine(name, **settings)
    if prepare:
        prepare(engine)
    yield engine
    engine.dispose()


over_the_table = pytest.mark.parametrize(
    ("database", "driver", "module", "settings", "prepare"), list(table()), indirect=["database"]
)


def seen(outbox: Outbox) -> list[tuple[str, int]]:
    """What another connection sees of each row, by id."""
    return [(found.status, found.retry_count) for found in sorted(outbox.find(), key=lambda found: found.id)]


@over_the_table
def test_what_is_done_on_a_hosts_engine_is_seen_by_others_and_leaves_its_settings(
    outbox: Outbox, host: Engine
) -> None:
    before = settings_of(host)
    with Outbox(host, policy=Policy(max_rows=20, when_full="trim")) as hosted:
        assert hosted.enqueue(rule_fired()) == 1
        assert seen(outbox) == [("pending", 0)]
        assert hosted.enqueue_many([rule_fired()] * 6) == [2, 3, 4, 5, 6, 7]
        assert seen(outbox) == [("pending", 0)] * 7

        report = hosted.flush(ScriptedClient(DOWN))
        assert (report.attempted, report.rescheduled, report.lost_leases) == (7, 7, 0)
        assert seen(outbox) == [("pending", 1)] * 7
        assert hosted.retry_now() == 7
        assert outbox.stats().next_due_at_ms == hosted.stats().next_due_at_ms <= outbox.store.now_ms()

        report = hosted.flush(ScriptedClient())
        assert (report.sent, report.lost_leases) == (7, 0)
        assert seen(outbox) == [("sent", 1)] * 7
        assert hosted.get(1).payload_json == outbox.get(1).payload_json
        hosted.enqueue_many([rule_fired(session_id="ü€😀")] * 20)
        assert Counter(seen(outbox)) == {("pending", 0): 20}
        assert hosted.stats().left_undelivered == outbox.stats().left_undelivered == 0
        assert hosted.get(10).session_id == "ü€😀"
        hosted.requeue_abandoned(older_than=NOON)
        assert settings_of(host) == before


@over_the_table
def test_what_fails_on_a_hosts_engine_leaves_nothing_behind(outbox: Outbox, host: Engine) -> None:
    refuse_third(outbox)
    with Outbox(host) as hosted:
        with pytest.raises(StorageError, match="the third one is refused") as caught:
            hosted.enqueue_many([rule_fired(), rule_fired(), rule_fired(session_id="third")])
        assert "INSERT INTO" not in "".join(traceback.format_exception(caught.value)).replace(__file__, "")
        assert seen(outbox) == []
        hosted.enqueue(rule_fired())
        assert seen(outbox) == [("pending", 0)]


def settings_of(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        driver: Any = connection.connection.dbapi_connection
        found = [getattr(driver, name, None) for name in ("autocommit", "isolation_level", "text_factory")]
        told = [driver.get_autocommit()] if hasattr(driver, "get_autocommit") else []
        # The methods of a driver differ from connection to connection.
        return [
            connection.get_isolation_level(),
            *told,
            *(one for one in found if not (ismethod(one) or isbuiltin(one))),
        ]


@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="the driver does not tell SQLITE_BUSY_SNAPSHOT from the rest"
)
@pytest.mark.usefixtures("noon")
def test_a_transaction_that_read_before_another_wrote_is_tried_again(outbox: Outbox, url: str) -> None:
    """A host's BEGIN takes no lock, so what was read may be old when the claim wants to write.

    The time stands still, so the row that the other writes is due when the claim reads again.
    """
    engine = create_engine(url)
    begins_itself(engine)
    others = [outbox]

    @event.listens_for(engine, "before_cursor_execute")
    def _write_meanwhile(_connection, _cursor, statement, *_):
        if statement.startswith("UPDATE") and others:
            others.pop().enqueue(rule_fired())

    with Outbox(engine) as hosted:
        hosted.enqueue(rule_fired())
        assert hosted.flush(ScriptedClient()).sent == 2
    assert others == []
    assert seen(outbox) == [("sent", 0), ("sent", 0)]
    engine.dispose()


# What the servers answer, as each driver tells it


def with_each_driver(name: str = "", codes: dict[str, list[Any]] | None = None) -> pytest.MarkDecorator:
    """Run the test with each driver, and with each of the codes that its server has."""
    cases = [
        pytest.param(
            database, driver, module, {"pool_size": 8}, None, *code, id=f"{driver}-{code}", marks=pytest.mark.slow
        )
        for database, drivers in DRIVERS.items()
        for driver, (module, _) in drivers.items()
        for code in ([(one,) for one in codes[database]] if codes else [()])
    ]
    names = ["database", "driver", "module", "settings", "prepare", *([name] if name else [])]
    return pytest.mark.parametrize(names, cases, indirect=["database"])


def answer(outbox: Outbox, how: dict[str, str]) -> None:
    """Let the server answer an INSERT with an error of its own, by a trigger."""
    is_postgresql = outbox.engine.dialect.name == "postgresql"
    statements = [
        "DROP SEQUENCE IF EXISTS answers",
        "CREATE SEQUENCE answers",
        f"CREATE OR REPLACE FUNCTION answer() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {how['postgresql']};"
        " RETURN NEW; END $$",
        "CREATE TRIGGER answer BEFORE INSERT ON observation_events FOR EACH ROW EXECUTE FUNCTION answer()",
    ]
    if not is_postgresql:
        statements = [f"CREATE TRIGGER answer BEFORE INSERT ON observation_events FOR EACH ROW {how['mariadb']}"]
    with outbox.engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


# SQLSTATE and, of MariaDB, the number.
CONFLICTS = {"postgresql": [("40001", 0), ("40P01", 0)], "mariadb": [("40001", 1213), ("HY000", 1205)]}


@with_each_driver("code", CONFLICTS)
def test_a_conflict_is_tried_again_however_the_driver_tells_it(
    outbox: Outbox, host: Engine, database: str, code: tuple[str, int]
) -> None:
    sqlstate, number = code
    signal = f"SIGNAL SQLSTATE '{sqlstate}' SET MYSQL_ERRNO = {number}, MESSAGE_TEXT = 'not now'"
    once = {
        "postgresql": f"IF nextval('answers') = 1 THEN RAISE EXCEPTION USING ERRCODE = '{sqlstate}'; END IF",
        "mariadb": f"IF @answered IS NULL THEN SET @answered = 1; {signal}; END IF",
    }
    answer(outbox, once)
    with Outbox(host) as hosted:
        hosted.enqueue(rule_fired())
    assert seen(outbox) == [("pending", 0)]
    has_answered = {"postgresql": "SELECT last_value = 2 FROM answers", "mariadb": "SELECT @answered = 1"}
    with host.connect() as connection:
        assert connection.exec_driver_sql(has_answered[database]).scalar()


@with_each_driver("number", {"postgresql": [25006], "mariadb": [1047, 1290, 1836]})
def test_a_server_that_became_read_only_is_left_for_a_new_connection(
    outbox: Outbox, host: Engine, database: str, number: int
) -> None:
    """As after a switchover: the pool's connections lead to the old primary, and a new one to the new primary."""
    demote = {
        "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
        "mariadb": "SET @demoted = 1",
    }
    words = "the server is running with the --read-only option"
    signal = f"SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {number}, MESSAGE_TEXT = '{words}'"
    answer(outbox, {"postgresql": "NULL", "mariadb": f"IF @demoted THEN {signal}; END IF"})
    with Outbox(host) as hosted:
        connections = [host.connect() for _ in range(8)]
        for connection in connections:
            connection.exec_driver_sql(demote[database])
            connection.commit()
            connection.close()
        assert hosted.enqueue(rule_fired()) > 0
        assert seen(outbox) == [("pending", 0)]
        assert hosted.flush(ScriptedClient()).sent == 1
        assert [hosted.enqueue(rule_fired()) > 0 for _ in range(8)] == [True] * 8


@with_each_driver()
def test_a_server_that_stays_read_only_is_told_in_its_own_words(
    outbox: Outbox, host: Engine, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "waits_s", lambda _: iter([0] * 2))
    answer(
        outbox,
        {
            "postgresql": "RAISE EXCEPTION USING ERRCODE = '25006', MESSAGE = 'it is read-only'",
            "mariadb": "SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1290, MESSAGE_TEXT = 'it is read-only'",
        },
    )
    with Outbox(host) as hosted, pytest.raises(StorageError, match="it is read-only"):
        hosted.enqueue(rule_fired())
    assert seen(outbox) == []


@with_each_driver()
@pytest.mark.traced
def test_connections_that_were_killed_cost_no_event(
    outbox: Outbox, host: Engine, database: str, servers: Servers
) -> None:
    with Outbox(host) as hosted:
        idle = [host.connect() for _ in range(8)]
        for connection in idle:
            connection.close()
        outbox.engine.dispose()  # reading is not tried again
        assert servers.get(database).kill_connections(host.url) >= 8
        hosted.enqueue(rule_fired())
        assert hosted.flush(ScriptedClient()).sent == 1
    assert seen(outbox) == [("sent", 0)]


# Which drivers are refused


REFUSED = {
    "postgresql+asyncpg": "driver is postgresql+asyncpg (asynchronous), expected one of postgresql+psycopg, ",
    "mysql+cymysql": "driver is mysql+cymysql, expected one of mysql+pymysql, ",
    "mssql+pymssql": "no dialect for the database 'mssql', expected one of ",
}


@pytest.mark.parametrize("opener", [Outbox, Outbox.open])
@pytest.mark.parametrize("drivername", REFUSED)
@pytest.mark.traced
def test_another_driver_is_refused_by_name(drivername: str, opener) -> None:
    url = f"{drivername}://localhost/shop"
    for database in (url, create_engine(url, module=sqlite3)):  # any module will do, nothing connects
        with pytest.raises(ConfigurationError) as caught:
            opener(database)
        assert REFUSED[drivername] in str(caught.value)
