import io
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from rich.console import Console

from builders import ROOT
from outbox import Outbox, Policy, Stats
from outbox.cli import demo, demo_stage
from outbox.events import content_hash, encode, event_types
from outbox.failures import ConfigurationError, OutboxError, StorageError

pytestmark = pytest.mark.usefixtures("measured")

SCENES = ("1. A good day", "2. The service is down", "3. 429", "4. 401", "5. 422")
TALLY = "302 enqueued = 300 delivered + 2 abandoned + 0 waiting"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what the demo leaves behind within the test."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "POLICY", Policy(backoff_ms=20, proof_ms=30, pause_ms=20))
    monkeypatch.setattr(demo, "RETRY_AFTER_SEC", 1)
    monkeypatch.setattr(demo, "FRAME_S", 0)
    monkeypatch.setattr(demo, "READING_S", 0)


def drawn(of: Stats) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(demo_stage.table_of(of))
    return console.file.getvalue()


@pytest.mark.slow
def test_the_demo_as_a_process_shows_every_scene_and_adds_up(temporary: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "outbox", "demo"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    positions = [result.stdout.index(scene) for scene in SCENES]
    assert positions == sorted(positions)
    assert TALLY in result.stdout
    assert "300 different events at the service, 0 of them came twice" in result.stdout
    assert result.stdout.count("0.6 s (by default: 10 minutes)") == 2
    assert "2 pending, 0 sending, 300 sent, 0 parked, 0 abandoned" in result.stdout
    # Each failure is shown in the words of the service or the system.
    for failure in (
        "transport: ",
        "429 Too Many",
        '401 Unauthorized: {"defined":true,"code":"UNAUTHORIZED","status":401,"message":"session revoked"',
        "422 Unprocess",
    ):
        assert failure in result.stdout
    url = re.search("OUTBOX_DATABASE_URL=(.*)", result.stdout).group(1)
    shown = int(re.search(r"show (\d+)", result.stdout).group(1))
    with Outbox(url) as kept:
        assert [row.last_error.partition(":")[0] for row in kept.find(status="abandoned")] == ["permanent"] * 2
        assert kept.get(shown).status == "abandoned"


@pytest.mark.usefixtures("_hurry")
def test_on_a_terminal_a_table_is_kept_up_to_date(temporary: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=30, _environ={"TERM": "xterm"})
    assert demo.run(console=console) == 0
    output = console.file.getvalue()
    assert TALLY in output
    for words in ("being uploaded, under a lease", "waiting, next try in", "due now"):
        assert words in output


@pytest.mark.usefixtures("_hurry")
def test_numbers_that_disagree_with_the_service_fail_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_SCENES", (demo._good_day,))
    monkeypatch.setattr(demo.Service, "received", lambda self: {"events": 39, "duplicates": 0})
    console = Console(file=io.StringIO())
    assert demo.run(console=console) == 1
    assert "does not add up" in console.file.getvalue()


@pytest.mark.usefixtures("_hurry")
def test_an_interrupt_stops_the_service_and_removes_the_database(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = []

    def interrupted(play):
        play.enqueue(play.examples(3))
        servers.append(play.service._process)
        assert list(temporary.glob("outbox-demo-*/outbox.db"))
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_SCENES", (interrupted,))
    with pytest.raises(KeyboardInterrupt):
        demo.run(console=Console(file=io.StringIO()))
    assert [server.returncode for server in servers] == [0]
    assert not list(temporary.glob("outbox-demo-*"))


def test_a_service_that_does_not_start_is_an_error(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "true")
    with pytest.raises(OutboxError, match="service did not start"):
        demo.run(console=Console(file=io.StringIO()))
    assert not list(temporary.glob("outbox-demo-*"))


def test_a_database_that_can_not_be_opened_leaves_nothing_behind(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args, **kwargs):
        raise StorageError("disk full")

    monkeypatch.setattr(Outbox, "open", refuse)
    with pytest.raises(StorageError, match="disk full"):
        demo.run(console=Console(file=io.StringIO()))
    assert not list(temporary.glob("outbox-demo-*"))


def test_the_demo_refuses_to_run_while_capture_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    with pytest.raises(ConfigurationError, match="OUTBOX_CAPTURE"):
        demo.run()


def test_the_example_events_are_valid_canonical_and_all_different() -> None:
    events = demo.example_events()
    texts = [encode(event)[1] for event in events]
    assert len(events) == 300
    assert len({content_hash(text) for text in texts}) == 300
    assert "\n".join(texts) + "\n" == (ROOT / "examples" / "events.ndjson").read_text(encoding="utf-8")
    assert {event["event_type"] for event in events} <= {*event_types()}
    assert len({event["event_type"] for event in events}) == 5
    assert not any("poison" in text for text in texts)


def test_the_table_says_when_pending_events_are_due(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "due now" not in drawn(outbox.stats())
    outbox.enqueue(demo.example_events()[0])
    pending = outbox.stats()
    monkeypatch.setattr(demo_stage, "now_ms", lambda: pending.next_due_at_ms)
    assert "due now" in drawn(pending)
    monkeypatch.setattr(demo_stage, "now_ms", lambda: pending.next_due_at_ms - 1_500)
    assert "next try in 1.5 s" in drawn(pending)


def test_the_command_is_named_as_it_can_be_called_from_here(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    scripts = temporary / ".venv" / "bin"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(scripts))
    assert demo.outbox_command() == str(scripts / "outbox")
    monkeypatch.chdir(temporary)
    assert demo.outbox_command() == str(Path(".venv/bin/outbox"))
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/outbox")
    assert demo.outbox_command() == "outbox"
