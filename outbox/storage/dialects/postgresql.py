"""PostgreSQL, which many hosts share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    Index,
    Table,
    and_,
    literal_column,
    select,
    text,
)
from sqlalchemy import Dialect as SQLAlchemyDialect
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.compiler import compiles

from outbox.lifecycle import Status
from outbox.records import Claim, Listener
from outbox.storage import postgresql_claims, postgresql_connections, postgresql_listener
from outbox.storage.claimed import (
    Delivery,
    Kind,
    OneRowQuery,
    Part,
    Wanted,
    is_pending,
    is_sending,
    waits_for_other,
    waits_for_row,
)
from outbox.storage.dialects.base import Dialect
from outbox.storage.engines import MIGRATION_LOCK, Ending, Synchronous
from outbox.storage.inserts import Rows, insert_new
from outbox.storage.sql import (
    contains_text,
    did_not_fail,
    failed_before,
    is_postponed,
    never_tried,
    oldest,
    upsert,
)
from outbox.storage.transactions import Transaction

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
    """PostgreSQL, with one of three drivers."""

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
    # SQLSTATEs. `given_up`: serialization failure, deadlock. `outdated`: the server takes no writes any more; the
    # type of a column was changed since a statement was prepared, or what was prepared was discarded.
    code_attributes = ("sqlstate", "pgcode")
    given_up = frozenset({"40001", "40P01"})
    outdated = frozenset({"25006", "0A000", "26000"})
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
    # Part of the INSERT, so it needs no extra round trip. It is the id, too, so the INSERT returns one column.
    # A transaction that notifies several times sends one notification.
    notification = literal_column(
        f"CASE WHEN pg_notify('{postgresql_listener.CHANNEL}', '') IS NOT NULL THEN observation_events.id END"
    )
    is_any_due = postgresql_claims.IS_ANY_DUE
    delivers_at_once = True
    # One condition for each index.
    pending = (
        and_(is_pending, did_not_fail, never_tried),
        and_(is_pending, did_not_fail, is_postponed),
        and_(is_sending, did_not_fail),
        and_(*Dialect.pending, failed_before),
    )
    undelivered_to_trim = (
        oldest(Status.PENDING, only=and_(did_not_fail, never_tried)),
        oldest(Status.PENDING, only=and_(did_not_fail, is_postponed)),
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
        """Return an engine on which psycopg prepares statements, but not where a pooler may stand in between.

        Without `prepare_threshold` in the URL, it prepares those that stand alone, such as those of `enqueue`.
        """
        engine = super().create_engine(url, synchronous=synchronous)
        if engine.dialect.driver == "psycopg":
            if "prepare_threshold" not in url.query:
                postgresql_connections.look_for_direct_connections(engine)
            elif self.driver_options(url)[1]["prepare_threshold"] is not None:
                postgresql_connections.prepare_nothing_behind_a_pooler(engine)
        return engine

    def driver_options(self, url: URL) -> tuple[URL, dict[str, Any]]:
        """Convert `prepare_threshold`, because psycopg needs a number."""
        return postgresql_connections.psycopgs_options(url)

    def give_back(self, connection: Any) -> None:
        """Undo what `commits_each_statement` set."""
        connection.autocommit = False

    @contextmanager
    def unprepared(self, connection: Any) -> Iterator[None]:
        """Let psycopg prepare nothing on the application's connection, because it may lead to a pooler."""
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
        """Begin with a statement if the driver commits each statement, because such a driver ignores `commit()`.

        A transaction that only reads gets planner settings of its own.
        """
        if not (writes and is_own) and connection.connection.dbapi_connection.autocommit:  # type: ignore[union-attr]  # every driver of PostgreSQL has it
            connection.exec_driver_sql(f"BEGIN ISOLATION LEVEL {self.isolation_level(writes=writes)}")
            ending = Ending(commit=True, rollback=True)
        else:
            ending = super().begin(connection, writes=writes, is_own=is_own)
        if not writes:
            postgresql_connections.plan_reads(connection)
        return ending

    def commits_each_statement(self, connection: Connection, *, is_own: bool) -> bool:
        """Save two of three round trips. The application's engine keeps its settings.

        Return False if the server may have closed the connection. The caller then opens a transaction, whose first
        statement fails before anything is written.
        """
        driver: Any = connection.connection.dbapi_connection
        if not is_own or postgresql_connections.may_be_closed(driver):
            return False
        driver.autocommit = True
        postgresql_connections.prepare(connection)
        return True

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
        """Claim fresh rows with one statement, if possible.

        The statement also checks for a hold and a pause of the destination. Other claims take several statements.
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

    def deliver(self, transaction: Transaction, delivery: Delivery) -> int:
        """Move any number of rows by one statement."""
        return postgresql_claims.deliver(transaction, delivery)

    def deliver_and_query(
        self, transaction: Transaction, delivery: Delivery, query: OneRowQuery
    ) -> tuple[int, tuple[Any, ...]]:
        """Deliver and run the query in one statement. The query sees the rows as they were before the delivery."""
        return postgresql_claims.deliver_and_query(transaction, delivery, query)

    def listen(self, engine: Engine) -> Listener | None:
        """Listen on a connection of its own. Only psycopg reports notifications, and only without a pooler."""
        return postgresql_listener.listen(engine) if engine.dialect.driver == "psycopg" else None

    def hidden_commands(self, connection: Connection) -> list[str]:
        """Look for row-level security without a policy for this user."""
        return list(connection.scalars(HIDDEN_COMMANDS))


DIALECT = PostgreSQL()
