"""A durable outbox: events recorded in your database reach an HTTP service, whatever goes wrong in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outbox.events import (
    Event,
    FixOutcome,
    Instant,
    McpRuleServed,
    RuleActuallyCited,
    RuleCitedInEdit,
    RuleFired,
)
from outbox.failures import (
    ConfigurationError,
    HttpFailure,
    IllegalTransition,
    InvalidEvent,
    OutboxError,
    QueueFull,
    SchemaError,
    StorageError,
    TransportFailure,
    UploadFailure,
)
from outbox.flusher import BatchItem, FlushReport, UploadClient
from outbox.hooks import Hooks, Settled, SettledEvent, Upload
from outbox.lifecycle import Status
from outbox.maintenance import PurgeReport, RequeueReport
from outbox.models import ObservationEvent
from outbox.outbox import Outbox
from outbox.policy import Policy
from outbox.statements import Pause
from outbox.stats import Stats

if TYPE_CHECKING:
    from outbox.client import HttpClient
    from outbox.worker import Worker

__all__ = [
    "BatchItem",
    "ConfigurationError",
    "Event",
    "FixOutcome",
    "FlushReport",
    "Hooks",
    "HttpClient",
    "HttpFailure",
    "IllegalTransition",
    "Instant",
    "InvalidEvent",
    "McpRuleServed",
    "ObservationEvent",
    "Outbox",
    "OutboxError",
    "Pause",
    "Policy",
    "PurgeReport",
    "QueueFull",
    "RequeueReport",
    "RuleActuallyCited",
    "RuleCitedInEdit",
    "RuleFired",
    "SchemaError",
    "Settled",
    "SettledEvent",
    "Stats",
    "Status",
    "StorageError",
    "TransportFailure",
    "Upload",
    "UploadClient",
    "UploadFailure",
    "Worker",
]


def __getattr__(name: str) -> Any:
    # The HTTP client brings requests along, which a program that only enqueues need not load.
    if name == "HttpClient":
        from outbox.client import HttpClient  # noqa: PLC0415 - that is the point

        return HttpClient
    if name == "Worker":
        from outbox.worker import Worker  # noqa: PLC0415 - it is needed by who delivers in the background

        return Worker
    raise AttributeError(f"module 'outbox' has no attribute {name!r}")
