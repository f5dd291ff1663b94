"""Writing transactions on the driver's own cursor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain, repeat
from typing import Any, TypeAlias, TypeVar

from sqlalchemy import CompoundSelect, Dialect, Engine, PoolProxiedConnection, Select, UpdateBase

from outbox.database import (
    begin,
    commits_by_itself,
    in_words,
    is_disconnect,
    is_given_up,
    keep,
    refusals,
    translated,
    use,
)
from outbox.failures import StorageError
from outbox.kept import KeptConnection
from outbox.sqlite import tolerant_text
from outbox.statements import CHUNK

Result = TypeVar("Result")
Returning: TypeAlias = UpdateBase | Select[Any] | CompoundSelect[Any]

# Between the tries: long enough in all for a server to fail over or to restart.
_PAUSES_S = (0.02, 0.05, 0.1, 0.5, 2.0)
_as_it_is = nullcontext()
_ID_NAMES = [f"id_{number}" for number in range(CHUNK)]


class NotBegunError(StorageError):
    """The kept connection could not begin a transaction, through no fault of what was to be done in it."""


class _UndoneError(StorageError):
    """The transaction did not happen, through no fault of its own."""


class _UnknownError(StorageError):
    """The connection broke during the commit."""


class _UnreachableError(StorageError):
    """There was no connection to be had."""


def _ignore(_result: object) -> None:
    pass


class Transaction:
    """A writing transaction on the driver's own cursor.

    It runs SQLAlchemy's statements, but each is compiled only once: SQLAlchemy's own way to run one costs several
    times what SQLite needs for it.
    """

    def __init__(self, cursor: Any, dialect: Dialect, compiled: dict[Any, _Compiled], *, is_own: bool) -> None:
        self._cursor = cursor
        self._dialect = dialect
        self._compiled = compiled
        self._is_own = is_own

    def rows(self, statement: Returning, /, **parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement that returns rows."""
        compiled = self._of(statement)
        with _as_it_is if self._is_own else tolerant_text(self._cursor, self._dialect):
            self._cursor.execute(compiled.text, compiled.arguments(parameters))
            return list(self._cursor.fetchall())

    def value(self, statement: Select[Any], /, **parameters: Any) -> Any:
        """Run a query for one value; None where there is no row."""
        rows = self.rows(statement, **parameters)
        return rows[0][0] if rows else None

    def change(self, statement: UpdateBase, /, **parameters: Any) -> int:
        """Run a statement and return how many rows it changed."""
        compiled = self._of(statement)
        self._cursor.execute(compiled.text, compiled.arguments(parameters))
        return int(self._cursor.rowcount)

    def change_many(self, statement: UpdateBase, several: list[dict[str, Any]], /) -> int:
        """Run a statement once for each set of parameters; return how many rows were changed in all."""
        compiled = self._of(statement)
        self._cursor.executemany(compiled.text, [compiled.arguments(parameters) for parameters in several])
        return int(self._cursor.rowcount)

    def rows_of(self, statement: Returning, row_ids: Sequence[int], /, **parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement that returns rows, for those that are named by their ids."""
        return [row for ids in _chunks(row_ids) for row in self.rows(statement, **ids, **parameters)]

    def change_rows(self, statement: UpdateBase, row_ids: Sequence[int], /, **parameters: Any) -> int:
        """Run a statement for rows that are named by their ids; return how many it changed."""
        return sum(self.change(statement, **ids, **parameters) for ids in _chunks(row_ids))

    def insert(self, statement: UpdateBase, rows: Iterable[dict[str, Any]], /) -> list[int]:
        """Insert rows one by one, and return their ids, as the driver tells them or the statement returns them."""
        compiled = self._of(statement)
        ids = []
        for row in rows:
            self._cursor.execute(compiled.text, compiled.arguments(row))
            ids.append(int(self._cursor.fetchone()[0] if compiled.returns else self._cursor.lastrowid))
        return ids

    def _of(self, statement: Returning) -> _Compiled:
        compiled = self._compiled.get(statement)
        if compiled is None:
            compiled = self._compiled[statement] = _Compiled(statement, self._dialect)
        return compiled


def _chunks(row_ids: Sequence[int]) -> Iterator[dict[str, int]]:
    """Give ids the names that they have in a statement for several rows."""
    for start in range(0, len(row_ids), CHUNK):
        chunk = row_ids[start : start + CHUNK]
        # Naming the last one several times is naming it once.
        yield dict(zip(_ID_NAMES, chain(chunk, repeat(chunk[-1])), strict=False))


class _Compiled:
    """The text of a statement for one driver, and where its parameters go."""

    def __init__(self, statement: Returning, dialect: Dialect) -> None:
        compiled: Any = statement.compile(dialect=dialect)
        self.text = str(compiled)
        self.returns = bool(compiled.effective_returning)
        self._fixed = {name: bind.value for name, bind in compiled.binds.items() if not bind.required}
        self._positions = compiled.positiontup
        self._refuses_nul = dialect.name == "postgresql"

    def arguments(self, parameters: dict[str, Any]) -> Any:
        values = self._fixed | parameters if self._fixed else parameters
        if self._refuses_nul:
            values = without_nul(values)
        return values if self._positions is None else [values[name] for name in self._positions]


def without_nul(values: dict[str, Any]) -> dict[str, Any]:
    """Return parameters as PostgreSQL takes them, whose texts hold every character but NUL."""
    return {
        name: value.replace("\0", "\ufffd") if isinstance(value, str) else value for name, value in values.items()
    }


class Writer:
    """Runs writing transactions on one engine, and keeps what they compiled: once for each statement."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._compiled: dict[Any, _Compiled] = {}
        self.kept = keep(engine)
        """The connection that threads take turns with; None where they write side by side."""
        self._refusals = refusals(engine)

    def run(
        self,
        operation: Callable[[Transaction], Result],
        *,
        repeatable: bool = False,
        is_single: bool = False,
        survives_power_cut: bool = True,
        committed: Callable[[Result], object] = _ignore,
    ) -> Result:
        """Run an operation in a transaction of its own, and return its result.

        One that `is_single` runs one statement, which is a transaction by itself: where that is known to hold, it
        is not wrapped in another one, which saves PostgreSQL two round trips of three. One that need not survive
        a power cut does not wait for the disk on SQLite.

        It is run again, a few times at most, when a server gave the transaction up, to end a deadlock for example,
        or when the connection broke before the commit; a server that goes away is then waited for. When it breaks
        during the commit nobody knows whether that was done, so then only if the operation is `repeatable`. Raises
        `StorageError`, and at once where there is no server to begin with.

        On the kept connection `committed` is called with the result once that is a fact, even where an exception
        that has another source, such as a signal, strikes right then.
        """
        if self.kept is not None:
            return self._in_turn(
                self.kept,
                operation,
                is_single=is_single,
                survives_power_cut=survives_power_cut,
                committed=committed,
            )
        began = False
        with use.inside(), translated(self._engine):
            for pause_s in _PAUSES_S:
                try:
                    return self._once(operation, is_single=is_single)
                except _UndoneError:
                    began = True
                except _UnknownError:
                    if not repeatable:
                        raise
                    began = True
                except _UnreachableError:
                    if not began:
                        raise
                time.sleep(pause_s)
            return self._once(operation, is_single=is_single)

    def on(self, cursor: Any) -> Transaction:
        """Return a transaction on a cursor; whoever has the cursor begins and ends it."""
        return Transaction(cursor, self._engine.dialect, self._compiled, is_own=False)

    def _in_turn(
        self,
        kept: KeptConnection,
        operation: Callable[[Transaction], Result],
        *,
        is_single: bool,
        survives_power_cut: bool,
        committed: Callable[[Result], object],
    ) -> Result:
        has_begun = is_committing = False
        # It keeps a fork waiting, too, like `use.inside`.
        with kept.turn:
            outer, kept.is_in_use = kept.is_in_use, True
            try:
                connection = kept.get(is_nested=outer, survives_power_cut=survives_power_cut)
                cursor = connection.cursor()
                try:
                    if not is_single:
                        cursor.execute("BEGIN IMMEDIATE")
                    has_begun = True
                    result = operation(Transaction(cursor, self._engine.dialect, self._compiled, is_own=True))
                    is_committing = True
                    connection.commit()
                    committed(result)
                except BaseException as error:
                    if is_committing and not connection.in_transaction and not isinstance(error, self._refusals):
                        committed(result)
                    cursor.close()  # one that still returns rows would let no later transaction commit
                    connection.rollback()
                    raise
            except self._refusals as error:
                kind = StorageError if has_begun else NotBegunError
                raise kind(in_words(self._engine, error)) from error
            finally:
                kept.is_in_use = outer
            return result

    def _once(self, operation: Callable[[Transaction], Result], *, is_single: bool) -> Result:
        connection = self._connection()
        committing = is_single and commits_by_itself(self._engine, connection)
        try:
            cursor = connection.cursor()
            if committing:
                result = operation(self.on(cursor))
            else:
                begin(self._engine, connection, cursor)
                result = operation(self.on(cursor))
                committing = True
                connection.commit()
        except self._engine.dialect.loaded_dbapi.Error as error:
            if is_disconnect(self._engine, connection, error):
                connection.invalidate()
                self._engine.dispose()  # the others of the pool are likely to be as broken
                words = in_words(self._engine, error)
                if committing:
                    raise _UnknownError(
                        f"{words}; the connection broke during the commit, it is not known whether that was done"
                    ) from error
                raise _UndoneError(words) from error
            connection.rollback()
            if is_given_up(error):
                raise _UndoneError(in_words(self._engine, error)) from error
            raise
        except BaseException:
            connection.rollback()
            raise
        finally:
            connection.close()
        return result

    def _connection(self) -> PoolProxiedConnection:
        try:
            return self._engine.raw_connection()
        except self._engine.dialect.loaded_dbapi.Error as error:
            raise _UnreachableError(in_words(self._engine, error)) from error
