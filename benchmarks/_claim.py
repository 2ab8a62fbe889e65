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
    """Write a section of a page in place of the one of that heading, or at the end where there is none."""
    before, *sections = page.read_text(encoding="utf-8").rstrip("\n").split("\n\n## ")
    named = dict(section.split("\n\n", 1) for section in sections) | {heading: text}
    parts = [before, *(f"## {name}\n\n{body}" for name, body in named.items())]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
