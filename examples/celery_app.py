"""A Celery task that sends the events that are due, which beat starts every ten seconds.

    export OUTBOX_DATABASE_URL=… OUTBOX_URL=… OUTBOX_TOKEN=… CELERY_BROKER_URL=…
    celery --workdir examples --app celery_app worker --beat

Any number of workers may run it at once: no two of them ever hold the same event.
"""

import os

from celery import Celery

from outbox import HttpClient, Outbox

outbox = Outbox.open(os.environ["OUTBOX_DATABASE_URL"])  # the worker's processes may share it
app = Celery("shop")
app.conf.beat_schedule = {
    # A task that found no worker in time is not needed any more, the next one does its work.
    "send events": {"task": "celery_app.send_events", "schedule": 10.0, "options": {"expires": 10}},
}


@app.task(ignore_result=True)
def send_events() -> None:
    """Send the events that are due; what can't be sent now is sent by a later run."""
    with HttpClient(os.environ["OUTBOX_URL"], token=os.environ["OUTBOX_TOKEN"]) as client:
        outbox.flush_all(client)
