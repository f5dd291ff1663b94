"""A Django application, in one file, that records an event with each order.

outbox receive --port 8787 &
export OUTBOX_URL=http://127.0.0.1:8787 OUTBOX_TOKEN=trial
python examples/django_app.py runserver --noreload &
curl --data item=shoes http://127.0.0.1:8000/orders
python examples/django_app.py send_events
"""

import os
import sys
from datetime import datetime, timezone
from typing import Any

import django
from django.conf import settings
from django.core.management import execute_from_command_line, get_commands
from django.core.management.base import BaseCommand
from django.db import connection, models, transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path
from sqlalchemy import make_url

from outbox import Event, HttpClient, Instant, Outbox

# Django and the outbox each open the same database.
url = make_url(os.environ.get("DATABASE_URL", "sqlite:///shop.db"))
on_sqlite = url.get_backend_name() == "sqlite"
settings.configure(
    DEBUG=True,
    SECRET_KEY=os.environ.get("SECRET_KEY", "for trials only"),
    ROOT_URLCONF=__name__,
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3" if on_sqlite else "django.db.backends.postgresql",
            "NAME": url.database,
            "HOST": url.host,
            "PORT": url.port,
            "USER": url.username,
            "PASSWORD": url.password,
            # So that a writer waits for its turn, where it would otherwise fail if it had read first.
            "OPTIONS": {"transaction_mode": "IMMEDIATE"} if on_sqlite else {},
        }
    },
)
django.setup()
outbox = Outbox.open(url)


class Order(models.Model):
    """What a customer wants."""

    item = models.CharField(max_length=80)

    class Meta:
        """Django needs this label, because the model is not in an installed app."""

        app_label = "shop"


class OrderPlaced(Event, tag="order_placed"):
    """The event that reports an order."""

    order_id: int
    item: str
    occurred_at: Instant


def place_order(request: HttpRequest) -> HttpResponse:
    """Add an order and its event, both or neither."""
    with transaction.atomic():
        order = Order.objects.create(item=request.POST["item"])
        event = OrderPlaced(order_id=order.id, item=order.item, occurred_at=datetime.now(timezone.utc))
        outbox.enqueue(event, connection=connection.connection)
        if order.item == "unicorn":
            transaction.set_rollback(True)
            return HttpResponse("out of stock", status=409)
    return JsonResponse({"order": order.id}, status=201)


urlpatterns = [path("orders", place_order)]


class SendEvents(BaseCommand):
    """A project keeps it in management/commands/send_events.py, and calls it from a timer."""

    help = "Send the events that are due."

    def handle(self, **_: Any) -> None:
        """Send them."""
        with HttpClient(os.environ["OUTBOX_URL"], token=os.environ["OUTBOX_TOKEN"]) as client:
            self.stdout.write(f"{outbox.flush_all(client).sent} sent")


if Order._meta.db_table not in connection.introspection.table_names():  # noqa: SLF001 - Django documents `_meta` as public
    with connection.schema_editor() as editor:
        editor.create_model(Order)

if __name__ == "__main__":
    get_commands()["send_events"] = SendEvents()
    execute_from_command_line(sys.argv)
