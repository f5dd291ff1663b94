"""A Flask service that ships each order once, however often it receives the order's event.

pip install flask sqlalchemy standardwebhooks
export WEBHOOK_SECRET=whsec_c2VjcmV0LW9mLXRyaWFscw==
flask --app examples/receive_flask run &

The sender is `HttpClient("http://127.0.0.1:5000/events", path="", auth=NO_AUTH, format="single",
sign=StandardWebhooks(secret))`.
"""

import os

from flask import Flask, abort, request
from sqlalchemy import String, create_engine, insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from standardwebhooks import Webhook, WebhookVerificationError


class Base(DeclarativeBase):
    """The service's own models."""


class ReceivedEvent(Base):
    """An event whose work is done."""

    __tablename__ = "received_events"
    event_id: Mapped[str] = mapped_column(String(191), primary_key=True)


class Shipment(Base):
    """The work: one for each order."""

    __tablename__ = "shipments"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]


engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///warehouse.db"))
Base.metadata.create_all(engine)
webhook = Webhook(os.environ["WEBHOOK_SECRET"])
app = Flask(__name__)


@app.post("/events")
def receive() -> tuple[str, int]:
    """Verify, do the work in one transaction with the event's id, then answer."""
    try:
        event = webhook.verify(request.get_data(), dict(request.headers))
    except WebhookVerificationError:
        abort(401)
    event_id = request.headers["webhook-id"]
    try:
        with Session(engine) as session, session.begin():
            session.execute(insert(ReceivedEvent).values(event_id=event_id))
            session.add(Shipment(order_id=event["order_id"]))
    except IntegrityError:
        with Session(engine) as session:
            if session.get(ReceivedEvent, event_id) is None:
                raise  # another constraint failed: this event is not a duplicate
    return "", 204
