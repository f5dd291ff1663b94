import subprocess
import sys
from pathlib import Path

import pytest

import outbox
from builders import ROOT
from outbox import Outbox, testing

EVENT = '{"event_type":"fix_outcome","rule_id":"r1","session_id":"s1","accepted":true,"occurred_at":"2026-11-24T12:00:00Z"}'
NOT_FOR_ENQUEUE = {
    "alembic",
    "flask",
    "http.server",
    "outbox.upload.client",
    "outbox.cli.demo",
    "outbox.doctor",
    "outbox.flusher",
    "outbox.hooks",
    "outbox.spans",
    "outbox.testing.receiver",
    "outbox.cli.watch",
    "outbox.threads",
    "outbox.worker",
    "opentelemetry",
    "prometheus_client",
    "requests",
    "rich",
    "sqlalchemy.dialects.mysql",
    "sqlalchemy.dialects.postgresql",
    "transitions",
    "urllib3",
    "waitress",
}


def modules_after(program: str) -> set[str]:
    """Return what a process that runs the program has loaded at its end."""
    loaded = subprocess.run(
        [sys.executable, "-c", f"{program}; import sys; print(*sys.modules)"],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    return set(loaded.split())


def test_every_exported_name_is_there_and_sorted() -> None:
    assert outbox.__all__[0] == "NO_AUTH"  # ruff sorts constants first
    assert outbox.__all__[1:] == sorted(outbox.__all__[1:])
    assert all(hasattr(outbox, name) for name in outbox.__all__)


def test_the_public_names_are_these() -> None:
    assert set(outbox.__all__) == {
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
    }


def test_the_names_for_tests_of_programs_are_these() -> None:
    assert testing.__all__ == [
        "Answer",
        "Drop",
        "Hang",
        "Received",
        "Request",
        "ScriptedServer",
        "TimeMachine",
        "time_machine",
    ]
    assert all(hasattr(testing, name) for name in testing.__all__)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Inbox'"):
        _ = outbox.Inbox


def test_the_import_loads_nothing_that_an_enqueue_does_not_need() -> None:
    loaded = modules_after("import outbox")
    assert "sqlalchemy" in loaded
    assert not {"click", "outbox.storage.sql", "outbox.stats", "platformdirs", *NOT_FOR_ENQUEUE} & loaded


def test_the_command_that_enqueues_loads_nothing_of_what_delivers_or_draws(tmp_path: Path) -> None:
    event = tmp_path / "event.ndjson"
    event.write_text(EVENT, encoding="utf-8")
    Outbox.open(f"sqlite:///{tmp_path / 'outbox.db'}").close()
    arguments = ["--database", f"sqlite:///{tmp_path / 'outbox.db'}", "enqueue", str(event)]
    loaded = modules_after(f"from outbox.cli import main; main({arguments!r}, standalone_mode=False)")
    assert "click" in loaded
    assert not {"platformdirs", *NOT_FOR_ENQUEUE} & loaded
