"""The contract of the dialects, on every database."""

import re
from pathlib import Path

import pytest
from sqlalchemy import BigInteger, bindparam, make_url, select

from builders import NOON_MS, add_row, statuses
from outbox import Outbox
from outbox.storage.claimed import Delivery, Kind, OneRowQuery, Wanted
from outbox.storage.dialects import dialect_of
from outbox.storage.dialects.base import Dialect
from outbox.storage.engines import reading
from outbox.storage.pauses import NEW
from outbox.storage.tables import Base, destinations, ledger

pytestmark = pytest.mark.contract

ENTRY = {"status": "sent", "event_type": "order", "reason": "cap"}
PAUSE = {**NEW, "destination": "here", "failures": 1, "paused_until_ms": 2, "last_error": "503"}


def insert_or_add(outbox: Outbox, table, *, adds: str | None, **values) -> list[dict]:
    dialect = dialect_of(outbox.engine)
    outbox.store._writer.run(lambda transaction: dialect.insert_or_add(transaction, table, adds=adds, **values))
    with reading(outbox.engine) as connection:
        return [dict(row) for row in connection.execute(select(table)).mappings()]


@pytest.mark.traced
def test_a_row_that_is_there_is_added_to(outbox: Outbox) -> None:
    assert insert_or_add(outbox, ledger, adds="events", **ENTRY, events=2) == [{**ENTRY, "events": 2}]
    assert insert_or_add(outbox, ledger, adds="events", **ENTRY, events=3) == [{**ENTRY, "events": 5}]


def test_a_row_that_is_there_is_left_as_it_is(outbox: Outbox) -> None:
    assert insert_or_add(outbox, destinations, adds=None, **PAUSE) == [PAUSE]
    assert insert_or_add(outbox, destinations, adds=None, **{**PAUSE, "failures": 9}) == [PAUSE]


@pytest.mark.sqlite
def test_by_default_the_driver_makes_the_cursor_and_gets_no_options(outbox: Outbox) -> None:
    url = make_url("standard://host/shop?timeout=3")
    assert Dialect().driver_options(url) == (url, {})
    with reading(outbox.engine) as connection:
        driver = connection.connection.dbapi_connection
        cursor = Dialect().plain_cursor(driver, connection.dialect)
        assert cursor.execute("SELECT 1").fetchall() == [(1,)]


def test_the_indexes_of_a_dialect_are_declared(outbox: Outbox) -> None:
    declared = {index.name for table in Base.metadata.tables.values() for index in table.indexes}
    assert dialect_of(outbox.engine).indexes <= declared


def test_the_oldest_due_rows_are_claimed_and_no_row_twice(outbox: Outbox) -> None:
    ids = [add_row(outbox, created_at_ms=NOON_MS - number, next_attempt_at_ms=NOON_MS) for number in range(5)]
    dialect = dialect_of(outbox.engine)
    claimed = [
        outbox.store._writer.run(
            lambda transaction: dialect.claim(
                transaction, Kind.FRESH, Wanted("", NOON_MS, NOON_MS + 60_000, 3, "id")
            )
        )
        for _ in range(3)
    ]
    assert [[row.id for row in claim.rows] for claim in claimed] == [ids[:1:-1], ids[1::-1], []]
    assert statuses(outbox) == ["sending"] * 5


def test_a_row_is_delivered_if_its_creation_time_fits(outbox: Outbox) -> None:
    ids = [add_row(outbox, created_at_ms=NOON_MS + number) for number in range(70)]
    dialect = dialect_of(outbox.engine)
    created = [NOON_MS + number for number in range(69)] + [NOON_MS]
    delivered = outbox.store._writer.run(
        lambda transaction: dialect.deliver(transaction, Delivery(ids, created, NOON_MS))
    )
    assert (delivered, statuses(outbox)) == (69, ["sent"] * 69 + ["pending"])


@pytest.mark.traced
def test_a_query_is_run_with_a_delivery(outbox: Outbox) -> None:
    ids = [add_row(outbox, created_at_ms=NOON_MS + number) for number in range(2)]
    dialect = dialect_of(outbox.engine)
    look = OneRowQuery(select(bindparam("first", type_=BigInteger), destinations.c.failures), {"first": 7})
    insert_or_add(outbox, destinations, adds=None, **PAUSE)
    seen = outbox.store._writer.run(
        lambda transaction: dialect.deliver_and_query(
            transaction, Delivery(ids, [NOON_MS, NOON_MS], NOON_MS), look
        )
    )
    assert (seen, statuses(outbox)) == ((1, (7, 1)), ["sent", "pending"])


@pytest.mark.sqlite
def test_the_documentation_lists_the_whole_contract() -> None:
    page = (Path(__file__).parents[3] / "docs/adding-a-database.md").read_text()
    cells = re.findall(r"^\|[^|]*\|([^|]*)\|", page, re.MULTILINE)
    listed = set(re.findall(r"`(\w+)`", " ".join(cells)))
    contract = {name for name in {*vars(Dialect), *Dialect.__annotations__} if not name.startswith("_")}
    assert listed == contract - {"is_shared"}  # computed from the clock
