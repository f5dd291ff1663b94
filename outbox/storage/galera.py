"""A Galera cluster of MariaDB or MySQL servers. By default, a server may not yet see what others committed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, event, inspect
from sqlalchemy.exc import DBAPIError, NoSuchTableError
from sqlalchemy.pool import ConnectionPoolEntry

from outbox.clock import monotonic_s
from outbox.failures import StorageError
from outbox.storage.dialects import dialect_of
from outbox.storage.engines import shown_url

log = logging.getLogger("outbox")

Result = TypeVar("Result")

UPGRADE_TABLE = "observation_upgrade"
"""This table exists while a server of the cluster upgrades the schema."""

_IS_CLUSTERED = "SHOW SESSION VARIABLES LIKE 'wsrep_on'"
# The table exists; a conflict with a statement of another server.
_HELD = frozenset({1050, 1205, 1213})
_LOOK_EVERY_S = 0.1
_DROPS_AT_MOST = 100


def see_all_commits(engine: Engine) -> None:
    """Let each transaction see what was committed on the other servers before it began.

    Without this, a server may not know a row yet that the program claimed by a connection to another server. Then
    the outcome would find no row, and the row would wait for the end of its lease.
    """

    @event.listens_for(engine, "connect")
    def _set(connection: Any, _record: ConnectionPoolEntry) -> None:
        # If the connection fails here, the first statement fails and says so.
        with suppress(engine.dialect.loaded_dbapi.Error), closing(connection.cursor()) as cursor:
            cursor.execute(_IS_CLUSTERED)
            if _is_on(cursor.fetchone()):
                cursor.execute("SET SESSION wsrep_sync_wait = 15")


@contextmanager
def upgrading_alone(connection: Connection, *, patience_s: float) -> Iterator[None]:
    """Keep the other servers of the cluster from upgrading; the caller holds this server's own lock.

    One server alone succeeds in creating a table, and all servers run such statements in the same order. If an
    upgrade was killed, its table stays. The next upgrade by the same server takes it over. Raises `StorageError`
    after `patience_s` of waiting for another server.
    """
    if not _is_on(connection.exec_driver_sql(_IS_CLUSTERED).fetchone()):
        yield
        return
    server = connection.exec_driver_sql("SELECT concat(@@hostname, ':', @@port)").scalar()
    create = f"CREATE TABLE {UPGRADE_TABLE} (id INT PRIMARY KEY) COMMENT '{server}'"
    end_s = monotonic_s() + patience_s
    is_logged = False
    while not _runs(connection, create):
        holder = _holder(connection)
        if holder == server:
            break
        words = f"the server {holder} is upgrading the schema; if that was killed, drop the table {UPGRADE_TABLE}"
        if monotonic_s() > end_s:
            raise StorageError(f"{shown_url(connection.engine)}: {words}")
        if holder and not is_logged:
            log.warning("%s", words, extra={"event_name": "outbox.upgrade_waits"})
            is_logged = True
        time.sleep(_LOOK_EVERY_S)
    try:
        yield
    finally:
        if not connection.invalidated:  # else the next upgrade takes the table over
            _drop(connection)


def _is_on(found: Any) -> bool:
    return found is not None and found[1] == "ON"


def _drop(connection: Connection) -> None:
    """Drop the table. If that conflicts with other servers, which wait until the table is gone, try again."""
    drop = f"DROP TABLE IF EXISTS {UPGRADE_TABLE}"
    for _ in range(_DROPS_AT_MOST):
        if _runs(connection, drop):
            return
        time.sleep(_LOOK_EVERY_S)
    connection.exec_driver_sql(drop)


def _runs(connection: Connection, statement: str) -> bool:
    return _unless_held(connection, lambda: connection.exec_driver_sql(statement)) is not None


def _holder(connection: Connection) -> str | None:
    """Return the server that upgrades; None if there is none, or if it begins or ends at this moment."""
    try:
        found = _unless_held(connection, lambda: inspect(connection).get_table_comment(UPGRADE_TABLE))
    except NoSuchTableError:
        return None
    return found["text"] if found else None


def _unless_held(connection: Connection, call: Callable[[], Result]) -> Result | None:
    """Return the result of a call; None if another server is in the way."""
    try:
        return call()
    except DBAPIError as error:
        if _HELD.isdisjoint(dialect_of(connection).codes(error.orig)):
            raise
    return None
