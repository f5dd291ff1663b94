"""A program of the version before destinations: it does what the lines of its input say, and prints what came of it."""

import json
import sys

from outbox import HttpFailure, Outbox, Policy, TransportFailure

ANSWERS = {
    "accepted": None,
    "down": TransportFailure("connection refused"),
    "unauthorized": HttpFailure(401, "Unauthorized", ""),
    "slow down": HttpFailure(429, "Too Many Requests", ""),
    "rejected": HttpFailure(422, "Unprocessable", ""),
}


class Client:
    logged_in = True

    def __init__(self, answer):
        self.failure = ANSWERS[answer]
        self.sent = []

    def upload(self, batch):
        if self.failure is not None:
            raise self.failure
        self.sent += [item.id for item in batch]


def flush(outbox, answer):
    client = Client(answer)
    outbox.flush(client)
    return client.sent


def flush_all(outbox, answer):
    client = Client(answer)
    while outbox.flush_all(client).sent:
        pass
    return client.sent


EVENT = {"event_type": "rule_fired", "rule_ids": [], "session_id": "s", "fired_at": "2026-11-24T12:00:00Z"}
COMMANDS = {
    "enqueue": lambda outbox, number: outbox.enqueue_many([EVENT] * number),
    "flush": flush,
    "flush all": flush_all,
    "retry": lambda outbox: outbox.retry_now(),
    "requeue": lambda outbox: outbox.requeue_abandoned(older_than=2**50).total,
    "purge": lambda outbox: outbox.purge(older_than=2**50).total,
    "pending": lambda outbox: outbox.pending_count(),
    "overdue": lambda outbox: outbox.overdue_ms() > 0,
    "counts": lambda outbox: outbox.stats().counts,
    "find": lambda outbox: [found.id for found in outbox.find()],
}

with Outbox(sys.argv[1], policy=Policy(max_sent=50, max_undelivered=1_000)) as outbox:
    print("null", flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps(COMMANDS[command](outbox, *arguments)), flush=True)
