"""The states of an event and the moves between them, declared once.

Everything that changes a status derives from `TRANSITIONS`: the methods of a row, the conditional UPDATEs of the
store, the CHECK constraint of the table and the diagram in the documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any

from outbox.failures import IllegalTransition

if TYPE_CHECKING:
    from transitions import Machine


class Status(str, Enum):
    """Where an event stands. The values are what the database holds."""

    PENDING = "pending"
    """Waits for its due time `next_attempt_at_ms`; a claim moves it on."""
    SENDING = "sending"
    """Held by a flusher under a lease; the flusher, or after the lease any other, moves it on."""
    SENT = "sent"
    """Accepted by the server. Final."""
    PARKED = "parked"
    """Stopped by a rejected token; the next success, or an operator, moves it on."""
    ABANDONED = "abandoned"
    """Given up, with its reason; only an operator moves it on."""


@dataclass(frozen=True)
class Move:
    """One legal move. A fenced move lands only while the row is held under the mover's own lease."""

    trigger: str
    sources: tuple[Status, ...]
    destination: Status
    fenced: bool = False


PENDING, SENDING, SENT, PARKED, ABANDONED = Status

TRANSITIONS = (
    Move("claim", (PENDING, SENDING), SENDING),
    Move("deliver", (PENDING, SENDING, PARKED, ABANDONED), SENT),
    Move("reschedule", (SENDING,), PENDING, fenced=True),
    Move("park", (SENDING,), PARKED, fenced=True),
    Move("abandon", (SENDING,), ABANDONED, fenced=True),
    Move("release", (SENDING,), PENDING, fenced=True),
    Move("unpark", (PARKED,), PENDING),
    Move("retry_now", (PENDING, PARKED), PENDING),
    Move("requeue", (ABANDONED,), PENDING),
)

MOVES = {move.trigger: move for move in TRANSITIONS}


@cache
def _machine() -> Machine:
    # One machine for all rows, and no row is ever added to it: a bound row costs tens of microseconds and
    # kilobytes, is kept alive by the machine, and has its status reset to `initial`.
    from transitions import Machine  # noqa: PLC0415 - programs that only enqueue never need it

    return Machine(
        model=None,
        states=[status.value for status in Status],
        transitions=[
            {"trigger": m.trigger, "source": [s.value for s in m.sources], "dest": m.destination.value}
            for m in TRANSITIONS
        ],
        initial=Status.PENDING.value,
        auto_transitions=False,
        model_attribute="_machine_status",
    )


def fire(row: Any, trigger: str) -> None:
    """Move `row` by `trigger`; the shared machine reads and writes its `_machine_status`.

    Raises `IllegalTransition` when the table has no such move from the row's status; the row stays as it is.
    """
    from transitions import MachineError  # noqa: PLC0415 - as above

    try:
        _machine().events[trigger].trigger(row)
    except (MachineError, ValueError, KeyError):
        raise IllegalTransition(
            f"{trigger} is not a move of an event that is {row.status!r}; {_sources_in_words(trigger)}"
        ) from None


def _sources_in_words(trigger: str) -> str:
    if trigger not in MOVES:
        return f"the moves are {', '.join(MOVES)}"
    return f"it starts from {' or '.join(source.value for source in MOVES[trigger].sources)}"


def diagram() -> str:
    """Return the moves as a Mermaid state diagram, as the documentation shows it."""
    lines = ["stateDiagram-v2", "    [*] --> pending: enqueue"]
    for move in TRANSITIONS:
        lines += [f"    {source.value} --> {move.destination.value}: {move.trigger}" for source in move.sources]
    lines.append("    sent --> [*]")
    return "\n".join(lines)
