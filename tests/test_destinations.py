"""Names of destinations, as callers and the database know them."""

from __future__ import annotations

from typing import Any

import pytest

from outbox import ConfigurationError
from outbox.destinations import shown, stored


@pytest.mark.parametrize(
    ("name", "in_database", "in_words"),
    [
        ("default", "", "default"),
        (None, "", "default"),
        ("billing", "billing", "billing"),
        ("!~", "!~", "!~"),
        ("x" * 191, "x" * 191, "x" * 191),
    ],
)
def test_the_database_stores_an_empty_name_for_the_default(name: Any, in_database: str, in_words: str) -> None:
    assert stored(name) == in_database
    assert shown(in_database) == in_words


@pytest.mark.parametrize("name", ["", "with blank", "tab\t", "line\n", "ü", "x" * 192, 5, b"billing", ["billing"]])
def test_other_names_are_refused(name: Any) -> None:
    with pytest.raises(
        ConfigurationError, match="^the destination is .*, expected a name: 1 to 191 printable ASCII"
    ):
        stored(name)
