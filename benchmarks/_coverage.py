"""How often intervals hold the truth: counted over simulated sets, and written as a table of docs/coverage.md."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from cadx.metrics import Difference, Estimate

T = TypeVar("T")
R = TypeVar("R")

REPEATS = 2000
RESAMPLES = 200
WITHIN = (0.93, 0.97)
PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
DOUBTS = ("too few", "above the true error")
"""Words of a report that say that an interval holds the truth less often than it should."""


class Held(NamedTuple):
    """What became of one metric's intervals in one cell of the grid.

    Attributes:
        coverage: the share that hold the truth, of those there are; NaN where there is none.
        doubted: the share of sets whose own report says one of `DOUBTS`, or has no interval.
    """

    coverage: float
    doubted: float

    @property
    def is_promised(self) -> bool:
        """Whether most reports give the interval without a word of doubt."""
        return self.doubted < 0.5

    @property
    def is_within(self) -> bool:
        """Whether the coverage lies where it should."""
        return WITHIN[0] <= self.coverage <= WITHIN[1]

    def __str__(self) -> str:
        if np.isnan(self.coverage):
            return "none"
        text = f"{100 * self.coverage:.1f}"
        if not self.is_promised:
            return f"({text})"
        return text if self.is_within else f"**{text}**"


class Tally:
    """Intervals of many simulated sets of one cell, by metric."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[float, float, float, bool]]] = {}

    def add(self, found: Mapping[str, Estimate | Difference]) -> None:
        """One set's intervals by metric."""
        for name, one in found.items():
            missing = one.value is None or one.low is None or one.high is None
            doubted = missing or any(words in one.method for words in DOUBTS)
            ends = [np.nan if end is None else end for end in (one.value, one.low, one.high)]
            self._rows.setdefault(name, []).append((ends[0], ends[1], ends[2], doubted))

    def held(self, name: str, true: float) -> Held:
        """How often the intervals hold a true value."""
        _, low, high, doubted = np.array(self._rows[name], np.float64).T
        told = ~np.isnan(low)
        inside = (low[told] <= true) & (true <= high[told])
        return Held(float(inside.mean()) if told.any() else np.nan, float(doubted.mean()))

    def mean(self, name: str) -> float:
        """The mean of the values themselves."""
        return float(np.nanmean([row[0] for row in self._rows[name]]))


def each(measure: Callable[[T], R], cells: Iterable[T], what: str) -> list[R]:
    """What `measure` finds in each cell, in their order; a process for each core, with a progress bar."""
    todo = list(cells)
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, mp_context=get_context("forkserver")) as pool:
        found = pool.map(measure, todo)
        return list(track(found, what, total=len(todo), console=Console(stderr=True)))


def summary(found: Sequence[tuple[str, Held]]) -> str:
    """How many shares hold what is promised, and of which metrics the others are.

    Args:
        found: the title of a metric, and what was found in a cell; for every cell and metric.
    """
    promised = [(title, one) for title, one in found if one.is_promised]
    missed = Counter(title for title, one in promised if not one.is_within)
    beyond = [one for _, one in found if not one.is_promised]
    within = len(promised) - missed.total()
    text = f"{within} of the {len(promised)} shares that are promised lie within 93 to 97. "
    if missed:
        names = ", ".join(f"{title} ({count})" for title, count in missed.items())
        text += f"The others are **bold**; there the report promises what it does not hold: {names}. "
    outside = sum(not one.is_within for one in beyond)
    return text + f"Of the {len(beyond)} in brackets {outside} lie outside."


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table in Markdown."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
    ]
