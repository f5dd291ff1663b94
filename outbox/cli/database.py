"""The commands about the database as a whole: upgrade, status and doctor."""

from __future__ import annotations

from contextlib import suppress

import click

from outbox import schema
from outbox.cli.bounds import policy_of, warn_undelivered_option
from outbox.cli.display import as_json, say, status_as_dict, status_in_words
from outbox.cli.endings import FAILED, sigterm_like_ctrl_c
from outbox.cli.options import json_option, uses_database
from outbox.cli.service import login_problems
from outbox.clock import now_ms
from outbox.outbox import Outbox
from outbox.storage.engines import open_engine, shown_url
from outbox.words import escape

_LONGEST_REFRESH_S = 3_600


@click.command(epilog="Example: outbox upgrade --database sqlite:///outbox.db")
@uses_database
@json_option
def upgrade(database: str, *, in_json: bool) -> None:
    """Create the database or upgrade its schema."""
    engine = open_engine(database)
    try:
        before = schema.upgrade(engine)
    finally:
        engine.dispose()
    where = shown_url(engine)
    after = schema.REVISIONS[-1]
    if in_json:
        say(as_json({"database": where, "from": before, "to": after}))
    elif before is None:
        say(f"{escape(where)}: created schema {after}")
    elif before == after:
        say(f"{escape(where)}: schema {after} is up to date")
    else:
        say(f"{escape(where)}: upgraded schema {before} to {after}")


@click.command(epilog="Example: outbox status --watch 5")
@click.option(
    "--watch",
    "watch_s",
    metavar="[SECONDS]",
    type=click.IntRange(1, _LONGEST_REFRESH_S),
    is_flag=False,
    flag_value=2,
    help="Refresh every SECONDS (default 2) and show rates, until Ctrl-C.",
)
@warn_undelivered_option
@uses_database
@json_option
def status(database: str, *, watch_s: int | None, max_undelivered: int, in_json: bool) -> None:
    """Show what is queued, what is stuck, and the likely cause."""
    with Outbox(database, policy=policy_of(max_undelivered=max_undelivered)) as outbox:
        outbox.store.login_problems.update(login_problems())
        where = shown_url(outbox.engine)
        if watch_s is not None:
            from outbox.cli.watch import watch  # noqa: PLC0415 - slow: it loads Rich

            with sigterm_like_ctrl_c(), suppress(KeyboardInterrupt):
                watch(outbox, where, interval_s=watch_s, in_json=in_json)
            return
        stats = outbox.stats()
    if in_json:
        say(as_json(status_as_dict(stats, where)))
    else:
        say(status_in_words(stats, where, now_ms=now_ms()))


@click.command(epilog="Example: outbox doctor")
@warn_undelivered_option
@uses_database
@json_option
@click.pass_context
def doctor(context: click.Context, database: str, *, max_undelivered: int, in_json: bool) -> None:
    """Check the database and report what is wrong.

    Exit code 1: something is wrong.
    """
    from outbox.doctor import examine  # noqa: PLC0415 - slow to load: only this command needs it

    engine = open_engine(database)
    try:
        findings = examine(engine, policy_of(max_undelivered=max_undelivered))
    finally:
        engine.dispose()
    if in_json:
        say(as_json([finding._asdict() for finding in findings]))
    else:
        for finding in findings:
            say(f"{'ok' if finding.is_well else 'WRONG':5}  {finding.check:12}  {escape(finding.words)}")
    if not all(finding.is_well for finding in findings):
        context.exit(FAILED)


COMMANDS = (upgrade, status, doctor)
