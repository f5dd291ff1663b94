"""What the page about observing promises of the log, the metrics and the alert rules."""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path

from builders import ScriptedClient, rule_fired, statuses
from outbox import HttpClient, HttpFailure, Outbox, Worker
from outbox.hooks import OUTCOMES
from outbox.receiver import IngestServer
from test_docs import blocks
from test_worker import until

ROOT = Path(__file__).parent.parent
PAGE = "docs/observing.md"
CANARY = "payload-canary-7d1f"


def rows_of_tables(first_column: str) -> list[list[str]]:
    """The cells of the table with this heading."""
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    (table,) = re.findall(rf"^\| {re.escape(first_column)} \|.*\n\| ---.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# --- the log ---


def logged(call: ast.Call) -> list[tuple[str, str, frozenset[str]]]:
    """The names, the level and the attributes of one call of the logger."""
    (extra,) = [keyword.value for keyword in call.keywords if keyword.arg == "extra"]
    keys = [key.value for key in extra.keys]
    attributes = frozenset(keys) - {"event_name"}
    name = extra.values[keys.index("event_name")]
    if isinstance(name, ast.JoinedStr):
        return [
            (f"outbox.{word}", logging.getLevelName(level).lower(), attributes)
            for word, level in OUTCOMES.values()
        ]
    level = call.func.attr
    if level == "log":
        (level,) = re.findall(r"logging\.([A-Z]+) if ", ast.unparse(call.args[0]))
    return [(name.value, level.lower(), attributes)]


def test_the_page_lists_every_log_record_with_its_level_and_attributes() -> None:
    calls = [
        node
        for path in (ROOT / "outbox").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and re.fullmatch(r"log\.(log|debug|info|warning)", ast.unparse(node.func))
    ]
    listed = [
        (codes(name)[0], level, frozenset(codes(attributes)))
        for name, level, attributes, *_ in rows_of_tables("`event_name`")
    ]
    assert len({name for name, *_ in listed}) == len(listed)
    assert {record for call in calls for record in logged(call)} == {*listed}


def echo(batch) -> HttpFailure:
    """The answer of a service that rejects, and repeats what it got, as many do."""
    return HttpFailure(422, "Unprocessable Entity", batch[0].payload_json)


def test_no_record_holds_a_payload_though_the_service_repeats_it(outbox: Outbox, caplog) -> None:
    caplog.set_level(logging.DEBUG, "outbox")
    event = rule_fired(session_id=CANARY, rule_ids=[CANARY])
    _, bad, _ = outbox.enqueue_many([event] * 3)
    rejecting = [lambda batch: echo(batch) if bad in [item.id for item in batch] else None] * 4
    outbox.flush(ScriptedClient(*rejecting))
    assert statuses(outbox) == ["sent", "abandoned", "sent"]
    outbox.enqueue_many([event] * 2)
    with Worker(outbox, ScriptedClient(*[echo] * 9)):
        until(lambda: "outbox.cannot_deliver" in names(caplog))
    assert CANARY in outbox.get(bad).last_error
    assert {"outbox.sent", "outbox.abandoned", "outbox.rescheduled", "outbox.upload"} <= {*names(caplog)}
    for record in caplog.records:
        assert CANARY not in f"{record.getMessage()} {vars(record)}"
    assert "can't deliver: 422 Unprocessable Entity" in [record.getMessage() for record in caplog.records]
    (abandoned,) = [record for record in caplog.records if record.event_name == "outbox.abandoned"]
    assert (abandoned.events, abandoned.event_ids, abandoned.levelname) == (1, [bad], "WARNING")
    assert abandoned.getMessage() == f"1 of 1 events are abandoned: [{bad}]"


def names(caplog) -> list[str]:
    return [record.event_name for record in caplog.records]


# --- the examples ---


def test_the_hook_of_the_page_tells_what_is_given_up(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec(compile(blocks(PAGE, "python")[0], PAGE, "exec"), namespace)  # noqa: S102 - our own
    with namespace["outbox"] as outbox, IngestServer() as server, HttpClient(server.url, token="t") as client:
        outbox.enqueue_many([rule_fired(), rule_fired(session_id="poison")])
        outbox.flush(client)
    assert capsys.readouterr().out.startswith("rule_fired 2 is given up: permanent: 422 ")
