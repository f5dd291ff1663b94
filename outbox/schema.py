"""Checks and upgrades the schema of the database. Only this module uses Alembic."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, Engine, inspect

from outbox.failures import SchemaError, StorageError
from outbox.storage.dialects import dialect_of
from outbox.storage.engines import migrating, reading, shown_url
from outbox.storage.patience import waits_s
from outbox.storage.tables import VERSION_TABLE, Base

if TYPE_CHECKING:
    from alembic.config import Config

Result = TypeVar("Result")

REVISIONS = tuple(f"outbox_{number:04}" for number in range(1, 13))
"""The revisions that this program knows, oldest first. Listed here so that a check need not load Alembic."""

TABLES = frozenset({*Base.metadata.tables, VERSION_TABLE})

# Tries are counted, not time: an upgrade may have waited long for another one before the database aborts it.
_TRIES = 9

# Alembic uses module globals, so two upgrades in one process would interfere, even on different databases.
# The lock is held only inside a transaction. No fork happens there, so no child inherits the lock in use.
_alembic_lock = threading.Lock()


def check(engine: Engine) -> None:
    """Raise `SchemaError` unless the database has exactly this program's schema. Changes nothing.

    Raises `StorageError` if the database can't be read.
    """
    where = shown_url(engine)
    missing = dialect_of(engine).missing_file(engine.url)
    if missing is not None:
        raise SchemaError(
            f"there is no database {missing}; check the URL, or create it with `outbox upgrade` or Outbox.open()"
        )
    revision = _repeated(engine, _read_revision)
    if revision is None:
        raise SchemaError(f"{where} has no outbox schema; `outbox upgrade` or Outbox.open() creates it")
    _refuse_newer(revision, where)
    if revision != REVISIONS[-1]:
        raise SchemaError(
            f"{where} has the schema {revision}, this program needs {REVISIONS[-1]};"
            " `outbox upgrade` or Outbox.open() upgrades it"
        )


def upgrade(engine: Engine) -> str | None:
    """Create or upgrade the schema. Return its revision before the upgrade, or None if there was no schema.

    Any number of threads and processes may call it at once: one upgrades, the others wait. On SQLite and
    PostgreSQL a failed upgrade leaves the database as it was; on MariaDB and MySQL the next upgrade continues it.
    Raises `SchemaError` if the schema is newer than this program, and `StorageError` if the database fails.
    """
    dialect_of(engine).create_file(engine.url)
    revision = _repeated(engine, _read_revision)
    if revision == REVISIONS[-1]:
        return revision
    found: list[str | None] = []
    with _quiet_alembic():
        _repeated(engine, partial(_upgrade, found=found))
    return found[0]


def _upgrade(engine: Engine, *, found: list[str | None]) -> None:
    """Upgrade the schema, and append its revision before that to `found`."""
    from alembic import command  # noqa: PLC0415 - slow to load, and only an upgrade needs it

    with migrating(engine) as connection, _alembic_lock:
        revision = current_revision(connection)
        found.append(revision)
        if revision is not None:
            _refuse_newer(revision, shown_url(engine))
        config = alembic_config()
        config.attributes["connection"] = connection
        if revision is None and dialect_of(engine).begins_at_head:
            Base.metadata.create_all(connection)
            command.stamp(config, "head")
        else:
            command.upgrade(config, "head")


def _read_revision(engine: Engine) -> str | None:
    with reading(engine) as connection:
        return current_revision(connection)


def _repeated(engine: Engine, operation: Callable[[Engine], Result]) -> Result:
    """Run an operation. If the database aborts it to end a deadlock or a conflict, try `_TRIES` times in all.

    A Galera cluster aborts even the query of a table that another server creates.
    """
    dialect = dialect_of(engine)
    waits = islice(waits_s(inf), _TRIES - 1)
    while True:
        try:
            return operation(engine)
        except StorageError as error:
            wait_s = next(waits, None)
            if wait_s is None or dialect.codes(error.__cause__ or error).isdisjoint(dialect.given_up):
                raise
        time.sleep(wait_s)


@contextmanager
def _quiet_alembic() -> Iterator[None]:
    """Keep Alembic's messages about our migrations out of the application's log, except warnings.

    Messages from other threads, where the application may run its own migrations, are kept.
    """
    here = threading.get_ident()

    def is_wanted(record: logging.LogRecord) -> bool:
        return record.thread != here or record.levelno >= logging.WARNING

    logs = [logging.getLogger(name) for name in ("alembic.runtime.plugins", "alembic.runtime.migration")]
    for log in logs:
        log.addFilter(is_wanted)
    try:
        yield
    finally:
        for log in logs:
            log.removeFilter(is_wanted)


def current_revision(connection: Connection) -> str | None:
    """Return the revision of the outbox's schema, or None if the database has none."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    revision: str | None = connection.exec_driver_sql("SELECT version_num FROM outbox_alembic_version").scalar()
    return revision


def alembic_config() -> Config:
    """Return the Alembic configuration of this package's migrations. It needs no file and has no URL."""
    from alembic.config import Config  # noqa: PLC0415 - slow to load, and only migrations need it

    here = Path(__file__).parent
    installed = here / "migrations"
    config = Config()
    location = installed if installed.is_dir() else here.parent / "migrations"
    config.set_main_option("script_location", str(location).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def exclude_name(name: str | None, type_: str, parent_names: Mapping[Any, str | None]) -> bool:
    """Hide the outbox's tables from another autogenerate: `context.configure(include_name=exclude_name, …)`."""
    return not _is_ours(name, type_, parent_names)


def include_name(name: str | None, type_: str, parent_names: Mapping[Any, str | None]) -> bool:
    """Hide the application's tables from our own `alembic check`."""
    return type_ == "schema" or _is_ours(name, type_, parent_names)


def _is_ours(name: str | None, type_: str, parent_names: Mapping[Any, str | None]) -> bool:
    return (name if type_ == "table" else parent_names.get("table_name")) in TABLES


def _refuse_newer(revision: str, where: str) -> None:
    if revision not in REVISIONS:
        raise SchemaError(
            f"{where} has the schema {revision}, this program is too old for it: its newest is {REVISIONS[-1]};"
            " upgrade observation-outbox"
        )
