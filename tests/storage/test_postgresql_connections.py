"""How the outbox finds out that nobody else uses its connection to PostgreSQL."""

from __future__ import annotations

import select
import socket
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import URL, create_engine, make_url, text

from builders import ScriptedClient, rule_fired
from outbox import Outbox
from outbox.storage.dialects.postgresql import DIALECT
from outbox.storage.engines import reading, writing
from outbox.storage.postgresql_connections import is_direct, may_be_closed
from servers import Servers

PROCESS_ID = 17


class Connection:
    """A psycopg connection, and what the server at its other end sees."""

    def __init__(self, end: socket.socket, process_id: int | None, port: int | None) -> None:
        self.fileno = end.fileno
        self.info = SimpleNamespace(backend_pid=PROCESS_ID)
        self._sees = (process_id, port)

    def execute(self, _query: str) -> Any:
        return SimpleNamespace(fetchall=lambda: [self._sees])


@pytest.mark.parametrize(
    ("process_id", "off_by", "expected"),
    [(PROCESS_ID, 0, True), (PROCESS_ID, 1, False), (PROCESS_ID + 1, 0, False)],
)
def test_the_server_itself_sees_the_process_and_the_port_of_the_connection(
    process_id: int, off_by: int, *, expected: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as end:
        assert is_direct(Connection(end, process_id, end.getsockname()[1] + off_by)) == expected


def test_a_unix_socket_has_no_port() -> None:
    end, other = socket.socketpair()
    with end, other:
        assert not is_direct(Connection(end, PROCESS_ID, None))


@pytest.mark.parametrize("has_poll", [True, False])
def test_a_connection_with_something_to_read_may_be_closed(
    monkeypatch: pytest.MonkeyPatch, *, has_poll: bool
) -> None:
    if not has_poll:
        monkeypatch.delattr(select, "poll", raising=False)
    end, other = socket.socketpair()
    with end:
        assert not may_be_closed(end)
        other.close()
        assert may_be_closed(end)


@pytest.mark.servers("postgresql")
def test_only_what_reads_in_a_transaction_may_read_a_table_whole(outbox: Outbox) -> None:
    show = "SELECT current_setting('enable_seqscan'), current_setting('enable_bitmapscan')"
    for opened in (writing, reading, writing):
        with opened(outbox.engine) as connection:
            expected = "on" if opened is reading else "off"
            assert connection.exec_driver_sql(show).one() == (expected, expected)


@pytest.mark.servers("postgresql")
@pytest.mark.parametrize("is_hosts", [False, True])
def test_jit_is_off_for_reads(outbox: Outbox, *, is_hosts: bool) -> None:
    engine = create_engine(outbox.engine.url) if is_hosts else outbox.engine
    with reading(engine) as connection:
        assert connection.scalar(text("SELECT current_setting('jit')")) == "off"
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT current_setting('jit')")) == ("on" if is_hosts else "off")
    engine.dispose()


@pytest.mark.servers("postgresql")
@pytest.mark.parametrize(
    "statement", ["ALTER TABLE observation_events ALTER COLUMN retry_count TYPE bigint", "DEALLOCATE ALL"]
)
def test_prepared_statements_that_became_invalid_are_left_for_a_new_connection(
    servers: Servers, database: str, statement: str
) -> None:
    def enqueue_and_flush() -> int:
        outbox.enqueue(rule_fired())
        return outbox.flush(ScriptedClient()).sent

    # In a database of its own: the changed column would stay for the tests that follow.
    with servers.get(database).database() as url, Outbox.open(url) as outbox:
        assert [enqueue_and_flush() for _ in range(3)] == [1, 1, 1]
        with outbox.engine.begin() as connection:
            connection.exec_driver_sql(statement)
        assert [enqueue_and_flush() for _ in range(3)] == [1, 1, 1]


@pytest.mark.servers("postgresql")
def test_a_connection_of_the_tests_is_direct(url: str) -> None:
    there: URL = make_url(url)
    engine = DIALECT.create_engine(there, synchronous="FULL")
    with engine.connect() as connection:
        assert is_direct(connection.connection.driver_connection)
    engine.dispose()
