"""How many requests it takes to find what the server rejects in a batch of 64."""

from __future__ import annotations

from benchmarks.harness import Row, Table
from benchmarks.lab import Lab, events
from outbox import BatchItem, HttpFailure, Outbox

_BATCH = 64


def measure(lab: Lab) -> list[Table]:
    places = [0, 31, 63] if lab.quick else range(_BATCH)
    return [
        Table(
            f"Isolation in a batch of {_BATCH}, in each possible place",
            "requests",
            [
                Row("one bad row", [_requests(lab, {place}) for place in places], at_most=16),
                Row("two bad rows, side by side", [_requests(lab, {place, place + 1}) for place in places[:-1]]),
                Row("every row rejected", [_requests(lab, {*range(_BATCH)})]),
            ],
        )
    ]


class _Picky:
    """A server that rejects every request with a bad row in it, by their places in the batch."""

    logged_in = True

    def __init__(self, bad: set[int], first_id: int) -> None:
        self._bad = {first_id + place for place in bad}
        self.requests = 0

    def upload(self, batch: tuple[BatchItem, ...]) -> None:
        self.requests += 1
        if self._bad & {item.id for item in batch}:
            raise HttpFailure(422, "Unprocessable Entity")


def _requests(lab: Lab, bad: set[int]) -> float:
    with lab.sqlite_file() as path, Outbox(f"sqlite:///{path}") as outbox:
        client = _Picky(bad, outbox.enqueue_many(events(_BATCH))[0])
        outbox.flush(client)
    return client.requests
