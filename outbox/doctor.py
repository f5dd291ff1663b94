"""Examine a database and say in words what is found."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import NamedTuple

from sqlalchemy import Engine

from outbox import capture, schema
from outbox.database import reading
from outbox.failures import OutboxError
from outbox.policy import RETRY_AFTER_MAX_MS, Policy, backoff
from outbox.sqlite import damage, journal_mode, sqlite_file
from outbox.stats import duration
from outbox.store import Store

_CLOCK_TOLERANCE_MS = 60_000


class Finding(NamedTuple):
    """What one check found: whether all is well, and in words what is and what to do."""

    check: str
    is_well: bool
    words: str


def examine(engine: Engine, policy: Policy) -> list[Finding]:
    """Run every check; change nothing. What keeps one check from running is a finding too.

    Where the schema does not fit or the file is damaged, the checks that need it are left out.
    """
    findings: list[Finding] = []
    for check in (_capture, _schema, _integrity, _journal, _permissions, _times):
        name = check.__name__.removeprefix("_")
        try:
            findings += [Finding(name, *found) for found in check(engine, policy)]
        except OutboxError as error:
            findings.append(Finding(name, False, str(error)))
            if check is _schema or check is _integrity:
                break
    return findings


def _capture(_engine: Engine, _policy: Policy) -> Iterator[tuple[bool, str]]:
    if capture.is_off():
        yield True, f"{capture.IS_OFF}: nothing is recorded, and what is queued is not sent"


def _schema(engine: Engine, _policy: Policy) -> Iterator[tuple[bool, str]]:
    schema.check(engine)
    yield True, f"the schema is {schema.REVISIONS[-1]}, as this program needs it"


def _integrity(engine: Engine, _policy: Policy) -> Iterator[tuple[bool, str]]:
    if engine.dialect.name != "sqlite":
        return
    with reading(engine) as connection:
        found = damage(connection)
    if found:
        yield False, f"the file is damaged, restore a backup or use .recover of sqlite3: {'; '.join(found)}"
    else:
        yield True, "the file is sound"


def _journal(engine: Engine, _policy: Policy) -> Iterator[tuple[bool, str]]:
    if sqlite_file(engine.url) is None:
        return
    with reading(engine) as connection:
        mode = journal_mode(connection)
    if mode == "wal":
        yield True, "the journal is a write-ahead log"
    else:
        yield False, f"the journal is in mode {mode!r}, expected 'wal'; is the file on a local disk?"


def _permissions(engine: Engine, _policy: Policy) -> Iterator[tuple[bool, str]]:
    path = sqlite_file(engine.url)
    if path is None:
        return
    open_to_others = [
        f"{found} has the mode {mode:04o}, others than its owner may open it; `chmod 600` mends that"
        for suffix in ("", "-wal", "-shm")
        if (found := path.with_name(path.name + suffix)).exists()
        and (mode := stat.S_IMODE(found.stat().st_mode)) & 0o077
    ]
    for words in open_to_others:
        yield False, words
    if not open_to_others:
        yield True, "the files belong to their owner only"


def _times(engine: Engine, policy: Policy) -> Iterator[tuple[bool, str]]:
    store = Store(engine)
    now = store.now_ms()
    longest_wait_ms = max(backoff(99, policy.backoff_ms), policy.rate_limit_ms, RETRY_AFTER_MAX_MS) * 5 // 4
    odd = store.oddities(
        now_ms=now,
        longest_lease_ms=now + policy.lease_ms + _CLOCK_TOLERANCE_MS,
        soon_ms=now + _CLOCK_TOLERANCE_MS,
        latest_due_ms=now + longest_wait_ms + _CLOCK_TOLERANCE_MS,
    )
    clock = "a clock was wrong, or still is"
    problems = (
        (odd.leases_run_out, "held under a lease that has run out: their flusher died, the next flush takes them"),
        (odd.leases_too_long, f"held under a lease that ends later than in {duration(policy.lease_ms)}: {clock}"),
        (odd.created_in_future, f"created in the future: {clock}"),
        (odd.due_too_late, f"due later than the longest wait: {clock}; `outbox retry` makes them due now"),
    )
    for events, words in problems:
        if events:
            yield False, f"{events} {'event is' if events == 1 else 'events are'} {words}"
    if not any(odd):
        yield True, "leases, creation and due times are plausible"
