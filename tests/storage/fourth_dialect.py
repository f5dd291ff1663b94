"""A fourth database for the contract suite: SQLite under another name, which can do less.

Its driver gives back no rows that it changed, inserts one row at a time, has no upsert, and keeps no connection. So the
defaults of the contract take over. This file is all that the outbox needs to know of such a database.
"""

from __future__ import annotations

from typing import Any, ClassVar

from alembic.ddl.sqlite import SQLiteImpl
from sqlalchemy import Engine
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.ext.compiler import compiles

from outbox.storage.column_types import Id
from outbox.storage.dialects import register
from outbox.storage.dialects.base import Dialect
from outbox.storage.dialects.mysql import MySQL
from outbox.storage.dialects.sqlite import SQLite
from outbox.storage.sql import without_index
from outbox.storage.transactions import Writer


class FourthDriver(SQLiteDialect_pysqlite):
    """What a third-party package brings for SQLAlchemy."""

    name = "fourth"
    supports_statement_cache = True


class FourthImpl(SQLiteImpl):
    """What it brings for Alembic."""

    __dialect__ = "fourth"


registry.register("fourth", __name__, "FourthDriver")
registry.register("fourth.pysqlite", __name__, "FourthDriver")


@compiles(Id, "fourth")
def _integer(_type: Id, _compiler: object, **_: object) -> str:
    return "INTEGER"


@compiles(without_index, "fourth")
def _with_plus(element: without_index, compiler: Any, **options: Any) -> str:
    return f"+{compiler.process(element.clauses, **options)}"


class Fourth(SQLite):
    names = ("fourth",)
    drivers = ("fourth+pysqlite",)
    default_drivers: ClassVar = {"fourth": "fourth+pysqlite"}
    connection_classes: ClassVar = {"sqlite3.Connection": "fourth+pysqlite"}
    libraries = ()
    begins_at_head = True
    duplicate = frozenset({2067})  # SQLITE_CONSTRAINT_UNIQUE
    insert_or_add = Dialect.insert_or_add
    insert_new = Dialect.insert_new
    insert_several = MySQL.insert_several
    claim = Dialect.claim
    undelivered_to_trim = Dialect.undelivered_to_trim

    def writer(self, engine: Engine, *, is_own: bool) -> Writer:
        return Writer(engine)


register(Fourth())
