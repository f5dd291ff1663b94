"""What is found is the same on every database."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import event

from builders import NOON_MS, add_row, rule_fired, statuses
from outbox import ConfigurationError, Outbox, Where
from outbox.storage import finding

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("noon")]


def ids(found: list) -> list[int]:
    return [row.id for row in found]


def payload(text: str) -> str:
    return f'{{"event_type":"note","text":"{text}"}}'


def test_each_condition_finds_its_events(outbox: Outbox) -> None:
    hour = 3_600_000
    one = add_row(outbox, created_at_ms=NOON_MS - hour, event_type="note", destination="billing", event_id="mine")
    two = add_row(outbox, status="parked", last_error="401 Unauthorized")
    three = add_row(outbox, status="abandoned", last_error="permanent: 422", payload_json=payload("order-17"))
    four = add_row(outbox, next_attempt_at_ms=NOON_MS + hour, last_error="503 Unavailable")
    for where, expected in (
        (Where(), [one, two, three, four]),
        (Where(ids=[four, two, 999]), [two, four]),
        (Where(ids=[]), []),
        (Where(event_ids=["mine"]), [one]),
        (Where(event_ids=["mine"], destination="default"), []),
        (Where(destination="billing"), [one]),
        (Where(destination="default"), [two, three, four]),
        (Where(status="parked"), [two]),
        (Where(status=["parked", "abandoned"]), [two, three]),
        (Where(status=[]), []),
        (Where(event_type="note"), [one]),
        (Where(failure="422"), [three]),
        (Where(contains="order-17"), [three]),
        (Where(contains='"text":"order'), [three]),
        (Where(older_than=NOON_MS), [one]),
        (Where(newer_than=NOON_MS), [two, three, four]),
        (Where(due_after=NOON_MS), [four]),
        (Where(status="parked", due_after=NOON_MS), []),
        (Where(ids=[two, three], failure="4", status="parked"), [two]),
    ):
        assert ids(outbox.find(where)) == expected, where
        assert outbox.count(where) == len(expected), where
        assert ids(outbox.find(where, newest_first=True)) == expected[::-1], where


def test_a_text_is_found_as_it_is_written(outbox: Outbox) -> None:
    add_row(outbox, payload_json=payload("100 a-c strasse 50 x off"), last_error="100 a-c strasse")
    for text in ("100%", "a_c", "\\", "Straße", "\U0001f600", "x'y", "50 % off"):
        match = add_row(outbox, payload_json=payload(text), last_error=f"503 {text}!")
        assert ids(outbox.find(Where(contains=text))) == [match]
        assert ids(outbox.find(Where(failure=text))) == [match]


def test_upper_and_lower_case_differ(outbox: Outbox) -> None:
    add_row(outbox, payload_json=payload("ORDER"), last_error="Refused")
    assert outbox.find(Where(contains="order")) == outbox.find(Where(failure="refused")) == []
    assert len(outbox.find(Where(contains="ORDER", failure="Refused"))) == 1


def test_an_event_is_found_by_its_derived_id(outbox: Outbox) -> None:
    first, second = outbox.enqueue_many([rule_fired()] * 2)
    both = outbox.enqueue(rule_fired(), to=["default", "billing"])  # the second row stores the derived id
    found = {row.id: row.event_id for row in outbox.find()}
    assert ids(outbox.find(Where(event_ids=[found[first]]))) == [first]
    assert ids(outbox.find(Where(event_ids=[found[second], found[both[0]]]))) == [second, *both]
    wrong_time = found[first].replace(str(NOON_MS), str(NOON_MS + 1))
    assert outbox.find(Where(event_ids=[wrong_time, "x", "a-1-1"])) == []


def test_an_event_id_is_found_in_every_destination(outbox: Outbox) -> None:
    rows = outbox.enqueue(rule_fired(), to=["a", "default", "b"], event_id="mine")
    assert ids(outbox.find(Where(event_ids=["mine"]))) == sorted(rows)


@pytest.mark.parametrize("newest_first", [True, False])
@pytest.mark.parametrize("text", [None, "s1"])
def test_pages_follow_one_another_without_a_gap(outbox: Outbox, newest_first: bool, text: str | None) -> None:
    expected = outbox.enqueue_many([rule_fired()] * 7)
    found: list[int] = []
    bounds: dict[str, int] = {}
    pages = 0
    while True:
        page = outbox.find(Where(contains=text), newest_first=newest_first, limit=3, **bounds)
        found += ids(page)
        pages += 1
        outbox.enqueue(rule_fired(session_id="other")) if newest_first else None
        if page.next is None:
            break
        bounds = {"before" if newest_first else "after": page.next}
    assert found == (expected[::-1] if newest_first else expected)
    assert pages == 3


def test_a_page_that_ends_with_the_last_event_is_the_last_one(outbox: Outbox) -> None:
    outbox.enqueue_many([rule_fired()] * 3)
    assert outbox.find(limit=3).next is None
    assert outbox.find(limit=0).next is None
    assert outbox.find(limit=0) == []
    assert outbox.find(limit=2**63 - 1).next is None


def test_the_scan_for_a_text_is_bounded_and_says_so(outbox: Outbox, monkeypatch) -> None:
    monkeypatch.setattr(finding, "SLICE", 2)
    old = outbox.enqueue(rule_fired(session_id="wanted"))
    outbox.enqueue_many([rule_fired()] * 6)
    add_row(outbox, status="sent", sent_at_ms=NOON_MS)
    read: list[int] = []
    where = Where(contains="wanted", status="pending")

    found = outbox.find(where, newest_first=True, scan_limit=5, progress=read.append)
    assert (found, found.rows_read, found.is_complete, found.next) == ([], 5, False, old + 2)
    assert read == [2, 2, 1]
    counted = outbox.count(where, scan_limit=5)
    assert (counted, counted.rows_read, counted.is_complete) == (0, 5, False)

    rest = outbox.find(where, newest_first=True, scan_limit=5, before=found.next)
    assert (ids(rest), rest.rows_read, rest.is_complete, rest.next) == ([old], 2, True, None)
    counted = outbox.count(where, scan_limit=7, progress=read.append)
    assert (counted, counted.rows_read, counted.is_complete) == (1, 7, True)


def test_the_scan_ends_when_the_page_is_full(outbox: Outbox, monkeypatch) -> None:
    monkeypatch.setattr(finding, "SLICE", 2)
    outbox.enqueue_many([rule_fired()] * 9)
    found = outbox.find(Where(contains="s1"), limit=3)
    assert (len(found), found.rows_read, found.is_complete, found.next) == (3, 4, True, 3)


def test_without_a_text_nothing_is_scanned(outbox: Outbox) -> None:
    outbox.enqueue_many([rule_fired()] * 3)
    found = outbox.find(status="pending")
    assert (found.rows_read, found.is_complete) == (0, True)
    assert (outbox.count(Where()).rows_read, outbox.count(Where()).is_complete) == (0, True)


@pytest.mark.parametrize("name", ["limit", "before", "after"])
@pytest.mark.parametrize("number", [-1, 2**63])
def test_a_bound_that_no_row_id_has_is_refused(outbox: Outbox, name: str, number: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is {number}, expected a whole number from 0"):
        outbox.find(**{name: number})


@pytest.mark.parametrize("number", [0, 2**63 - 1])
def test_a_scan_of_nothing_is_refused(outbox: Outbox, number: int) -> None:
    with pytest.raises(ConfigurationError, match=f"scan_limit is {number}, expected a whole number from 1"):
        outbox.find(scan_limit=number)


def test_looking_changes_nothing(outbox: Outbox) -> None:
    outbox.enqueue_many([rule_fired()] * 2)
    outbox.find(replace(Where(), contains="s1"))
    assert statuses(outbox) == ["pending"] * 2


def test_no_parameter_stands_for_each_row_that_has_one_of_many_ids(outbox: Outbox) -> None:
    """An event for several destinations has as many rows, and databases limit the number of parameters."""
    names = ["a", "b", "c", "d"]
    wanted = [f"id-{number}" for number in range(50)]
    rows = outbox.enqueue_many([rule_fired()] * 50, event_ids=wanted, to=names)
    used = []

    @event.listens_for(outbox.engine, "before_cursor_execute")
    def note(_connection, _cursor, _statement, parameters, *_others) -> None:
        used.append(len(parameters))

    for where in (Where(event_ids=wanted), Where(ids=rows)):
        assert outbox.count(where) == len(rows)
        assert ids(outbox.find(where, limit=1)) == rows[:1]
        assert outbox.abandon(where=where, reason="no", dry_run=True).total == len(rows)
    assert max(used) < len(rows)
