"""The command copy: it gives a destination the history of another one."""

from __future__ import annotations

import dataclasses

import click

from outbox import capture, maintenance
from outbox.cli.bounds import bounds_options
from outbox.cli.display import Bar, as_json, say
from outbox.cli.endings import FAILED, fail
from outbox.cli.options import destination_option, dry_run_option, json_option, moment_ms, uses_database
from outbox.destinations import stored
from outbox.failures import ConfigurationError
from outbox.outbox import Outbox
from outbox.policy import Policy
from outbox.stats import counted


@click.command(epilog="Example: outbox copy --from billing --to archive --since 30d --dry-run")
@destination_option("--from", "source", required=True, words="Destination whose events are copied.")
@destination_option("--to", "target", required=True, words="Destination that gets the events.")
@click.option(
    "--since", metavar="MOMENT", callback=moment_ms, help="Only events created at this time or later, such as 30d."
)
@dry_run_option
@bounds_options
@uses_database
@json_option
def copy(
    database: str,
    *,
    source: str,
    target: str,
    since: int | None,
    dry_run: bool,
    policy: Policy,
    in_json: bool,
) -> None:
    """Record the events of one destination, of any status, for another destination, too.

    An event that the other destination already has is left out, so the command can be repeated. The copies are
    pending, with the payload, the event id and the times of the event. Each transaction records up to a thousand
    events, fewer if they are large. Exit code 1: some events could not be copied.
    """
    if source == target:
        raise ConfigurationError(f"--from and --to are both {source!r}, expected two destinations")
    if capture.is_off():
        say(f"outbox: nothing copied: {capture.IS_OFF}", err=True)
        return
    with Outbox(database, policy=policy) as outbox, Bar("Copying", total=outbox.store.copying.last_id()) as bar:
        report = maintenance.copy(
            outbox.store,
            outbox.policy,
            source=stored(source),
            target=stored(target),
            created_from_ms=since,
            dry_run=dry_run,
            progress=bar.advance,
        )
    if in_json:
        say(as_json({**dataclasses.asdict(report), "dry_run": dry_run}))
    else:
        done = "would be copied" if dry_run else "copied"
        there = f"; {target} already had {report.already_there}" if report.already_there else ""
        say(f"{counted(report.copied, 'event')} {done} from {source} to {target}{there}")
    if report.damaged:
        fail(
            f"{counted(report.damaged, 'event')} can't be copied: another program wrote values to the columns that"
            " no event can have",
            FAILED,
        )


COMMANDS = (copy,)
