"""Metrics of detections, each with a 95 % interval that knows which images share a patient.

    average precision   as COCO defines it: detections of one class are matched to lesions image by image, by
                        falling score, each lesion once; precision is made to fall with recall and read at 101
                        recalls; the mean over 10 IoU thresholds and then over classes.
    average recall      share of lesions found at any score, the mean over the same 10 IoU thresholds and classes.
    FROC                share of lesions found against false positives per image, over all score thresholds.
    at a threshold      sensitivity, precision and false positives per image of what scores at least so much.
    image               AUC of the highest score in an image, against whether it holds a lesion.

A second detection of one lesion is a false positive. Intervals of AP, AR, FROC and false positives per image come
from a bootstrap of whole patients: detections are matched once, and a resample weights images by how often it drew
their patient, which gives what a set with these images repeated would give. Shares at a threshold and the AUC have
closed forms (`cadx.metrics`). Several seeds are several models on the same images: the value is the mean over them,
and each resample of patients is applied to all.

Invariants: what is undefined (a class without lesions, an area range without any) is None with a method that says
why, never -1 or NaN; images and classes never mix; equal inputs and seed give equal output.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from cadx.metrics import ranking
from cadx.metrics.estimates import (
    LEVEL,
    Cases,
    Difference,
    Meaning,
    Part,
    Weights,
    chunks,
    patient_codes,
    replicated,
    resample,
    resampled_sums,
    undefined,
)
from cadx.metrics.proportions import share
from cadx.types import Config, Estimate

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.intp]

IOU_THRESHOLDS: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
AREAS_PX2 = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
"""COCO's area ranges, in stored pixels, ends included; a lesion outside of the range counts neither way."""
FROC_RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
"""False positives per image at which sensitivity is read (LUNA16: Setio et al. 2017, Med Image Anal 42:1)."""
_RECALLS = np.linspace(0.0, 1.0, 101)  # not j / 100: COCO's own numbers, one last digit above it for some j

METRICS: dict[str, Meaning] = {
    "ap": Meaning("COCO's average precision: mean over IoU 0.50 to 0.95", "higher"),
    "ap50": Meaning("average precision where IoU 0.50 is a hit", "higher"),
    "ap75": Meaning("average precision where IoU 0.75 is a hit", "higher"),
    "ap_small": Meaning("average precision of lesions up to 32 x 32 pixels", "higher"),
    "ap_medium": Meaning("average precision of lesions between 32 x 32 and 96 x 96 pixels", "higher"),
    "ap_large": Meaning("average precision of lesions from 96 x 96 pixels", "higher"),
    "ar": Meaning(
        "COCO's average recall: share of lesions found at any score, mean over IoU 0.50 to 0.95", "higher"
    ),
    "froc": Meaning(
        "share of lesions found, mean over 1/8, 1/4, 1/2, 1, 2, 4, 8 false positives per image", "higher"
    ),
    **{
        f"sensitivity_at_{rate:g}_fp": Meaning(
            f"share of lesions found with at most {rate:g} false positives per image", "higher"
        )
        for rate in FROC_RATES
    },
    "sensitivity": Meaning("share of lesions found at the operating point", "higher"),
    "precision": Meaning("share of the boxes called at the operating point that are lesions", "higher"),
    "false_positives_per_image": Meaning(
        "boxes called at the operating point that are none, per image", "lower"
    ),
    **{
        f"sensitivity_{size}": Meaning(
            f"share of lesions found at the operating point, of the {size} ones", "higher"
        )
        for size in AREAS_PX2
        if size != "all"
    },
    "image_specificity": Meaning("share of images without lesions in which nothing is called", "higher"),
    "image_auc": Meaning("probability that an image with a lesion scores above one without", "higher"),
}
"""Every metric by its name in metrics.json, in the order of reports.

Overall, those of AP and AR are means over the classes that have lesions; the others pool the classes' detections
and lesions (each detection still matched within its class only).
"""
_PAIRS_AT_ONCE = 1 << 20
_ABOVE_ALL = math.nextafter(1.0, 2.0)  # and finite: JSON knows no infinity
_DETECTION_COLUMNS = ("sample_id", "class", "x0", "y0", "x1", "y1", "score")
_LESION_COLUMNS = _DETECTION_COLUMNS[:-1]
_COORDINATES = ["x0", "y0", "x1", "y1"]


class DetectionScores(Config):
    """Everything that `calculate_detection_metrics` says of one set of images.

    Attributes:
        n: images.
        n_patients: patients among them.
        n_lesions: boxes of the ground truth.
        clustered: whether any patient has several images.
        iou_threshold: what a hit is, for all but AP and AR.
        metrics: metric -> estimate, over all classes, in the order of `METRICS`.
        by_class: class -> metric -> estimate.
        by_seed: metric -> its value for each seed, None where undefined.
        between_seed_sd: metric -> standard deviation over seeds (n - 1), None for a single seed.
    """

    n: int
    n_patients: int
    n_lesions: int
    clustered: bool
    iou_threshold: float
    metrics: dict[str, Estimate]
    by_class: dict[str, dict[str, Estimate]]
    by_seed: dict[str, tuple[float | None, ...]]
    between_seed_sd: dict[str, float | None]


class FrocCurve(NamedTuple):
    """By falling threshold; keeping score >= threshold[i] gives point i.

    The first has the threshold inf, and by convention a precision of 1.
    """

    false_positives_per_image: FloatArray
    sensitivity: FloatArray
    precision: FloatArray
    threshold: FloatArray


class OperatingPoint(NamedTuple):
    """A score threshold, with what it gives on the data that it was chosen on.

    Attributes:
        threshold: the lowest score that counts as a detection.
        sensitivity: share of lesions found.
        false_positives_per_image: false detections per image.
        reached: whether the target is met; a sensitivity may be out of reach, and is then the most that any
            threshold gives.
    """

    threshold: float
    sensitivity: float
    false_positives_per_image: float
    reached: bool


# --- Public measures ----------------------------------------------------------------------------------


def calculate_map(
    detections: pd.DataFrame,
    ground_truths: pd.DataFrame,
    sample_ids: Sequence[str],
    *,
    classes: Sequence[str],
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
    max_detections: int = 100,
) -> dict[str, dict[str, float | None]]:
    """COCO's average precision and recall: class -> metric -> value, and "" for the mean over classes.

    Args:
        detections: columns sample_id, class, x0, y0, x1, y1 (half-open) and score, 0..1.
        ground_truths: the same columns without score.
        sample_ids: all images, those without any box too.
        classes: all classes.
        iou_thresholds: 0..1, over which "ap" is the mean; "ap50" and "ap75" are None if they lack 0.5 or 0.75.
        max_detections: how many of one class in one image count, those of the highest scores.

    Returns:
        ap, ap50, ap75, ap_small, ap_medium, ap_large, ar; None where there is no lesion to find.

    Raises:
        ValueError: if a table lacks a column, or names another sample or class, or a box or score is none.

    Source: Lin et al. 2014, ECCV (Microsoft COCO), and the evaluation that came with it.
    """
    data = _read(detections, ground_truths, sample_ids, classes, None, max_detections)
    if not iou_thresholds or not all(0 < threshold <= 1 for threshold in iou_thresholds):
        raise ValueError(f"iou_thresholds {tuple(iou_thresholds)}: must lie above 0 and up to 1")
    itself = np.ones((1, data.num_patients), np.uint8)
    tables = [
        _coco_tables(part, data, itself) for part in _match(data, iou_thresholds, tuple(AREAS_PX2.values()))
    ]
    names = _coco_parts(iou_thresholds)
    by_class = {
        name: {metric: _plain(_mean_of(table, *names[metric])[0]) for metric in names}
        for name, table in zip(data.classes, tables, strict=True)
    }
    overall: dict[str, float | None] = {}
    for metric in names:
        defined = [value for parts in by_class.values() if (value := parts[metric]) is not None]
        overall[metric] = _plain(float(np.mean(defined))) if defined else None
    return {"": overall, **by_class}


def calculate_detection_metrics(
    detections: pd.DataFrame | Sequence[pd.DataFrame],
    ground_truths: pd.DataFrame,
    sample_ids: Sequence[str],
    *,
    classes: Sequence[str],
    patients: ArrayLike | None = None,
    score_threshold: float | Mapping[str, float] | Sequence[Mapping[str, float]] = 0.5,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    resamples: int = 1000,
    seed: int = 0,
) -> DetectionScores:
    """Every metric of `METRICS` with its interval, overall and by class.

    Args:
        detections: columns sample_id, class, x0, y0, x1, y1 (half-open) and score, 0..1; or a table for each seed.
        ground_truths: the same columns without score.
        sample_ids: N images, those without any box too: they carry false positives, and count.
        classes: all classes.
        patients: N, anything that tells patients apart; None = all differ.
        score_threshold: the lowest score that is called, for the metrics at the operating point: one, or one by
            class, or for each seed one by class.
        iou_threshold: the least overlap of a hit, for all metrics but AP and AR.
        max_detections: how many of one class in one image count, those of the highest scores.
        resamples: of patients; 0 leaves what has no closed form without interval.
        seed: of the resampling. The same resamples serve all metrics, classes and seeds.

    Raises:
        ValueError: as `calculate_map`, or if a number is out of range or patients have another length.
    """
    _check_iou(iou_threshold)
    frames = [detections] if isinstance(detections, pd.DataFrame) else list(detections)
    seeds = [_read(one, ground_truths, sample_ids, classes, patients, max_detections) for one in frames]
    data = seeds[0]
    thresholds = _by_seed_and_class(score_threshold, data.classes, len(seeds))
    # The first row is the set itself.
    weights = np.vstack(
        [np.ones((1, data.num_patients), np.uint8), resample(data.num_patients, resamples, seed)]
    )
    strict = [_match(one, IOU_THRESHOLDS, tuple(AREAS_PX2.values())) for one in seeds]
    tables = [
        [_coco_tables(of_seed[column], one, weights) for one, of_seed in zip(seeds, strict, strict=True)]
        for column in range(len(data.classes))
    ]
    loose = [_match(one, (iou_threshold,), tuple(AREAS_PX2.values())) for one in seeds]

    def pooled(columns: Sequence[int]) -> dict[str, Part]:
        every, *sizes = (
            [
                _pool([of_seed[column] for column in columns], [of_class[column] for column in columns], area)
                for of_seed, of_class in zip(loose, thresholds, strict=True)
            ]
            for area in range(len(AREAS_PX2))
        )
        by_size = {
            f"sensitivity_{size}": _sensitivity(data, pools)
            for size, pools in zip(list(AREAS_PX2)[1:], sizes, strict=True)
        }
        return _froc(data, every, weights) | _called(data, every, weights) | by_size | _of_images(data, every)

    by_class = {
        name: _coco_estimates(data, [tables[column]], [strict[0][column]]) | pooled([column])
        for column, name in enumerate(data.classes)
    }
    overall = _coco_estimates(data, tables, strict[0]) | pooled(range(len(data.classes)))
    return DetectionScores(
        n=data.num_images,
        n_patients=data.num_patients,
        n_lesions=len(data.lesions.image),
        clustered=data.num_patients < data.num_images,
        iou_threshold=iou_threshold,
        metrics={name: overall[name].estimate for name in METRICS},
        by_class={of: {name: parts[name].estimate for name in METRICS} for of, parts in by_class.items()},
        by_seed={
            name: tuple(None if math.isnan(value) else value for value in overall[name].by_seed.tolist())
            for name in METRICS
        },
        between_seed_sd={
            name: float(np.std(part.by_seed, ddof=1))
            if len(seeds) > 1 and (part := overall[name]).estimate.value is not None
            else None
            for name in METRICS
        },
    )


def paired_differences(
    detections_a: pd.DataFrame,
    detections_b: pd.DataFrame,
    ground_truths: pd.DataFrame,
    sample_ids: Sequence[str],
    *,
    classes: Sequence[str],
    patients: ArrayLike | None = None,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Difference]:
    """AP, AP50 and FROC of A minus those of B on the same images, each resample of patients applied to both.

    The interval is the percentile one; p is twice the smaller share of resamples on either side of 0.

    Args:
        detections_a: as for `calculate_detection_metrics`.
        detections_b: of another model.
        ground_truths: likewise, as are all that follow.
        sample_ids: N images.
        classes: all classes.
        patients: N, or None where all differ.
        iou_threshold: the least overlap of a hit, for FROC.
        max_detections: how many of one class in one image count.
        resamples: of patients.
        seed: of the resampling.
    """
    models = [
        _read(one, ground_truths, sample_ids, classes, patients, max_detections)
        for one in (detections_a, detections_b)
    ]
    data = models[0]
    num_lesions = len(data.lesions.image)
    # The first row is the set itself.
    weights = np.vstack(
        [np.ones((1, data.num_patients), np.uint8), resample(data.num_patients, resamples, seed)]
    )
    values: dict[str, list[FloatArray]] = {"ap": [], "ap50": [], "froc": []}
    for model in models:
        strict = [
            part for part in _match(model, IOU_THRESHOLDS, (AREAS_PX2["all"],)) if len(part.lesion_image)
        ]
        tables = [_coco_tables(part, model, weights) for part in strict]
        for name in ("ap", "ap50"):
            what, thresholds, area = _coco_parts(IOU_THRESHOLDS)[name]
            of_classes = [_mean_of(table, what, thresholds, area) for table in tables]
            values[name].append(np.mean(of_classes, axis=0) if tables else np.full(len(weights), np.nan))
        pool = _pool(_match(model, (iou_threshold,), (AREAS_PX2["all"],)))
        rates = [
            _sensitivities(data, pool, weights[rows].astype(np.float64), FROC_RATES)
            for rows in chunks(len(weights), max(data.num_patients, num_lesions))
        ]
        values["froc"].append(np.concatenate(rates).mean(axis=1))
    return {name: _paired(a - b, num_lesions) for name, (a, b) in values.items()}


def _paired(gap: FloatArray, n: int) -> Difference:
    """The difference in the first of 1+R values, with what the others say of it."""
    drawn = gap[1:][~np.isnan(gap[1:])]
    if not n or not len(drawn):
        why = "undefined: no lesion" if not n else "too few: no resample"
        value = None if math.isnan(gap[0]) else float(gap[0])
        return Difference(value=value, low=None, high=None, p=None, n=n, method=why)
    low, high = (float(end) for end in np.percentile(drawn, (50 - 50 * LEVEL, 50 + 50 * LEVEL)))
    p = min(1.0, 2 * (min((drawn <= 0).sum(), (drawn >= 0).sum()) + 1) / (len(drawn) + 1))
    method = f"paired patient bootstrap, percentile, {len(drawn)} resamples"
    return Difference(value=float(gap[0]), low=low, high=high, p=float(p), n=n, method=method)


def froc_curve(
    detections: pd.DataFrame,
    ground_truths: pd.DataFrame,
    sample_ids: Sequence[str],
    *,
    classes: Sequence[str],
    iou_threshold: float = 0.5,
    max_detections: int = 100,
) -> FrocCurve:
    """Lesions found against false positives per image, the classes pooled; empty arrays without lesions.

    Args:
        detections: as in `calculate_detection_metrics`; so are the others.
        ground_truths: see detections.
        sample_ids: see detections.
        classes: see detections; one name gives the curve of that class, if the tables hold no other.
        iou_threshold: see detections.
        max_detections: see detections.

    Raises:
        ValueError: as `calculate_detection_metrics`.

    Source: Chakraborty 1989, Med Phys 16:561. MONAI's `compute_froc_curve_data` leaves out the lowest threshold
    and takes a pass over all scores for each; where no scores are tied both give the same sensitivities.
    """
    data = _read(detections, ground_truths, sample_ids, classes, None, max_detections)
    _check_iou(iou_threshold)
    found = _pool(_match(data, (iou_threshold,), (AREAS_PX2["all"],)))
    if not found.num_lesions:
        return FrocCurve(np.empty(0), np.empty(0), np.empty(0), np.empty(0))
    threshold = hits = calls = np.empty(0)
    if found.score.size:
        threshold, hits, calls = ranking.by_threshold(found.hit, found.score)
    return FrocCurve(
        np.concatenate([[0.0], (calls - hits) / data.num_images]),
        np.concatenate([[0.0], hits / found.num_lesions]),
        np.concatenate([[1.0], hits / calls]),
        np.concatenate([[np.inf], threshold]),
    )


def froc_limits(
    detections: Sequence[pd.DataFrame],
    ground_truths: pd.DataFrame,
    sample_ids: Sequence[str],
    rates: Sequence[float],
    *,
    classes: Sequence[str],
    patients: ArrayLike | None = None,
    resamples: int = 500,
    seed: int = 0,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
) -> tuple[FloatArray, FloatArray, FloatArray] | None:
    """Sensitivity at false positives per image `rates`, the mean over seeds, and its pointwise 95 % limits.

    None without lesions. Arguments as in `calculate_detection_metrics`; detections are a table for each seed.

    Raises:
        ValueError: as `calculate_detection_metrics`.
    """
    _check_iou(iou_threshold)
    seeds = [_read(one, ground_truths, sample_ids, classes, patients, max_detections) for one in detections]
    data = seeds[0]
    pools = [_pool(_match(one, (iou_threshold,), (AREAS_PX2["all"],))) for one in seeds]
    if not pools[0].num_lesions:
        return None
    weights = resample(data.num_patients, resamples, seed).astype(np.float64)
    value, drawn = (
        np.mean([_sensitivities(data, found, rows, rates) for found in pools], axis=0)
        for rows in (np.ones((1, data.num_patients)), weights)
    )
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return value[0], low, high


def match_boxes(
    detections: pd.DataFrame,
    ground_truths: pd.DataFrame,
    sample_ids: Sequence[str],
    *,
    classes: Sequence[str],
    iou_threshold: float = 0.5,
    max_detections: int = 100,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Which box found which lesion: detections with a column `hit`, lesions with `score`, NaN where none found it.

    By class and falling score. Arguments as in `calculate_detection_metrics`.

    Raises:
        ValueError: as `calculate_detection_metrics`.
    """
    _check_iou(iou_threshold)
    data = _read(detections, ground_truths, sample_ids, classes, None, max_detections)
    names = np.asarray(sample_ids, dtype=object)

    def table(boxes: _Boxes, name: str) -> pd.DataFrame:
        frame = pd.DataFrame(boxes.xyxy, columns=_COORDINATES)
        frame.insert(0, "sample_id", names[boxes.image])
        frame.insert(1, "class", name)
        return frame

    found, lesions = [], []
    for column, (name, part) in enumerate(
        zip(data.classes, _match(data, (iou_threshold,), (AREAS_PX2["all"],)), strict=True)
    ):
        scores = part.detections.score
        hit = np.zeros(len(scores), bool)
        hit[part.near] = part.hit[0, 0]
        found.append(table(part.detections, name).assign(score=scores, hit=hit))
        own = data.lesions.take(data.lesions.column == column)
        best = np.append(scores, np.nan)[part.finder]
        lesions.append(table(own, name).assign(score=best))
    return pd.concat(found, ignore_index=True), pd.concat(lesions, ignore_index=True)


def operating_point(
    detections: pd.DataFrame,
    ground_truths: pd.DataFrame,
    sample_ids: Sequence[str],
    *,
    classes: Sequence[str],
    sensitivity: float = 0.9,
    false_positives_per_image: float | None = None,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
) -> OperatingPoint:
    """The score threshold of a clinical target: so many lesions found, or no more false positives than so many.

    For a sensitivity it is the highest threshold that reaches it, the one with the fewest false positives; for
    false positives per image, where they are given, the lowest that has no more, the one that finds most lesions.

    It lies midway between the lowest score that is called and the next lower one (or 0), so that the last digits
    of a score decide nothing. A lesion that no detection hits is found at no threshold: then what comes back is the
    threshold of the most lesions, not `reached`. It lies just above 1 where nothing may be called.

    Args:
        detections: as in `calculate_detection_metrics`, of the calibration split; so are the others.
        ground_truths: see detections.
        sample_ids: see detections.
        classes: see detections.
        sensitivity: of lesions, to reach; above 0 and at most 1.
        false_positives_per_image: not to exceed; replaces the sensitivity as the target.
        iou_threshold: see detections.
        max_detections: see detections.

    Raises:
        ValueError: as `calculate_detection_metrics`, or if there is no lesion.
    """
    if not 0 < sensitivity <= 1:
        raise ValueError(f"sensitivity {sensitivity}: must be above 0 and at most 1")
    if false_positives_per_image is not None and not false_positives_per_image > 0:
        raise ValueError(f"false_positives_per_image {false_positives_per_image}: must be above 0")
    curve = froc_curve(
        detections,
        ground_truths,
        sample_ids,
        classes=classes,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
    )
    if not curve.sensitivity.size:
        raise ValueError(
            "ground_truths: no lesion to choose an operating point on; give a larger calibration split"
        )
    # 0.07 * 100 is 7.000000000000001: without the margin one lesion too many, or one false positive too few.
    if false_positives_per_image is not None:
        few = curve.false_positives_per_image <= false_positives_per_image + 1e-9
        # Of the points that have no more, the first that finds as many lesions as any: the others add only errors.
        point = int(np.argmax(curve.sensitivity >= curve.sensitivity[few][-1]))
        reached = True
    else:
        wanted = min(sensitivity - 1e-9, float(curve.sensitivity[-1]))
        point = int(np.argmax(curve.sensitivity >= wanted))
        reached = bool(curve.sensitivity[point] >= sensitivity - 1e-9)
    lowest = float(curve.threshold[point])
    below = float(curve.threshold[point + 1]) if point + 1 < curve.threshold.size else 0.0
    middle = (lowest + below) / 2
    return OperatingPoint(
        threshold=_ABOVE_ALL if math.isinf(lowest) else middle if middle > below else lowest,
        sensitivity=float(curve.sensitivity[point]),
        false_positives_per_image=float(curve.false_positives_per_image[point]),
        reached=reached,
    )


# --- Reading ------------------------------------------------------------------------------------------


class _Boxes(NamedTuple):
    """B boxes: which image and class each belongs to, 0-based, its corners and its score."""

    image: IntArray
    column: IntArray
    xyxy: FloatArray
    score: FloatArray

    def take(self, which: IntArray | BoolArray) -> "_Boxes":
        return _Boxes(self.image[which], self.column[which], self.xyxy[which], self.score[which])

    @property
    def area_px2(self) -> FloatArray:
        return (self.xyxy[:, 2] - self.xyxy[:, 0]) * (self.xyxy[:, 3] - self.xyxy[:, 1])


@dataclass(frozen=True)
class _Data:
    """Checked inputs; detections by falling score, ties by image, those of the highest scores alone.

    Attributes:
        detections: of all classes.
        lesions: of all classes, their scores 1.
        classes: their names.
        patient: N, 0..num_patients-1.
        num_patients: how many.
    """

    detections: _Boxes
    lesions: _Boxes
    classes: tuple[str, ...]
    patient: IntArray
    num_patients: int

    @property
    def num_images(self) -> int:
        return len(self.patient)

    def by_patient(self, image: IntArray) -> IntArray:
        """P: how many things, each in an image, each patient has."""
        counts: IntArray = np.bincount(self.patient[image], minlength=self.num_patients)
        return counts


def _read(
    detections: pd.DataFrame,
    ground_truths: pd.DataFrame,
    sample_ids: Sequence[str],
    classes: Sequence[str],
    patients: ArrayLike | None,
    max_detections: int,
) -> _Data:
    images, names = pd.Index(sample_ids), pd.Index(classes)
    if not len(images) or not images.is_unique:
        raise ValueError("sample_ids: must name at least one image, and each once")
    if not len(names) or not names.is_unique:
        raise ValueError("classes: must name at least one class, and each once")
    if max_detections < 1:
        raise ValueError(f"max_detections {max_detections}: must be at least 1")
    lesions = _table("ground_truths", ground_truths, _LESION_COLUMNS, images, names)
    found = _table("detections", detections, _DETECTION_COLUMNS, images, names)
    found = found.take(np.lexsort((found.image, -found.score)))
    group = found.image * len(names) + found.column
    patient = patient_codes(patients, np.ones(len(images), dtype=bool))
    return _Data(
        detections=found.take(_rank_in(group) < max_detections),
        lesions=lesions,
        classes=tuple(map(str, names)),
        patient=patient,
        num_patients=int(patient.max()) + 1,
    )


def _rank_in(group: IntArray) -> IntArray:
    """How many things of its group stand before each."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    rank = np.empty(len(order), np.intp)
    rank[order] = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return rank


def _table(
    what: str, frame: pd.DataFrame, columns: Sequence[str], images: "pd.Index[Any]", names: "pd.Index[Any]"
) -> _Boxes:
    if missing := [column for column in columns if column not in frame]:
        raise ValueError(f"{what}: no column {missing[0]!r}; give {', '.join(columns)}")
    image = images.get_indexer(pd.Index(frame["sample_id"]))
    column = names.get_indexer(pd.Index(frame["class"]))
    xyxy = frame[_COORDINATES].to_numpy(np.float64)
    score = frame["score"].to_numpy(np.float64) if "score" in columns else np.ones(len(frame))
    for wrong, problem in (
        (image < 0, "is of a sample that is not among sample_ids; give all images"),
        (column < 0, f"is of a class that is none of {', '.join(map(str, names))}"),
        (~np.isfinite(xyxy).all(axis=1) | ~(xyxy[:, :2] < xyxy[:, 2:]).all(axis=1), "has no area; drop it"),
        (~((score >= 0) & (score <= 1)), "has a score that is not within 0..1"),
    ):
        if wrong.any():
            raise ValueError(f"{what}: row {int(np.argmax(wrong))} {problem}")
    return _Boxes(image.astype(np.intp), column.astype(np.intp), xyxy, score)


def _check_iou(iou_threshold: float) -> None:
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold {iou_threshold}: must be above 0 and at most 1")


def _by_seed_and_class(
    threshold: float | Mapping[str, float] | Sequence[Mapping[str, float]],
    classes: Sequence[str],
    num_seeds: int,
) -> list[list[float]]:
    """The score threshold of each class, for each seed."""
    if isinstance(threshold, float | int):
        threshold = dict.fromkeys(classes, float(threshold))
    each = [threshold] * num_seeds if isinstance(threshold, Mapping) else list(threshold)
    if len(each) != num_seeds or any(set(classes) - set(one) for one in each):
        raise ValueError("score_threshold: give one number, or one for every class (of every seed)")
    return [[float(one[name]) for name in classes] for one in each]


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 12)


def _coco_parts(iou_thresholds: Sequence[float]) -> dict[str, tuple[str, list[int], int]]:
    """Metric -> of precision or recall, and which IoU thresholds and area, it is the mean over."""
    every = list(range(len(iou_thresholds)))
    at = {wanted: [t for t in every if abs(iou_thresholds[t] - wanted) < 1e-9] for wanted in (0.5, 0.75)}
    return {
        "ap": ("precision", every, 0),
        "ap50": ("precision", at[0.5], 0),
        "ap75": ("precision", at[0.75], 0),
        **{f"ap_{name}": ("precision", every, area) for area, name in enumerate(AREAS_PX2) if area},
        "ar": ("recall", every, 0),
    }


# --- Matching -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Matches:
    """What became of one class's D detections, for T IoU thresholds and A area ranges.

    Attributes:
        detections: by falling score.
        near: M, the detections, by falling score, that take a lesion for at least one threshold and area.
        hit: A T M, whether such a one found a lesion that counts.
        absorbed: A T M, whether it found one outside of the area range: it counts neither way.
        in_area: A D, whether a detection lies in the area range: if not, it is no false positive either.
        lesion_image: L.
        lesion_counts: A L, whether a lesion lies in the area range.
        finder: L, the detection that found it, for the first threshold and area range; -1 where none did.
    """

    detections: _Boxes
    near: IntArray
    hit: BoolArray
    absorbed: BoolArray
    in_area: BoolArray
    lesion_image: IntArray
    lesion_counts: BoolArray
    finder: IntArray


def _match(
    data: _Data, iou_thresholds: Sequence[float], areas_px2: Sequence[tuple[float, float]]
) -> list[_Matches]:
    """Every class's detections matched to its lesions, image by image, by falling score; each lesion once.

    All images take their first detection at the same time, then their second: as many rounds as the most crowded
    image has detections near a lesion.
    """
    # As in COCO: an IoU of 1 that rounding makes a little less still reaches a threshold of 1.
    least = np.minimum(np.array(iou_thresholds), 1 - 1e-10)
    found, lesions = data.detections, data.lesions
    in_area, counts = (
        np.array([(low <= boxes.area_px2) & (boxes.area_px2 <= high) for low, high in areas_px2])
        for boxes in (found, lesions)
    )
    detection, lesion, iou = _overlaps(data, float(least.min()))
    near, number = np.unique(detection, return_inverse=True)
    group = found.image * len(data.classes) + found.column
    rank = _rank_in(group[near])[number]
    # Of a detection's lesions the last is the best: the largest overlap, of equal ones the last, as in COCO.
    order = np.lexsort((lesion, iou, number, rank))
    number, lesion, iou = number[order], lesion[order], iou[order]
    bounds = np.searchsorted(rank[order], np.arange(rank.max(initial=-1) + 2))
    taken = np.zeros((len(areas_px2), len(least), len(lesions.image)), bool)
    hit, absorbed = np.zeros((2, len(areas_px2), len(least), len(near)), bool)
    finder = np.full(len(lesions.image), -1, np.intp)
    for start, end in pairwise(bounds.tolist()):
        row, own = number[start:end], lesion[start:end]
        first = np.flatnonzero(np.diff(row, prepend=-1))
        free = ~taken[:, :, own] & (iou[start:end] >= least[:, None])
        place = np.arange(len(row))
        # The best lesion that counts, else the best of the others; -1 where there is none.
        wanted, other = (
            np.maximum.reduceat(np.where(which, place, -1), first, axis=2)
            for which in (free & counts[:, None, own], free)
        )
        best = np.where(wanted >= 0, wanted, other)
        area, threshold, column = np.nonzero(best >= 0)
        taken[area, threshold, own[best[area, threshold, column]]] = True
        found_one = best[0, 0] >= 0
        finder[own[best[0, 0, found_one]]] = near[row[first]][found_one]
        hit[..., row[first]] = wanted >= 0
        absorbed[..., row[first]] = (wanted < 0) & (other >= 0)
    useful = (hit | absorbed).any(axis=(0, 1))
    near, hit, absorbed = near[useful], hit[..., useful], absorbed[..., useful]
    matches = []
    for class_number in range(len(data.classes)):
        rows = np.flatnonzero(found.column == class_number)
        is_near, is_lesion = found.column[near] == class_number, lesions.column == class_number
        matches.append(
            _Matches(
                detections=found.take(rows),
                near=np.searchsorted(rows, near[is_near]),
                hit=hit[..., is_near],
                absorbed=absorbed[..., is_near],
                in_area=in_area[:, rows],
                lesion_image=lesions.image[is_lesion],
                lesion_counts=counts[:, is_lesion],
                finder=np.where(
                    finder[is_lesion] < 0, -1, np.searchsorted(rows, np.maximum(finder[is_lesion], 0))
                ),
            )
        )
    return matches


def _overlaps(data: _Data, least: float) -> tuple[IntArray, IntArray, FloatArray]:
    """Pairs of a detection and a lesion of the same image and class, by detection, that overlap so much; their IoU."""
    found, lesions = data.detections, data.lesions
    group, of_lesion = (boxes.image * len(data.classes) + boxes.column for boxes in (found, lesions))
    order = np.argsort(of_lesion, kind="stable")
    start, end = (np.searchsorted(of_lesion[order], group, side) for side in ("left", "right"))
    num_pairs = end - start
    before = np.cumsum(num_pairs) - num_pairs
    parts = []
    for goal in range(0, int(num_pairs.sum()), _PAIRS_AT_ONCE):
        rows = np.arange(*np.searchsorted(before, (goal, goal + _PAIRS_AT_ONCE)))
        detection = np.repeat(rows, num_pairs[rows])
        offset = np.arange(len(detection)) - np.repeat(before[rows] - before[rows[:1]], num_pairs[rows])
        lesion = order[start[detection] + offset]
        a, b = found.xyxy[detection], lesions.xyxy[lesion]
        sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
        shared = np.prod(np.maximum(sides, 0.0), axis=1)
        iou = shared / (found.area_px2[detection] + lesions.area_px2[lesion] - shared)
        kept = iou >= least
        parts.append((detection[kept], lesion[kept], iou[kept]))
    if not parts:
        return np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0)
    detections, own, overlaps = (np.concatenate(part) for part in zip(*parts, strict=True))
    return detections, own, overlaps


# --- Average precision and recall of resamples -------------------------------------------------------------------


class _CocoTables(NamedTuple):
    """Of one class, in each resample: NaN where it has no lesion.

    Attributes:
        precision: R A T, average precision.
        recall: R A T, share of lesions found at any score.
    """

    precision: FloatArray
    recall: FloatArray


def _coco_tables(matches: _Matches, data: _Data, weights: Weights) -> _CocoTables:
    num_areas, num_thresholds, num_near = matches.hit.shape
    tables = _CocoTables(*np.full((2, len(weights), num_areas, num_thresholds), np.nan))
    patient = data.patient[matches.detections.image]
    is_far = np.ones(len(patient), bool)
    is_far[matches.near] = False
    for rows in chunks(len(weights), max(num_near, data.num_patients)):
        drawn = np.ascontiguousarray(weights[rows].T, np.float64)  # P R
        for area in range(num_areas):
            if not matches.lesion_counts[area].any():
                continue
            lesions = data.patient[matches.lesion_image[matches.lesion_counts[area]]]
            num_lesions = np.bincount(lesions, minlength=data.num_patients) @ drawn
            # Detections that take no lesion are false for every threshold: counted once.
            far = np.flatnonzero(is_far & matches.in_area[area])
            before = _counted(np.searchsorted(matches.near, far), patient[far], num_near, drawn)
            is_inside = matches.in_area[area][matches.near]
            for threshold in range(num_thresholds):
                is_hit = matches.hit[area, threshold]
                hit = np.flatnonzero(is_hit)
                false = np.flatnonzero(is_inside & ~is_hit & ~matches.absorbed[area, threshold])
                hits = np.cumsum(drawn[patient[matches.near[hit]]], axis=0)
                misses = before[hit] + _counted(
                    np.searchsorted(hit, false), patient[matches.near[false]], len(hit), drawn
                )
                tables.precision[rows, area, threshold] = _interpolated(hits, misses, num_lesions)
                found = hits[-1] if len(hits) else np.zeros(len(num_lesions))
                with np.errstate(invalid="ignore"):
                    tables.recall[rows, area, threshold] = found / num_lesions
    return tables


def _mean_of(table: _CocoTables, what: str, thresholds: list[int], area: int) -> FloatArray:
    """R: one metric of `_coco_parts`; NaN where it is undefined."""
    if not thresholds:
        return np.full(len(table.precision), np.nan)
    values: FloatArray = getattr(table, what)[:, area, thresholds].mean(axis=1)
    return values


def _counted(row: IntArray, patient: IntArray, num_rows: int, drawn: FloatArray) -> FloatArray:
    """num_rows R: how many of the things, each with a row and a patient, lie in a row or above it, per resample."""
    kept = row < num_rows
    counts = sparse.csr_matrix(
        (np.ones(int(kept.sum())), (row[kept], patient[kept])), shape=(num_rows, len(drawn))
    )
    total: FloatArray = np.cumsum(counts @ drawn, axis=0)
    return total


def _interpolated(hits: FloatArray, misses: FloatArray, num_lesions: FloatArray) -> FloatArray:
    """R: the mean of precision at 101 recalls, from M R true and false positives up to each hit; NaN: no lesion.

    Precision at a recall is the best at this or any higher recall. Precision is best at a hit, so that only these
    need to be looked at; a hit that the resample did not draw changes nothing.
    """
    num_hits, num_resamples = hits.shape
    precision = hits / np.maximum(hits + misses, 1)
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    # The least number of hits whose recall reaches each of the 101, by COCO's own comparison of floats.
    size = np.maximum(num_lesions, 1)[:, None]
    needed = np.ceil(_RECALLS * size)
    needed = np.where((needed - 1) / size >= _RECALLS, needed - 1, needed)
    needed = np.where(needed / size < _RECALLS, needed + 1, needed)
    # One search for all resamples: each has a stretch of numbers of its own.
    offset = np.arange(num_resamples)[:, None] * (float(size.max()) + 2)
    place = np.searchsorted((hits.T + offset).ravel(), (needed + offset).ravel())
    place = place.reshape(num_resamples, -1) - np.arange(num_resamples)[:, None] * num_hits
    padded = np.vstack([precision, np.zeros(num_resamples)])
    values = padded[place, np.arange(num_resamples)[:, None]].mean(axis=1)
    return np.where(num_lesions > 0, values, np.nan)


def _coco_estimates(
    data: _Data, tables: Sequence[Sequence[_CocoTables]], matches: Sequence[_Matches]
) -> dict[str, Part]:
    """The metrics of `_coco_parts`: means over classes, from a table for each class and seed."""
    estimates = {}
    for metric, (what, thresholds, area) in _coco_parts(IOU_THRESHOLDS).items():
        images = [part.lesion_image[part.lesion_counts[area]] for part in matches]
        n = sum(map(len, images))
        if not n:
            where = "" if area == 0 else f" that is {metric.removeprefix('ap_')}"
            estimates[metric] = undefined(f"undefined: no lesion{where}", 0, np.full(len(tables[0]), np.nan))
            continue
        # S R: the mean over the classes that have lesions.
        values = np.mean(
            [
                [_mean_of(table, what, thresholds, area) for table in of_class]
                for of_class, own in zip(tables, images, strict=True)
                if len(own)
            ],
            axis=0,
        ).round(12)
        patients = len(np.unique(data.patient[np.concatenate(images)]))
        part = _resampled(values, n, patients)
        if len(matches) > 1:
            missing = sum(not len(own) for own in images)
            what_of = f"mean of {len(matches) - missing} classes" + (
                f" ({missing} undefined)" if missing else ""
            )
            method = f"{what_of}; {part.estimate.method}"
            part = replace(part, estimate=part.estimate.model_copy(update={"method": method}))
        estimates[metric] = part
    return estimates


def _resampled(values: FloatArray, n: int, patients: int) -> Part:
    """The mean over seeds of S 1+R values, the first of the set itself."""
    # The rule for "average_precision" knows that a perfect set proves less than its resamples say.
    return replicated("average_precision", values[:, 0], values[:, 1:].mean(axis=0), n, patients)


# --- What pools detections ----------------------------------------------------------------------------


class _Pool(NamedTuple):
    """Detections of some classes together, by falling score.

    Attributes:
        score: D.
        image: D.
        hit: D, whether it found a lesion.
        called: D, whether its score reaches its class's threshold.
        lesion_image: L, of the lesions there are.
    """

    score: FloatArray
    image: IntArray
    hit: BoolArray
    called: BoolArray
    lesion_image: IntArray

    @property
    def num_lesions(self) -> int:
        return len(self.lesion_image)


def _pool(matches: Sequence[_Matches], thresholds: Sequence[float] | None = None, area: int = 0) -> _Pool:
    """The classes' detections together; matched at one IoU threshold, and to lesions of one area range."""
    hits = []
    for part in matches:
        hit = np.zeros(len(part.detections.score), bool)
        hit[part.near] = part.hit[area, 0]
        hits.append(hit)
    least = [0.0] * len(matches) if thresholds is None else thresholds
    score = np.concatenate([part.detections.score for part in matches])
    order = np.argsort(-score, kind="stable")
    called = np.concatenate(
        [part.detections.score >= lowest for part, lowest in zip(matches, least, strict=True)]
    )
    return _Pool(
        score=score[order],
        image=np.concatenate([part.detections.image for part in matches])[order],
        hit=np.concatenate(hits)[order],
        called=called[order],
        lesion_image=np.concatenate([part.lesion_image[part.lesion_counts[area]] for part in matches]),
    )


def _of_images(data: _Data, pools: Sequence[_Pool]) -> dict[str, Part]:
    """What an image's boxes say of the image."""
    highest, holds = np.zeros((len(pools), data.num_images)), np.zeros(data.num_images, bool)
    spared = np.ones(highest.shape, bool)
    for row, quiet, found in zip(highest, spared, pools, strict=True):
        np.maximum.at(row, found.image, found.score)
        quiet[found.image[found.called]] = False
    holds[pools[0].lesion_image] = True
    cases = _cases(data, np.arange(data.num_images), holds, highest)
    none = np.broadcast_to(~holds, spared.shape)
    return {
        "image_specificity": share(cases, spared, none, "no image without lesions"),
        "image_auc": ranking.area(cases),
    }


def _cases(data: _Data, image: IntArray, y: BoolArray, p: FloatArray) -> Cases:
    """Things in images as cases of their patients; S N scores."""
    patient = data.patient[image]
    clustered = len(np.unique(patient)) < len(patient)
    return Cases(y, p, p > 0, p > 0, patient, data.num_patients, clustered)


def _froc(data: _Data, pools: Sequence[_Pool], weights: Weights) -> dict[str, Part]:
    """Sensitivity at each of `FROC_RATES` and their mean.

    The sensitivity at a rate is that of the lowest threshold with no more false positives per image: a threshold
    that exists, where scores are tied, too.
    """
    names = [f"sensitivity_at_{rate:g}_fp" for rate in FROC_RATES]
    n = pools[0].num_lesions
    if not n:
        nowhere = np.full(len(pools), np.nan)
        return {name: undefined("undefined: no lesion", 0, nowhere) for name in ("froc", *names)}
    rates = np.stack(
        [
            np.concatenate(
                [
                    _sensitivities(data, found, weights[rows].astype(np.float64), FROC_RATES)
                    for rows in chunks(len(weights), max(data.num_patients, n))
                ]
            )
            for found in pools
        ]
    )  # S 1+R 7
    patients = len(np.unique(data.patient[pools[0].lesion_image]))
    values = {"froc": rates.mean(axis=2)} | dict(zip(names, np.moveaxis(rates, 2, 0), strict=True))
    return {name: _resampled(value, n, patients) for name, value in values.items()}


def _sensitivities(data: _Data, found: _Pool, weights: FloatArray, rates: Sequence[float]) -> FloatArray:
    """R J: for each resample the sensitivity at each of J false positives per image; NaN without lesions."""
    drawn = np.ascontiguousarray(weights.T)
    patient = data.patient[found.image]
    # Scores at which a lesion is found, falling: only there sensitivity rises.
    steps = -np.unique(-found.score[found.hit])
    row = np.searchsorted(-steps, -found.score, side="left")
    hits, misses = (
        _counted(row[which], patient[which], len(steps), drawn) for which in (found.hit, ~found.hit)
    )
    images, lesions = (
        np.bincount(patients, minlength=data.num_patients) @ drawn
        for patients in (data.patient, data.patient[found.lesion_image])
    )
    padded = np.vstack([np.zeros(len(weights)), hits])
    result = np.empty((len(weights), len(rates)))
    with np.errstate(invalid="ignore"):
        for column, rate in enumerate(rates):
            num_steps = (misses <= rate * images).sum(axis=0)
            result[:, column] = padded[num_steps, np.arange(len(weights))] / lesions
    return result


def _sensitivity(data: _Data, pools: Sequence[_Pool]) -> Part:
    """The share of lesions found by what is called."""
    hits = np.array([data.by_patient(found.image[found.called & found.hit]) for found in pools])  # S P
    lesion_image = np.sort(pools[0].lesion_image)
    # A case for each lesion; of a patient's, the first so many are found: which of them makes no difference.
    owner = data.patient[lesion_image]
    caught = _rank_in(owner) < hits[:, owner]
    cases = _cases(data, lesion_image, np.ones(len(owner), bool), caught.astype(np.float64))
    return share(cases, caught, np.ones_like(caught), "no lesion")


def _called(data: _Data, pools: Sequence[_Pool], weights: Weights) -> dict[str, Part]:
    """What is said of the boxes that are called."""
    # A case for each box that any seed calls.
    called = [np.flatnonzero(found.called) for found in pools]
    seed = np.repeat(np.arange(len(pools)), [len(rows) for rows in called])
    right = np.concatenate([found.hit[rows] for found, rows in zip(pools, called, strict=True)])
    where = np.concatenate([found.image[rows] for found, rows in zip(pools, called, strict=True)])
    own = seed == np.arange(len(pools))[:, None]
    cases = _cases(data, where, right, own.astype(np.float64))
    false = np.array([data.by_patient(where[~right & mine]) for mine in own])  # S P
    by_seed = false.sum(axis=1) / data.num_images
    if by_seed.any():
        images = np.bincount(data.patient, minlength=data.num_patients)
        sums = resampled_sums(weights, np.column_stack([false.mean(axis=0), images]).astype(np.float64))
        rates = sums[1:, 0] / sums[1:, 1]
        rate = replicated("false_positives_per_image", by_seed, rates, data.num_images, data.num_patients)
    else:
        # Every resample has none, which proves nothing: the Poisson limit of no event, patients being the trials.
        high = -math.log((1 - LEVEL) / 2) / data.num_patients
        method = "Poisson, n = patients (none)"
        rate = Part(Estimate(value=0.0, low=0.0, high=high, n=data.num_images, method=method), by_seed)
    return {
        "sensitivity": _sensitivity(data, pools),
        "precision": share(cases, right & own, own, "no box is called"),
        "false_positives_per_image": rate,
    }
