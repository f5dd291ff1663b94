"""Writing transactions: on SQLAlchemy's `Connection`, or on the driver's own cursor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from operator import itemgetter
from typing import Any, TypeAlias, TypeVar

from sqlalchemy import CompoundSelect, Dialect, Engine, Insert, Select, UpdateBase
from sqlalchemy.exc import DBAPIError

from outbox.failures import OutcomeUnknown, StorageError
from outbox.storage import forks
from outbox.storage.dialects import dialect_of
from outbox.storage.engines import begun, in_words, is_own, refusals, translated
from outbox.storage.patience import waits_s
from outbox.storage.sql import CHUNK, LISTED_TEXT

Result = TypeVar("Result")
Returning: TypeAlias = UpdateBase | Select[Any] | CompoundSelect[Any]

_LISTED_AT_ONCE = 500
_ID_NAMES = [f"id_{number}" for number in range(CHUNK)]
_CREATED_NAMES = [f"created_at_ms_{number}" for number in range(CHUNK)]


class _UndoneError(StorageError):
    """The server aborted the transaction, for example to end a deadlock, or went away. It can be run again."""


class _UnreachableError(StorageError):
    """No connection could be opened."""


class OutOfPatienceError(StorageError):
    """The database could not be reached, was locked, or aborted each try, until the patience was over."""


class Transaction:
    """A transaction, which its owner begins and ends. Each statement is compiled only once.

    `run` gets the text of a statement and its parameters, or a list of them to run it once for each. It returns
    a result with the rows, their number and the last id. `Connection.exec_driver_sql` is such a function: the
    engine's listeners, log and traces see its statements like all others, and it costs a fraction of SQLAlchemy's
    usual way.
    """

    def __init__(self, run: Callable[[str, Any], Any], dialect: Dialect, compiled: dict[Any, Compiled]) -> None:
        self._run = run
        self._dialect = dialect
        self._compiled = compiled

    @property
    def returns_inserted(self) -> bool:
        """Whether an INSERT can return columns of the inserted rows. SQLAlchemy learns this from the server."""
        return self._dialect.insert_returning

    def rows(self, statement: Returning, /, **parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement that returns rows."""
        compiled = self.compiled(statement)
        return list(self._run(compiled.text, compiled.arguments(parameters)).fetchall())

    def run(self, statement: Returning, names: list[str], values: list[Any], /) -> Any:
        """Run a statement with many parameters, and return the result of the driver. `names` are all different."""
        compiled = self.compiled(statement)
        return self._run(compiled.text, compiled.arguments_in_order(names, values))

    def value(self, statement: Select[Any], /, **parameters: Any) -> Any:
        """Run a query for one value; None where there is no row."""
        rows = self.rows(statement, **parameters)
        return rows[0][0] if rows else None

    def change(self, statement: UpdateBase, /, **parameters: Any) -> int:
        """Run a statement and return how many rows it changed."""
        compiled = self.compiled(statement)
        return int(self._run(compiled.text, compiled.arguments(parameters)).rowcount)

    def change_listed(self, statement: UpdateBase, several: Sequence[str], /, **parameters: Any) -> int:
        """Run a statement with integers, or pairs of them, in the place of `LISTED`. Return how many rows changed.

        The drivers of MySQL write each parameter into the text by Python functions, which takes longer.
        """
        compiled = self.compiled(statement)
        arguments = compiled.arguments(parameters)
        # MariaDB turns a list of a thousand into a subquery. Then it would read and lock every row.
        slices = (several[start : start + _LISTED_AT_ONCE] for start in range(0, len(several), _LISTED_AT_ONCE))
        # MariaDB also reads every row for a list of one pair, so a single item is listed twice.
        lists = (",".join(these if len(these) > 1 else [*these, *these]) for these in slices)
        texts = (compiled.text.replace(LISTED_TEXT, this) for this in lists)
        return sum(self._run(text, arguments).rowcount for text in texts)

    def change_many(self, statement: UpdateBase, several: Sequence[dict[str, Any]], /) -> int:
        """Run a statement once for each set of parameters; return how many rows were changed in all."""
        if not self._dialect.supports_sane_multi_rowcount:  # it would tell how many the last ones changed
            return sum(self.change(statement, **parameters) for parameters in several)
        compiled = self.compiled(statement)
        return int(self._run(compiled.text, [compiled.arguments(parameters) for parameters in several]).rowcount)

    def rows_of(self, statement: Returning, row_ids: Sequence[Any], /, **parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement that returns rows, for the rows with these row ids or event ids."""
        return [row for ids in _chunks(row_ids) for row in self.rows(statement, **ids, **parameters)]

    def change_rows(self, statement: UpdateBase, row_ids: Sequence[int], /, **parameters: Any) -> int:
        """Run a statement for the rows with these ids. Return how many it changed."""
        return sum(self.change(statement, **ids, **parameters) for ids in _chunks(row_ids))

    def change_events(
        self, statement: UpdateBase, row_ids: Sequence[int], created_at_ms: Sequence[int], /, **parameters: Any
    ) -> int:
        """Run a statement for the rows with these ids and creation times. Return how many it changed."""
        chunks = zip(_chunks(row_ids), _chunks(created_at_ms, _CREATED_NAMES), strict=True)
        return sum(self.change(statement, **ids, **created, **parameters) for ids, created in chunks)

    def insert(self, statement: UpdateBase, rows: Iterable[dict[str, Any]], /) -> list[int]:
        """Insert rows one by one, and return their ids, as the driver tells them or the statement returns them."""
        compiled = self.compiled(statement)
        ids = []
        for row in rows:
            done = self._run(compiled.text, compiled.arguments(row))
            if compiled.returns:
                returned = done.fetchone()
            else:  # the driver mariadb forgets the id when its cursor is closed
                returned = done.rowcount and (done.lastrowid or self._last_insert_id(),)
            if not returned:
                raise left_out(1)
            ids.append(returned[0])
        return ids

    def _last_insert_id(self) -> int:
        query = dialect_of(self._dialect).last_insert_id
        return 0 if query is None else int(self.value(query))

    def compiled(self, statement: Returning) -> Compiled:
        """Return the compiled statement: its text, and the order of its parameters."""
        compiled = self._compiled.get(statement)
        if compiled is None:
            compiled = self._compiled[statement] = Compiled(statement, self._dialect)
        return compiled


def running_on(cursor: Any) -> Callable[[str, Any], Any]:
    """Return the function that runs statements on a driver's cursor."""

    def run(text: str, arguments: Any) -> Any:
        (cursor.executemany if isinstance(arguments, list) else cursor.execute)(text, arguments)
        return cursor

    return run


def _chunks(values: Sequence[Any], names: Sequence[str] = _ID_NAMES) -> Iterator[dict[str, Any]]:
    """Yield, for each chunk, the parameters of a statement for several rows: one per id or other value."""
    for start in range(0, len(values), CHUNK):
        chunk = values[start : start + CHUNK]
        # A statement always has 64 ids. The last id fills the rest, which changes nothing.
        yield dict(zip(names, chain(chunk, repeat(chunk[-1])), strict=False))


class Compiled:
    """The text of a statement for one driver, and where its parameters go."""

    def __init__(self, statement: Returning, dialect: Dialect) -> None:
        database = dialect_of(dialect)
        compiled: Any = database.adapted(statement).compile(dialect=dialect)
        self.text = str(compiled)
        self.returns = bool(compiled.effective_returning)
        self._fixed = {name: bind.value for name, bind in compiled.binds.items() if not bind.required}
        self._positions: list[str] | None = compiled.positiontup
        # `itemgetter` returns a tuple only for several names.
        self._values = itemgetter(*self._positions) if len(self._positions or ()) > 1 else None
        self._stores_nul = database.stores_nul

    def arguments(self, parameters: dict[str, Any]) -> Any:
        """Return the parameters as the driver expects them."""
        values = self._fixed | parameters if self._fixed else parameters
        if not self._stores_nul:
            values = without_nul(values)
        if self._values is not None:
            return self._values(values)
        return values if self._positions is None else tuple([values[name] for name in self._positions])

    def arguments_in_order(self, names: list[str], values: list[Any]) -> Any:
        """Return the same as `arguments`. This is faster if the names have the order of the statement."""
        if names == self._positions and self._stores_nul:  # fast path, on SQLite only
            return tuple(values)
        return self.arguments(dict(zip(names, values, strict=True)))


def without_nul(values: dict[str, Any]) -> dict[str, Any]:
    """Return parameters with a replacement for NUL, the one character that texts can't hold on some databases."""
    return {
        name: value.replace("\0", "\ufffd") if isinstance(value, str) else value for name, value in values.items()
    }


def left_out(number: int) -> StorageError:
    """Return the error for events that were not inserted though nothing refused them."""
    return StorageError(f"a trigger of the database left out some of {number} events")


class Writer:
    """Runs writing transactions on one engine, and caches their compiled statements."""

    patience_ms = 5_000
    """How long an operation is retried while the server can't be reached."""
    flush_patience_ms = 30_000
    """How long an operation of a flusher is retried."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._database = dialect_of(engine)
        self._compiled: dict[Any, Compiled] = {}
        self._refusals = refusals(engine)

    def run(
        self,
        operation: Callable[[Transaction], Result],
        *,
        repeatable: bool = False,
        is_single: bool = False,
        survives_power_cut: bool = True,
        shares_commit: bool = False,  # noqa: ARG002 - servers let transactions commit side by side
    ) -> Result:
        """Run an operation in a transaction of its own, and return its result.

        An `is_single` operation runs one statement, without a transaction if the driver commits each statement.

        The operation is run again if the server aborted the transaction, for example to end a deadlock, if the
        connection broke before the commit, or if none can be opened. This ends after `patience_ms`, or after
        `flush_patience_ms` without `survives_power_cut`, because such operations are those of flushers. If the
        connection breaks during the commit, only a `repeatable` operation is run again: the result is unknown.

        Raises `StorageError`, and `OutcomeUnknown` if a commit may have succeeded.
        """
        unknown: OutcomeUnknown | None = None
        waits = waits_s(self.patience_ms if survives_power_cut else self.flush_patience_ms)
        with forks.held_back(), translated(self._engine):
            while True:
                try:
                    return self._once(operation, is_single=is_single)
                except OutcomeUnknown as error:
                    if not repeatable:
                        raise
                    failure: StorageError = error
                    unknown = error
                except (_UndoneError, _UnreachableError) as error:
                    failure = unknown or OutOfPatienceError(str(error))
                    failure.__cause__ = failure.__cause__ or error.__cause__
                wait_s = next(waits, None)
                if wait_s is None:
                    raise failure
                time.sleep(wait_s)

    def insert(self, statement: Insert, row: dict[str, Any]) -> int:
        """Insert a row in a transaction of its own, and return its id."""
        return self.run(lambda transaction: transaction.insert(statement, [row]), is_single=True)[0]

    def state(self, transaction: Transaction, *, changes: int = 0) -> object:  # noqa: ARG002 - a server has no such value
        """Return a value that differs after every change of a row, whoever made it. None: there is no such value.

        It is the value before the latest `changes` of this transaction.
        """
        return None

    def _once(self, operation: Callable[[Transaction], Result], *, is_single: bool) -> Result:
        try:
            connection = self._engine.connect()
        except DBAPIError as error:
            raise _UnreachableError(in_words(self._engine, error)) from error.orig
        with connection:
            transaction = Transaction(connection.exec_driver_sql, self._engine.dialect, self._compiled)
            committing = is_single and self._database.commits_each_statement(
                connection, is_own=is_own(self._engine)
            )
            try:
                if committing:
                    return operation(transaction)
                with (
                    begun(self._engine, connection, writes=True),
                    self._database.tolerant_text(connection.connection.dbapi_connection),
                ):
                    result = operation(transaction)
                    committing = True
            except DBAPIError as error:
                words = in_words(self._engine, error)
                codes = self._database.codes(error.orig)
                if not codes.isdisjoint(self._database.outdated):
                    connection.invalidate(error)
                    self._engine.dispose()  # the others of the pool lead to the same server
                    raise _UndoneError(words) from error.orig
                is_unknown = error.connection_invalidated or not codes.isdisjoint(self._database.unknown)
                if committing and is_unknown:
                    raise OutcomeUnknown(
                        f"{words}; the connection broke during the commit, it is not known whether that was done"
                    ) from error.orig
                passing = self._database.given_up | self._database.timed_out
                if error.connection_invalidated or not codes.isdisjoint(passing):
                    raise _UndoneError(words) from error.orig
                raise
        return result


def read(writer: Writer, query: Callable[[Transaction], Result]) -> Result:
    """Read by a single query, outside of any transaction."""
    return writer.run(query, repeatable=True, is_single=True, survives_power_cut=False)
