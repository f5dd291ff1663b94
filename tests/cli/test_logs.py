from __future__ import annotations

import json
import logging

import pytest

from builders import row, rule_fired
from command_line import HOSTILE, STEERING, logged
from conditions import until
from outbox import ConfigurationError, StorageError
from outbox.cli import logs, sending
from outbox.cli.logs import run_log, shown_log

log = logging.getLogger("outbox")


def say_all() -> None:
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        log.log(level, "library", extra={"event_name": "outbox.test"})
    logs.log.info("run", extra={"event_name": "outbox.test"})


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"quiet": True}, ["WARNING library"]),
        ({}, ["WARNING library", "INFO run"]),
        ({"verbose": 1}, ["INFO library", "WARNING library", "INFO run"]),
        ({"verbose": 2}, ["DEBUG library", "INFO library", "WARNING library", "INFO run"]),
    ],
)
def test_verbose_adds_levels_and_quiet_takes_them_away(capsys, options, shown) -> None:
    with run_log("text", **{"verbose": 0, "quiet": False, **options}):
        say_all()
    assert logged(capsys.readouterr().err) == shown
    assert (log.level, logs.log.level, log.handlers) == (logging.NOTSET, logging.NOTSET, [])


@pytest.mark.usefixtures("noon")
def test_a_line_of_json_has_the_time_the_level_and_the_details(capsys) -> None:
    with run_log("json", verbose=0, quiet=False):
        details = {"event_name": "outbox.test", "row_ids": [1], "odd": {2}}
        log.warning("lost %d events", 2, extra=details)
    assert json.loads(capsys.readouterr().err) == {
        "time": "2026-11-24T12:00:00.000Z",
        "level": "warning",
        "message": "lost 2 events",
        "event_name": "outbox.test",
        "row_ids": [1],
        "odd": "{2}",
    }


@pytest.mark.usefixtures("noon")
def test_a_traceback_is_a_field_of_json_and_lines_of_text(capsys) -> None:
    for form in ("json", "text"):
        with run_log(form, verbose=0, quiet=False):
            log.warning("failed", exc_info=ValueError(form))
    first, *lines = capsys.readouterr().err.splitlines()
    assert json.loads(first)["exception"].endswith("ValueError: json")
    assert lines[0] == "2026-11-24T12:00:00.000Z WARNING failed"
    assert lines[-1] == "2026-11-24T12:00:00.000Z WARNING ValueError: text"


@pytest.mark.parametrize(
    "opened",
    [shown_log, lambda: run_log("text", verbose=0, quiet=False), lambda: run_log("json", verbose=0, quiet=False)],
)
def test_the_log_steers_no_terminal(capsys, opened) -> None:
    with opened():
        log.warning("%s", HOSTILE, extra={"detail": HOSTILE})
    assert "red" in (shown := capsys.readouterr().err)
    assert not STEERING.search(shown)


@pytest.mark.parametrize(
    ("error", "exit_code"), [(ConfigurationError("bad"), 2), (StorageError("bad"), 1), (OSError("bad"), 1)]
)
def test_the_error_that_ends_run_is_logged_like_the_rest(
    run, outbox, logged_in, monkeypatch, error, exit_code
) -> None:
    def fail(_seconds):
        raise error

    monkeypatch.setattr(sending, "_sleep", fail)
    result = run("run", "--log-format", "json", "-q")
    assert result.exit_code == exit_code
    told = json.loads(result.stderr)
    assert (told["level"], told["message"], told["event_name"]) == ("error", "bad", "outbox.run_failed")


def test_run_tells_what_became_of_events(run, outbox, logged_in, server, monkeypatch) -> None:
    def stop(_seconds):
        until(lambda: row(outbox, row_id).retry_count)
        raise KeyboardInterrupt

    monkeypatch.setattr(sending, "_sleep", stop)
    server.set_mode("down")
    row_id = outbox.enqueue(rule_fired(), event_id="order-17")
    result = run("run", "--log-format", "json", "--verbose")
    told = {one["event_name"]: one for one in map(json.loads, result.stderr.splitlines())}
    assert {"outbox.delivering", "outbox.rescheduled", "outbox.stopping"} <= told.keys()
    rescheduled = told["outbox.rescheduled"]
    assert (rescheduled["row_ids"], rescheduled["event_ids"]) == ([row_id], ["order-17"])
    assert {one["destination"] for name, one in told.items() if name != "outbox.stopping"} == {"default"}


def test_verbose_and_quiet_exclude_each_other(run, outbox, logged_in) -> None:
    result = run("run", "-v", "-q")
    assert result.exit_code == 2
    assert "--verbose and --quiet are both given, expected one of them" in result.stderr
