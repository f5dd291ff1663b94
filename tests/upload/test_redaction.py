from __future__ import annotations

import html
import json
import secrets
import traceback
import urllib.parse

import pytest

from outbox.upload.redaction import private_locals, redact, redact_likely, without_end

TOKEN = "tok-123/abc+def=="
LATIN_TOKEN = "tökén-äöü-123"
CANARY = secrets.token_hex()  # tracebacks show the lines of this file, so it must not stand in one
MARKED = "a<b>&\"c'\\d/e"


def read(data):
    """As the client reads a body: in UTF-8, whatever it is in."""
    return data.decode(errors="replace")


@pytest.mark.parametrize(
    ("secret", "spelling"),
    [
        (TOKEN, TOKEN),
        (TOKEN, TOKEN.upper()),
        (TOKEN, TOKEN.replace("/", "\\/")),
        (TOKEN, TOKEN.replace("+", "\\u002B").replace("=", "\\u003d")),
        (TOKEN, urllib.parse.quote(TOKEN)),
        (TOKEN, urllib.parse.quote(TOKEN, safe="")),
        (TOKEN, urllib.parse.quote(TOKEN, safe="").lower()),
        (TOKEN, TOKEN.replace("/", "&#x2F;").replace("=", "&#61;")),
        (MARKED, json.dumps(MARKED)[1:-1]),
        (MARKED, repr(MARKED)[1:-1]),
        (MARKED, html.escape(MARKED)),
        (MARKED, html.escape(MARKED).replace("x27", "039")),
        (LATIN_TOKEN, LATIN_TOKEN),
        (LATIN_TOKEN, LATIN_TOKEN.encode().decode("latin-1")),
        (LATIN_TOKEN, read(LATIN_TOKEN.encode("latin-1"))),
        (LATIN_TOKEN, json.dumps(LATIN_TOKEN)[1:-1]),
        (LATIN_TOKEN, ascii(LATIN_TOKEN)[1:-1]),
        (LATIN_TOKEN, repr(LATIN_TOKEN.encode())[2:-1]),
        (LATIN_TOKEN, LATIN_TOKEN.encode("ascii", "xmlcharrefreplace").decode()),
        (LATIN_TOKEN, LATIN_TOKEN.replace("ö", "&ouml;").replace("ä", "&auml;")),
        (LATIN_TOKEN, urllib.parse.quote(LATIN_TOKEN)),
        (LATIN_TOKEN, LATIN_TOKEN.encode("ascii", "xmlcharrefreplace").decode().replace("&#", "&#000")),
        (TOKEN, json.dumps(TOKEN.replace("/", "\\/"))[1:-1]),
        (TOKEN, json.dumps(json.dumps(TOKEN)[1:-1].replace("/", "\\u002f"))[1:-1]),
        (TOKEN, urllib.parse.quote(urllib.parse.quote(TOKEN, safe=""))),
        (TOKEN, html.escape(TOKEN.replace("/", "&#x2F;"))),
        (TOKEN, TOKEN.replace("/", "&sol;").replace("+", "&plus;")),
        (TOKEN, "\0".join(TOKEN)),
        (LATIN_TOKEN, read(LATIN_TOKEN.encode("utf-16-le"))),
        ("12345678", "12345678"),
    ],
)
def test_a_secret_is_taken_out_however_it_is_spelled(secret, spelling):
    text = f"Bearer {spelling} and {spelling} end"

    assert redact(text, [secret]) == "Bearer [REDACTED-TOKEN] and [REDACTED-TOKEN] end"


@pytest.mark.parametrize(
    "text",
    [
        "500 Server Error for url: https://{}@ingest.example.com:8443/v1?page=2",
        "refused by http://ingest.example.com/v1?page=2&access_token={}&size=3",
        "for url: https://ingest.example.com/?key={}#top",
        "password={}, host=ingest",
        "api_key='{}' is wrong",
        '{{"user": "me", "client_secret": "{}", "age": 3}}',
        "{{'X-Api-Key': '{}'}}",
        "Authorization: {}",
        "sent Bearer {} to ingest",
        "sent basic {}",
    ],
)
def test_what_looks_like_a_credential_is_taken_out(text):
    assert redact_likely(text.format("tok-123.abc=")) == text.format("[REDACTED-TOKEN]")


@pytest.mark.parametrize(
    "text",
    [
        "'NoneType' object has no attribute 'status_code'",
        "OUTBOX_TOKEN_FILE is '/run/token', expected a file with the token: Permission denied",
        "HTTPSConnectionPool(host='ingest.example.com', port=443): Max retries exceeded with url: /v1?page=2",
        "basic auth is required, a bearer of bad news",
        "Duplicate entry 'a@b' for key 'PRIMARY'",
    ],
)
def test_what_looks_like_no_credential_stays(text):
    assert redact_likely(text) == text


@pytest.mark.parametrize("text", ["x" * 100_000, "token" * 20_000, '"' + "token" * 20_000, "://" * 30_000])
def test_a_long_text_is_searched_for_what_looks_like_a_credential(text):
    assert redact_likely(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "\\" * 65_536,
        "&" * 65_536,
        "&amp;" * 13_000,
        "&" + "amp;" * 16_000,
        "%25" * 21_000,
        "&#0" * 21_000,
        "\0" * 65_536,
    ],
)
def test_a_long_text_of_escapes_is_searched_for_a_secret_of_escapes(text):
    assert redact(text, ["\\" * 20 + "&amp;%25&#x", "&" * 20 + "x", "%" * 20 + "x"]) == text


def test_a_text_without_a_secret_keeps_its_escapes():
    text = r"a \n b \u00e9 %41 &amp; &#65; &unknown; &#9999999; \ud800 "
    assert redact(text, [TOKEN]) == text


@pytest.mark.parametrize("escape", ["&#0;", "&#9999999;", "\\ud800", "&unheard;", "%ff"])
def test_an_escape_that_means_nothing_hides_no_secret(escape):
    assert "[REDACTED-TOKEN]" in redact(f"{escape} {TOKEN.replace('/', '&#47;')}", [TOKEN])


def test_a_text_shorter_than_8_characters_is_left_alone():
    assert redact("error 1234567", ["1234567"]) == "error 1234567"


def test_of_a_text_that_was_cut_no_beginning_of_a_secret_is_left():
    spelled = "".join(f"%{byte:02x}" for byte in LATIN_TOKEN.encode())
    for shown in range(len(spelled)):
        assert without_end("x" * 500 + spelled[:shown], ["short", LATIN_TOKEN]).strip("x") == ""


def fail(secret):
    raise LookupError("a bug")


def locals_shown(error):
    return "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())


def test_an_error_leaves_its_local_variables_behind_and_keeps_its_lines():
    with pytest.raises(LookupError) as caught, private_locals():
        fail(CANARY)

    shown = locals_shown(caught.value)
    assert CANARY not in shown
    assert 'raise LookupError("a bug")' in shown


def test_so_do_the_errors_that_it_came_up_with():
    def fail_twice(secret):
        try:
            fail(secret)
        except LookupError:
            raise KeyboardInterrupt from None

    with pytest.raises(KeyboardInterrupt) as caught, private_locals():
        fail_twice(CANARY)

    shown = locals_shown(caught.value) + locals_shown(caught.value.__context__)
    assert CANARY not in shown
    assert 'raise LookupError("a bug")' in shown


def test_an_error_from_before_keeps_its_local_variables():
    try:
        fail(CANARY)
    except LookupError as before:
        with pytest.raises(KeyError), private_locals():
            _ = {}["something else"]
        assert CANARY in locals_shown(before)


def test_an_error_that_was_the_cause_from_before_leaves_its_local_variables_behind():
    def keep(secret):
        try:
            fail(secret)
        except LookupError as error:
            return error

    def fail_because_of(cause):
        raise KeyError from cause

    with pytest.raises(KeyError) as caught, private_locals():
        fail_because_of(keep(CANARY))

    assert CANARY not in locals_shown(caught.value)


def test_errors_that_refer_to_each_other_in_a_circle_come_through():
    def fail_in_a_circle(secret):
        first, second = LookupError("first"), LookupError("second")
        first.__context__, second.__context__ = second, first
        raise first

    with pytest.raises(LookupError, match="first") as caught, private_locals():
        fail_in_a_circle(CANARY)

    caught.value.__context__.__context__ = None  # pytest shows no circles
    assert CANARY not in locals_shown(caught.value)


def test_a_secret_that_begins_with_another_one_is_replaced_whole_in_any_order() -> None:
    longer = f"{TOKEN}-and-more"
    assert redact(f"<{longer}>", [TOKEN, longer]) == redact(f"<{longer}>", [longer, TOKEN]) == "<[REDACTED-TOKEN]>"
