"""The statuses of an event and the moves between them.

`machine` declares them, once. All else reads that machine: the methods of a row, the conditional UPDATEs of the
store, the CHECK constraint of the table and the diagram in the documentation.
"""

from __future__ import annotations

from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

from outbox.failures import IllegalTransition

if TYPE_CHECKING:
    from transitions import Machine


class Status(str, Enum):
    """The status of an event. The values are those in the database."""

    PENDING = "pending"
    """Waits for its due time `next_attempt_at_ms`; a claim moves it on."""
    SENDING = "sending"
    """Held by a flusher under a lease; the flusher, or after the lease any other, moves it on."""
    SENT = "sent"
    """Accepted by the service. Final."""
    PARKED = "parked"
    """Stopped by a rejected token; the next success, or an operator, moves it on."""
    ABANDONED = "abandoned"
    """Given up, with its reason; only an operator moves it on."""


@cache
def machine() -> Machine:
    """Return the one machine, which is the only declaration of the moves.

    Many threads share it. It needs no lock: nothing changes it, and it keeps nothing of the rows that it moves. No
    row is ever added to it as a model, because that costs tens of microseconds and kilobytes for each row, keeps
    the row alive and resets its status.
    """
    from transitions import Machine  # noqa: PLC0415 - without it, a program that only enqueues starts 3 to 6 % faster

    pending, sending, sent, parked, abandoned = (status.value for status in Status)
    return Machine(
        model=None,
        states=[pending, sending, sent, parked, abandoned],
        initial=pending,
        transitions=[
            # A claim takes rows in `sending` whose lease has run out.
            {"trigger": "claim", "source": [pending, sending], "dest": sending},
            # A delivery is recorded even if another flusher owns the row now.
            {"trigger": "deliver", "source": [pending, sending, parked, abandoned], "dest": sent},
            {"trigger": "reschedule", "source": sending, "dest": pending},
            {"trigger": "park", "source": sending, "dest": parked},
            {"trigger": "abandon", "source": sending, "dest": abandoned},
            {"trigger": "cancel", "source": [pending, parked], "dest": abandoned},
            {"trigger": "release", "source": sending, "dest": pending},
            {"trigger": "unpark", "source": parked, "dest": pending},
            {"trigger": "retry_now", "source": [pending, parked], "dest": pending},
            {"trigger": "requeue", "source": abandoned, "dest": pending},
            {"trigger": "revive", "source": pending, "dest": pending},
        ],
        auto_transitions=False,
        model_attribute="_machine_status",
    )


class Move(NamedTuple):
    """One move, as the machine declares it."""

    trigger: str
    sources: tuple[Status, ...]
    target: Status


@cache
def moves() -> dict[str, Move]:
    """Return the moves of the machine, by trigger."""
    declared = {trigger: event.transitions for trigger, event in machine().events.items()}
    return {
        # Each trigger has only one target, so the first transition has it.
        trigger: Move(trigger, tuple(map(Status, by_source)), Status(next(iter(by_source.values()))[0].dest))
        for trigger, by_source in declared.items()
    }


class HasStatus(Protocol):
    """A row, or anything else with a status, that the machine can move."""

    @property
    def status(self) -> str:
        """The current status."""

    _machine_status: str


class StatusOnly:
    """Stands for a row that is not loaded: the machine moves this object instead."""

    def __init__(self, status: Status) -> None:
        self._machine_status: str = status.value

    @property
    def status(self) -> str:
        """The status of the row."""
        return self._machine_status


def fire(row: HasStatus, trigger: str) -> None:
    """Move `row` by `trigger`; the shared machine reads and writes its `_machine_status`.

    Raises `IllegalTransition` if the machine has no such move from the row's status; then the row stays as it is.
    """
    from transitions import MachineError  # noqa: PLC0415 - a program that only enqueues starts faster without it

    try:
        machine().events[trigger].trigger(row)
    except (MachineError, ValueError, KeyError):
        raise IllegalTransition(
            f"{trigger} is not a move of an event that is {row.status!r}; {_sources_in_words(trigger)}"
        ) from None


def _sources_in_words(trigger: str) -> str:
    if trigger not in moves():
        return f"the moves are {', '.join(moves())}"
    return f"it starts from {' or '.join(source.value for source in moves()[trigger].sources)}"


def diagram() -> str:
    """Return the moves as a Mermaid state diagram, as the documentation shows it."""
    lines = ["stateDiagram-v2", f"    [*] --> {machine().initial}: enqueue"]
    for move in moves().values():
        lines += [f"    {source.value} --> {move.target.value}: {move.trigger}" for source in move.sources]
    lines += [
        f"    {status} --> [*]" for status in machine().states if not machine().get_transitions(source=status)
    ]
    return "\n".join(lines)
