"""The schema of the database: what it is, what this program needs, and how to get there. Alembic does the work."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, inspect

from outbox.database import migrating, reading
from outbox.failures import SchemaError
from outbox.models import VERSION_TABLE, Base
from outbox.sqlite import create_file, is_there, sqlite_file

if TYPE_CHECKING:
    from alembic.config import Config

REVISIONS = ("outbox_0001", "outbox_0002", "outbox_0003", "outbox_0004", "outbox_0005")
"""The revisions that this program knows, oldest first. Kept here so that a look at them needs no Alembic."""

TABLES = frozenset({*Base.metadata.tables, VERSION_TABLE})

# Alembic works through module globals, so two upgrades in one process would mix, even of different databases.
# Held only inside of a transaction: no fork happens there, and so no child inherits it locked.
_alembic_lock = threading.Lock()


def check(engine: Engine) -> None:
    """Raise `SchemaError` unless the database has exactly the schema of this program; change nothing."""
    where = engine.url.render_as_string(hide_password=True)
    path = sqlite_file(engine.url)
    if path is not None and not is_there(path):
        raise SchemaError(f"there is no database {path}; `outbox upgrade` or Outbox.open() creates it")
    with reading(engine) as connection:
        revision = current_revision(connection)
    if revision is None:
        raise SchemaError(f"{where} has no outbox schema; `outbox upgrade` or Outbox.open() creates it")
    _refuse_newer(revision, where)
    if revision != REVISIONS[-1]:
        raise SchemaError(
            f"{where} has the schema {revision}, this program needs {REVISIONS[-1]};"
            " `outbox upgrade` or Outbox.open() upgrades it"
        )


def upgrade(engine: Engine) -> str | None:
    """Bring the schema to what this program needs; return the revision that it had before, None for a new one.

    Safe when many threads and processes start at once: on SQLite all of it happens in one transaction that holds
    the write lock. A failure leaves the database as it was. Raises `SchemaError` for one newer than this program.
    """
    create_file(engine.url)
    with reading(engine) as connection:
        revision = current_revision(connection)
    if revision == REVISIONS[-1]:
        return revision
    from alembic import command  # noqa: PLC0415 - only an upgrade pays for loading it

    with migrating(engine) as connection, _alembic_lock:
        revision = current_revision(connection)
        if revision is not None:
            _refuse_newer(revision, engine.url.render_as_string(hide_password=True))
        config = alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    return revision


def current_revision(connection: Connection) -> str | None:
    """Return the revision of the schema, or None where the database has no version of ours."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    revision: str | None = connection.exec_driver_sql("SELECT version_num FROM outbox_alembic_version").scalar()
    return revision


def alembic_config() -> Config:
    """Return the Alembic configuration of this package's own migrations, without a file and without a URL."""
    from alembic.config import Config  # noqa: PLC0415 - as above

    here = Path(__file__).parent
    installed = here / "migrations"
    config = Config()
    location = installed if installed.is_dir() else here.parent / "migrations"
    config.set_main_option("script_location", str(location).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def exclude_name(name: str | None, type_: str, parent_names: Mapping[Any, str | None]) -> bool:
    """Keep the outbox's tables out of a host's autogenerate: `context.configure(include_name=exclude_name, …)`."""
    return not _is_ours(name, type_, parent_names)


def include_name(name: str | None, type_: str, parent_names: Mapping[Any, str | None]) -> bool:
    """Keep a host's tables out of our own `alembic check`."""
    return type_ == "schema" or _is_ours(name, type_, parent_names)


def _is_ours(name: str | None, type_: str, parent_names: Mapping[Any, str | None]) -> bool:
    return (name if type_ == "table" else parent_names.get("table_name")) in TABLES


def _refuse_newer(revision: str, where: str) -> None:
    if revision not in REVISIONS:
        raise SchemaError(
            f"{where} has the schema {revision}, this program is too old for it: it knows {REVISIONS[-1]} at most;"
            " upgrade observation-outbox"
        )
