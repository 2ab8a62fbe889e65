"""What an interval says against itself: a clause of its method, which gate and pages look for."""

import math
import re
from collections.abc import Sequence

from cadx.types import Estimate

HOLDS_LESS = "holds the truth less often than 95 %"
"""How a doubt ends that forbids to rely on an interval's ends."""

ROUGHLY = "holds the truth only roughly"
"""How one ends that is a warning: a few in a hundred more or less than 95."""

_DOUBTS = ("too few", "the spread of")
"""How the words begin by which a method says that its interval may not hold the truth."""


def doubts_of(method: str) -> list[str]:
    """What a method says against its own interval.

    >>> doubts_of("Wilson; too few errors (2): may be conservative")
    ['too few errors (2): may be conservative']
    """
    return [words for words in method.split("; ")[1:] if words.startswith(_DOUBTS)]


def gravest_doubt(parts: Sequence[Estimate]) -> str:
    """Of all doubts of the parts that have a value the one with the smallest number, "" where there is none."""

    def number(words: str) -> float:
        found = re.search(r"\(([\d.e-]+)", words)
        return float(found[1]) if found else math.inf

    doubts = [words for part in parts if part.value is not None for words in doubts_of(part.method)]
    return min(doubts, key=number, default="")
