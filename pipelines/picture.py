"""A compiled pipeline as a picture: its tasks in columns by what they wait for, drawn from the compiled file alone."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from cadx.files import replacing
from pipelines.compiled import read_pipeline

WIDTH_PX, HEIGHT_PX, GAP_X_PX, GAP_Y_PX, MARGIN_PX = 168, 34, 46, 12, 16
_STYLE = (
    "text{font:13px sans-serif;fill:#1b2430;dominant-baseline:middle;text-anchor:middle}"
    "rect{fill:#eef3f8;stroke:#0072B2;rx:6}.branch rect{fill:#fdf1e7;stroke:#D55E00;stroke-dasharray:5 3}"
    ".importer rect{fill:#f4f4f4;stroke:#5b6675}path{fill:none;stroke:#9aa5b1;stroke-width:1.3}"
)


def draw(pipeline: Path, picture: Path) -> None:
    """Write the picture of a compiled pipeline, an SVG file.

    A dashed box is a branch or a pipeline within the pipeline, with the tasks in it.

    Raises:
        ValueError: if `pipeline` is no compiled pipeline, or `picture` no .svg file.
    """
    if picture.suffix != ".svg":
        raise ValueError(f"{picture}: pictures are SVG; name it so")
    spec = read_pipeline(pipeline)
    tasks: dict[str, Any] = spec["root"]["dag"]["tasks"]
    needed = _needed(tasks)
    columns = _columns(tasks, needed)
    places = {
        name: (MARGIN_PX + x * (WIDTH_PX + GAP_X_PX), MARGIN_PX + y * (HEIGHT_PX + GAP_Y_PX))
        for x, column in enumerate(columns)
        for y, name in enumerate(column)
    }
    lines = [_edge(places[before], places[name]) for name in tasks for before in needed[name]]
    boxes = [_box(spec, task, *places[name]) for name, task in tasks.items()]
    width = 2 * MARGIN_PX + len(columns) * (WIDTH_PX + GAP_X_PX) - GAP_X_PX
    height = 2 * MARGIN_PX + max(map(len, columns)) * (HEIGHT_PX + GAP_Y_PX) - GAP_Y_PX
    title = escape(str(spec["pipelineInfo"]["name"]))
    with replacing(picture) as partial:
        partial.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'role="img"><title>{title}</title><style>{_STYLE}</style>\n'
            f'<rect width="100%" height="100%" style="fill:white;stroke:none"/>\n'
            + "\n".join([*lines, *boxes])
            + "\n</svg>\n",
            encoding="utf-8",
        )


def _columns(tasks: Mapping[str, Any], needed: Mapping[str, list[str]]) -> list[list[str]]:
    """Names by the longest way to them; in a column near to what they wait for."""
    depth: dict[str, int] = {}

    def reach(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max((reach(one) for one in tasks[name].get("dependentTasks", [])), default=-1)
        return depth[name]

    for name in tasks:
        reach(name)
    columns: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    row: dict[str, int] = {}
    for number, column in enumerate(columns):
        waiting = [name for name in tasks if depth[name] == number]
        column += sorted(
            waiting,
            key=lambda name: (sum(map(row.__getitem__, needed[name])) / (len(needed[name]) or 1), name),
        )
        row |= {name: place for place, name in enumerate(column)}
    return columns


def _needed(tasks: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each task waits for, less what that waits for already: fewer lines say the same."""

    @cache
    def all_before(one: str) -> set[str]:
        direct = set(tasks[one].get("dependentTasks", []))
        return direct.union(*map(all_before, direct))

    needed = {}
    for name, task in tasks.items():
        direct = task.get("dependentTasks", [])
        needed[name] = [one for one in direct if not any(one in all_before(other) for other in direct)]
    return needed


def _edge(start: tuple[int, int], end: tuple[int, int]) -> str:
    x0, y0 = start[0] + WIDTH_PX, start[1] + HEIGHT_PX // 2
    x1, y1 = end[0], end[1] + HEIGHT_PX // 2
    middle = x1 - GAP_X_PX // 2
    return f'<path d="M{x0} {y0} C{middle} {y0} {middle} {y1} {x1} {y1}"/>'


def _box(spec: Mapping[str, Any], task: Mapping[str, Any], x: int, y: int) -> str:
    component = spec["components"][task["componentRef"]["name"]]
    label, kind = str(task["taskInfo"]["name"]), "step"
    if inner := component.get("dag", {}).get("tasks"):
        kind = "branch"
        names = [str(one["taskInfo"]["name"]) for one in inner.values()]
        label += f": {names[0]}" if len(names) == 1 else f": {len(names)} tasks"
    elif "importer" in component.get("executorLabel", ""):
        kind = "importer"
    return (
        f'<g class="{kind}"><rect x="{x}" y="{y}" width="{WIDTH_PX}" height="{HEIGHT_PX}"/>'
        f'<text x="{x + WIDTH_PX // 2}" y="{y + HEIGHT_PX // 2}">{escape(label)}</text></g>'
    )
