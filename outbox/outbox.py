"""The facade that applications use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from sqlalchemy import URL, Engine
from sqlalchemy.orm import Session, scoped_session

from outbox import capture, maintenance, schema, tracing
from outbox.destinations import Routes, stored
from outbox.event_ids import add_event_ids
from outbox.events import AnyEvent, with_type
from outbox.failures import ConfigurationError
from outbox.filters import LARGEST_ID, is_row_id
from outbox.new_rows import Redact, new_row
from outbox.operations import Operations
from outbox.policy import Policy
from outbox.records import Replacement
from outbox.storage import forks
from outbox.storage.engines import Synchronous, default_url, engine_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from outbox.hooks import Hooks
    from outbox.records import FlushReport, UploadClient


class Outbox(Operations):
    """A durable outbox in one database. Threads can share it, and a forked child can continue to use it.

    `database` is an SQLAlchemy URL or the application's own `Engine`, whose settings are kept. Before a fork, the
    application must dispose of its engine; an engine that this class opens needs nothing. In a process that was
    forked without Python's knowledge, as uWSGI does, calls on such an engine raise `StorageError`.

    The schema is only checked: if it is missing, or older or newer than this program's, this raises `SchemaError`,
    which says what to do. `Outbox.open` upgrades the schema first. This raises `ConfigurationError` for an invalid
    URL, driver, route or setting, and `StorageError` if the database can't be read.

    `synchronous` applies to SQLite. With FULL, accepted events survive a power cut; with NORMAL, only a crash.
    With `strict`, or `Policy.original()`, every event needs a registered type.

    `redact` gets each validated event before it is written, and returns the event to write instead, which is
    validated too. It gets an `Event` if the type is registered, without keys that are not fields of the type;
    otherwise it gets a dict.

    `routes` maps event types to the destination, or the list of destinations, that their events go to. `*` stands
    for all other types. An event of a type without a route goes to the destination `default`.
    """

    def __init__(  # noqa: PLR0913 - each setting has a default
        self,
        database: str | URL | Engine,
        *,
        policy: Policy | None = None,
        synchronous: Synchronous = "FULL",
        redact: Redact | None = None,
        strict: bool = False,
        routes: Mapping[str, str | Sequence[str]] | None = None,
    ) -> None:
        if redact is not None and not callable(redact):
            raise ConfigurationError(f"redact is {redact!r}, expected a function that takes and returns an event")
        self._routes = Routes(routes)
        self._owns_engine = not isinstance(database, Engine)
        self.engine = engine_of(database, synchronous=synchronous)
        self.wakers: set[Callable[[], object]] = set()
        """Functions that are called when this object may have made events due, such as after an `enqueue`."""
        self.heartbeats: set[Callable[[], int | None]] = set()
        """Functions that return the time since a worker's last sign of life, in ms, or None if it is off."""
        self.hooks: list[Hooks] = []
        """Called with the outcomes of events that this object or one of its workers flushes."""
        from outbox.storage.store import Store  # noqa: PLC0415 - slow: it builds all statements, which only an open outbox needs

        self.store = Store(self.engine)
        """The rows, for the other modules of this package. Programs use the methods of this class."""
        self._redact = redact
        self.policy = (policy or Policy()).on(is_shared=self.store.is_shared)
        self.store.wait_for_server(self.policy)
        self._is_strict = strict or self.policy.is_original  # difflore can't read other events
        try:
            schema.check(self.engine)
            if self.policy.max_undelivered:
                maintenance.attempt("counting", self.store.bounds.count_undelivered)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(  # noqa: PLR0913 - each setting has a default
        cls,
        database: str | URL | Engine | None = None,
        *,
        policy: Policy | None = None,
        synchronous: Synchronous = "FULL",
        redact: Redact | None = None,
        strict: bool = False,
        routes: Mapping[str, str | Sequence[str]] | None = None,
    ) -> Self:
        """Create or upgrade the schema, then open the outbox. None means `outbox.db` in the user's data folder.

        Only its owner can read a new SQLite file. Raises what `Outbox` raises.
        """
        engine = engine_of(default_url() if database is None else database, synchronous=synchronous)
        try:
            schema.upgrade(engine)
            opened = cls(engine, policy=policy, redact=redact, strict=strict, routes=routes)
        except BaseException:
            if engine is not database:
                engine.dispose()
            raise
        opened._owns_engine = engine is not database
        return opened

    @overload
    def enqueue(
        self,
        event: AnyEvent,
        *,
        session: Session | scoped_session[Session] | None = None,
        connection: Any = None,
        event_type: str | None = None,
        event_id: str | None = None,
        to: str | None = None,
        not_before: datetime | int | None = None,
    ) -> int | None: ...

    @overload
    def enqueue(
        self,
        event: AnyEvent,
        *,
        session: Session | scoped_session[Session] | None = None,
        connection: Any = None,
        event_type: str | None = None,
        event_id: str | None = None,
        to: list[str] | tuple[str, ...],
        not_before: datetime | int | None = None,
    ) -> list[int]: ...

    def enqueue(  # noqa: PLR0913 - each setting has a default
        self,
        event: AnyEvent,
        *,
        session: Session | scoped_session[Session] | None = None,
        connection: Any = None,
        event_type: str | None = None,
        event_id: str | None = None,
        to: str | list[str] | tuple[str, ...] | None = None,
        not_before: datetime | int | None = None,
    ) -> int | list[int] | None:
        """Record one event. Return its row id, or None if OUTBOX_CAPTURE=false is set in the environment.

        `to` names its destination, or a list of destinations, instead of the routes. The event gets a row for each
        destination, all in one transaction and with the same event id. With a list, this returns row ids in its
        order, none if capture is off. If a route has several destinations, it returns the row id of the first.

        The event is durable when this returns. With `session`, it is inserted in the session's transaction
        instead, and commits and rolls back with it. Nothing in the session is flushed, expired or committed.
        `connection` does the same on an SQLAlchemy `Connection`, or on a driver's connection (DBAPI) to this
        database, such as Django's `connection.connection`; on a driver's connection without an open transaction,
        this commits each row by itself. With an `AsyncSession`, call this in its `run_sync`.

        The event is an `Event`, a mapping, a Pydantic model, a dataclass or an attrs object. `event_type` names
        its type if the event has no key or attribute of this name. The fields of a registered type are checked. In
        an event of another type, a field `occurred_at` is the time of the event if it is RFC 3339 with an offset.
        An event has at most 256 KiB as JSON, and its type at most 191 characters.

        `event_id` is your own id of the event: 1 to 191 printable ASCII characters without blanks. If the
        destination already has an event with this id, nothing is recorded and that event's row id is returned. If
        another transaction is recording the same id, this waits for that transaction. `not_before` is the earliest
        time to send the event: a datetime with a time zone, or epoch milliseconds.

        Raises `InvalidEvent` if the event or its id is invalid or `redact` failed, `ConfigurationError` if another
        argument is invalid, `QueueFull` if the policy rejects events at a bound, and `StorageError`. Nothing was
        recorded then, except perhaps after `OutcomeUnknown`: the connection broke during the commit. The result is
        also unknown after an exception from outside, such as `KeyboardInterrupt` or a task queue's time limit.
        With `event_id`, commits that broke are repeated, and you can call this again.
        """
        # Lazy: while capture is off, nothing is converted.
        events = [event] if event_type is None else map(with_type, [event], [event_type])
        event_ids = None if event_id is None else [event_id]
        ids = self.enqueue_many(
            events, session=session, connection=connection, event_ids=event_ids, to=to, not_before=not_before
        )
        if isinstance(to, list | tuple):
            return ids
        return ids[0] if ids else None

    def enqueue_many(  # noqa: PLR0913 - each setting has a default
        self,
        events: Iterable[AnyEvent],
        *,
        session: Session | scoped_session[Session] | None = None,
        connection: Any = None,
        event_ids: Iterable[str | None] | None = None,
        to: str | list[str] | tuple[str, ...] | None = None,
        not_before: datetime | int | None = None,
    ) -> list[int]:
        """Record all events in one transaction, or none. Return their row ids in order. All are held in memory.

        An event for several destinations has a row for each. The list has their ids one after the other, in the
        order of `to` or of the route.
        `event_ids` holds an id for each event, or None for an event without your own id. Of events with equal
        ids the first one is recorded. Otherwise it works like `enqueue`. The list is empty if OUTBOX_CAPTURE=false
        is set in the environment.
        """
        if capture.is_off():
            return []
        now = self.store.now_ms()
        due = maintenance.earliest_ms(not_before)
        rows = self._new_rows(events, now_ms=now, not_before_ms=due)
        if event_ids is not None:
            add_event_ids(rows, event_ids)
        addressed = self._routes.address(rows, to, may_have_ids=event_ids is not None)
        if not rows:
            return []
        if session is not None and connection is not None:
            raise ConfigurationError("session and connection are both given, expected one of them")
        if session is not None:
            wake = self._wake if self.wakers else None
            return self.store.intake.insert_in(session, addressed, policy=self.policy, after_commit=wake)
        if connection is not None:
            return self.store.intake.insert_on(connection, addressed, policy=self.policy)
        ids, over_cap = self.store.intake.insert(addressed, policy=self.policy, now_ms=now)
        for destination in over_cap:
            maintenance.cap(self.store, self.policy, destination, now_ms=now)
        self._wake()
        return ids

    def replace(
        self, events: Mapping[int, AnyEvent], *, created_at_ms: Mapping[int, int] | None = None
    ) -> maintenance.ReplaceReport:
        """Replace recorded events by new ones. `events` maps the row id of each old event to the new event.

        The new event has the destination of the old one, and its `not_before` if that is in the future. Its event
        id is new, even if the old id was yours: a service that saw the old id would drop the new event as a
        duplicate. Up to a hundred events are replaced in a transaction. The ledger counts the old ones with the
        reason `replaced`.

        An event that is sent, being sent or gone is left alone, and its new event is not recorded. The report says
        why. `created_at_ms` may map row ids to the creation times that you expect; an event with another creation
        time is left alone, too, because it comes from another database. Raises `InvalidEvent` if one of the events
        is invalid; then nothing is replaced. Does nothing if OUTBOX_CAPTURE=false is set in the environment.
        """
        if capture.is_off():
            return maintenance.ReplaceReport(refused=dict.fromkeys(events, capture.IS_OFF))
        for row_id in events:
            if not is_row_id(row_id):
                raise ConfigurationError(
                    f"events has the key {row_id!r}, expected a row id from 1 to {LARGEST_ID}"
                )
        now, created = self.store.now_ms(), created_at_ms or {}
        rows = self._new_rows(events.values(), now_ms=now)
        replacements = [
            Replacement(row_id, row, created.get(row_id)) for row_id, row in zip(events, rows, strict=True)
        ]
        done = self.store.replacing.replace(replacements, policy=self.policy, now_ms=now)
        self._wake()
        return maintenance.ReplaceReport(done.ids, done.refused)

    def _new_rows(
        self, events: Iterable[AnyEvent], *, now_ms: int, not_before_ms: int | None = None
    ) -> list[dict[str, Any]]:
        rows = [
            new_row(event, self._redact, strict=self._is_strict, now_ms=now_ms, not_before_ms=not_before_ms)
            for event in events
        ]
        if (trace_context := tracing.current_context()) is not None:
            for row in rows:
                row["trace_context"] = trace_context
        return rows

    def flush(self, client: UploadClient, *, destination: str | None = None) -> FlushReport:
        """Send one batch of due events of a destination; None and `default` mean the default destination.

        Each destination needs a client of its own. A failed upload is not raised; the report describes it. If the
        client is not logged in, or OUTBOX_CAPTURE=false is set in the environment, nothing is changed and the
        report's `skipped` says why.

        Raises `ConfigurationError` if the name is invalid or the client's `deadline_ms` is over three quarters of
        the policy's `lease_ms`, and `StorageError`. Any other `Exception` of the client is a bug and is raised;
        the events are retried as after a failure of the service, with `client error: …` as `last_error`.
        An interrupt, such as KeyboardInterrupt, is raised after the events are released.
        """
        with forks.held_back():  # a forked child would wait for ever for an import that a thread had begun
            from outbox import flusher  # noqa: PLC0415 - programs that only enqueue need not load the code that delivers
        return flusher.flush(self.store, self.policy, client, destination=stored(destination), hooks=self.hooks)

    def flush_all(
        self,
        client: UploadClient,
        *,
        destination: str | None = None,
        progress: Callable[[FlushReport], object] | None = None,
    ) -> FlushReport:
        """Send batches of a destination until nothing is due, its service fails, or it is paused or on hold.

        Return the sum of the reports. `progress` gets each report, in this thread. Raises what `flush` raises.
        """
        with forks.held_back():  # a forked child would wait for ever for an import that a thread had begun
            from outbox import flusher  # noqa: PLC0415 - programs that only enqueue need not load the code that delivers
        name = stored(destination)
        return flusher.flush_all(self.store, self.policy, client, progress, destination=name, hooks=self.hooks)

    def close(self) -> None:
        """Close the connections; a later call opens new ones. An engine of the application is not changed."""
        if self._owns_engine:
            self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
