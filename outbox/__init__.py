"""A durable outbox: events recorded in your database reach an HTTP service, whatever goes wrong in between."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from outbox.event_types import FixOutcome, McpRuleServed, RuleActuallyCited, RuleCitedInEdit, RuleFired
from outbox.events import Event, Instant
from outbox.failures import (
    ConfigurationError,
    HttpFailure,
    IllegalTransition,
    InvalidEvent,
    OutboxError,
    OutcomeUnknown,
    QueueFull,
    SchemaError,
    StorageError,
    TransportFailure,
    UploadFailure,
)
from outbox.filters import Where
from outbox.lifecycle import Status
from outbox.maintenance import ActionReport, PurgeReport, ReplaceReport, RequeueReport
from outbox.outbox import Outbox
from outbox.policy import Policy, Verdict
from outbox.storage.tables import ObservationEvent

if TYPE_CHECKING:
    from outbox.holds import Hold
    from outbox.hooks import Hooks, Settled, SettledEvent, Upload
    from outbox.records import BatchItem, FlushReport, Pause, UploadClient
    from outbox.stats import DestinationStats, Stats
    from outbox.storage.finding import EventCount, Found
    from outbox.tries import Try
    from outbox.upload.auth import NO_AUTH, ApiKey
    from outbox.upload.client import HttpClient
    from outbox.upload.formats import CloudEvents, Format
    from outbox.upload.oauth import ClientCredentials
    from outbox.upload.signing import StandardWebhooks
    from outbox.worker import Worker

__all__ = [
    "NO_AUTH",
    "ActionReport",
    "ApiKey",
    "BatchItem",
    "ClientCredentials",
    "CloudEvents",
    "ConfigurationError",
    "DestinationStats",
    "Event",
    "EventCount",
    "FixOutcome",
    "FlushReport",
    "Format",
    "Found",
    "Hold",
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
    "OutcomeUnknown",
    "Pause",
    "Policy",
    "PurgeReport",
    "QueueFull",
    "ReplaceReport",
    "RequeueReport",
    "RuleActuallyCited",
    "RuleCitedInEdit",
    "RuleFired",
    "SchemaError",
    "Settled",
    "SettledEvent",
    "StandardWebhooks",
    "Stats",
    "Status",
    "StorageError",
    "TransportFailure",
    "Try",
    "Upload",
    "UploadClient",
    "UploadFailure",
    "Verdict",
    "Where",
    "Worker",
]


# Loaded on first use, because not every program needs these names, and the client loads requests.
_ON_USE = {
    "outbox.upload.auth": ("NO_AUTH", "ApiKey"),
    "outbox.upload.client": ("HttpClient",),
    "outbox.upload.formats": ("CloudEvents", "Format"),
    "outbox.upload.oauth": ("ClientCredentials",),
    "outbox.upload.signing": ("StandardWebhooks",),
    "outbox.holds": ("Hold",),
    "outbox.hooks": ("Hooks", "Settled", "SettledEvent", "Upload"),
    "outbox.records": ("BatchItem", "FlushReport", "Pause", "UploadClient"),
    "outbox.stats": ("DestinationStats", "Stats"),
    "outbox.tries": ("Try",),
    "outbox.storage.finding": ("EventCount", "Found"),
    "outbox.worker": ("Worker",),
}


def __getattr__(name: str) -> Any:
    for module, names in _ON_USE.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'outbox' has no attribute {name!r}")
