from __future__ import annotations

import errno
import os
import re
import runpy
import subprocess
import sys
from importlib import metadata

import pytest

from command_line import HOSTILE, output_of, process, runner
from outbox import Outbox
from outbox.cli import acting, main
from outbox.failures import StorageError

COMMANDS = sorted(main.commands)


def test_importing_the_command_line_loads_nothing_heavy():
    heavy = "requests alembic rich transitions platformdirs http.server"
    assert output_of(f"import sys, outbox.cli; print(*sys.modules.keys() & set('{heavy}'.split()))") == []


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


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_the_short_option_shows_the_same_help(command):
    short, long = (runner().invoke(main, [*command, option]) for option in ("-h", "--help"))
    assert (short.exit_code, short.stdout) == (0, long.stdout)


def test_the_help_of_the_whole_has_an_example_and_the_exit_codes():
    text = runner().invoke(main, ["--help"]).stdout
    assert "Example: outbox" in text
    assert "0 success; 1 failure; 2 wrong usage" in " ".join(text.split())
    assert "130 Ctrl-C" in " ".join(text.split())


def test_every_command_that_prints_data_has_json():
    with_json = {
        name for name, command in main.commands.items() if any(p.name == "in_json" for p in command.params)
    }
    assert with_json == {*COMMANDS} - {"demo", "receive", "run", "web"}


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


def test_a_failure_of_the_storage_is_one_line(run, tmp_path):
    (tmp_path / "outbox.db").write_text("this is not a database, and long enough to be looked at" * 20)
    result = run("status")
    assert result.exit_code == 1
    assert re.fullmatch(
        "outbox: sqlite:///.*file is not a database; name the right file; this one is left as it is\n",
        result.stderr,
    )


def test_what_steers_a_terminal_is_escaped_in_messages_too(run, outbox, monkeypatch):
    def fail(_outbox, *_where, **_options):
        raise StorageError(HOSTILE)

    monkeypatch.setattr(Outbox, "retry", fail)
    assert run("retry", "--all").stderr == "outbox: \\x1b[31mred\\x07\\x9b2J\\u202e\\x7f\\nnext\n"


def test_an_error_of_the_operating_system_is_one_line(run, monkeypatch, tmp_path):
    result = runner().invoke(main, ["--database", f"sqlite:///{tmp_path}/no/such/folder/x.db", "upgrade"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    result = runner().invoke(main, ["receive", "--store", str(tmp_path / "no" / "such")])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)


def test_ctrl_c_is_quiet(run, outbox, monkeypatch):
    def interrupt(_outbox, *_where, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Outbox, "retry", interrupt)
    result = run("retry", "--all")
    assert (result.exit_code, result.output) == (130, "")


def test_a_reader_that_left_is_no_failure_to_talk_about(run, outbox, monkeypatch):
    def leave(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(acting, "say", leave)
    result = run("retry", "--all")
    assert (result.exit_code, result.output) == (1, "")


def test_a_closed_pipe_is_quiet_in_a_real_process(url, outbox):
    reader, writer = os.pipe()
    os.close(reader)
    listing = process("-m", "outbox", "--database", url, "status", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert listing.communicate()[1] == b""
