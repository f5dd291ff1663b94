from __future__ import annotations

import os
from pathlib import Path

import pytest

from builders import statuses
from command_line import GOOD, read_config, runner
from outbox import ConfigurationError, Outbox, Verdict
from outbox.cli import config, main

WHOLE = """
database = "sqlite:///outbox.db"

[policy]
max_sent = 5
backoff_ms = [5_000, 300_000]
when_full = "trim"

[policy.verdicts]
409 = "transient"
402 = "auth_blocked"

[destinations.default]
url = "https://ingest.example.com/events"
path = ""
format = "json:events"
auth = "none"
allow_insecure = true
headers = { X-Shop = "17", X-Api-Key = { env = "SHOP_KEY" } }
compression = "gzip"
read_answer = "results"
cert = ["client.pem", "client.key"]
verify = "ca.pem"
connect_timeout_ms = 1_000
read_timeout_ms = 2_000
deadline_ms = 3_000
max_answer_bytes = 4_000
max_batch_bytes = 5_000
webhook_secret_file = "hook"

[destinations.billing]
token_env = "BILLING_TOKEN"

[destinations.search]

[routes]
order_placed = ["billing", "search"]
"*" = "default"
"""


def test_the_file_says_what_the_commands_need(tmp_path, monkeypatch):
    found = read_config(tmp_path, WHOLE)
    assert found.database == "sqlite:///outbox.db"
    assert found.policy == {
        "max_sent": 5,
        "backoff_ms": (5_000, 300_000),
        "when_full": "trim",
        "verdicts": {409: Verdict.TRANSIENT, 402: Verdict.AUTH_BLOCKED},
    }
    assert found.routes == {"order_placed": ["billing", "search"], "*": "default"}
    assert [*found.destinations] == ["default", "billing", "search"]
    assert found.destination("default").settings["format"] == "json:events"
    assert found.destination("archive").settings == {}


@pytest.mark.parametrize("text", ["", "[policy]", "[routes]", "[destinations]", "[destinations.default]"])
def test_a_file_may_leave_everything_open(tmp_path, text):
    found = read_config(tmp_path, text)
    assert (found.database, found.policy, found.routes) == (None, {}, {})
    assert found.destination("default").settings == {}


REFUSED = [
    ("databse = 'x'", "databse is unknown; the nearest setting is database"),
    ("[polcy]", "polcy is unknown; the nearest setting is policy"),
    ("[policy]\nbatchsize = 3", "policy.batchsize is unknown; the nearest setting is policy.batch_size"),
    ("[policy]\nbatch_size = 'x'", "policy: batch_size is 'x', expected a whole number from 1 to"),
    ("[policy]\nbackoff_ms = [0]", r"policy: backoff_ms is \(0,\), expected one or more whole numbers"),
    ("[policy]\nverdicts = 5", "policy: verdicts is 5, expected a mapping"),
    ("[policy.verdicts]\n600 = 'transient'", "policy.verdicts.600 is unknown, expected an HTTP status, 100 to 599"),
    ("[policy.verdicts]\n409 = 'retry'", "policy.verdicts.409 is 'retry', expected one of 'transient', 'rate_limited', "),
    ("policy = 3", r"policy is \(not shown\), expected a table"),
    ("destinations = []", r"destinations is \(not shown\), expected a table"),
    ("[destinations.'c r']", "destinations: the destination is 'c r', expected a name: 1 to 191 printable"),
    ("[destinations.billing]\nurll = 'x'", "destinations.billing.urll is unknown; the nearest setting is destinations.billing.url"),
    ("[destination.billing]", "destination is unknown; the nearest setting is destinations"),
    ("routes = []", r"routes is \(not shown\), expected a table"),
    ("[routes]\norder = 5", r"routes.order: the value is 5, expected a destination, or a list of destinations"),
    ("[routes]\norder = []", r"routes.order: the value is \[\], expected a destination, or a list"),
    ("[routes]\norder = ['b', 'b']", r"routes.order: the value is \['b', 'b'\], expected different destinations"),
    ("[routes]\norder = 'c r'", "routes.order: the destination is 'c r', expected a name"),
    ("[routes]\norder = ['default', 'biling']\n[destinations.billing]", "routes.order leads to biling, which is unknown; the nearest destination of the file is billing"),
    ("destinations.default = 'https://x'", r"destinations.default is \(not shown\), expected a table"),
    ("database = 'x'\ndatabase_env = 'D'", "database and database_env are set, expected one of them"),
    ("database_env = 'NOT_SET_ANYWHERE'", "database_env leads to an empty text, expected an SQLAlchemy URL"),
    ("url = ", "the file is not TOML: Invalid value"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_what_the_file_can_not_say_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ConfigurationError, match=f"/outbox.toml: .*{message}"):
        read_config(tmp_path, text)


def test_routes_may_lead_anywhere_if_the_file_describes_no_destination(tmp_path):
    assert read_config(tmp_path, "[routes]\norder = 'billing'").routes == {"order": "billing"}


@pytest.mark.parametrize(
    "database",
    ["'postgresql://shop:s3cret@db/shop'", "'postgresql://db/shop?password=s3cret'", "['s3cret']"],
)
def test_the_url_of_the_database_holds_no_secret_and_no_error_shows_one(tmp_path, database):
    with pytest.raises(ConfigurationError, match="database .*expected") as refused:
        read_config(tmp_path, f"database = {database}")
    assert "s3cret" not in str(refused.value)


def test_a_file_that_can_not_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="none.toml: the file can't be read: No such file or directory"):
        config.read(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    "source", ["database_env = 'SHOP_URL'", "database_file = 'url'", "database = 'sqlite:///a.db'"]
)
def test_the_url_of_the_database_comes_from_the_file_or_from_elsewhere(tmp_path, monkeypatch, source):
    monkeypatch.setenv("SHOP_URL", "sqlite:///a.db")
    (tmp_path / "url").write_text("sqlite:///a.db\n")
    assert read_config(tmp_path, source).database == "sqlite:///a.db"


# Which file


def pending(*arguments):
    result = runner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Three files, each with the URL of a database that is named like it."""
    monkeypatch.chdir(tmp_path)
    for name in ("outbox", "one", "two"):
        Path(f"{name}.toml").write_text(f"database = 'sqlite:///{name}.db'")
        Outbox.open(f"sqlite:///{name}.db").close()


@pytest.mark.usefixtures("files")
def test_the_option_comes_before_the_variable_before_the_current_directory(monkeypatch):
    assert "outbox.db" in pending("status")
    assert "one.db" in pending("--config", "one.toml", "status")
    assert "one.db" in pending("status", "--config", "one.toml")
    assert "two.db" in pending("--config", "one.toml", "status", "--config", "two.toml")
    monkeypatch.setenv("OUTBOX_CONFIG", "two.toml")
    assert "two.db" in pending("status")
    assert "one.db" in pending("status", "--config", "one.toml")


@pytest.mark.usefixtures("files")
def test_an_option_comes_before_the_environment_before_the_file(monkeypatch):
    assert "two.db" in pending("status", "--database", "sqlite:///two.db")
    assert "two.db" in pending("--database", "sqlite:///two.db", "status")
    monkeypatch.setenv("OUTBOX_DATABASE_URL", "sqlite:///one.db")
    assert "one.db" in pending("status")
    assert "two.db" in pending("status", "--database", "sqlite:///two.db")


def test_a_bound_comes_from_the_option_the_environment_or_the_file(run, outbox, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outbox.toml").write_text("[policy]\nmax_undelivered = 1\nwhen_full = 'reject'")
    assert run("enqueue", input=GOOD).exit_code == 0
    assert run("enqueue", input=GOOD).exit_code == 1
    assert "nine tenths of max_undelivered (1)" in run("status").stdout
    monkeypatch.setenv("OUTBOX_MAX_UNDELIVERED", "2")
    assert run("enqueue", input=GOOD).exit_code == 0
    assert run("enqueue", input=GOOD).exit_code == 1
    assert run("enqueue", "--max-undelivered", "0", input=GOOD).exit_code == 0
    assert run("enqueue", "--max-undelivered", "3", "--when-full", "trim", input=GOOD).exit_code == 0
    assert len(statuses(outbox)) == 3


@pytest.mark.usefixtures("files")
def test_a_file_in_the_current_directory_is_refused_if_another_user_owns_it(monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: Path("outbox.toml").stat().st_uid + 1)
    monkeypatch.setattr(Path, "stat", lambda _path, **_: os.stat_result((0, 0, 0, 0, 5, *[0] * 5)))
    with pytest.raises(ConfigurationError, match="outbox.toml belongs to another user; .* name it with --config"):
        config.read(None)
    assert config.read("one.toml").database == "sqlite:///one.db"


@pytest.mark.usefixtures("files")
def test_a_system_without_owners_reads_the_file_of_the_current_directory(monkeypatch):
    monkeypatch.delattr(os, "getuid")
    assert config.read(None).database == "sqlite:///outbox.db"


def test_a_mistake_in_the_file_is_misuse_and_does_not_hide_the_help(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outbox.toml").write_text("token = 'x'")
    result = runner().invoke(main, ["status"])
    assert result.exit_code == 2
    assert result.stderr.startswith("outbox: outbox.toml: token is unknown; the nearest setting is ")
    assert runner().invoke(main, ["status", "--help"]).exit_code == 0
