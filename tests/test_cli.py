from __future__ import annotations

import errno
import json
import logging
import os
import re
import runpy
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import get_args
from urllib import request as urlrequest

import pytest
from click.testing import CliRunner
from freezegun import freeze_time

from builders import NOON, NOON_MS, add_row, row, rule_fired, statuses
from outbox import Event, Outbox, Policy, cli, display
from outbox.cli import main
from outbox.clock import now_ms
from outbox.database import writing
from outbox.events import MAX_PAYLOAD_BYTES
from outbox.failures import StorageError
from outbox.receiver import Answer, IngestServer, Mode
from outbox.schema import REVISIONS
from outbox.stats import duration, failure_in_words

ROOT = Path(__file__).parent.parent
TOKEN = "tok-0123456789"
GOOD = '{"event_type":"rule_fired","rule_ids":["r1"],"session_id":"s1","fired_at":"2026-11-24T12:00:00Z"}'
HOSTILE = "\x1b[31mred\x07\x9b2J\u202e\x7f\nnext"
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]")
COMMANDS = sorted(main.commands)


def runner():
    try:
        return CliRunner(mix_stderr=False)
    except TypeError:  # click 8.2 and later always tell the two apart
        return CliRunner()


@pytest.fixture
def run(url):
    def run(*arguments, **options):
        return runner().invoke(main, ["--database", url, *map(str, arguments)], **options)

    return run


@pytest.fixture
def server(outbox_server):
    outbox_server.token = TOKEN
    return outbox_server


@pytest.fixture
def logged_in(monkeypatch, server):
    monkeypatch.setenv("OUTBOX_URL", server.url)
    monkeypatch.setenv("OUTBOX_TOKEN", TOKEN)


@pytest.fixture
def terminal(monkeypatch):
    """Standard error claims to be a terminal wherever the command line asks."""
    monkeypatch.setattr(display, "sys", types.SimpleNamespace(stderr=_Terminal(), stdout=_Terminal()))


class _Terminal:
    encoding = "utf-8"

    def isatty(self):
        return True


def process(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen([sys.executable, *arguments], env=environment, **options)


def output_of(code):
    return process("-c", code, stdout=subprocess.PIPE).communicate()[0].decode().split()


# --- starting up ---


def test_importing_the_command_line_loads_nothing_heavy():
    heavy = "requests alembic rich transitions platformdirs http.server"
    assert output_of(f"import sys, outbox.cli; print(*sys.modules.keys() & set('{heavy}'.split()))") == []


def test_enqueueing_one_event_loads_nothing_heavy(url, outbox, tmp_path):
    file = tmp_path / "event"
    file.write_text(GOOD)
    heavy = "requests alembic rich transitions http.server"
    code = f"""
import sys
from outbox.cli import main
main(["--database", {url!r}, "enqueue", {str(file)!r}], standalone_mode=False)
print(*sys.modules.keys() & set({heavy!r}.split()))
"""
    assert output_of(code)[1:] == ["1", "recorded,", "from", "id", "1", "on"]
    assert statuses(outbox) == ["pending"]


def test_running_the_module_is_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["outbox", "--help"])
    with pytest.raises(SystemExit) as exited:
        runpy.run_module("outbox", run_name="__main__")
    assert exited.value.code == 0
    assert "Usage: outbox " in capsys.readouterr().out


def test_importing_the_module_runs_nothing():
    runpy.run_module("outbox.__main__", run_name="imported")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_says_what_it_does_and_has_an_example(command):
    result = runner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert re.search(rf"Example: .*outbox .*\b{command}\b", " ".join(result.stdout.split()))
    assert main.commands[command].help


def test_the_help_of_the_whole_has_an_example_and_the_exit_codes():
    text = runner().invoke(main, ["--help"]).stdout
    assert "Example: outbox" in text
    assert "0 done, 1 failed, 2 wrong use" in text


def test_every_command_that_prints_data_has_json():
    with_json = {
        name for name, command in main.commands.items() if any(p.name == "as_json_" for p in command.params)
    }
    assert with_json == {*COMMANDS} - {"demo", "receive", "run"}


def test_no_option_takes_a_token():
    options = [option for command in main.commands.values() for p in command.params for option in p.opts]
    assert not [option for option in options if "token" in option]


def test_the_version_is_that_of_the_distribution(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: f"1.2.3 of {name}")
    result = runner().invoke(main, ["--version"])
    assert (result.exit_code, result.stdout) == (0, "outbox 1.2.3 of observation-outbox\n")


def test_a_source_tree_without_distribution_has_no_version(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert "source tree" in runner().invoke(main, ["--version"]).stdout


# --- settings and failures ---


def test_the_option_for_the_database_comes_before_the_environment(run, outbox, monkeypatch):
    monkeypatch.setenv("OUTBOX_DATABASE_URL", "sqlite:////nowhere/at-all.db")
    assert run("status").exit_code == 0
    assert "/nowhere/at-all.db" in runner().invoke(main, ["status"]).stderr


def test_without_a_database_it_is_the_per_user_file():
    assert runner().invoke(main, ["enqueue"], input=GOOD).exit_code == 0
    assert "outbox.db" in runner().invoke(main, ["status"]).stdout


@pytest.mark.parametrize("command", ["status", "list", "flush", "retry"])
def test_only_upgrade_and_enqueue_create_a_database(run, tmp_path, logged_in, command):
    result = run(command)
    assert result.exit_code == 1
    assert result.stderr.startswith("outbox: there is no database ")
    assert "`outbox upgrade`" in result.stderr
    assert not (tmp_path / "outbox.db").exists()


def test_a_plain_path_is_refused_with_its_url():
    result = runner().invoke(main, ["--database", "outbox.db", "status"])
    assert result.exit_code == 2
    assert "for the file outbox.db it is sqlite:///outbox.db" in " ".join(result.stderr.split())


def test_what_may_hold_a_password_is_not_repeated():
    result = runner().invoke(main, ["--database", "me:hunter2@host/db", "status"])
    assert result.exit_code == 2
    assert "hunter2" not in result.output


@pytest.mark.parametrize(
    "database", ["foo://me:hunter2@x", "postgresql://me:hunter2@x:port/y", "oracle://hunter2@x"]
)
def test_a_url_that_can_not_work_is_misuse_and_not_repeated(database):
    result = runner().invoke(main, ["--database", database, "status"])
    assert result.exit_code == 2
    assert result.stderr.startswith("outbox: the database")
    assert "hunter2" not in result.output


def test_a_failure_of_the_storage_is_one_line(run, tmp_path):
    (tmp_path / "outbox.db").write_text("this is not a database, and long enough to be looked at" * 20)
    result = run("status")
    assert result.exit_code == 1
    assert re.fullmatch(
        "outbox: sqlite:///.*file is not a database; name the right file; this one is left as it is\n",
        result.stderr,
    )


def test_what_steers_a_terminal_is_escaped_in_messages_too(run, outbox, monkeypatch):
    def fail(_outbox):
        raise StorageError(HOSTILE)

    monkeypatch.setattr(Outbox, "retry_now", fail)
    assert run("retry").stderr == "outbox: \\x1b[31mred\\x07\\x9b2J\\u202e\\x7f\\nnext\n"


def test_an_error_of_the_operating_system_is_one_line(run, monkeypatch, tmp_path):
    result = runner().invoke(main, ["--database", f"sqlite:///{tmp_path}/no/such/folder/x.db", "upgrade"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    result = runner().invoke(main, ["receive", "--store", str(tmp_path / "no" / "such")])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)


def test_ctrl_c_is_quiet(run, outbox, monkeypatch):
    def interrupt(_outbox):
        raise KeyboardInterrupt

    monkeypatch.setattr(Outbox, "retry_now", interrupt)
    result = run("retry")
    assert (result.exit_code, result.output) == (130, "")


def test_a_reader_that_left_is_no_failure_to_talk_about(run, outbox, monkeypatch):
    def leave(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(cli, "say", leave)
    result = run("retry")
    assert (result.exit_code, result.output) == (1, "")


def test_a_closed_pipe_is_quiet_in_a_real_process(url, outbox):
    reader, writer = os.pipe()
    os.close(reader)
    listing = process("-m", "outbox", "--database", url, "status", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert listing.communicate()[1] == b""


def test_event_types_of_the_application_are_imported(run, outbox, tmp_path, monkeypatch):
    (tmp_path / "my_types.py").write_text(
        "from outbox import Event\nclass Shipped(Event, tag='shipped_in_test_cli'):\n    order: str\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = '{"event_type":"shipped_in_test_cli","order":"A1"}'
    assert run("enqueue", input=line).exit_code == 2
    assert run("--types", "my_types", "enqueue", input=line).exit_code == 0
    assert Event.__subclasses__()[-1].__name__ == "Shipped"


def test_a_module_of_types_may_lie_in_the_current_directory(run, outbox, tmp_path, monkeypatch):
    (tmp_path / "own_types.py").write_text("import own_more\n")
    (tmp_path / "own_more.py").write_text(
        "from outbox import Event\nclass Shipped(Event, tag='shipped_from_here'):\n    order: str\n"
    )
    # As the installed command is started, which sees nothing of the directory by itself.
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    monkeypatch.chdir(tmp_path)
    line = '{"event_type":"shipped_from_here","order":"A1"}'
    for _ in range(2):
        assert run("--types", "own_types", "enqueue", input=line).exit_code == 0
    assert sys.path.count("") == 1


def test_a_module_of_types_that_is_installed_is_preferred(run, tmp_path, monkeypatch):
    for name in ("installed", "here"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "preferred_types.py").write_text(f"WHERE = {name!r}\n")
    monkeypatch.syspath_prepend(tmp_path / "installed")
    monkeypatch.chdir(tmp_path / "here")
    run("--types", "preferred_types", "status")
    assert sys.modules["preferred_types"].WHERE == "installed"


def test_the_variable_names_several_modules_of_types(run, tmp_path, monkeypatch):
    for name in ("first_types", "second_types"):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OUTBOX_TYPES", "first_types second_types")
    run("status")
    assert {"first_types", "second_types"} <= sys.modules.keys()


def test_a_module_of_types_that_is_not_there_is_misuse(run):
    result = run("--types", "no_such_module", "status")
    assert result.exit_code == 2
    assert "'no_such_module'" in result.stderr


# --- upgrade ---


def test_upgrade_says_from_where_to_where(run, url, tmp_path):
    first = run("upgrade")
    assert (first.exit_code, first.stdout) == (0, f"{url}: upgraded from no outbox schema to {REVISIONS[-1]}\n")
    assert stat.S_IMODE((tmp_path / "outbox.db").stat().st_mode) == 0o600
    assert run("upgrade").stdout == f"{url}: nothing to do, the schema is {REVISIONS[-1]}\n"
    assert json.loads(run("upgrade", "--json").stdout) == {
        "database": url,
        "from": REVISIONS[-1],
        "to": REVISIONS[-1],
    }


@pytest.mark.parametrize("command", ["upgrade", "enqueue", "status"])
def test_a_newer_schema_is_refused(run, outbox, command):
    with writing(outbox.engine) as connection:
        connection.exec_driver_sql("UPDATE outbox_alembic_version SET version_num = 'outbox_9999'")
    result = run(command)
    assert result.exit_code == 1
    assert "this program is too old for it" in result.stderr


# --- enqueue ---


def test_the_first_enqueue_creates_the_database(run, url):
    result = run("enqueue", input=f"{GOOD}\n{GOOD}\n")
    assert (result.exit_code, result.stdout) == (0, "standard input: 2 recorded, from id 1 on\n")
    with Outbox(url) as outbox:
        assert statuses(outbox) == ["pending", "pending"]


def test_byte_order_mark_blank_lines_and_carriage_returns_are_no_part_of_events(run, outbox):
    result = run("enqueue", "-", input=f"\ufeff{GOOD}\r\n\r\n  \n{GOOD}".encode())
    assert (result.exit_code, statuses(outbox)) == (0, ["pending", "pending"])
    assert row(outbox, 1).payload_json == GOOD


def test_an_empty_file_is_done(run, outbox):
    result = run("enqueue", input="")
    assert (result.exit_code, result.stdout) == (0, "standard input: 0 recorded\n")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{oops", "it is not JSON: "),
        (b"[1]", "expected a JSON object, got list"),
        (b'"\xff\xfe"', "it is not UTF-8"),
        (b"[" * 100_000, "it is not JSON: "),
        (b'{"event_type":"nope"}', "event_type is 'nope', expected one of fix_outcome, "),
        (
            b'{"event_type":"rule_fired","session_id":"s","rule_ids":[]}',
            "rule_fired: fired_at: missing, expected ",
        ),
        (b'{"event_type":"' + b"x" * MAX_PAYLOAD_BYTES, f"{MAX_PAYLOAD_BYTES + 15} bytes, at most "),
        (b'{"a":"\x1b[31m"}', "it is not JSON: "),
    ],
)
def test_an_invalid_line_refuses_its_file_with_number_and_reason(run, outbox, line, reason):
    result = run("enqueue", input=GOOD.encode() + b"\n" + line)
    assert result.exit_code == 2
    first, last = result.stderr.splitlines()
    assert first.startswith(f"outbox: standard input, line 2: {reason}")
    assert last == "outbox: standard input: 1 invalid, nothing of it is recorded"
    assert (result.stdout, statuses(outbox)) == ("", [])


def test_only_the_first_invalid_lines_are_shown(run, outbox):
    lines = run("enqueue", input="{\n" * 50).stderr.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "outbox: standard input: 50 invalid, nothing of it is recorded"


def test_one_file_that_is_refused_leaves_the_others(run, outbox, tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text(GOOD)
    bad.write_text(f"{GOOD}\nbad")
    result = run("enqueue", bad, good)
    assert result.exit_code == 2
    assert result.stdout == f"{good}: 1 recorded, from id 1 on\n"
    assert statuses(outbox) == ["pending"]


def test_skip_invalid_reports_every_invalid_line_and_records_the_rest(run, outbox):
    result = run("enqueue", "--skip-invalid", input="bad\n" * 20 + GOOD)
    assert (result.exit_code, len(result.stderr.splitlines())) == (0, 20)
    assert result.stdout == "standard input: 1 recorded, from id 1 on\n"


def test_skip_invalid_with_nothing_valid_records_nothing(run, outbox):
    result = run("enqueue", "--skip-invalid", input="bad\n")
    assert (result.exit_code, result.stdout) == (0, "standard input: 0 recorded\n")


def test_json_of_enqueue_is_one_object_a_file(run, outbox, tmp_path):
    (tmp_path / "bad").write_text("bad")
    result = run("enqueue", "--json", "-", tmp_path / "bad", input=f"{GOOD}\n{GOOD}")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"file": "-", "enqueued": 2, "invalid": 0, "ids": [1, 2]},
        {"file": str(tmp_path / "bad"), "enqueued": 0, "invalid": 1, "ids": []},
    ]


def test_a_file_that_is_not_there_is_misuse(run, tmp_path):
    assert run("enqueue", tmp_path / "none").exit_code == 2


def test_switched_off_capture_is_said_and_no_failure(run, monkeypatch, tmp_path):
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    result = run("enqueue", input=GOOD)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "capture is off" in result.stderr
    assert not (tmp_path / "outbox.db").exists()


# --- the bar ---


def test_a_short_file_draws_no_bar_on_a_terminal(run, outbox, terminal, monkeypatch):
    monkeypatch.delitem(sys.modules, "rich.progress", raising=False)
    assert run("enqueue", input=GOOD).exit_code == 0
    assert "rich.progress" not in sys.modules


def test_a_long_file_draws_a_bar_on_a_terminal(run, outbox, terminal, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "_BAR_FROM_BYTES", 2 * len(GOOD))
    (tmp_path / "file").write_text(f"{GOOD}\n" * 5)
    drawn = record_bars(monkeypatch)
    assert run("enqueue", tmp_path / "file").exit_code == 0
    size = 5 * (len(GOOD) + 1)
    assert drawn == [("Reading", size, size)]


def test_flush_all_draws_a_bar_on_a_terminal(run, outbox, terminal, monkeypatch, logged_in):
    outbox.enqueue_many([rule_fired(session_id=str(n)) for n in range(70)])
    drawn = record_bars(monkeypatch)
    assert run("flush", "--all").exit_code == 0
    assert drawn == [("Sending", 70, 70)]


def test_nothing_is_drawn_where_there_is_no_terminal(run, outbox, monkeypatch, logged_in):
    outbox.enqueue(rule_fired())
    drawn = record_bars(monkeypatch)
    assert run("flush", "--all").exit_code == 0
    assert drawn == []


def record_bars(monkeypatch):
    """Return a list that gets what each bar showed in the end: its name, its total and where it stood."""
    drawn = []
    leave = display.Bar.__exit__

    def remember(bar, *error):
        if bar._bar is not None:
            drawn.extend((task.description, task.total, task.completed) for task in bar._bar.tasks)
        leave(bar, *error)

    monkeypatch.setattr(display.Bar, "__exit__", remember)
    return drawn


# --- flush ---


def test_flush_sends_one_batch_with_the_token_of_the_environment(run, outbox, server, logged_in):
    outbox.enqueue_many([rule_fired(session_id=str(n)) for n in range(70)])
    result = run("flush")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "64 attempted, 64 sent, 0 rescheduled, 0 parked, 0 abandoned\n"
    assert server.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"
    assert run("flush", "--all").stdout == "6 attempted, 6 sent, 0 rescheduled, 0 parked, 0 abandoned\n"
    assert run("flush", "--all").stdout == "nothing was due\n"
    assert len(server.events) == 70


def test_json_of_flush_is_the_report(run, outbox, server, logged_in):
    server.set_mode("overloaded")
    outbox.enqueue(rule_fired())
    result = run("flush", "--json")
    report = json.loads(result.stdout)
    assert (report["attempted"], report["sent"], report["rescheduled"]) == (1, 0, 1)
    assert (report["verdict"], report["failure"][:3]) == ("rate limited", "429")


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize(
    ("mode", "status"), [("down", "pending"), ("overloaded", "pending"), ("revoked", "parked")]
)
def test_what_was_not_sent_is_exit_code_3(run, outbox, server, mode, status):
    server.set_mode(mode)
    outbox.enqueue(rule_fired())
    result = run("flush", "--all")
    assert result.exit_code == 3
    assert result.stdout.startswith("1 attempted, 0 sent, ")
    assert result.stderr.startswith("outbox: the last failure: ")
    assert statuses(outbox) == [status]


def test_an_event_that_the_server_rejects_is_exit_code_3(run, outbox, logged_in):
    outbox.enqueue_many([rule_fired(), rule_fired(session_id="poison")])
    result = run("flush")
    assert result.exit_code == 3
    assert result.stderr.startswith("outbox: 1 of 1 events are abandoned: [2]\noutbox: the last failure: 422 ")
    assert statuses(outbox) == ["sent", "abandoned"]


def test_a_payload_that_can_not_be_read_is_exit_code_3(run, outbox, logged_in):
    add_row(outbox, payload_json="oops")
    result = run("flush")
    assert result.exit_code == 3
    assert result.stderr.endswith("outbox: `outbox list --state abandoned` shows why\n")
    assert statuses(outbox) == ["abandoned"]


def test_what_is_due_after_all_is_exit_code_3(run, outbox, logged_in, monkeypatch):
    flush_all = Outbox.flush_all

    def overtaken(self, *arguments, **options):
        report = flush_all(self, *arguments, **options)
        self.enqueue(rule_fired(session_id="late"))
        return report

    monkeypatch.setattr(Outbox, "flush_all", overtaken)
    assert run("flush", "--all").exit_code == 3


def test_what_is_not_due_yet_does_not_count(run, outbox, logged_in):
    add_row(outbox, next_attempt_at_ms=NOON_MS * 2)
    assert run("flush", "--all").exit_code == 0


@pytest.mark.parametrize("token", [None, "", " \n"])
def test_without_a_token_nothing_is_touched(run, outbox, server, monkeypatch, token):
    monkeypatch.setenv("OUTBOX_URL", server.url)
    if token is not None:
        monkeypatch.setenv("OUTBOX_TOKEN", token)
    outbox.enqueue(rule_fired())
    before = row(outbox, 1).next_attempt_at_ms
    result = run("flush")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "not logged in" in result.stderr
    assert row(outbox, 1).next_attempt_at_ms == before
    assert server.requests == []


def test_the_token_file_is_read_before_each_request(run, outbox, server, monkeypatch, tmp_path):
    file = tmp_path / "token"
    file.write_text(f"  {TOKEN}\n")
    monkeypatch.setenv("OUTBOX_TOKEN_FILE", str(file))
    outbox.enqueue_many([rule_fired(session_id=str(n)) for n in range(70)])
    flush_all = Outbox.flush_all

    def renewing(self, client, *, progress):
        def renew(report):
            progress(report)
            file.write_text("another-token")
            server.token = file.read_text()

        return flush_all(self, client, progress=renew)

    monkeypatch.setattr(Outbox, "flush_all", renewing)
    assert run("flush", "--all", "--url", server.url).exit_code == 0
    assert [request.headers["Authorization"] for request in server.requests] == [
        f"Bearer {TOKEN}",
        "Bearer another-token",
    ]


def test_the_token_itself_comes_before_its_file(run, outbox, logged_in, monkeypatch):
    monkeypatch.setenv("OUTBOX_TOKEN_FILE", "/nowhere/at/all")
    assert run("flush").exit_code == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a file with the token: No such file or directory"),
        (b"\xff\xfe", "expected a file with the token: it is not ASCII text"),
        (b"two words-of-it", "OUTBOX_TOKEN_FILE holds white space or other than ASCII"),
    ],
)
@pytest.mark.usefixtures("outbox")
def test_a_token_file_that_can_not_work_is_misuse(run, monkeypatch, tmp_path, content, message):
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("OUTBOX_TOKEN_FILE", str(file))
    result = run("flush", "--url", "http://localhost")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "words-of-it" not in result.output


def test_a_token_that_is_no_word_is_misuse(run, outbox, logged_in, monkeypatch):
    monkeypatch.setenv("OUTBOX_TOKEN", "sécret-token")
    result = run("flush")
    assert result.exit_code == 2
    assert "cret-token" not in result.output


@pytest.mark.parametrize("target", [None, "ftp://example.com", "http://example.com"])
def test_a_server_url_that_can_not_work_is_misuse(run, outbox, monkeypatch, target):
    monkeypatch.setenv("OUTBOX_TOKEN", TOKEN)
    result = run("flush", *(["--url", target] if target else []))
    assert result.exit_code == 2
    assert "url" in result.stderr


def test_the_token_is_in_no_output(run, outbox, server, logged_in):
    outbox.enqueue(rule_fired())
    server.script(Answer(500, f"go away {TOKEN}"))
    outputs = [run("flush"), run("status"), run("list"), run("show", 1), run("list", "--json")]
    assert "[REDACTED-TOKEN]" in outputs[0].stderr
    for output in outputs:
        assert TOKEN not in output.output + output.stderr


def test_sigterm_gives_back_what_a_flush_holds(url, outbox, monkeypatch):
    monkeypatch.setenv("OUTBOX_TOKEN", TOKEN)
    outbox.enqueue(rule_fired())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("OUTBOX_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        flushing = process("-m", "outbox", "--database", url, "flush", stderr=subprocess.PIPE)
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(4)
            assert statuses(outbox) == ["sending"]
            flushing.send_signal(signal.SIGTERM)
            assert (flushing.communicate()[1], flushing.returncode) == (b"", 130)
    assert statuses(outbox) == ["pending"]


# --- status ---


def fill(outbox):
    add_row(outbox, status="sent", sent_at_ms=NOON_MS)
    add_row(outbox, next_attempt_at_ms=NOON_MS + 300_000, event_type="fix_outcome")
    add_row(outbox, status="parked", last_error="401 Unauthorized", next_attempt_at_ms=NOON_MS + 60_000)
    add_row(outbox, status="parked", last_error="401 Unauthorized", next_attempt_at_ms=NOON_MS + 60_000)


def test_status_shows_counts_ages_and_the_likely_cause(run, outbox, url):
    fill(outbox)
    with freeze_time(NOON + timedelta(minutes=3)):
        result = run("status")
    assert result.exit_code == 0
    assert (
        result.stdout
        == f"""\
database      {url}
oldest        3 minutes old, of what is pending or being sent
next due      2026-11-24 12:05:00 UTC (in 2 minutes)
likely cause  the token was rejected 3 minutes ago (401 Unauthorized); 2 events are parked; run `outbox retry` \
after logging in

             pending  sending  sent  parked  abandoned
fix_outcome        1        0     0       0          0
rule_fired         0        0     1       2          0
all                1        0     1       2          0
"""
    )


def test_json_of_status_is_the_stats(run, outbox, url):
    fill(outbox)
    with freeze_time(NOON + timedelta(minutes=3)):
        stats = json.loads(run("status", "--json").stdout)
    assert stats["database"] == url
    assert stats["counts"] == {"pending": 1, "sending": 0, "sent": 1, "parked": 2, "abandoned": 0}
    assert stats["by_type"]["rule_fired"] == {"parked": 2, "sent": 1}
    assert stats["oldest_pending_age_ms"] == 180_000
    assert stats["next_due_at_ms"] == NOON_MS + 300_000


def test_status_of_an_empty_outbox_is_short(run, outbox, url):
    assert (
        run("status").stdout
        == f"""\
database      {url}

     pending  sending  sent  parked  abandoned
all        0        0     0       0          0
"""
    )


def test_a_state_of_another_program_is_counted(outbox):
    stats = outbox.stats()
    odd = replace(stats, counts={**stats.counts, "odd": 3}, by_type={"rule_fired": {"odd": 3}})
    text = display.status_in_words(odd, "db", now_ms=NOON_MS)
    assert text.splitlines()[-1].split() == ["all", "0", "0", "0", "0", "0", "3"]


def test_status_tells_what_was_deleted(run, url):
    with Outbox.open(url, policy=Policy(max_rows=1)) as outbox:
        add_row(outbox, status="sent", sent_at_ms=NOON_MS)
        outbox.enqueue_many([rule_fired()] * 3)
    assert run("status").stdout.endswith("""
deleted so far, 2 of them undelivered:
state    type        reason  events
pending  rule_fired  cap          2
sent     rule_fired  cap          1
""")
    stats = json.loads(run("status", "--json").stdout)
    assert stats["left_undelivered"] == 2
    assert stats["deleted"][1] == {"status": "sent", "event_type": "rule_fired", "reason": "cap", "events": 1}


# --- list and show ---


def test_list_shows_the_oldest_first_and_says_when_there_are_more(run, outbox):
    for minutes in (3, 1, 2):
        add_row(outbox, created_at_ms=NOON_MS + minutes * 60_000, retry_count=1, last_error="x" * 100)
    result = run("list", "--limit", 2)
    error = "x" * 77 + "..."
    assert (
        result.stdout
        == f"""\
id  state    type        created                  failures  last error
 2  pending  rule_fired  2026-11-24 12:01:00 UTC         1  {error}
 3  pending  rule_fired  2026-11-24 12:02:00 UTC         1  {error}
"""
    )
    assert result.stderr == "outbox: there are more than these 2; --limit shows them\n"
    assert run("list").stderr == ""


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ([], [1, 2, 3]),
        (["--state", "sent"], [1]),
        (["--type", "fix_outcome"], [2]),
        (["--older-than", "30m"], [1, 2]),
        (["--older-than", "1h"], [1]),
        (["--older-than", "2026-11-24T13:30:00+02:00"], [1, 2]),
        (["--older-than", "2026-11-24T11:00:00z"], [1]),
        (["--state", "sent", "--type", "fix_outcome"], []),
    ],
)
def test_list_filters(run, outbox, options, ids):
    add_row(outbox, status="sent", created_at_ms=NOON_MS - 2 * 3_600_000)
    add_row(outbox, event_type="fix_outcome", created_at_ms=NOON_MS - 3_600_000)
    add_row(outbox)
    with freeze_time(NOON):
        result = run("list", "--json", *options)
    assert [event["id"] for event in json.loads(result.stdout)] == ids


def test_a_list_of_nothing_says_so(run, outbox):
    result = run("list")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "outbox: no such events\n")


@pytest.mark.parametrize("age", ["7", "7w", "-1d", "1.5h", "yesterday", "2026-11-24T12:00:00", "9999999d"])
def test_an_age_that_is_none_is_misuse(run, outbox, age):
    result = run("list", f"--older-than={age}")
    assert result.exit_code == 2
    assert "expected an age such as 30s, 15m, 12h or 7d" in " ".join(result.stderr.split())


def test_show_tells_everything_and_what_comes_next(run, outbox):
    add_row(
        outbox,
        retry_count=2,
        next_attempt_at_ms=NOON_MS + 240_000,
        last_error="503 Service Unavailable",
        rule_ids_json='["r1"]',
        session_id="s1",
        file_path="a.py",
    )
    with freeze_time(NOON + timedelta(minutes=1)):
        result = run("show", 1)
    assert (
        result.stdout
        == """\
event         1
type          rule_fired
state         pending
next          it waits until 2026-11-24 12:04:00 UTC (in 3 minutes), then the next flush sends it; from \
2026-12-01 12:00:00 UTC on a failure abandons it
created       2026-11-24 12:00:00 UTC (1 minute ago)
occurred      2026-11-24 12:00:00 UTC (1 minute ago)
failures      2
last error    the server is in trouble (503 Service Unavailable)
rules         ["r1"]
session       s1
file          a.py
content hash  b6dc97a47e194612

{
  "event_type": "rule_fired",
  "rule_ids": [
    "r1"
  ],
  "session_id": "s1",
  "fired_at": "2026-11-24T12:00:00Z"
}
"""
    )


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {},
            "it is due since 2026-11-24 12:00:00 UTC, then the next flush sends it; from 2026-12-01 12:00:00 UTC",
        ),
        ({"revived_at_ms": NOON_MS + 60_000}, "; from 2026-12-01 12:01:00 UTC on a failure abandons it"),
        (
            {"status": "sending", "next_attempt_at_ms": NOON_MS + 90_000},
            "a flusher is sending it; should that one",
        ),
        ({"status": "sending"}, "it is due since 2026-11-24 12:00:00 UTC"),
        ({"status": "sent", "sent_at_ms": NOON_MS}, "nothing, it is delivered"),
        ({"status": "parked"}, "`outbox retry` after logging in"),
        ({"status": "abandoned"}, "nothing, it is given up; `outbox requeue --older-than 0s` brings back"),
        ({"payload_json": "oops"}, "the next flush abandons it, its payload can't be read: "),
    ],
)
def test_what_comes_next_depends_on_the_state(run, outbox, columns, words):
    add_row(outbox, **columns)
    with freeze_time(NOON + timedelta(minutes=1)):
        text, as_json = run("show", 1), run("show", 1, "--json")
    assert words in text.stdout
    assert words in json.loads(as_json.stdout)["next"]


def test_an_unknown_state_has_no_next(run, outbox):
    add_row(outbox)
    odd = row(outbox, 1)
    odd._machine_status = "odd"
    assert "does not know its state" in display.what_next(odd, now_ms=NOON_MS, max_age_ms=1)


def test_json_of_show_has_every_column_by_its_name(run, outbox):
    add_row(outbox)
    event = json.loads(run("show", 1, "--json").stdout)
    assert event["payload_json"].startswith('{"event_type":')
    assert event["created_at_ms"] == NOON_MS
    assert event["revived_at_ms"] is None


def test_an_event_that_is_not_there_is_a_failure(run, outbox):
    result = run("show", 7)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "outbox: there is no event 7; it was never recorded here, or is deleted\n"


@pytest.mark.parametrize("row_id", ["0", "x", "9223372036854775808"])
def test_what_is_no_id_is_misuse(run, outbox, row_id):
    assert run("show", row_id).exit_code == 2


# --- text that is not to be trusted ---


@pytest.mark.parametrize("command", [("status",), ("list",), ("show", "1")])
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_nothing_stored_steers_a_terminal(run, outbox, command, form):
    payload = json.dumps({"event_type": "rule_fired", "intent": HOSTILE}, ensure_ascii=False)
    for status in ("pending", "parked"):
        add_row(
            outbox,
            status=status,
            event_type=HOSTILE,
            last_error=HOSTILE,
            session_id=HOSTILE,
            file_path=HOSTILE,
            payload_json=payload,
        )
    result = run(*command, *form)
    assert result.exit_code == 0
    assert not STEERING.search(result.stdout)
    assert "red" in result.stdout


def test_text_that_is_not_utf_8_is_shown_escaped(run, outbox):
    add_row(outbox)
    with writing(outbox.engine) as connection:
        connection.exec_driver_sql("UPDATE observation_events SET payload_json = CAST(x'22ff22' AS TEXT)")
    result = run("show", 1)
    assert result.exit_code == 0
    assert "\\udcff" in result.stdout
    assert "content hash\n" in result.stdout


def test_what_the_output_can_not_encode_is_escaped(monkeypatch, capsys):
    monkeypatch.setattr(display, "sys", types.SimpleNamespace(stdout=types.SimpleNamespace(encoding="ascii")))
    display.say("grün")
    assert capsys.readouterr().out == "gr\\xfcn\n"


def test_a_number_that_is_no_date_stays_a_number():
    assert display.utc(10**18) == f"{10**18} ms since 1970"


def test_json_takes_no_value_by_guess():
    with pytest.raises(TypeError, match="bytes has no JSON"):
        display.as_json(b"")


# --- retry and requeue ---


def test_retry_makes_due_what_is_parked_or_waits(run, outbox):
    add_row(outbox, status="parked")
    add_row(outbox, next_attempt_at_ms=NOON_MS * 2)
    add_row(outbox, status="abandoned")
    assert run("retry").stdout == "2 made due\n"
    assert json.loads(run("retry", "--json").stdout) == {"retried": 0}
    assert statuses(outbox) == ["pending", "pending", "abandoned"]


def test_requeue_tells_first_and_acts_then(run, outbox):
    for event_type in ("rule_fired", "fix_outcome", "rule_fired"):
        add_row(outbox, status="abandoned", event_type=event_type)
    add_row(outbox, status="abandoned", created_at_ms=NOON_MS + 3_600_000)
    with freeze_time(NOON + timedelta(hours=1)):
        dry = run("requeue", "--older-than", "30m", "--dry-run")
        assert dry.stdout == "3 would be requeued\n  fix_outcome: 1\n  rule_fired: 2\n"
        assert statuses(outbox) == ["abandoned"] * 4
        assert run("requeue", "--older-than", "30m").stdout.startswith("3 requeued\n")
        assert statuses(outbox) == ["pending", "pending", "pending", "abandoned"]
        assert json.loads(run("requeue", "--older-than", "30m", "--json").stdout) == {
            "total": 0,
            "per_type": {},
            "dry_run": False,
        }


def test_requeue_wants_an_age(run, outbox):
    assert run("requeue").exit_code == 2


# --- purge ---


def test_purge_tells_first_and_acts_then(run, outbox):
    for event_type in ("rule_fired", "fix_outcome", "rule_fired"):
        add_row(outbox, status="sent" if event_type == "fix_outcome" else "pending", event_type=event_type)
    kept = add_row(outbox, created_at_ms=NOON_MS + 3_600_000)
    with freeze_time(NOON + timedelta(hours=1)):
        dry = run("purge", "--before", "30m", "--dry-run")
        assert dry.stdout == "3 would be purged, 2 of them undelivered\n  fix_outcome: 1\n  rule_fired: 2\n"
        assert len(statuses(outbox)) == 4
        done = run("purge", "--before", "30m")
        assert (done.exit_code, done.stderr) == (0, "")
        assert done.stdout.startswith("3 purged, 2 of them undelivered\n")
        assert [found.id for found in outbox.find()] == [kept]
        assert json.loads(run("purge", "--type", "fix_outcome", "--json").stdout) == {
            "total": 0,
            "undelivered": 0,
            "in_flight": 0,
            "per_type": {},
            "dry_run": False,
        }
    assert re.search(
        r"deleted so far, 2 of them undelivered:\n(?s:.*)\bpending +rule_fired +purge +2\n", run("status").stdout
    )


def test_a_purge_of_a_type_leaves_other_types(run, outbox):
    add_row(outbox)
    kept = add_row(outbox, event_type="fix_outcome")
    assert run("purge", "--type", "rule_fired").exit_code == 0
    assert [found.id for found in outbox.find()] == [kept]


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_purge_of_everything_by_accident_is_misuse(run, outbox, options):
    add_row(outbox)
    result = run("purge", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nothing says what to purge" in result.stderr
    assert statuses(outbox) == ["pending"]


def test_a_purge_says_what_it_had_to_leave(run, outbox):
    add_row(outbox, status="sending", created_at_ms=1, next_attempt_at_ms=now_ms() + 60_000)
    dry = run("purge", "--before", "0s", "--dry-run")
    assert (dry.exit_code, dry.stderr) == (0, "outbox: 1 being sent right now, they would be left alone\n")
    result = run("purge", "--before", "0s")
    assert (result.exit_code, result.stdout) == (1, "0 purged, 0 of them undelivered\n")
    assert result.stderr == "outbox: 1 being sent right now, they were left alone; purge again when that is over\n"
    assert statuses(outbox) == ["sending"]


# --- receive and demo ---


def test_the_modes_of_receive_are_those_of_the_server():
    assert get_args(Mode) == cli._RECEIVE_MODES


def test_receive_prints_its_url_and_a_line_for_each_request(run, monkeypatch):
    monkeypatch.setenv("OUTBOX_TOKEN", TOKEN)
    started = []
    start = IngestServer.start
    monkeypatch.setattr(IngestServer, "start", lambda self: started.append(self) or start(self))
    pauses = iter([post_with_token, post_with_token, drop_and_post, None])

    def pause(_seconds):
        step = next(pauses)
        if step is None:
            raise KeyboardInterrupt
        step(started[0])

    monkeypatch.setattr(cli, "time", types.SimpleNamespace(sleep=pause))
    result = run("receive", "--mode", "ok", "--reject-marker", "s1")
    assert result.exit_code == 0
    assert (
        result.stdout
        == f"""\
{started[0].url}
POST /cloud/observations 1 events: 422
POST /cloud/observations 1 events: 422
POST /cloud/observations 1 events: no answer
"""
    )


def post_with_token(server):
    body = f"[{GOOD}]".encode()
    call = urlrequest.Request(  # noqa: S310 - the server of the test
        f"{server.url}/cloud/observations", body, {"Authorization": f"Bearer {TOKEN}"}
    )
    with pytest.raises(OSError, match=r".") as failed:
        urlrequest.urlopen(call)  # noqa: S310 - as above
    if hasattr(failed.value, "close"):
        failed.value.close()


def drop_and_post(server):
    server.set_mode("drop")
    post_with_token(server)


def test_receive_ends_at_sigterm_in_a_real_process(tmp_path):
    file = tmp_path / "received"
    receiving = process("-m", "outbox", "receive", "--store", str(file), stdout=subprocess.PIPE)
    url = receiving.stdout.readline().decode().strip()
    call = urlrequest.Request(f"{url}/cloud/observations", f"[{GOOD}]".encode())  # noqa: S310 - our own server
    with urlrequest.urlopen(call) as response:  # noqa: S310 - as above
        assert response.status == 200
    assert receiving.stdout.readline() == b"POST /cloud/observations 1 events: 200\n"
    receiving.send_signal(signal.SIGTERM)
    assert (receiving.communicate()[0], receiving.returncode) == (b"", 0)
    assert file.read_text() == f"{GOOD}\n"


def test_demo_runs_the_demonstration_and_takes_its_exit_code(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "outbox.demo", types.SimpleNamespace(run=lambda: 1))
    assert run("demo").exit_code == 1


# --- words ---


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        ("transport: refused", "the server can't be reached"),
        (
            "permanent: decode observation event: event_type: invalid value 'x'",
            "the payload can't be read: whoever sent it does not know its type; name its module in OUTBOX_TYPES",
        ),
        ("permanent: decode observation event: x", "the payload can't be read"),
        ("permanent: 404 Not Found", "the server takes no events at this URL; check it"),
        ("permanent: 405 Method Not Allowed", "the server takes no events at this URL; check it"),
        ("permanent: 422 no", "the server rejected this event"),
        ("aged-out (rate-limited): 429", "too old for another try"),
        ("401 Unauthorized", "the token was rejected"),
        ("403 Forbidden", "the token was rejected"),
        ("408 Request Timeout", "the server was too slow"),
        ("425 Too Early", "the server was not ready"),
        ("429 Too Many Requests", "the server asks to slow down"),
        ("302 Found", "the server redirects, which is not followed; check the URL"),
        ("404 Not Found", "the server rejects whatever is sent; check the URL, and what it accepts"),
        ("503 Service Unavailable", "the server is in trouble"),
        ("what?", "the upload failed"),
    ],
)
def test_a_failure_is_put_in_words(error, meaning):
    assert failure_in_words(error) == f"{meaning} ({error})"


@pytest.mark.parametrize(
    ("ms", "words"),
    [
        (-5, "0 seconds"),
        (1_999, "1 second"),
        (60_000, "1 minute"),
        (7_200_000, "2 hours"),
        (86_400_000 * 9, "9 days"),
    ],
)
def test_a_span_is_put_in_its_largest_unit(ms, words):
    assert duration(ms) == words


def causes(outbox):
    with freeze_time(NOON + timedelta(minutes=1)):
        return outbox.stats().likely_cause


def test_nothing_wrong_has_no_cause(outbox):
    add_row(outbox)
    assert causes(outbox) is None


def test_the_most_frequent_failure_of_what_waits_is_the_cause(outbox):
    add_row(outbox, last_error="transport: refused", next_attempt_at_ms=NOON_MS + 120_000)
    add_row(outbox, last_error="503", next_attempt_at_ms=NOON_MS + 180_000)
    add_row(outbox, last_error="503", next_attempt_at_ms=NOON_MS + 240_000)
    assert causes(outbox) == "the server is in trouble (503); 2 events are waiting; the next try is in 2 minutes"


def test_what_waits_and_is_due_is_called_due(outbox):
    add_row(outbox, last_error="503")
    assert causes(outbox) == "the server is in trouble (503); 1 event is waiting; the next try is due now"


def test_parked_and_waiting_are_two_causes(outbox):
    add_row(outbox, last_error="503")
    add_row(outbox, status="parked", next_attempt_at_ms=NOON_MS + 60_000)
    assert causes(outbox) == (
        "the token was rejected 1 minute ago; 1 event is parked; run `outbox retry` after logging in."
        " Also: the server is in trouble (503); 1 event is waiting; the next try is due now"
    )


def test_abandoned_events_are_named_when_nothing_else_is_wrong(outbox):
    add_row(outbox, status="abandoned")
    add_row(outbox, status="abandoned")
    assert causes(outbox) == (
        "2 events are abandoned; `outbox list --state abandoned` shows why,"
        " `outbox requeue --older-than 0s` brings them back"
    )


def test_the_examples_are_events_that_can_be_enqueued(run, outbox):
    examples = Path(__file__).parent.parent / "examples" / "events.ndjson"
    assert run("enqueue", examples).exit_code == 0


# --- the opt-out ---

PAUSED = "delivery is paused, capture is off (OUTBOX_CAPTURE=false)"


@pytest.fixture
def opted_out(monkeypatch):
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")


@pytest.mark.parametrize("options", [(), ("--all",), ("--json",)])
def test_flush_sends_nothing_while_capture_is_off(run, outbox, server, logged_in, monkeypatch, options):
    outbox.enqueue(rule_fired())
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    result = run("flush", *options)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr == f"outbox: nothing was tried, {PAUSED}\n"
    assert statuses(outbox) == ["pending"]
    assert server.requests == []


def test_status_and_show_say_that_capture_is_off(run, outbox, opted_out):
    add_row(outbox)
    assert f"likely cause  {PAUSED}\n" in run("status").stdout
    assert json.loads(run("status", "--json").stdout)["likely_cause"] == PAUSED
    assert f"on a failure abandons it. But {PAUSED}\n" in run("show", "1").stdout


def test_what_else_is_wrong_is_said_too(outbox, opted_out):
    add_row(outbox, last_error="503 Service Unavailable")
    assert outbox.stats().likely_cause.startswith(f"{PAUSED}. Also: the server is in trouble")


def test_health_says_that_capture_is_off_and_keeps_its_exit_codes(run, outbox, opted_out):
    result = run("health")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "ok\n", f"outbox: {PAUSED}\n")
    add_row(outbox, next_attempt_at_ms=now_ms() - 3_600_000)
    result = run("health", "--json")
    assert result.exit_code == 3
    assert result.stderr.startswith(f"outbox: {PAUSED}\noutbox: an event has been due for")


def test_doctor_says_that_capture_is_off_which_is_no_fault(run, outbox, opted_out):
    result = run("doctor")
    assert result.exit_code == 0
    words = "capture is off (OUTBOX_CAPTURE=false): nothing is recorded, and what is queued is not sent"
    assert result.stdout.startswith(f"ok     capture      {words}\n")


def test_run_says_that_capture_is_off_and_waits(url, outbox, server, token_file, monkeypatch):
    outbox.enqueue(rule_fired())
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    arguments = ("-m", "outbox", "--database", url, "run", "--url", server.url)
    with process(*arguments, stderr=subprocess.PIPE, text=True, cwd=ROOT) as run:
        said = run.stderr.readline()
        run.terminate()
        assert run.communicate(timeout=60) == (None, "outbox: ending\n")
    assert said == f"outbox: can't deliver: {PAUSED}\n"
    assert run.returncode == 0
    assert statuses(outbox) == ["pending"]


# --- run ---


def start_run(url, server, token_file, *options):
    """Start `outbox run`; return once it delivers."""
    run = process(
        *("-m", "outbox", "--database", url, "run", "--url", server.url, *options),
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert run.stderr.readline() == f"outbox: delivering from {url} to {server.url}\n"
    return run


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.01)


@pytest.fixture
def token_file(monkeypatch, tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN)
    monkeypatch.setenv("OUTBOX_TOKEN_FILE", str(file))
    return file


def test_run_delivers_what_others_enqueue_until_sigterm(url, outbox, server, token_file):
    with start_run(url, server, token_file) as run:
        outbox.enqueue_many([rule_fired()] * 3)
        wait_until(lambda: statuses(outbox) == ["sent"] * 3)
        run.terminate()
        assert run.communicate(timeout=60) == (None, "outbox: ending\n")
    assert run.returncode == 0


def test_run_gives_back_what_it_can_not_finish_in_time(url, outbox, server, token_file):
    server.set_mode("hang")
    with start_run(url, server, token_file, "--grace", "1") as run:
        outbox.enqueue(rule_fired())
        wait_until(lambda: server.requests)
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=30)  # less than an upload may take
    assert run.returncode == 0
    assert statuses(outbox) == ["pending"]


def test_run_tries_again_what_is_parked_when_the_token_changes(url, outbox, server, token_file):
    token_file.write_text("outdated")
    outbox.enqueue(rule_fired())
    with start_run(url, server, token_file) as run:
        wait_until(lambda: statuses(outbox) == ["parked"])
        token_file.unlink()
        fresh = token_file.with_suffix(".new")
        fresh.write_text(TOKEN)
        fresh.replace(token_file)
        wait_until(lambda: statuses(outbox) == ["sent"])
        assert run.stderr.readline().startswith("outbox: can't deliver: 401 Unauthorized")
        assert "outbox: delivering again\n" in iter(run.stderr.readline, "")
        run.terminate()
        assert run.communicate(timeout=60)[1].endswith("outbox: ending\n")


def test_run_does_not_begin_without_a_schema(url, run, logged_in):
    result = run("run")
    assert result.exit_code == 1
    assert "outbox upgrade" in result.stderr


def test_the_log_of_run_steers_no_terminal(capsys):
    with display.shown_log():
        logging.getLogger("outbox").warning("%s", HOSTILE)
    assert "red" in (shown := capsys.readouterr().err)
    assert not STEERING.search(shown)


# --- health ---


def test_health_is_well_while_nothing_is_overdue(outbox, run):
    add_row(outbox, next_attempt_at_ms=now_ms() - 60_000)
    assert (run("health").exit_code, run("health").stdout) == (0, "ok\n")
    add_row(outbox, status="parked")
    add_row(outbox, next_attempt_at_ms=now_ms() + 60_000)
    assert json.loads(run("health", "--json").stdout)["overdue_ms"] >= 60_000


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_health_says_that_nobody_delivers(outbox, run, options):
    with freeze_time(NOON + timedelta(minutes=31)):
        add_row(outbox)
        result = run("health", "--max-overdue", "30m", *options)
    assert result.exit_code == 3
    assert "an event has been due for 31 minutes" in result.stderr


def test_health_tells_of_events_that_a_dead_flusher_held(outbox, run):
    # Its lease ended at noon, and nobody has taken the event since.
    add_row(outbox, status="sending")
    with freeze_time(NOON + timedelta(minutes=31)):
        assert "next due      2026-11-24 12:00:00 UTC (31 minutes ago)" in run("status").stdout
        assert run("health", "--max-overdue", "30m").exit_code == 3
    with freeze_time(NOON - timedelta(minutes=1)):
        assert run("health", "--max-overdue", "0s").exit_code == 0


def test_liveness_does_not_ask_for_deliveries(outbox, run):
    add_row(outbox)
    assert run("health", "--live").exit_code == 0
    assert run("health", "--live", "--json").stdout == '{"overdue_ms": null}\n'


def test_health_says_that_there_is_no_database(run):
    result = run("health", "--live")
    assert result.exit_code == 1
    assert "outbox upgrade" in result.stderr


def test_health_refuses_what_is_no_age(run):
    result = run("health", "--max-overdue", "soon")
    assert result.exit_code == 2
    assert "expected an age such as 30s" in result.stderr
