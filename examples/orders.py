"""Orders and their events in one transaction, with SQLAlchemy.

    python examples/orders.py [DATABASE_URL]

Without a URL the database is the file orders.db. The events go to the service at OUTBOX_URL with the token in
OUTBOX_TOKEN, or to a small server that this program starts.
"""

import os
import sys
from contextlib import ExitStack, suppress
from datetime import datetime, timezone

from sqlalchemy import String, create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from outbox import Event, HttpClient, Instant, Outbox
from outbox.testing import ScriptedServer


class Base(DeclarativeBase):
    """The shop's own models; the outbox's tables are not among them."""


class Order(Base):
    """What a customer wants."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(String(80))


class OrderPlaced(Event, tag="order_placed"):
    """The event that reports an order."""

    order_id: int
    item: str
    occurred_at: Instant


class OutOfStockError(Exception):
    """There is none left."""


def place_order(outbox: Outbox, session: Session, item: str) -> None:
    """Add an order and its event; the caller commits both."""
    order = Order(item=item)
    session.add(order)
    session.flush()  # the order gets its id
    event = OrderPlaced(order_id=order.id, item=item, occurred_at=datetime.now(timezone.utc))
    outbox.enqueue(event, session=session)
    if item == "unicorn":
        raise OutOfStockError


def main(database: str) -> None:
    """Place two orders, of which one is rolled back, and send what there is to send."""
    engine = create_engine(database)
    Base.metadata.create_all(engine)
    outbox = Outbox.open(engine)

    for item in ("shoes", "unicorn"):
        with suppress(OutOfStockError), Session(engine) as session, session.begin():
            place_order(outbox, session, item)

    with Session(engine) as session:
        orders = session.scalar(select(func.count()).select_from(Order))
    print(f"{orders} order, {outbox.pending_count()} event")

    with ExitStack() as stack:
        url = os.environ.get("OUTBOX_URL") or stack.enter_context(ScriptedServer()).url
        client = stack.enter_context(HttpClient(url, token=os.environ.get("OUTBOX_TOKEN", "trial")))
        print(f"{outbox.flush_all(client).sent} sent")
    engine.dispose()


if __name__ == "__main__":
    main(*sys.argv[1:] or ["sqlite:///orders.db"])
