"""A Django service, in one file, that ships each order once, however often it receives the order's event.

pip install django standardwebhooks
export WEBHOOK_SECRET=whsec_c2VjcmV0LW9mLXRyaWFscw==
python examples/receive_django.py runserver --noreload &

The sender is `HttpClient("http://127.0.0.1:8000/events", path="", auth=NO_AUTH, format="single",
sign=StandardWebhooks(secret))`.
"""

import os
import sys

import django
from django.conf import settings
from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application
from django.db import connection, models, transaction
from django.http import HttpRequest, HttpResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt
from standardwebhooks import Webhook, WebhookVerificationError

settings.configure(
    DEBUG=True,
    SECRET_KEY=os.environ.get("SECRET_KEY", "for trials only"),
    ROOT_URLCONF=__name__,
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": os.environ.get("DATABASE_FILE", "warehouse.db"),
            # So that a writer waits for its turn, where it would otherwise fail if it had read first.
            "OPTIONS": {"transaction_mode": "IMMEDIATE"},
        }
    },
)
django.setup()
webhook = Webhook(os.environ["WEBHOOK_SECRET"])


class ReceivedEvent(models.Model):
    """An event whose work is done."""

    event_id = models.CharField(max_length=191, primary_key=True)

    class Meta:
        """Django needs this label, because the model is not in an installed app."""

        app_label = "warehouse"


class Shipment(models.Model):
    """The work: one for each order."""

    order_id = models.IntegerField()

    class Meta:
        """Django needs this label, because the model is not in an installed app."""

        app_label = "warehouse"


@csrf_exempt
def receive(request: HttpRequest) -> HttpResponse:
    """Verify, do the work in one transaction with the event's id, then answer."""
    try:
        event = webhook.verify(request.body, dict(request.headers))
    except WebhookVerificationError:
        return HttpResponse(status=401)
    with transaction.atomic():
        _, is_new = ReceivedEvent.objects.get_or_create(event_id=request.headers["webhook-id"])
        if is_new:
            Shipment.objects.create(order_id=event["order_id"])
    return HttpResponse(status=204)


urlpatterns = [path("events", receive)]
application = get_wsgi_application()

tables = connection.introspection.table_names()
with connection.schema_editor() as editor:
    for model in (ReceivedEvent, Shipment):
        if model._meta.db_table not in tables:  # noqa: SLF001 - Django documents `_meta` as public
            editor.create_model(model)
connection.close()  # a server may fork now

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
