"""A Flask application that records an event with each order.

outbox receive --port 8787 &
export OUTBOX_URL=http://127.0.0.1:8787 OUTBOX_TOKEN=trial
flask --app examples/flask_app run &
curl --data item=shoes http://127.0.0.1:5000/orders
flask --app examples/flask_app send-events
"""

import os
from datetime import datetime, timezone

from flask import Flask, abort, request
from sqlalchemy import String, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from outbox import Event, HttpClient, Instant, Outbox


class Base(DeclarativeBase):
    """The shop's own models."""


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


engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///shop.db"))
Base.metadata.create_all(engine)
outbox = Outbox.open(engine)
app = Flask(__name__)


@app.post("/orders")
def place_order() -> tuple[dict[str, int], int]:
    """Add an order and its event, both or neither. With Flask-SQLAlchemy the session is `db.session`."""
    with Session(engine) as session, session.begin():
        order = Order(item=request.form["item"])
        session.add(order)
        session.flush()  # the order gets its id
        event = OrderPlaced(order_id=order.id, item=order.item, occurred_at=datetime.now(timezone.utc))
        outbox.enqueue(event, session=session)
        if order.item == "unicorn":
            abort(409)  # an exception, which rolls both back
        return {"order": order.id}, 201


@app.cli.command()
def send_events() -> None:
    """Send the events that are due, for a timer to call."""
    with HttpClient(os.environ["OUTBOX_URL"], token=os.environ["OUTBOX_TOKEN"]) as client:
        print(outbox.flush_all(client).sent, "sent")
