"""One event in words: its columns, why it waits, and what happens to it next."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from outbox import capture
from outbox.clock import utc
from outbox.decisions import age_out_ms
from outbox.destinations import shown
from outbox.events import check_payload, content_hash
from outbox.failures import InvalidEvent
from outbox.holds import Hold, hold_in_words
from outbox.lifecycle import Status
from outbox.outcomes import WaitsFor
from outbox.pauses import PROBE_AFTER
from outbox.policy import RECENT_MS, Policy, Verdict
from outbox.reasons import in_words
from outbox.records import LOST_LEASES_ALONE, Pause
from outbox.stats import duration
from outbox.storage.column_types import invalid_column
from outbox.tries import KEPT, Try
from outbox.words import escape, facts_table, when

if TYPE_CHECKING:
    from outbox.storage.store import Store
    from outbox.storage.tables import ObservationEvent

OF_PAYLOAD = frozenset({"rules", "session", "file", "content hash"})
"""The names of the facts that come from the payload."""

_LONG_MS = 10_000
# Indentation grows with the square of the depth: it made 400 MB of a payload of 600 kB.
_LONGEST_INDENTED = 10_000
_INDENTED_TIMES = 10

_WAITS: dict[str, str] = {
    WaitsFor.SERVICE: (
        "the service probably failed, not this event; the event is tried again when it is due, or when the service"
        " accepts another event"
    ),
    WaitsFor.DELAY: "the service asked for a delay",
    WaitsFor.PROOF: "the service rejected this event alone; it is a suspect until there is proof",
    WaitsFor.ROW: (
        "this event failed alone while the service seemed to work; other events are sent before"
        " this one, which is abandoned only when it is too old"
    ),
}

_IDLE: dict[str, str] = {
    Status.SENT: "nothing: it is delivered, and may be deleted to make room",
    Status.ABANDONED: "nothing: it is abandoned; `outbox requeue {id}` returns it to the queue",
    Status.PARKED: (
        "it waits until the service accepts a token: set a new token, then run `outbox retry --all`. Without a"
        " retry, one parked event is tried each minute in which nothing else is due"
    ),
}


class Around(NamedTuple):
    """What an event's life depends on besides its columns."""

    now_ms: int
    policy: Policy
    pauses: Sequence[Pause]
    """The pause of its destination."""
    holds: Sequence[Hold]
    """The hold of its destination."""
    tries: Sequence[Try]
    """Its last failed tries."""


def look_around(store: Store, policy: Policy, row: ObservationEvent) -> Around:
    """Read what an event's life depends on."""
    now_ms = store.now_ms()
    of = row.destination
    return Around(
        now_ms,
        policy,
        [pause for pause in store.views.pauses(now_ms=now_ms) if pause.destination == of],
        [hold for hold in store.holds.lasting(now_ms=now_ms) if hold.destination == shown(of)],
        store.tries.of(row.id),
    )


def event_in_words(row: ObservationEvent, around: Around) -> str:
    """Return what `outbox show` prints."""
    life = "\n".join(escape(f"{time}  {what}") for time, what in past(row, around.tries))
    return f"{facts_table(event_facts(row, around))}\n\n{life}\n\n{pretty(row.payload_json)}"


def past(row: ObservationEvent, tries: Sequence[Try]) -> list[tuple[str, str]]:
    """Return what happened to an event so far, in order: when, and what."""
    steps = [(row.created_at_ms, "recorded")]
    steps += [(one.tried_at_ms, _try_in_words(one)) for one in tries]
    if len(tries) == KEPT:
        steps[1] = (steps[1][0], f"{steps[1][1]}. Only the last {KEPT} failed tries are kept")
    if row.revived_at_ms is not None:
        steps.append((row.revived_at_ms, "returned to the queue"))
    if row.sent_at_ms is not None:
        steps.append((row.sent_at_ms, "accepted by the service"))
    # SQLite stores any value in any column.
    steps.sort(key=lambda step: step[0] if isinstance(step[0], int) else 0)
    return [(utc(time), what) for time, what in steps]


def _try_in_words(one: Try) -> str:
    took = f"{one.duration_ms} ms" if one.duration_ms < _LONG_MS else duration(one.duration_ms)
    why = in_words(one.failure)
    if one.verdict == Verdict.PERMANENT.value and one.failure[:1].isdigit():
        # A rejected request with this event says nothing about other requests.
        why = f"the service rejected the request ({one.failure})"
    return f"tried by {one.host}; failed after {took}, {one.verdict}: {why}"


def event_facts(row: ObservationEvent, around: Around) -> list[tuple[str, str]]:
    """Return what is known of an event besides its payload, as names and texts."""
    now_ms = around.now_ms
    facts = [
        ("event", str(row.id)),
        ("event id", str(row.event_id)),
        ("type", row.event_type),
        ("destination", shown(row.destination)),
        ("status", row.status),
        ("next", what_next(row, around)),
        *_why_it_waits(row, now_ms=now_ms, policy=around.policy),
        ("created", when(row.created_at_ms, now_ms=now_ms)),
        ("occurred", when(row.occurred_at_ms, now_ms=now_ms)),
    ]
    if row.revived_at_ms is not None:
        facts.append(("revived", when(row.revived_at_ms, now_ms=now_ms)))
    if row.sent_at_ms is not None:
        facts.append(("sent", when(row.sent_at_ms, now_ms=now_ms)))
    facts.append(("failures", str(row.retry_count)))
    if row.last_error is not None:
        waits_for = row.waits_for if row.status == Status.PENDING else None
        facts.append(("last error", in_words(row.last_error, waits_for)))
    if row.lost_leases != 0:
        facts.append(("lost leases", _lost_leases(row.lost_leases)))
    rules = "" if row.rule_ids_json == "[]" else row.rule_ids_json
    facts += [
        (name, value)
        for name, value in (("rules", rules), ("session", row.session_id), ("file", row.file_path))
        if value  # most events have no such field
    ]
    facts.append(("content hash", _content_hash(row.payload_json)))
    return facts


def life_as_dict(row: ObservationEvent, around: Around) -> dict[str, Any]:
    """Return what `outbox show --json` prints."""
    return {
        **event_as_dict(row),
        "next": what_next(row, around),
        "tries": [one._asdict() for one in around.tries],
    }


def event_as_dict(row: ObservationEvent) -> dict[str, Any]:
    """Return the columns of one event by name; a value that JSON can't hold becomes its `repr`."""
    found = {name: value if _is_json(value) else repr(value) for name, value in _columns(row)}
    return {**found, "destination": shown(row.destination)}


def what_next(row: ObservationEvent, around: Around) -> str:
    """Return what happens to an event next, and what the operator can do about it."""
    now_ms, due_ms = around.now_ms, row.next_attempt_at_ms
    if row.status not in (Status.PENDING, Status.SENDING):
        text = _IDLE.get(row.status, "unknown: this program does not know the status").format(id=row.id)
    elif problem := invalid_column(_columns(row)):
        text = f"the next flush abandons it: {problem}"
    elif problem := _undecodable(row.payload_json):
        text = f"the next flush abandons it, because its payload is no JSON object: {problem}"
    elif row.status == Status.SENDING and due_ms > now_ms:
        text = f"a flusher is sending it; if that flusher dies, it is due again at {when(due_ms, now_ms=now_ms)}"
    else:
        text = f"it {_when_tried(due_ms, now_ms=now_ms, pauses=around.pauses)}"
        text += f". A failure after {utc(age_out_ms(row, around.policy.max_age_ms))} abandons it"
        obstacles = [hold_in_words(hold) for hold in around.holds]
        if capture.is_off():
            obstacles.append(capture.IS_OFF)
        if obstacles:
            text += f". But nothing is sent now: {'; '.join(obstacles)}"
    return text


def _when_tried(due_ms: int, *, now_ms: int, pauses: Sequence[Pause]) -> str:
    is_due = due_ms <= now_ms
    text = f"has been due since {utc(due_ms)}" if is_due else f"waits until {when(due_ms, now_ms=now_ms)}"
    pause = max(pauses, key=lambda pause: pause.until_ms, default=None)
    then = "" if is_due else "then "
    if pause is not None and pause.until_ms > max(due_ms, now_ms):
        then = "then "
        until = when(pause.until_ms, now_ms=now_ms)
        text += f", but its destination is paused until {until}: {in_words(pause.last_error)}"
    if pause is not None and pause.failures >= PROBE_AFTER:
        return f"{text}; {then}one event is sent as a probe, and the others when the service accepts it"
    return f"{text}; {then}the next flush sends it"


def _why_it_waits(row: ObservationEvent, *, now_ms: int, policy: Policy) -> Iterator[tuple[str, str]]:
    if row.waits_for is not None and row.status == Status.PENDING:
        yield "waits for", f"{row.waits_for}: {_WAITS.get(row.waits_for, 'this program does not know why')}"
    if row.suspected_at_ms is None:
        return
    yield "suspected", f"since {when(row.suspected_at_ms, now_ms=now_ms)}, when it was first rejected alone"
    if row.status in (Status.PENDING, Status.SENDING) and not invalid_column(_columns(row)):
        earliest = when(row.suspected_at_ms + policy.proof_ms, now_ms=now_ms)
        text = f"the outbox abandons the event if the service rejects it alone again after {earliest}, and"
        text += " accepted another event since the first rejection,"
        text += f" at most {duration(RECENT_MS)} before the new rejection"
        yield "proof", text


def _lost_leases(count: int) -> str:
    text = f"{count!r}, the number of times that a flusher died, or lost its lease, while it held the event"
    is_alone = isinstance(count, int) and count >= LOST_LEASES_ALONE
    return f"{text}; it is sent alone now" if is_alone else text


def pretty(payload_json: str) -> str:
    """Return a payload over several lines, each escaped.

    It stays in one line if it is no JSON, or is nested so deeply that the indentation would make it many times as
    long.
    """
    try:
        lines = _indented(json.loads(payload_json), _LONGEST_INDENTED + _INDENTED_TIMES * len(payload_json))
    except (ValueError, RecursionError):
        lines = None
    return "\n".join(map(escape, lines or [payload_json]))


def _indented(document: object, at_most: int) -> list[str] | None:
    """Return a document over several lines, None if they have more characters than `at_most`."""
    parts, length = [], 0
    for part in json.JSONEncoder(indent=2, ensure_ascii=False).iterencode(document):
        parts.append(part)
        length += len(part)
        if length > at_most:
            return None
    return "".join(parts).split("\n")


def _content_hash(payload_json: str) -> str:
    try:
        return content_hash(payload_json)
    except UnicodeEncodeError:
        return ""


def _columns(row: ObservationEvent) -> Iterator[tuple[str, object]]:
    return ((column.name, getattr(row, column.name)) for column in row.__table__.columns)


def _is_json(value: object) -> bool:
    return not isinstance(value, bytes) and not (isinstance(value, float) and math.isinf(value))


def _undecodable(payload_json: str) -> str | None:
    try:
        check_payload(payload_json)
    except InvalidEvent as error:
        return str(error)
    return None
