"""HTML pages that a reader can open, print and archive: one file each, with nothing to fetch.

Invariants: every text is escaped; no script, no address outside the page; equal content gives equal bytes.
"""

import base64
import io
import math
import numbers
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from cadx.doubts import doubts_of
from cadx.files import replacing
from cadx.types import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE_LIMIT_BYTES = 5_000_000
SVG_LIMIT_BYTES = 300_000  # beyond it a figure is a picture: a scatter of every sample is no line drawing
THUMBNAIL_PX = 192
MISSING = "–"  # noqa: RUF001 - an en dash, as in printed tables
MARK = "†"
"""Stands behind an interval whose method says something against it."""
LEGEND = f"{MARK} Too few cases, or a value that is known to be off: the interval is only rough. Its method says why."
"""What every page and console says that shows the mark."""

# Okabe and Ito's colours, which stay apart for every common colour blindness; black is for reference lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C00")
INK = "#1b2430"
MUTED = "#5b6675"

_PLOT_STYLE: Any = {
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same layout everywhere
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7ec",
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # text stays text: searchable, read aloud, in the page's own font
    "svg.hashsalt": "cadx",  # without it the ids inside an SVG are random
}


def counted(number: int, noun: str, plural: str = "") -> str:
    """So many of something.

    >>> counted(1, "box", "boxes"), counted(2000, "image")
    ('1 box', '2,000 images')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def estimate_text(estimate: Estimate, decimals: int = 3) -> str:
    """An estimate as readers know it: the value, its interval in brackets, and a mark where that is only rough.

    >>> estimate_text(Estimate(value=0.988, low=0.981, high=0.993, n=624, method="DeLong"))
    '0.988 (0.981 to 0.993)'
    >>> estimate_text(Estimate(value=1, low=0.7, high=1, n=9, method="Wilson; too few errors (0): may be conservative"))
    '1.000 (0.700 to 1.000) †'
    >>> estimate_text(Estimate(value=None, low=None, high=None, n=0, method="no positive"))
    '–'
    """
    value, low, high = (_finite(number) for number in (estimate.value, estimate.low, estimate.high))
    if value is None:
        return MISSING
    if low is None or high is None:
        return f"{value:.{decimals}f}"
    mark = f" {MARK}" if doubts_of(estimate.method) else ""
    return f"{value:.{decimals}f} ({low:.{decimals}f} to {high:.{decimals}f}){mark}"


def figure(width_inches: float = 7.2, height_inches: float = 3.2) -> "tuple[Figure, Axes]":
    """A figure in the house style with one pair of axes; a page is 8.6 inches wide."""
    drawing, (axes,) = panels(width_inches, height_inches, columns=1)
    return drawing, axes


def panels(
    width_inches: float, height_inches: float, *, columns: int, rows: int = 1
) -> "tuple[Figure, list[Axes]]":
    """A figure in the house style with `rows` x `columns` axes, row by row."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler

    with matplotlib.rc_context({**_PLOT_STYLE, "axes.prop_cycle": cycler(color=PALETTE)}):
        drawing = Figure(figsize=(width_inches, height_inches), layout="constrained")
        return drawing, list(drawing.subplots(rows, columns, squeeze=False).ravel())


def thumbnail_png(image: np.ndarray | bytes, max_px: int = THUMBNAIL_PX) -> bytes:
    """PNG bytes of an image whose longer side has at most `max_px` pixels.

    Args:
        image: H W or H W 3: uint8, uint16 (full range), bool, or float in 0..1; or an encoded image.
        max_px: longest side in pixels; smaller images keep their pixels.
    """
    picture = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else Image.fromarray(_to_uint8(image))
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("RGB")
    if max(picture.size) > max_px:
        picture.thumbnail((max_px, max_px), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, format="PNG")
    return out.getvalue()


def draw_boxes(
    pixels: np.ndarray, groups: Sequence[tuple[np.ndarray, str]], width_px: int | None = None
) -> np.ndarray:
    """The image with rectangles around boxes: H W 3 uint8.

    Args:
        pixels: H W or H W 3, uint8 or uint16.
        groups: boxes (B 4, x0 y0 x1 y1 in pixels of the image) with their colour; later ones lie above.
        width_px: of the lines, which lie outside of the boxes; None for one that shows in a thumbnail.
    """
    picture = Image.fromarray(_to_uint8(pixels)).convert("RGB")
    width = max(1, max(pixels.shape[:2]) // 180) if width_px is None else width_px
    pen = ImageDraw.Draw(picture)
    for boxes, colour in groups:
        for x0, y0, x1, y1 in np.asarray(boxes).reshape(-1, 4).tolist():
            pen.rectangle(
                (x0 - width, y0 - width, x1 + width - 1, y1 + width - 1), outline=colour, width=width
            )
    return np.asarray(picture)


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two pictures of any size side by side, as high as the lower one; H W 3, uint8."""
    pictures = [Image.open(io.BytesIO(thumbnail_png(pixels))).convert("RGB") for pixels in (left, right)]
    height = min(picture.height for picture in pictures)
    parts = [
        np.asarray(picture.resize((max(1, round(picture.width * height / picture.height)), height)))
        for picture in pictures
    ]
    gap = np.full((height, max(1, parts[0].shape[1] // 12), 3), 255, np.uint8)
    return np.concatenate([parts[0], gap, parts[1]], axis=1)


def boxes_by_group(groups: Sequence[tuple[str, np.ndarray]], *, value: str, group: str) -> "Figure":
    """One horizontal box a group: the middle half, its median, and whiskers over the middle 95 %.

    Args:
        groups: name and values.
        value: what is measured, in words.
        group: what the groups are.
    """
    drawing, axes = figure(7.2, 1.1 + 0.34 * len(groups))
    axes.boxplot(
        [values for _, values in groups],
        tick_labels=[name for name, _ in groups],
        orientation="horizontal",
        widths=0.55,
        whis=(2.5, 97.5),
        patch_artist=True,
        boxprops={"facecolor": "#dbe9f4", "edgecolor": PALETTE[0]},
        medianprops={"color": PALETTE[0], "linewidth": 2},
        flierprops={"marker": ".", "markersize": 3, "markeredgecolor": MUTED},
        showfliers=sum(len(values) for _, values in groups) <= 20_000,
    )
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(value)
    axes.set_ylabel(group)
    return drawing


class Page:
    """One report: blocks in reading order, written as a single HTML file.

    >>> page = Page("Validation", "phantom-xray")
    >>> page.section("Duplicates")
    >>> page.callout("ok", "No image occurs twice.")
    >>> "No image occurs twice." in page.html()
    True
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title = title
        self._subtitle = subtitle
        self._sections: list[str] = []
        self._links: list[dict[str, str]] = []
        self._blocks: list[dict[str, Any]] = []
        self._num_figures = 0
        self._num_tables = 0

    def links(self, links: Sequence[tuple[str, str]]) -> None:
        """Name the neighbouring reports, as (text, relative address), above the title.

        Raises:
            ValueError: if an address leaves the folder of reports.
        """
        for text, address in links:
            if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//|/", address):
                raise ValueError(
                    f"link {text!r}: {address} is not relative; a report must work wherever it is copied"
                )
            self._links.append({"text": text, "address": address})

    def section(self, heading: str) -> None:
        """Start a section; it appears in the list of contents."""
        self._sections.append(heading)
        self._add("section", heading=heading, number=len(self._sections))

    def text(self, text: str) -> None:
        """Add prose; an empty line separates paragraphs."""
        self._add("text", paragraphs=[part for part in re.split(r"\n\s*\n", text.strip()) if part])

    def facts(self, facts: Sequence[tuple[str, Any]]) -> None:
        """Add a strip of key figures, as (what, value)."""
        self._add("facts", facts=[(what, _cell(value, None)) for what, value in facts])

    def callout(self, kind: Literal["ok", "warn", "stop"], text: str) -> None:
        """Add a message that must not be missed; its kind is said in a word, not by colour alone."""
        self._add(
            "callout", style=kind, label={"ok": "OK", "warn": "Attention", "stop": "Stop"}[kind], text=text
        )

    def table(
        self,
        table: pd.DataFrame | Sequence[Mapping[str, Any]],
        caption: str = "",
        *,
        formats: Mapping[str, str] | None = None,
        empty: str = "Nothing to show.",
    ) -> None:
        """Add a table; the first column names the rows, numbers stand on the right.

        Args:
            table: a frame (its index is not shown) or rows as mappings with equal keys. Cells may be
                estimates; None, NaN and infinities show as a dash.
            caption: what the reader sees in it.
            formats: column -> format specification such as ".1f"; else integers are grouped by thousands
                and other numbers have three decimals.
            empty: what stands there if it has no rows.
        """
        frame = table if isinstance(table, pd.DataFrame) else pd.DataFrame(list(table), dtype=object)
        columns = [str(name) for name in frame.columns]
        cells = [list(frame.iloc[:, i].astype(object)) for i in range(frame.shape[1])]
        self._num_tables += 1
        self._add(
            "table",
            number=self._num_tables,
            caption=caption,
            empty=empty,
            columns=list(zip(columns, [_is_numeric(column) for column in cells], strict=True)),
            rows=[
                [_cell(value, (formats or {}).get(name)) for name, value in zip(columns, row, strict=True)]
                for row in zip(*cells, strict=True)
            ],
        )

    def figure(self, drawing: "Figure", caption: str, alt: str = "") -> None:
        """Add a drawing as SVG (as PNG where that would be heavy).

        Args:
            drawing: made by `figure` or `panels`.
            caption: what the reader should see in it.
            alt: what it shows, for those who cannot see it; the caption where it is left out.
        """
        self._num_figures += 1
        width_px = round(float(drawing.get_figwidth()) * 100)
        image: dict[str, Any] = {"caption": caption, "alt": alt or caption, "width_px": width_px}
        _finish(drawing)
        svg = _svg(drawing, prefix=f"f{self._num_figures}-")
        if len(svg) <= SVG_LIMIT_BYTES:
            self._add("figure", svg=svg, **image)
        else:
            self._add("figure", png=_data_uri(_png(drawing)), **image)

    def images(
        self,
        images: Sequence[tuple[np.ndarray | bytes, str]],
        caption: str = "",
        *,
        max_px: int = THUMBNAIL_PX,
    ) -> None:
        """Add thumbnails, as (image, caption); see `thumbnail_png` for what an image may be."""
        entries = []
        for image, text in images:
            png = thumbnail_png(image, max_px)
            width_px, height_px = Image.open(io.BytesIO(png)).size
            # Small images are enlarged by a whole number, so that a pixel stays a pixel.
            scale = max(1, max_px // max(width_px, height_px))
            entries.append(
                {
                    "uri": _data_uri(png),
                    "text": text,
                    "width_px": width_px * scale,
                    "height_px": height_px * scale,
                }
            )
        self._add("images", images=entries, caption=caption)

    @contextmanager
    def details(self, summary: str) -> Iterator[None]:
        """Fold away what is added inside the block; a reader opens it, a printer too."""
        outer, self._blocks = self._blocks, []
        try:
            yield
        finally:
            inner, self._blocks = self._blocks, outer
        self._add("details", summary=summary, blocks=inner)

    def html(self) -> str:
        """The page's text."""
        from jinja2 import Environment, StrictUndefined

        environment = Environment(
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        return environment.from_string(_TEMPLATE).render(
            title=self._title,
            subtitle=self._subtitle,
            links=self._links,
            sections=list(enumerate(self._sections, start=1)),
            blocks=self._blocks,
            mark=MARK,
            legend=LEGEND,
        )

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all.

        Raises:
            AssertionError: if it is larger than `PAGE_LIMIT_BYTES`: show fewer images.
        """
        data = self.html().encode("utf-8")
        assert len(data) <= PAGE_LIMIT_BYTES, f"{self._title}: {len(data)} bytes are too many for a page"
        with replacing(path) as partial:
            partial.write_bytes(data)

    def _add(self, kind: str, **content: Any) -> None:
        self._blocks.append({"kind": kind, **content})


def _finite(number: float | None) -> float | None:
    return None if number is None or not math.isfinite(number) else float(number)


def _is_estimate(value: Any) -> bool:
    return isinstance(value, Estimate)


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def _is_numeric(column: Sequence[Any]) -> bool:
    present = [value for value in column if not _is_missing(value)]
    return bool(present) and all(
        _is_estimate(value) or (isinstance(value, numbers.Real) and not _is_flag(value)) for value in present
    )


def _cell(value: Any, specification: str | None) -> str:
    if _is_missing(value):
        return MISSING
    if _is_estimate(value):
        return estimate_text(value)
    if _is_flag(value):
        return "yes" if value else "no"
    if specification is not None and isinstance(value, numbers.Real):
        return format(value, specification)
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if isinstance(value, numbers.Real):
        return f"{float(value):.3f}"
    return str(value)


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype == np.uint16:
        return np.round(pixels / 257.0).astype(np.uint8)
    return np.round(np.clip(np.nan_to_num(pixels.astype(np.float64)), 0.0, 1.0) * 255.0).astype(np.uint8)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _finish(drawing: "Figure") -> None:
    # Titles and legends take their style when they are made, outside of our context.
    for axes in drawing.axes:
        if title := axes.get_title():
            axes.set_title("")
            axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=8)
        if legend := axes.get_legend():
            legend.set_frame_on(False)


def svg_file(drawing: "Figure") -> bytes:
    """A drawing as an SVG file of its own, as Markdown shows it; the same drawing gives the same bytes."""
    _finish(drawing)
    width, height = (round(float(inches) * 100) for inches in drawing.get_size_inches())
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    # In a picture the page's font is not at hand, and matplotlib's may not be installed.
    svg = str(_svg(drawing, prefix="")).replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    return svg.replace("<svg ", opening, 1).encode("utf-8")


def _png(drawing: "Figure") -> bytes:
    out = io.BytesIO()
    drawing.savefig(out, format="png", dpi=160, metadata={"Software": None})
    return out.getvalue()


def _svg(drawing: "Figure", prefix: str) -> Any:
    import matplotlib
    from markupsafe import Markup

    out = io.StringIO()
    with matplotlib.rc_context(_PLOT_STYLE):
        drawing.savefig(
            out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # Inside HTML the namespaces are implied; what is left names no address at all.
    svg = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    # The page labels the drawing and sets its width.
    svg = re.sub(
        r"^<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true" focusable="false">', svg
    )

    def tidy(tag: re.Match[str]) -> str:
        # Every figure of matplotlib calls its parts figure_1, axes_1, ...: ids must be unique on a page.
        unique = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", tag[0])
        return re.sub(r"(\d+\.\d\d)\d+", r"\1", unique)  # a hundredth of a pixel is fine enough

    # Only inside tags: the text between them is a reader's. Matplotlib has escaped it.
    return Markup(re.sub(r"<[^>]+>", tidy, svg))  # noqa: S704


_TEMPLATE = """\
{% macro render(blocks) %}
{% for block in blocks %}
{% if block.kind == "section" %}
<h2 id="section-{{ block.number }}">{{ block.heading }}</h2>
{% elif block.kind == "text" %}
{% for paragraph in block.paragraphs %}
<p>{{ paragraph }}</p>
{% endfor %}
{% elif block.kind == "facts" %}
<dl class="facts">
{% for what, value in block.facts %}
<div><dt>{{ what }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% elif block.kind == "callout" %}
<p class="callout {{ block.style }}" role="note"><strong>{{ block.label }}</strong>
<span>{{ block.text }}</span></p>
{% elif block.kind == "table" %}
{% if block.caption %}
<p class="caption" id="table-{{ block.number }}">{{ block.caption }}</p>
{% endif %}
<div class="table"><table{% if block.caption %} aria-labelledby="table-{{ block.number }}"{% endif %}>
{% if block.columns %}
<thead><tr>
{% for name, numeric in block.columns %}
<th scope="col"{% if numeric %} class="number"{% endif %}>{{ name }}</th>
{% endfor %}
</tr></thead>
{% endif %}
<tbody>
{% for row in block.rows %}
<tr>
{% for cell in row %}
{% if loop.first %}
<th scope="row"{% if block.columns[0][1] %} class="number"{% endif %}>{{ cell }}</th>
{% else %}
<td{% if block.columns[loop.index0][1] %} class="number"{% endif %}>{{ cell }}</td>
{% endif %}
{% endfor %}
</tr>
{% else %}
<tr><td class="empty" colspan="{{ [block.columns | length, 1] | max }}">{{ block.empty }}</td></tr>
{% endfor %}
</tbody></table></div>
{% elif block.kind == "figure" %}
<figure>
{% if block.svg is defined %}
<div class="drawing{% if block.width_px > 640 %} wide{% endif %}" role="img" aria-label="{{ block.alt }}"
style="max-width:{{ block.width_px }}px">
{{ block.svg }}
</div>
{% else %}
<img src="{{ block.png }}" alt="{{ block.alt }}" style="max-width:{{ block.width_px }}px">
{% endif %}
<figcaption>{{ block.caption }}</figcaption>
</figure>
{% elif block.kind == "images" %}
<figure>
<ul class="images">
{% for image in block.images %}
<li style="width:{{ [image.width_px, 104] | max }}px">
<img src="{{ image.uri }}" alt="{{ image.text }}" width="{{ image.width_px }}" height="{{ image.height_px }}">
<span>{{ image.text }}</span></li>
{% endfor %}
</ul>
{% if block.caption %}
<figcaption>{{ block.caption }}</figcaption>
{% endif %}
</figure>
{% elif block.kind == "details" %}
<details><summary>{{ block.summary }}</summary>
{{ render(block.blocks) }}
</details>
{% endif %}
{% endfor %}
{% endmacro %}
{% set content = render(blocks) %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>{{ title }}{% if subtitle %} · {{ subtitle }}{% endif %}</title>
<style>
:root { --ink: #1b2430; --muted: #5b6675; --line: #d9dee5; --soft: #f5f7f9; --accent: #0a5a8f; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1.5rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
.frame { max-width: 860px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
header { border-bottom: 1px solid var(--line); padding-bottom: 1.1rem; margin-bottom: 1.6rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.015em; margin: 0; }
.subtitle { color: var(--muted); font-size: 1.06rem; margin: .35rem 0 0; }
.legend { color: var(--muted); font-size: .88rem; margin: .6rem 0 0; }
h2 { font-size: 1.3rem; line-height: 1.3; letter-spacing: -.008em; margin: 2.8rem 0 .7rem; }
p { margin: 0 0 .9rem; max-width: 44rem; overflow-wrap: anywhere; }
a { color: var(--accent); text-underline-offset: .18em; }
a:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px;
  border-radius: 2px; }
.links { font-size: .92rem; margin-bottom: 1rem; }
.links ul, .contents ul { list-style: none; margin: 0; padding: 0; }
.links ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
.contents { font-size: .88rem; line-height: 1.4; margin-bottom: 1.5rem; }
.contents strong { display: none; }
.contents ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
.contents a { color: var(--muted); text-decoration: none; }
.contents a:hover { color: var(--accent); text-decoration: underline; }
.facts { display: flex; flex-wrap: wrap; gap: 1rem 2.6rem; margin: 1.2rem 0 1.6rem; }
.facts dt { color: var(--muted); font-size: .82rem; }
.facts dd { margin: 0; font-size: 1.4rem; font-weight: 600; line-height: 1.3;
  font-variant-numeric: tabular-nums;
  letter-spacing: -.01em; }
.callout { display: flex; gap: .8rem; max-width: none; margin: 1rem 0; padding: .75rem 1rem;
  border-radius: 4px;
  border-left: 4px solid; overflow-wrap: anywhere; }
.callout strong { flex: none; }
.callout.ok { background: #eef7f1; border-color: #1d7a46; } .callout.ok strong { color: #12603a; }
.callout.warn { background: #fdf5e4; border-color: #b26a00; } .callout.warn strong { color: #7d4a00; }
.callout.stop { background: #fcedeb; border-color: #b3261e; } .callout.stop strong { color: #98201a; }
/* A shadow at each edge; the white covers travel with the table and hide the shadow where nothing is cut off. */
.table { overflow-x: auto; margin: 1.1rem 0 1.5rem; background:
  linear-gradient(to right, #fff 50%, transparent) left / 3rem 100% no-repeat local,
  linear-gradient(to left, #fff 50%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to right, rgb(27 36 48 / .28), transparent) left / 1rem 100% no-repeat scroll,
  linear-gradient(to left, rgb(27 36 48 / .28), transparent) right / 1rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .92rem; line-height: 1.45;
  font-variant-numeric: tabular-nums lining-nums; }
.caption { color: var(--muted); font-size: .88rem; line-height: 1.5; margin: 1.1rem 0 .35rem; }
.caption + .table { margin-top: 0; }
th, td { text-align: left; vertical-align: top; padding: .38rem 1.5rem .38rem 0;
  border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: .25rem; }
thead th { font-size: .82rem; font-weight: 600; color: var(--muted); border-bottom: 1.5px solid var(--ink);
  vertical-align: bottom; white-space: nowrap; }
tbody th { font-weight: 500; overflow-wrap: break-word; max-width: 18rem; }
tbody tr:last-child > * { border-bottom: 1.5px solid var(--ink); }
.number { text-align: right; white-space: nowrap; }
.empty { color: var(--muted); font-style: italic; }
figure { margin: 1.3rem 0 1.8rem; }
figure img { max-width: 100%; height: auto; }
.drawing svg { display: block; width: 100%; height: auto; }
.drawing text, .drawing tspan { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "Liberation Sans", sans-serif !important; }
figcaption { color: var(--muted); font-size: .88rem; line-height: 1.5; margin-top: .5rem; max-width: 44rem; }
.images { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 1.1rem 1.25rem; }
.images li { max-width: 100%; font-size: .8rem; line-height: 1.4; color: var(--muted);
  overflow-wrap: anywhere; }
.images img { display: block; margin-bottom: .35rem; border-radius: 3px; background: #000;
  image-rendering: pixelated; }
details { margin: 1rem 0 1.4rem; border: 1px solid var(--line); border-radius: 4px; padding: .55rem 1rem; }
details > :last-child { margin-bottom: .4rem; }
summary { cursor: pointer; font-weight: 500; }
details[open] > summary { margin-bottom: .8rem; }
footer { margin-top: 3.5rem; padding-top: .9rem; border-top: 1px solid var(--line); color: var(--muted);
  font-size: .82rem; }
@media (min-width: 1180px) {
  .frame.long { max-width: 1110px; display: grid; grid-template-columns: 190px minmax(0, 860px);
  column-gap: 56px; }
  .long > * { grid-column: 2; }
  .long > .contents { grid-column: 1; grid-row: 1 / span 3; position: sticky; top: 2.5rem; align-self: start;
    padding-top: .4rem; }
  .long > .contents strong { display: block; margin-bottom: .5rem; font-size: .82rem; }
  .long > .contents ul { display: block; border-left: 1px solid var(--line); padding-left: .9rem; }
  .long > .contents li { margin-bottom: .5rem; }
}
@media screen and (max-width: 640px) {
  .frame { padding: 1.5rem 1rem 3rem; }
  .drawing.wide { overflow-x: auto; }
  .drawing.wide svg { width: 640px; }
}
@media print {
  @page { margin: 18mm 16mm; }
  body { font-size: 10.5pt; }
  .frame { max-width: none; padding: 0; }
  .contents, .links { display: none; }
  h2 { margin-top: 1.6rem; }
  h2, .caption { break-after: avoid; }
  figure, .callout, .facts, tr, .images li { break-inside: avoid; }
  thead { display: table-header-group; }
  .table { overflow: visible; background: none; }
  .callout, .images img { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  details::details-content { content-visibility: visible; block-size: auto; }
  a { color: inherit; text-decoration: none; }
  footer { margin-top: 1rem; break-before: avoid; }
}
</style>
</head>
<body>
<div class="frame{% if sections | length > 2 %} long{% endif %}">
{% if sections | length > 2 %}
<nav class="contents" aria-label="Contents"><strong>Contents</strong><ul>
{% for number, heading in sections %}
<li><a href="#section-{{ number }}">{{ heading }}</a></li>
{% endfor %}
</ul></nav>
{% endif %}
<header>
{% if links %}
<nav class="links" aria-label="Reports"><ul>
{% for link in links %}
<li><a href="{{ link.address }}">{{ link.text }}</a></li>
{% endfor %}
</ul></nav>
{% endif %}
<h1>{{ title }}</h1>
{% if subtitle %}
<p class="subtitle">{{ subtitle }}</p>
{% endif %}
{% if mark in content %}
<p class="legend">{{ legend }}</p>
{% endif %}
</header>
<main>
{{ content }}
</main>
<footer>Made by cadx. This page fetches nothing: it can be printed, copied and archived as it is.</footer>
</div>
</body>
</html>
"""
