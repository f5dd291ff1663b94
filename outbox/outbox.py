"""The facade: what applications call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Engine
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.orm import Session, scoped_session

from outbox import capture, maintenance, schema
from outbox.clock import epoch_ms
from outbox.database import default_url, open_engine
from outbox.events import Event, Redact, columns, encode, redacted
from outbox.failures import ConfigurationError
from outbox.lifecycle import Status
from outbox.policy import Policy
from outbox.sqlite import Synchronous

if TYPE_CHECKING:
    from typing_extensions import Self

    from outbox.flusher import FlushReport, UploadClient
    from outbox.hooks import Hooks
    from outbox.models import ObservationEvent
    from outbox.stats import Stats


LARGEST_ID = 2**63 - 1
"""No id, and no other number in a database, is larger."""


class Outbox:
    """A durable outbox in one database. Safe to share between threads; a forked child may go on using it.

    `database` is an SQLAlchemy URL, or an `Engine` of the host's, whose settings are kept; before a fork the host
    disposes of it, while ours need nothing. The schema is not touched: raises `SchemaError`, saying what to do,
    where it is missing, older or newer than this program. `Outbox.open` upgrades it first. `synchronous` is
    SQLite's: FULL keeps an event that `enqueue` accepted through a power cut, NORMAL only through a crash of the
    program. `redact` gets each event, validated, before it is written, and returns the one to write instead, which
    is validated too; what a mapping holds beside the fields of its type does not reach it, and is left out.
    """

    def __init__(
        self,
        database: str | URL | Engine,
        *,
        policy: Policy | None = None,
        synchronous: Synchronous = "FULL",
        redact: Redact | None = None,
    ) -> None:
        if redact is not None and not callable(redact):
            raise ConfigurationError(f"redact is {redact!r}, expected a function that gets and returns an event")
        self._owns_engine = not isinstance(database, Engine)
        self.engine = database if isinstance(database, Engine) else open_engine(database, synchronous=synchronous)
        self.wakers: set[Callable[[], object]] = set()
        """Called when this object may have made events due: after the commit of an `enqueue`, and the like."""
        self.hooks: list[Hooks] = []
        """Told what became of events that this object, or a worker of it, flushed."""
        from outbox.store import Store  # noqa: PLC0415 - it builds all statements, for who opens an outbox only

        self._store = Store(self.engine)
        self._redact = redact
        self.policy = (policy or Policy()).on(is_shared=self._store.is_shared)
        try:
            schema.check(self.engine)
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
    ) -> Self:
        """Open an outbox after creating or upgrading its schema; None is the per-user default file.

        A new SQLite file is readable by its owner only.
        """
        if isinstance(database, Engine):
            engine = database
        else:
            engine = open_engine(default_url() if database is None else database, synchronous=synchronous)
        try:
            schema.upgrade(engine)
            opened = cls(engine, policy=policy, redact=redact)
        except BaseException:
            if engine is not database:
                engine.dispose()
            raise
        opened._owns_engine = engine is not database
        return opened

    def enqueue(
        self,
        event: Event | Mapping[str, Any],
        *,
        session: Session | scoped_session[Session] | None = None,
        connection: Any = None,
    ) -> int | None:
        """Record one event; return its row id, or None when the environment says OUTBOX_CAPTURE=false.

        It is durable when this returns. With `session`, the caller's own, it is one INSERT in the caller's
        transaction instead: it comes with the commit and goes with the rollback, and nothing of the session is
        flushed, expired or committed. `connection` does the same for a program without SQLAlchemy: it is the
        connection of a driver (DBAPI) to this database, such as Django's `connection.connection`; without a
        transaction it commits by itself. A mapping names its type as `event_type`.

        Raises `InvalidEvent`, naming the field and what it should be, or that the outbox's `redact` failed,
        `QueueFull` where the policy says so, and `StorageError`. Nothing is written then, unless it is the
        connection to a server that broke, and that during the commit.
        """
        ids = self.enqueue_many([event], session=session, connection=connection)
        return ids[0] if ids else None

    def enqueue_many(
        self,
        events: Iterable[Event | Mapping[str, Any]],
        *,
        session: Session | scoped_session[Session] | None = None,
        connection: Any = None,
    ) -> list[int]:
        """Record events in one transaction, all or none; return their row ids in order.

        Like `enqueue` in everything else. The list is empty when the environment says OUTBOX_CAPTURE=false.
        """
        if capture.is_off():
            return []
        now = self._store.now_ms()
        rows = [_row(event, now, self._redact) for event in events]
        if not rows:
            return []
        if session is not None:
            ids = self._store.insert_in(session, rows, policy=self.policy)
            self._wake_after_commit(session)
            return ids
        if connection is not None:
            return self._store.insert_on(connection, rows, policy=self.policy)
        ids, over_cap = self._store.insert(rows, policy=self.policy, now_ms=now)
        if over_cap:
            maintenance.cap(self._store, self.policy, now_ms=now)
        self._wake()
        return ids

    def flush(self, client: UploadClient) -> FlushReport:
        """Send one batch of due events; a failed upload is data in the report, it is not raised.

        Nothing is touched while the client is not logged in, or the environment says OUTBOX_CAPTURE=false.
        Whatever else the client raises, and an interrupt, releases the events and reaches the caller.
        """
        from outbox import flusher  # noqa: PLC0415 - programs that only enqueue need not load what delivers

        return flusher.flush(self._store, self.policy, client, hooks=self.hooks)

    def flush_all(
        self,
        client: UploadClient,
        *,
        progress: Callable[[FlushReport], object] | None = None,
    ) -> FlushReport:
        """Send batch after batch until nothing is due, or a failure holds for all; return the sum.

        `progress` is called with the report of each batch.
        """
        from outbox import flusher  # noqa: PLC0415 - programs that only enqueue need not load what delivers

        return flusher.flush_all(self._store, self.policy, client, progress, hooks=self.hooks)

    def retry_now(self) -> int:
        """Make everything due that is parked or waits, not what is being sent; return the number of rows."""
        count = self._store.retry_now(now_ms=self._store.now_ms())
        self._wake()
        return count

    def requeue_abandoned(self, *, older_than: datetime | int, dry_run: bool = False) -> maintenance.RequeueReport:
        """Give abandoned events created before `older_than` a full new chance; a dry run only counts.

        `older_than` is a datetime with a time zone, or epoch milliseconds.
        """
        report = maintenance.requeue_abandoned(
            self._store, cutoff_ms=_epoch_ms(older_than), now_ms=self._store.now_ms(), dry_run=dry_run
        )
        self._wake()
        return report

    def purge(
        self, *, event_type: str | None = None, before: datetime | int | None = None, dry_run: bool = False
    ) -> maintenance.PurgeReport:
        """Delete the events of a type, or created before a time, or both, for good; a dry run only counts.

        `before` is a datetime with a time zone, or epoch milliseconds. Events in any state are deleted and counted
        in the ledger, but those that are being sent are left alone. It looks at every row, and deletes a thousand
        in a transaction: after an error the first of them are gone. Raises `ConfigurationError` where nothing says
        what to delete.
        """
        if event_type is None and before is None:
            raise ConfigurationError(
                "nothing says what to purge, expected an event type, a time before which, or both"
            )
        if not isinstance(event_type, str | None):
            raise ConfigurationError(f"event_type is {event_type!r}, expected the name of a type, a text")
        return maintenance.purge(
            self._store,
            event_type=event_type,
            created_before_ms=None if before is None else _epoch_ms(before, "before"),
            now_ms=self._store.now_ms(),
            dry_run=dry_run,
        )

    def pending_count(self) -> int:
        """Return how many events are on their way: pending or being sent. Parked ones do not count."""
        return self._store.pending_count()

    def stats(self) -> Stats:
        """Return what is queued, what is stuck, and the likely cause."""
        from outbox import stats  # noqa: PLC0415 - programs that only enqueue need not load what looks

        return stats.gather(self._store, now_ms=self._store.now_ms(), lease_ms=self.policy.lease_ms)

    def get(self, row_id: int) -> ObservationEvent | None:
        """Return one event, detached from the database, or None."""
        return self._store.get(row_id) if 0 < row_id <= LARGEST_ID else None

    def find(
        self,
        *,
        status: Status | str | None = None,
        event_type: str | None = None,
        older_than: datetime | int | None = None,
        limit: int = 100,
    ) -> list[ObservationEvent]:
        """Return the oldest events that fit all that is given, detached from the database.

        Raises `ConfigurationError` for a status, time or limit that no event can have.
        """
        known = [one.value for one in Status]
        if status is not None and status not in known:
            raise ConfigurationError(f"status is {status!r}, expected one of {', '.join(known)}")
        if not 0 <= limit <= LARGEST_ID:
            raise ConfigurationError(f"limit is {limit!r}, expected a whole number from 0 to {LARGEST_ID}")
        return self._store.find(
            status=None if status is None else Status(status).value,
            event_type=event_type,
            created_before_ms=None if older_than is None else _epoch_ms(older_than),
            limit=limit,
        )

    def overdue_ms(self) -> int:
        """Return for how long the next event has been due; 0 if none is. Far cheaper than `stats`.

        It is pending, or a flusher that died was sending it.
        """
        now = self._store.now_ms()
        due_ms = self._store.next_due_ms(now_ms=now)
        return 0 if due_ms is None else max(0, now - due_ms)

    def close(self) -> None:
        """Close the connections. An engine of the host's stays as it is."""
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

    def _wake_after_commit(self, session: Session | scoped_session[Session]) -> None:
        if not self.wakers:
            return
        this = session if isinstance(session, Session) else session()
        # Once for a session: a listener can't be removed while it is called, and a wake too many is harmless.
        if not sqlalchemy_event.contains(this, "after_commit", self._wake):
            sqlalchemy_event.listen(this, "after_commit", self._wake)


def _row(event: Event | Mapping[str, Any], now: int, redact: Redact | None) -> dict[str, Any]:
    valid, payload_json = encode(event)
    if redact is not None:
        valid, payload_json = redacted(valid, redact)
    return {
        **columns(valid, now_ms=now),
        "payload_json": payload_json,
        "next_attempt_at_ms": now,
        "created_at_ms": now,
    }


def _epoch_ms(when: datetime | int, name: str = "older_than") -> int:
    if isinstance(when, datetime) and when.utcoffset() is not None:
        return epoch_ms(when)
    if isinstance(when, int) and abs(when) < 2**63:
        return when
    raise ConfigurationError(f"{name} is {when!r}, expected a datetime with a time zone or epoch milliseconds")
