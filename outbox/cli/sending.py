"""The commands that deliver, and the probe that checks on them: flush, run and health."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from outbox import capture
from outbox.cli.bounds import bounds_options
from outbox.cli.display import Bar, as_json, escape, say, shown_log, when
from outbox.cli.endings import UNDELIVERED, fail, sigterm_like_ctrl_c
from outbox.cli.options import duration_ms, heartbeat_option, json_option, uses_database
from outbox.cli.service import Service, service_options
from outbox.clock import now_ms
from outbox.failures import ConfigurationError
from outbox.outbox import Outbox
from outbox.policy import Policy
from outbox.stats import duration

if TYPE_CHECKING:
    from outbox.records import FlushReport

_CHECK_WORKER_EVERY_S = 10
_sleep = time.sleep


@click.command(epilog="Example: OUTBOX_TOKEN_FILE=token outbox flush --all --url https://api.example.com")
@service_options
@click.option(
    "--all", "everything", is_flag=True, help="Keep sending until nothing is due or the service itself fails."
)
@bounds_options
@uses_database
@json_option
@click.pass_context
def flush(  # noqa: PLR0913 - click passes each option by its name
    context: click.Context, database: str, service: Service, *, everything: bool, policy: Policy, in_json: bool
) -> None:
    """Send one batch of due events.

    The token comes from OUTBOX_TOKEN, or from the file that OUTBOX_TOKEN_FILE names; the file is read before each
    request. Other credentials are named in outbox.toml. Exit code 3: not every event was delivered.
    """
    with (
        service.client() as client,
        Outbox(database, policy=policy) as outbox,
        shown_log(),
        sigterm_like_ctrl_c(),
    ):
        if everything:
            with Bar("Sending", total=outbox.pending_count()) as bar:
                report = outbox.flush_all(client, progress=lambda batch: bar.advance(batch.claimed))
            next_due_ms = outbox.stats().next_due_at_ms
            is_complete = next_due_ms is None or next_due_ms > now_ms()
        else:
            report = outbox.flush(client)
            is_complete = True
    if in_json:
        say(as_json(dataclasses.asdict(report)))
    elif report.claimed:
        say(
            f"{report.attempted} attempted, {report.sent} sent, {report.rescheduled} rescheduled,"
            f" {report.parked} parked, {report.abandoned} abandoned"
        )
    elif report.skipped is None:
        say("nothing is due")
    if report.skipped is not None:
        more = " more" if report.claimed else ""
        fail(f"nothing{more} was sent: {report.skipped}{_way_out(report, service)}", UNDELIVERED)
    if report.failure is not None:
        say(f"outbox: last failure: {escape(report.failure)}", err=True)
    elif report.abandoned:  # their payloads are no JSON objects, so no request failed
        say("outbox: `outbox list --status abandoned` shows why", err=True)
    if report.sent < report.claimed or not is_complete:
        context.exit(UNDELIVERED)


def _way_out(report: FlushReport, service: Service) -> str:
    """Return what to do so that events are sent again."""
    from outbox.flusher import NOT_LOGGED_IN  # noqa: PLC0415 - only a flush needs it

    if report.paused_until_ms is not None:
        until = when(report.paused_until_ms, now_ms=now_ms())
        return f"; the pause ends at {until}, or when you run `outbox retry`"
    return f"; {service.way_to_log_in}" if report.skipped == NOT_LOGGED_IN else ""


@click.command(epilog="Example: OUTBOX_TOKEN_FILE=token outbox run --url https://api.example.com")
@service_options
@click.option(
    "--concurrency",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Maximum number of batches sent at the same time.",
)
@click.option(
    "--grace",
    metavar="SECONDS",
    type=click.IntRange(0, 3_600),
    default=8,
    show_default=True,
    help="Maximum time to finish after SIGTERM or Ctrl-C.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65_535),
    help="Serve Prometheus metrics on this port; 0 picks a free port.",
)
@click.option(
    "--metrics-address",
    metavar="ADDRESS",
    default="127.0.0.1",
    show_default=True,
    help="Address on which metrics are served.",
)
@heartbeat_option
@bounds_options
@uses_database
def run(  # noqa: PLR0913 - click passes each option by its name
    database: str,
    service: Service,
    *,
    concurrency: int,
    grace: int,
    metrics_port: int | None,
    metrics_address: str,
    heartbeat: Path | None,
    policy: Policy,
) -> None:
    """Deliver events as soon as they are due, until SIGTERM or Ctrl-C.

    After SIGTERM or Ctrl-C, batches that are being sent have the grace period to finish. Events that were not sent
    by its end return to the queue. The token comes from OUTBOX_TOKEN, or from the file that OUTBOX_TOKEN_FILE
    names; the file is read before each request. Other credentials are named in outbox.toml. If the token or
    another credential changes, parked and waiting events are retried immediately. The log goes to standard error.
    """
    from outbox.worker import Worker  # noqa: PLC0415 - only this command needs it

    with (
        Outbox(database, policy=policy) as outbox,
        service.client(on_new_credentials=outbox.retry_now) as client,
        shown_log(),
        _served_metrics(outbox, metrics_port, metrics_address),
        sigterm_like_ctrl_c(),
    ):
        worker = Worker(outbox, client, concurrency=concurrency, heartbeat=heartbeat)
        try:
            if not capture.is_off():  # otherwise the worker logs that capture is off
                where = outbox.engine.url.render_as_string(hide_password=True)
                say(f"outbox: delivering from {escape(where)} to {escape(service.name)}", err=True)
            while True:
                worker.start()  # also replaces a thread that died
                _sleep(_CHECK_WORKER_EVERY_S)
        except KeyboardInterrupt:
            say("outbox: stopping", err=True)
        finally:
            worker.stop(grace)


@contextmanager
def _served_metrics(outbox: Outbox, port: int | None, address: str) -> Iterator[None]:
    if port is None:
        yield
        return
    try:
        from outbox.metrics import serve  # noqa: PLC0415 - needs an extra
    except ImportError:
        raise ConfigurationError(
            "--metrics-port needs prometheus-client: pip install 'observation-outbox[prometheus]'"
        ) from None
    with serve(outbox, port=port, address=address) as url:
        say(f"outbox: metrics at {escape(url)}", err=True)
        yield


@click.command(epilog="Example: outbox health --max-overdue 10m")
@click.option(
    "--max-overdue",
    metavar="AGE",
    default="10m",
    show_default=True,
    callback=duration_ms,
    help="Maximum time that an event may be due without being sent.",
)
@click.option("--live", is_flag=True, help="Do not check for overdue events.")
@heartbeat_option
@click.option(
    "--max-silence",
    metavar="AGE",
    default="5m",
    show_default=True,
    callback=duration_ms,
    help="Maximum time since the worker last touched its heartbeat file.",
)
@uses_database
@json_option
def health(  # noqa: PLR0913 - click passes each option by its name
    database: str,
    *,
    max_overdue: int,
    live: bool,
    heartbeat: Path | None,
    max_silence: int,
    in_json: bool,
) -> None:
    """Report by exit code whether events are delivered, for probes.

    Exit code 1: the database can't be reached, or its schema does not fit this program. Exit code 3: either events
    are overdue, because nothing delivers them or delivery is too slow; or the heartbeat file was not touched for
    too long, so the worker's process should be restarted. Events that wait after a failed try, and parked events,
    are not overdue.
    """
    with Outbox(database) as outbox:
        overdue_ms = None if live else outbox.overdue_ms()
    silent_ms = None if heartbeat is None else now_ms() - _touched_ms(heartbeat)
    if capture.is_off():
        say(f"outbox: {capture.IS_OFF}", err=True)
    if in_json:
        say(as_json({"overdue_ms": overdue_ms, "silent_ms": silent_ms}))
    if silent_ms is not None and silent_ms > max_silence:
        fail(
            f"the worker has not touched its heartbeat file {str(heartbeat)!r} for {duration(silent_ms)};"
            " restart its process",
            UNDELIVERED,
        )
    if overdue_ms is not None and overdue_ms > max_overdue:
        fail(
            f"an event has been due for {duration(overdue_ms)}; check that `outbox run` or another flusher is"
            " running, and what `outbox status` shows",
            UNDELIVERED,
        )
    if not in_json:
        say("ok")


def _touched_ms(heartbeat: Path) -> int:
    try:
        return heartbeat.stat().st_mtime_ns // 1_000_000
    except FileNotFoundError:
        fail(f"there is no heartbeat file {str(heartbeat)!r}: no worker that touches it was started", UNDELIVERED)


COMMANDS = (flush, run, health)
