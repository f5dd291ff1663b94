"""The databases that the outbox works on, a dialect for each. This module finds the dialect of a database."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from outbox.failures import ConfigurationError

if TYPE_CHECKING:
    from outbox.storage.dialects.base import Dialect

# The modules here, by the names that databases have in URLs. A module is loaded when its database is used.
_MODULES = {
    "sqlite": "sqlite",
    "postgresql": "postgresql",
    "postgres": "postgresql",
    "mysql": "mysql",
    "mariadb": "mysql",
}

_registered: dict[str, Dialect] = {}


def register(dialect: Dialect) -> None:
    """Register a dialect under its names."""
    _registered.update(dict.fromkeys(dialect.names, dialect))


def dialect_named(name: str) -> Dialect:
    """Return the dialect of a database by its name in URLs. Raises `ConfigurationError` if there is none."""
    found = _registered.get(name)
    if found is not None:
        return found
    if name not in _MODULES:
        known = ", ".join(sorted({*_MODULES, *_registered}))
        raise ConfigurationError(f"there is no dialect for the database {name!a}, expected one of {known}")
    register(import_module(f"{__name__}.{_MODULES[name]}").DIALECT)
    return _registered[name]


def dialect_of(database: Any) -> Dialect:
    """Return the dialect of SQLAlchemy's engine, connection or dialect."""
    return dialect_named(getattr(database, "dialect", database).name)


def dialects() -> list[Dialect]:
    """Return all dialects, each once."""
    return list(dict.fromkeys(dialect_named(name) for name in (*_MODULES, *_registered)))
