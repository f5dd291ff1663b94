"""The standard streams of a command that was started with some of them closed, or whose reader exits."""

from __future__ import annotations

import os
import sys


def open_closed_streams() -> None:
    """Let closed output streams lead nowhere, as to /dev/null.

    Otherwise Python has no object to print to, and the next file or connection that is opened gets the number of
    the stream. Standard input stays None, so that a command that reads it can tell.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest free number: that of the stream
            if name != "stdin":
                setattr(sys, name, os.fdopen(descriptor, "w"))


def drop_unwritten() -> None:
    """Forget what an output stream could not take. Python would try again at its end, and exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
