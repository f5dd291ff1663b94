"""What differs on a Galera cluster. tests/rigs starts a real cluster. These tests make one server believe that it is in a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from sqlalchemy import URL, Engine, event, inspect
from sqlalchemy.exc import DBAPIError

from conditions import until
from crowd import Crowd
from outbox import StorageError, schema
from outbox.storage import galera, patience
from outbox.storage.engines import open_engine, writing
from servers import Servers

pytestmark = pytest.mark.servers("mariadb")


@pytest.fixture
def empty(database: str, servers: Servers) -> Iterator[URL]:
    """A database without a schema."""
    with servers.get(database).database() as made:
        yield made


@pytest.fixture
def _clustered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each server takes itself for one of a cluster."""
    monkeypatch.setattr(galera, "_IS_CLUSTERED", "SELECT 'wsrep_on', 'ON'")
    monkeypatch.setattr(galera, "_LOOK_EVERY_S", 0.001)


@pytest.fixture
def engine(empty: URL, _clustered: None) -> Iterator[Engine]:
    """The database on a server that takes itself for one of a cluster."""
    made = open_engine(empty)
    yield made
    made.dispose()


def waits_for_others(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        found = connection.exec_driver_sql("SHOW SESSION VARIABLES LIKE 'wsrep_sync_wait'").all()
    return [value for _, value in found]


def begin_elsewhere(engine: Engine, server: str) -> None:
    """Leave what an upgrade by a server leaves while it is under way."""
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE TABLE {galera.UPGRADE_TABLE} (id INT PRIMARY KEY) COMMENT '{server}'")


def end_elsewhere(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP TABLE {galera.UPGRADE_TABLE}")


def assert_upgraded(engine: Engine) -> None:
    schema.check(engine)
    assert not inspect(engine).has_table(galera.UPGRADE_TABLE)


def test_a_transaction_sees_the_commits_of_other_servers(engine: Engine) -> None:
    assert waits_for_others(engine) in ([], ["15"])  # MySQL has no such variable


def test_a_server_of_its_own_waits_for_nobody(empty: URL) -> None:
    engine = open_engine(empty)
    assert waits_for_others(engine) in ([], ["0"])
    engine.dispose()


def test_an_upgrade_that_was_killed_is_taken_over_by_the_same_server(engine: Engine) -> None:
    with engine.begin() as connection:
        server = connection.exec_driver_sql("SELECT concat(@@hostname, ':', @@port)").scalar()
    begin_elsewhere(engine, server)
    schema.upgrade(engine)
    assert_upgraded(engine)


def test_an_upgrade_waits_for_the_one_of_another_server(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    begin_elsewhere(engine, "elsewhere:3306")
    crowd = Crowd()
    crowd.start("upgrade", lambda: schema.upgrade(engine))
    until(lambda: "the server elsewhere:3306 is upgrading the schema" in caplog.text)
    end_elsewhere(engine)
    assert crowd.join() == {"upgrade": None}
    assert_upgraded(engine)
    assert caplog.text.count("elsewhere:3306") == 1


@pytest.mark.parametrize(
    ("driver", "module"),
    [
        ("pymysql", "pymysql"),
        ("mysqldb", "MySQLdb"),
        ("mysqlconnector", "mysql.connector"),
        ("mariadbconnector", "mariadb"),
    ],
)
def test_an_upgrade_that_waited_for_long_says_what_to_do(engine: Engine, driver: str, module: str) -> None:
    pytest.importorskip(module)
    begin_elsewhere(engine, "elsewhere:3306")
    here = open_engine(engine.url.set(drivername=f"mysql+{driver}"))
    with (
        pytest.raises(StorageError, match="if that was killed, drop the table observation_upgrade"),
        writing(here) as connection,
        galera.upgrading_alone(connection, patience_s=0),
    ):
        pytest.fail("it went on")
    here.dispose()


def test_a_conflict_with_another_server_is_no_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, conflicts = galera._runs, [False]
    monkeypatch.setattr(galera, "_runs", lambda *those: conflicts.pop() if conflicts else runs(*those))
    schema.upgrade(engine)
    assert_upgraded(engine)


class Conflict:
    """Lets the server refuse one statement, as a server of a cluster does for a conflict with another server.

    It is the one with this number, of those that begin with these words.
    """

    def __init__(self, engine: Engine, number: int, begin: str = "", *, error: int = 1213) -> None:
        self.left = number
        self._begin = begin
        self._refusal = f"SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = {error}"
        event.listen(engine, "before_cursor_execute", self._count, retval=True)

    def _count(
        self, _connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _is_many: bool
    ) -> tuple[str, Any]:
        if "_LOCK(" in statement or not statement.startswith(self._begin):  # a lock reads no table
            return statement, parameters
        self.left -= 1
        return (self._refusal, ()) if self.left == -1 else (statement, parameters)


@pytest.mark.usefixtures("_clustered")
def test_any_statement_of_an_upgrade_may_be_aborted_once(servers: Servers, database: str) -> None:
    is_aborted, number = True, 0
    while is_aborted:
        with servers.get(database).database() as url:
            engine = open_engine(url)
            conflict = Conflict(engine, number)
            assert schema.upgrade(engine) is None
            schema.check(engine)
            engine.dispose()
        is_aborted, number = conflict.left < 0, number + 1
    assert number > 20


def test_a_look_at_another_upgrade_may_be_aborted(engine: Engine) -> None:
    begin_elsewhere(engine, "elsewhere:3306")
    conflict = Conflict(engine, 0, "SHOW CREATE TABLE")
    looks: list[str] = []

    def look(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if conflict.left < 0 and statement.startswith(f"CREATE TABLE {galera.UPGRADE_TABLE}"):
            looks.append(statement)

    event.listen(engine, "before_cursor_execute", look)
    crowd = Crowd()

    def upgrade_alone() -> None:
        with writing(engine) as connection, galera.upgrading_alone(connection, patience_s=60):
            pass

    crowd.start("upgrade", upgrade_alone)
    until(lambda: looks or crowd.returned)
    end_elsewhere(engine)
    assert crowd.join() == {"upgrade": None}


def test_an_upgrade_that_waits_too_long_for_a_lock_is_not_repeated(empty: URL) -> None:
    """Each ALTER that waits for a transaction keeps all others waiting."""
    engine = open_engine(empty)
    Conflict(engine, 10, error=1205)
    with pytest.raises(StorageError, match="1205"):
        schema.upgrade(engine)
    engine.dispose()


@pytest.mark.parametrize("statement", ["CREATE TABLE observation_events", "UPDATE outbox_alembic_version"])
@pytest.mark.parametrize("is_clustered", [False, True])
def test_an_upgrade_whose_connection_breaks_says_so(
    empty: URL, request: pytest.FixtureRequest, statement: str, is_clustered: bool
) -> None:
    if is_clustered:
        request.getfixturevalue("_clustered")
    engine = open_engine(empty)

    def kill(cursor: Any, words: str, _parameters: Any, _context: Any) -> None:
        if words.lstrip().startswith(statement):
            cursor.execute("SELECT connection_id()")
            cursor.execute(f"KILL {cursor.fetchone()[0]}")

    event.listen(engine, "do_execute", kill)
    with pytest.raises(StorageError, match="1927|2013|1317"):
        schema.upgrade(engine)
    event.remove(engine, "do_execute", kill)
    schema.upgrade(engine)
    assert_upgraded(engine)
    engine.dispose()


@pytest.mark.parametrize("begin", ["CREATE TABLE observation_events", "DROP TABLE"])
def test_an_upgrade_can_be_interrupted(engine: Engine, begin: str) -> None:
    def interrupt(_cursor: Any, words: str, _parameters: Any, _context: Any) -> None:
        if words.lstrip().startswith(begin):
            raise KeyboardInterrupt

    event.listen(engine, "do_execute", interrupt)
    with pytest.raises(KeyboardInterrupt):
        schema.upgrade(engine)
    event.remove(engine, "do_execute", interrupt)
    schema.upgrade(engine)
    schema.check(engine)


def test_an_upgrade_succeeds_though_an_administrator_drops_its_table(engine: Engine) -> None:
    with writing(engine) as connection, galera.upgrading_alone(connection, patience_s=0):
        end_elsewhere(engine)


def test_an_upgrade_leaves_no_table_though_a_conflict_aborts_its_last_statement(engine: Engine) -> None:
    conflict = Conflict(engine, 0, "DROP TABLE")
    with writing(engine) as connection, galera.upgrading_alone(connection, patience_s=0):
        pass
    assert conflict.left < 0
    assert not inspect(engine).has_table(galera.UPGRADE_TABLE)


def test_an_upgrade_whose_last_statement_always_conflicts_says_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(galera, "_DROPS_AT_MOST", 1)
    for _ in range(2):
        Conflict(engine, 0, "DROP TABLE")
    with (
        pytest.raises((DBAPIError, StorageError), match="1213"),
        writing(engine) as connection,
        galera.upgrading_alone(connection, patience_s=0),
    ):
        pass


def test_an_upgrade_may_be_aborted_after_it_waited_for_long(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = count()
    monkeypatch.setattr(patience, "monotonic_s", lambda: 3_600 * next(hours))
    conflict = Conflict(engine, 10)
    schema.upgrade(engine)
    assert conflict.left < 0
    assert_upgraded(engine)


def test_an_upgrade_that_may_not_create_tables_says_so(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(galera, "UPGRADE_TABLE", "no_such_database.observation_upgrade")
    with (
        pytest.raises((DBAPIError, StorageError), match="no_such_database"),
        writing(engine) as connection,
        galera.upgrading_alone(connection, patience_s=0),
    ):
        pytest.fail("it went on")
