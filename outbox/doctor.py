"""Check a database and report what is wrong in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from sqlalchemy import Engine

from outbox import capture, schema
from outbox.failures import OutboxError
from outbox.holds import hold_in_words
from outbox.policy import Policy, longest_wait_ms
from outbox.stats import duration, silence_in_words, silent
from outbox.storage.counts import filling_in_words
from outbox.storage.dialects import dialect_of
from outbox.storage.store import Store

_CLOCK_TOLERANCE_MS = 60_000
# The other checks make no sense if one of these fails.
_NEEDED = ("schema", "integrity")
_INVALID_NUMBER = "another program wrote text, a fraction or a huge number to a number column"


class Finding(NamedTuple):
    """What one check found: `is_well`, and in words what is wrong and what to do."""

    check: str
    is_well: bool
    words: str


def examine(engine: Engine, policy: Policy) -> list[Finding]:
    """Run every check without changing anything. An error of a check is a finding, too.

    If the schema does not fit this program, or the file is damaged, the later checks are skipped.
    """
    findings: list[Finding] = []
    checks: dict[str, Callable[[], Iterator[tuple[bool, str]]]] = {
        "capture": _capture,
        "schema": partial(_schema, engine),
        **dialect_of(engine).checks(engine),
        "identity": partial(_identity, engine),
        "times": partial(_times, engine, policy),
        "bounds": partial(_bounds, engine, policy),
        "destinations": partial(_destinations, engine),
    }
    for name, check in checks.items():
        try:
            findings += [Finding(name, *found) for found in check()]
        except OutboxError as error:
            findings.append(Finding(name, False, str(error)))
            if name in _NEEDED:
                break
    return findings


def _capture() -> Iterator[tuple[bool, str]]:
    if capture.is_off():
        yield True, f"{capture.IS_OFF}: no event is enqueued or sent"


def _schema(engine: Engine) -> Iterator[tuple[bool, str]]:
    schema.check(engine)
    yield True, f"the schema is {schema.REVISIONS[-1]}, which this program needs"


def _identity(engine: Engine) -> Iterator[tuple[bool, str]]:
    words = "the first part of each event id that the program did not give"
    advice = "a restored backup keeps it, so events that are sent again keep their ids"
    yield True, f"the outbox id is {Store(engine).views.outbox_id()}, {words}; {advice}"


def _times(engine: Engine, policy: Policy) -> Iterator[tuple[bool, str]]:
    store = Store(engine)
    now = store.now_ms()
    odd = store.figures.oddities(
        now_ms=now,
        latest_lease_until_ms=now + policy.lease_ms + _CLOCK_TOLERANCE_MS,
        soon_ms=now + _CLOCK_TOLERANCE_MS,
        latest_due_ms=now + longest_wait_ms(policy) + _CLOCK_TOLERANCE_MS,
    )
    clock = "a clock was or is wrong"
    problems = (
        (odd.leases_run_out, "held under an expired lease: the flusher died; the next flush takes over"),
        (odd.leases_too_long, f"held under a lease that ends in more than {duration(policy.lease_ms)}: {clock}"),
        (odd.created_in_future, f"created in the future: {clock}"),
        (odd.due_too_late, f"due later than the longest wait allows: {clock}; run `outbox retry --all`"),
        (odd.invalid, f"invalid: {_INVALID_NUMBER}; the next flush abandons them"),
    )
    for events, words in problems:
        if events:
            yield False, f"{events} {'event is' if events == 1 else 'events are'} {words}"
    if not any(odd):
        yield True, "leases, creation and due times are plausible"


def _bounds(engine: Engine, policy: Policy) -> Iterator[tuple[bool, str]]:
    if policy.max_undelivered:
        store = Store(engine)
        names = ["", *store.views.due(now_ms=store.now_ms())]
        undelivered = max(map(store.bounds.count_undelivered, names))
        filling = filling_in_words(undelivered, policy.max_undelivered)
        if filling is not None:
            yield False, f"the queue is filling up: {filling}; `outbox status` shows why the events wait"
        else:
            yield True, f"{undelivered} undelivered events, less than half of max_undelivered"


def _destinations(engine: Engine) -> Iterator[tuple[bool, str]]:
    store = Store(engine)
    now = store.now_ms()
    others = store.figures.other_destinations()
    holds = store.holds.lasting(now_ms=now)
    unserved = silent(store.views.due(now_ms=now), holds, now_ms=now)
    for hold in holds:
        yield True, hold_in_words(hold)
    # `outbox health` tells whether a lone destination is served. A file that was just moved here need not be.
    if others and unserved:
        advice = "check that a flusher serves each of them, and what `outbox status` shows"
        yield False, f"{silence_in_words(unserved)}; {advice}"
    if others:
        events = f"undelivered events go to {others} {'destination' if others == 1 else 'destinations'}"
        danger = "a program that knows no destinations, such as difflore or an older version, would send them to"
        yield True, f"{events} beside the default one: {danger} the default one; it must not flush this database"
    else:
        yield True, "every undelivered event goes to the default destination"
