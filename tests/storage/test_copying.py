from __future__ import annotations

import pytest

from builders import NOON_MS, add_row
from outbox import Outbox, Policy, QueueFull, maintenance
from outbox.maintenance import CopyReport
from outbox.storage import copying

pytestmark = pytest.mark.contract


def copy(outbox: Outbox, policy: Policy | None = None, source: str = "billing") -> CopyReport:
    return maintenance.copy(
        outbox.store,
        policy or outbox.policy,
        source=source,
        target="archive",
        created_from_ms=None,
        dry_run=False,
        progress=lambda _walked: None,
    )


def event_ids(outbox: Outbox, destination: str) -> list[str | None]:
    return [row.event_id for row in outbox.find() if row.destination == destination]


def test_all_slices_together_copy_each_event_once(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_SLICE", 2)
    for number in range(5):
        add_row(outbox, destination="billing", event_id=f"order-{number}" if number % 2 else None)
        add_row(outbox, destination="search")
    assert copy(outbox) == CopyReport(copied=5)
    assert event_ids(outbox, "archive") == event_ids(outbox, "billing")
    assert copy(outbox) == CopyReport(already_there=5)


def test_a_slice_holds_only_as_many_payloads_as_fit(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_SLICE_CHARACTERS", 100)
    for size in (30, 30, 30, 30, 200, 40, 50):
        add_row(outbox, destination="billing", payload_json='"' + "x" * (size - 2) + '"')
    slices = outbox.store.copying.slices("billing", created_from_ms=0, last_id=7, now_ms=NOON_MS)
    assert [[len(row["payload_json"]) for row in one.rows] for one in slices] == [[30] * 3, [30], [200], [40, 50]]
    assert copy(outbox) == CopyReport(copied=7)


def test_an_event_for_several_destinations_is_copied_once(outbox: Outbox) -> None:
    # The first row has a derived id, which the second one stores.
    outbox.enqueue({"event_type": "order_placed"}, to=["billing", "search"])
    assert copy(outbox) == CopyReport(copied=1)
    assert copy(outbox, source="search") == CopyReport(already_there=1)


def test_slices_before_a_full_queue_stay(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_SLICE", 2)
    for _ in range(5):
        add_row(outbox, destination="billing", created_at_ms=NOON_MS)
    with pytest.raises(QueueFull, match="of archive are not delivered yet, and the policy's max_undelivered is 4"):
        copy(outbox, Policy(max_undelivered=4, when_full="reject"))
    assert event_ids(outbox, "archive") == event_ids(outbox, "billing")[:4]
    assert copy(outbox) == CopyReport(copied=1, already_there=4)


def test_a_copy_that_trims_keeps_the_bound(outbox: Outbox) -> None:
    for _ in range(5):
        add_row(outbox, destination="billing")
    copy(outbox, Policy(max_rows=3, when_full="trim"))
    assert len(event_ids(outbox, "archive")) == 3
    assert len(event_ids(outbox, "billing")) == 5
