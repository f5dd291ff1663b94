from __future__ import annotations

import json
import sys

import pytest

from builders import rule_fired, statuses
from command_line import GOOD, TOKEN, runner
from outbox import Event, Outbox
from outbox.cli import main


def test_the_option_for_the_database_comes_before_the_environment(run, outbox, monkeypatch):
    monkeypatch.setenv("OUTBOX_DATABASE_URL", "sqlite:////nowhere/at-all.db")
    assert run("status").exit_code == 0
    assert "/nowhere/at-all.db" in runner().invoke(main, ["status"]).stderr


def databases(tmp_path):
    """Two databases; how many events each has tells which of them is shown."""
    urls = [f"sqlite:///{tmp_path / name}.db" for name in ("one", "two")]
    for count, url in enumerate(urls, 1):
        with Outbox.open(url) as outbox:
            outbox.enqueue_many([rule_fired()] * count)
    return urls


def shown(*arguments):
    result = runner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["counts"]["pending"]


def test_options_before_the_command_apply_to_it_and_those_after_it_win(tmp_path, monkeypatch):
    one, two = databases(tmp_path)
    assert shown("--json", "--database", two, "status") == 2
    assert shown("status", "--json", "--database", two) == 2
    assert shown("--database", one, "status", "--json", "--database", two) == 2
    assert shown("--json", "--database", one, "status", "--json") == 1
    monkeypatch.setenv("OUTBOX_DATABASE_URL", two)
    assert shown("--json", "status") == 2
    assert shown("--json", "--database", one, "status") == 1
    assert shown("--json", "status", "--database", one) == 1


def test_modules_of_types_after_the_command_replace_those_before_it(run, outbox, tmp_path, monkeypatch):
    for name in ("types_before", "types_after"):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert run("--types", "types_before", "status", "--types", "types_after").exit_code == 0
    assert "types_after" in sys.modules
    assert "types_before" not in sys.modules
    assert run("--types", "types_before", "status").exit_code == 0
    assert "types_before" in sys.modules


def test_a_plain_path_is_refused_after_the_command_too():
    result = runner().invoke(main, ["status", "--database", "outbox.db"])
    assert result.exit_code == 2
    assert "the URL of the file outbox.db is sqlite:///outbox.db" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///file:a?mode=memory&uri=true"]
)
@pytest.mark.parametrize("command", [name for name in main.commands if name not in ("demo", "receive")])
def test_no_command_works_on_a_database_in_memory(command, url, monkeypatch):
    needed = {"flush": ["--url", "http://localhost"], "show": ["1"], "requeue": ["--older-than", "0s"]}
    needed["run"] = needed["flush"]
    before = runner().invoke(main, ["--database", url, command, *needed.get(command, [])])
    monkeypatch.setenv("OUTBOX_DATABASE_URL", url)
    from_variable = runner().invoke(main, [command, *needed.get(command, [])])
    for result in (before, from_variable):
        assert (result.exit_code, result.stdout) == (2, "")
        assert "the database is in memory" in " ".join(result.stderr.split())


def test_an_empty_url_has_no_file_to_propose():
    result = runner().invoke(main, ["--database", "", "status"])
    assert result.exit_code == 2
    assert "sqlite:///" not in result.stderr


@pytest.fixture
def wandering_types(tmp_path, monkeypatch):
    """A module of types that changes the directory, and the directory in which the command is started."""
    started, elsewhere = tmp_path / "started", tmp_path / "elsewhere"
    for folder in (started, elsewhere):
        folder.mkdir()
    (tmp_path / "wandering_types.py").write_text(f"import os\nos.chdir({str(elsewhere)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandering_types", raising=False)
    monkeypatch.setenv("OUTBOX_DATABASE_URL", "sqlite:///outbox.db")
    monkeypatch.chdir(started)
    yield started
    assert not list(elsewhere.iterdir())
    del sys.modules["wandering_types"]


def test_relative_paths_mean_what_they_meant_when_the_command_was_started(wandering_types, monkeypatch, server):
    (wandering_types / "events.ndjson").write_text(GOOD)
    enqueued = runner().invoke(main, ["enqueue", "--types", "wandering_types", "events.ndjson"])
    assert enqueued.exit_code == 0, enqueued.stderr
    assert enqueued.stdout == "events.ndjson: 1 event enqueued, first id 1\n"
    monkeypatch.chdir(wandering_types)
    del sys.modules["wandering_types"]
    (wandering_types / "token").write_text(TOKEN)
    (wandering_types / "alive").touch()
    monkeypatch.setenv("OUTBOX_TOKEN_FILE", "token")
    flushed = runner().invoke(main, ["--types", "wandering_types", "flush", "--url", server.url])
    assert flushed.exit_code == 0, flushed.stderr
    monkeypatch.chdir(wandering_types)
    del sys.modules["wandering_types"]
    checked = runner().invoke(main, ["health", "--types", "wandering_types", "--heartbeat", "alive"])
    assert (checked.exit_code, checked.stdout) == (0, "ok\n")


def test_a_relative_token_file_without_a_current_directory_can_not_be_read(run, outbox, monkeypatch, tmp_path):
    monkeypatch.setenv("OUTBOX_TOKEN_FILE", "token")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert run("status").exit_code == 0
    result = run("flush", "--url", "http://localhost")
    assert result.exit_code == 2
    assert "OUTBOX_TOKEN_FILE is 'token', expected a file that holds the token" in result.stderr


@pytest.mark.parametrize("command", ["run", "receive", "demo", "web"])
def test_a_command_without_json_refuses_it(command):
    result = runner().invoke(main, ["--json", command])
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"`outbox {command}` has no JSON output" in result.stderr


def test_an_unknown_command_is_misuse():
    result = runner().invoke(main, ["--json", "flsh"])
    assert result.exit_code == 2
    assert "No such command" in result.stderr


def test_without_a_database_it_is_the_per_user_file():
    assert runner().invoke(main, ["enqueue"], input=GOOD).exit_code == 0
    assert "outbox.db" in runner().invoke(main, ["status"]).stdout


def test_a_plain_path_is_refused_with_its_url():
    result = runner().invoke(main, ["--database", "outbox.db", "status"])
    assert result.exit_code == 2
    assert "the URL of the file outbox.db is sqlite:///outbox.db" in " ".join(result.stderr.split())


def test_what_may_hold_a_password_is_not_repeated():
    result = runner().invoke(main, ["--database", "me:hunter2@host/db", "status"])
    assert result.exit_code == 2
    assert "hunter2" not in result.output


@pytest.mark.parametrize(
    "database", ["foo://me:hunter2@x", "postgresql://me:hunter2@x:port/y", "oracle://hunter2@x"]
)
def test_a_url_that_can_not_work_is_misuse_and_not_repeated(database):
    result = runner().invoke(main, ["--database", database, "status"])
    assert result.exit_code == 2
    assert result.stderr.startswith(("outbox: the database", "outbox: there is no dialect for the database"))
    assert "hunter2" not in result.output


def test_event_types_of_the_application_are_imported(run, outbox, tmp_path, monkeypatch):
    (tmp_path / "my_types.py").write_text(
        "from outbox import Event\nclass Shipped(Event, tag='shipped_in_test_cli'):\n    order: str\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = '{"event_type":"shipped_in_test_cli","order":17}'
    assert run("enqueue", input=line).exit_code == 0
    checked = run("--types", "my_types", "enqueue", input=line)
    assert (checked.exit_code, statuses(outbox)) == (2, ["pending"])
    assert "shipped_in_test_cli: order: expected `str`, got `int`" in checked.stderr
    assert Event.__subclasses__()[-1].__name__ == "Shipped"


def test_a_module_of_types_may_lie_in_the_current_directory(run, outbox, tmp_path, monkeypatch):
    (tmp_path / "own_types.py").write_text("import own_more\n")
    (tmp_path / "own_more.py").write_text(
        "from outbox import Event\nclass Shipped(Event, tag='shipped_from_here'):\n    order: str\n"
    )
    # As the installed command is started, which sees nothing of the directory by itself.
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    monkeypatch.chdir(tmp_path)
    line = '{"event_type":"shipped_from_here","order":"A1"}'
    for _ in range(2):
        assert run("--types", "own_types", "enqueue", input=line).exit_code == 0
    assert sys.path.count("") == 1


def test_a_module_of_types_that_is_installed_is_preferred(run, tmp_path, monkeypatch):
    for name in ("installed", "here"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "preferred_types.py").write_text(f"WHERE = {name!r}\n")
    monkeypatch.syspath_prepend(tmp_path / "installed")
    monkeypatch.chdir(tmp_path / "here")
    run("--types", "preferred_types", "status")
    assert sys.modules["preferred_types"].WHERE == "installed"


def test_the_variable_names_several_modules_of_types(run, tmp_path, monkeypatch):
    for name in ("first_types", "second_types"):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OUTBOX_TYPES", "first_types second_types")
    run("status")
    assert {"first_types", "second_types"} <= sys.modules.keys()


def test_a_module_of_types_that_is_not_there_is_misuse(run):
    result = run("--types", "no_such_module", "status")
    assert result.exit_code == 2
    assert "'no_such_module'" in result.stderr


@pytest.mark.parametrize("age", ["7", "7w", "-1d", "1.5h", "yesterday", "2026-11-24T12:00:00", "9999999d"])
def test_an_age_that_is_none_is_misuse(run, outbox, age):
    result = run("list", f"--older-than={age}")
    assert result.exit_code == 2
    assert "expected an age such as 30s, 15m, 12h or 7d" in " ".join(result.stderr.split())


def test_health_refuses_what_is_no_age(run):
    result = run("health", "--max-overdue", "soon")
    assert result.exit_code == 2
    assert "expected a time such as 30s" in result.stderr


def test_the_token_file_is_read_before_each_request(run, outbox, server, monkeypatch, tmp_path):
    file = tmp_path / "token"
    file.write_text(f"  {TOKEN}\n")
    monkeypatch.setenv("OUTBOX_TOKEN_FILE", str(file))
    outbox.enqueue_many([rule_fired(session_id=str(n)) for n in range(70)])
    flush_all = Outbox.flush_all

    def renewing(self, client, *, progress, **options):
        def renew(report):
            progress(report)
            file.write_text("another-token")
            server.token = file.read_text()

        return flush_all(self, client, progress=renew, **options)

    monkeypatch.setattr(Outbox, "flush_all", renewing)
    assert run("flush", "--all", "--url", server.url).exit_code == 0
    assert [request.headers["Authorization"] for request in server.requests] == [
        f"Bearer {TOKEN}",
        "Bearer another-token",
    ]


def test_the_token_itself_comes_before_its_file(run, outbox, logged_in, monkeypatch):
    monkeypatch.setenv("OUTBOX_TOKEN_FILE", "/nowhere/at/all")
    assert run("flush").exit_code == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a file that holds the token: No such file or directory"),
        (b"\xff\xfe", "expected a file that holds the token: the file is not ASCII text"),
        (b"two words-of-it", "OUTBOX_TOKEN_FILE holds a token with blanks or characters outside ASCII"),
    ],
)
@pytest.mark.usefixtures("outbox")
def test_a_token_file_that_can_not_work_is_misuse(run, monkeypatch, tmp_path, content, message):
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("OUTBOX_TOKEN_FILE", str(file))
    result = run("flush", "--url", "http://localhost")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "words-of-it" not in result.output


def test_a_token_that_is_no_word_is_misuse(run, outbox, logged_in, monkeypatch):
    monkeypatch.setenv("OUTBOX_TOKEN", "sécret-token")
    result = run("flush")
    assert result.exit_code == 2
    assert "cret-token" not in result.output
