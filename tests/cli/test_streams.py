"""Commands as real processes whose standard streams are closed, full, or read by nobody."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
import types
from pathlib import Path

import click
import pytest

from command_line import GOOD, process, runner
from outbox.cli import events, main
from outbox.cli.streams import drop_unwritten, open_closed_streams

OUTBOX = f"{shlex.quote(sys.executable)} -m outbox"


@pytest.fixture
def shell(url, outbox, tmp_path, monkeypatch):
    """Run a line of shell, where `outbox` is the command; return its exit code, output and messages."""
    monkeypatch.setenv("OUTBOX_DATABASE_URL", url)
    (tmp_path / "events.ndjson").write_text(GOOD)

    def run(line):
        script = f'outbox() {{ {OUTBOX} "$@"; }}\nset -o pipefail\n{line}'
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, check=False, text=True
        )
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return run


CLOSED = ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"]


@pytest.mark.parametrize("closed", CLOSED)
def test_a_command_does_its_work_with_closed_streams(shell, outbox, closed):
    assert shell(f"outbox enqueue events.ndjson {closed}")[0] == 0
    assert outbox.pending_count() == 1
    assert shell(f"outbox status {closed}")[0] == 0


@pytest.mark.parametrize("closed", CLOSED)
def test_the_exit_code_stays_when_the_message_is_lost(shell, closed):
    assert shell(f"outbox flush --url http://127.0.0.1:9 {closed}")[0] == 3


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_the_exit_code_of_wrong_use_stays_when_the_message_is_lost(shell, closed):
    assert shell(f"outbox no-such-command {closed}")[0] == 2
    assert shell(f"outbox --database sqlite:// status {closed}")[0] == 2


@pytest.mark.parametrize("command", ["status", "--help", "--version"])
def test_a_full_disk_behind_the_output_is_a_failure_in_one_line(shell, command):
    code, _, messages = shell(f"outbox {command} >/dev/full")
    assert (code, messages) == (1, "outbox: [Errno 28] No space left on device\n")


def test_a_full_disk_behind_the_messages_changes_no_exit_code(shell):
    assert shell("outbox flush --url http://127.0.0.1:9 2>/dev/full") == (3, "", "")
    assert shell("outbox list 2>/dev/full") == (0, "", "")


def test_a_reader_that_has_seen_enough_is_no_error_to_talk_about(shell, outbox):
    shell("for n in $(seq 300); do cat events.ndjson; echo; done | outbox enqueue")
    code, shown, messages = shell("outbox list --limit 300 | head -1")
    assert (code in (0, 1), shown.count("\n"), messages) == (True, 1, "")
    assert shell("outbox status 2>&1 >/dev/null | head -0")[0] == 0


def test_there_are_no_events_in_a_closed_standard_input(shell, outbox, url, monkeypatch):
    monkeypatch.setattr(events, "sys", types.SimpleNamespace(stdin=None))
    assert runner().invoke(main, ["--database", url, "enqueue"]).exit_code == 2
    assert shell("outbox enqueue <&-") == (
        2,
        "",
        "outbox: standard input is closed; name a file, or pipe the events in\n",
    )
    assert outbox.pending_count() == 0


def test_closed_streams_are_replaced_but_standard_input(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    open_closed_streams()
    with sys.stdout, sys.stderr:
        assert sys.stdin is None
        assert sys.stdout.write("lost") == sys.stderr.write("lost") == 4
        assert runner().invoke(main, ["--version"]).exit_code == 0


def test_what_a_full_disk_did_not_take_is_dropped(monkeypatch):
    with Path("/dev/full").open("w") as full:
        full.write("lost")
        monkeypatch.setattr(sys, "stdout", full)
        drop_unwritten()
        full.flush()


def test_an_error_on_the_way_to_the_help_is_one_line(monkeypatch):
    def fail(_context):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(click.Context, "get_help", fail)
    result = runner().invoke(main, ["--help"])
    assert (result.exit_code, result.stderr) == (1, "outbox: [Errno 28] No space left on device\n")


def test_the_next_file_does_not_get_the_number_of_a_closed_stream(tmp_path):
    code = (
        "import os; from outbox.cli.streams import open_closed_streams; open_closed_streams();"
        f" print(os.open({str(tmp_path / 'new')!r}, os.O_CREAT))"
    )
    child = process("-c", code, stdout=subprocess.PIPE, preexec_fn=lambda: (os.close(0), os.close(2)))
    assert int(child.communicate()[0]) > 2
