"""The events in one database: what can be done with them, by subject."""

from __future__ import annotations

from collections import defaultdict

from sqlalchemy import Engine

from outbox.clock import SharedClock, now_ms
from outbox.policy import Policy
from outbox.storage.acting import Acting
from outbox.storage.bounds import Bounds
from outbox.storage.claims import Claims
from outbox.storage.copying import Copying
from outbox.storage.counts import Counts
from outbox.storage.deletion import Deletion
from outbox.storage.dialects import dialect_of
from outbox.storage.engines import is_own
from outbox.storage.figures import Figures
from outbox.storage.finding import Finding
from outbox.storage.holds import Holds
from outbox.storage.identity import Identity
from outbox.storage.intake import Intake
from outbox.storage.pauses import Pauses
from outbox.storage.replacing import Replacing
from outbox.storage.revival import Revival
from outbox.storage.tries import Tries
from outbox.storage.views import Views


class Store:
    """The table of events in one database, and the parts that work on it.

    Each method of a part is one transaction, unless it says otherwise. Times are handed in, in ms.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._dialect = dialect_of(engine)
        self._writer = self._dialect.writer(engine, is_own=is_own(engine))
        self.is_shared = self._dialect.is_shared
        """Whether several hosts share the database."""
        self.now_ms = SharedClock(self._read_clock).now_ms if self.is_shared else now_ms
        """Returns the time by which rows are due: the server's if hosts share a server, else this machine's."""
        self.login_problems: dict[str, str] = {}
        """Why the last flush of a destination was not logged in, by destination. All flushers share the store."""
        counts: defaultdict[str, Counts] = defaultdict(Counts)  # by destination
        self.deletion = Deletion(engine, self._writer, counts)
        self.bounds = Bounds(engine, self._writer, self.deletion, counts)
        identity = Identity()
        self.intake = Intake(engine, self._writer, self.deletion, self.bounds, identity)
        self.finding = Finding(engine, identity)
        self.acting = Acting(self._writer, self.finding, self.deletion)
        self.replacing = Replacing(engine, self._writer, self.deletion, self.bounds)
        self.copying = Copying(self._writer, identity)
        self.claims = Claims(engine, self._writer, self.now_ms, counts, identity)
        self.holds = Holds(engine, self._writer)
        self.pauses = Pauses(engine, self._writer)
        self.tries = Tries(engine)
        self.revival = Revival(engine, self._writer)
        self.figures = Figures(engine)
        self.views = Views(engine, self._writer, self.deletion, self.bounds, identity)

    def wait_for_server(self, policy: Policy) -> None:
        """Let the policy say how long operations are retried while the database server can't be reached."""
        self._writer.patience_ms = policy.enqueue_patience_ms
        self._writer.flush_patience_ms = policy.flush_patience_ms

    def _read_clock(self) -> int:
        # By the writer, which tries again if the connection is broken.
        return int(
            self._writer.run(
                lambda transaction: transaction.value(self._dialect.clock), repeatable=True, is_single=True
            )
        )
