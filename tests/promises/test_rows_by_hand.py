"""Rows that another program wrote, with invalid values in integer columns: they are abandoned, and nothing else fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from builders import DOWN, NOON_MS, OK, ScriptedClient, add_row, row, statuses
from outbox import Outbox
from outbox.cli import main

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("noon")]

TIMES = ("occurred_at_ms", "created_at_ms", "next_attempt_at_ms", "revived_at_ms", "sent_at_ms")
LARGEST = 2**63 - 1
# SQLite keeps any value in any column.
INVALID = ("soon", "", b"\0", NOON_MS - 0.5, LARGEST, float("inf"), float("-inf"))


def add_invalid(outbox: Outbox, **columns: Any) -> int:
    """Put an invalid row between two valid ones; return its id."""
    add_row(outbox, created_at_ms=NOON_MS - 1)
    invalid = add_row(outbox, **columns)
    add_row(outbox)
    return invalid


def why(outbox: Outbox, row_id: int) -> str:
    found = row(outbox, row_id)
    assert found.status == "abandoned"
    return found.last_error


@pytest.mark.sqlite
@pytest.mark.parametrize("answer", [OK, DOWN])
@pytest.mark.parametrize("value", INVALID, ids=repr)
@pytest.mark.parametrize("name", [*TIMES, "retry_count", "lost_leases"])
def test_a_row_with_an_invalid_value_is_abandoned_and_the_others_go_on(
    outbox: Outbox, name: str, value, answer
) -> None:
    invalid = add_invalid(outbox, **{name: value})
    client = ScriptedClient(answer)
    report = outbox.flush(client)
    assert (report.claimed, report.attempted, report.abandoned, report.lost_leases) == (3, 2, 1, 0)
    assert (report.sent, report.rescheduled) == ((2, 0) if answer is OK else (0, 2))
    assert client.ids == [[invalid - 1, invalid + 1]]
    below = 9_007_199_254_740_992 if name in TIMES else 2_147_483_647
    assert why(outbox, invalid) == (
        f"permanent: decode observation event: the column {name} is {value!r}, expected a whole number below {below}"
    )
    assert outbox.pending_count() == report.rescheduled


@pytest.mark.parametrize("name", TIMES)
def test_a_row_with_an_impossible_time_is_abandoned(outbox: Outbox, name: str) -> None:
    invalid = add_invalid(outbox, **{name: LARGEST})
    client = ScriptedClient()
    report = outbox.flush_all(client)
    assert (report.sent, report.abandoned) == (2, 1)
    assert f"the column {name} is {LARGEST}, expected" in why(outbox, invalid)


def test_a_row_whose_retry_count_can_not_grow_is_abandoned(outbox: Outbox) -> None:
    invalid = add_invalid(outbox, retry_count=2**31 - 1)
    report = outbox.flush(ScriptedClient(DOWN))
    assert (report.rescheduled, report.abandoned) == (2, 1)
    assert "the column retry_count is 2147483647, expected" in why(outbox, invalid)


@pytest.mark.parametrize("name", ["created_at_ms", "next_attempt_at_ms", "retry_count"])
def test_numbers_below_zero_are_numbers(outbox: Outbox, name: str) -> None:
    add_invalid(outbox, **{name: -(2**31)})
    assert outbox.flush(ScriptedClient(DOWN)).claimed == 3
    assert outbox.stats().counts["abandoned"] == (name == "created_at_ms")  # aged out


@pytest.mark.sqlite
@pytest.mark.parametrize("name", ["next_attempt_at_ms", "created_at_ms"])
def test_what_a_dead_flusher_held_is_abandoned_when_it_is_invalid(outbox: Outbox, name: str) -> None:
    columns = {"next_attempt_at_ms": NOON_MS, name: "soon"}
    invalid = add_row(outbox, status="sending", **columns)
    assert outbox.flush(ScriptedClient()).abandoned == 1
    assert f"the column {name} is 'soon'" in why(outbox, invalid)


@pytest.mark.sqlite
def test_invalid_rows_in_any_number_keep_no_valid_row_back(outbox: Outbox) -> None:
    for _ in range(70):
        for name in ("created_at_ms", "next_attempt_at_ms"):
            add_row(outbox, **{name: "soon"})
    valid = [add_row(outbox) for _ in range(3)]
    client = ScriptedClient()
    report = outbox.flush(client)
    assert client.ids == [valid]
    assert (report.sent, report.claimed) == (3, 64)
    assert outbox.flush_all(client).abandoned == 140 - 61


@pytest.mark.sqlite
def test_an_invalid_row_waits_while_its_lease_or_its_delay_runs(outbox: Outbox) -> None:
    for status in ("pending", "sending"):
        add_row(outbox, status=status, created_at_ms="soon", next_attempt_at_ms=NOON_MS + 1)
        add_row(outbox, status=status, retry_count="many", next_attempt_at_ms=NOON_MS + 1)
    assert outbox.flush(ScriptedClient()).claimed == 0
    assert statuses(outbox) == ["pending", "pending", "sending", "sending"]


def each_two() -> Iterator[Any]:
    """Yield each value in each column; over all of them, each column and each value meets each status."""
    statuses = ("pending", "sending", "parked", "sent", "abandoned")
    for at, name in enumerate([*TIMES, "retry_count"]):
        for number, value in enumerate(INVALID):
            status = statuses[(at + number) % len(statuses)]
            yield pytest.param(name, value, status, id=f"{name}-{value!r}-{status}")


@pytest.mark.sqlite
@pytest.mark.parametrize(("name", "value", "status"), list(each_two()))
def test_whoever_looks_at_an_invalid_row_sees_it(
    outbox: Outbox, outbox_url: str, name: str, value, status
) -> None:
    invalid = add_row(outbox, **{"status": status, "last_error": "503", name: value})
    add_row(outbox)
    assert outbox.stats().counts[status] in (1, 2)
    assert [found.id for found in outbox.find(status=status)][:1] == [invalid] or status == "pending"
    assert getattr(outbox.get(invalid), name) == value
    assert outbox.overdue_ms() >= 0
    for words in ("status", "list", f"show {invalid}", "doctor"):
        for options in ([], ["--json"]):
            command = ["--database", outbox_url, *words.split(), *options]
            result = CliRunner().invoke(main, command)
            assert isinstance(result.exception, SystemExit | None), (words, result.exception)
            if options:
                json.loads(result.stdout)
