"""Draw how things grow: `python -m benchmarks.plot`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks import report
from benchmarks.harness import Table

mpl.use("svg")
from matplotlib import pyplot as plt

PLOT = Path(__file__).parent.parent / "docs" / "performance.svg"
_COLOURS = {"SQLite": "#0072b2", "PostgreSQL": "#d55e00"}


def draw(results: Any) -> None:
    """Draw the tables of the topic `growth`, where they were measured."""
    if "growth" not in results["topics"]:
        return
    tables = [Table.from_json(found) for found in results["topics"]["growth"]["tables"]]
    whats = list(dict.fromkeys(table.title.partition(": ")[2] for table in tables))
    mpl.rcParams |= {"svg.hashsalt": "outbox", "font.size": 9}  # the same file for the same figures
    figure, panels = plt.subplots(1, len(whats), figsize=(4 * len(whats), 3.2), layout="constrained")
    for what, panel in zip(whats, panels, strict=True):
        for table in tables:
            if not table.title.endswith(f": {what}"):
                continue
            name = table.title.split()[2].rstrip(":")
            at = [row.at or 0 for row in table.rows]
            middle = [statistics.median(row.values) for row in table.rows]
            below = [centre - min(row.values) for centre, row in zip(middle, table.rows, strict=True)]
            above = [max(row.values) - centre for centre, row in zip(middle, table.rows, strict=True)]
            panel.errorbar(at, middle, [below, above], label=name, color=_COLOURS[name], marker="o", capsize=3)
            panel.set_ylabel(table.unit)
        panel.set_title(what)
        panel.set_xscale("log")
        panel.set_xlabel("rows that wait")
        panel.set_ylim(bottom=0)
        panel.grid(visible=True, alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    draw(report.load())
