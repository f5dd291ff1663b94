"""A process that drains a database and prints how many events that were and its peak memory in KiB.

It loads nothing but the outbox: `python -m benchmarks.drainer URL`.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from outbox import Outbox, Policy


class _FreeUpload:
    logged_in = True

    def upload(self, batch: object) -> None:
        pass


def _peak_kib() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts the process that started this one into ru_maxrss
        return int(status.read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)


if __name__ == "__main__":
    with Outbox(sys.argv[1], policy=Policy(max_rows=10**9), synchronous="NORMAL") as outbox:
        sent = outbox.flush_all(_FreeUpload()).sent
    print(sent, _peak_kib())
