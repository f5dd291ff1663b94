"""Write the page about the command line from its commands: `python docs/cli.py`."""

import inspect
from pathlib import Path

import click

from outbox.cli import main

PAGE = Path(__file__).with_name("cli.md")

INTRODUCTION = """\
# Command line

What each command of `outbox` does, as `outbox COMMAND --help` says it. Ages are a number and a unit, as in
`30s`, `10m`, `12h`, `7d`.

Some settings come from the environment only:

| variable | |
| --- | --- |
| `OUTBOX_TOKEN` | the token of the service; it goes before `OUTBOX_TOKEN_FILE` |
| `OUTBOX_TOKEN_FILE` | a file that holds it, which is read before each request |
| `OUTBOX_CAPTURE` | with `false` nothing is recorded and nothing is sent: [the opt-out](privacy.md#the-opt-out) |
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
    options = [_row(param) for param in command.params if isinstance(param, click.Option)]
    if options:
        text += ["| option | | |", "| --- | --- | --- |", *options, ""]
    return "\n".join([*text, f"Example: `{epilog}`\n"])


def _row(option: click.Option) -> str:
    notes = []
    if isinstance(option.type, click.Choice):
        notes.append("one of " + ", ".join(f"`{choice}`" for choice in option.type.choices))
    if isinstance(option.type, click.IntRange):
        notes.append(f"from {option.type.min} to {option.type.max}")
    if option.show_default:
        notes.append(f"{option.default} if not said")
    if option.required:
        notes.append("required")
    if option.envvar:
        notes.append(f"or `{option.envvar}` in the environment")
    names = " ".join([", ".join(option.opts), option.metavar or ""]).strip()
    return f"| `{names}` | {option.help} | {'; '.join(notes)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
