"""The facade that applications use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Engine
from sqlalchemy.orm import Session, scoped_session

from outbox import capture, maintenance, schema
from outbox.destinations import stored
from outbox.event_ids import add_event_ids
from outbox.events import AnyEvent, with_type
from outbox.failures import ConfigurationError
from outbox.lifecycle import Status
from outbox.new_rows import Redact, new_row
from outbox.policy import Policy
from outbox.storage.engines import Synchronous, default_url, engine_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from outbox.hooks import Hooks
    from outbox.records import FlushReport, UploadClient
    from outbox.stats import Stats
    from outbox.storage.tables import ObservationEvent


LARGEST_ID = 2**63 - 1
"""The largest id, and the largest integer that the databases hold."""


class Outbox:
    """A durable outbox in one database. Threads can share it, and a forked child can continue to use it.

    `database` is an SQLAlchemy URL or the application's own `Engine`, whose settings are kept. Before a fork, the
    application must dispose of its engine; an engine that this class opens needs nothing. In a process that was
    forked without Python's knowledge, as uWSGI does, calls on such an engine raise `StorageError`.

    The schema is only checked: if it is missing, or older or newer than this program's, this raises `SchemaError`,
    which says what to do. `Outbox.open` upgrades the schema first. An unsupported driver raises
    `ConfigurationError`.

    `synchronous` applies to SQLite. With FULL, an accepted event survives a power cut; with NORMAL, only a crash
    of the program.

    With `strict`, or the policy of the original, every event needs a registered type.

    `redact` gets each validated event before it is written, and returns the event to write instead, which is
    validated too. It gets an `Event` if the type is registered, without keys that are not fields of the type;
    otherwise it gets a dict.
    """

    def __init__(
        self,
        database: str | URL | Engine,
        *,
        policy: Policy | None = None,
        synchronous: Synchronous = "FULL",
        redact: Redact | None = None,
        strict: bool = False,
    ) -> None:
        if redact is not None and not callable(redact):
            raise ConfigurationError(f"redact is {redact!r}, expected a function that takes and returns an event")
        self._owns_engine = not isinstance(database, Engine)
        self.engine = engine_of(database, synchronous=synchronous)
        self.wakers: set[Callable[[], object]] = set()
        """Functions that are called when this object may have made events due, such as after an `enqueue`."""
        self.heartbeats: set[Callable[[], int | None]] = set()
        """Functions that return the time since a worker's last sign of life, in ms, or None if it is off."""
        self.hooks: list[Hooks] = []
        """Called with the outcomes of events that this object, or a worker of it, flushes."""
        from outbox.storage.store import Store  # noqa: PLC0415 - slow: it builds all statements, which only an open outbox needs

        self.store = Store(self.engine)
        """The rows, for the other modules of this package. Programs use the methods of this class."""
        self._redact = redact
        self.policy = (policy or Policy()).on(is_shared=self.store.is_shared)
        self._is_strict = strict or self.policy.is_original  # to the original, other events are undecodable
        try:
            schema.check(self.engine)
            if self.policy.max_undelivered:
                maintenance.attempt("counting", self.store.bounds.count_undelivered)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls,
        database: str | URL | Engine | None = None,
        *,
        policy: Policy | None = None,
        synchronous: Synchronous = "FULL",
        redact: Redact | None = None,
        strict: bool = False,
    ) -> Self:
        """Create or upgrade the schema, then open the outbox. None means the default file of the user.

        Only its owner can read a new SQLite file.
        """
        engine = engine_of(default_url() if database is None else database, synchronous=synchronous)
        try:
            schema.upgrade(engine)
            opened = cls(engine, policy=policy, redact=redact, strict=strict)
        except BaseException:
            if engine is not database:
                engine.dispose()
            raise
        opened._owns_engine = engine is not database
        return opened

    def enqueue(
        self,
        event: AnyEvent,
        *,
        session: Session | scoped_session[Session] | None = None,
        connection: Any = None,
        event_type: str | None = None,
        event_id: str | None = None,
    ) -> int | None:
        """Record one event. Return its row id, or None if OUTBOX_CAPTURE=false is set in the environment.

        The event is durable when this returns. With `session`, this is one INSERT in the session's transaction
        instead: the event commits and rolls back with it. Nothing in the session is flushed, expired or committed.
        `connection` does the same on an SQLAlchemy `Connection`, or on a driver's connection (DBAPI) to this
        database, such as Django's `connection.connection`; on a driver's connection without an open transaction,
        this commits. With an `AsyncSession`, call this in its `run_sync`.

        The event is an `Event`, a mapping, a Pydantic model, a dataclass or an attrs object. `event_type` names
        its type if the event has no key or attribute of this name. The fields of a registered type are checked. In
        an event of another type, a field `occurred_at` is the time of the event if it is RFC 3339 with an offset.

        `event_id` is your own id of the event: 1 to 191 printable ASCII characters without blanks. If an event
        with this id is there already, nothing is recorded, and the row id of that event is returned. If another
        transaction is recording one, this waits for its end.

        Raises `InvalidEvent` if the event or its id is invalid or `redact` failed, `ConfigurationError` if the
        session or connection can't be used, `QueueFull` if the policy rejects events at the cap, and
        `StorageError`. Then nothing was recorded, with one exception: if the connection to a server breaks during
        the commit, the result is unknown. It is also unknown after an exception from outside, such as
        `KeyboardInterrupt` or the time limit of a task queue. With `event_id`, you can call this again.
        """
        # Lazy: while capture is off, nothing is converted.
        events = [event] if event_type is None else map(with_type, [event], [event_type])
        event_ids = None if event_id is None else [event_id]
        ids = self.enqueue_many(events, session=session, connection=connection, event_ids=event_ids)
        return ids[0] if ids else None

    def enqueue_many(
        self,
        events: Iterable[AnyEvent],
        *,
        session: Session | scoped_session[Session] | None = None,
        connection: Any = None,
        event_ids: Iterable[str | None] | None = None,
    ) -> list[int]:
        """Record all events in one transaction, or none. Return their row ids in order.

        `event_ids` holds an id for each event, or None for an event without an id of yours. Of events with equal
        ids the first one is recorded. Otherwise it works like `enqueue`. The list is empty if OUTBOX_CAPTURE=false
        is set in the environment.
        """
        if capture.is_off():
            return []
        now = self.store.now_ms()
        rows = [new_row(event, self._redact, strict=self._is_strict, now_ms=now) for event in events]
        if event_ids is not None:
            add_event_ids(rows, event_ids)
        if not rows:
            return []
        if session is not None and connection is not None:
            raise ConfigurationError("session and connection are both given, expected one of them")
        if session is not None:
            wake = self._wake if self.wakers else None
            return self.store.intake.insert_in(session, rows, policy=self.policy, after_commit=wake)
        if connection is not None:
            return self.store.intake.insert_on(connection, rows, policy=self.policy)
        ids, over_cap = self.store.intake.insert(rows, policy=self.policy, now_ms=now)
        if over_cap:
            maintenance.cap(self.store, self.policy, now_ms=now)
        self._wake()
        return ids

    def flush(self, client: UploadClient, *, destination: str | None = None) -> FlushReport:
        """Send one batch of due events of a destination; None and `default` mean the default destination.

        A failed upload is not raised; the report describes it. Each destination needs a client of its own.

        If the client is not logged in, or OUTBOX_CAPTURE=false is set in the environment, nothing is changed and
        the report's `skipped` says why. Any other `Exception` of the client is a bug and is raised; the events are
        retried as after a failure of the service, with `client error: …` as `last_error`. An interrupt releases
        the events and is raised.
        """
        from outbox import flusher  # noqa: PLC0415 - programs that only enqueue need not load the code that delivers

        return flusher.flush(self.store, self.policy, client, destination=stored(destination), hooks=self.hooks)

    def flush_all(
        self,
        client: UploadClient,
        *,
        destination: str | None = None,
        progress: Callable[[FlushReport], object] | None = None,
    ) -> FlushReport:
        """Send batches of a destination until nothing is due or its service fails; return the sum of the reports.

        `progress` is called with the report of each batch.
        """
        from outbox import flusher  # noqa: PLC0415 - programs that only enqueue need not load the code that delivers

        of = stored(destination)
        return flusher.flush_all(self.store, self.policy, client, progress, destination=of, hooks=self.hooks)

    def retry_now(self) -> int:
        """Make all waiting and parked events due now; return how many. Events being sent are not changed."""
        count = self.store.revival.retry_now(now_ms=self.store.now_ms())
        self._wake()
        return count

    def requeue_abandoned(self, *, older_than: datetime | int, dry_run: bool = False) -> maintenance.RequeueReport:
        """Return abandoned events created before `older_than` to the queue and reset their failures and age.

        With `dry_run`, they are only counted.
        `older_than` is a datetime with a time zone, or epoch milliseconds.
        """
        report = maintenance.requeue_abandoned(
            self.store, cutoff_ms=maintenance.cutoff_ms(older_than), now_ms=self.store.now_ms(), dry_run=dry_run
        )
        self._wake()
        return report

    def purge(
        self, *, event_type: str | None = None, older_than: datetime | int | None = None, dry_run: bool = False
    ) -> maintenance.PurgeReport:
        """Delete events of any status for good; with `dry_run`, only count them.

        `event_type` selects the events of a type, `older_than` those created before a datetime with a time zone or
        epoch milliseconds. Give one or both, else it raises `ConfigurationError`. The ledger counts the deleted
        events. Events that are being sent are not deleted. Every row is read, and each transaction deletes up
        to a thousand rows, so after an error some events may already be deleted.
        """
        if event_type is None and older_than is None:
            raise ConfigurationError("purge has neither event_type nor older_than, expected one of them or both")
        if not isinstance(event_type, str | None):
            raise ConfigurationError(f"event_type is {event_type!r}, expected the name of a type, a text")
        return maintenance.purge(
            self.store,
            event_type=event_type,
            created_before_ms=None if older_than is None else maintenance.cutoff_ms(older_than),
            now_ms=self.store.now_ms(),
            dry_run=dry_run,
        )

    def pending_count(self) -> int:
        """Return the number of pending and sending events. Parked events do not count."""
        return self.store.views.pending_count()

    def stats(self) -> Stats:
        """Return what is queued, what is stuck, and the likely cause."""
        from outbox import stats  # noqa: PLC0415 - programs that only enqueue need not load the code that reads

        return stats.gather(self.store, self.policy, now_ms=self.store.now_ms())

    def get(self, row_id: int) -> ObservationEvent | None:
        """Return one event, detached from the database, or None."""
        return self.store.views.get(row_id) if 0 < row_id <= LARGEST_ID else None

    def find(
        self,
        *,
        status: Status | str | None = None,
        event_type: str | None = None,
        older_than: datetime | int | None = None,
        limit: int = 100,
    ) -> list[ObservationEvent]:
        """Return the oldest events that match all given conditions, detached from the database.

        Raises `ConfigurationError` for a status, time or limit that no event can have.
        """
        known = [one.value for one in Status]
        if status is not None and status not in known:
            raise ConfigurationError(f"status is {status!r}, expected one of {', '.join(known)}")
        if not 0 <= limit <= LARGEST_ID:
            raise ConfigurationError(f"limit is {limit!r}, expected a whole number from 0 to {LARGEST_ID}")
        return self.store.views.find(
            status=None if status is None else Status(status).value,
            event_type=event_type,
            created_before_ms=None if older_than is None else maintenance.cutoff_ms(older_than),
            limit=limit,
        )

    def overdue_ms(self) -> int:
        """Return how long, in ms, the next event has been due; 0 if no event is due. Far cheaper than `stats`.

        The event is pending, or its flusher died while sending it.
        """
        now = self.store.now_ms()
        due_ms = self.store.views.next_due_ms(now_ms=now)
        return 0 if due_ms is None else max(0, now - due_ms)

    def close(self) -> None:
        """Close the connections. An engine of the application is not changed."""
        if self._owns_engine:
            self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wake(self, _session: object = None) -> None:
        for wake in tuple(self.wakers):
            wake()
