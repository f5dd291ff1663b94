"""The commands that deliver: flush and run."""

from __future__ import annotations

import dataclasses
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import click

from outbox import capture
from outbox.cli.bounds import bounds_options
from outbox.cli.display import Bar, as_json, say
from outbox.cli.endings import UNDELIVERED, exit_code_of, sigterm_like_ctrl_c
from outbox.cli.logs import Form, run_log, shown_log
from outbox.cli.options import heartbeat_option, json_option, uses_database
from outbox.cli.service import Service, Services, service_options
from outbox.clock import now_ms
from outbox.destinations import stored
from outbox.failures import ConfigurationError, OutboxError
from outbox.outbox import Outbox
from outbox.policy import Policy
from outbox.records import NOT_LOGGED_IN
from outbox.storage.engines import shown_url
from outbox.words import escape, when

if TYPE_CHECKING:
    from outbox.records import FlushReport, UploadClient

log = logging.getLogger("outbox.run")

_CHECK_WORKER_EVERY_S = 10
_FLUSHES_AT_ONCE = 16
_sleep = time.sleep


class _Flushed(NamedTuple):
    report: FlushReport
    next_due_ms: int | None = None
    """When the next event is due. None if there is none, or if a single batch was asked for."""
    ended_at_ms: int = 0

    @property
    def left_due(self) -> bool:
        """Whether an event that should have been sent is due."""
        return self.next_due_ms is not None and self.next_due_ms <= self.ended_at_ms


_Flush: TypeAlias = "Callable[..., _Flushed]"


@click.command(epilog="Example: OUTBOX_TOKEN_FILE=token outbox flush --all --url https://api.example.com")
@service_options
@click.option(
    "--all", "everything", is_flag=True, help="Keep sending until nothing is due or the service itself fails."
)
@bounds_options
@uses_database
@json_option
@click.pass_context
def flush(
    context: click.Context, database: str, services: Services, *, everything: bool, policy: Policy, in_json: bool
) -> None:
    """Send one batch of due events of a destination.

    With --all, but without --destination, all destinations in outbox.toml are served, up to 16 at the same time.
    After Ctrl-C, their current requests are finished. The token of the destination `default` comes from
    OUTBOX_TOKEN, or from the file that OUTBOX_TOKEN_FILE names; the file is read before each request. Other
    credentials are named in outbox.toml. Exit code 3: an event that was due was not delivered.
    """
    chosen = services.every if everything else [services.chosen]
    exit_codes = set()
    with ExitStack() as opened:
        clients = [opened.enter_context(service.client()) for service in chosen]
        outbox = opened.enter_context(Outbox(database, policy=policy))
        opened.enter_context(shown_log())
        opened.enter_context(sigterm_like_ctrl_c())
        flushes: list[_Flush] = [
            partial(_flush, outbox, client, service.destination, everything=everything)
            for service, client in zip(chosen, clients, strict=True)
        ]
        if len(flushes) > 1:
            flushes = opened.enter_context(_at_once(flushes))
        for service, flushed in zip(chosen, flushes, strict=True):
            of = f"{escape(service.destination)}: " if len(chosen) > 1 else ""
            try:
                done = flushed()
            except OutboxError as error:
                if not of:
                    raise
                say(f"outbox: {of}{escape(str(error))}", err=True)
                exit_codes.add(exit_code_of(error))
                continue
            report = done.report
            if in_json:
                say(as_json({"destination": service.destination, **dataclasses.asdict(report)}))
            _say_report(done, service, of, in_json=in_json)
            if report.skipped is not None or report.sent < report.claimed or done.left_due:
                exit_codes.add(UNDELIVERED)
    context.exit(min(exit_codes, default=0))


@contextmanager
def _at_once(flushes: list[_Flush]) -> Iterator[list[_Flush]]:
    """Run flushes in threads, so that a service that hangs delays no other; yield functions that wait for each.

    No flush begins a batch after the end of the block.
    """
    is_over = threading.Event()

    def go_on(_batch: FlushReport) -> None:
        if is_over.is_set():
            raise KeyboardInterrupt

    pool = ThreadPoolExecutor(min(len(flushes), _FLUSHES_AT_ONCE))
    try:
        yield [pool.submit(flush, progress=go_on).result for flush in flushes]
    finally:
        is_over.set()
        pool.shutdown(cancel_futures=True)


def _flush(
    outbox: Outbox,
    client: UploadClient,
    destination: str,
    *,
    everything: bool,
    progress: Callable[[FlushReport], object] | None = None,
) -> _Flushed:
    """Send one batch, or everything that is due. Draw a bar if `progress` is not given."""
    if not everything:
        return _Flushed(outbox.flush(client, destination=destination))
    views, of = outbox.store.views, stored(destination)
    if progress is not None:
        report = outbox.flush_all(client, destination=destination, progress=progress)
    else:
        with Bar("Sending", total=views.pending_count(of)) as bar:
            report = outbox.flush_all(
                client, destination=destination, progress=lambda batch: bar.advance(batch.claimed)
            )
    now = outbox.store.now_ms()
    return _Flushed(report, views.next_due_ms(of, now_ms=now), now)


def _say_report(done: _Flushed, service: Service, of: str, *, in_json: bool) -> None:
    """Print the report; `of` precedes each line."""
    report = done.report
    if in_json:
        pass
    elif report.claimed:
        say(
            f"{of}{report.attempted} attempted, {report.sent} sent, {report.rescheduled} rescheduled,"
            f" {report.parked} parked, {report.abandoned} abandoned"
        )
    elif report.skipped is None:
        say(f"{of}{_nothing_due(done)}")
    if report.skipped is not None:
        more = " more" if report.claimed else ""
        say(f"outbox: {of}nothing{more} was sent: {escape(report.skipped + _way_out(report, service))}", err=True)
    elif report.failure is not None:
        say(f"outbox: {of}last failure: {escape(report.failure)}", err=True)
    elif report.abandoned:  # their payloads are no JSON objects, so no request failed
        say(f"outbox: {of}`outbox list --status abandoned` shows why", err=True)


def _nothing_due(done: _Flushed) -> str:
    if done.next_due_ms is None:
        return "nothing is due"
    if done.left_due:  # a parked event has just become due, to try the token
        return "nothing was sent, but an event is due now; run the command again"
    until = when(done.next_due_ms, now_ms=done.ended_at_ms)
    return f"nothing is due until {until}; `outbox status` says what the events wait for"


def _way_out(report: FlushReport, service: Service) -> str:
    """Return what to do so that events are sent again."""
    if report.paused_until_ms is not None:
        until = when(report.paused_until_ms, now_ms=now_ms())
        return f"; the pause ends at {until}, or when you run `outbox retry --all`"
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
@click.option(
    "--log-format",
    type=click.Choice(("text", "json")),
    default="text",
    show_default=True,
    help="Format of the log: lines with time, level and message, or JSON objects that also have the details.",
)
@click.option(
    "-v", "--verbose", count=True, help="Also log each event that is not delivered; -vv logs each delivery, too."
)
@click.option("-q", "--quiet", is_flag=True, help="Log only warnings and errors.")
@heartbeat_option
@bounds_options
@uses_database
def run(
    database: str,
    services: Services,
    *,
    concurrency: int,
    grace: int,
    metrics_port: int | None,
    metrics_address: str,
    log_format: Form,
    verbose: int,
    quiet: bool,
    heartbeat: Path | None,
    policy: Policy,
) -> None:
    """Deliver events as soon as they are due, until SIGTERM or Ctrl-C.

    All destinations in outbox.toml are served; --destination chooses one. After SIGTERM or Ctrl-C, batches that
    are being sent have the grace period to finish. Events that were not sent by its end return to the queue. The
    token of the destination `default` comes from OUTBOX_TOKEN, or from the file that OUTBOX_TOKEN_FILE names; the
    file is read before each request. Other credentials are named in outbox.toml. If a token or another credential
    changes, the parked and waiting events of its destination are retried immediately. The log goes to standard
    error.
    """
    from outbox.worker import Worker  # noqa: PLC0415 - slow to load: only this command needs it

    with ExitStack() as opened:
        opened.enter_context(run_log(log_format, verbose=verbose, quiet=quiet))
        outbox = opened.enter_context(Outbox(database, policy=policy))
        clients = {
            service.destination: opened.enter_context(
                service.client(on_new_credentials=partial(outbox.retry_now, destination=service.destination))
            )
            for service in services.every
        }
        opened.enter_context(_served_metrics(outbox, metrics_port, metrics_address))
        if "opentelemetry.metrics" in sys.modules:  # as `opentelemetry-instrument outbox run` does
            from outbox.meter import OutboxMeter  # noqa: PLC0415 - it loads OpenTelemetry

            OutboxMeter(outbox)
        opened.enter_context(sigterm_like_ctrl_c())
        worker = Worker(outbox, clients, concurrency=concurrency, heartbeat=heartbeat)
        try:
            if not capture.is_off():  # otherwise the worker logs that capture is off
                where = shown_url(outbox.engine)
                for service in services.every:
                    log.info(
                        "delivering%s from %s to %s",
                        f" {service.destination}" if len(clients) > 1 else "",
                        where,
                        service.name,
                        extra={"event_name": "outbox.delivering", "destination": service.destination},
                    )
            while True:
                worker.start()  # also replaces a thread that died
                _sleep(_CHECK_WORKER_EVERY_S)
        except KeyboardInterrupt:
            log.info("stopping", extra={"event_name": "outbox.stopping"})
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
        log.info("metrics at %s", url, extra={"event_name": "outbox.metrics_served", "url": url})
        yield


COMMANDS = (flush, run)
