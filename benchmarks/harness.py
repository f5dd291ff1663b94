"""Runs that are compared: in turns, so that what else the machine does falls on all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contestant:
    """One way to do it. `run` sets up what it needs, does it once, and returns the figure."""

    name: str
    run: Callable[[], float]
    at_least: float | None = None
    """The target for the ratio to the floor."""
    at_most: float | None = None
    at: int | None = None
    """Where a plot shows it."""


@dataclass(frozen=True)
class Row:
    """What one contestant did: a figure for each round, and its ratio to the floor's of the same round."""

    name: str
    values: list[float]
    ratios: list[float] = field(default_factory=list)
    """None for a floor itself, and where there is no floor; then the target is one for each figure."""
    at_least: float | None = None
    at_most: float | None = None
    at: int | None = None

    @property
    def is_met(self) -> bool | None:
        judged = statistics.median(self.ratios) if self.ratios else max(self.values)
        if self.at_least is not None:
            return judged >= self.at_least
        return None if self.at_most is None else judged <= self.at_most


@dataclass(frozen=True)
class Table:
    title: str
    unit: str
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [_without_nothing(asdict(row)) for row in self.rows]}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Table:
        return cls(found["title"], found["unit"], [Row(**row) for row in found["rows"]])


def _without_nothing(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value not in (None, [])}


def compare(contestants: Iterable[Contestant], *, rounds: int) -> list[Row]:
    """Let each run once a round, in turns forwards and backwards. The first one is the floor."""
    order = list(contestants)
    values: dict[str, list[float]] = {one.name: [] for one in order}
    for number in range(rounds):
        for one in reversed(order) if number % 2 else order:
            gc.collect()
            values[one.name].append(one.run())
    floor = values[order[0].name]
    return [
        Row(
            one.name,
            [_rounded(value) for value in values[one.name]],
            [_rounded(value / least) for value, least in zip(values[one.name], floor, strict=True)]
            if index
            else [],
            one.at_least,
            one.at_most,
            one.at,
        )
        for index, one in enumerate(order)
    ]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass
class Stopwatch:
    seconds: float = 0.0


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """Time the block, without the garbage that others left."""
    watch = Stopwatch()
    began = time.perf_counter()
    yield watch
    watch.seconds = time.perf_counter() - began
