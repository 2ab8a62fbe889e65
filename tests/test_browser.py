"""The page that people open, in a real browser without a network."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_evaluate import prepare

from cadx.reporting import Page, panels

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium() -> str:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium here: nobody has looked at the pages (Debian: apt-get install chromium)")
    return program


@pytest.fixture
def browser(chromium: str, tmp_path: Path) -> list[str]:
    return [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,1400",
    ]  # fmt: skip


def open_page(browser: list[str], page: Path, *options: str) -> str:
    done = subprocess.run(
        [*browser, *options, page.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line or "ERR_" in line]
    assert not complaints, complaints
    return done.stdout


@pytest.fixture
def page(tmp_path: Path) -> Path:
    made = Page("A report", "of one figure, one picture and one table")
    made.section("Numbers")
    made.facts([("AUC", 0.98)])
    made.table([{"metric": "AUC", "value": 0.98}], "What it says.")
    drawing, (axes,) = panels(6, 3, columns=1)
    axes.plot([0, 1], [0, 1])
    made.figure(drawing, "A line.")
    made.images([(np.tile(np.linspace(0, 1, 64), (64, 1)), "a ramp")], caption="Pictures.")
    with made.details("Folded away"):
        made.text("Found by those who look.")
    made.write(tmp_path / "page.html")
    return tmp_path / "page.html"


def test_a_report_shows_its_text_pictures_and_lines(browser: list[str], page: Path, tmp_path: Path) -> None:
    dom = open_page(browser, page, "--dump-dom")
    assert "A report" in dom
    open_page(browser, page, f"--screenshot={tmp_path / 'shot.png'}")
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    blue = (np.abs(shot - (0, 0x72, 0xB2)).sum(axis=2) < 40).sum()
    assert blue > 200, "the line of the figure is drawn"
    ramp = len(np.unique(shot[(np.ptp(shot, axis=2) == 0)]))
    assert ramp > 60, "the gray ramp of the picture is there"


def test_a_report_prints_to_paper(browser: list[str], page: Path, tmp_path: Path) -> None:
    open_page(browser, page, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 10_000
    if shutil.which("pdftotext") is None:
        pytest.skip("nobody has read the paper (Debian: apt-get install poppler-utils)")
    done = subprocess.run(
        ["pdftotext", "-layout", tmp_path / "page.pdf", "-"], capture_output=True, text=True, check=True
    )
    for text in ("A report", "What it says.", "Folded away", "Found by those who look.", "Pictures."):
        assert text in done.stdout, "what is folded away on a screen is read on paper"


# --- A whole report, measured as it is laid out -------------------------------------------------------

DESKTOP_PX, PHONE_PX = 1280, 390

MEASURE = """
<!DOCTYPE html><html><body style="margin:0">
<iframe id="frame" style="border:0;width:WIDTHpx;height:30000px" src="ADDRESS"></iframe><pre id="found"></pre>
<script>
window.addEventListener("load", () => {
  const page = document.getElementById("frame").contentDocument;
  page.querySelectorAll("details").forEach(one => { one.open = true; });
  const boxes = [];
  const add = (what, rect, element) => {
    let [left, top, right, bottom] = [rect.left, rect.top, rect.right, rect.bottom];
    for (let one = element; one; one = one.parentElement) {  // what is scrolled out of sight covers nothing
      if (!["auto", "scroll", "hidden"].includes(getComputedStyle(one).overflowX) || one.closest("svg")) continue;
      const seen = one.getBoundingClientRect();
      [left, right] = [Math.max(left, seen.left), Math.min(right, seen.right)];
    }
    const svg = element.closest("svg");
    const around = svg && svg !== element ? svg.getBoundingClientRect() : null;
    if (right > left && bottom > top) boxes.push({
      what, left, top, right, bottom, drawing: around ? [...page.querySelectorAll("svg")].indexOf(svg) : -1,
      cut: around ? Math.max(around.left - rect.left, rect.right - around.right, around.top - rect.top,
        rect.bottom - around.bottom) : 0,
    });
  };
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (!node.data.trim() || !node.parentElement.checkVisibility() || node.parentElement.closest("style")) continue;
    const range = page.createRange();
    range.selectNodeContents(node);
    for (const rect of range.getClientRects()) add(node.data.trim().slice(0, 40), rect, node.parentElement);
  }
  page.querySelectorAll("img, svg").forEach(one => add(one.tagName, one.getBoundingClientRect(), one));
  const found = {width: page.documentElement.scrollWidth, boxes};
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script></body></html>
"""


def laid_out(browser: list[str], page: Path, width_px: int, folder: Path) -> dict[str, Any]:
    """How wide the page wants to be in a window of this width, and every line of text and picture on it."""
    around = folder / f"around-{width_px}.html"
    around.write_text(MEASURE.replace("WIDTH", str(width_px)).replace("ADDRESS", page.as_uri()))
    dom = open_page(
        browser, around, "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom"
    )
    (told,) = re.findall(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    found: dict[str, Any] = json.loads(html.unescape(told))
    return found


def faults_of(found: dict[str, Any], width_px: int, *, tolerance_px: float = 2.0) -> list[str]:
    """What reaches beyond the page, is cut off, or lies over something else (not a label over its own drawing)."""
    boxes = found["boxes"]
    faults = [f"the page is {found['width']} px wide"] if found["width"] > width_px else []
    faults += [f"beyond the page: {one['what']}" for one in boxes if one["right"] > width_px + 1]
    faults += [f"cut off: {one['what']}" for one in boxes if one["cut"] > tolerance_px]
    edges = np.array([[one[side] for side in ("left", "top", "right", "bottom")] for one in boxes])
    drawing = np.array([one["drawing"] for one in boxes])
    reach = np.minimum(edges[:, None, 2:], edges[None, :, 2:]) - np.maximum(
        edges[:, None, :2], edges[None, :, :2]
    )
    over = (reach > tolerance_px).all(axis=2) & (drawing[:, None] == drawing[None])
    faults += [
        f"{boxes[i]['what']!r} over {boxes[j]['what']!r}" for i, j in np.argwhere(np.triu(over, 1)).tolist()
    ]
    return faults


@pytest.fixture(scope="module")
def report(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `evaluate` writes about a network that was trained, calibrated and scored on test."""
    run = prepare(tmp_path_factory.mktemp("run"))
    out = tmp_path_factory.mktemp("scored")
    run.evaluate(out, split="test", minimum_n=5)
    return out / "report.html"


@pytest.mark.parametrize("width_px", [DESKTOP_PX, PHONE_PX])
def test_nothing_of_a_report_overlaps_or_leaves_the_page(
    browser: list[str], report: Path, tmp_path: Path, width_px: int
) -> None:
    found = laid_out(browser, report, width_px, tmp_path)
    shown = " ".join(one["what"] for one in found["boxes"])
    for part in ("Subgroups", "Net benefit", "Worst mistakes", "Explanations", "img", "svg"):
        assert part.lower() in shown.lower(), "not the whole report was measured"
    assert faults_of(found, width_px) == []


def test_the_measure_sees_what_overlaps_is_cut_off_or_leaves_the_page(
    browser: list[str], tmp_path: Path
) -> None:
    page = tmp_path / "spoilt.html"
    page.write_text(
        "<!DOCTYPE html><body style='margin:0;font:16px sans-serif'><p>first</p><p style='margin-top:-2.2em'>second</p>"
        "<svg width='100' height='40' style='display:block'>"
        "<text x='10' y='20'>one</text><text x='15' y='22'>two</text>"
        "<text x='60' y='20'>longer than this</text></svg><p style='white-space:nowrap;width:9em'>"
        + "wide "
        * 40
    )
    faults = faults_of(laid_out(browser, page, PHONE_PX, tmp_path), PHONE_PX)
    for fault in (
        "'first' over 'second'",
        "'one' over 'two'",
        "cut off: longer than this",
        "beyond the page: wide",
    ):
        assert [one for one in faults if one.startswith(fault)], (fault, faults)
    assert "px wide" in faults[0]


def test_a_table_that_is_cut_off_shows_that_it_goes_on(browser: list[str], tmp_path: Path) -> None:
    """A shadow at the right edge of a window that is too narrow for the table, and none where it fits."""
    made = Page("A report")
    made.table([{f"a long name of column {number}": f"value {number}" for number in range(5)}] * 3)
    made.write(tmp_path / "page.html")
    darkest = []
    for width in (500, 1200):
        shot = tmp_path / f"{width}.png"
        open_page(browser, tmp_path / "page.html", f"--screenshot={shot}", f"--window-size={width},500")
        gray = np.asarray(Image.open(shot).convert("L"))
        # Between two rules of the table, the last pixels before its edge: text never reaches so far up.
        frame = 16 if width < 640 else 24
        edge = gray[:, min(width, 860) - frame - 3]
        darkest.append(int(np.median(edge[edge < 250])) if (edge < 250).sum() > 40 else 255)
    assert darkest[0] < 235, "nothing says that the table goes on"
    assert darkest[1] == 255, "a shadow where nothing is cut off"
