"""Write the page about the command line from its commands: `python docs/cli.py`."""

import inspect
from pathlib import Path

import click

from outbox.cli import main

PAGE = Path(__file__).with_name("cli.md")

INTRODUCTION = """\
# Command line

This page lists all commands of `outbox` and their options, as `outbox COMMAND --help` or `-h` shows them. A
DURATION is a number and a unit, such as `30s`, `10m`, `12h` or `7d`. A MOMENT is a date and time with its zone,
such as `2026-11-24T12:00:00Z`, or a duration, which means that long ago.

`list`, `retry`, `requeue`, `abandon` and `purge` take the same conditions: row ids and options. An event must meet
all conditions. If an option is repeated, one of its values is enough. [Recover](recover.md#find-events) has
examples.

Every command also has the options `--config`, `--database`, `--types` and `--json`, which are listed once, under
`outbox`. There are two exceptions: `run` and `web` have no `--json`, and `receive` and `demo` have none of the
four.

The commands refuse a database in memory, such as `sqlite://`, because its events would end with the command. A
relative path is resolved once, when the command starts. A closed standard output or standard error works like
`/dev/null`.

Bounds on the queue come from the options `--max-rows`, `--max-undelivered`, `--max-sent`, `--when-full` and
`--keep-sent`, from the environment, or from [outbox.toml](outbox-toml.md). Without them, no command
deletes an event to make room, or rejects one, because the application may want to keep more. If only the command
line uses a database, set `OUTBOX_MAX_SENT` or `OUTBOX_KEEP_SENT`; otherwise delivered events stay for ever.

These settings come only from environment variables:

| variable | meaning |
| --- | --- |
| `OUTBOX_TOKEN` | the token for the service; it overrides `OUTBOX_TOKEN_FILE` |
| `OUTBOX_TOKEN_FILE` | path of a file that holds the token; it is read before each request |
| `OUTBOX_WEB_SECRET` | the secret that the [console](console.md) asks for, at least 16 characters |
| `OUTBOX_CAPTURE` | `false` turns capture off; see [the opt-out](privacy.md#the-opt-out) |

Any command but `receive` and `demo` reads [outbox.toml](outbox-toml.md), if there is one.
"""


def page() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION, _section("outbox", main)]
    parts += [_section(f"outbox {name}", command) for name, command in sorted(main.commands.items())]
    return "\n".join(parts)


def _section(name: str, command: click.Command) -> str:
    arguments = "".join(
        f" {param.name.upper()}" for param in command.params if isinstance(param, click.Argument) and param.name
    )
    epilog = (command.epilog or "").removeprefix("Example: ")
    text = [f"## {name}{arguments}\n", inspect.cleandoc(command.help or "") + "\n"]
    shared = () if command is main else {param.name for param in main.params}
    options = [
        _row(param) for param in command.params if isinstance(param, click.Option) and param.name not in shared
    ]
    if options:
        text += ["| option | meaning | values |", "| --- | --- | --- |", *options, ""]
    return "\n".join([*text, f"Example: `{epilog}`\n"])


def _row(option: click.Option) -> str:
    notes = []
    if isinstance(option.type, click.Choice):
        notes.append("one of " + ", ".join(f"`{choice}`" for choice in option.type.choices))
    if isinstance(option.type, click.IntRange) and not option.count:
        notes.append(f"from {option.type.min} to {option.type.max}")
    if option.show_default:
        notes.append(f"default {option.default}")
    if option.required:
        notes.append("required")
    if option.envvar:
        notes.append(f"environment variable `{option.envvar}`")
    names = " ".join([", ".join(option.opts), option.metavar or ""]).strip()
    return f"| `{names}` | {option.help} | {'; '.join(notes)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
