"""What docs/host-database.md says of schemas and privileges holds on the servers."""

import logging
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from uuid import uuid4

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from click.testing import CliRunner
from sqlalchemy import URL, MetaData, create_engine, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from builders import DOWN, ROOT, ScriptedClient, rule_fired
from outbox import Outbox, OutboxError, Policy, SchemaError, StorageError, schema
from outbox.cli import main
from outbox.doctor import examine
from outbox.storage.engines import open_engine
from servers import Server, Servers

PAGE = (ROOT / "docs" / "host-database.md").read_text(encoding="utf-8")
SECTION = {"postgresql": "### PostgreSQL", "mariadb": "### MariaDB and MySQL"}
ROLES = ("outbox_owner", "outbox_enqueuer", "outbox_flusher")
FAR_AWAY_MS = 2**50

pytestmark = pytest.mark.servers


class Shop:
    """A host's database on a server, in which each of the page's roles exists, with a name that no other run has."""

    def __init__(self, server: Server, url: URL, names: dict[str, str]) -> None:
        self.server = server
        self.names = names
        self._url = url
        self._admin = create_engine(url, isolation_level="AUTOCOMMIT")
        section = PAGE.partition(SECTION[server.name])[2].partition("\n### ")[0]
        self.before, self.after = (
            [self._named(line) for line in block.splitlines() if line]
            for block in re.findall(r"```sql\n(.*?)```", section, re.DOTALL)
        )

    def close(self) -> None:
        self._admin.dispose()

    def run(self, *statements: str) -> None:
        with self._admin.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def url(self, role: str, search_path: str = "outbox") -> URL:
        url = self._url.set(username=self.names[role])
        return url.update_query_dict({"options": f"-csearch_path={search_path}"}) if self._is_postgresql else url

    @property
    def admin_url(self) -> URL:
        return self._url

    def tables(self, name: str) -> set[str]:
        return {*inspect(self._admin).get_table_names(schema=name)}

    def upgraded(self) -> "Shop":
        self.run(*self.before)
        engine = open_engine(self.url("outbox_owner"))
        schema.upgrade(engine)
        engine.dispose()
        self.run(*self.after)
        return self

    def grants(self, role: str) -> Iterator[tuple[str, str]]:
        """Yield each single privilege of a role: how to revoke it, and how to grant it again."""
        for statement in self.before + self.after:
            if grant := re.fullmatch(rf"GRANT (.+) ON (.+) TO {self.names[role]};", statement):
                for privilege in grant.group(1).split(", "):
                    what = f"{privilege} ON {grant.group(2)}"
                    yield f"REVOKE {what} FROM {self.names[role]}", f"GRANT {what} TO {self.names[role]}"

    def forget_pauses(self) -> None:
        self.run(
            self._named(f"DELETE FROM {'outbox' if self._is_postgresql else 'shop'}.observation_destinations")
        )

    @property
    def _is_postgresql(self) -> bool:
        return self.server.name == "postgresql"

    def _named(self, statement: str) -> str:
        for role, name in self.names.items():
            statement = statement.replace(role, name)
        return statement.replace(" shop.", f" {self._url.database}.")


@pytest.fixture
def shop(database: str, servers: Servers):
    server = servers.get(database)
    names = {role: f"{role}_{os.getpid()}_{uuid4().hex[:6]}" for role in ROLES}
    kind = "ROLE" if database == "postgresql" else "USER"
    for name in names.values():
        server.run(f"CREATE {kind} {name}" + (" LOGIN" if database == "postgresql" else ""))
    try:
        with server.database() as url:
            made = Shop(server, url, names)
            try:
                yield made
            finally:
                made.close()
    finally:  # now that its database is gone, nothing depends on a role
        for name in names.values():
            server.run(f"DROP {kind} {name}")


@contextmanager
def warnings_are_errors() -> Iterator[None]:
    """Raise what the outbox only logs: whoever has all privileges gets no warning of a failure."""

    class Raise(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.event_name == "outbox.deleted_undelivered":  # no failure: the cap is low here
                return
            raise StorageError(record.getMessage())

    handler = Raise(logging.WARNING)
    logging.getLogger("outbox").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("outbox").removeHandler(handler)


def enqueue(shop: Shop) -> None:
    """Do all that who enqueues may do."""
    with warnings_are_errors(), Outbox(shop.url("outbox_enqueuer")) as outbox:
        outbox.enqueue_many([rule_fired()] * 3, to=["default", "billing"])
        with Session(outbox.engine) as session:
            outbox.enqueue_many([rule_fired()] * 2, session=session)
            session.commit()
        connection = outbox.engine.raw_connection()
        try:
            outbox.enqueue(rule_fired(), connection=connection.driver_connection)
            connection.commit()
        finally:
            connection.close()


def flush(shop: Shop) -> None:
    """Do all that who flushes may do, and delete what is over the cap."""
    with (
        warnings_are_errors(),
        Outbox(shop.url("outbox_flusher"), policy=Policy(batch_size=2)) as uncapped,
        Outbox(shop.url("outbox_flusher"), policy=Policy(batch_size=2, max_rows=2, when_full="trim")) as outbox,
    ):
        outbox.retry_now()  # a flush that lacked a privilege may have left a pause
        uncapped.flush(ScriptedClient(DOWN))
        outbox.tries(1)
        outbox.retry_now()
        for destination in ("default", "billing"):
            outbox.flush_all(ScriptedClient(), destination=destination)
        outbox.retry_now()
        outbox.requeue_abandoned(older_than=FAR_AWAY_MS)
        outbox.hold("billing", why="a deploy")
        outbox.resume("billing")
        outbox.stats()
        outbox.find()
        assert all(found.is_well for found in examine(outbox.engine, outbox.policy))


@pytest.mark.servers("postgresql")
def test_the_commands_of_the_page_put_the_tables_into_a_schema(shop: Shop) -> None:
    (block,) = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    create, upgrade = (shlex.split(line.removeprefix("$ ")) for line in block.splitlines())
    assert create[:3] == ["psql", "shop", "-c"]
    shop.run(create[3])
    url = shop.admin_url.render_as_string(hide_password=False)
    words = [word.replace("postgresql://localhost/shop", url) for word in upgrade[1:]]
    assert CliRunner().invoke(main, words).exit_code == 0
    assert shop.tables("outbox") == schema.TABLES
    assert not shop.tables("public")


def test_the_listed_privileges_suffice(shop: Shop) -> None:
    shop.upgraded()
    for _ in range(2):  # an entry of the ledger is begun, then added to
        enqueue(shop)
        flush(shop)
    with Outbox(shop.url("outbox_flusher")) as outbox:
        assert outbox.stats().counts["sent"] == 4
        assert [entry.events for entry in outbox.stats().deleted] == [4, 10]
        assert outbox.purge(event_type="rule_fired").total == 4


@pytest.mark.parametrize(("role", "work"), [("outbox_enqueuer", enqueue), ("outbox_flusher", flush)])
def test_each_listed_privilege_is_needed_and_a_missing_one_is_told(shop: Shop, role: str, work) -> None:
    shop.upgraded()
    grants = list(shop.grants(role))
    assert len(grants) >= 2
    superfluous = []
    for revoke, grant in grants:
        enqueue(shop)
        shop.forget_pauses()  # so that the next one is inserted
        shop.run(revoke)
        try:
            work(shop)
        except OutboxError as error:
            # A schema that may not be used can't be seen either.
            told = SchemaError if "ON SCHEMA" in revoke else StorageError
            assert isinstance(error, told), (revoke, error)
            assert re.search("denied|no outbox schema", str(error)), (revoke, error)
        else:
            superfluous.append(revoke)
        shop.run(grant)
    assert superfluous == []
    work(shop)


@pytest.mark.servers("mariadb")
def test_each_privilege_of_who_upgrades_is_needed(shop: Shop) -> None:
    engine = open_engine(shop.url("outbox_owner"))
    superfluous = []
    for revoke, _ in shop.grants("outbox_owner"):
        shop.run(*shop.before, revoke)
        try:
            schema.upgrade(engine)
        except StorageError as error:
            assert "denied" in str(error), (revoke, error)
        else:
            superfluous.append(revoke)
        shop.run(f"DROP TABLE IF EXISTS {', '.join(schema.TABLES)}")
    engine.dispose()
    assert superfluous == []


def test_who_enqueues_can_read_no_event_and_change_none(shop: Shop) -> None:
    shop.upgraded()
    enqueue(shop)
    with Outbox(shop.url("outbox_enqueuer")) as outbox:
        for work in (outbox.find, outbox.retry_now, outbox.stats, lambda: outbox.flush(ScriptedClient())):
            with pytest.raises(StorageError, match="denied"):
                work()


def test_who_enqueues_leaves_what_is_over_the_cap_to_the_flushers(shop: Shop, caplog) -> None:
    shop.upgraded()
    with Outbox(shop.url("outbox_enqueuer"), policy=Policy(max_rows=1, when_full="trim")) as outbox:
        outbox.enqueue_many([rule_fired()] * 3)
    assert "capping the queue failed, the events are kept" in caplog.text
    flush(shop)


def test_who_flushes_can_change_no_table(shop: Shop) -> None:
    shop.upgraded()
    engine = create_engine(shop.url("outbox_flusher"))
    for statement in ("CREATE TABLE own (id INT)", "DROP TABLE observation_events"):
        with pytest.raises(DBAPIError, match="denied|owner"), engine.begin() as connection:
            connection.exec_driver_sql(statement)
    engine.dispose()


@pytest.mark.servers("postgresql")
def test_on_postgresql_the_tables_live_in_the_schema_of_the_search_path(shop: Shop) -> None:
    shop.upgraded()
    engine = open_engine(shop.url("outbox_owner"))
    assert schema.upgrade(engine) == schema.REVISIONS[-1]
    schema.check(engine)
    assert {*inspect(engine).get_table_names("outbox")} == schema.TABLES
    assert inspect(engine).get_table_names("public") == []
    config = schema.alembic_config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.check(config)
    engine.dispose()


@pytest.mark.servers("postgresql")
@pytest.mark.parametrize("search_path", ["outbox", "public,outbox"])
@pytest.mark.parametrize("include_schemas", [False, True])
def test_a_hosts_autogenerate_leaves_the_schema_alone(shop: Shop, search_path: str, include_schemas: bool) -> None:
    shop.upgraded()
    engine = create_engine(shop.url("outbox_owner", search_path))

    def differences(**options: object) -> list[object]:
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"include_schemas": include_schemas, **options})
            return compare_metadata(context, MetaData())

    assert differences() != []
    assert differences(include_name=schema.exclude_name) == []
    engine.dispose()


@pytest.mark.servers("postgresql")
def test_a_host_enqueues_with_the_schema_behind_its_own(shop: Shop) -> None:
    shop.upgraded()
    host = create_engine(shop.url("outbox_enqueuer", "public,outbox"))
    with Outbox(shop.url("outbox_enqueuer")) as outbox, Session(host) as session:
        assert outbox.enqueue(rule_fired(), session=session) == 1
        session.commit()
    host.dispose()
    flush(shop)


@pytest.mark.servers("postgresql")
def test_without_the_schema_an_upgrade_says_so(shop: Shop) -> None:
    engine = open_engine(shop.url("outbox_owner"))
    with pytest.raises(StorageError, match="no schema has been selected"):
        schema.upgrade(engine)
    engine.dispose()
    with suppress(SchemaError):
        Outbox(shop.url("outbox_owner"))
