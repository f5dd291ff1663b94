"""The opt-out: an environment variable that turns capture off."""

from __future__ import annotations

import os

IS_OFF = "capture is off (OUTBOX_CAPTURE=false)"
"""Why nothing is enqueued and nothing is sent."""


def is_off() -> bool:
    """Return whether capture is off. The environment is read on each call."""
    return os.environ.get("OUTBOX_CAPTURE") == "false"
