from __future__ import annotations

import pytest

from builders import NOON_MS
from command_line import HOSTILE, STEERING
from outbox import words


def test_escaped_text_is_one_line_that_steers_nothing():
    shown = words.escape(HOSTILE)
    assert "red" in shown
    assert not STEERING.search(shown)
    assert "\n" not in shown


@pytest.mark.parametrize("text", ["1h", "999999d", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"])
def test_each_time_can_be_written_and_read_again(text):
    moment = words.moment_ms(text, now_ms=NOON_MS)
    assert words.moment_ms(words.exact(moment), now_ms=NOON_MS + 1) == moment
