import subprocess
import sys
from pathlib import Path

import pytest

import outbox
from outbox import testing

ROOT = Path(__file__).parent.parent


def test_every_exported_name_is_there_and_sorted() -> None:
    assert outbox.__all__ == sorted(outbox.__all__)
    assert all(hasattr(outbox, name) for name in outbox.__all__)


def test_the_public_names_are_these() -> None:
    assert set(outbox.__all__) == {
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
    program = "import sys, outbox; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert "sqlalchemy" in loaded
    assert not {"alembic", "click", "platformdirs", "requests", "rich", "transitions", "urllib3"} & set(loaded)
