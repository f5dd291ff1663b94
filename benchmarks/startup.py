"""What a short-lived program pays, each a whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

from benchmarks.harness import Contestant, Table, compare, stopwatch
from benchmarks.lab import Lab, payloads


def measure(lab: Lab) -> list[Table]:
    with lab.sqlite_file() as path:
        event = path.with_name("event.ndjson")
        event.write_text(payloads(1)[0], encoding="utf-8")
        enqueue = [sys.executable, "-m", "outbox", "--database", f"sqlite:///{path}", "enqueue", str(event)]
        contestants = [
            Contestant("import sqlalchemy.orm", partial(_ms, _python("import sqlalchemy.orm"))),
            Contestant("pass", partial(_ms, _python("pass"))),
            Contestant("import outbox", partial(_ms, _python("import outbox")), at_most=1.15),
            Contestant("outbox enqueue of one event", partial(_ms, enqueue), at_most=1.35),
            Contestant("import huey", partial(_ms, _python("import huey"))),
            Contestant("import procrastinate", partial(_ms, _python("import procrastinate"))),
        ]
        rows = compare(contestants, rounds=lab.rounds(15))
    return [Table("Start-up, whole processes", "ms", rows)]


# Installers compile what they install. Where the environment forbids that, each run would compile our source anew,
# beside a compiled SQLAlchemy.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _python(statement: str) -> list[str]:
    return [sys.executable, "-c", statement]


def _ms(command: list[str]) -> float:
    with stopwatch() as watch:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=_ENVIRONMENT)
    return watch.seconds * 1_000
