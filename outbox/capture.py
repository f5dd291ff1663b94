"""The opt-out of whoever runs the program, in the environment."""

from __future__ import annotations

import os

IS_OFF = "capture is off (OUTBOX_CAPTURE=false)"
PAUSED = f"delivery is paused, {IS_OFF}"


def is_off() -> bool:
    """Tell whether nothing is to be recorded, and nothing that is queued to be sent; asked anew each time."""
    return os.environ.get("OUTBOX_CAPTURE") == "false"
