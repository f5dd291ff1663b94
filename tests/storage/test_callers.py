"""In the transaction of a caller: whatever the caller hands over works, or is refused in words."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import URL, Engine, String, create_engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from builders import ScriptedClient, add_row, row, rule_fired, statuses
from outbox import ConfigurationError, ObservationEvent, Outbox, OutboxError, Policy, StorageError
from outbox.storage import inserts
from servers import Servers

SECRET = "s3cr3t"

# Drivers


def connect(driver: str, url: URL, **options: Any) -> Any:
    """Connect as a program without SQLAlchemy would."""
    if driver == "sqlite3":
        return sqlite3.connect(url.database)
    names = {"database": "dbname" if driver in {"psycopg", "psycopg2"} else "database"}
    server = {"host": url.host, "port": url.port, "user": url.username, names["database"]: url.database}
    given = {name: value for name, value in server.items() if value is not None}
    return import_module(driver).connect(**given, **options)


def with_attribute(name: str, value: Any) -> Callable[[Any], object]:
    return lambda connection: setattr(connection, name, value)


class OfTheHost:
    def __init__(self, *_: object, **__: object) -> None:
        pass


def options(driver: str) -> dict[str, tuple[dict[str, Any], Callable[[Any], object]]]:
    """The ways in which hosts let a driver make rows: options of its `connect`, and what is done after it."""
    after = with_attribute
    none: tuple[dict[str, Any], Callable[[Any], object]] = ({}, lambda _: None)
    if driver == "sqlite3":
        return {
            "plain": none,
            "Row": ({}, after("row_factory", sqlite3.Row)),
            "own": ({}, after("row_factory", OfTheHost)),
        }
    if driver == "psycopg":
        rows, psycopg = import_module("psycopg.rows"), import_module("psycopg")
        return {
            "plain": none,
            "dict_row": ({"row_factory": rows.dict_row}, lambda _: None),
            "namedtuple_row": ({"row_factory": rows.namedtuple_row}, lambda _: None),
            "scalar_row": ({"row_factory": rows.scalar_row}, lambda _: None),
            "class_row": ({"row_factory": rows.class_row(OfTheHost)}, lambda _: None),
            "RawCursor": ({"cursor_factory": psycopg.RawCursor}, lambda _: None),
            "ClientCursor": ({"cursor_factory": psycopg.ClientCursor}, lambda _: None),
        }
    if driver == "psycopg2":
        extras = import_module("psycopg2.extras")
        cursors = (extras.RealDictCursor, extras.DictCursor, extras.NamedTupleCursor)
        return {"plain": none, **{one.__name__: ({"cursor_factory": one}, lambda _: None) for one in cursors}}
    if driver in {"pymysql", "MySQLdb"}:
        cursors = import_module(f"{driver}.cursors")
        names = ("DictCursor", "SSCursor", "SSDictCursor")
        return {
            "plain": none,
            **{name: ({"cursorclass": getattr(cursors, name)}, lambda _: None) for name in names},
        }
    return {"plain": none}


DRIVERS = {
    "sqlite": ("sqlite3",),
    "postgresql": ("psycopg", "psycopg2", "pg8000.dbapi"),
    "mariadb": ("pymysql", "MySQLdb", "mysql.connector", "mariadb"),
}


def cases() -> Iterator[Any]:
    for database, drivers in DRIVERS.items():
        for driver in drivers:
            marks = [pytest.mark.slow] if database != "sqlite" else []
            try:
                found = options(driver)
                import_module(driver)
            except ImportError:
                marks.append(pytest.mark.skip(f"{driver} is not installed"))
                found = {"plain": None}
            for name in found:
                yield pytest.param(database, driver, name, marks=marks, id=f"{driver}-{name}")


over_the_drivers = pytest.mark.parametrize(("database", "driver", "rows"), list(cases()), indirect=["database"])


@pytest.fixture
def connection(outbox: Outbox, driver: str, rows: str) -> Iterator[Any]:
    given, prepare = options(driver)[rows]
    with closing(connect(driver, outbox.engine.url, **given)) as made:
        prepare(made)
        yield made


@over_the_drivers
def test_on_a_drivers_connection_events_come_with_the_commit_whatever_its_rows_are(
    outbox: Outbox, url: str, connection: Any
) -> None:
    add_row(outbox)
    with Outbox(url, policy=Policy(max_rows=9, when_full="reject")) as joining:  # which looks how many there are
        ids = [joining.enqueue(rule_fired(), connection=connection)]
        connection.rollback()
        assert statuses(outbox) == ["pending"]
        ids.append(joining.enqueue(rule_fired(session_id="a%b?c:d$1"), connection=connection))
        ids += joining.enqueue_many([rule_fired()] * 6, connection=connection)
        assert statuses(outbox) == ["pending"]
        connection.commit()
    assert len(statuses(outbox)) == 8
    assert ids == sorted(ids)
    assert row(outbox, ids[1]).session_id == "a%b?c:d$1"
    assert [found.id for found in outbox.find()][1:] == ids[1:]


@over_the_drivers
def test_on_a_drivers_connection_an_id_is_recorded_once(
    outbox: Outbox, connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a", None, "b"]
    ids = outbox.enqueue_many([rule_fired()] * 3, event_ids=names, connection=connection)
    # As if other transactions recorded them just now.
    monkeypatch.setattr(inserts, "known", lambda *_: {})
    again = outbox.enqueue_many([rule_fired()] * 3, event_ids=["b", "c", "a"], connection=connection)
    connection.commit()
    assert [again[0], again[2]] == [ids[2], ids[0]]
    assert [row(outbox, row_id).event_id for row_id in again] == ["b", "c", "a"]
    assert [found.id for found in outbox.find()] == [*ids, again[1]]


@over_the_drivers
def test_a_drivers_connection_that_is_closed_is_a_storage_error(
    outbox: Outbox, driver: str, connection: Any, rows: str
) -> None:
    other = connect(driver, outbox.engine.url, **options(driver)[rows][0])
    other.close()
    with pytest.raises(StorageError):
        outbox.enqueue(rule_fired(), connection=other)
    assert statuses(outbox) == []


@pytest.fixture
def host(url: str) -> Iterator[Engine]:
    """The application's own engine on the same database."""
    engine = create_engine(url)
    yield engine
    engine.dispose()


@pytest.mark.contract
def test_the_pool_may_hand_out_the_drivers_connection(outbox: Outbox, host: Engine) -> None:
    pooled = host.raw_connection()
    outbox.enqueue(rule_fired(), connection=pooled)
    assert statuses(outbox) == []
    pooled.commit()
    assert statuses(outbox) == ["pending"]
    pooled.close()
    with pytest.raises(ConfigurationError, match="connection has the type NoneType, expected an SQLAlchemy Conn"):
        outbox.enqueue(rule_fired(), connection=pooled)


class Proxy:
    """Stands for a connection like the proxies of tools that trace."""

    def __init__(self, wrapped: object) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    @property
    def __class__(self) -> type:
        return self._wrapped.__class__


@pytest.mark.parametrize("kind", ["session", "connection"])
def test_a_proxy_is_what_it_stands_for(outbox: Outbox, host: Engine, kind: str) -> None:
    woken: list[str] = []
    outbox.wakers.add(lambda: woken.append(kind))
    with Session(host) as session, closing(sqlite3.connect(outbox.engine.url.database)) as connection:
        given = {"session": session, "connection": connection}[kind]
        outbox.enqueue(rule_fired(), **{kind: Proxy(given)})
        assert statuses(outbox) == []
        given.commit()
    assert statuses(outbox) == ["pending"]
    assert woken == (["session"] if kind == "session" else [])


# An SQLAlchemy Connection


@pytest.mark.contract
def test_on_a_connection_of_sqlalchemy_events_come_with_the_commit(outbox: Outbox, host: Engine) -> None:
    with host.connect() as connection:
        outbox.enqueue(rule_fired(), connection=connection)
        connection.rollback()
        ids = outbox.enqueue_many([rule_fired()] * 6, connection=connection)
        nested = connection.begin_nested()
        outbox.enqueue(rule_fired(), connection=connection)
        nested.rollback()
        assert statuses(outbox) == []
        connection.commit()
    assert [found.id for found in outbox.find()] == ids


@pytest.mark.contract
def test_in_a_transaction_that_can_not_be_used_it_says_so(outbox: Outbox, host: Engine) -> None:
    with host.connect() as connection:
        pass
    with pytest.raises(StorageError, match="can't be used: This Connection is closed"):
        outbox.enqueue(rule_fired(), connection=connection)
    with host.connect() as connection:
        connection.invalidate()
        outbox.enqueue(rule_fired(), connection=connection)  # it connects anew
        connection.invalidate()
        with pytest.raises(StorageError, match="can't be used: Can't reconnect until invalid transaction"):
            outbox.enqueue(rule_fired(), connection=connection)
    assert statuses(outbox) == []


# A session


class HostBase(DeclarativeBase):
    pass


class Secret(HostBase):
    __tablename__ = "secrets"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
    kind: Mapped[str] = mapped_column(String(50))


def test_a_session_that_waits_for_a_rollback_says_so_without_the_callers_parameters(
    outbox: Outbox, host: Engine
) -> None:
    HostBase.metadata.create_all(host)
    with Session(host) as session:
        session.add(Secret(id=1, name=SECRET, kind=None))
        with pytest.raises(IntegrityError, match=SECRET):
            session.flush()
        with pytest.raises(StorageError, match="can't be used: .*Session.rollback") as refused:
            outbox.enqueue(rule_fired(), session=session)
        assert SECRET not in str(refused.value)
        session.rollback()
        outbox.enqueue(rule_fired(), session=session)
        session.commit()
    assert statuses(outbox) == ["pending"]


def test_a_session_that_is_closed_for_good_says_so(outbox: Outbox, host: Engine) -> None:
    session = Session(host, close_resets_only=False)
    session.close()
    with pytest.raises(StorageError, match="can't be used: This Session has been permanently closed"):
        outbox.enqueue(rule_fired(), session=session)


def test_a_session_that_chooses_its_engine_is_told_what_is_written(outbox: Outbox, host: Engine) -> None:
    told = []

    class Routing(Session):
        """As SQLAlchemy's documentation shows it."""

        def get_bind(self, mapper=None, clause=None):
            told.append((mapper.class_, clause.is_insert, clause.table.name))
            return host

    with Routing() as session:
        outbox.enqueue(rule_fired(), session=session)
        session.commit()
    assert told == [(ObservationEvent, True, "observation_events")]
    assert statuses(outbox) == ["pending"]


# Transactions in two phases


@pytest.fixture
def prepares(servers: Servers) -> None:
    server = servers.get("postgresql")
    if server.run("SHOW max_prepared_transactions") == [("0",)]:
        pytest.skip(f"max_prepared_transactions of {server.url} is 0")


@pytest.mark.servers("postgresql")
@pytest.mark.usefixtures("prepares")
@pytest.mark.parametrize("driver", ["psycopg", "pg8000.dbapi"])
def test_a_drivers_transaction_in_two_phases_can_be_prepared(outbox: Outbox, driver: str) -> None:
    pytest.importorskip(driver)
    with closing(connect(driver, outbox.engine.url)) as connection:
        connection.tpc_begin(connection.xid(0, f"outbox-{uuid4().hex}", ""))
        outbox.enqueue_many([rule_fired()] * 5, connection=connection)
        outbox.enqueue(rule_fired(), connection=connection)
        connection.tpc_prepare()
        assert statuses(outbox) == []
        connection.tpc_commit()
    assert statuses(outbox) == ["pending"] * 6


@pytest.mark.servers("postgresql")
@pytest.mark.usefixtures("prepares")
def test_psycopg2_shows_no_two_phases_so_such_a_transaction_of_its_own_can_not_be_prepared(outbox: Outbox) -> None:
    psycopg2 = pytest.importorskip("psycopg2")
    with closing(connect("psycopg2", outbox.engine.url)) as connection:
        connection.tpc_begin(connection.xid(0, f"outbox-{uuid4().hex}", ""))
        outbox.enqueue(rule_fired(), connection=connection)
        with pytest.raises(psycopg2.Error, match="NOTIFY"):
            connection.tpc_prepare()
    assert statuses(outbox) == []


@pytest.mark.servers("postgresql")
@pytest.mark.usefixtures("prepares")
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pg8000"])
def test_a_transaction_of_sqlalchemy_in_two_phases_can_be_prepared(outbox: Outbox, driver: str) -> None:
    pytest.importorskip(driver)
    engine = create_engine(outbox.engine.url.set(drivername=f"postgresql+{driver}"))
    with engine.connect() as connection:
        transaction = connection.begin_twophase()
        outbox.enqueue(rule_fired(), connection=connection)
        transaction.prepare()
        transaction.commit()
    with Session(engine, twophase=True) as session:
        outbox.enqueue(rule_fired(), session=session)
        session.prepare()
        session.commit()
    engine.dispose()
    assert statuses(outbox) == ["pending"] * 2


# Schemas

MAPPED: dict[str, Any] = {"schema_translate_map": {None: "of_a_tenant"}}


@pytest.mark.contract
def test_a_hosts_map_of_schemas_does_not_move_the_events(outbox: Outbox, host: Engine) -> None:
    mapped = host.execution_options(**MAPPED)
    with Outbox.open(mapped) as hosted:
        ids = [hosted.enqueue(rule_fired())]
        assert hosted.flush(ScriptedClient()).sent == 1
        with Session(mapped) as session:
            ids += hosted.enqueue_many([rule_fired()] * 6, session=session)
            session.commit()
        with host.connect().execution_options(**MAPPED) as connection:
            ids.append(hosted.enqueue(rule_fired(), connection=connection))
            connection.commit()
        assert [found.id for found in hosted.find()] == ids
        assert hosted.get(ids[0]).status == "sent"
        assert hosted.pending_count() == hosted.stats().counts["pending"] == 7
        assert hosted.purge(event_type="rule_fired").total == 8
    assert statuses(outbox) == []


def test_a_hosts_map_of_schemas_does_not_move_the_tables(tmp_path: Path) -> None:
    mapped = create_engine(f"sqlite:///{tmp_path / 'host.db'}", execution_options=MAPPED)
    with Outbox.open(mapped) as hosted:
        assert hosted.enqueue(rule_fired()) == 1
    mapped.dispose()


# What can't be used


class NoneLike:
    def __eq__(self, other: object) -> bool:
        return other is None

    def __hash__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return False


ANY_SESSION = "expected an SQLAlchemy Session"
ANY_CONNECTION = (
    "expected an SQLAlchemy Connection, or the connection of sqlite3, psycopg, psycopg2, pg8000, PyMySQL"
)
RUN_SYNC = "it is asynchronous: await session.run_sync(lambda sync: outbox.enqueue(event, session=sync))"
AS_SESSION = "pass it as session"
AS_CONNECTION = "pass it as connection"


@pytest.fixture
def objects(outbox: Outbox, host: Engine) -> Iterator[list[tuple[Any, str | None, str | None]]]:
    """Objects, and what has to be said of each as session and as connection; None where it can be used."""
    through = create_async_engine(host.url.set(drivername="sqlite+aiosqlite"))
    makes = async_sessionmaker(through)
    with (
        closing(sqlite3.connect(host.url.database)) as driven,
        host.connect() as connection,
        Session(host) as session,
    ):
        yield [
            (
                f"postgresql://app:{SECRET}@db/shop",
                "type str, expected an SQLAlchemy Session",
                "type str, expected",
            ),
            *(
                (one, ANY_SESSION, ANY_CONNECTION)
                for one in (0, False, "", b"", [], {}, NoneLike(), object(), Session)
            ),
            (host, "pass a session or a connection of it", "pass a session or a connection of it"),
            (sessionmaker(host), "call it, and pass the session", "call it, and pass the session"),
            (session, None, AS_SESSION),
            (scoped_session(lambda: session), None, AS_SESSION),
            (scoped_session(lambda: "text"), "session is bound to something that is no engine", AS_SESSION),
            (Session("sqlite://"), "session is bound to something that is no engine", AS_SESSION),
            (connection, AS_CONNECTION, None),
            (driven, "type sqlite3.Connection, expected an SQLAlchemy Session; pass it as connection", None),
            (driven.cursor(), "pass its connection", "pass its connection"),
            (through, RUN_SYNC, RUN_SYNC),
            (makes, RUN_SYNC, RUN_SYNC),
            (AsyncSession(through), RUN_SYNC, RUN_SYNC),
            (AsyncSession(through).sync_session, RUN_SYNC, AS_SESSION),
            (scoped_session(makes), RUN_SYNC, AS_SESSION),
            (async_scoped_session(makes, lambda: 1), RUN_SYNC, RUN_SYNC),
            (AsyncConnection(through), *[RUN_SYNC.replace("session", "connection")] * 2),
        ]


@pytest.mark.filterwarnings("ignore:Using `scoped_session` with asyncio")
def test_whatever_can_not_be_used_is_refused_in_words(outbox: Outbox, objects: list[Any]) -> None:
    for given, *words in objects:
        for kind, expected in zip(("session", "connection"), words, strict=True):
            told = None
            try:
                outbox.enqueue(rule_fired(), **{kind: given})
            except OutboxError as error:
                told = str(error)
            if expected is None:
                assert told is None
                given.rollback()
            else:
                assert expected in (told or ""), (kind, given)
                assert SECRET not in told
                assert f"{kind} " in told
    assert statuses(outbox) == []


def test_two_transactions_at_once_are_refused(outbox: Outbox, host: Engine) -> None:
    with (
        host.connect() as connection,
        Session(host) as session,
        pytest.raises(ConfigurationError, match="both given"),
    ):
        outbox.enqueue(rule_fired(), session=session, connection=connection)


@pytest.mark.servers
@pytest.mark.parametrize("kind", ["session", "connection", "driver's connection"])
def test_a_transaction_on_another_kind_of_database_is_refused(outbox: Outbox, kind: str) -> None:
    other = create_engine("sqlite://")
    with other.connect() as connection, Session(other) as session:
        given = {
            "session": {"session": session},
            "connection": {"connection": connection},
            "driver's connection": {"connection": connection.connection.driver_connection},
        }
        words = f"the outbox is on {outbox.engine.dialect.name}, but the caller's transaction on sqlite"
        with pytest.raises(ConfigurationError, match=words):
            outbox.enqueue(rule_fired(), **given[kind])
    other.dispose()


@pytest.mark.parametrize("is_proxy", [False, True])
def test_the_wrapper_of_django_is_refused_with_what_to_pass_instead(outbox: Outbox, is_proxy: bool) -> None:
    base = pytest.importorskip("django.db.backends.sqlite3.base")
    utils = pytest.importorskip("django.utils.connection")
    settings = {"NAME": outbox.engine.url.database, "OPTIONS": {}, "AUTOCOMMIT": True, "TIME_ZONE": None}
    wrapper = base.DatabaseWrapper({**settings, "CONN_HEALTH_CHECKS": False, "CONN_MAX_AGE": 0}, "default")
    given = utils.ConnectionProxy({"default": wrapper}, "default") if is_proxy else wrapper
    with pytest.raises(ConfigurationError, match=r"has the type django\..*; pass its connection\.connection"):
        outbox.enqueue(rule_fired(), connection=given)
    wrapper.connect()
    outbox.enqueue(rule_fired(), connection=given.connection)
    wrapper.close()
    assert statuses(outbox) == ["pending"]


# In a program that is asynchronous


ASYNC = {
    "sqlite": ("sqlite+aiosqlite",),
    "postgresql": ("postgresql+asyncpg", "postgresql+psycopg_async"),
}


def in_async(url: URL, work: Callable[[AsyncEngine], Any]) -> Any:
    async def run() -> Any:
        engine = create_async_engine(url)
        try:
            return await work(engine)
        finally:
            await engine.dispose()

    return asyncio.run(run())


over_the_async_drivers = pytest.mark.parametrize(
    ("database", "driver"),
    [
        pytest.param(database, driver, marks=[pytest.mark.slow] if database != "sqlite" else [])
        for database, drivers in ASYNC.items()
        for driver in drivers
    ],
    indirect=["database"],
)


@pytest.fixture
def async_url(outbox: Outbox, driver: str) -> URL:
    pytest.importorskip(driver.partition("+")[2].removesuffix("_async"))
    return outbox.engine.url.set(drivername=driver)


@over_the_async_drivers
def test_in_run_sync_of_an_async_session_events_come_with_the_commit(outbox: Outbox, async_url: URL) -> None:
    async def work(engine: AsyncEngine) -> list[int]:
        async with AsyncSession(engine) as session:
            await session.run_sync(lambda sync: outbox.enqueue(rule_fired(), session=sync))
            await session.rollback()
            one = await session.run_sync(lambda sync: outbox.enqueue(rule_fired(session_id="a\0b"), session=sync))
            many = await session.run_sync(lambda sync: outbox.enqueue_many([rule_fired()] * 6, session=sync))
            assert statuses(outbox) == []
            await session.commit()
            return [one, *many]

    ids = in_async(async_url, work)
    assert [found.id for found in outbox.find()] == ids


@over_the_async_drivers
def test_in_run_sync_of_an_async_connection_events_come_with_the_commit(outbox: Outbox, async_url: URL) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            for end in (connection.rollback, connection.commit):
                await connection.run_sync(lambda sync: outbox.enqueue_many([rule_fired()] * 2, connection=sync))
                assert statuses(outbox) == []
                await end()

    in_async(async_url, work)
    assert statuses(outbox) == ["pending"] * 2


@over_the_async_drivers
def test_the_drivers_connection_of_an_async_session_is_refused(
    outbox: Outbox, async_url: URL, driver: str
) -> None:
    async def work(engine: AsyncEngine) -> str:
        async with engine.connect() as connection:
            raw = await connection.get_raw_connection()
            with pytest.raises(ConfigurationError) as refused:
                outbox.enqueue(rule_fired(), connection=raw.driver_connection)
            return str(refused.value)

    assert RUN_SYNC in in_async(async_url, work)
