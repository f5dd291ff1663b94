"""Three MariaDB servers in a Galera cluster, and haproxy in front of them."""

from __future__ import annotations

import os
import pwd
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pymysql
from sqlalchemy import make_url

from conditions import until
from servers import NOBODY, MissingError, PrivateMariadb, find_program, free_port

DATABASE = "outbox"
_LIBRARY = Path("/usr/lib/galera/libgalera_smm.so")


class Node(PrivateMariadb):
    """A server of the cluster. Its keeper can start it again."""

    def __init__(self, peers: Sequence[Node]) -> None:
        super().__init__()
        if not _LIBRARY.exists():
            raise MissingError(f"no library {_LIBRARY.name}, which the Debian package galera-4 has")
        find_program("rsync", "rsync")  # a server that joins gets the data by it
        self._peers = peers
        self._group, self._increments, self._snapshot = (free_port() for _ in range(3))
        self.url = f"mysql+pymysql://root@127.0.0.1:{self._port}/{DATABASE}"

    def _begin(self) -> None:
        if not self._peers:
            self._fill()
        first = "" if self._peers else "--wsrep-new-cluster"
        self._keep(
            'data=$1; first=$2; shift 2; "$@" $first & while read -r line; do case $line in start) "$@" & ;;'
            ' kill) kill -KILL $!; wait ;; *) break ;; esac; done; kill -KILL $!; wait; rm -rf "$data"',
            first,
            *self._command(),
        )
        self._wait_until_ready()

    def _command(self) -> list[str]:
        options = (
            f"base_port={self._group}",
            f"gmcast.listen_addr=tcp://127.0.0.1:{self._group}",
            f"ist.recv_addr=127.0.0.1:{self._increments}",
            # So that the others soon go on without a server that died.
            "evs.suspect_timeout=PT3S",
            "evs.inactive_timeout=PT6S",
        )
        return [
            *super()._command(),
            "--log-error=log",
            "--binlog-format=ROW",
            "--innodb-autoinc-lock-mode=2",
            "--wsrep-on=ON",
            f"--wsrep-provider={_LIBRARY}",
            f"--wsrep-cluster-address=gcomm://{','.join(f'127.0.0.1:{one._group}' for one in self._peers)}",
            f"--wsrep-node-name={self._port}",
            f"--wsrep-node-address=127.0.0.1:{self._group}",
            "--wsrep-sst-method=rsync",
            f"--wsrep-sst-receive-address=127.0.0.1:{self._snapshot}",
            f"--wsrep-provider-options={';'.join(options)}",
        ]

    def _is_ready(self, connection: pymysql.Connection[Any]) -> bool:
        with connection.cursor() as cursor:
            cursor.execute("SHOW STATUS WHERE variable_name IN ('wsrep_ready', 'wsrep_local_state_comment')")
            return dict(cursor.fetchall()) == {"wsrep_ready": "ON", "wsrep_local_state_comment": "Synced"}

    def is_ready(self) -> bool:
        with suppress(pymysql.Error), closing(self._connect()) as connection:
            return self._is_ready(connection)
        return False

    def run(self, statement: str) -> list[Any]:
        with closing(self._connect()) as connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall())

    def catch_up(self) -> None:
        """Wait until the server has done all that the other servers did before."""
        with closing(self._connect()) as connection, connection.cursor() as cursor:
            cursor.execute("SET SESSION wsrep_sync_wait = 15")
            cursor.execute("SHOW TABLES FROM " + DATABASE)

    def kill(self) -> None:
        self._tell(b"kill\n")
        until(lambda: not self.is_ready())

    def rejoin(self) -> None:
        self._tell(b"start\n")
        self._wait_until_ready()

    def isolate(self) -> None:
        """Cut the server off from the others. It still takes connections."""
        self.run("SET GLOBAL wsrep_provider_options = 'gmcast.isolate=1'")
        until(lambda: not self.is_ready())

    def come_back(self) -> None:
        self.run("SET GLOBAL wsrep_provider_options = 'gmcast.isolate=0'")
        until(self.is_ready)

    def _tell(self, line: bytes) -> None:
        self._keeper.stdin.write(line)
        self._keeper.stdin.flush()


class _Health(BaseHTTPRequestHandler):
    """Answers to haproxy whether a server is in the cluster."""

    def do_GET(self) -> None:
        self.send_response(200 if self.server.node.is_ready() else 503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's
        pass


class _Answering(ThreadingHTTPServer):
    node: Node

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore that haproxy did not wait for the answer."""


@contextmanager
def _health(node: Node) -> Iterator[int]:
    """Answer at a port whether a server is in the cluster."""
    with _Answering(("127.0.0.1", 0), _Health) as answering:
        answering.node = node
        thread = threading.Thread(target=answering.serve_forever)
        thread.start()
        try:
            yield answering.server_address[1]
        finally:
            answering.shutdown()
            thread.join()


class Cluster:
    """Three servers, and the URLs by which haproxy leads to them."""

    def __init__(self, nodes: list[Node], urls: list[str], round_robin: str) -> None:
        self.nodes = nodes
        self.urls = urls
        """One for each server; while that is away, haproxy leads to another one."""
        self.round_robin = round_robin
        """Each connection goes to the next server."""

    def empty(self) -> None:
        """Wait until all servers are in the cluster, and make the database empty on each of them.

        A connection fails at a server that does not have the new database yet.
        """
        until(lambda: all(node.is_ready() for node in self.nodes))
        self.nodes[0].run(f"DROP DATABASE IF EXISTS {DATABASE}")
        self.nodes[0].run(f"CREATE DATABASE {DATABASE}")
        for node in self.nodes:
            node.catch_up()
        port = make_url(self.round_robin).port
        until(lambda: {_answers(port) for _ in self.nodes} == {node._port for node in self.nodes})


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start three servers, which share an empty database, and haproxy in front of them."""
    program = find_program("haproxy", "haproxy")
    nodes: list[Node] = []
    for _ in range(3):
        nodes.append(Node(tuple(nodes)))
    with ExitStack() as stack:
        for node in nodes:
            stack.enter_context(node)
        nodes[0].run(f"CREATE DATABASE {DATABASE}")
        ports = [free_port() for _ in range(4)]
        stack.enter_context(_haproxy(program, nodes, ports))
        urls = [f"mysql+pymysql://root@127.0.0.1:{port}/{DATABASE}" for port in ports]
        yield Cluster(nodes, urls[1:], urls[0])


@contextmanager
def _haproxy(program: str, nodes: list[Node], ports: list[int]) -> Iterator[None]:
    """Start haproxy: on the first port, each connection goes to the next server, on the others to one of them."""
    with ExitStack() as stack:
        asked = [stack.enter_context(_health(node)) for node in nodes]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outbox-haproxy-")))
        folder.chmod(0o755)
        settings = folder / "haproxy.cfg"
        settings.write_text(_settings(nodes, ports, asked))
        user = pwd.getpwnam(NOBODY).pw_uid if os.geteuid() == 0 else None
        with subprocess.Popen([program, "-db", "-f", settings], stderr=subprocess.DEVNULL, user=user) as started:
            try:
                for port in ports:
                    until(lambda port=port: _answers(port))
                yield
            finally:
                started.kill()


def _settings(nodes: list[Node], ports: list[int], asked: list[int]) -> str:
    lines = [
        "defaults",
        " mode tcp",
        " balance roundrobin",
        " timeout connect 1s",
        # A server that was killed or isolated answers at once. A slow answer only says that the machine is busy.
        " timeout check 10s",
        " timeout client 1h",
        " timeout server 1h",
        " option redispatch",
        " option httpchk GET /",
        " default-server inter 250ms fall 2 rise 2 on-marked-down shutdown-sessions",
        "listen any",
        f" bind 127.0.0.1:{ports[0]}",
        *(f" server n{n} 127.0.0.1:{node._port} check port {asked[n]}" for n, node in enumerate(nodes)),
    ]
    for preferred, port in enumerate(ports[1:]):
        lines += [f"listen one{preferred}", f" bind 127.0.0.1:{port}"]
        for n, node in enumerate(nodes):
            backup = "" if n == preferred else " backup"
            lines.append(f" server n{n} 127.0.0.1:{node._port} track any/n{n}{backup}")
    return "\n".join([*lines, ""])


def _answers(port: int) -> int | None:
    """Return the port of the server to which haproxy leads."""
    with (
        suppress(pymysql.Error),
        closing(pymysql.connect(host="127.0.0.1", port=port, user="root")) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute("SELECT @@port")
        return int(cursor.fetchone()[0])
    return None
