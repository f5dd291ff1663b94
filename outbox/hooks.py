"""Who is told what became of events: functions of the program, and the log."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from outbox.failures import ConfigurationError
from outbox.policy import Outcome, Verdict
from outbox.statements import ClaimedRow

log = logging.getLogger("outbox")

OUTCOMES = {
    "deliver": ("sent", logging.DEBUG),
    "reschedule": ("rescheduled", logging.INFO),
    "park": ("parked", logging.INFO),
    "abandon": ("abandoned", logging.WARNING),
    "release": ("released", logging.INFO),
}
"""By trigger: how hooks, log and metrics name what became of an event, and how loud the log is."""


class SettledEvent(NamedTuple):
    """One event of an outcome."""

    id: int
    event_type: str
    error: str | None
    """Why, as `last_error` tells it; None where it was sent or given back."""


@dataclass(frozen=True)
class Settled:
    """Events with the same outcome, recorded in one transaction."""

    events: tuple[SettledEvent, ...]
    recorded: int
    """For how many of them it was recorded. If that is fewer, the others have another owner, or were sent by one,
    and it is not known which they are."""


@dataclass(frozen=True)
class Upload:
    """One request that the client made, accepted or failed."""

    events: int
    duration_ms: float
    verdict: Verdict | None
    """What the failure means; None where the request was accepted."""
    failure: str | None
    """The text of the failure."""


@dataclass(frozen=True, eq=False)
class Hooks:
    """Functions that are told what became of events: `outbox.hooks.append(Hooks(on_abandoned=tell))`.

    They are called in the thread that flushed, several threads may call at once, and after all of a claim is
    recorded, or given back after an error: no lease runs meanwhile, but the next batch waits. An `Exception` that
    one raises is logged, with its traceback the first time, and changes nothing. A process that is killed has
    recorded outcomes of which no hook was told; the database counts them all.

    Raises `ConfigurationError` for what can't be called.
    """

    on_sent: Callable[[Settled], object] | None = None
    on_rescheduled: Callable[[Settled], object] | None = None
    on_parked: Callable[[Settled], object] | None = None
    on_abandoned: Callable[[Settled], object] | None = None
    on_released: Callable[[Settled], object] | None = None
    """Given back untried, when a flush was ended."""
    on_lost: Callable[[int], object] | None = None
    """So many events had another owner when their outcome was to be recorded, for their lease had run out."""
    on_upload: Callable[[Upload], object] | None = None
    _failing: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        for hook in fields(self):
            function = getattr(self, hook.name)
            if hook.init and function is not None and not callable(function):
                raise ConfigurationError(f"hooks: {hook.name} is {function!r}, expected a function")

    def call(self, name: str, news: object) -> None:
        """Call one of the functions, if there is one. No `Exception` of it gets out."""
        function = getattr(self, name)
        if function is None:
            return
        try:
            function(news)
        except Exception as error:
            is_first = name not in self._failing
            self._failing.add(name)
            log.log(
                logging.WARNING if is_first else logging.DEBUG,
                "the hook %s failed, the events are as they were recorded: %s",
                name,
                type(error).__name__,
                exc_info=is_first,
                extra={"event_name": "outbox.hook_failed", "hook": name},
            )
        else:
            self._failing.discard(name)


Settlement = tuple[list[tuple[int, Outcome]], Counter[str]]
"""The outcomes of one transaction, and how many of them landed, by trigger."""


def tell(
    hooks: Sequence[Hooks], rows: Iterable[ClaimedRow], news: Iterable[Upload | Settlement], lost_leases: int
) -> None:
    """Tell hooks and log what became of a claim, in the order in which it came about."""
    types = {row.id: row.event_type for row in rows}
    told = tuple(hooks)
    for item in news:
        if isinstance(item, Upload):
            log.debug(
                "an upload of %d events took %d ms: %s",
                item.events,
                item.duration_ms,
                "accepted" if item.verdict is None else item.verdict.value,
                extra={"event_name": "outbox.upload", "events": item.events, "duration_ms": item.duration_ms},
            )
            _call(told, "on_upload", item)
        else:
            _tell_outcomes(told, types, *item)
    if lost_leases:
        log.debug(
            "%d events have another owner now, their outcome is dropped",
            lost_leases,
            extra={"event_name": "outbox.lost_leases", "events": lost_leases},
        )
        _call(told, "on_lost", lost_leases)


def _tell_outcomes(
    hooks: tuple[Hooks, ...], types: dict[int, str], outcomes: list[tuple[int, Outcome]], landed: Counter[str]
) -> None:
    for trigger, (word, level) in OUTCOMES.items():
        # Most batches are sent and nobody listens: then it costs next to nothing.
        if not landed[trigger] or not (hooks or log.isEnabledFor(level)):
            continue
        settled = Settled(
            tuple(
                SettledEvent(row_id, types[row_id], outcome.values.get("last_error"))
                for row_id, outcome in outcomes
                if outcome.trigger == trigger
            ),
            landed[trigger],
        )
        row_ids = [event.id for event in settled.events]
        log.log(
            level,
            "%d of %d events are %s: %s",
            settled.recorded,
            len(row_ids),
            word,
            row_ids,
            extra={"event_name": f"outbox.{word}", "events": settled.recorded, "event_ids": row_ids},
        )
        _call(hooks, f"on_{word}", settled)


def _call(hooks: tuple[Hooks, ...], name: str, news: object) -> None:
    for one in hooks:
        one.call(name, news)
