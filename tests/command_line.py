"""What the tests of the command line share."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from click.testing import CliRunner

from builders import heeding_ctrl_c
from outbox.cli import config, display

IS_OFF = "capture is off (OUTBOX_CAPTURE=false)"
TOKEN = "tok-0123456789"

GOOD = '{"event_type":"rule_fired","rule_ids":["r1"],"session_id":"s1","fired_at":"2026-11-24T12:00:00Z"}'

HOSTILE = "\x1b[31mred\x07\x9b2J\u202e\x7f\nnext"

STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]")


def runner():
    try:
        return CliRunner(mix_stderr=False)
    except TypeError:  # click 8.2 and later always tell the two apart
        return CliRunner()


def logged(text):
    """Return the lines of a log of `outbox run` without their times."""
    return [re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (.*)", line)[1] for line in text.splitlines()]


def read_config(folder, text):
    """Return what an outbox.toml with this text says."""
    file = folder / "outbox.toml"
    file.write_text(text)
    return config.read(str(file))


def process(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with heeding_ctrl_c():
        return subprocess.Popen([sys.executable, *arguments], env=environment, **options)


def output_of(code):
    return process("-c", code, stdout=subprocess.PIPE).communicate()[0].decode().split()


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
