from __future__ import annotations

import pytest

from builders import NOON_MS
from outbox.web import texts


@pytest.mark.parametrize(
    ("rate", "words"),
    [(None, "not known yet"), (0, "0 a second"), (0.05, "3.0 a minute"), (12.3, "12 a second"), (1234.5, "1,234 a second")],
)  # fmt: skip
def test_a_rate_has_the_digits_that_matter(rate, words):
    assert texts.per_s(rate) == words


def test_large_numbers_are_easy_to_read():
    assert texts.counted_with_commas(1, "event") == "1 event"
    assert texts.counted_with_commas(1_234_567, "event") == "1,234,567 events"


def test_a_time_is_its_distance_and_the_exact_one_on_demand():
    assert texts.time(NOON_MS - 180_000, NOON_MS) == (
        '<time datetime="2026-11-24T11:57:00.000+00:00" title="2026-11-24 11:57:00 UTC">3 minutes ago</time>'
    )
    assert ">in 2 seconds<" in texts.time(NOON_MS + 2_000, NOON_MS)


def test_a_sentence_begins_and_ends_like_one():
    assert texts.sentence("it waits; see `outbox status`") == "It waits; see `outbox status`."


def test_commands_in_a_text_are_set_as_code_and_all_of_it_is_escaped():
    assert texts.with_code("run `outbox <b>` \x1b") == "run <code>outbox &lt;b&gt;</code> \\x1b"


@pytest.mark.parametrize("stored", [10**18, -1, "<b>"])
def test_a_stored_value_that_is_no_time_is_shown_escaped(stored):
    shown = texts.time(stored, NOON_MS)
    assert shown.startswith("<span>")
    assert "<b>" not in shown
