"""The types of columns, and which values are valid in those of integers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import BigInteger, Text, TextClause

# Dialects write some of them in another way, by hooks of SQLAlchemy's compiler.


class Id(BigInteger):
    """A primary key to which the database gives a value that it never used before."""


class _StoredText(Text):
    """A text. SQLite stores any value in any column. If it is a BLOB, its bytes are decoded."""

    def result_processor(self, dialect: object, coltype: object) -> Callable[[Any], str | None]:  # noqa: ARG002 - the base's signature
        return _as_text


def _as_text(value: Any) -> str | None:
    text: str | None = value.decode(errors="backslashreplace") if isinstance(value, bytes) else value
    return text


class Name(_StoredText):
    """A text of at most `LONGEST_NAME` characters, which an index can hold."""


class LongText(_StoredText):
    """A text as long as the largest payload."""


class ShortText(_StoredText):
    """A text of at most 16 characters."""


class TextDefault(TextClause):
    """The default of a text."""

    inherit_cache = True


LONGEST_NAME = 191
"""How many characters MySQL can index."""

TIMES_BELOW = 2**53
INTEGERS = {
    # A failure, or a lost lease, adds one, and an Integer has to hold the sum.
    "retry_count": 2**31 - 1,
    "lost_leases": 2**31 - 1,
    **dict.fromkeys(
        (
            "created_at_ms",
            "revived_at_ms",
            "suspected_at_ms",
            "occurred_at_ms",
            "sent_at_ms",
            "next_attempt_at_ms",
            "not_before_ms",
        ),
        TIMES_BELOW,
    ),
}
"""The integer columns; a valid value is a whole number below this. SQLite stores any value in any column."""


def invalid_column(columns: Iterable[tuple[str, object]]) -> str | None:
    """Return which integer column holds an invalid value, in words, or None. Other columns are ignored."""
    for name, value in columns:
        below = INTEGERS.get(name)
        if below is not None and value is not None and (type(value) is not int or value >= below):
            return f"the column {name} is {value!a}, expected a whole number below {below}"
    return None
