from __future__ import annotations

import html
import json
import secrets
import traceback
import urllib.parse

import pytest

from outbox.redaction import private_locals, redact, without_end

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
        ("12345678", "12345678"),
    ],
)
def test_a_secret_is_taken_out_however_it_is_spelled(secret, spelling):
    text = f"Bearer {spelling} and {spelling} end"

    assert redact(text, [secret]) == "Bearer [REDACTED-TOKEN] and [REDACTED-TOKEN] end"


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
