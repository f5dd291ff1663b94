from __future__ import annotations

from pathlib import Path

import pytest

from builders import NOON_MS, add_row
from outbox import ConfigurationError, Where, web
from outbox.web import create_app
from outbox.web.console import Console


def test_a_console_that_everybody_could_enter_is_refused(outbox):
    with pytest.raises(ConfigurationError, match="neither may_enter nor secret, expected one of them or both"):
        create_app(outbox)


def test_a_short_secret_is_refused_and_not_repeated(outbox):
    with pytest.raises(
        ConfigurationError, match=r"^the secret of the console has 6 characters, expected at least 16$"
    ):
        create_app(outbox, secret="sesame")


def test_the_session_key_is_neither_the_secret_nor_the_key_of_the_host(outbox):
    secret = "a-secret-of-the-tests"
    by_secret, same, by_key = (
        create_app(outbox, secret=secret, secret_key=key).secret_key for key in (None, None, "host's")
    )
    assert by_secret == same != by_key
    assert secret.encode() not in by_secret
    assert by_key != b"host's"


def test_a_key_of_bytes_is_as_good_as_a_text(outbox):
    keys = {create_app(outbox, may_enter=bool, secret_key=key).secret_key for key in ("host's", b"host's")}
    assert len(keys) == 1


def test_without_a_key_each_console_has_its_own(outbox):
    assert create_app(outbox, may_enter=bool).secret_key != create_app(outbox, may_enter=bool).secret_key


def test_each_page_says_which_database_it_shows_and_no_password(browser, outbox):
    browser.get("/")
    assert outbox.engine.url.render_as_string(hide_password=True) in browser.text
    assert isinstance(browser.app.extensions["outbox"], Console)


@pytest.mark.contract
def test_every_page_works_on_every_database(browser, outbox):
    for columns in ({"status": "parked"}, {"status": "sent", "sent_at_ms": NOON_MS}, {"waits_for": "service"}):
        add_row(outbox, last_error="503 Down", destination="billing", **columns)
    outbox.hold("billing", why="it moves")
    outbox.purge(where=Where(status="sent"))
    for page in (
        "/",
        "/live",
        "/events?failure=Down&payload=rule&older_than=0s",
        "/events?order=oldest&from=1",
        "/events/1",
        "/events/confirm?do=retry&scope=all",
        "/events/confirm?do=purge&scope=all&failure=Down",
        "/destinations",
        "/ledger",
    ):
        assert browser.get(page).status_code == 200, page
    browser.get("/events/confirm?do=retry&scope=all")
    browser.post("/events/act", do="retry", scope="all")
    assert "1 event was made due." in browser.text


def test_no_template_has_a_style_or_a_script_inside():
    """The Content-Security-Policy would block it."""
    templates = [*Path(web.__file__).parent.glob("templates/*.html")]
    assert templates
    for template in templates:
        text = template.read_text(encoding="utf-8")
        assert not any(
            word in text for word in (" style=", "<style", "onclick=", "javascript:", "|safe", "| safe")
        )
        assert text.count("<script") == text.count("<script src=")
