"""What the documentation shows is run, or checked where it can't be run here."""

import configparser
import os
import re
import runpy
import shlex
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import yaml

import outbox
from builders import DOWN, NOON_MS, ROOT, ScriptedClient, rule_fired, run_code
from conditions import until
from outbox import (
    Event,
    HttpClient,
    HttpFailure,
    Outbox,
    Policy,
    SchemaError,
    Verdict,
    events,
    meter,
    metrics,
    schema,
    testing,
)
from outbox.cli import config, main
from outbox.registry import Registry
from outbox.testing import Answer, ScriptedServer
from servers import free_port
from test_schema import DIFFLORE_DDL, DIFFLORE_INSERT, execute
from warm_python import WarmPython

EXAMPLE_SERVER = "https://ingest.example.com"
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

# What is in blocks of a page, and what runs or checks it: a test here, by `covers`, or one of another file.
COVERED: dict[tuple[str, str], str] = {
    ("docs/testing.md", "python"): "testing/test_pytest_outbox.py",
    ("docs/testing.md", "text"): "testing/test_pytest_outbox.py",
    ("docs/monitoring.md", "python"): "promises/test_monitoring.py",
    ("docs/monitoring.md", "yaml"): "promises/test_monitoring.py",
    # The story starts from trouble of its own, so its commands are no `console`.
    ("docs/recover.md", "shell-session"): "promises/test_recover.py",
    ("docs/receive.md", "python"): "promises/test_receive.py",
    ("docs/host-database.md", "sql"): "promises/test_host_database.py",
    ("docs/host-database.md", "console"): "promises/test_host_database.py",
    ("README.md", "mermaid"): "test_lifecycle.py",
}
BUILT = {"{toctree}", "{eval-rst}", "{include}"}  # by Sphinx, whose warnings are errors


def covers(page: str, *languages: str) -> Callable:
    """Say of a test that it runs or checks the blocks of these languages."""

    def remember(test: Callable) -> Callable:
        COVERED.update({(page, language): test.__name__ for language in languages})
        return test

    return remember


def fences(page: str) -> list[tuple[str, str]]:
    """The blocks of a page: language and text."""
    return re.findall(
        r"^```(\S*)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def blocks(page: str, language: str) -> list[str]:
    return [text for found, text in fences(page) if found == language]


def commands(page: str) -> list[str]:
    return [line[2:] for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]


@pytest.fixture
def server(outbox_server: ScriptedServer) -> ScriptedServer:
    outbox_server.token = "my-token"
    return outbox_server


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def own_event_types(monkeypatch) -> None:
    """The event types that a page defines go with its test."""
    registry = Registry()
    for known in events.event_types().values():
        registry.add(known)
    monkeypatch.setattr(events, "_registry", registry)


# --- all that is in a block ---


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_checked(page: str) -> None:
    for language, text in fences(page):
        if language in BUILT:
            continue
        assert (page, language) in COVERED, f"{page}: nothing runs or checks this:\n{text}"
        file = COVERED[page, language]
        if file.endswith(".py"):
            assert Path(page).name in (ROOT / "tests" / file).read_text(encoding="utf-8"), file


# --- Python ---


def run_python(page: str, namespace: dict, *, url: str = EXAMPLE_SERVER) -> dict:
    """Run the blocks of a page one after the other, as one program."""
    for block in blocks(page, "python"):
        run_code(block.replace(EXAMPLE_SERVER, url), page, namespace)
    return namespace


@covers("README.md", "python")
def test_the_code_of_the_readme_runs(server: ScriptedServer, folder: Path, capsys) -> None:
    namespace = run_python("README.md", {}, url=server.url)
    assert capsys.readouterr().out == "1 sent; all is well\n"
    assert len(server.events) == 1
    assert namespace["outbox"].pending_count() == 1
    namespace["outbox"].close()
    namespace["engine"].dispose()


def test_type_checkers_see_the_class_of_the_readme() -> None:
    (shown,) = re.findall(r"^class .*?\n\n", blocks("README.md", "python")[1], re.DOTALL | re.MULTILINE)
    assert shown in (ROOT / "tests" / "typing" / "api.py").read_text(encoding="utf-8")


def test_the_program_of_the_readme_says_that_it_has_no_token(server: ScriptedServer, folder: Path, capsys) -> None:
    code = blocks("README.md", "python")[0]
    run_code(code.replace(EXAMPLE_SERVER, server.url).replace('"my-token"', "None"), "README.md", {})
    assert capsys.readouterr().out == "0 sent; not logged in, the client has no credentials\n"


@covers("docs/index.md", "python")
def test_the_code_of_the_first_page_runs(server: ScriptedServer, folder: Path) -> None:
    run_python("docs/index.md", {}, url=server.url)
    assert len(server.events) == 1


@covers("docs/difflore.md", "python")
def test_the_code_about_difflore_runs_and_its_table_is_that_of_the_classes(
    server: ScriptedServer, folder: Path
) -> None:
    run_python("docs/difflore.md", {}, url=server.url)
    assert [request.path for request in server.requests] == ["/cloud/observations"]
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| (.+) \| `(\w+)` \|$", (ROOT / "docs" / "difflore.md").read_text(), re.MULTILINE
    )
    assert len(rows) == 5
    for name, tag, fields, occurred_at in rows:
        known = getattr(outbox, name)
        optional = {field.name for field in msgspec.structs.fields(known) if not field.required}
        assert re.findall(r"`(\w+)`(\?)?", fields) == [
            (field, "?" if field in optional else "") for field in known.__struct_fields__
        ]
        assert (known.__struct_config__.tag, known.occurred_at_field) == (tag, occurred_at)


@covers("docs/embed.md", "python")
def test_the_program_that_embeds_it_runs(server: ScriptedServer, folder: Path) -> None:
    namespace = run_python("docs/embed.md", {}, url=server.url)
    counts = namespace["outbox"].stats().counts
    with namespace["engine"].connect() as connection:
        orders = connection.exec_driver_sql("SELECT id FROM orders ORDER BY id").scalars().all()
    assert orders == [17, 18, 21, 22]
    assert counts["sent"] == 8
    namespace["engine"].dispose()


@covers("docs/http-client.md", "python")
def test_the_clients_of_the_page_deliver(outbox_server: ScriptedServer, monkeypatch) -> None:
    monkeypatch.setenv("API_KEY", "key-of-tests")
    monkeypatch.setenv("CLIENT_SECRET", "secret-of-tests")
    monkeypatch.setenv("HOOK_SECRET", "whsec_c2VjcmV0LW9mLXRlc3Rz")
    namespace = run_python("docs/http-client.md", {}, url=outbox_server.url)
    event = {"event_type": "order_shipped", "occurred_at_ms": NOON_MS, "payload_json": '{"order_id":"o-17"}'}
    item = SimpleNamespace(id=1, event_id="e-1", **event)
    requests = {}
    for name, client in namespace.items():
        if isinstance(client, HttpClient):
            token = Answer(200, '{"access_token": "token-of-tests"}')
            outbox_server.script(*([token] if name == "erp" else []), 200)
            with client:
                client.upload([item])
            requests[name] = outbox_server.requests[-1]
    assert {name: (request.path, request.body) for name, request in requests.items()} == {
        "api": ("/v2/events", b'{"events":[{"order_id":"o-17"}]}'),
        "webhooks": ("/hook", b'[{"order_id":"o-17"}]'),
        "internal": ("/events", b'{"order_id":"o-17"}\n'),
        "erp": ("/cloud/observations", b'[{"order_id":"o-17"}]'),
        "shop": ("/cloud/observations", b'[{"source":"shop","event":{"order_id":"o-17"}}]'),
        "search": ("/events/_bulk", b'{"create": {"_id": "e-1"}}\n{"order_id":"o-17"}\n'),
        "shipping": (
            "/events",
            b'[{"specversion":"1.0","id":"e-1","source":"https://shop.example/orders","type":"order_shipped",'
            b'"time":"2026-11-24T12:00:00.000Z","subject":"o-17","datacontenttype":"application/json",'
            b'"data":{"order_id":"o-17"}}]',
        ),
        "orders": ("/orders/o-17", b'{"order_id":"o-17"}'),
        "hub": ("/hub", b'[{"order_id":"o-17"}]'),
    }
    assert requests["api"].headers["X-Api-Key"] == "key-of-tests"
    assert requests["erp"].headers["Authorization"] == "Bearer token-of-tests"
    assert "webhook-signature" in requests["webhooks"].headers
    assert "X-Hub-Signature-256" in requests["hub"].headers
    outbox_server.format = "elasticsearch"
    with namespace["search"] as search:
        assert search.upload([item]) == {1: None}
        bad = SimpleNamespace(id=2, event_id="e-2", payload_json='{"order_id":"poison"}')
        outcomes = search.upload([bad, item])
    assert str(outcomes[2]) == "400: invalid event"
    assert outcomes[1] is None


@covers("docs/worker.md", "python")
def test_the_code_about_the_worker_runs(server: ScriptedServer, folder: Path) -> None:
    namespace = run_python("docs/worker.md", {}, url=server.url)
    namespace["outbox"].flush_all(namespace["client"])
    assert len(server.events) == 1
    namespace["outbox"].close()
    namespace["client"].close()


@covers("docs/scaling.md", "python")
def test_the_code_about_scaling_sends_each_tenant_to_one_partition(tmp_path: Path) -> None:
    urls = [f"sqlite:///{tmp_path}/{number}.db" for number in range(3)]
    namespace = run_python("docs/scaling.md", {"urls": urls})
    outbox_of = namespace["outbox_of"]
    assert {outbox_of(f"tenant-{number}") for number in range(50)} == {*namespace["outboxes"]}
    assert outbox_of("tenant-1") is outbox_of("tenant-1")
    for opened in namespace["outboxes"]:
        opened.close()


@covers("docs/host-database.md", "python")
def test_the_code_about_a_hosts_database_keeps_migrations_apart_and_joins_djangos_transaction(
    folder: Path,
) -> None:
    class OrderPlaced(Event, tag="order_placed"):
        order_id: int

    configured: dict = {}
    opened = Outbox.open("sqlite:///shop.db")
    with closing(sqlite3.connect("shop.db", isolation_level=None)) as driver:

        @contextmanager
        def atomic() -> Iterator[None]:
            driver.execute("BEGIN IMMEDIATE")
            yield
            assert opened.pending_count() == 0
            driver.execute("COMMIT")

        run_python(
            "docs/host-database.md",
            {
                # What env.py has, and what Django has.
                "context": SimpleNamespace(configure=configured.update),
                "target_metadata": None,
                "transaction": SimpleNamespace(atomic=atomic),
                "connection": SimpleNamespace(connection=driver),
                "Order": SimpleNamespace(objects=SimpleNamespace(create=lambda item: SimpleNamespace(id=17))),
                "OrderPlaced": OrderPlaced,
                "outbox": opened,
            },
        )
    assert opened.pending_count() == 1
    opened.close()
    assert not configured["include_name"]("observation_events", "table", {})


@covers("docs/upgrade.md", "python")
def test_the_code_about_upgrades_makes_a_backup_and_goes_back(folder: Path) -> None:
    with Outbox.open("sqlite:///outbox.db") as opened:
        opened.enqueue(rule_fired())
    namespace = run_python("docs/upgrade.md", {})
    namespace["engine"].dispose()
    with pytest.raises(SchemaError, match="outbox_0003"):
        Outbox("sqlite:///outbox.db")
    with Outbox("sqlite:///backup.db") as backup:
        assert backup.pending_count() == 1
    with Outbox.open("sqlite:///outbox.db") as upgraded:
        assert upgraded.pending_count() == 1


@covers("docs/delivery-policy.md", "python")
def test_the_policy_of_the_page_is_one() -> None:
    assert isinstance(run_python("docs/delivery-policy.md", {})["policy"], Policy)


@covers("docs/recover.md", "python")
def test_the_code_about_finding_events_and_a_full_queue_runs(folder: Path) -> None:
    namespace = run_python("docs/recover.md", {})
    opened = namespace["outbox"]
    assert opened.policy.max_undelivered == 5_000_000
    assert namespace["would_be_requeued"] == 0
    opened.close()


@covers("docs/move.md", "python", "sql")
def test_a_table_of_ones_own_is_moved_over_once_and_in_order(folder: Path, capsys) -> None:
    (create,) = blocks("docs/move.md", "sql")
    (copy,) = blocks("docs/move.md", "python")
    with closing(sqlite3.connect("shop.db")) as connection, connection:
        connection.execute(create)
        connection.executemany(
            "INSERT INTO webhook_queue (kind, body, done) VALUES (?, ?, ?)",
            [("shipped", f'{{"order": "o-{number}", "time": {number}}}', number < 10) for number in range(1_210)]
            + [("lost", "{}", 0)],
        )
    namespace: dict = {}
    with pytest.raises(ValueError, match="no event type for 'lost'"):
        run_code(copy, "move.md", namespace)
    namespace["engine"].dispose()
    with closing(sqlite3.connect("shop.db")) as connection, connection:
        connection.execute("DELETE FROM webhook_queue WHERE kind = 'lost'")
    run_code(copy, "move.md", namespace)
    assert capsys.readouterr().out == "1200 events to deliver\n"
    moved = [row.event_type for row in namespace["outbox"].find(limit=2_000)]
    client = ScriptedClient()
    namespace["outbox"].flush_all(client)
    sent = [item.event.order_id for batch in client.batches for item in batch]
    assert moved == ["order_shipped"] * 1_200
    assert sent == [f"o-{number}" for number in range(10, 1_210)]
    namespace["engine"].dispose()


# --- the shell ---


class Shell:
    """Runs what stands in the console blocks of pages, in one folder."""

    def __init__(self, folder: Path, warm_python: WarmPython) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        # As pip installs it: what lies in the folder where it is started can't be imported, unlike with `-m`.
        (programs / "command.py").write_text("from outbox.cli import main\n\nmain()\n")
        for name, arguments in (
            ("outbox", shlex.quote(str(programs / "command.py"))),
            ("python", ""),
            ("alembic", f"-m alembic -c {shlex.quote(str(ROOT / 'alembic.ini'))}"),
        ):
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {shlex.join(warm_python.command)} {arguments} "$@"\n')
            program.chmod(0o755)
        self._environment = os.environ | {
            "HOME": str(folder),
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }

    def run(
        self, page: str, replaced: Mapping[str, str] | None = None, *, skip: tuple[str, ...] = ()
    ) -> list[str]:
        """Run the commands of a page; return what each printed. It has to be what the page shows, where it does."""
        steps = [
            step
            for block in blocks(page, "console")
            for step in steps_of(block)
            if not step[0].startswith(("pip ", "python -m pip ", "make ", *skip))
        ]
        lines = ["set -euo pipefail"]
        for number, (shown, _) in enumerate(steps):
            command = shown
            for old, new in (replaced or {}).items():
                command = command.replace(old, new)
            lines.append(command)
            if command.startswith("kill "):
                lines.append("wait || true")
            port = re.search(r"outbox receive --port (\d+)", command)
            if port:
                lines.append(f"until (: </dev/tcp/127.0.0.1/{port[1]}) 2>/dev/null; do sleep 0.02; done")
                # A reader takes longer for the next command than the pause after a failure lasts.
                lines.append("while outbox status 2>&1 | grep '^paused.*(in ' >/dev/null; do sleep 0.1; done")
            lines.append(f"printf '\\n--- {number}\\n'")
        with subprocess.Popen(
            ["bash", "-c", "\n".join(lines)],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as bash:
            try:
                told, _ = bash.communicate(timeout=240)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(bash.pid, signal.SIGKILL)  # what is left of it in the background
        assert bash.returncode == 0, told
        said = re.split(r"\n--- \d+\n", told)[:-1]
        for (command, shown), printed in zip(steps, said, strict=True):
            assert not shown or is_as_shown(printed, shown), (
                f"{page}: $ {command}\nshows\n{shown}\nprints\n{printed}"
            )
        return said


def steps_of(block: str) -> list[tuple[str, str]]:
    """The commands of a block, each with the output that it shows."""
    steps = (step.partition("\n") for step in block.removeprefix("$ ").split("\n$ "))
    return [(command, shown) for command, _, shown in steps]


def is_as_shown(printed: str, shown: str) -> bool:
    """Whether it is the same but for white space. `…` stands for anything in a line, and alone for any lines."""
    found, expected = (
        [" ".join(line.split()) for line in text.splitlines() if line.strip()] for text in (printed, shown)
    )
    pattern = "".join(
        r"(.*\n)*" if line == "…" else re.escape(line).replace("…", ".*") + r"\n" for line in expected
    )
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in found)) is not None


@pytest.fixture
def shell(folder: Path, warm_python: WarmPython) -> Shell:
    return Shell(folder, warm_python)


@pytest.mark.slow
@covers("docs/tutorial.md", "console", "python")
def test_the_tutorial_prints_what_it_shows(shell: Shell) -> None:
    (program,) = blocks("docs/tutorial.md", "python")
    (shell.folder / "shop.py").write_text(program)
    shell.run("docs/tutorial.md", {"8787": str(free_port())})
    received = (shell.folder / "received.ndjson").read_text()
    assert re.findall(r'"order_id":"([^"]+)"', received) == [f"o-{number}" for number in range(1, 8)]


@covers("README.md", "console", "toml")
def test_the_shell_commands_of_the_readme_run(server: ScriptedServer, shell: Shell) -> None:
    (settings,) = blocks("README.md", "toml")
    (shell.folder / "outbox.toml").write_text(settings.replace(EXAMPLE_SERVER, server.url))
    shell._environment["SHOP_TOKEN"] = "my-token"
    said = shell.run("README.md")
    assert [request.path for request in server.requests] == ["/events"]
    assert len(server.events) == 1
    assert any("sent" in words for words in said)


@pytest.mark.slow
@covers("docs/destinations.md", "console", "python")
def test_the_code_about_destinations_delivers_to_each(server: ScriptedServer, shell: Shell, capsys) -> None:
    namespace = run_python("docs/destinations.md", {}, url=server.url)
    assert capsys.readouterr().out == "3 sent to billing\n"
    assert [event["order_id"] for event in server.events][:3] == ["o-17", "o-18", "o-19"]
    for name in ("billing", "search"):
        namespace["outbox"].flush_all(namespace[name], destination=name)
        namespace[name].close()
    assert namespace["outbox"].stats().counts["pending"] == 1
    (shell.folder / "outbox.toml").write_text('database = "sqlite:///outbox.db"')
    hold, resume, dry, done = shell.run("docs/destinations.md")
    assert hold.endswith("`outbox resume billing` ends the hold\n0 events are pending or being sent\n")
    assert resume == "billing is no longer on hold\n"
    assert (dry, done) == tuple(
        f"4 events {did} from billing to archive\n" for did in ("would be copied", "copied")
    )
    assert namespace["outbox"].stats().counts["pending"] == 5
    namespace["outbox"].close()


@pytest.mark.slow
@covers("docs/recover.md", "console")
def test_the_commands_to_recover_bring_everything_back(shell: Shell, server: ScriptedServer, monkeypatch) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE_URL", "sqlite:///outbox.db")
    at_once = Policy.original()  # it needs no proof
    with Outbox.open("sqlite:///outbox.db", policy=at_once) as opened, Outbox.open("sqlite:///backup.db"):
        opened.enqueue_many([rule_fired(), rule_fired(session_id="another")])
        opened.flush(ScriptedClient(DOWN))
        opened.enqueue(rule_fired(session_id="rejected"))
        opened.flush(ScriptedClient(HttpFailure(422), HttpFailure(422)))
        assert opened.stats().counts["abandoned"] == 1
    shell._environment |= {
        "OUTBOX_DATABASE_URL": "sqlite:///outbox.db",
        "OUTBOX_URL": server.url,
        "OUTBOX_TOKEN": "my-token",
    }
    shell.run("docs/recover.md")
    assert len(server.events) == 3
    with Outbox("sqlite:///outbox.db") as restored, Outbox("sqlite:///damaged/outbox.db") as damaged:
        assert damaged.stats().counts["sent"] == 3
        assert sum(restored.stats().counts.values()) == 0


@pytest.mark.slow
@covers("docs/move.md", "console")
def test_a_difflore_file_and_a_file_of_json_are_moved_over(shell: Shell, server: ScriptedServer) -> None:
    execute("sqlite:///difflore.db", DIFFLORE_DDL + DIFFLORE_INSERT)
    (shell.folder / "events.ndjson").write_text((ROOT / "examples" / "events.ndjson").read_text())
    shell._environment |= {"OUTBOX_URL": server.url, "OUTBOX_TOKEN": "my-token"}
    shell.run("docs/move.md")
    assert len(server.events) == 1
    with Outbox("sqlite:///outbox.db") as opened:
        assert opened.pending_count() > 0


@pytest.mark.slow
@covers("docs/upgrade.md", "console")
def test_the_commands_to_upgrade_and_to_go_back_run(shell: Shell) -> None:
    shell._environment |= {"OUTBOX_DATABASE_URL": "sqlite:///outbox.db"}
    said = shell.run("docs/upgrade.md")
    assert "CREATE TABLE observation_destinations" in "".join(said)
    with pytest.raises(SchemaError, match="outbox_0003"):
        Outbox("sqlite:///outbox.db")


@covers("docs/privacy.md", "console", "python")
def test_what_the_page_about_privacy_shows_redacts_and_purges(shell: Shell, capsys) -> None:
    namespace: dict[str, object] = {}
    redacting, wiping = blocks("docs/privacy.md", "python")
    run_code(redacting, "privacy.md", namespace)
    assert capsys.readouterr().out == "*.py\n"
    assert "shop" not in namespace["outbox"].get(1).payload_json
    said = "".join(shell.run("docs/privacy.md"))
    assert said.startswith(
        "0 events would be purged, 0 of them undelivered\n1 event purged, 1 of them undelivered\n"
    )
    assert "deleted so far, 1 of them undelivered:" in said
    run_code(wiping, "privacy.md", namespace)
    left = [file.read_bytes() for file in shell.folder.glob("outbox.db*")]
    assert left
    assert not [data for data in left if b"no-float-money" in data]


@pytest.mark.slow
@covers("docs/deploy.md", "console")
@covers("docs/monitoring.md", "console")
@covers("docs/console.md", "console")
def test_the_commands_that_go_on_until_they_are_ended_work_and_end(shell: Shell, server: ScriptedServer) -> None:
    shell._environment |= {
        "OUTBOX_DATABASE_URL": "sqlite:///outbox.db",
        "OUTBOX_URL": server.url,
        "OUTBOX_TOKEN": "my-token",
    }
    going_on = [
        command
        for page in ("deploy", "monitoring", "console")
        for command in commands(f"docs/{page}.md")
        if not command.startswith("pip ")
    ]
    assert len(going_on) == 5
    with Outbox.open("sqlite:///outbox.db") as opened:
        for number, command in enumerate(going_on):
            opened.enqueue(rule_fired(session_id=f"s{number}"))
            with subprocess.Popen(
                ["bash", "-c", f"exec {re.sub('9464|8765', '0', command)}"],
                env=shell._environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            ) as process:
                if " run " in command:
                    until(lambda: opened.stats().counts["pending"] + opened.stats().counts["sending"] == 0)
                else:
                    assert process.stdout.readline()
                process.terminate()
            assert process.returncode == 0, command


def invocations(command: str) -> Iterator[list[str]]:
    """The words of each call of `outbox` in a line for the shell."""
    lexer = shlex.shlex(re.sub(r"\d?>\S+|<\S+", "", command), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("();<>|&"):
            if "outbox" in words:
                yield words[words.index("outbox") + 1 :]
            words = []
        else:
            words.append(word)


def parse(words: list[str]) -> None:
    """Raise where the command line takes no such call."""
    name = next(word for word in words if word in main.commands)
    place = words.index(name)
    with main.make_context("outbox", words[: place + 1]) as context:
        main.commands[name].make_context(name, words[place + 1 :], parent=context)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_one_that_the_command_line_takes(page: str, folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("OUTBOX_URL", EXAMPLE_SERVER)
    Path("events.ndjson").touch()
    for command in commands(page):
        for words in invocations(command):
            parse(words)


# --- configuration ---


@covers("docs/deploy.md", "ini", "dockerfile", "yaml")
def test_what_is_deployed_calls_commands_that_exist(monkeypatch) -> None:
    monkeypatch.setenv("OUTBOX_URL", EXAMPLE_SERVER)
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read_string("\n".join(blocks("docs/deploy.md", "ini")))
    assert {"Unit", "Service", "Install"} <= {*unit}
    called = [unit["Service"]["ExecStartPre"], unit["Service"]["ExecStart"]]
    dockerfile = "\n".join(blocks("docs/deploy.md", "dockerfile"))
    called += [shlex.join(yaml.safe_load(words)) for words in re.findall(r"CMD (\[.+\])", dockerfile)]
    (pod,) = (yaml.safe_load(block)["spec"] for block in blocks("docs/deploy.md", "yaml"))
    (container,) = pod["containers"]
    probes = [container[probe]["exec"]["command"] for probe in ("livenessProbe", "readinessProbe")]
    called += [shlex.join(words) for words in (container["command"], *probes)]
    assert len(called) == 7
    for command in called:
        path, *words = shlex.split(command)
        assert Path(path).name == "outbox"
        parse(words)
    grace = int(container["command"][-1])
    assert grace < pod["terminationGracePeriodSeconds"]


@covers("docs/outbox-toml.md", "toml")
def test_the_settings_of_the_file_are_those_of_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "outbox-toml.md").read_text(encoding="utf-8")
    (example,) = blocks("docs/outbox-toml.md", "toml")
    file = tmp_path / "outbox.toml"
    file.write_text(example, encoding="utf-8")
    found = config.read(str(file))
    assert found.destination("default").settings["path"] == ""
    assert found.routes["order_placed"] == ["billing", "default"]
    assert found.policy["verdicts"] == {409: Verdict.TRANSIENT}
    for name in config.SETTINGS:
        assert f"`{name}`" in page, name


@covers("docs/upgrade.md", "text")
def test_the_pinned_version_is_this_one() -> None:
    (pin,) = blocks("docs/upgrade.md", "text")
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert pin.strip() == f"observation-outbox ~= {version.group(1)}"


# --- names and links ---


def test_the_make_targets_and_the_package_of_the_readme_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"`?make ([a-z]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {"demo", "test", "check", "docs"} <= {*named}
    assert {*named} <= {*targets}
    project = re.search(r'^name = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"pip install {project.group(1)}" in commands("README.md")


@covers("docs/testing.md", "console")
@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_every_extra_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert {*re.findall(r"`outbox ([a-z]+)", text)} <= {*main.commands}
    extras = re.search(
        r"\[project\.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.DOTALL
    )
    assert {*re.findall(r"observation-outbox\[(\w+)\]", text)} <= {
        *re.findall(r"^(\w+) =", extras[1], re.MULTILINE)
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_page_about_the_command_line_is_that_of_its_commands() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "cli.py"))["page"]()
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == page, "run `python docs/cli.py`"


def test_the_reference_has_every_public_name() -> None:
    (text,) = ["\n".join(blocks("docs/reference.md", "{eval-rst}"))]
    named: dict[str, set[str]] = {}
    for module, rest in re.findall(r"\.\. module:: (\S+)\n(.*?)(?=\.\. module::|\Z)", text, re.DOTALL):
        named[module] = {*re.findall(r"^\.\. (?:auto\w+|py:data):: (\w+)", rest, re.MULTILINE)}
    assert named["outbox"] == {*outbox.__all__}
    assert named["outbox.testing"] == {*testing.__all__}
    assert named["outbox.web"] == {"create_app"}
    for name in named["outbox.metrics"]:
        assert hasattr(metrics, name)
    for name in named["outbox.meter"]:
        assert hasattr(meter, name)
    for name in named["outbox.schema"]:
        assert hasattr(schema, name)
