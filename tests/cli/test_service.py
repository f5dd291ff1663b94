from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from builders import row, rule_fired, statuses
from command_line import GOOD, TOKEN, process

EVENT = json.loads(GOOD)
AUTHORIZATION = "Authorization"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("X-Shop", "'X-Shop', expected NAME:VALUE, such as X-Shop:17"),
        ("X-Api-Key:s3cret", "X-Api-Key is the name of a credential"),
        ("Authorization: Bearer s3cret", "Authorization is the name of a credential"),
    ],
)
def test_a_header_that_is_none_or_secret_is_misuse(run, header, message):
    result = run("flush", "--url", "http://localhost", "--header", header)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "s3cret" not in result.output


@pytest.mark.parametrize("command", ["flush", "run"])
def test_without_a_url_the_ways_to_name_one_are_told(run, outbox, command):
    result = run(command)
    assert result.exit_code == 2
    assert "expected --url, OUTBOX_URL, url in outbox.toml, or --client" in " ".join(result.stderr.split())


def test_a_destination_without_a_url_is_named_with_those_that_the_file_describes(
    run, outbox, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUTBOX_URL", "https://ingest.example.com")
    Path("outbox.toml").write_text("[destinations.billing]\n[destinations.search]")
    for command in ("flush", "run"):
        result = run(command, "--destination", "biling")
        assert result.exit_code == 2
        assert (
            "there is no URL of a service for the destination biling, expected --url, url in outbox.toml, or"
            " --client; the file describes billing, search; --destination chooses one"
        ) in " ".join(result.stderr.split())


def test_a_name_that_no_destination_can_have_is_misuse(run, outbox):
    result = run("flush", "--destination", "c r")
    assert result.exit_code == 2
    assert result.stderr.startswith("outbox: the destination is 'c r', expected a name: 1 to 191 printable ASCII")


# A client written in code

DELIVERY = """
class Printing:
    logged_in = True
    closed = 0

    def upload(self, batch):
        for item in batch:
            print("deliver", item.event_type)

    def close(self):
        print("closed")

class Halfway:
    logged_in = True

class LoggedOut(Printing):
    logged_in = False
    close = None.__class__

def broken():
    raise LookupError("token=s3cret-value")

def refusing():
    from outbox import ConfigurationError
    raise ConfigurationError("the shop is closed")

printing = Printing
halfway = Halfway
logged_out = LoggedOut
number = 5
"""


@pytest.fixture
def delivery(tmp_path, monkeypatch):
    (tmp_path / "shop_delivery.py").write_text(DELIVERY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("shop_delivery", None)


@pytest.mark.usefixtures("delivery")
@pytest.mark.parametrize("options", [[], ["--all"]])
def test_flush_delivers_by_a_client_written_in_code(run, outbox, monkeypatch, options):
    monkeypatch.setenv("OUTBOX_URL", "https://nowhere.invalid")
    outbox.enqueue(rule_fired())
    result = run("flush", "--client", "shop_delivery:printing", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("deliver rule_fired\n")
    assert "closed\n" in result.stdout
    assert statuses(outbox) == ["sent"]


@pytest.mark.usefixtures("delivery")
def test_run_delivers_by_a_client_written_in_code(outbox, url):
    row_id = outbox.enqueue(rule_fired())
    with process(
        "-u", "-m", "outbox", "--database", url, "run", "--client", "shop_delivery:printing", stdout=-1, stderr=-1
    ) as worker:
        assert worker.stdout.readline() == b"deliver rule_fired\n"
        worker.terminate()
        shown = worker.communicate()
    assert shown[0].endswith(b"closed\n")
    assert b" to shop_delivery:printing\n" in shown[1]
    assert row(outbox, row_id).status == "sent"


@pytest.mark.usefixtures("delivery", "outbox")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shop_delivery", "'shop_delivery', expected MODULE:FACTORY, such as shop.delivery:client"),
        (":printing", "':printing', expected MODULE:FACTORY"),
        ("no_such_module:printing", "can't import 'no_such_module': No module named 'no_such_module'"),
        ("shop_delivery:nothing", "the module shop_delivery has no function 'nothing'"),
        ("shop_delivery:number", "the module shop_delivery has no function 'number'"),
        ("shop_delivery:halfway", "--client shop_delivery:halfway returned a Halfway, expected an UploadClient"),
        ("shop_delivery:broken", "--client shop_delivery:broken failed: LookupError: token=[REDACTED-TOKEN]"),
        ("shop_delivery:refusing", "outbox: the shop is closed"),
    ],
)
def test_a_client_that_can_not_be_made_is_misuse(run, name, message):
    result = run("flush", "--client", name)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "s3cret" not in result.output


# Without credentials


@pytest.mark.usefixtures("outbox")
@pytest.mark.parametrize(
    ("lines", "way"),
    [
        ("", "set token_env or token_file in [destinations.billing] of outbox.toml"),
        ("token_env = 'SHOP_TOKEN'", "set what token_env names"),
    ],
)
def test_the_token_of_the_environment_is_for_the_default_destination_only(run, tmp_path, monkeypatch, lines, way):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUTBOX_TOKEN", TOKEN)
    Path("outbox.toml").write_text(f"[destinations.billing]\nurl = 'https://ingest.example.com'\n{lines}")
    result = run("flush", "--destination", "billing")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.endswith(f"; {way}\n")


@pytest.mark.usefixtures("outbox")
@pytest.mark.parametrize(
    ("lines", "way"),
    [
        ("", "set OUTBOX_TOKEN or OUTBOX_TOKEN_FILE"),
        ("token_env = 'SHOP_TOKEN'", "set OUTBOX_TOKEN or OUTBOX_TOKEN_FILE or what token_env names"),
        ("auth = 'basic'\nuser = 'shop'\npassword_env = 'SHOP_TOKEN'", "set what password_env names"),
        ("auth = 'api-key'\napi_key_header = 'X-Key'\napi_key_env = 'SHOP_TOKEN'", "set what api_key_env names"),
    ],
)
def test_a_flush_without_credentials_says_which_to_set(run, tmp_path, monkeypatch, lines, way):
    monkeypatch.chdir(tmp_path)
    Path("outbox.toml").write_text(f"[destinations.default]\nurl = 'https://ingest.example.com'\n{lines}")
    result = run("flush")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.endswith(f"; {way}\n")


def test_status_names_the_missing_credentials_while_events_wait(run, outbox, tmp_path, monkeypatch):
    def cause():
        return json.loads(run("status", "--json").stdout)["likely_cause"]

    monkeypatch.chdir(tmp_path)
    outbox.enqueue(rule_fired())
    assert cause() is None  # perhaps a program delivers
    monkeypatch.setenv("OUTBOX_URL", "https://ingest.example.com")
    missing = "not logged in, there are no credentials; set OUTBOX_TOKEN or OUTBOX_TOKEN_FILE; 1 event is waiting"
    assert cause() == missing
    assert missing in " ".join(run("status").stdout.split())
    monkeypatch.setenv("OUTBOX_TOKEN_FILE", "nowhere")
    assert cause().startswith(
        "not logged in: OUTBOX_TOKEN_FILE is 'nowhere', expected a file that holds the token"
    )
    monkeypatch.setenv("OUTBOX_TOKEN", TOKEN)
    assert cause() is None
    login = "auth = 'oauth2'\ntoken_url = 'https://a'\nclient_id = 'a'\nclient_secret_env = 'NOT_SET_ANYWHERE'"
    for lines, words in (("auth = 'none'", None), (login, "set what client_secret_env names")):
        Path("outbox.toml").write_text(f"[destinations.default]\n{lines}")
        assert (words is None and cause() is None) or words in cause()


@pytest.mark.usefixtures("delivery", "outbox")
def test_a_client_written_in_code_that_is_not_logged_in_is_named(run):
    result = run("flush", "--client", "shop_delivery:logged_out")
    assert result.exit_code == 3
    assert result.stderr.endswith("; see the client of shop_delivery:logged_out\n")
