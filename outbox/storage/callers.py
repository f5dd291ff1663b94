"""The session or connection that a caller passes to `enqueue`, so that the event joins its transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NoReturn

from sqlalchemy import (
    Connection,
    Dialect,
    Engine,
    Insert,
    PoolProxiedConnection,
    TwoPhaseTransaction,
    create_engine,
    event,
)
from sqlalchemy.exc import InvalidRequestError, MissingGreenlet, UnboundExecutionError
from sqlalchemy.orm import Session, scoped_session

from outbox.failures import ConfigurationError, StorageError
from outbox.storage.dialects import dialect_of, dialects
from outbox.storage.dialects.base import Dialect as OutboxDialect
from outbox.storage.engines import translated
from outbox.storage.tables import ObservationEvent

_A_SESSION = "an SQLAlchemy Session"
_RUN_SYNC = "await session.run_sync(lambda sync: outbox.enqueue(event, session=sync))"
_IS_ASYNCHRONOUS = f"it is asynchronous: {_RUN_SYNC}"
_IS_DJANGOS = "pass its connection.connection"
# What to do instead, by the class that was passed.
_ADVICE = {
    "sqlalchemy.engine.base.Connection": "pass it as connection",
    "sqlalchemy.engine.base.Engine": "pass a session or a connection of it",
    "sqlalchemy.orm.session.Session": "pass it as session",
    "sqlalchemy.orm.session.sessionmaker": "call it, and pass the session that it makes",
    "sqlalchemy.orm.scoping.scoped_session": "pass it as session",
    "sqlalchemy.ext.asyncio.engine.AsyncConnection": _IS_ASYNCHRONOUS.replace("session", "connection"),
    "sqlalchemy.ext.asyncio.engine.AsyncEngine": _IS_ASYNCHRONOUS,
    "sqlalchemy.ext.asyncio.session.AsyncSession": _IS_ASYNCHRONOUS,
    "sqlalchemy.ext.asyncio.session.async_sessionmaker": _IS_ASYNCHRONOUS,
    "sqlalchemy.ext.asyncio.scoping.async_scoped_session": _IS_ASYNCHRONOUS,
    "psycopg.AsyncConnection": _IS_ASYNCHRONOUS,
    "asyncpg.connection.Connection": _IS_ASYNCHRONOUS,
    "aiosqlite.core.Connection": _IS_ASYNCHRONOUS,
    "django.db.backends.base.base.BaseDatabaseWrapper": _IS_DJANGOS,
    "django.utils.connection.ConnectionProxy": _IS_DJANGOS,
}


def connection_of(session: object, engine: Engine, statement: Insert) -> Connection:
    """Return the connection on which a caller's session would run a statement.

    Raises `ConfigurationError` for anything but a session.
    """
    # `execute` would pass the statement to the session, which may choose its engine by that.
    this: dict[str, Any] = {"mapper": ObservationEvent.__mapper__, "clause": statement}
    try:
        found = session() if isinstance(session, scoped_session) else session
        if not isinstance(found, Session):
            _refuse("session", found, _A_SESSION)
        try:
            return found.connection(bind_arguments=this)
        except UnboundExecutionError:  # the session is bound only for the application's models
            return found.connection(bind_arguments={"bind": engine})
    except AttributeError as error:
        raise ConfigurationError(f"session is bound to something that is no engine: {error}") from error


def dialect_and_connection(connection: object, engine: Engine) -> tuple[Dialect, Any]:
    """Return the dialect of a caller's connection, and the connection itself without the wrapper of a pool.

    Raises `ConfigurationError` for anything else, and for a connection to another kind of database.
    """
    own = connection.driver_connection if isinstance(connection, PoolProxiedConnection) else connection
    if isinstance(own, Connection):
        dialect = own.dialect
    else:
        classes = dialect_of(engine).connection_classes
        name = next((classes[one] for one in _classes(own) if one in classes), None) or _driver_of(own)
        if name is None:
            _refuse("connection", own, _a_connection())
        dialect = _dialect(name)
    if dialect_of(dialect) is not dialect_of(engine):
        raise ConfigurationError(
            f"the outbox is on {engine.dialect.name}, but the caller's transaction on {dialect.name}"
        )
    return dialect, own


def call_after_commit(session: Session | scoped_session[Session], call: Callable[[Session], object]) -> None:
    """Call a function after each commit of a caller's session."""
    this = session() if isinstance(session, scoped_session) else session
    begun = this.get_transaction()
    # `begun.session` is the real session; the caller may pass a proxy. The listener is added once for each session
    # and kept: it can't be removed while it runs, and a needless call is harmless.
    if begun and not event.contains(begun.session, "after_commit", call):
        event.listen(begun.session, "after_commit", call)


def is_two_phase(connection: Any, dialect: OutboxDialect) -> bool:
    """Return whether a caller's transaction is a two-phase one, as far as the driver shows that."""
    if isinstance(connection, Connection):
        return isinstance(connection.get_transaction(), TwoPhaseTransaction)
    return dialect.is_two_phase(connection)


def _driver_of(connection: object) -> str | None:
    """Return SQLAlchemy's name of the driver of a connection, on whatever database."""
    # Of two dialects that name a class, the first one counts.
    known = {name: driver for one in reversed(dialects()) for name, driver in one.connection_classes.items()}
    return next((known[one] for one in _classes(connection) if one in known), None)


def _a_connection() -> str:
    *libraries, last = (name for dialect in dialects() for name in dialect.libraries)
    return f"an SQLAlchemy Connection, or the connection of {', '.join(libraries)} or {last}"


@contextmanager
def in_words(engine: Engine) -> Iterator[None]:
    """Raise our own errors for what SQLAlchemy refuses in the transaction of a caller."""
    try:
        with translated(engine):
            yield
    except MissingGreenlet as error:
        raise ConfigurationError(f"the session or connection can't be used here; {_IS_ASYNCHRONOUS}") from error
    except InvalidRequestError as error:  # it is closed, or waits for a rollback
        # The part that is cut off repeats the caller's statement and its parameters.
        words = str(error.args[0]).partition(" Original exception")[0]
        raise StorageError(f"the session or connection can't be used: {words}") from error


@cache
def _dialect(name: str) -> Dialect:
    return create_engine(f"{name}://").dialect


def _refuse(name: str, given: object, expected: str) -> NoReturn:
    # Only its type: a text may be a URL with a password.
    types = _classes(given)
    advice = next((f"; {_ADVICE[one]}" for one in types if one in _ADVICE), "")
    if not advice and _driver_of(given) is not None:
        advice = "; pass it as connection"
    if any(one.lower().endswith("cursor") for one in types):
        advice = "; pass its connection"
    raise ConfigurationError(
        f"{name} has the type {types[0].removeprefix('builtins.')}, expected {expected}{advice}"
    )


def _classes(given: object) -> list[str]:
    # By __class__, which a proxy sets to the class of its target.
    return [f"{one.__module__}.{one.__qualname__}" for one in given.__class__.__mro__]
