"""Also of login.py and errors.py."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import text

from outbox import ConfigurationError
from outbox.storage.engines import writing
from outbox.web import create_app
from outbox.web.security import LOCAL_NAMES, from_this_machine

from .conftest import SECRET

PAGES = ("/", "/live", "/events", "/destinations", "/ledger")


def cookie(answer):
    (found,) = answer.headers.getlist("Set-Cookie")
    return found


def log_in(browser, secret=SECRET):
    browser.get("/login")
    return browser.post("/login", secret=secret)


@pytest.mark.parametrize("page", [*PAGES, "/login", "/nowhere", "/static/console.css"])
def test_every_answer_has_the_headers_that_keep_other_sites_out(open_console, page):
    headers = open_console(secret=SECRET).client.get(page, buffered=True).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "style-src": "'self'",
        "script-src": "'self'",
        "img-src": "'self' data:",
        "connect-src": "'self'",
        "form-action": "'self'",
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
    }
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == ("no-cache" if page.startswith("/static") else "no-store")


@pytest.mark.parametrize("page", PAGES)
def test_without_a_session_every_page_leads_to_the_login(open_console, page):
    answer = open_console(secret=SECRET).client.get(page)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/login")


def test_only_the_secret_opens_the_console(open_console):
    browser = open_console(secret=SECRET)
    assert log_in(browser, "a-secret-of-the-guest").status_code == 403
    assert "not the secret" in browser.text
    assert browser.client.get("/").status_code == 303
    assert log_in(browser).status_code == 200
    assert "Overview" in browser.text
    assert browser.client.get("/").status_code == 200


def test_the_session_cookie_is_for_this_console_only(open_console):
    browser = open_console(secret=SECRET)
    sent = cookie(browser.client.get("/login", environ_overrides={"SCRIPT_NAME": "/outbox"}))
    assert {"HttpOnly", "SameSite=Strict", "Path=/outbox"} < {*sent.split("; ")}
    assert "Secure" not in sent.split("; ")
    assert SECRET not in sent


@pytest.mark.parametrize("over_tls", [{"wsgi.url_scheme": "https"}, {"HTTP_X_FORWARDED_PROTO": "https"}])
def test_over_tls_the_cookie_stays_there(open_console, over_tls):
    sent = cookie(open_console(secret=SECRET).client.get("/login", environ_overrides=over_tls))
    assert "Secure" in sent.split("; ")


def test_a_login_gets_a_new_form_token(open_console):
    browser = open_console(secret=SECRET)
    browser.get("/login")
    before = re.search(r'name="form_token" value="([^"]+)"', browser.page).group(1)
    log_in(browser)
    browser.get("/")
    assert before not in browser.page


def test_an_answer_that_is_late_brings_no_session_back(open_console):
    browser = open_console(secret=SECRET)
    log_in(browser)
    browser.get("/")
    assert "Set-Cookie" not in browser.client.get("/live").headers


def test_after_the_logout_nobody_is_in(open_console):
    browser = open_console(secret=SECRET)
    log_in(browser)
    browser.post("/logout")
    assert "You are logged out" in browser.text
    assert browser.client.get("/").status_code == 303


def test_another_secret_ends_all_sessions(outbox, open_console):
    browser = open_console(secret=SECRET)
    log_in(browser)
    after = create_app(outbox, secret="another-secret-of-the-tests").test_client()
    after._cookies = browser.client._cookies
    assert after.get("/").status_code == 303


@pytest.mark.parametrize("given", [None, "", "guess", "gr\xfcn"])
def test_a_form_without_its_token_changes_nothing(open_console, given):
    browser = open_console(secret=SECRET)
    browser.get("/login")
    answer = browser.client.post("/login", data={"secret": SECRET} | ({"form_token": given} if given else {}))
    assert answer.status_code == 400
    assert browser.client.get("/").status_code == 303


def test_a_token_of_another_session_is_none(open_console):
    browser = open_console(secret=SECRET)
    browser.get("/login")
    token = re.search(r'name="form_token" value="([^"]+)"', browser.page).group(1)
    other = browser.app.test_client()
    assert other.post("/login", data={"secret": SECRET, "form_token": token}).status_code == 400


def test_the_host_decides_who_enters(open_console):
    browser = open_console(may_enter=lambda environ: environ.get("HTTP_X_USER") == "ada")
    assert browser.get("/").status_code == 403
    assert "you may not use this console" in browser.text
    assert browser.get("/", headers={"X-User": "ada"}).status_code == 200
    assert browser.client.get("/login").status_code == 403


def test_the_host_decides_even_about_who_knows_the_secret(open_console):
    browser = open_console(may_enter=lambda environ: environ.get("HTTP_X_USER") == "ada", secret=SECRET)
    assert browser.client.get("/", headers={"X-User": "ada"}).headers["Location"] == "/login"
    log_in(browser)
    assert browser.client.get("/").status_code == 403
    assert browser.client.get("/", headers={"X-User": "ada"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8765", 200),
        ("127.0.0.1:8765", 200),
        ("[::1]:8765", 200),
        ("console.example.com", 200),
        ("evil.example.com", 400),
        ("localhost.evil.example.com", 400),
        ("127.0.0.2", 400),
        ("[::1", 400),
        ("evil.example.com@localhost", 400),
        ("localhost:", 400),
        ("", 400),
    ],
)
def test_only_the_names_of_this_console_are_answered(open_console, host, status):
    browser = open_console(host_names=[*LOCAL_NAMES, "Console.example.com"])
    assert browser.get("/", headers={"Host": host}).status_code == status
    assert browser.get("/static/console.css", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("environ", "status"),
    [
        ({"REMOTE_ADDR": "127.0.0.1"}, 200),
        ({"REMOTE_ADDR": "::1"}, 200),
        ({"REMOTE_ADDR": "192.0.2.7"}, 403),
        ({"REMOTE_ADDR": "127.0.0.1", "HTTP_X_FORWARDED_FOR": "192.0.2.7"}, 403),
        ({"REMOTE_ADDR": "127.0.0.1", "HTTP_FORWARDED": "for=192.0.2.7"}, 403),
    ],
)
def test_without_a_secret_only_this_machine_enters_and_no_proxy(open_console, environ, status):
    browser = open_console(may_enter=from_this_machine)
    assert browser.get("/", environ_overrides=environ).status_code == status
    assert (status == 403) == ("this console has no secret" in browser.text)


def test_a_request_that_is_too_large_is_refused(browser):
    assert browser.post("/events", form_token="x" * 300_000).status_code in {405, 413}


def test_a_page_that_does_not_exist_says_so(browser):
    assert browser.get("/nowhere").status_code == 404
    assert "Not Found" in browser.text


def test_a_database_without_its_tables_is_named(browser, outbox):
    with writing(outbox.engine) as connection:
        connection.execute(text("DROP TABLE observation_events"))
    assert browser.get("/events").status_code == 503
    assert "no such table: observation_events" in browser.text


def test_input_that_makes_no_sense_is_named(browser):
    def refuse():
        raise ConfigurationError("status is 'x'")

    browser.app.add_url_rule("/refuse", view_func=refuse)
    assert browser.get("/refuse").status_code == 400
    assert "status is 'x'" in browser.text.replace("&#39;", "'")
