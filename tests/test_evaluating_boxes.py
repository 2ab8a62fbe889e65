"""Groups of images that a detector serves worse: found, and corrected for the number of comparisons."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.multitest import multipletests
from test_comparing import boxes_of

from cadx.evaluating import Detection, Settings
from cadx.predicting.table import read_predictions
from cadx.reporting import Page

SETTINGS = Settings(resamples=0, subgroups=("site", "sex"), minimum_n=20)


@pytest.fixture
def detection(tmp_path: Path) -> Detection:
    """One site of four where three in four lesions are missed; sexes and the other sites differ by chance."""
    parts = []
    for site, skill in (("north", 0.9), ("east", 0.9), ("south", 0.25), ("west", 0.9)):
        path = boxes_of(tmp_path / f"{site}.parquet", skill=skill, seed=len(parts), n=120)
        frame, info = read_predictions(path)
        names = {name: site + frame[name].astype(str) for name in ("sample_id", "patient")}
        sex = np.where(np.arange(120) // 2 % 2, "F", "M")
        parts.append(frame.assign(**names, site=site, sex=sex))
    return Detection(pd.concat(parts, ignore_index=True), info, SETTINGS)


def test_the_site_where_lesions_are_missed_is_found(detection: Detection) -> None:
    gaps = detection.gaps
    assert set(gaps["site"]) == {"north", "east", "south", "west"}
    assert set(gaps["sex"]) == {"F"}, "of two values one is compared"
    south = gaps["site"]["south"]["sensitivity"]
    others = [group.sensitivity for name, group in detection.by_subgroup["site"].items() if name != "south"]
    mean = sum(one.value * one.n for one in others) / sum(one.n for one in others)
    assert south.value == pytest.approx(detection.by_subgroup["site"]["south"].sensitivity.value - mean)
    assert south.high < 0
    flat = [gap for groups in gaps.values() for found in groups.values() for gap in found.values()]
    expected = multipletests([gap.p for gap in flat], method="holm")[1]
    assert [gap.p_adjusted for gap in flat] == pytest.approx(expected)
    # The three sites beside the bad one stand out too: among their others is the bad one.
    told = {name for name, found in gaps["site"].items() if found["sensitivity"].p_adjusted < 0.05}
    assert "south" in told
    assert gaps["sex"]["F"]["sensitivity"].p_adjusted > 0.05
    assert all(found["specificity"].p_adjusted > 0.05 for found in gaps["site"].values())


def test_gaps_stand_in_the_record_and_on_the_page(detection: Detection) -> None:
    assert detection.record()["gaps"]["site"]["south"]["sensitivity"]["p_adjusted"] < 0.05
    page = Page("Lesions")
    detection.show_numbers(page)
    assert "site: south" in page.html().partition("difference from all others")[2]


def test_groups_of_too_few_patients_have_no_gap(detection: Detection) -> None:
    few = Settings(resamples=0, subgroups=("site",), minimum_n=61)
    gap = Detection(detection.frame, detection.info, few).gaps["site"]["south"]["sensitivity"]
    assert (gap.value, gap.p, gap.p_adjusted) == (None, None, None)
    assert gap.method == "too few: 60 patients, 61 needed"


def of_sizes(tmp_path: Path, *, small: float, n: int = 160) -> Detection:
    """Every other image holds a lesion of 30 pixels a side, found at a rate of `small`, the others one of 60 or 120."""
    tmp_path.mkdir(exist_ok=True)
    parts = []
    for scale, skill, rows in ((1, small, n), (2, 0.9, n), (4, 0.9, n // 4)):
        path = boxes_of(tmp_path / f"{scale}.parquet", skill=skill, seed=scale, n=rows)
        frame, info = read_predictions(path)
        for column in ("boxes", "lesions"):
            frame[column] = [
                [box | {side: scale * box[side] for side in ("x0", "y0", "x1", "y1")} for box in boxes]
                for boxes in frame[column]
            ]
        # The same patients have all three.
        parts.append(frame.assign(sample_id=f"{scale}-" + frame["sample_id"], site="a", sex=""))
    return Detection(pd.concat(parts, ignore_index=True).sample(frac=1, random_state=0), info, SETTINGS)


def test_a_size_of_lesion_that_is_missed_is_found_and_corrected_for_with_the_rest(tmp_path: Path) -> None:
    detection = of_sizes(tmp_path, small=0.4)
    groups, gaps = detection.by_subgroup["lesion size"], detection.gaps["lesion size"]
    assert (groups["small"].n_positive, groups["medium"].n_positive, groups["large"].n_positive) == (
        80,
        80,
        20,
    )
    assert set(gaps) == {"small", "medium", "large"}
    found = {name: groups[name].sensitivity for name in ("medium", "large")}
    others = sum(one.value * one.n for one in found.values()) / sum(one.n for one in found.values())
    gap = gaps["small"]["sensitivity"]
    assert gap.value == pytest.approx(groups["small"].sensitivity.value - others)
    assert gap.high < 0
    assert gap.p_adjusted < 0.05
    flat = [gap for groups in detection.gaps.values() for found in groups.values() for gap in found.values()]
    expected = multipletests([gap.p for gap in flat], method="holm")[1]
    assert [gap.p_adjusted for gap in flat] == pytest.approx(expected)
    fair = of_sizes(tmp_path, small=0.9).gaps["lesion size"]
    assert all(found["sensitivity"].p_adjusted > 0.05 for found in fair.values())


def test_lesions_of_a_size_that_few_patients_have_are_not_judged(tmp_path: Path) -> None:
    detection = of_sizes(tmp_path, small=0.9)
    few = detection._settings.model_copy(update={"minimum_n": 21})
    detection = Detection(detection.frame, detection.info, few)
    groups, gaps = detection.by_subgroup["lesion size"], detection.gaps["lesion size"]
    large = groups["large"]
    for estimate in (large.sensitivity, large.metrics["ap"], gaps["large"]["sensitivity"]):
        assert estimate.value is None
        assert estimate.method == "too few: 20 patients with lesions, 21 needed"
    assert large.n_positive == 20
    assert groups["small"].sensitivity == detection.scores.metrics["sensitivity_small"]
    assert gaps["small"]["sensitivity"].p_adjusted is not None


def test_what_each_of_several_seeds_misses_of_a_size_is_averaged(tmp_path: Path) -> None:
    first, second = (of_sizes(tmp_path / name, small=rate) for name, rate in (("a", 0.9), ("b", 0.2)))
    both = Detection(first.frame, first.info, SETTINGS, [(second.frame, second.info)])
    gap = [one.gaps["lesion size"]["small"]["sensitivity"].value for one in (first, second, both)]
    assert gap[2] == pytest.approx((gap[0] + gap[1]) / 2)
