import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cadx.reporting import (
    LEGEND,
    MARK,
    MISSING,
    PAGE_LIMIT_BYTES,
    SVG_LIMIT_BYTES,
    Page,
    estimate_text,
    figure,
    panels,
    thumbnail_png,
)
from cadx.types import Estimate

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Balanced(HTMLParser):
    """Open tags must be closed in order; what matplotlib closes in itself counts as closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def full_page() -> Page:
    page = Page("Evaluation", "pneumoniamnist")
    page.links([("Validation", "validation.html"), ("Run", "../index.html")])
    page.facts(
        [("images", 4708), ("AUC", Estimate(value=0.988, low=0.981, high=0.993, n=624, method="DeLong"))]
    )
    page.section("Numbers")
    page.text("One.\n\nTwo.")
    page.callout("warn", "Look.")
    page.table([{"class": "normal", "count": 1214}, {"class": "pneumonia", "count": None}], "Counts")
    page.table([], "None")
    page.section("Pictures")
    for _ in range(2):
        drawing, axes = figure()
        axes.plot([0, 1], [0, 1], label="a")
        axes.legend()
        page.figure(drawing, "A line.", alt="a rising line")
    page.images(
        [(np.zeros((28, 28), np.uint8), "val-0001"), (np.zeros((300, 200, 3), np.uint8), "b")], "Two."
    )
    with page.details("More"):
        page.section("Inner")
        page.text("Three.")
    return page


def test_equal_content_gives_equal_bytes(tmp_path: Path):
    full_page().write(tmp_path / "a.html")
    full_page().write(tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_nothing_is_fetched_and_nothing_runs():
    html = full_page().html()
    assert "//" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)  # no address, with or without a scheme
    assert "<script" not in html
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_markup_is_well_formed_and_ids_are_unique():
    html = full_page().html()
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="|url\()#([^")]+)', html):
        assert target in ids


def test_every_text_is_escaped():
    evil = '<b onclick="x">&'
    page = Page(evil, evil)
    page.links([(evil, "a.html")])
    for _ in range(3):
        page.section(evil)
    page.text(evil)
    page.facts([(evil, evil)])
    page.callout("stop", evil)
    page.table(pd.DataFrame({evil: [evil]}), evil)
    page.table([], evil, empty=evil)
    drawing, axes = figure()
    axes.set_title(evil)
    page.figure(drawing, evil, alt=evil)
    page.images([(np.zeros((8, 8), np.uint8), evil)], evil)
    with page.details(evil):
        page.text(evil)
    assert "<b " not in page.html()


def test_every_image_has_words_beside_it():
    html = full_page().html()
    assert 'role="img" aria-label="a rising line"' in html
    assert all('alt="' in tag for tag in re.findall(r"<img[^>]*>", html))


def test_numbers_are_grouped_aligned_and_missing_ones_show_as_a_dash():
    page = Page("t")
    page.table(
        pd.DataFrame(
            {
                "class": ["a", "b"],
                "count": [12345, 6],
                "auc": [Estimate(value=0.9, low=0.8, high=1.0, n=9, method="Wilson"), None],
                "share": [0.123456, np.nan],
                "factor": [31.6666, 2.0],
                "kept": [True, False],
            }
        ),
        formats={"factor": ".1f"},
    )
    html = page.html()
    for cell in ("12,345", "0.900 (0.800 to 1.000)", "0.123", "31.7", MISSING):
        assert f'<td class="number">{cell}</td>' in html
    assert "<td>yes</td>" in html
    assert '<th scope="row">a</th>' in html


def test_a_figure_keeps_small_numbers_of_its_labels():
    page = Page("t")
    drawing, axes = figure()
    axes.set_xticks([0.00125, 0.0025], ["0.00125", "0.00250"])
    page.figure(drawing, "c")
    assert "0.00125" in page.html()


def test_a_heavy_figure_becomes_a_picture():
    drawing, axes = figure()
    points = np.random.default_rng(0).normal(size=(2, 20_000))
    axes.scatter(points[0], points[1], s=2)
    page = Page("t")
    page.figure(drawing, "Every sample.")
    html = page.html()
    assert "<svg" not in html
    assert len(html) < 3 * SVG_LIMIT_BYTES


def test_figures_leave_no_global_state():
    import matplotlib

    before = dict(matplotlib.rcParams)
    panels(8, 3, columns=3)
    full_page().html()
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    "address", ["https://example.org", "//example.org", "/etc", "file:x", "javascript:x"]
)
def test_a_link_out_of_the_reports_is_refused(address: str):
    with pytest.raises(ValueError, match="not relative"):
        Page("t").links([("x", address)])


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([[0, 128, 255]], np.uint8), [0, 128, 255]),
        (np.array([[0, 32896, 65535]], np.uint16), [0, 128, 255]),
        (np.array([[0.0, 0.5, 2.0]], np.float32), [0, 128, 255]),
        (np.array([[False, True, True]]), [0, 255, 255]),
    ],
)
def test_thumbnails_keep_the_gray_scale(pixels: np.ndarray, expected: list[int]):
    assert np.asarray(Image.open(io.BytesIO(thumbnail_png(pixels)))).tolist() == [expected]


def test_thumbnails_are_downsampled_and_small_images_keep_their_pixels():
    big = Image.open(io.BytesIO(thumbnail_png(np.zeros((1000, 500), np.uint16))))
    assert big.size == (96, 192)
    assert Image.open(io.BytesIO(thumbnail_png(np.zeros((28, 28), np.uint8)))).size == (28, 28)
    encoded = thumbnail_png(thumbnail_png(np.zeros((64, 64, 3), np.uint8)), max_px=16)
    assert Image.open(io.BytesIO(encoded)).size == (16, 16)


def test_images_stand_in_the_page_itself():
    page = Page("t")
    page.images([(np.full((4, 4), 7, np.uint8), "x")])
    (data,) = re.findall(r"base64,([A-Za-z0-9+/=]+)", page.html())
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).max() == 7


def test_a_page_that_is_too_large_is_not_written(tmp_path: Path):
    page = Page("t")
    page.text("x" * (PAGE_LIMIT_BYTES + 1))
    with pytest.raises(AssertionError):
        page.write(tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []


def shown(page: Page) -> str:
    return re.sub(r"<style>.*?</style>", "", page.html(), flags=re.DOTALL)


@pytest.mark.parametrize(
    ("method", "rough"),
    [
        ("Wilson, effective n over patients", False),
        ("Wilson; the threshold's choice counted", False),
        ("Wilson; too few errors (3): may be conservative", True),
        ("percentile; the spread of a value that lies above the true error: see ece_if_calibrated", True),
    ],
)
def test_a_rough_interval_is_marked_wherever_it_stands_and_the_page_says_why(method: str, rough: bool):
    estimate = Estimate(value=0.9, low=0.7, high=0.95, n=30, method=method)
    assert estimate_text(estimate) == "0.900 (0.700 to 0.950)" + f" {MARK}" * rough
    facts, folded = Page("t"), Page("t")
    facts.facts([("AUC", estimate)])
    with folded.details("More"):
        folded.table([{"metric": "AUC", "value": estimate}])
    for page in (facts, folded):
        assert shown(page).count(LEGEND) == rough
        assert shown(page).count(MARK) == 2 * rough


def test_an_estimate_without_an_interval_is_only_its_value():
    assert estimate_text(Estimate(value=0.5, low=None, high=0.7, n=2, method="none")) == "0.500"
