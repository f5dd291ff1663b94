"""The opt-out: an environment variable that turns capture off."""

from __future__ import annotations

import os

_NAME = os.environ.encodekey("OUTBOX_CAPTURE")
_FALSE = os.environ.encodevalue("false")

IS_OFF = "capture is off (OUTBOX_CAPTURE=false)"
"""Why nothing is enqueued and nothing is sent."""


def is_off() -> bool:
    """Return whether capture is off. The environment is read on each call."""
    # Called by each enqueue. If the variable is not set, `os.environ.get` raises and catches two exceptions. The
    # dict behind it raises none.
    values = getattr(os.environ, "_data", None)
    if values is None:
        return os.environ.get("OUTBOX_CAPTURE") == "false"
    return bool(values.get(_NAME) == _FALSE)
