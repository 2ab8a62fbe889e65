"""The form of a claim, one line of what `python -m benchmarks` prints; and the sections of a page that it writes."""

from pathlib import Path
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


def put_section(page: Path, heading: str, text: str) -> None:
    """Write a section at the end of a page, in place of the one of that heading and all that follows it."""
    before = page.read_text(encoding="utf-8").split(f"\n## {heading}\n")[0].rstrip("\n")
    page.write_text(f"{before}\n\n## {heading}\n\n{text}\n", encoding="utf-8")
