"""What was measured: shown, kept in a JSON file, and put into the page that explains it."""

from __future__ import annotations

import json
import platform
import re
import sqlite3
import statistics
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Row, Table

if TYPE_CHECKING:
    from benchmarks.lab import Lab

RESULTS = Path(__file__).with_name("results.json")
_LIBRARIES = (
    "sqlalchemy",
    "psycopg",
    "requests",
    "huey",
    "persist-queue",
    "litequeue",
    "procrastinate",
    "pgqueuer",
)


def facts(lab: Lab) -> dict[str, Any]:
    """Return what the figures depend on."""
    from benchmarks.lab import cores  # noqa: PLC0415 - the page needs none of what the lab needs

    return {
        "cores": cores(),
        "platform": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
        "PostgreSQL": lab.server.run("SHOW server_version")[0][0].split()[0],
        "PostgreSQL fsync": lab.server.run("SHOW fsync")[0][0],
        **{name: version(name) for name in _LIBRARIES},
    }


def keep(topic: str, tables: list[Table], found: dict[str, Any], load_before: float) -> None:
    """Write the tables of a topic into the file. What was measured with other versions goes."""
    before = load() if RESULTS.exists() else {}
    kept = before["topics"] if before.get("facts") == found else {}
    kept[topic] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "load": round(load_before, 1),
        "tables": [table.as_json() for table in tables],
    }
    RESULTS.write_text(json.dumps({"facts": found, "topics": kept}, indent=1) + "\n", encoding="utf-8")


def load() -> Any:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def as_text(table: Table) -> str:
    cells = [_header(table), *(_cells(row) for row in table.rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return "\n".join([f"\n{table.title}", *lines])


def filled(page: str, results: Any) -> str:
    """Return the page with the tables of each topic between its marks, and what they were measured with."""
    sections = {
        topic: "\n\n".join(as_markdown(Table.from_json(table)) for table in found["tables"])
        for topic, found in results["topics"].items()
    }
    dates = sorted({found["date"] for found in results["topics"].values()})
    loads = [found["load"] for found in results["topics"].values()]
    known = dict(results["facts"])
    when = f"on {dates[0]}" if len(dates) == 1 else f"from {dates[0]} to {dates[-1]}"
    machine = f"{known.pop('cores')} cores, {known.pop('platform')}"
    versions = ", ".join(f"{name} {value}" for name, value in known.items())
    sections["facts"] = (
        f"The figures were measured {when} on {machine}, with {versions}. The load average from other work was"
        f" {min(loads)} to {max(loads)}."
    )
    for name, section in sections.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        page = re.sub(f"{begin}.*?{end}", lambda _, new=f"{begin}\n{section}\n{end}": new, page, flags=re.DOTALL)
    return page


def as_markdown(table: Table) -> str:
    lines = [_header(table), ["---", *["---:"] * 4], *(_cells(row) for row in table.rows)]
    return "\n".join([f"**{table.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


def _header(table: Table) -> list[str]:
    return ["", table.unit, "spread", "ratio", "target"]


def _cells(row: Row) -> list[str]:
    target = ""
    if row.is_met is not None:
        limit = f">= {row.at_least:g}" if row.at_least is not None else f"<= {row.at_most:g}"
        target = limit if row.is_met else f"{limit}, missed"
    return [
        row.name,
        figure(statistics.median(row.values)),
        f"{figure(min(row.values))} to {figure(max(row.values))}",
        f"{statistics.median(row.ratios):.2f} ({min(row.ratios):.2f} to {max(row.ratios):.2f})"
        if row.ratios
        else "",
        target,
    ]


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
