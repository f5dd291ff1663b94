"""The story of docs/recover.md: each command prints the output that the story shows, and each page has the texts that the story quotes."""

from __future__ import annotations

import html
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry

from builders import NOON, ROOT
from command_line import runner
from outbox import Outbox
from outbox.cli import main
from outbox.metrics import OutboxMetrics
from outbox.testing import Answer, ScriptedServer, TimeMachine
from outbox.web import create_app
from test_docs import blocks, is_as_shown, steps_of

PAGE = "docs/recover.md"
TWO_O_CLOCK = NOON.replace(hour=2)
REJECTED = Answer(400, "EURO is not a currency")
SETTINGS = """
database = "sqlite:///outbox.db"
destinations.billing = {{ url = "{billing}", auth = "none" }}
destinations.search = {{ url = "{search}", auth = "none" }}
routes.order_placed = ["billing", "search"]
"""


class Step(NamedTuple):
    commands: list[tuple[str, str]]
    """Each command, and the output that the story shows."""
    path: str
    """The page of the console."""
    says: list[str]
    """What the story says that the page says."""


def story() -> list[Step]:
    """The steps of the story. A line about the console follows the commands of each."""
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    found = re.findall(
        r"^```shell-session\n(.*?)^```\n\nConsole: `(/\S*)` says (.+?)\n\n", text, re.DOTALL | re.MULTILINE
    )
    assert len(found) == len(blocks(PAGE, "shell-session"))
    return [
        Step(steps_of(block), path, re.findall(r"\*([^*]+)\*", " ".join(says.split())))
        for block, path, says in found
    ]


def run(command: str) -> str:
    """Run a line for the shell. The calls of `outbox` are run in this process."""
    output = ""
    for part in command.split(" | "):
        program, *arguments = shlex.split(part)
        if program == "outbox":
            result = runner().invoke(main, arguments, input=output, catch_exceptions=False)
            assert result.exit_code == 0, (command, result.output, result.stderr)
            output = result.stdout
        else:
            output = subprocess.run(
                [program, *arguments], input=output, stdout=subprocess.PIPE, text=True, check=True
            ).stdout
    return output


def words_of(opened: Outbox, path: str) -> str:
    """The text of a page of the console, as somebody sees it who opens it now."""
    answer = create_app(opened, may_enter=lambda _: True).test_client().get(path)
    assert answer.status_code == 200, path
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", answer.get_data(as_text=True))).split())


def place(opened: Outbox, *numbers: int) -> None:
    for number in numbers:
        currency = "EURO" if number == 17 else "EUR"
        opened.enqueue({"event_type": "order_placed", "order": f"order-{number}", "currency": currency})


def paused(opened: Outbox) -> float | None:
    """What the alert of the story looks at."""
    (alert,) = re.findall(
        r"alert: OutboxPaused\n +expr: max\((\w+)\) > 0", blocks("docs/monitoring.md", "yaml")[0]
    )
    registry = CollectorRegistry()
    OutboxMetrics(opened, registry=registry)
    return registry.get_sample_value(alert)


def flush() -> None:
    runner().invoke(main, ["flush", "--all"], catch_exceptions=False)


def test_the_story_goes_from_the_alert_to_the_all_clear(
    outbox_server: ScriptedServer, outbox_time: TimeMachine, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outbox_time.move_to(TWO_O_CLOCK)
    billing, routes = outbox_server, {"*": ["billing", "search"]}
    with ScriptedServer() as search, Outbox.open("sqlite:///outbox.db", routes=routes) as opened:
        Path("outbox.toml").write_text(SETTINGS.format(billing=billing.url, search=search.url))
        place(opened, 15, 16)
        flush()
        place(opened, 17)
        billing.script(REJECTED)
        flush()
        outbox_time.travel(minutes=12)
        place(opened, 18)
        billing.script(200, REJECTED)
        flush()
        billing.set_mode("drop")
        place(opened, 19, 20)
        for _ in range(12):
            outbox_time.travel(minutes=4)
            flush()

        assert paused(opened) == 1
        for step in story():
            if step.commands[0][0] == "outbox resume billing":
                billing.set_mode("ok")
                outbox_time.travel(hours=1)
            for command, shown in step.commands:
                printed = run(command)
                assert is_as_shown(printed, shown), f"$ {command}\nshows\n{shown}\nprints\n{printed}"
            page = words_of(opened, step.path)
            assert step.says, step.path
            for words in step.says:
                assert words in page, f"{step.path} does not say {words!r}:\n{page}"
        assert paused(opened) == 0
    assert billing.received({"order": "order-17", "currency": "EUR"})
    assert len(billing.events) == len(search.events) == 6
