"""Metrics of detections: against pycocotools and MONAI, on repeated images, and on cases counted by hand."""

import contextlib
import io
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_froc_curve_data, compute_froc_score
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats

from cadx import metrics
from cadx.detection import (
    AREAS_PX2,
    FROC_RATES,
    IOU_THRESHOLDS,
    METRICS,
    calculate_detection_metrics,
    calculate_map,
    froc_curve,
    froc_limits,
    operating_point,
    paired_differences,
)
from cadx.detection.average_precision import coco_tables, mean_of
from cadx.detection.froc import pool_classes, sensitivities
from cadx.detection.matching import match_classes, read_boxes
from cadx.detection.scoring import _froc
from cadx.doubts import HOLDS_LESS, doubts_of
from cadx.gating import ceiling, floor
from cadx.metrics.limits import part_of_boxes

CLASSES = ("mass", "cluster")
COLUMNS = ["sample_id", "class", "x0", "y0", "x1", "y1"]


def lesions(*rows: tuple[Any, ...]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=COLUMNS)


def found(*rows: tuple[Any, ...]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=[*COLUMNS, "score"])


def draw(
    seed: int, *, num_images: int = 12, num_scores: int | None = None, classes: Iterable[str] = CLASSES
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Detections, lesions and images: lesions of every size, found, missed, found twice, or taken for another class."""
    rng = np.random.default_rng(seed)
    names = [f"i{number}" for number in range(num_images)]
    truth, answers = [], []
    for name in names:
        for _ in range(rng.integers(0, 4)):
            x0, y0 = rng.integers(0, 200, 2).tolist()
            width, height = (2 ** rng.uniform(2, 7.5, 2)).astype(int).tolist()
            kind = str(rng.choice(list(classes)))
            truth.append((name, kind, x0, y0, x0 + width, y0 + height))
            for _ in range(rng.integers(0, 4)):
                left, top, right, bottom = (rng.normal(0, 0.12, 4) * (width, height, width, height)).round()
                box = (x0 + left, y0 + top, max(x0 + width + right, x0 + left + 1))
                answers.append((name, kind, *box, max(y0 + height + bottom, y0 + top + 1)))
                if rng.random() < 0.2:
                    answers.append((name, str(rng.choice(list(classes))), *answers[-1][2:]))
        for _ in range(rng.integers(0, 3)):
            x0, y0 = rng.integers(0, 300, 2).tolist()
            answers.append((name, str(rng.choice(list(classes))), x0, y0, x0 + 20, y0 + rng.integers(5, 120)))
    scores = rng.permutation(len(answers)) / max(len(answers), 1)
    if num_scores:
        scores = (scores * num_scores).round() / num_scores
    rows = [(*answer, score) for answer, score in zip(answers, scores.tolist(), strict=True)]
    return found(*rows), lesions(*truth), names


def repeated(frame: pd.DataFrame, counts: dict[str, int]) -> pd.DataFrame:
    """Each image's rows as often as it is drawn, under names of their own."""
    parts = [
        frame[frame["sample_id"] == name].assign(sample_id=f"{name}-{copy}")
        for name, count in counts.items()
        for copy in range(count)
    ]
    return pd.concat(parts, ignore_index=True)


def own_tables(
    answers: pd.DataFrame, truth: pd.DataFrame, names: list[str], weights: np.ndarray | None = None
) -> dict[str, Any]:
    """Class -> AP and recall, R A T; of the set itself unless images are weighted."""
    data = read_boxes(answers, truth, names, CLASSES, None, 100)
    drawn = np.ones((1, len(names)), np.uint8) if weights is None else weights
    matches = match_classes(data, IOU_THRESHOLDS, tuple(AREAS_PX2.values()))
    return {name: coco_tables(part, data, drawn) for name, part in zip(CLASSES, matches, strict=True)}


def pycocotools_tables(
    answers: pd.DataFrame, truth: pd.DataFrame, names: list[str], max_detections: int = 100
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Class -> AP and recall, A T, by pycocotools; NaN where there is no lesion."""

    def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
        return [
            {
                "id": number,  # not from 0, which pycocotools takes for "no match"
                "image_id": names.index(row.sample_id),
                "category_id": CLASSES.index(row.label),
                "bbox": [row.x0, row.y0, row.x1 - row.x0, row.y1 - row.y0],
                "area": (row.x1 - row.x0) * (row.y1 - row.y0),
                "iscrowd": 0,
                **({"score": row.score} if "score" in frame else {}),
            }
            for number, row in enumerate(frame.rename(columns={"class": "label"}).itertuples(), 1)
        ]

    with contextlib.redirect_stdout(io.StringIO()):
        reference, given = COCO(), COCO()
        for one, frame in ((reference, truth), (given, answers)):
            one.dataset = {
                "images": [{"id": number} for number in range(len(names))],
                "categories": [{"id": number} for number in range(len(CLASSES))],
                "annotations": records(frame),
            }
            one.createIndex()
        evaluation = COCOeval(reference, given, "bbox")
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = (np.asarray(evaluation.eval[what])[..., 0] for what in ("precision", "recall"))
    tables = (
        np.where(precision > -1, precision, np.nan).mean(axis=1),  # T K A
        np.where(recall > -1, recall, np.nan),
    )
    return {name: tuple(table[:, column].T for table in tables) for column, name in enumerate(CLASSES)}  # type: ignore[misc]


def assert_equal_to_pycocotools(
    ours: dict[str, Any], expected: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    for name in CLASSES:
        for own, other in zip(ours[name], expected[name], strict=True):
            np.testing.assert_allclose(own[0], other, rtol=0, atol=1e-6)


# --- Average precision --------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, 4, 40]), st.sampled_from([1, 3, 100]))
def test_precision_and_recall_are_pycocotools_at_every_iou_threshold_area_and_maximum(
    seed: int, num_scores: int | None, max_detections: int
) -> None:
    answers, truth, names = draw(seed, num_images=6, num_scores=num_scores)
    data = read_boxes(answers, truth, names, CLASSES, None, max_detections)
    itself = np.ones((1, len(names)), np.uint8)
    matches = match_classes(data, IOU_THRESHOLDS, tuple(AREAS_PX2.values()))
    ours = {name: coco_tables(part, data, itself) for name, part in zip(CLASSES, matches, strict=True)}
    # pycocotools draws among equal scores by the order of rows, where ours takes the image.
    ordered = answers.assign(image=[names.index(name) for name in answers["sample_id"]])
    ordered = ordered.sort_values("image", kind="stable").drop(columns="image")
    expected = pycocotools_tables(ordered, truth, names, max_detections)
    assert_equal_to_pycocotools(ours, expected)
    values = calculate_map(answers, truth, names, classes=CLASSES, max_detections=max_detections)
    for name in CLASSES:
        precision, recall = expected[name]
        wanted = {
            "ap": precision[0].mean(),
            "ap50": precision[0, 0],
            "ap75": precision[0, 5],
            "ap_small": precision[1].mean(),
            "ap_medium": precision[2].mean(),
            "ap_large": precision[3].mean(),
            "ar": recall[0].mean(),
        }
        for metric, value in wanted.items():
            found_value = values[name][metric]
            assert (math.nan if found_value is None else found_value) == pytest.approx(
                value, abs=1e-6, nan_ok=True
            )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_a_resample_is_worth_what_coco_gives_for_the_images_repeated(seed: int) -> None:
    answers, truth, names = draw(seed)
    counts = np.random.default_rng(seed).integers(0, 4, (1, len(names))).astype(np.uint8)
    counts[0, 0] = 1
    ours = own_tables(answers, truth, names, counts)
    copies = dict(zip(names, counts[0].tolist(), strict=True))
    expected = pycocotools_tables(
        repeated(answers, copies),
        repeated(truth, copies),
        [f"{name}-{copy}" for name, count in copies.items() for copy in range(count)],
    )
    assert_equal_to_pycocotools(ours, expected)


def test_average_precision_counted_by_hand() -> None:
    """Of two lesions one is found first, then a false positive: precision 1 up to recall 0.5, 51 recalls of 101."""
    truth = lesions(("a", "mass", 0, 0, 10, 10), ("b", "mass", 0, 0, 10, 10))
    answers = found(("a", "mass", 0, 0, 10, 10, 0.9), ("a", "mass", 50, 50, 60, 60, 0.8))
    values = calculate_map(answers, truth, ["a", "b"], classes=["mass"])
    assert values["mass"]["ap"] == pytest.approx(51 / 101)
    # A lesion of 10 x 10 is small; of the other sizes there is none.
    assert values["mass"]["ap_small"] == values["mass"]["ap"]
    assert values["mass"]["ap_medium"] is None


def test_a_lesion_is_matched_once() -> None:
    """The sketch matched a lesion as often as a detection met it: all three detections of one were right."""
    truth = lesions(("a", "mass", 0, 0, 10, 10), ("b", "mass", 0, 0, 10, 10))
    answers = found(*(("a", "mass", 0, 0, 10, 10, score) for score in (0.9, 0.8, 0.7)))
    scores = calculate_detection_metrics(answers, truth, ["a", "b"], classes=["mass"], resamples=0)
    assert scores.metrics["sensitivity"].value == 0.5
    assert scores.metrics["precision"].value == pytest.approx(1 / 3)
    assert scores.metrics["false_positives_per_image"].value == 1
    assert scores.metrics["ap50"].value == pytest.approx(51 / 101)


def test_boxes_of_another_image_or_class_are_no_hit() -> None:
    """The sketch threw the boxes of all images and classes into one list, where they matched each other."""
    truth = lesions(("a", "mass", 0, 0, 10, 10))
    elsewhere = found(("b", "mass", 0, 0, 10, 10, 0.9), ("a", "cluster", 0, 0, 10, 10, 0.8))
    scores = calculate_detection_metrics(elsewhere, truth, ["a", "b"], classes=CLASSES, resamples=0)
    assert scores.metrics["ap"].value == 0
    assert scores.metrics["sensitivity"].value == 0
    assert scores.metrics["false_positives_per_image"].value == 1


def test_an_image_without_boxes_counts_its_false_positives() -> None:
    truth = lesions(("a", "mass", 0, 0, 10, 10))
    answers = found(("a", "mass", 0, 0, 10, 10, 0.6), ("b", "mass", 0, 0, 10, 10, 0.9))
    alone = calculate_map(answers[answers["sample_id"] == "a"], truth, ["a"], classes=["mass"])
    both = calculate_map(answers, truth, ["a", "b"], classes=["mass"])
    assert (alone["mass"]["ap"], both["mass"]["ap"]) == (1, 0.5)


def test_what_has_no_lesions_is_none_and_never_minus_one() -> None:
    truth = lesions(("a", "mass", 0, 0, 10, 10))
    answers = found(("a", "mass", 0, 0, 10, 10, 0.9), ("a", "cluster", 0, 0, 9, 9, 0.9))
    values = calculate_map(answers, truth, ["a", "b"], classes=CLASSES)
    assert set(values["cluster"].values()) == {None}
    assert values[""]["ap"] == 1  # the mean is over the classes that have lesions
    scores = calculate_detection_metrics(answers, truth, ["a", "b"], classes=CLASSES, resamples=20)
    estimate = scores.by_class["cluster"]["ap"]
    assert (estimate.value, estimate.low, estimate.n) == (None, None, 0)
    assert "no lesion" in estimate.method
    assert "that is large" in scores.metrics["ap_large"].method
    assert "1 undefined" in scores.metrics["ap"].method
    assert scores.by_class["cluster"]["froc"].value is None
    assert scores.by_class["cluster"]["image_auc"].value is None


def test_a_mean_over_classes_doubts_itself_where_one_has_no_lesion_at_all() -> None:
    answers, truth, names = draw(0, classes=("mass",))
    scores = calculate_detection_metrics(answers, truth, names, classes=CLASSES, resamples=50)
    told = "too few (0 lesions of 1 of 2 classes): holds the truth less often than 95 %"
    doubted = {name for name, one in scores.metrics.items() if told in doubts_of(one.method)}
    assert doubted == {"ap", "ap50", "ap75", "ar"}
    assert not floor("AP", scores.metrics["ap"], 0.0).passed


def test_neither_detections_nor_lesions_is_no_error() -> None:
    nothing = calculate_detection_metrics(found(), lesions(), ["a", "b"], classes=CLASSES)
    assert {name for name, estimate in nothing.metrics.items() if estimate.value is not None} == {
        "false_positives_per_image",
        "image_specificity",
    }
    blind = calculate_detection_metrics(
        found(), lesions(("a", "mass", 0, 0, 9, 9)), ["a", "b"], classes=CLASSES
    )
    for name in ("ap", "froc", "sensitivity"):
        assert blind.metrics[name].value == 0


@pytest.mark.parametrize("max_detections", [1, 2, 7, 300])
def test_any_number_of_detections_counts_as_asked(max_detections: int) -> None:
    """Another maximum than 1, 10 and 100 gives -1 in pycocotools and what wraps it (torchmetrics#2560)."""
    truth = lesions(("a", "mass", 0, 0, 10, 10))
    rows = [("a", "mass", 100, 100, 110, 110, 0.9)] * 4 + [("a", "mass", 0, 0, 10, 10, 0.5)]
    value = calculate_map(found(*rows), truth, ["a"], classes=["mass"], max_detections=max_detections)
    assert value["mass"]["ap"] == pytest.approx(0.2 if max_detections >= 5 else 0)


def test_the_maximum_holds_for_each_class_of_each_image() -> None:
    answers, truth, names = draw(3)
    limited = calculate_map(answers, truth, names, classes=CLASSES, max_detections=1)
    best = (
        answers.sort_values("score", ascending=False, kind="stable").groupby(["sample_id", "class"]).head(1)
    )
    assert limited == calculate_map(best, truth, names, classes=CLASSES)


# --- FROC and operating points ------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6))
def test_froc_is_monai_s_where_no_scores_are_tied(seed: int) -> None:
    answers, truth, names = draw(seed)
    # Never to be found: else MONAI leaves out the lowest threshold.
    truth = pd.concat([truth, lesions((names[0], "mass", 900, 900, 910, 910))], ignore_index=True)
    data = read_boxes(answers, truth, names, CLASSES, None, 100)
    pool = pool_classes(match_classes(data, (0.5,), (AREAS_PX2["all"],)))
    missed = np.zeros(pool.num_lesions - int(pool.hit.sum()))
    per_image, sensitivity = compute_froc_curve_data(
        pool.score[~pool.hit] + 0.1,
        np.concatenate([pool.score[pool.hit] + 0.1, missed]),
        pool.num_lesions,
        len(names),
    )
    expected = compute_froc_score(per_image, sensitivity, FROC_RATES)
    scores = calculate_detection_metrics(answers, truth, names, classes=CLASSES, resamples=0)
    assert scores.metrics["froc"].value == pytest.approx(expected, abs=1e-12)


def test_a_resample_s_froc_is_that_of_the_images_repeated() -> None:
    answers, truth, names = draw(11, num_images=20, num_scores=30)
    counts = np.random.default_rng(0).integers(0, 4, len(names))
    data = read_boxes(answers, truth, names, CLASSES, None, 100)
    pool = pool_classes(match_classes(data, (0.5,), (AREAS_PX2["all"],)))
    ours = sensitivities(data, pool, counts[None].astype(np.uint8), FROC_RATES)[0]
    copies = dict(zip(names, counts.tolist(), strict=True))
    curve = froc_curve(
        repeated(answers, copies),
        repeated(truth, copies),
        [f"{name}-{copy}" for name, count in copies.items() for copy in range(count)],
        classes=CLASSES,
    )
    expected = [curve.sensitivity[curve.false_positives_per_image <= rate].max() for rate in FROC_RATES]
    np.testing.assert_allclose(ours, expected, atol=1e-12)
    assert 0 < ours[0] < ours[-1]


def test_the_operating_point_is_the_highest_threshold_that_finds_enough() -> None:
    truth = lesions(*(("a", "mass", 20 * i, 0, 20 * i + 10, 10) for i in range(4)))
    answers = found(
        *(("a", "mass", 20 * i, 0, 20 * i + 10, 10, score) for i, score in enumerate((0.9, 0.7, 0.5, 0.2))),
        ("b", "mass", 0, 0, 5, 5, 0.8),
        ("b", "mass", 0, 0, 5, 5, 0.4),
    )
    point = operating_point(answers, truth, ["a", "b"], classes=["mass"], sensitivity=0.75)
    assert point == (pytest.approx(0.45), 0.75, 0.5, True)
    scores = calculate_detection_metrics(
        answers, truth, ["a", "b"], classes=["mass"], score_threshold=point.threshold, resamples=0
    )
    assert scores.metrics["sensitivity"].value == point.sensitivity
    assert scores.metrics["false_positives_per_image"].value == point.false_positives_per_image


def test_an_operating_point_out_of_reach_says_so() -> None:
    truth = lesions(("a", "mass", 0, 0, 10, 10), ("a", "mass", 50, 50, 60, 60))
    half = found(("a", "mass", 0, 0, 10, 10, 0.9), ("a", "mass", 80, 80, 90, 90, 0.1))
    assert operating_point(half, truth, ["a"], classes=["mass"]) == (0.5, 0.5, 0.0, False)
    blind = operating_point(found(), truth, ["a"], classes=["mass"])
    assert (blind.sensitivity, blind.reached) == (0, False)
    assert 1 < blind.threshold < 1.001
    with pytest.raises(ValueError, match="no lesion to choose"):
        operating_point(half, lesions(), ["a"], classes=["mass"])


# --- Intervals ----------------------------------------------------------------------------------------


def test_closed_forms_are_those_of_the_metrics_of_cases() -> None:
    answers, truth, names = draw(5, num_images=30)
    patients = np.arange(30) // 3
    scores = calculate_detection_metrics(answers, truth, names, classes=CLASSES, patients=patients)
    highest = answers.groupby("sample_id")["score"].max().reindex(names).fillna(0)
    holds = pd.Index(names).isin(truth["sample_id"])
    assert scores.metrics["image_auc"] == metrics.auc(holds, highest, patients)
    told = "Wilson, effective n over patients; too few errors (4.5): holds the truth only roughly"
    assert scores.metrics["sensitivity"].method == told
    assert scores.metrics["sensitivity"].n == scores.n_lesions == len(truth)


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_the_band_of_a_froc_curve_is_the_table_s(num_seeds: int) -> None:
    answers, truth, names = draw(7, num_images=90)
    patients = np.arange(90) // 2
    several = [answers, answers[answers["score"] > 0.3]][:num_seeds]
    settings: dict[str, Any] = {"classes": CLASSES, "patients": patients, "seed": 3}
    table = calculate_detection_metrics(several, truth, names, **settings).metrics
    limits = froc_limits(several, truth, names, FROC_RATES, **settings)
    assert limits is not None
    for rate, value, low, high in zip(FROC_RATES, *limits, strict=True):
        told = table[f"sensitivity_at_{rate:g}_fp"]
        assert (value, low, high) == pytest.approx((told.value, told.low, told.high)), rate
    assert "bias corrected" in told.method


def test_images_of_a_patient_are_drawn_together() -> None:
    """Each patient's images ten times over are no more evidence: the interval stays as wide."""
    answers, truth, names = draw(21, num_images=30)
    once = calculate_detection_metrics(answers, truth, names, classes=CLASSES, resamples=300)
    copies = dict.fromkeys(names, 10)
    many = [f"{name}-{copy}" for name in names for copy in range(10)]
    big = calculate_detection_metrics(
        repeated(answers, copies),
        repeated(truth, copies),
        many,
        classes=CLASSES,
        patients=np.repeat(np.arange(30), 10),
        resamples=300,
    )
    for name in ("ap", "ap50", "froc", "false_positives_per_image"):
        a, b = once.metrics[name], big.metrics[name]
        assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high), abs=1e-9)
    assert (once.clustered, big.clustered, big.n_patients) == (False, True, 30)


def test_every_metric_has_an_interval_around_it_and_the_same_again() -> None:
    answers, truth, names = draw(8, num_images=120)
    scores = calculate_detection_metrics(answers, truth, names, classes=CLASSES, resamples=200, seed=3)
    assert list(scores.metrics) == list(METRICS)
    for estimates in (scores.metrics, *scores.by_class.values()):
        for name, estimate in estimates.items():
            assert estimate.value is not None, name
            assert estimate.low is not None
            assert estimate.high is not None
            assert 0 <= estimate.low <= estimate.value <= estimate.high
            assert estimate.high > estimate.low, name
    again = calculate_detection_metrics(answers, truth, names, classes=CLASSES, resamples=200, seed=3)
    assert again == scores
    values = calculate_map(answers, truth, names, classes=CLASSES)
    assert scores.metrics["ap75"].value == values[""]["ap75"]


def test_perfection_on_few_patients_is_no_certainty() -> None:
    truth = lesions(*((f"i{i}", "mass", 0, 0, 10, 10) for i in range(8)))
    scores = calculate_detection_metrics(
        truth.assign(score=0.9), truth, [f"i{i}" for i in range(10)], classes=["mass"]
    )
    for name in ("ap", "froc", "sensitivity_at_0.125_fp"):
        assert scores.metrics[name].value == 1
        assert scores.metrics[name].low == pytest.approx(float(metrics.wilson(8, 8)[0]))
    false = scores.metrics["false_positives_per_image"]
    assert (false.value, false.high) == (0, pytest.approx(-math.log(0.025) / 10))


@pytest.mark.parametrize("holders", [0, 1, 4, 5])
def test_false_boxes_in_few_patients_pass_no_ceiling(holders: int) -> None:
    names = [f"i{i}" for i in range(60)]
    truth = lesions(*((name, "mass", 0, 0, 10, 10) for name in names))
    false = lesions(*((f"i{i}", "mass", 50, 0, 60, 10) for i in range(holders) for _ in range(5)))
    answers = pd.concat([truth, false]).assign(score=0.9)
    scores = calculate_detection_metrics(answers, truth, names, classes=["mass"], resamples=200)
    rate = scores.metrics["false_positives_per_image"]
    told = f"too few ({holders} patients with false boxes): {HOLDS_LESS}" in rate.method
    assert told == (holders < 5)
    assert ceiling("false positives per image", rate, 3).passed == (holders == 5)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Two lesions a patient, both found or both missed, at chance 0.7: 95 % of 200 sets of 40 patients."""
    rng, covered = np.random.default_rng(0), 0
    names = [f"i{i}" for i in range(80)]
    truth = lesions(*((name, "mass", 0, 0, 10, 10) for name in names))
    weights = np.vstack([np.ones((1, 40), np.uint8), metrics.resample(40, 300, 0)])
    for _ in range(200):
        hits = truth[np.repeat(rng.random(40) < 0.7, 2)].assign(score=0.9)
        false = truth[rng.random(80) < 0.5].assign(score=0.5, x0=50, x1=60)
        data = read_boxes(pd.concat([hits, false]), truth, names, ["mass"], np.repeat(np.arange(40), 2), 100)
        pool = pool_classes(match_classes(data, (0.5,), (AREAS_PX2["all"],)))
        estimate = _froc(data, [pool], weights)["froc"].estimate
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 0.7 <= estimate.high
    assert 0.9 <= covered / 200 <= 0.985


def test_the_interval_of_the_best_of_equals_knows_how_far_it_lies_above_them() -> None:
    """Interpolated precision is the best of several: here of five that are truly 0.6, each known to within 0.04."""
    rng, held, shifted = np.random.default_rng(1), [], []
    for _ in range(400):
        seen = 0.6 + 0.04 * rng.standard_normal(5)
        drawn = (seen + 0.04 * rng.standard_normal((400, 5))).max(axis=1)
        for interpolated, found in ((True, held), (False, shifted)):
            one = part_of_boxes(seen[None].max(axis=1), drawn, 200, 100, interpolated=interpolated).estimate
            assert one.low is not None
            assert one.high is not None
            found.append(one.low <= 0.6 <= one.high)
    assert np.mean(held) >= 0.93
    assert np.mean(shifted) < 0.9, "resamples alone tell less than half of the bias"


def test_average_precision_is_corrected_by_more_than_recall() -> None:
    """In a report, too: the interval of AP reaches further down for the same resamples than that of a share would."""
    answers, truth, names = draw(8, num_images=120)
    made = calculate_detection_metrics(answers, truth, names, classes=CLASSES, resamples=200, seed=3).by_class
    data = read_boxes(answers, truth, names, CLASSES, None, 100)
    weights = np.vstack([np.ones((1, 120), np.uint8), metrics.resample(120, 200, 3)])
    part = match_classes(data, IOU_THRESHOLDS, tuple(AREAS_PX2.values()))[0]
    table = coco_tables(part, data, weights)
    holders = len(np.unique(part.lesion_image))
    for name, what, interpolated in (("ap75", "precision", True), ("ar", "recall", False)):
        thresholds = [5] if name == "ap75" else list(range(10))
        values = mean_of(table, what, thresholds, 0).round(12)
        expected = part_of_boxes(
            values[:1], values[1:], len(part.lesion_image), holders, interpolated=interpolated
        ).estimate
        found = made[CLASSES[0]][name]
        assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high)), name


# --- Input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_id": "z"}, "detections: row 0 is of a sample that is not among sample_ids"),
        ({"class": "cyst"}, "detections: row 0 is of a class that is none of mass, cluster"),
        ({"x1": 0}, "detections: row 0 has no area"),
        ({"y0": math.nan}, "detections: row 0 has no area"),
        ({"score": 1.5}, "detections: row 0 has a score that is not within 0..1"),
    ],
)
def test_a_wrong_row_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    answers = found(("a", "mass", 0, 0, 10, 10, 0.5)).assign(**change)
    with pytest.raises(ValueError, match=message):
        calculate_map(answers, lesions(), ["a"], classes=CLASSES)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="ground_truths: no column 'x0'"):
        calculate_map(found(), lesions().drop(columns="x0"), ["a"], classes=CLASSES)
    for names in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="sample_ids"):
            calculate_map(found(), lesions(), names, classes=CLASSES)
    with pytest.raises(ValueError, match="max_detections"):
        calculate_map(found(), lesions(), ["a"], classes=CLASSES, max_detections=0)
    with pytest.raises(ValueError, match="iou_threshold"):
        froc_curve(found(), lesions(), ["a"], classes=CLASSES, iou_threshold=0)
    with pytest.raises(ValueError, match="patients"):
        calculate_detection_metrics(found(), lesions(), ["a"], classes=CLASSES, patients=["p", "q"])


def test_an_interval_that_rests_on_few_patients_with_lesions_says_so() -> None:
    boxes = [(f"i{number}", "mass", 0, 0, 10, 10) for number in range(50)]
    rng = np.random.default_rng(0)
    answers = found(*((*box, float(score)) for box, score in zip(boxes, rng.random(50), strict=True)))
    answers = pd.concat([answers[:40], answers[40:].assign(x0=200, x1=210)])
    names = [f"i{number}" for number in range(80)]
    for held, word in ((50, ""), (49, "too few (49 patients with lesions)")):
        truth = lesions(*boxes[:held])
        one = calculate_detection_metrics(answers, truth, names, classes=["mass"], resamples=50).metrics
        differences = paired_differences(
            answers, answers[:30], truth, names, classes=["mass"], resamples=50
        ).values()
        for made in (one["ap"], one["ar"], one["froc"], one["sensitivity_at_0.5_fp"], *differences):
            assert ("too few" in made.method) == bool(word), made.method
            assert word in made.method
    # Of a mean over classes the one that the fewest have decides.
    two = pd.concat([lesions(*boxes), lesions(*((*box[:1], "cyst", *box[2:]) for box in boxes[:7]))])
    mean = calculate_detection_metrics(answers, two, names, classes=["mass", "cyst"], resamples=50).metrics
    assert "too few (7 patients with lesions)" in mean["ap"].method
    assert "too few" not in mean["froc"].method


@pytest.mark.parametrize("crowded", [False, True])
def test_intervals_count_effective_patients_where_few_hold_most_lesions(crowded: bool) -> None:
    """By heads they held the AP50 in 89 of 100 sets of a long tail, and did not say so."""
    sizes = np.r_[[40] * 3, [1] * 60] if crowded else np.r_[[4] * 3, [3] * 60]
    patients = np.repeat(np.arange(63), sizes)
    rng, names = np.random.default_rng(2), [f"i{number}" for number in range(patients.size)]
    truth = lesions(*((name, "mass", 0, 0, 100, 100) for name in names))
    hits = truth.assign(score=rng.random(patients.size), x0=rng.integers(0, 70, patients.size))
    answers = pd.concat([hits, truth[::2].assign(score=0.4, x0=200, x1=300)])
    one: dict[str, Any] = {"classes": ["mass"], "patients": patients, "resamples": 200}
    made = calculate_detection_metrics(answers, truth, names, **one).metrics
    told = f"too few ({sizes.sum() ** 2 / (sizes**2).sum():.3g} patients with lesions)"
    differences = paired_differences(answers, answers[:90], truth, names, **one).values()
    for estimate in (made["ap"], made["ar"], made["froc"], made["sensitivity_at_0.5_fp"], *differences):
        assert (told in estimate.method) == bool(doubts_of(estimate.method)) == crowded, estimate.method
    # On the logit scale a limit lies Student's t of them standard deviations from the middle.
    data = read_boxes(answers, truth, names, ["mass"], patients, 100)
    (part,) = match_classes(data, IOU_THRESHOLDS, tuple(AREAS_PX2.values()))
    drawn = mean_of(coco_tables(part, data, metrics.resample(63, 200, 0)), "recall", list(range(10)), 0)
    low, high = (np.log(end / (1 - end)) for end in (made["ar"].low, made["ar"].high))
    spread = np.log(drawn / (1 - drawn)).std(ddof=1)
    worth = sizes.sum() ** 2 / (sizes**2).sum() if crowded else 63
    assert (high - low) / 2 / spread == pytest.approx(stats.t.ppf(0.975, worth - 1), rel=1e-6)


@pytest.mark.parametrize("crowded", [False, True])
def test_few_patients_with_most_images_are_told_where_false_boxes_count(crowded: bool) -> None:
    """Here these hold no lesion, and so have no say in recall."""
    patients = np.r_[np.arange(60), np.repeat(np.arange(60, 64), 60) if crowded else np.arange(60, 300)]
    names = [f"i{number}" for number in range(300)]
    truth = lesions(*((name, "mass", 0, 0, 10, 10) for name in names[:60]))
    false = lesions(*((name, "mass", 50, 0, 60, 10) for name in names[::3]))
    scores = np.random.default_rng(0).random(145).round(3)
    answers = pd.concat([truth[:45], false]).assign(score=scores)
    one: dict[str, Any] = {"classes": ["mass"], "patients": patients, "resamples": 100}
    made = calculate_detection_metrics(answers, truth, names, score_threshold=0.2, **one).metrics
    differences = paired_differences(answers, answers[:90], truth, names, **one).values()
    told = f"too few effective patients ({300**2 / (60 + 4 * 60**2):.3g})"
    for estimate in (made["ap50"], made["froc"], made["false_positives_per_image"], *differences):
        assert (told in estimate.method) == bool(doubts_of(estimate.method)) == crowded, estimate.method
    assert not doubts_of(made["ar"].method)
