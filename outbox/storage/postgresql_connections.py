"""Connections to PostgreSQL: whether a pooler is in between, what psycopg prepares, and whether one was closed."""

from __future__ import annotations

import logging
import re
import select
import socket
from typing import Any

from sqlalchemy import URL, Connection, Engine, event
from sqlalchemy.pool import ConnectionPoolEntry

from outbox.failures import ConfigurationError
from outbox.storage.engines import shown_url

log = logging.getLogger("outbox")

_IS_DIRECT = "outbox_is_direct"
# A statement is prepared when it runs for the second time.
_RUNS_UNPREPARED = 1
# PostgreSQL keeps the plan of a prepared statement. A plan that was made while the table was small has to serve
# when it has grown: walk the index that has the order of the statement, and never read and sort all rows.
_UNWANTED = ("enable_seqscan", "enable_bitmapscan")
_KEEP_PLANS = "; ".join(
    ["SET plan_cache_mode = force_generic_plan", "SET jit = off", *(f"SET {name} = off" for name in _UNWANTED)]
)
_PLAN_FREELY = "; ".join(f"SET LOCAL {name} TO DEFAULT" for name in _UNWANTED)
# JIT compilation takes up to a second, and our queries gain nothing from it.
_JIT_OFF = "SET LOCAL jit = off"


def is_behind_pooler(connection: Any) -> bool:
    """Tell whether a pooler, such as PgBouncer, stands between psycopg's connection and PostgreSQL.

    A pooler reports a process id of its own, because its clients share the server's processes.
    """
    ((process_id,),) = connection.execute("SELECT pg_backend_pid()", prepare=False).fetchall()
    return bool(process_id != connection.info.backend_pid)


def is_direct(connection: Any) -> bool:
    """Return whether psycopg's connection certainly leads to PostgreSQL itself, so that no other client uses it.

    The server must see the port of this socket, and its process id must be the one that psycopg was told. The
    process id alone proves nothing: pgagroal passes on the id of a process that its clients share. On a Unix
    socket, and where addresses are translated, this returns False.
    """
    query = "SELECT pg_backend_pid(), inet_client_port()"
    (found,) = connection.execute(query).fetchall()
    return bool(found == (connection.info.backend_pid, _port_of(connection)))


def _port_of(connection: Any) -> int | None:
    with socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as copy:
        address = copy.getsockname()
    return int(address[1]) if isinstance(address, tuple) else -1


def look_for_direct_connections(engine: Engine) -> None:
    """Find out which of psycopg's connections lead to PostgreSQL itself. `prepare` works only on these.

    Each client of a pooler gives its prepared statements the same names, so the server could run the statement
    that another client prepared on the connection.
    """

    @event.listens_for(engine, "connect")
    def _look(connection: Any, record: ConnectionPoolEntry) -> None:
        record.info[_IS_DIRECT] = is_direct(connection)
        if record.info[_IS_DIRECT]:
            connection.execute(_KEEP_PLANS)
        connection.commit()

    @event.listens_for(engine, "checkin")
    def _stop(connection: Any, record: ConnectionPoolEntry) -> None:
        if connection is not None and record.info.get(_IS_DIRECT):
            connection.prepare_threshold = None


def prepare(connection: Connection) -> None:
    """Let psycopg prepare statements, until the connection is given back."""
    if connection.info.get(_IS_DIRECT):
        driver: Any = connection.connection.dbapi_connection
        driver.prepare_threshold = _RUNS_UNPREPARED


def plan_reads(connection: Connection) -> None:
    """Let PostgreSQL choose its plans freely until the transaction ends: they are not kept. JIT stays off."""
    connection.exec_driver_sql(_PLAN_FREELY if connection.info.get(_IS_DIRECT) else _JIT_OFF)


def prepare_nothing_behind_a_pooler(engine: Engine) -> None:
    """Prepare no statement behind a pooler, although the URL asks for it."""

    @event.listens_for(engine, "connect")
    def _look(connection: Any, _record: ConnectionPoolEntry) -> None:
        if is_behind_pooler(connection):
            connection.prepare_threshold = None
            log.warning(
                "%s: prepare_threshold is ignored, because a pooler stands in between",
                shown_url(engine),
                extra={"event_name": "outbox.prepare_threshold_ignored"},
            )
        connection.rollback()


def psycopgs_options(url: URL) -> tuple[URL, dict[str, Any]]:
    """Return the URL without `prepare_threshold`, and this option as psycopg expects it: a number or None."""
    if url.get_driver_name() != "psycopg":
        return url, {}
    for name in ("autocommit", "context", "cursor_factory", "row_factory"):
        if name in url.query:
            raise ConfigurationError(f"the database URL sets {name}, which is not supported; leave it out")
    given = str(url.query.get("prepare_threshold", "none"))
    if given.lower() != "none" and not re.fullmatch("[0-9]{1,9}", given):
        raise ConfigurationError(
            f"the database URL's prepare_threshold is {given!r}, expected none or a whole number from 0"
        )
    threshold = None if given.lower() == "none" else int(given)
    return url.difference_update_query(["prepare_threshold"]), {"prepare_threshold": threshold}


def may_be_closed(connection: Any) -> bool:
    """Return whether the server may have closed the connection: it sends nothing else between two statements.

    True for pg8000, which does not show its socket.
    """
    if not hasattr(connection, "fileno"):
        return True
    if not hasattr(select, "poll"):  # on Windows
        return bool(select.select([connection], [], [], 0)[0])
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))
