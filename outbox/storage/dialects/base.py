"""What a database may do differently, each with its default. A dialect overrides what its database needs.

"Adding a database" in the documentation lists all of this in a table. SQLAlchemy adapts much of the SQL to the
database by itself; a dialect holds only what SQLAlchemy leaves to the application.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from sqlalchemy import URL, ColumnElement, CompoundSelect, Connection, Engine, Index, Select, Table, create_engine
from sqlalchemy import Dialect as SQLAlchemyDialect

from outbox.lifecycle import Status
from outbox.records import Claim, Listener
from outbox.storage import claimed, forks
from outbox.storage.claimed import Delivery, Kind, OneRowQuery, Part, Wanted
from outbox.storage.engines import Ending, Synchronous
from outbox.storage.inserts import Rows, insert_or_add, insert_several, insert_unknown, known
from outbox.storage.pings import ping_after_idling, roll_back_open_ones
from outbox.storage.sql import columns, is_one_of, lock, oldest
from outbox.storage.transactions import Transaction, Writer

_LOCK = {part: lock(claimed.due(part)) for part in Part}


class Dialect:
    """A database as the outbox uses it. The defaults are those of a server with standard SQL."""

    # URLs and drivers

    names: ClassVar[tuple[str, ...]]
    """The names that URLs may begin with."""
    drivers: ClassVar[tuple[str, ...]]
    """The drivers that the tests run on, as SQLAlchemy names them. Others are refused: they may differ."""
    default_drivers: ClassVar[Mapping[str, str]] = {}
    """The driver of a URL without a driver, by the name of the database: the driver that our extras install."""

    def with_driver(self, url: URL) -> URL:
        """Return the URL with a driver. By default it is one of `default_drivers`."""
        return url.set(drivername=self.default_drivers.get(url.drivername, url.drivername))

    connection_classes: ClassVar[Mapping[str, str]] = {}
    """The drivers whose own connections `enqueue` takes, by the classes of these connections."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """What these drivers are called, for error messages."""

    def plain_cursor(self, connection: Any, driver: SQLAlchemyDialect) -> Any:
        """Return a cursor on a caller's connection whose rows are tuples, whatever rows the connection makes."""
        return connection.cursor()

    def is_two_phase(self, connection: Any) -> bool:
        """Return whether a driver's connection is in a two-phase transaction, in which it can't notify."""
        return False

    # Engines

    def create_engine(self, url: URL, *, synchronous: Synchronous) -> Engine:
        """Return an engine of our own. By default a pool of connections that are READ COMMITTED.

        At other isolation levels, a claim that waited for another claim fails.
        """
        url, connect_args = self.driver_options(url)
        engine = create_engine(
            url,
            hide_parameters=True,
            isolation_level="READ COMMITTED",
            poolclass=forks.OwnPool,
            connect_args=connect_args,
            pool_reset_on_return=None,
        )
        roll_back_open_ones(engine)
        ping_after_idling(engine, self.give_back)
        return engine

    def driver_options(self, url: URL) -> tuple[URL, dict[str, Any]]:
        """Return the URL without options that SQLAlchemy can't pass on, and these options as driver arguments.

        By default there are none. Raises `ConfigurationError` for a wrong value.
        """
        return url, {}

    def give_back(self, connection: Any) -> None:
        """Reset what the outbox changed on a driver's connection that returns to our pool."""

    def writer(self, engine: Engine, *, is_own: bool) -> Writer:
        """Return the writer of transactions. By default it uses the engine's pooled connections."""
        return Writer(engine)

    def unprepared(self, connection: Any) -> AbstractContextManager[None]:
        """Keep the driver of the application from preparing statements. By default drivers prepare none."""
        return nullcontext()

    # Files

    def file_of(self, url: URL) -> Path | None:
        """Return the file of the database: it has to be closed before a fork. Servers have none."""
        return None

    def absolute(self, url: URL) -> URL:
        """Return the URL so that it names the same file after the program changes its directory.

        Raises `OSError` if the path is relative and the current directory was deleted.
        """
        return url

    def is_in_memory(self, url: URL) -> bool:
        """Return whether the database is in the memory of this process, so a fork copies it."""
        return False

    def missing_file(self, url: URL) -> Path | None:
        """Return the file of the database if it is missing. Raises `StorageError` if that can't be found out."""
        return None

    def create_file(self, url: URL) -> None:
        """Create the file of the database if there is none. On a server the administrator creates the database."""

    # The clock

    clock: ClassVar[Any] = None
    """The query for the clock, in ms. A database that several hosts share has one: they compare times by it."""

    @property
    def is_shared(self) -> bool:
        """Whether several hosts share the database."""
        return self.clock is not None

    # Transactions

    def begin(self, connection: Connection, *, writes: bool, is_own: bool) -> Ending:
        """Begin the transaction unless SQLAlchemy did. Return for which ends the driver needs a statement.

        A transaction that `writes` is READ COMMITTED; any other one reads a snapshot. The connection keeps the
        application's settings.
        """
        if not (writes and is_own):  # our own engines are set up so
            connection.exec_driver_sql(f"SET TRANSACTION ISOLATION LEVEL {self.isolation_level(writes=writes)}")
        return Ending()

    @staticmethod
    def isolation_level(*, writes: bool) -> str:
        """Return the isolation level of a transaction."""
        return "READ COMMITTED" if writes else "REPEATABLE READ"

    def commits_each_statement(self, connection: Connection, *, is_own: bool) -> bool:
        """Let each statement commit by itself until the connection is given back.

        By default return False and change nothing: on most drivers this costs more than it saves.
        """
        return False

    def migration_lock(self, connection: Connection) -> AbstractContextManager[None]:
        """Block other migrations, here and on other hosts. By default the transaction's write lock does so."""
        return nullcontext()

    begins_at_head: ClassVar[bool] = True
    """Whether an empty database gets the declared tables: released migrations support only older dialects."""

    # Errors

    code_attributes: ClassVar[tuple[str, ...]] = ()
    """The attributes in which drivers keep the code of an error, beside the first argument."""
    given_up: ClassVar[frozenset[object]] = frozenset()
    """The error codes of a transaction that the database aborted, to end a deadlock or a conflict."""
    timed_out: ClassVar[frozenset[object]] = frozenset()
    """The error codes of a statement that waited too long for a lock."""
    unknown: ClassVar[frozenset[object]] = frozenset()
    """The error codes of a COMMIT that may have succeeded nevertheless."""
    outdated: ClassVar[frozenset[object]] = frozenset()
    """The error codes after which only a new connection helps, as when a switchover made the server read-only."""
    duplicate: ClassVar[frozenset[object]] = frozenset()
    """The error codes of an INSERT whose unique key another row already has."""
    advice: ClassVar[tuple[tuple[str, str], ...]] = ()
    """What to do about an error, by a part of its text."""

    def codes(self, error: Any) -> set[object]:
        """Return the codes of a driver's error."""
        return {next(iter(error.args), None), *(getattr(error, name, None) for name in self.code_attributes)}

    def tolerant_text(self, connection: Any) -> AbstractContextManager[None]:
        """Read texts with invalid characters, on a driver's connection. By default the database stores none."""
        return nullcontext()

    stores_nul: ClassVar[bool] = True
    """Whether texts can hold the character NUL. If not, it is replaced."""

    # Tables. What the types of the columns are called is a hook of SQLAlchemy's compiler in the dialect's module.

    indexes: ClassVar[frozenset[str]]
    """Which of the declared indexes the database has."""

    def table_options(self, table: Table) -> dict[str, Any]:
        """Return SQLAlchemy's options of a table."""
        return {}

    def index_options(self, index: Index) -> dict[str, Any]:
        """Return SQLAlchemy's options of an index, such as the condition of the rows in it, `info["rows"]`."""
        return {}

    def adapted(self, statement: Any) -> Any:
        """Return a statement as the database should run it. By default planners choose the indexes well."""
        return statement

    # Inserts

    notification: ClassVar[ColumnElement[Any] | None] = None
    """A column for INSERT to return: the row id. At the commit, it also notifies other processes of new events."""
    last_insert_id: ClassVar[Select[Any] | None] = None
    """The query for the id that was inserted last, for drivers that forget it."""

    def insert_several(
        self, transaction: Transaction, rows: Rows, notification: ColumnElement[Any] | None
    ) -> list[int]:
        """Insert the rows of a destination; return their ids in the order of the rows.

        By default, an INSERT of several rows returns all their ids, and the ids grow in the order of the rows.
        """
        return insert_several(transaction, rows, notification)

    def insert_or_add(self, transaction: Transaction, table: Table, *, adds: str | None, **values: Any) -> None:
        """Insert a row; if there is one with its key, add to the column `adds`, or leave the row as it is.

        By default in two statements, which suits a database with one writer at a time.
        """
        insert_or_add(transaction, table, adds, values)

    def insert_new(
        self, transaction: Transaction, rows: Rows, notification: ColumnElement[Any] | None
    ) -> dict[str, int]:
        """Insert the rows of a destination whose event ids are new there; return their row ids by event id.

        By default, this looks for the ids, then inserts the rows one by one. If another transaction inserts the
        same id meanwhile, the database refuses the row as a duplicate. This must undo that statement alone.
        """
        return insert_unknown(
            transaction, rows, is_duplicate=lambda error: not self.duplicate.isdisjoint(self.codes(error))
        )

    def known_now(self, transaction: Transaction, destination: str, event_ids: Sequence[str]) -> dict[str, int]:
        """Return the row ids of those events of a destination that are in the database now, by event id.

        The default is for databases where each query sees everything that was committed before the query began.
        """
        return known(transaction, destination, event_ids)

    # Claims and outcomes

    delivers_at_once: ClassVar[bool] = False
    """Whether `deliver` and `deliver_and_query` are each one statement for any number of rows."""

    is_any_due: ClassVar[ColumnElement[bool] | None] = None
    """The condition that a claim would find a row, also one with invalid times. None: a claim costs no more.

    With it, `claim` is first called with `unless_paused`. If that takes no row, it is only called again if the
    condition is true.
    """

    def claim(self, transaction: Transaction, kind: Kind, wanted: Wanted) -> Claim:
        """Move the first due rows of a kind to sending; leave out rows that another transaction has locked.

        By default the rows are locked first, and then moved.
        """
        locked = claimed.lock_kind(partial(self.lock_part, transaction), kind, wanted)
        row_ids = [row[0] for row in locked]
        transaction.change_rows(claimed.CLAIM_ROWS, row_ids, lease_until=wanted.lease_until_ms)
        return claimed.claim_of_due(locked, kind, wanted.outbox_id)

    def lock_part(self, transaction: Transaction, part: Part, wanted: Wanted) -> list[tuple[Any, ...]]:
        """Lock the first rows of a part that are due, or whose due time is invalid."""
        return transaction.rows(_LOCK[part], **wanted.due)

    def claim_never_due(self, transaction: Transaction, wanted: Wanted) -> Claim:
        """Claim rows whose times are invalid, to abandon them. By default `claim` finds them."""
        return Claim([])

    def deliver(self, transaction: Transaction, delivery: Delivery) -> int:
        """Mark rows, by id and creation time, as sent. Return how many rows changed. By default in chunks."""
        row_ids, created_at_ms, sent_at_ms = delivery
        return transaction.change_events(claimed.DELIVER, row_ids, created_at_ms, new_sent_at_ms=sent_at_ms)

    def deliver_and_query(
        self, transaction: Transaction, delivery: Delivery, query: OneRowQuery
    ) -> tuple[int, tuple[Any, ...]]:
        """Do what `deliver` does, and run a query, by default as another statement. Return the results of both."""
        return self.deliver(transaction, delivery), transaction.rows(query.statement, **query.parameters)[0]

    # Counts and deletion

    pending: ClassVar[tuple[ColumnElement[bool], ...]] = (
        is_one_of(columns.status, Status.PENDING, Status.SENDING),
    )
    """Conditions that together match all pending and sending rows, each row by exactly one of them."""

    undelivered_to_trim: ClassVar[tuple[Select[Any] | CompoundSelect[Any], ...]] = tuple(
        oldest(status) for status in (Status.PENDING, Status.SENDING, Status.PARKED)
    )
    """The queries for the undelivered rows that the cap deletes, each in the order of one index, oldest first."""

    chores: ClassVar[Select[Any] | None] = None
    """A query with the columns of `views.CHORES` that costs this database less; None for `views.CHORES` itself."""

    # Monitoring

    def listen(self, engine: Engine) -> Listener | None:
        """Return a connection that is notified of new events, or None if flushers have to poll."""
        return None

    def hidden_commands(self, connection: Connection) -> list[str]:
        """Return the commands that find no rows because the database hides all of them from this user."""
        return []

    def checks(self, engine: Engine) -> Mapping[str, Callable[[], Iterator[tuple[bool, str]]]]:
        """Return the checks of `outbox doctor` for this database only. A result is: is all well, and in words."""
        return {}
