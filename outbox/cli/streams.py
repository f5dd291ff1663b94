"""The standard streams of a command that was started with some of them closed, or whose reader exits."""

from __future__ import annotations

import os
import sys


def open_closed_streams() -> None:
    """Replace closed output streams by /dev/null.

    Otherwise Python has no object to print to, and the next file or connection that is opened gets the number of
    the stream. Standard input stays None, so that a command that reads it can refuse it.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest free number: that of the stream
            if name != "stdin":
                setattr(sys, name, os.fdopen(descriptor, "w"))


def drop_unwritten() -> None:
    """Drop what an output stream could not write. Python would try again at exit, and end with code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
