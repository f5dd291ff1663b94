"""Writing transactions on the driver's own cursor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Dialect, Engine, Select, UpdateBase

from outbox.database import in_transaction, translated, use


class Transaction:
    """A writing transaction on the driver's own cursor.

    It runs SQLAlchemy's statements, but each is compiled only once: SQLAlchemy's own way to run one costs several
    times what SQLite needs for it.
    """

    def __init__(self, cursor: Any, dialect: Dialect, compiled: dict[Any, _Compiled]) -> None:
        self._cursor = cursor
        self._dialect = dialect
        self._compiled = compiled

    def rows(self, statement: UpdateBase | Select[Any], /, **parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement that returns rows."""
        compiled = self._of(statement)
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

    def insert(self, statement: UpdateBase, rows: Iterable[dict[str, Any]], /) -> list[int]:
        """Insert rows one by one, and return their ids."""
        compiled = self._of(statement)
        ids = []
        for row in rows:
            self._cursor.execute(compiled.text, compiled.arguments(row))
            ids.append(int(self._cursor.lastrowid))
        return ids

    def _of(self, statement: UpdateBase | Select[Any]) -> _Compiled:
        compiled = self._compiled.get(statement)
        if compiled is None:
            compiled = self._compiled[statement] = _Compiled(statement, self._dialect)
        return compiled


class _Compiled:
    """The text of a statement for one driver, and where its parameters go."""

    def __init__(self, statement: UpdateBase | Select[Any], dialect: Dialect) -> None:
        compiled: Any = statement.compile(dialect=dialect)
        self.text = str(compiled)
        self._fixed = {name: bind.value for name, bind in compiled.binds.items() if not bind.required}
        self._positions = compiled.positiontup

    def arguments(self, parameters: dict[str, Any]) -> Any:
        values = self._fixed | parameters
        return values if self._positions is None else [values[name] for name in self._positions]


class Writer:
    """Opens writing transactions on one engine, and keeps what they compiled: once for each statement."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._compiled: dict[Any, _Compiled] = {}

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Like `writing`, on the driver's own cursor."""
        with use.inside(), translated(self.engine):
            connection = self.engine.raw_connection()
            try:
                cursor = connection.cursor()
                if self.engine.dialect.name == "sqlite" and not in_transaction(connection):
                    cursor.execute("BEGIN IMMEDIATE")
                yield Transaction(cursor, self.engine.dialect, self._compiled)
                connection.commit()
            except BaseException:
                connection.rollback()
                raise
            finally:
                connection.close()
