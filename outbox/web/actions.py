"""The actions on events: the console counts the events first, asks for confirmation, and then acts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from flask import Blueprint, abort, flash, redirect, render_template, request, url_for
from werkzeug.datastructures import MultiDict
from werkzeug.wrappers import Response as AnyResponse

from outbox.failures import ConfigurationError
from outbox.filters import Where
from outbox.lifecycle import moves
from outbox.maintenance import ActionReport, PurgeReport
from outbox.outbox import Outbox
from outbox.stats import counted
from outbox.web import filters
from outbox.web.console import console
from outbox.web.filters import Filters
from outbox.words import exact

pages = Blueprint("actions", __name__)

_REASON = "cancelled in the console"
"""A reason for the count. The operator gives the real one when confirming."""
_LONGEST_REASON = 500
_BEFORE = "created_before"
"""The field that keeps, from the count to the action, which events are too new."""

Report = ActionReport | PurgeReport


@dataclass(frozen=True)
class Action:
    """An action, in words."""

    name: str
    title: str
    done: str
    applies_to: str
    effect: str
    run: Callable[[Outbox, Where, str, bool], Report]
    """Acts on an outbox, or only counts. The text is the reason."""
    trigger: str | None
    """The move that it makes; None stands for a deletion, which any status allows."""
    is_final: bool = False
    needs_reason: bool = False


ACTIONS = {
    action.name: action
    for action in (
        Action(
            "retry",
            "Retry",
            "made due",
            "that wait or are parked",
            "They become due now, and the pauses of their destinations end. Events scheduled for later stay"
            " as they are.",
            lambda outbox, where, _, dry_run: outbox.retry(where, dry_run=dry_run),
            "retry_now",
        ),
        Action(
            "requeue",
            "Requeue",
            "requeued",
            "that are abandoned",
            "They return to the queue as if they were new: their failures and their age are reset.",
            lambda outbox, where, _, dry_run: outbox.requeue(where, dry_run=dry_run),
            "requeue",
        ),
        Action(
            "abandon",
            "Abandon",
            "abandoned",
            "that are pending or parked",
            "They are not sent. They stay here with your reason, and Requeue returns them to the queue.",
            lambda outbox, where, reason, dry_run: outbox.abandon(where=where, reason=reason, dry_run=dry_run),
            "cancel",
            needs_reason=True,
        ),
        Action(
            "purge",
            "Purge",
            "deleted for good",
            "that are not being sent",
            "They are deleted for good, with their payloads. This can't be undone. The ledger counts them.",
            lambda outbox, where, _, dry_run: outbox.purge(where=where, dry_run=dry_run),
            None,
            is_final=True,
        ),
    )
}


def actions_for(status: str) -> list[Action]:
    """Return the actions that may apply to an event with this status."""
    return [
        action
        for action in ACTIONS.values()
        if action.trigger is None or status in moves()[action.trigger].sources
    ]


@dataclass(frozen=True)
class Target:
    """The events that an action is about: those that were selected, or all that match the conditions."""

    filters: Filters
    ids: Sequence[int] | None
    """The selected events; None stands for all that match."""
    is_one: bool
    """Whether the action was chosen on the page of one event."""
    created_before_ms: int
    """Events of this time or later are left alone: the reader has not seen their number."""

    @property
    def where(self) -> Where:
        """The events, for the outbox."""
        if self.ids is not None:
            return Where(ids=self.ids)
        asked: Any = self.filters.where.older_than
        before_ms = self.created_before_ms if asked is None else min(asked, self.created_before_ms)
        return replace(self.filters.where, older_than=before_ms)

    def fields(self) -> Iterator[tuple[str, str]]:
        """Yield the fields of a form that names the same events."""
        yield "scope", "all" if self.ids is None else "one" if self.is_one else "selected"
        yield from (("row", str(row_id)) for row_id in self.ids or ())
        yield _BEFORE, exact(self.created_before_ms)
        yield from self.filters.as_meant()

    def back(self) -> str:
        """Return the URL of the page on which the action was chosen."""
        if self.is_one and self.ids:
            return url_for("events.one", row_id=self.ids[0])
        return listing_url(self.filters.as_given())


@pages.get("/events/confirm")
def confirm() -> str | AnyResponse:
    """Show what an action would do, without doing it."""
    action, target = _asked(request.args)
    if target.ids is not None and not target.ids:
        flash("No event is selected.", "bad")
        return redirect(target.back(), 303)
    report = action.run(console().outbox, target.where, _REASON, True)
    return render_template(
        "confirm.html", action=action, target=target, report=report, longest_reason=_LONGEST_REASON
    )


@pages.post("/events/act")
def act() -> AnyResponse:
    """Act on the events, and return to the page on which the action was chosen."""
    action, target = _asked(request.form)
    reason = request.form.get("reason", "").strip()
    if action.needs_reason and not 0 < len(reason) <= _LONGEST_REASON:
        raise ConfigurationError(f"the reason has {len(reason)} characters, expected 1 to {_LONGEST_REASON}")
    report = action.run(console().outbox, target.where, reason, False)
    console().looks.forget()
    words = f"{counted(report.total, 'event')} {'was' if report.total == 1 else 'were'} {action.done}."
    if report.in_flight:
        words += f" Left alone because a flusher is sending them: {counted(report.in_flight, 'event')}."
    flash(words, "good" if report.total else "")
    is_gone = action.is_final and target.is_one and report.total
    return redirect(url_for("events.listing") if is_gone else target.back(), 303)


def _asked(fields: MultiDict[str, str]) -> tuple[Action, Target]:
    settings = console()
    action = ACTIONS.get(fields.get("do", ""))
    if action is None:
        raise ConfigurationError(f"do is {fields.get('do')!r}, expected one of {', '.join(ACTIONS)}")
    scope = fields.get("scope", "")
    if scope not in {"all", "selected", "one"}:
        raise ConfigurationError(f"scope is {scope!r}, expected all, selected or one")
    if settings.read_only:
        abort(403, "this console is read-only")
    now_ms = settings.outbox.store.now_ms()
    found = filters.read(fields, now_ms=now_ms, hide_payloads=settings.hide_payloads)
    ids = None if scope == "all" else [filters.row_id(word) for word in fields.getlist("row")]
    before_ms = filters.moment(_BEFORE, fields[_BEFORE], now_ms) if _BEFORE in fields else now_ms + 1
    return action, Target(found, ids, scope == "one", before_ms)


def listing_url(fields: Iterable[tuple[str, str]]) -> str:
    """Return the URL of the list of events with these conditions."""
    query = urlencode([*fields])
    return url_for("events.listing") + (f"?{query}" if query else "")
