"""The command line `outbox`.

Hooks and cron jobs start it for every event, so each command imports only what it needs.
"""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

import click

from outbox.cli import acting, console, copying, database, events, health, holds, listing, receive, sending
from outbox.cli.credentials import environment_token
from outbox.cli.display import say
from outbox.cli.endings import FAILED, INTERRUPTED, exit_code_of, fail
from outbox.cli.options import config_option, database_option, json_option, types_option
from outbox.cli.streams import drop_unwritten, open_closed_streams
from outbox.failures import OutboxError
from outbox.words import escape


class _Main(click.Group):
    """Turns every expected error into one line and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        open_closed_streams()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            say(f"outbox: {escape(str(error))}", err=True)
            sys.exit(FAILED)
        finally:
            drop_unwritten()

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OutboxError as error:
            fail(str(error), exit_code_of(error))
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


def _print_version(context: click.Context, _param: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's signature
    if value:
        try:
            version = metadata.version("observation-outbox")
        except metadata.PackageNotFoundError:
            version = "(run from a source tree)"
        say(f"outbox {version}")
        context.exit()


@click.group(
    cls=_Main,
    epilog="Example: outbox --database sqlite:///outbox.db status",
    context_settings={"help_option_names": ["--help", "-h"]},  # of the subcommands, too
)
@config_option(envvar="OUTBOX_CONFIG")
@database_option(envvar="OUTBOX_DATABASE_URL")
@types_option(envvar="OUTBOX_TYPES")
@json_option
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
@click.pass_context
def main(context: click.Context, /, **shared: Any) -> None:
    """Deliver events to an HTTP service without losing any.

    Put --config, --database, --types and --json before or after the command; if both are given, the later one
    applies.

    Exit codes: 0 success; 1 failure; 2 wrong usage, settings or input; 3 an event that was due was not delivered,
    or the heartbeat is missing or too old; 130 Ctrl-C.
    """
    command = main.commands.get(context.invoked_subcommand or "")
    if command is not None and shared["in_json"] and "in_json" not in {param.name for param in command.params}:
        raise click.UsageError(f"`outbox {command.name}` has no JSON output, expected no --json")
    given = {name: value for name, value in shared.items() if value}
    context.default_map = dict.fromkeys(main.commands, given)
    context.obj = environment_token()


for _module in (sending, health, events, listing, acting, holds, copying, database, console, receive):
    for _command in _module.COMMANDS:
        main.add_command(_command)
