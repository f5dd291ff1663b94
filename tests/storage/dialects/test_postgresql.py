"""What PostgreSQL commits by itself."""

from __future__ import annotations

import pytest
from sqlalchemy import URL, event

from builders import rule_fired, statuses
from outbox import Outbox, Policy

pytestmark = pytest.mark.servers("postgresql")


def commits(outbox: Outbox) -> list[object]:
    """Return a list to which each commit of the outbox will add."""
    told: list[object] = []
    event.listen(outbox.engine, "commit", told.append)
    return told


@pytest.fixture
def url_of(outbox: Outbox, request: pytest.FixtureRequest) -> URL:
    pytest.importorskip(request.param)
    return outbox.engine.url.set(drivername=f"postgresql+{request.param}")


@pytest.mark.parametrize(
    ("url_of", "transactions"), [("psycopg", 0), ("psycopg2", 0), ("pg8000", 1)], indirect=["url_of"]
)
def test_an_event_alone_needs_no_transaction_if_the_driver_shows_that_the_connection_ended(
    outbox: Outbox, url_of: URL, transactions: int
) -> None:
    with Outbox(url_of) as own:
        own.store.now_ms()  # reads the server's clock
        told = commits(own)
        own.enqueue(rule_fired())
        own.enqueue(rule_fired(), event_id="order-17")
        assert own.enqueue(rule_fired(), event_id="order-17") == 2
        assert len(told) == 3 * transactions
    assert statuses(outbox) == ["pending"] * 2


@pytest.mark.parametrize(
    ("policy", "events"),
    [(Policy(), 2), (Policy(max_rows=9), 1), (Policy(max_undelivered=9, when_full="trim"), 2)],
)
def test_several_statements_are_one_transaction(outbox: Outbox, policy: Policy, events: int) -> None:
    with Outbox(outbox.engine.url, policy=policy) as own:
        own.store.now_ms()
        told = commits(own)
        own.enqueue_many([rule_fired()] * events)
        assert len(told) == 1
