"""Reports the outcomes of events to the program's hooks and to the log."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from outbox.destinations import DEFAULT_NAME, shown
from outbox.failures import ConfigurationError
from outbox.outcomes import Outcome
from outbox.policy import Verdict
from outbox.records import BatchItem

log = logging.getLogger("outbox")

OUTCOMES = {
    "deliver": ("sent", logging.DEBUG),
    "reschedule": ("rescheduled", logging.INFO),
    "park": ("parked", logging.INFO),
    "abandon": ("abandoned", logging.WARNING),
    "release": ("released", logging.INFO),
}
"""By trigger: the name of the outcome in hooks, log and metrics, and its log level."""

_LEVELS = dict(OUTCOMES.values())


class SettledEvent(NamedTuple):
    """One event of an outcome."""

    id: int
    event_type: str
    error: str | None
    """The text of `last_error`; None if the event was sent or released."""
    event_id: str
    """The id of the event, your own or the outbox's. `id` is the row id."""


@dataclass(frozen=True)
class Settled:
    """Events with the same outcome, recorded in one transaction."""

    events: tuple[SettledEvent, ...]
    recorded: int
    """Number of these events whose outcome was written. If it is smaller than the number of `events`, other
    flushers took over the rest; which events these are is not known."""
    destination: str = DEFAULT_NAME


@dataclass(frozen=True)
class Upload:
    """One request of the client, accepted or failed."""

    events: int
    duration_ms: float
    """How long the request took, in ms."""
    verdict: Verdict | None
    """The meaning of the failure; None if the request was accepted."""
    failure: str | None
    """The text of the failure; None if the request was accepted."""
    destination: str = DEFAULT_NAME


@dataclass(frozen=True, eq=False)
class Hooks:
    """Functions that are called with the outcomes of events: `outbox.hooks.append(Hooks(on_abandoned=tell))`.

    Hooks fire only for outcomes committed to the database, after the whole claim is settled. They run in the
    thread that flushes, so several threads may call a hook at once. A slow hook delays the next batch but causes
    no duplicates. An `Exception` of a hook is logged, the first time with its traceback, and changes nothing. If
    the process is killed, hooks miss outcomes that were already committed; the database counts all of them.

    Raises `ConfigurationError` for a hook that is not callable.
    """

    on_sent: Callable[[Settled], object] | None = None
    on_rescheduled: Callable[[Settled], object] | None = None
    on_parked: Callable[[Settled], object] | None = None
    on_abandoned: Callable[[Settled], object] | None = None
    on_released: Callable[[Settled], object] | None = None
    """Events that were released without a try: by an interrupted flush or a stopping worker, or because they did
    not fit in the request."""
    on_lost: Callable[[int], object] | None = None
    """Number of events that another flusher took over, after their lease ended, before an outcome was written."""
    on_upload: Callable[[Upload], object] | None = None
    _failing: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        for hook in fields(self):
            function = getattr(self, hook.name)
            if hook.init and function is not None and not callable(function):
                raise ConfigurationError(f"hooks: {hook.name} is {function!r}, expected a function")

    def call(self, name: str, news: object) -> None:
        """Call the hook `name`, if it is set. Log its `Exception` instead of raising it."""
        function = getattr(self, name)
        if function is None:
            return
        try:
            function(news)
        except Exception as error:
            is_first = name not in self._failing
            self._failing.add(name)
            with suppress(Exception):  # the other hooks are called even if a log filter of the application raises
                log.log(
                    logging.WARNING if is_first else logging.DEBUG,
                    "the hook %s failed; the recorded outcomes stay: %s",
                    name,
                    type(error).__name__,
                    exc_info=is_first,
                    extra={"event_name": "outbox.hook_failed", "hook": name},
                )
        else:
            self._failing.discard(name)


Settlement = tuple[list[tuple[int, Outcome]], Counter[str]]
"""The outcomes of one transaction, and how many of them were written, by trigger."""


def tell(
    hooks: Sequence[Hooks],
    rows: Iterable[BatchItem],
    news: Iterable[Upload | Settlement],
    lost_leases: int,
    destination: str,
) -> None:
    """Report the uploads and outcomes of a claim, in order: first to all hooks, then to the log."""
    known = {row.id: row for row in rows}
    told = tuple(hooks)
    found: list[tuple[str, Upload | Settled | int]] = []
    for item in news:
        if isinstance(item, Upload):
            found.append(("upload", item))
        else:
            found += _settled(item, known, shown(destination), is_heard=bool(told))
    if lost_leases:
        found.append(("lost", lost_leases))
    for name, what in found:
        for one in told:
            one.call(f"on_{name}", what)
    # After the hooks: an exception of the application's log filter or handler goes to the caller.
    for name, what in found:
        _log(name, what, shown(destination))


def _settled(
    settlement: Settlement, known: dict[int, BatchItem], destination: str, *, is_heard: bool
) -> Iterator[tuple[str, Settled]]:
    outcomes, landed = settlement
    for trigger, (word, level) in OUTCOMES.items():
        # Usually there are no hooks and the log level is higher. Then the arguments are not built.
        if landed[trigger] and (is_heard or log.isEnabledFor(level)):
            events = (
                SettledEvent(row.id, row.event_type, outcome.values.get("last_error"), row.event_id)
                for row_id, outcome in outcomes
                if outcome.trigger == trigger and (row := known[row_id])
            )
            yield word, Settled(tuple(events), landed[trigger], destination)


def _log(name: str, item: Upload | Settled | int, destination: str) -> None:
    if isinstance(item, Upload):
        log.debug(
            "upload of %d events took %d ms: %s",
            item.events,
            item.duration_ms,
            "accepted" if item.verdict is None else item.verdict.value,
            extra={
                "event_name": "outbox.upload",
                "events": item.events,
                "duration_ms": item.duration_ms,
                "destination": destination,
            },
        )
    elif isinstance(item, Settled):
        row_ids = [event.id for event in item.events]
        event_ids = [event.event_id for event in item.events]
        log.log(
            _LEVELS[name],
            "%s: %d of %d events, rows %s, event ids %s",
            name,
            item.recorded,
            len(row_ids),
            row_ids,
            event_ids,
            extra={
                "event_name": f"outbox.{name}",
                "events": item.recorded,
                "row_ids": row_ids,
                "event_ids": event_ids,
                "destination": destination,
            },
        )
    else:
        log.debug(
            "another flusher took over %d events; their outcomes are dropped",
            item,
            extra={"event_name": "outbox.lost_leases", "events": item, "destination": destination},
        )
