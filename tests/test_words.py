from __future__ import annotations

from command_line import HOSTILE, STEERING
from outbox import words


def test_escaped_text_is_one_line_that_steers_nothing():
    shown = words.escape(HOSTILE)
    assert "red" in shown
    assert not STEERING.search(shown)
    assert "\n" not in shown
