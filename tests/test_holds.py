"""The rules for holds that need no database."""

from __future__ import annotations

import pytest

from builders import NOON_MS
from outbox import ConfigurationError, Hold
from outbox.clock import LATEST_MS
from outbox.holds import LONGEST_WHY, checked_end_ms, checked_why, hold_in_words


def test_a_hold_in_words_says_since_when_until_when_why_and_what_ends_it() -> None:
    forever = Hold("billing", "billing moves", NOON_MS, None)
    assert hold_in_words(forever) == (
        "an operator put billing on hold at 2026-11-24 12:00:00 UTC: billing moves; `outbox resume billing` ends the hold"
    )
    for_a_while = Hold("default", "a deploy", NOON_MS, NOON_MS + 60_000)
    assert hold_in_words(for_a_while) == (
        "an operator put default on hold at 2026-11-24 12:00:00 UTC until 2026-11-24 12:01:00 UTC: a deploy;"
        " `outbox resume default` ends the hold"
    )


def test_a_hold_without_an_end_never_ends() -> None:
    assert Hold("billing", "a deploy", 0, 17).ends_ms == 17
    assert Hold("billing", "a deploy", 0, None).ends_ms == LATEST_MS


@pytest.mark.parametrize("why", [None, "", " \n", 17])
def test_a_hold_needs_a_reason(why: object) -> None:
    with pytest.raises(ConfigurationError, match="why is .*, expected a text that says why"):
        checked_why(why)


def test_the_reason_is_bounded_and_can_be_stored_anywhere() -> None:
    assert checked_why("x" * LONGEST_WHY) == "x" * LONGEST_WHY
    assert checked_why("a\0b\udcffc") == "a\ufffdb?c"
    with pytest.raises(ConfigurationError, match="why has 501 characters, expected at most 500"):
        checked_why("x" * 501)


@pytest.mark.parametrize("until_ms", [NOON_MS, NOON_MS - 1, -(2**60), LATEST_MS + 1, 2**62])
def test_a_hold_ends_in_the_future_and_at_a_date(until_ms: int) -> None:
    with pytest.raises(ConfigurationError, match="expected a time after 2026-11-24 12:00:00 UTC"):
        checked_end_ms(until_ms, now_ms=NOON_MS)
    assert checked_end_ms(NOON_MS + 1, now_ms=NOON_MS) == NOON_MS + 1
