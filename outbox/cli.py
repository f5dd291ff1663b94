"""The command line. Hooks and cron jobs start it for every event, so a command imports what it alone needs."""

from __future__ import annotations

import codecs
import dataclasses
import errno
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import click
import msgspec

from outbox import capture, schema
from outbox.clock import epoch_ms, now_ms
from outbox.database import default_url, open_engine
from outbox.display import (
    Bar,
    as_json,
    escape,
    event_as_dict,
    event_in_words,
    list_in_words,
    say,
    shown_log,
    status_as_dict,
    status_in_words,
    what_next,
    when,
)
from outbox.events import MAX_PAYLOAD_BYTES, encode
from outbox.failures import ConfigurationError, InvalidEvent, OutboxError
from outbox.lifecycle import Status
from outbox.outbox import LARGEST_ID, Outbox
from outbox.stats import duration

FAILED, MISUSE, UNDELIVERED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes: it could not be done; wrong use, settings or input; not all delivered; Ctrl-C."""

_RECEIVE_MODES = ("ok", "down", "overloaded", "revoked", "hang", "drop")
_POLL_S = 0.1
_LONG_S = 3_600
_ERRORS_SHOWN = 10
# Reading less than this takes no time that a bar would have to explain.
_BAR_FROM_BYTES = 1024 * 1024
_UNIT_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


class _Main(click.Group):
    """Turns every error that is no bug into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ConfigurationError, InvalidEvent) as error:
            _fail(str(error), MISUSE)
        except OutboxError as error:
            _fail(str(error), FAILED)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # who read our output has left, about which click says nothing
            _fail(str(error), FAILED)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


def _fail(message: str, exit_code: int) -> NoReturn:
    say(f"outbox: {escape(message)}", err=True)
    raise click.exceptions.Exit(exit_code)


def _moment(_context: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """Return epoch ms of an age, or of a date and time with its zone."""
    if value is None:
        return None
    age_ms = _age_ms(value)
    if age_ms is not None:
        return now_ms() - age_ms
    with suppress(ValueError):
        moment = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", value))
        if moment.tzinfo is not None:
            return epoch_ms(moment)
    raise click.BadParameter(
        f"{escape(value)!r}, expected an age such as 30s, 15m, 12h or 7d,"
        " or a date and time with its zone such as 2026-11-24T12:00:00Z"
    )


def _duration(_context: click.Context, _param: click.Parameter, value: str) -> int:
    """Return the ms of an age."""
    age_ms = _age_ms(value)
    if age_ms is None:
        raise click.BadParameter(f"{escape(value)!r}, expected an age such as 30s, 15m, 12h or 7d")
    return age_ms


def _age_ms(value: str) -> int | None:
    age = re.fullmatch(r"([0-9]{1,6})([smhd])", value)
    return int(age.group(1)) * _UNIT_MS[age.group(2)] if age else None


def _check_database(_context: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value is not None and "://" not in value:
        # A mistyped URL may hold a password, a path holds no @.
        hint = "" if "@" in value else f"; for the file {escape(value)} it is sqlite:///{escape(value)}"
        raise click.BadParameter(f"expected an SQLAlchemy URL{hint}")
    return value


def _import_types(_context: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> None:
    if value and "" not in sys.path:
        # The directory where it was started, last: a hook runs in directories of others, whose files must not
        # take the place of what is installed.
        sys.path.append("")
    for name in value:
        if not all(map(str.isidentifier, name.split("."))):
            raise click.BadParameter(f"{escape(name)!r}, expected the name of a module, such as shop.events")
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise click.BadParameter(f"can't import {escape(name)!r}: {error}") from error


def _print_version(context: click.Context, _param: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's signature
    if value:
        from importlib import metadata  # noqa: PLC0415 - only this option needs it

        try:
            version = metadata.version("observation-outbox")
        except metadata.PackageNotFoundError:
            version = "(run from a source tree)"
        say(f"outbox {version}")
        context.exit()


_json = click.option("--json", "as_json_", is_flag=True, help="Print JSON.")


@click.group(cls=_Main, epilog="Example: outbox --database sqlite:///outbox.db status")
@click.option(
    "--database",
    metavar="URL",
    envvar="OUTBOX_DATABASE_URL",
    show_envvar=True,
    callback=_check_database,
    help="SQLAlchemy URL of the database; without it the per-user default file.",
)
@click.option(
    "--types",
    metavar="MODULE",
    multiple=True,
    envvar="OUTBOX_TYPES",
    show_envvar=True,
    expose_value=False,
    callback=_import_types,
    help="Import this module, installed or in the current directory, with event types of your own. May be"
    " repeated; the variable takes several, with spaces between.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
@click.pass_context
def main(context: click.Context, database: str | None) -> None:
    """Keep events in a database until an HTTP service has taken them.

    Exit codes: 0 done, 1 failed, 2 wrong use, settings or input, 3 not all delivered.
    """
    context.obj = database


@main.command(epilog="Example: outbox --database sqlite:///outbox.db upgrade")
@_json
@click.pass_obj
def upgrade(database: str | None, *, as_json_: bool) -> None:
    """Create the database or upgrade its schema."""
    engine = open_engine(database or default_url())
    try:
        before = schema.upgrade(engine)
    finally:
        engine.dispose()
    where = engine.url.render_as_string(hide_password=True)
    after = schema.REVISIONS[-1]
    if as_json_:
        say(as_json({"database": where, "from": before, "to": after}))
    elif before == after:
        say(f"{escape(where)}: nothing to do, the schema is {after}")
    else:
        say(f"{escape(where)}: upgraded from {before or 'no outbox schema'} to {after}")


@main.command(epilog="""Example: echo '{"event_type": "rule_fired", ...}' | outbox enqueue""")
@click.argument(
    "files", metavar="[FILE]...", nargs=-1, type=click.Path(exists=True, dir_okay=False, allow_dash=True)
)
@click.option("--skip-invalid", is_flag=True, help="Write the valid lines of a file that has invalid ones.")
@_json
@click.pass_context
def enqueue(context: click.Context, files: tuple[str, ...], *, skip_invalid: bool, as_json_: bool) -> None:
    """Record events, one JSON object a line.

    They come from files or standard input. Each file is written as a whole or, if a line is invalid, not at all.
    The database is created or upgraded where that is needed.
    """
    if capture.is_off():
        say(f"outbox: nothing recorded, {capture.IS_OFF}", err=True)
        return
    refused = 0
    with Outbox.open(context.obj) as outbox:
        for name in files or ("-",):
            shown = "standard input" if name == "-" else escape(name)
            events, invalid = _read_events(name, shown, show_all=skip_invalid)
            is_refused = invalid > 0 and not skip_invalid
            ids = [] if is_refused else outbox.enqueue_many(events)
            refused += is_refused
            if is_refused:
                say(f"outbox: {shown}: {invalid} invalid, nothing of it is recorded", err=True)
            if as_json_:
                say(as_json({"file": name, "enqueued": len(ids), "invalid": invalid, "ids": ids}))
            elif not is_refused:
                say(f"{shown}: {len(ids)} recorded" + (f", from id {ids[0]} on" if ids else ""))
    if refused:
        context.exit(MISUSE)


@main.command(epilog="Example: OUTBOX_TOKEN_FILE=token outbox flush --all --url https://api.example.com")
@click.option("--url", required=True, envvar="OUTBOX_URL", show_envvar=True, help="Base URL of the service.")
@click.option("--all", "everything", is_flag=True, help="Go on until nothing is due, or a failure holds for all.")
@_json
@click.pass_context
def flush(context: click.Context, url: str, *, everything: bool, as_json_: bool) -> None:
    """Send one batch of the events that are due.

    The token comes from the environment: OUTBOX_TOKEN, or OUTBOX_TOKEN_FILE, a file that is read before each
    request. Exit code 3 says that not all was delivered.
    """
    if capture.is_off():
        _fail(f"nothing was tried, {capture.PAUSED}", UNDELIVERED)
    from outbox.client import HttpClient  # noqa: PLC0415 - it brings requests along

    with HttpClient(url, token=_token) as client:
        if not client.logged_in:
            _fail("not logged in, nothing was tried; set OUTBOX_TOKEN or OUTBOX_TOKEN_FILE", UNDELIVERED)
        with _existing(context.obj) as outbox, shown_log(), _sigterm_like_ctrl_c():
            if everything:
                with Bar("Sending", total=outbox.pending_count()) as bar:
                    report = outbox.flush_all(client, progress=lambda batch: bar.advance(batch.claimed))
                next_due_ms = outbox.stats().next_due_at_ms
                is_complete = next_due_ms is None or next_due_ms > now_ms()
            else:
                report = outbox.flush(client)
                is_complete = True
    if as_json_:
        say(as_json(dataclasses.asdict(report)))
    elif report.claimed:
        say(
            f"{report.attempted} attempted, {report.sent} sent, {report.rescheduled} rescheduled,"
            f" {report.parked} parked, {report.abandoned} abandoned"
        )
    elif report.paused_until_ms is not None:
        say(
            f"the service is left alone until {when(report.paused_until_ms, now_ms=now_ms())};"
            " `outbox retry` ends that"
        )
    else:
        say("nothing was due")
    if report.failure is not None:
        say(f"outbox: the last failure: {escape(report.failure)}", err=True)
    elif report.abandoned:  # their payloads can't be read, so there was no request that failed
        say("outbox: `outbox list --state abandoned` shows why", err=True)
    if report.sent < report.claimed or report.paused_until_ms is not None or not is_complete:
        context.exit(UNDELIVERED)


@main.command(epilog="Example: OUTBOX_TOKEN_FILE=token outbox run --url https://api.example.com")
@click.option("--url", required=True, envvar="OUTBOX_URL", show_envvar=True, help="Base URL of the service.")
@click.option(
    "--concurrency", type=click.IntRange(1, 64), default=1, show_default=True, help="Batches under way at once."
)
@click.option(
    "--grace",
    metavar="SECONDS",
    type=click.IntRange(0, 3_600),
    default=8,
    show_default=True,
    help="How long the end may take after SIGTERM or Ctrl-C.",
)
@click.option(
    "--metrics-port", type=click.IntRange(0, 65_535), help="Serve metrics for Prometheus; 0 takes a free one."
)
@click.option(
    "--metrics-address", metavar="ADDRESS", default="127.0.0.1", show_default=True, help="Where to serve them."
)
@click.pass_context
def run(  # noqa: PLR0913 - click passes each option by its name
    context: click.Context,
    url: str,
    *,
    concurrency: int,
    grace: int,
    metrics_port: int | None,
    metrics_address: str,
) -> None:
    """Deliver events as they come, until SIGTERM or Ctrl-C.

    What is being sent then is finished, or given back when the grace period ends. The token comes from the
    environment: OUTBOX_TOKEN, or OUTBOX_TOKEN_FILE, a file that is read before each request. When another token
    stands there, what is parked or waits is tried again at once. The log goes to standard error.
    """
    from outbox.client import HttpClient  # noqa: PLC0415 - it brings requests along
    from outbox.worker import Worker  # noqa: PLC0415 - only this command needs it

    known = _token()

    def token() -> str | None:
        nonlocal known
        current = _token()
        if current and current != known:
            outbox.retry_now()
        known = current
        return current

    with (
        HttpClient(url, token=token) as client,
        _existing(context.obj) as outbox,
        shown_log(),
        _served_metrics(outbox, metrics_port, metrics_address),
        _sigterm_like_ctrl_c(),
    ):
        worker = Worker(outbox, client, concurrency=concurrency)
        try:
            if not capture.is_off():  # else the worker says so
                where = outbox.engine.url.render_as_string(hide_password=True)
                say(f"outbox: delivering from {escape(where)} to {escape(url)}", err=True)
            worker.start()
            while True:
                time.sleep(_LONG_S)
        except KeyboardInterrupt:
            say("outbox: ending", err=True)
        finally:
            worker.stop(grace)


@main.command(epilog="Example: outbox health --max-overdue 10m")
@click.option(
    "--max-overdue",
    metavar="AGE",
    default="10m",
    show_default=True,
    callback=_duration,
    help="How long an event may be due without anybody delivering it.",
)
@click.option("--live", is_flag=True, help="Only look whether the database can be reached and its schema fits.")
@_json
@click.pass_context
def health(context: click.Context, *, max_overdue: int, live: bool, as_json_: bool) -> None:
    """Tell by the exit code whether all is well, for probes.

    Exit code 1: the database can't be reached, or its schema does not fit. Exit code 3: events are overdue, so
    nobody delivers here, or not fast enough. Events that wait after a failed try, or are parked, are not overdue.
    """
    with _existing(context.obj) as outbox:
        overdue_ms = 0 if live else outbox.overdue_ms()
    if capture.is_off():
        say(f"outbox: {capture.PAUSED}", err=True)
    if as_json_:
        say(as_json({"overdue_ms": None if live else overdue_ms}))
    if overdue_ms > max_overdue:
        _fail(
            f"an event has been due for {duration(overdue_ms)}; look whether `outbox run` or another flusher runs,"
            " and what `outbox status` says",
            UNDELIVERED,
        )
    if not as_json_:
        say("ok")


@main.command(epilog="Example: outbox status --watch 5")
@click.option(
    "--watch",
    "watch_s",
    metavar="[SECONDS]",
    type=click.IntRange(1, _LONG_S),
    is_flag=False,
    flag_value=2,
    help="Show it again every so many seconds, 2 if not said, with the rates meanwhile, until Ctrl-C.",
)
@_json
@click.pass_obj
def status(database: str | None, *, watch_s: int | None, as_json_: bool) -> None:
    """Show what is queued, what is stuck, and the likely cause."""
    with _existing(database) as outbox:
        where = outbox.engine.url.render_as_string(hide_password=True)
        if watch_s is not None:
            from outbox.watch import watch  # noqa: PLC0415 - it brings Rich along

            with _sigterm_like_ctrl_c(), suppress(KeyboardInterrupt):
                watch(outbox, where, interval_s=watch_s, in_json=as_json_)
            return
        stats = outbox.stats()
    if as_json_:
        say(as_json(status_as_dict(stats, where)))
    else:
        say(status_in_words(stats, where, now_ms=now_ms()))


@main.command("list", epilog="Example: outbox list --state abandoned --older-than 7d")
@click.option("--state", type=click.Choice([status.value for status in Status]), help="Only events in this state.")
@click.option("--type", "event_type", metavar="NAME", help="Only events of this type.")
@click.option("--older-than", metavar="AGE", callback=_moment, help="Only events recorded before that.")
@click.option(
    "--limit", type=click.IntRange(1, LARGEST_ID - 1), default=100, show_default=True, help="At most so many."
)
@_json
@click.pass_obj
def list_events(  # noqa: PLR0913 - click passes each option by its name
    database: str | None,
    *,
    state: str | None,
    event_type: str | None,
    older_than: int | None,
    limit: int,
    as_json_: bool,
) -> None:
    """List events, oldest first."""
    with _existing(database) as outbox:
        rows = outbox.find(status=state, event_type=event_type, older_than=older_than, limit=limit + 1)
    if as_json_:
        say(as_json([event_as_dict(row) for row in rows[:limit]]))
    elif rows:
        say(list_in_words(rows[:limit]))
    else:
        say("outbox: no such events", err=True)
    if rows[limit:]:
        say(f"outbox: there are more than these {limit}; --limit shows them", err=True)


@main.command(epilog="Example: outbox show 17")
@click.argument("row_id", metavar="ID", type=click.IntRange(1, LARGEST_ID))
@_json
@click.pass_obj
def show(database: str | None, row_id: int, *, as_json_: bool) -> None:
    """Show one event, and what will happen to it next."""
    with _existing(database) as outbox:
        row = outbox.get(row_id)
        max_age_ms = outbox.policy.max_age_ms
    if row is None:
        _fail(f"there is no event {row_id}; it was never recorded here, or is deleted", FAILED)
    now = now_ms()
    if as_json_:
        say(as_json({**event_as_dict(row), "next": what_next(row, now_ms=now, max_age_ms=max_age_ms)}))
    else:
        say(event_in_words(row, now_ms=now, max_age_ms=max_age_ms))


@main.command(epilog="Example: outbox retry")
@_json
@click.pass_obj
def retry(database: str | None, *, as_json_: bool) -> None:
    """Make everything due now that is parked or waits."""
    with _existing(database) as outbox:
        count = outbox.retry_now()
    say(as_json({"retried": count}) if as_json_ else f"{count} made due")


@main.command(epilog="Example: outbox requeue --older-than 12h --dry-run")
@click.option(
    "--older-than",
    metavar="AGE",
    required=True,
    callback=_moment,
    help="Only events recorded before that; 0s are all.",
)
@click.option("--dry-run", is_flag=True, help="Change nothing, only count.")
@_json
@click.pass_obj
def requeue(database: str | None, *, older_than: int, dry_run: bool, as_json_: bool) -> None:
    """Give abandoned events a full new chance."""
    with _existing(database) as outbox:
        report = outbox.requeue_abandoned(older_than=older_than, dry_run=dry_run)
    if as_json_:
        say(as_json({**dataclasses.asdict(report), "dry_run": dry_run}))
        return
    say(f"{report.total} would be requeued" if dry_run else f"{report.total} requeued")
    for event_type, count in report.per_type.items():
        say(f"  {escape(event_type)}: {count}")


@main.command(epilog="Example: outbox purge --type rule_fired --before 30d --dry-run")
@click.option("--type", "event_type", metavar="NAME", help="Only events of this type.")
@click.option("--before", metavar="AGE", callback=_moment, help="Only events recorded before that; 0s are all.")
@click.option("--dry-run", is_flag=True, help="Change nothing, only count.")
@_json
@click.pass_obj
def purge(
    database: str | None, *, event_type: str | None, before: int | None, dry_run: bool, as_json_: bool
) -> None:
    """Delete events for good, in whatever state they are.

    At least one of --type and --before is needed. What is deleted is counted: `outbox status` shows it. Exit
    code 1 says that some of the events are being sent right now and were left alone.
    """
    with _existing(database) as outbox:
        report = outbox.purge(event_type=event_type, before=before, dry_run=dry_run)
    if as_json_:
        say(as_json({**dataclasses.asdict(report), "dry_run": dry_run}))
    else:
        done = "would be purged" if dry_run else "purged"
        say(f"{report.total} {done}, {report.undelivered} of them undelivered")
        for name, count in report.per_type.items():
            say(f"  {escape(name)}: {count}")
    if report.in_flight:
        left = f"{report.in_flight} being sent right now"
        if dry_run:
            say(f"outbox: {left}, they would be left alone", err=True)
        else:
            _fail(f"{left}, they were left alone; purge again when that is over", FAILED)


@main.command(epilog="Example: outbox doctor")
@_json
@click.pass_obj
@click.pass_context
def doctor(context: click.Context, database: str | None, *, as_json_: bool) -> None:
    """Say what is wrong with the database.

    The exit code is 1 if anything is.
    """
    from outbox.doctor import examine  # noqa: PLC0415 - only this command needs it
    from outbox.policy import Policy  # noqa: PLC0415 - as above

    engine = open_engine(database or default_url())
    try:
        findings = examine(engine, Policy())
    finally:
        engine.dispose()
    if as_json_:
        say(as_json([finding._asdict() for finding in findings]))
    else:
        for finding in findings:
            say(f"{'ok' if finding.is_well else 'WRONG':5}  {finding.check:11}  {escape(finding.words)}")
    if not all(finding.is_well for finding in findings):
        context.exit(FAILED)


@main.command(epilog="Example: outbox receive --port 8787 --mode overloaded")
@click.option("--port", type=click.IntRange(0, 65_535), default=0, show_default=True, help="0 takes a free one.")
@click.option("--store", metavar="FILE", type=click.Path(dir_okay=False), help="Append what arrives to this file.")
@click.option(
    "--mode", type=click.Choice(_RECEIVE_MODES), default="ok", show_default=True, help="How to answer at first."
)
@click.option(
    "--reject-marker",
    metavar="TEXT",
    default="poison",
    show_default=True,
    help="Reject batches with an event that contains this.",
)
def receive(*, port: int, store: str | None, mode: Any, reject_marker: str) -> None:
    """Receive events on this machine, to try things out, until Ctrl-C.

    With OUTBOX_TOKEN or OUTBOX_TOKEN_FILE set, requests must bring that token. The mode is changed by
    POST /control with {"mode": "down"}; GET /received counts what arrived.
    """
    from outbox.receiver import IngestServer  # noqa: PLC0415 - it brings http.server along

    server = IngestServer(port=port, token=_token(), store=store, poison=reject_marker)
    server.set_mode(mode)
    seen = 0
    with server, _sigterm_like_ctrl_c(), suppress(KeyboardInterrupt):
        say(server.url)
        while True:
            time.sleep(_POLL_S)
            for request in server.requests[seen:]:
                seen += 1
                answer = "no answer" if request.status is None else request.status
                say(f"POST {escape(request.path)} {request.events} events: {answer}")


@main.command(epilog="Example: outbox demo")
@click.pass_context
def demo(context: click.Context) -> None:
    """Watch events survive an outage, a rejected token and a bad event."""
    from outbox.demo import run  # noqa: PLC0415 - it brings all of it along

    context.exit(run())


@contextmanager
def _served_metrics(outbox: Outbox, port: int | None, address: str) -> Iterator[None]:
    if port is None:
        yield
        return
    try:
        from outbox.metrics import serve  # noqa: PLC0415 - it needs an extra
    except ImportError:
        raise ConfigurationError(
            "--metrics-port needs prometheus-client: pip install 'observation-outbox[prometheus]'"
        ) from None
    with serve(outbox, port=port, address=address) as url:
        say(f"outbox: metrics at {escape(url)}", err=True)
        yield


def _existing(database: str | None) -> Outbox:
    return Outbox(database or default_url())


def _token() -> str | None:
    """Return the token, or None; the environment and the file are read anew each time."""
    name = "OUTBOX_TOKEN"
    token = os.environ.get(name, "").strip()
    path = os.environ.get("OUTBOX_TOKEN_FILE")
    if not token and path:
        name = "OUTBOX_TOKEN_FILE"
        try:
            token = Path(path).expanduser().read_text(encoding="ascii").strip()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not ASCII text"
            raise ConfigurationError(f"{name} is {path!r}, expected a file with the token: {reason}") from None
    if not re.fullmatch("[!-~]*", token):
        raise ConfigurationError(f"{name} holds white space or other than ASCII, expected one word")
    return token or None


@contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM interrupt, so that a flush gives back what it holds."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _read_events(name: str, shown: str, *, show_all: bool) -> tuple[list[dict[str, Any]], int]:
    """Return the events of a file and the number of its invalid lines, which are reported."""
    events = []
    invalid = 0
    size = None if name == "-" else Path(name).stat().st_size or None
    with click.open_file(name, "rb") as file, Bar("Reading", total=size, drawn_from=_BAR_FROM_BYTES) as bar:
        for number, line in enumerate(file, 1):
            bar.advance(len(line))
            text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if not text:
                continue
            try:
                events.append(_event(text))
            except InvalidEvent as error:
                invalid += 1
                if show_all or invalid <= _ERRORS_SHOWN:
                    say(f"outbox: {shown}, line {number}: {escape(str(error))}", err=True)
    return events, invalid


def _event(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_PAYLOAD_BYTES:
        raise InvalidEvent(f"{len(line)} bytes, at most {MAX_PAYLOAD_BYTES} are accepted")
    try:
        event = msgspec.json.decode(line)
    except UnicodeDecodeError:
        raise InvalidEvent("it is not UTF-8") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidEvent(f"it is not JSON: {error}") from None
    if not isinstance(event, dict):
        raise InvalidEvent(f"expected a JSON object, got {type(event).__name__}")
    encode(event)
    return event
