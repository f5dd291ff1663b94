"""The page on performance, and the programs that measure."""

import json
import subprocess
import sys

import pytest

from benchmarks import report
from benchmarks.harness import Contestant, Row, Table, compare
from builders import ROOT


def test_the_tables_in_the_docs_are_those_that_were_measured() -> None:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    results = report.load()
    assert report.filled(page, results) == page, "run `python docs/performance.py`"
    for topic, found in results["topics"].items():
        for table in found["tables"]:
            assert report.as_markdown(Table.from_json(table)) in page, topic


def test_contestants_take_turns_and_are_compared_within_a_round() -> None:
    order = []

    def running(name: str, *figures: float):
        remaining = iter(figures)

        def run() -> float:
            order.append(name)
            return next(remaining)

        return run

    floor = Contestant("floor", running("floor", 10, 20, 40))
    ours = Contestant("ours", running("ours", 5, 20, 20), at_least=0.5)
    rows = compare([floor, ours], rounds=3)
    assert order == ["floor", "ours", "ours", "floor", "floor", "ours"]
    assert rows == [Row("floor", [10, 20, 40]), Row("ours", [5, 20, 20], [0.5, 1, 0.5], at_least=0.5)]
    assert Table.from_json(json.loads(json.dumps(Table("t", "u", rows).as_json()))) == Table("t", "u", rows)


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (Row("r", [1.0], [0.8, 0.9, 1.0], at_least=0.9), True),
        (Row("r", [1.0], [0.8, 0.8, 1.0], at_least=0.9), False),
        (Row("r", [1.0], [1.9, 2.1, 2.1], at_most=2), False),
        (Row("r", [15, 16], at_most=16), True),
        (Row("r", [15, 15, 17], at_most=16), False),
        (Row("r", [1.0], [0.1]), None),
    ],
)
def test_a_target_is_for_the_median_ratio_or_for_every_figure(row: Row, met: bool | None) -> None:
    assert row.is_met is met


@pytest.mark.slow
def test_the_benchmarks_that_need_no_other_library_run() -> None:
    before = report.RESULTS.read_bytes()
    topics = ["bulk", "end_to_end", "worker", "memory", "isolation"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", *topics],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "one bad row" in result.stdout
    assert report.RESULTS.read_bytes() == before
