"""A durable outbox: events recorded in your database reach an HTTP service, whatever goes wrong in between."""

from __future__ import annotations

from importlib import import_module
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
from outbox.lifecycle import Status
from outbox.maintenance import PurgeReport, RequeueReport
from outbox.models import ObservationEvent
from outbox.outbox import Outbox
from outbox.policy import Policy

if TYPE_CHECKING:
    from outbox.client import HttpClient
    from outbox.flusher import BatchItem, FlushReport, UploadClient
    from outbox.hooks import Hooks, Settled, SettledEvent, Upload
    from outbox.statements import Pause
    from outbox.stats import Stats
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


# What only programs need that open an outbox, deliver or look, loaded on use; the client brings requests along.
_ON_USE = {
    "outbox.client": ("HttpClient",),
    "outbox.flusher": ("BatchItem", "FlushReport", "UploadClient"),
    "outbox.hooks": ("Hooks", "Settled", "SettledEvent", "Upload"),
    "outbox.statements": ("Pause",),
    "outbox.stats": ("Stats",),
    "outbox.worker": ("Worker",),
}


def __getattr__(name: str) -> Any:
    for module, names in _ON_USE.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'outbox' has no attribute {name!r}")
