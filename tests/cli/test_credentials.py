from __future__ import annotations

from pathlib import Path

import pytest

from outbox import ConfigurationError
from outbox.cli.credentials import expanded, first_of, in_file, in_variable, noticing


def test_a_secret_is_read_on_each_call(monkeypatch, tmp_path):
    file = tmp_path / "secret"
    from_variable = in_variable("SHOP_SECRET", setting="token_env")
    from_file = in_file(file, setting="token_file")
    assert from_variable() is None
    for text in ("one", "two"):
        monkeypatch.setenv("SHOP_SECRET", f" {text}\n")
        file.write_text(f" {text}\n")
        assert from_variable() == from_file() == text
    monkeypatch.setenv("SHOP_SECRET", "")
    file.write_text(" \n")
    assert from_variable() is from_file() is None


def test_a_secret_that_is_no_word_keeps_its_blanks_but_not_the_end_of_its_line(tmp_path):
    file = tmp_path / "password"
    file.write_bytes(" pässword \r\n".encode())
    assert in_file(file, setting="password_file", is_word=False)() == " pässword "
    file.write_bytes(b"\xff")
    with pytest.raises(
        ConfigurationError, match="expected a file that holds the secret: the file is not UTF-8 text"
    ):
        in_file(file, setting="password_file", is_word=False)()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        ConfigurationError, match="key_file is '.*/none', expected a file that holds the secret: No such"
    ):
        in_file(tmp_path / "none", setting="key_file")()


def test_a_secret_with_blanks_is_not_repeated(monkeypatch):
    monkeypatch.setenv("SHOP_SECRET", "two words-of-it")
    with pytest.raises(ConfigurationError, match="^key_env holds a secret with blanks or .*, expected one word$"):
        in_variable("SHOP_SECRET", setting="key_env")()


def test_a_path_in_a_home_that_is_not_there_stays_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/token") == tmp_path / "token"
    assert expanded("~no-such-user/token") == Path("~no-such-user/token")


def test_the_first_text_counts():
    assert first_of(lambda: None, lambda: "two", lambda: "three")() == "two"
    assert first_of(lambda: None, lambda: "")() is None


def test_a_change_is_noticed_once_and_not_when_the_secret_is_taken_away():
    texts = iter(["one", "one", None, "one", "two", "two"])
    seen = []
    read = noticing(lambda: next(texts), lambda: seen.append("new"))
    assert [(read(), len(seen)) for _ in range(5)] == [("one", 0), (None, 0), ("one", 1), ("two", 2), ("two", 2)]
