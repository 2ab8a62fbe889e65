"""The form of a claim: one line of what `python -m benchmarks` prints."""

from typing import Any


def claim(
    name: str, ours: float, peer: float, unit: str, *, ratio: float | None = None, goal: float = 1.0
) -> dict[str, Any]:
    """A claim as `benchmarks/__main__.py` takes it; the more the better unless `ratio` says otherwise."""
    ratio = ours / peer if ratio is None else ratio
    return {
        "claim": name,
        "ours": ours,
        "peer": peer,
        "unit": unit,
        "ratio": ratio,
        "goal": goal,
        "holds": ratio >= goal,
    }
