"""PostgreSQL, which many hosts share."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar

from sqlalchemy import (
    ARRAY,
    URL,
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    Index,
    Table,
    and_,
    bindparam,
    event,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy import Dialect as SQLAlchemyDialect
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import ConnectionPoolEntry

from outbox.failures import ConfigurationError
from outbox.lifecycle import Status
from outbox.records import Claim, Listener
from outbox.storage import postgresql_claims, postgresql_listener
from outbox.storage.claimed import (
    MOVE_TO_SENT,
    Kind,
    Part,
    Wanted,
    is_pending,
    is_sending,
    waits_for_other,
    waits_for_row,
)
from outbox.storage.dialects.base import Dialect, Ending
from outbox.storage.engines import MIGRATION_LOCK, Synchronous, shown_url
from outbox.storage.inserts import Rows, insert_new
from outbox.storage.sql import (
    columns,
    contains_text,
    did_not_fail,
    failed_before,
    never_tried,
    oldest,
    upsert,
    was_tried,
)
from outbox.storage.transactions import Transaction

log = logging.getLogger("outbox")

_uploaded = (
    func.unnest(bindparam("ids", type_=ARRAY(BigInteger)), bindparam("created_at_ms", type_=ARRAY(BigInteger)))
    .table_valued("id", "created_at_ms")
    .render_derived(name="uploaded")
)
# Parsing a condition for each row takes PostgreSQL longer than the update does.
DELIVER = MOVE_TO_SENT.where(columns.id == _uploaded.c.id, columns.created_at_ms == _uploaded.c.created_at_ms)

HIDDEN_COMMANDS = text(
    """
    SELECT command FROM (VALUES ('SELECT', 'r'), ('UPDATE', 'w'), ('DELETE', 'd')) AS commands (command, code)
    WHERE row_security_active('observation_events') AND NOT EXISTS (
        SELECT FROM pg_policy
        WHERE polrelid = 'observation_events'::regclass AND polpermissive AND polcmd IN ('*', code)
            AND EXISTS (SELECT FROM unnest(polroles) AS role WHERE role = 0 OR pg_has_role(role, 'USAGE'))
    )
    """
)
"""The commands for which row-level security of PostgreSQL hides every row from this user; 0 is every role."""


@compiles(contains_text, "postgresql")
def _by_strpos(element: contains_text, compiler: Any, **options: Any) -> str:
    return f"(strpos({compiler.process(element.clauses, **options)}) > 0)"


class PostgreSQL(Dialect):
    """PostgreSQL."""

    names = ("postgresql", "postgres")
    drivers = tuple(f"postgresql+{driver}" for driver in ("psycopg", "psycopg2", "pg8000"))
    default_drivers = dict.fromkeys(names, "postgresql+psycopg")
    connection_classes: ClassVar = {
        "psycopg.Connection": "postgresql+psycopg",
        "psycopg2.extensions.connection": "postgresql+psycopg2",
        "pg8000.dbapi.Connection": "postgresql+pg8000",
        "pg8000.legacy.Connection": "postgresql+pg8000",
    }
    libraries = ("psycopg", "psycopg2", "pg8000")
    begins_at_head = False
    clock = select(literal_column("CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)"))
    # SQLSTATEs. `given_up`: serialization failure, deadlock. `read_only`: the server takes no writes any more.
    code_attributes = ("sqlstate", "pgcode")
    given_up = frozenset({"40001", "40P01"})
    read_only = frozenset({"25006"})
    stores_nul = False
    indexes = frozenset(
        f"observation_events_{name}_idx"
        for name in (
            "event_id",
            "untried",
            "again",
            "timed",
            "others",
            "later",
            "lost",
            "sent",
            "parked",
            "abandoned",
        )
    )
    # Part of the INSERT, so it needs no extra round trip. PostgreSQL sends equal notifications of a transaction
    # once.
    notification = literal_column(f"pg_notify('{postgresql_listener.CHANNEL}', '')")
    checks_pause = True
    delivers_at_once = True
    # One condition for each index.
    pending = (
        and_(is_pending, did_not_fail, never_tried),
        and_(is_pending, did_not_fail, was_tried),
        and_(is_sending, did_not_fail),
        and_(*Dialect.pending, failed_before),
    )
    undelivered_to_trim = (
        oldest(Status.PENDING, only=and_(did_not_fail, never_tried)),
        oldest(Status.PENDING, only=and_(did_not_fail, was_tried)),
        oldest(Status.SENDING, only=did_not_fail),
        *(oldest(Status.PENDING, Status.SENDING, only=waits) for waits in (waits_for_other, waits_for_row)),
        oldest(Status.PARKED),
    )

    def plain_cursor(self, connection: Any, driver: SQLAlchemyDialect) -> Any:
        """Return a cursor without the caller's row factory or cursor class."""
        if driver.driver == "psycopg":
            psycopg = import_module("psycopg")
            return psycopg.Cursor(connection, row_factory=psycopg.rows.tuple_row)
        if driver.driver == "psycopg2":
            return connection.cursor(cursor_factory=import_module("psycopg2.extensions").cursor)
        return connection.cursor()

    def is_two_phase(self, connection: Any) -> bool:
        """Works for psycopg and pg8000. psycopg2 does not show whether a transaction has two phases."""
        return any(getattr(connection, name, None) is not None for name in ("_tpc", "_xid"))

    def create_engine(self, url: URL, *, synchronous: Synchronous) -> Engine:
        """Return an engine on which psycopg prepares nothing.

        It does so only if the URL asks for it and no pooler stands in between.
        """
        engine = super().create_engine(url, synchronous=synchronous)
        if self.driver_options(url)[1].get("prepare_threshold") is not None:
            _prepare_nothing_behind_a_pooler(engine)
        return engine

    def driver_options(self, url: URL) -> tuple[URL, dict[str, Any]]:
        """Convert `prepare_threshold`, because psycopg needs a number."""
        return _psycopgs_options(url)

    def give_back(self, connection: Any) -> None:
        """Undo what `commits_each_statement` set."""
        connection.autocommit = False

    @contextmanager
    def unprepared(self, connection: Any) -> Iterator[None]:
        """Let psycopg prepare nothing on a host's connection, because it may lead to a pooler."""
        threshold = getattr(connection, "prepare_threshold", None)
        if threshold is None:
            yield
            return
        connection.prepare_threshold = None
        try:
            yield
        finally:
            connection.prepare_threshold = threshold

    def begin(self, connection: Connection, *, writes: bool, is_own: bool) -> Ending:
        """Begin by a statement where the driver commits each statement: it then ignores `commit()`."""
        if not (writes and is_own) and connection.connection.dbapi_connection.autocommit:  # type: ignore[union-attr]  # every driver of PostgreSQL has it
            connection.exec_driver_sql(f"BEGIN ISOLATION LEVEL {self.isolation_level(writes=writes)}")
            return Ending(commit=True, rollback=True)
        return super().begin(connection, writes=writes, is_own=is_own)

    def commits_each_statement(self, connection: Connection, *, is_own: bool) -> bool:
        """Save two of three round trips. A host's engine keeps its settings."""
        if is_own:
            driver: Any = connection.connection.dbapi_connection
            driver.autocommit = True
        return is_own

    @contextmanager
    def migration_lock(self, connection: Connection) -> Iterator[None]:
        """Hold an advisory lock until the end of the transaction."""
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
        yield

    def codes(self, error: Any) -> set[object]:
        """Return the codes of an error. pg8000 has the fields of PostgreSQL's answer in a dictionary."""
        first = next(iter(error.args), None)
        return {first["C"]} if isinstance(first, dict) else super().codes(error)

    def index_options(self, index: Index) -> dict[str, Any]:
        """Return the condition of the rows in the index."""
        rows = index.info["rows"]
        return {} if rows is None else {"postgresql_where": text(rows)}

    def insert_or_add(self, transaction: Transaction, table: Table, *, adds: str | None, **values: Any) -> None:
        """Insert or add in one statement, so that no other transaction comes in between."""
        transaction.change(upsert(postgresql.insert, table, adds), **values)

    def insert_new(
        self, transaction: Transaction, rows: Rows, notification: ColumnElement[Any] | None
    ) -> dict[str, int]:
        """Insert several rows by one statement. It waits for a transaction that inserts one of their event ids."""
        return insert_new(transaction, postgresql.insert, rows, notification)

    def claim(self, transaction: Transaction, kind: Kind, wanted: Wanted) -> Claim:
        """Claim fresh rows by one statement, which also checks the hold and the pause.

        Other claims take several statements.
        """
        claimed = postgresql_claims.take_at_once(transaction, kind, wanted)
        if claimed.rows or wanted.unless_paused:
            return claimed
        postgresql_claims.read_in_order(transaction)
        return super().claim(transaction, kind, wanted)

    def lock_part(self, transaction: Transaction, part: Part, wanted: Wanted) -> list[tuple[Any, ...]]:
        """Lock the first due rows of a part that no other transaction has locked, and no other row."""
        return postgresql_claims.SEARCHES[part].lock(transaction, wanted)

    def claim_never_due(self, transaction: Transaction, wanted: Wanted) -> Claim:
        """Find rows with huge times, which the other statements' index scans never reach."""
        return postgresql_claims.take_never_due(transaction, wanted)

    def deliver(
        self, transaction: Transaction, row_ids: Sequence[int], created_at_ms: Sequence[int], *, sent_at_ms: int
    ) -> int:
        """Move the rows by one statement, which gets the ids as an array."""
        return transaction.change(
            DELIVER, ids=list(row_ids), created_at_ms=list(created_at_ms), new_sent_at_ms=sent_at_ms
        )

    def listen(self, engine: Engine) -> Listener | None:
        """Listen on a connection of its own. Only psycopg reports notifications, and only without a pooler."""
        return postgresql_listener.listen(engine) if engine.dialect.driver == "psycopg" else None

    def hidden_commands(self, connection: Connection) -> list[str]:
        """Look for row-level security without a policy for this user."""
        return list(connection.scalars(HIDDEN_COMMANDS))


def _prepare_nothing_behind_a_pooler(engine: Engine) -> None:
    """Prepare no statement where a pooler shares connections between transactions.

    Each client of the pooler gives its prepared statements the same names, so the server could run the statement
    that another client prepared on the connection.
    """

    @event.listens_for(engine, "connect")
    def _look(connection: Any, _record: ConnectionPoolEntry) -> None:
        if postgresql_listener.is_behind_pooler(connection):
            connection.prepare_threshold = None
            log.warning(
                "%s: prepare_threshold is ignored, because a pooler stands in between",
                shown_url(engine),
                extra={"event_name": "outbox.prepare_threshold_ignored"},
            )
        connection.rollback()


def _psycopgs_options(url: URL) -> tuple[URL, dict[str, Any]]:
    """Return the URL without the psycopg options that are not texts, and the values of these options."""
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


DIALECT = PostgreSQL()
