"""Pictures: what they must not distort."""

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from cadx.evaluating.classification import _precision_heights
from cadx.explaining import (
    Curve,
    draw_subgroups,
    overlay,
    patient_band,
    roc_heights,
    show_subgroups,
    tile_map,
    visualize_attention_map,
)
from cadx.metrics import Subgroup
from cadx.reporting import LEGEND, MARK, Page, panels
from cadx.types import Estimate


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_image_shows_unchanged_where_nothing_is_attended(dtype: type) -> None:
    top = np.iinfo(dtype).max
    pixels = (np.arange(16).reshape(4, 4) * (top // 15)).astype(dtype)
    attention = np.zeros((4, 4))
    attention[1, 2] = 0.01
    picture = overlay(pixels, attention)
    assert picture.shape == (4, 4, 3)
    assert picture.dtype == np.uint8
    expected = np.round(pixels / (top / 255)).astype(np.uint8)
    elsewhere = attention == 0
    np.testing.assert_array_equal(picture[elsewhere], np.repeat(expected[..., None], 3, 2)[elsewhere])
    assert len(set(picture[1, 2].tolist())) > 1, "the attended pixel is coloured"


def test_a_colour_image_keeps_its_colours() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(overlay(pixels, np.zeros((5, 6))), pixels)


def test_attention_in_other_coordinates_is_refused() -> None:
    with pytest.raises(AssertionError):
        overlay(np.zeros((4, 4), np.uint8), np.zeros((2, 2)))


def test_a_band_holds_its_curve_and_narrows_with_patients() -> None:
    rng = np.random.default_rng(1)

    def width(n: int) -> float:
        labels = np.arange(n) % 2
        band = patient_band(roc_heights, labels, (labels + rng.normal(0, 1, n))[None], None, resamples=100)
        assert band is not None
        assert (band.low <= band.value + 1e-9).all()
        assert (band.value <= band.high + 1e-9).all()
        return float((band.high - band.low)[20:80].mean())

    assert width(1600) < 0.65 * width(200)


def test_a_band_resamples_patients_not_images() -> None:
    """Ten copies of each image add no information: the band must not narrow."""
    rng = np.random.default_rng(2)
    labels = np.arange(60) % 2
    scores = labels + rng.normal(0, 1, 60)
    patients = np.arange(60)
    once = patient_band(roc_heights, labels, scores[None], patients)
    many = patient_band(
        roc_heights, np.repeat(labels, 10), np.repeat(scores, 10)[None], np.repeat(patients, 10)
    )
    np.testing.assert_allclose(once.value, many.value)
    np.testing.assert_allclose(once.high - once.low, many.high - many.low, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heights", "places"),
    [(roc_heights, (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)), (_precision_heights, (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))],
    ids=["sensitivity over false positive rate", "precision over recall"],
)  # fmt: skip
def test_a_band_holds_the_true_curve_as_often_as_it_says(heights: Curve, places: Sequence[float]) -> None:
    """Over 300 sets of 200 patients, whose three images are alike: a band that took them for independent would not.

    Nearer to its ends a curve rests on few cases, and no bootstrap knows what it has not seen.
    """
    share_ill, apart, at = 0.4, 1.5, np.array(places)
    threshold = apart + stats.norm.isf(at)  # where recall is the place
    truth = {
        roc_heights: stats.norm.sf(stats.norm.isf(at) - apart),
        _precision_heights: share_ill * at / (share_ill * at + (1 - share_ill) * stats.norm.sf(threshold)),
    }[heights]
    held = np.zeros(len(at))
    for seed in range(300):
        rng = np.random.default_rng(seed)
        ill, patients = rng.random(200) < share_ill, np.repeat(np.arange(200), 3)
        scores = apart * ill[patients] + 0.8 * rng.normal(size=200)[patients] + 0.6 * rng.normal(size=600)
        band = patient_band(heights, ill[patients].astype(float), scores[None], patients, resamples=200)
        assert band is not None
        column = np.round(at * 100).astype(int)
        held += (band.low[column] <= truth) & (truth <= band.high[column])
    assert 0.92 <= held.mean() / 300 <= 0.99, held
    assert held.min() / 300 >= 0.90, held


def test_no_band_where_a_class_is_missing() -> None:
    assert patient_band(roc_heights, np.zeros(5), np.zeros((1, 5)), None) is None


def test_a_forest_plot_shows_every_interval_whole() -> None:
    def estimate(value: float | None, low: float | None, high: float | None, method: str) -> Estimate:
        return Estimate(value=value, low=low, high=high, n=9, method=method)

    wide, none = estimate(0.5, 0.07, 0.93, "Wilson"), estimate(None, None, None, "too few: 4 patients")
    nothing = estimate(None, None, None, "undefined: no negatives")
    groups = {
        "site": {
            "a": Subgroup(n=9, n_positive=4, sensitivity=wide, specificity=wide, auc=none),
            "b": Subgroup(n=8, n_positive=0, sensitivity=none, specificity=wide, auc=nothing),
        }
    }
    _, axes = panels(8, 2, columns=3)
    draw_subgroups(axes, groups, dict.fromkeys(("sensitivity", "specificity", "auc"), wide))
    assert axes[0].get_xlim()[0] < 0.07
    assert [text.get_text() for text in axes[2].texts] == ["too few", "undefined"]
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == [
        "site: a  (9, 4 +)",
        "site: b  (8, 0 +)",
    ]
    assert {line.get_markerfacecolor() for line in axes[0].lines if line.get_marker() == "s"} == {"#0072B2"}
    page = Page("Subgroups")
    show_subgroups(page, groups, dict.fromkeys(("sensitivity", "specificity", "auc"), wide))
    assert "Undefined: no negatives." in page.html()
    assert MARK not in page.html()


def test_a_forest_plot_tells_a_rough_interval_from_a_sure_one() -> None:
    sure = Estimate(value=0.8, low=0.7, high=0.9, n=90, method="Wilson")
    rough = sure.model_copy(update={"method": "Wilson; too few errors (2): may be conservative"})
    groups = {
        "site": {
            "a": Subgroup(n=90, n_positive=40, sensitivity=rough, specificity=sure, auc=sure),
            "b": Subgroup(n=90, n_positive=40, sensitivity=sure, specificity=sure, auc=sure),
        }
    }
    overall = dict.fromkeys(("sensitivity", "specificity", "auc"), sure)
    _, axes = panels(8, 2, columns=3)
    draw_subgroups(axes, groups, overall)
    filled = [[line.get_markerfacecolor() for line in one.lines if line.get_marker() == "s"] for one in axes]
    assert filled == [["white", "#0072B2"], ["#0072B2", "#0072B2"], ["#0072B2", "#0072B2"]]
    page = Page("Subgroups")
    show_subgroups(page, groups, overall)
    assert f"Hollow squares: {MARK}." in page.html()
    assert LEGEND in page.html()


@pytest.mark.parametrize("tile_px", [64, 224, 256])
@pytest.mark.parametrize("slide_mpp", [0.25, 0.499])
@pytest.mark.parametrize("thumbnail_px", [(200, 260), (97, 131)])
def test_attention_lies_on_its_tiles_whatever_tile_level_and_scale(
    tile_px: int, slide_mpp: float, thumbnail_px: tuple[int, int]
) -> None:
    """The sketch took every slide for one of 256 px tiles, and its thumbnail for a tenth of level 0."""
    size_um = (20_000 * slide_mpp, 26_000 * slide_mpp)
    spacing_um = (size_um[0] / thumbnail_px[0], size_um[1] / thumbnail_px[1])
    tile_um = tile_px * 2 * slide_mpp
    positions_um = np.array([[0.31 * size_um[1], 0.62 * size_um[0]], [0.8 * size_um[1], 0.1 * size_um[0]]])
    found = tile_map(
        np.array([3.0, 1.0]), positions_um, tile_um=tile_um, spacing_um=spacing_um, shape=thumbnail_px
    )
    for weight, (x_um, y_um) in zip((3, 1), positions_um, strict=True):
        rows, columns = np.nonzero(found == weight)
        for pixels, step_um, start_um in ((rows, spacing_um[0], y_um), (columns, spacing_um[1], x_um)):
            assert abs(pixels.min() * step_um - start_um) <= step_um
            assert abs((pixels.max() + 1) * step_um - (start_um + tile_um)) <= step_um


def test_overlapping_tiles_share_their_pixels_and_tiles_beyond_the_edge_are_cut() -> None:
    positions_um = np.array([[0, 0], [1, 0], [3.5, 0]])
    found = tile_map(np.array([2.0, 4.0, 6.0]), positions_um, tile_um=2, spacing_um=(1, 1), shape=(1, 5))
    # The third tile covers the right half of the fourth pixel, and the last one whole.
    np.testing.assert_allclose(found, [[2, 3, 4, 6, 6]])


def test_the_picture_of_a_slide_shows_its_tissue_where_no_tile_was_read() -> None:
    thumbnail = np.full((4, 6, 3), 200, np.uint8)
    drawn = visualize_attention_map(
        thumbnail, np.array([1.0]), np.array([[0, 0]]), tile_um=2, spacing_um=(1, 1)
    )
    assert (drawn[2:] == 200).all()
    assert (drawn[:, 2:] == 200).all()
    assert (drawn[:2, :2] != 200).any(axis=2).all()
