"""The page that people open, in a real browser without a network."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cadx.reporting import Page, panels

pytestmark = pytest.mark.browser


@pytest.fixture
def browser(tmp_path: Path) -> list[str]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium here: nobody has looked at the pages (Debian: apt-get install chromium)")
    return [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
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
