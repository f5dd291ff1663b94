"""Measure: `python -m benchmarks [TOPIC ...]`."""

from __future__ import annotations

import argparse
import logging
import os
from importlib import import_module

from benchmarks import report
from benchmarks.lab import Lab

TOPICS = (
    "enqueue",
    "bulk",
    "drain",
    "postgresql",
    "end_to_end",
    "worker",
    "claim",
    "growth",
    "startup",
    "memory",
    "isolation",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help=f"of {', '.join(TOPICS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="small and once: only to see that it works")
    parser.add_argument("--largest", type=int, default=1_000_000, help="rows in the largest table of growth")
    given = parser.parse_args()
    if unknown := {*given.topics} - {*TOPICS}:
        parser.error(f"there is no topic {', '.join(sorted(unknown))}, expected {', '.join(TOPICS)}")
    logging.getLogger("outbox").addHandler(logging.NullHandler())  # or it warns of each event that is given up
    with Lab(quick=given.quick, largest=given.largest) as lab:
        facts = {} if given.quick else report.facts(lab)
        for topic in given.topics or TOPICS:
            load_before = os.getloadavg()[0]
            tables = import_module(f"benchmarks.{topic}").measure(lab)
            for table in tables:
                print(report.as_text(table), flush=True)
            if not given.quick:
                report.keep(topic, tables, facts, load_before)
    if not given.quick:
        from benchmarks import plot  # noqa: PLC0415 - the tests need not have matplotlib

        plot.draw(report.load())


if __name__ == "__main__":
    main()
