"""Metrics of detections, each with a 95 % interval that knows which images share a patient.

    average precision   as COCO defines it: detections of one class are matched to lesions image by image, by
                        falling score, each lesion once; precision is made to fall with recall and read at 101
                        recalls; the mean over 10 IoU thresholds and then over classes.
    FROC                share of lesions found against false positives per image, over all score thresholds.
    at a threshold      lesion sensitivity, PPV and false positives per image of what scores at least so much.
    image               AUC of the highest score in an image, against whether it holds a lesion.

A second detection of one lesion is a false positive. Intervals of AP, FROC and false positives per image come from
a bootstrap of whole patients: detections are matched once, and a resample weights images by how often it drew
their patient, which gives what a set with these images repeated would give. Shares at a threshold and the AUC have
closed forms (`cadx.metrics`).

Invariants: what is undefined (a class without lesions, an area range without any) is None with a method that says
why, never -1 or NaN; images and classes never mix; equal inputs and seed give equal output.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from cadx import metrics
from cadx.metrics import Meaning
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

DETECTION_METRICS: dict[str, Meaning] = {
    "ap": Meaning("COCO's average precision: mean over IoU 0.50 to 0.95", "higher"),
    "ap50": Meaning("average precision where IoU 0.50 is a hit", "higher"),
    "ap75": Meaning("average precision where IoU 0.75 is a hit", "higher"),
    "ap_small": Meaning("average precision of lesions up to 32 x 32 pixels", "higher"),
    "ap_medium": Meaning("average precision of lesions between 32 x 32 and 96 x 96 pixels", "higher"),
    "ap_large": Meaning("average precision of lesions from 96 x 96 pixels", "higher"),
    "froc": Meaning("share of lesions found, mean over 1/8 to 8 false positives per image", "higher"),
    **{
        f"sensitivity_at_{rate:g}_fp": Meaning(
            f"share of lesions found with at most {rate:g} false positives per image", "higher"
        )
        for rate in FROC_RATES
    },
    "lesion_sensitivity": Meaning("share of lesions found at the score threshold", "higher"),
    "lesion_ppv": Meaning("share of detections at the score threshold that are lesions", "higher"),
    "false_positives_per_image": Meaning("false detections per image at the score threshold", "lower"),
    "image_auc": Meaning("probability that an image with a lesion scores above one without", "higher"),
}
"""Every metric by its name in metrics.json, in the order of reports.

Overall, those of AP are means over the classes that have lesions; the others pool the classes' detections and
lesions (each detection still matched within its class only).
"""
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
        score_threshold: of the metrics at a threshold.
        iou_threshold: what a hit is, for all but AP.
        metrics: metric -> estimate, over all classes, in the order of `DETECTION_METRICS`.
        by_class: class -> metric -> estimate.
    """

    n: int
    n_patients: int
    n_lesions: int
    clustered: bool
    score_threshold: float
    iou_threshold: float
    metrics: dict[str, Estimate]
    by_class: dict[str, dict[str, Estimate]]


class FrocCurve(NamedTuple):
    """By falling threshold; keeping score >= threshold[i] gives point i. The first has the threshold inf."""

    false_positives_per_image: FloatArray
    sensitivity: FloatArray
    threshold: FloatArray


class OperatingPoint(NamedTuple):
    """A score threshold, with what it gives on the data that it was chosen on.

    Attributes:
        threshold: the lowest score that counts as a detection.
        sensitivity: share of lesions found.
        false_positives_per_image: false detections per image.
        reached: whether the sensitivity is the one asked for; else it is the most that any threshold gives.
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
    """COCO's average precision by faster-coco-eval: class -> metric -> value, and "" for the mean over classes.

    Args:
        detections: columns sample_id, class, x0, y0, x1, y1 (half-open) and score, 0..1.
        ground_truths: the same columns without score.
        sample_ids: all images, those without any box too.
        classes: all classes.
        iou_thresholds: 0..1, over which "ap" is the mean; "ap50" and "ap75" are None if they lack 0.5 or 0.75.
        max_detections: how many of one class in one image count, those of the highest scores.

    Returns:
        ap, ap50, ap75, ap_small, ap_medium, ap_large; None where there is no lesion to find.

    Raises:
        ValueError: if a table lacks a column, or names another sample or class, or a box or score is none.

    Source: Lin et al. 2014, ECCV (Microsoft COCO), and the evaluation that came with it.
    """
    data = _read(detections, ground_truths, sample_ids, classes, None, max_detections)
    if not iou_thresholds or not all(0 < threshold <= 1 for threshold in iou_thresholds):
        raise ValueError(f"iou_thresholds {tuple(iou_thresholds)}: must lie above 0 and up to 1")
    precision = _coco_precision(data, iou_thresholds, max_detections)
    values = np.where(precision > -1, precision, np.nan).mean(axis=1)  # T K A; -1 stands for no lesion
    by_class = {
        name: {
            metric: _plain(values[chosen, column, area].mean() if chosen else math.nan)
            for metric, (chosen, area) in _ap_parts(iou_thresholds).items()
        }
        for column, name in enumerate(data.classes)
    }
    overall: dict[str, float | None] = {}
    for metric in _ap_parts(iou_thresholds):
        defined = [value for parts in by_class.values() if (value := parts[metric]) is not None]
        overall[metric] = _plain(float(np.mean(defined))) if defined else None
    return {"": overall, **by_class}


def calculate_detection_metrics(
    detections: pd.DataFrame,
    ground_truths: pd.DataFrame,
    sample_ids: Sequence[str],
    *,
    classes: Sequence[str],
    patients: ArrayLike | None = None,
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    resamples: int = 1000,
    seed: int = 0,
) -> DetectionScores:
    """Every metric of `DETECTION_METRICS` with its interval, overall and by class.

    Args:
        detections: columns sample_id, class, x0, y0, x1, y1 (half-open) and score, 0..1.
        ground_truths: the same columns without score.
        sample_ids: N images, those without any box too: they carry false positives, and count.
        classes: all classes.
        patients: N, anything that tells patients apart; None = all differ.
        score_threshold: the lowest score that counts as a detection, for the metrics at a threshold.
        iou_threshold: the least overlap of a hit, for all metrics but AP.
        max_detections: how many of one class in one image count, those of the highest scores.
        resamples: of patients; 0 leaves what has no closed form without interval.
        seed: of the resampling. The same resamples serve all metrics and classes.

    Raises:
        ValueError: as `calculate_map`, or if a number is out of range or patients have another length.
    """
    data = _read(detections, ground_truths, sample_ids, classes, patients, max_detections)
    _check_iou(iou_threshold)
    weights = metrics._resample(data.num_patients, resamples, seed)
    values = calculate_map(
        detections, ground_truths, sample_ids, classes=classes, max_detections=max_detections
    )
    strict = _match(data, IOU_THRESHOLDS, tuple(AREAS_PX2.values()))
    replicates = [_ap_replicates(part, data, weights) for part in strict]
    loose = _match(data, (iou_threshold,), (AREAS_PX2["all"],))
    by_class = {
        name: _ap_estimates(data, values[name], [replicates[column]], [strict[column]])
        | _pooled(data, [loose[column]], weights, score_threshold)
        for column, name in enumerate(data.classes)
    }
    overall = _ap_estimates(data, values[""], replicates, strict)
    overall |= _pooled(data, loose, weights, score_threshold)
    return DetectionScores(
        n=data.num_images,
        n_patients=data.num_patients,
        n_lesions=len(data.lesions.image),
        clustered=data.num_patients < data.num_images,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        metrics=overall,
        by_class=by_class,
    )


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
    found = _pool(data, _match(data, (iou_threshold,), (AREAS_PX2["all"],)))
    if not found.num_lesions:
        return FrocCurve(np.empty(0), np.empty(0), np.empty(0))
    threshold = hits = calls = np.empty(0)
    if found.score.size:
        threshold, hits, calls = metrics._thresholds(found.hit, found.score)
    return FrocCurve(
        np.concatenate([[0.0], (calls - hits) / data.num_images]),
        np.concatenate([[0.0], hits / found.num_lesions]),
        np.concatenate([[np.inf], threshold]),
    )


def operating_point(
    detections: pd.DataFrame,
    ground_truths: pd.DataFrame,
    sample_ids: Sequence[str],
    *,
    classes: Sequence[str],
    sensitivity: float = 0.9,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
) -> OperatingPoint:
    """The highest score threshold that still finds this share of lesions: the one with the fewest false positives.

    It lies midway between the score of the last lesion that is needed and the next lower one (or 0), so that the
    last digits of a score decide nothing. A lesion that no detection hits is found at no threshold: then what
    comes back is the threshold of the most lesions, not `reached`; just above 1 where no lesion is hit at all.

    Args:
        detections: as in `calculate_detection_metrics`, of the calibration split; so are the others.
        ground_truths: see detections.
        sample_ids: see detections.
        classes: see detections.
        sensitivity: of lesions, to reach; above 0 and at most 1.
        iou_threshold: see detections.
        max_detections: see detections.

    Raises:
        ValueError: as `calculate_detection_metrics`, or if there is no lesion.
    """
    if not 0 < sensitivity <= 1:
        raise ValueError(f"sensitivity {sensitivity}: must be above 0 and at most 1")
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
    # 0.07 * 100 is 7.000000000000001: without the margin one lesion too many.
    wanted = min(sensitivity - 1e-9, float(curve.sensitivity[-1]))
    point = int(np.argmax(curve.sensitivity >= wanted))
    lowest = float(curve.threshold[point])
    below = float(curve.threshold[point + 1]) if point + 1 < curve.threshold.size else 0.0
    middle = (lowest + below) / 2
    return OperatingPoint(
        threshold=_ABOVE_ALL if math.isinf(lowest) else middle if middle > below else lowest,
        sensitivity=float(curve.sensitivity[point]),
        false_positives_per_image=float(curve.false_positives_per_image[point]),
        reached=bool(curve.sensitivity[point] >= sensitivity - 1e-9),
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
    order = np.argsort(group, kind="stable")  # within a group still by falling score
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    rank = np.empty(len(order), np.intp)
    rank[order] = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    patient = metrics._patient_codes(patients, np.ones(len(images), dtype=bool))
    return _Data(
        detections=found.take(rank < max_detections),
        lesions=lesions,
        classes=tuple(map(str, names)),
        patient=patient,
        num_patients=int(patient.max()) + 1,
    )


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


def _plain(value: float) -> float | None:
    # COCO adds 2e-16 to each denominator: what is perfect shall be 1.
    return None if math.isnan(value) else round(float(value), 12)


def _ap_parts(iou_thresholds: Sequence[float]) -> dict[str, tuple[list[int], int]]:
    """Metric -> which IoU thresholds, and which area, its average precision is the mean over."""
    every = list(range(len(iou_thresholds)))
    at = {wanted: [t for t in every if abs(iou_thresholds[t] - wanted) < 1e-9] for wanted in (0.5, 0.75)}
    parts = {"ap": (every, 0), "ap50": (at[0.5], 0), "ap75": (at[0.75], 0)}
    return parts | {f"ap_{name}": (every, area) for area, name in enumerate(AREAS_PX2) if area}


def _coco_precision(data: _Data, iou_thresholds: Sequence[float], max_detections: int) -> FloatArray:
    """Precision at 101 recalls, T 101 K A; -1 where there is no lesion."""
    from faster_coco_eval import COCO, COCOeval_faster

    def records(boxes: _Boxes) -> list[dict[str, Any]]:
        sizes = boxes.xyxy[:, 2:] - boxes.xyxy[:, :2]
        rows = np.hstack([boxes.xyxy[:, :2], sizes]).tolist()
        return [
            {
                "id": number,  # not from 0, which faster-coco-eval takes for "no match"
                "image_id": image,
                "category_id": column,
                "bbox": row,
                "area": row[2] * row[3],
                "iscrowd": 0,
                "score": score,
            }
            for number, (image, column, row, score) in enumerate(
                zip(boxes.image.tolist(), boxes.column.tolist(), rows, boxes.score.tolist(), strict=True), 1
            )
        ]

    truth = COCO(
        {
            "info": {},
            "images": [{"id": image} for image in range(data.num_images)],
            "categories": [{"id": column, "name": name} for column, name in enumerate(data.classes)],
            "annotations": records(data.lesions),
        }
    )
    evaluation = COCOeval_faster(truth, truth.loadRes(records(data.detections)), iouType="bbox")
    evaluation.params.iouThrs = np.array(iou_thresholds)
    # The one number that is asked for, not COCO's 1, 10 and 100: another maximum would read a slot of -1.
    evaluation.params.maxDets = [max_detections]
    evaluation.params.areaRng = [list(limits) for limits in AREAS_PX2.values()]
    evaluation.params.areaRngLbl = list(AREAS_PX2)
    evaluation.evaluate()
    evaluation.accumulate()
    precision: FloatArray = np.asarray(evaluation.eval["precision"])[..., 0]
    return precision


# --- Matching -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Matches:
    """What became of one class's D detections, for T IoU thresholds and A area ranges.

    Attributes:
        detections: by falling score.
        near: M, the detections, by falling score, that overlap a lesion enough for at least one threshold.
        hit: A T M, whether such a one found a lesion that counts.
        absorbed: A T M, whether it found one outside of the area range: it counts neither way.
        in_area: A D, whether a detection lies in the area range: if not, it is no false positive either.
        lesion_image: L.
        lesion_counts: A L, whether a lesion lies in the area range.
    """

    detections: _Boxes
    near: IntArray
    hit: BoolArray
    absorbed: BoolArray
    in_area: BoolArray
    lesion_image: IntArray
    lesion_counts: BoolArray


def _match(
    data: _Data, iou_thresholds: Sequence[float], areas_px2: Sequence[tuple[float, float]]
) -> list[_Matches]:
    """Every class's detections matched to its lesions, image by image, by falling score; each lesion once."""
    # As in COCO: an IoU of 1 that rounding makes a little less still reaches a threshold of 1.
    least = np.minimum(np.array(iou_thresholds), 1 - 1e-10)
    matches = []
    for column in range(len(data.classes)):
        found = data.detections.take(data.detections.column == column)
        lesions = data.lesions.take(data.lesions.column == column)
        in_area, counts = (
            np.array([(low <= boxes.area_px2) & (boxes.area_px2 <= high) for low, high in areas_px2])
            for boxes in (found, lesions)
        )
        by_image = {image: np.flatnonzero(lesions.image == image) for image in np.unique(lesions.image)}
        taken = {
            image: np.zeros((len(areas_px2), len(least), len(own)), bool) for image, own in by_image.items()
        }
        near, hits, absorbed = [], [], []
        rows = np.flatnonzero(np.isin(found.image, lesions.image))
        for row in rows.tolist():
            image = int(found.image[row])
            own = by_image[image]
            overlap = _iou(found.xyxy[row], lesions.xyxy[own])
            if not overlap.max() >= least.min():
                continue
            free = ~taken[image] & (overlap >= least[:, None])
            wanted = free & counts[:, None, own]
            hit, other = wanted.any(axis=2), free.any(axis=2)
            # The best lesion that counts, else the best of the others; of equal ones the last, as in COCO.
            score = np.where(np.where(hit[..., None], wanted, free), overlap, -1.0)
            best = len(own) - 1 - np.argmax(score[..., ::-1], axis=2)
            area, threshold = np.nonzero(other)
            taken[image][area, threshold, best[area, threshold]] = True
            near.append(row)
            hits.append(hit)
            absorbed.append(other & ~hit)
        shape = (len(near), len(areas_px2), len(least))
        matches.append(
            _Matches(
                detections=found,
                near=np.array(near, np.intp),
                hit=np.array(hits, bool).reshape(shape).transpose(1, 2, 0),
                absorbed=np.array(absorbed, bool).reshape(shape).transpose(1, 2, 0),
                in_area=in_area,
                lesion_image=lesions.image,
                lesion_counts=counts,
            )
        )
    return matches


def _iou(box: FloatArray, others: FloatArray) -> FloatArray:
    """Intersection over union of one box with B others."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = np.prod(np.maximum(sides, 0.0), axis=1)
    union = np.prod(box[2:] - box[:2]) + np.prod(others[:, 2:] - others[:, :2], axis=1) - shared
    iou: FloatArray = shared / union
    return iou


# --- Average precision of resamples -------------------------------------------------------------------


def _ap_replicates(matches: _Matches, data: _Data, weights: metrics.Weights) -> FloatArray:
    """R A T: average precision of one class in each resample, NaN where it has no lesion."""
    num_areas, num_thresholds, num_near = matches.hit.shape
    result = np.full((len(weights), num_areas, num_thresholds), np.nan)
    patient = data.patient[matches.detections.image]
    is_far = np.ones(len(patient), bool)
    is_far[matches.near] = False
    for rows in metrics._chunks(len(weights), max(num_near, data.num_patients)):
        drawn = np.ascontiguousarray(weights[rows].T, np.float64)  # P R
        of_near = drawn[patient[matches.near]]
        for area in range(num_areas):
            if not matches.lesion_counts[area].any():
                continue
            lesions = data.patient[matches.lesion_image[matches.lesion_counts[area]]]
            num_lesions = np.bincount(lesions, minlength=data.num_patients) @ drawn
            # Detections far from every lesion are false for every threshold: counted once, by sparse sums.
            far = np.flatnonzero(is_far & matches.in_area[area])
            before = _counted(np.searchsorted(matches.near, far), patient[far], num_near, drawn)
            false_area = matches.in_area[area][matches.near]
            for threshold in range(num_thresholds):
                hit = matches.hit[area, threshold]
                false = false_area & ~hit & ~matches.absorbed[area, threshold]
                misses = before + np.cumsum(of_near * false[:, None], axis=0)
                result[rows, area, threshold] = _interpolated(
                    np.cumsum(of_near[hit], axis=0), misses[hit], num_lesions
                )
    return result


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


def _ap_estimates(
    data: _Data,
    values: dict[str, float | None],
    replicates: Sequence[FloatArray],
    matches: Sequence[_Matches],
) -> dict[str, Estimate]:
    estimates = {}
    for metric, (thresholds, area) in _ap_parts(IOU_THRESHOLDS).items():
        images = [part.lesion_image[part.lesion_counts[area]] for part in matches]
        n, value = sum(map(len, images)), values[metric]
        if value is None:
            where = "" if area == 0 else f" that is {metric.removeprefix('ap_')}"
            estimates[metric] = _undefined(f"undefined: no lesion{where}", 0)
            continue
        defined = [part for part, own in zip(replicates, images, strict=True) if len(own)]
        mean = np.mean([part[:, area, thresholds].mean(axis=1) for part in defined], axis=0)
        patients = len(np.unique(data.patient[np.concatenate(images)]))
        estimate = _resampled(value, mean, n, patients)
        if len(matches) > 1:
            missing = len(matches) - len(defined)
            what = f"mean of {len(defined)} classes" + (f" ({missing} undefined)" if missing else "")
            estimate = estimate.model_copy(update={"method": f"{what}; {estimate.method}"})
        estimates[metric] = estimate
    return estimates


def _resampled(value: float, replicates: FloatArray, n: int, patients: int) -> Estimate:
    # The rule for "average_precision" knows that a perfect set proves less than its resamples say.
    return metrics._replicated("average_precision", np.array([value]), replicates, n, patients).estimate


def _undefined(why: str, n: int) -> Estimate:
    return Estimate(value=None, low=None, high=None, n=n, method=why)


# --- What pools detections ----------------------------------------------------------------------------


class _Pool(NamedTuple):
    """Detections of some classes together, by falling score: their score, image, and whether each is a hit."""

    score: FloatArray
    image: IntArray
    hit: BoolArray
    lesion_image: IntArray

    @property
    def num_lesions(self) -> int:
        return len(self.lesion_image)


def _pool(data: _Data, matches: Sequence[_Matches]) -> _Pool:
    """The classes' detections together; matched at one IoU threshold."""
    hits = []
    for part in matches:
        hit = np.zeros(len(part.detections.score), bool)
        hit[part.near] = part.hit[0, 0]
        hits.append(hit)
    score = np.concatenate([part.detections.score for part in matches])
    order = np.argsort(-score, kind="stable")
    return _Pool(
        score=score[order],
        image=np.concatenate([part.detections.image for part in matches])[order],
        hit=np.concatenate(hits)[order],
        lesion_image=np.concatenate([part.lesion_image for part in matches]),
    )


def _pooled(
    data: _Data, matches: Sequence[_Matches], weights: metrics.Weights, score_threshold: float
) -> dict[str, Estimate]:
    found = _pool(data, matches)
    estimates = _froc(data, found, weights)
    estimates |= _at_threshold(data, found, weights, score_threshold)
    highest, holds = np.zeros(data.num_images), np.zeros(data.num_images)
    np.maximum.at(highest, found.image, found.score)
    holds[found.lesion_image] = 1
    return estimates | {"image_auc": metrics.auc(holds, highest, data.patient)}


def _froc(data: _Data, found: _Pool, weights: metrics.Weights) -> dict[str, Estimate]:
    """Sensitivity at each of `FROC_RATES` and their mean.

    The sensitivity at a rate is that of the lowest threshold with no more false positives per image: a threshold
    that exists, where scores are tied, too.
    """
    names = [f"sensitivity_at_{rate:g}_fp" for rate in FROC_RATES]
    if not found.num_lesions:
        return {name: _undefined("undefined: no lesion", 0) for name in ("froc", *names)}
    rates = np.concatenate(
        [
            _sensitivities(data, found, chunk)
            for chunk in (
                np.ones((1, data.num_patients)),
                *(
                    weights[rows].astype(np.float64)
                    for rows in metrics._chunks(len(weights), max(data.num_patients, found.num_lesions))
                ),
            )
        ]
    )
    n = found.num_lesions
    patients = len(np.unique(data.patient[found.lesion_image]))
    values = {"froc": rates.mean(axis=1)} | dict(zip(names, rates.T, strict=True))
    return {name: _resampled(float(value[0]), value[1:], n, patients) for name, value in values.items()}


def _sensitivities(data: _Data, found: _Pool, weights: FloatArray) -> FloatArray:
    """R 7: for each resample the sensitivity at each of `FROC_RATES`; NaN without lesions."""
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
    result = np.empty((len(weights), len(FROC_RATES)))
    with np.errstate(invalid="ignore"):
        for column, rate in enumerate(FROC_RATES):
            num_steps = (misses <= rate * images).sum(axis=0)
            result[:, column] = padded[num_steps, np.arange(len(weights))] / lesions
    return result


def _at_threshold(
    data: _Data, found: _Pool, weights: metrics.Weights, score_threshold: float
) -> dict[str, Estimate]:
    kept = found.score >= score_threshold
    patient = data.patient[found.image]
    if found.num_lesions:
        # A case for each lesion: first those that were found, then the others, patient by patient.
        caught = np.bincount(patient[kept & found.hit], minlength=data.num_patients)
        missed = np.bincount(data.patient[found.lesion_image], minlength=data.num_patients) - caught
        who = np.repeat(np.tile(np.arange(data.num_patients), 2), np.concatenate([caught, missed]))
        was_found = np.arange(found.num_lesions) < caught.sum()
        calls = metrics.at_threshold(np.ones(found.num_lesions), was_found, 0.5, who)
        sensitivity = calls["sensitivity"]
    else:
        sensitivity = _undefined("undefined: no lesion", 0)
    if kept.any():
        # PPV in metrics' words: of the cases that are called, all of them, the share that is positive.
        calls = metrics.at_threshold(found.hit[kept], np.ones(int(kept.sum())), 0.5, patient[kept])
        ppv = calls["ppv"]
    else:
        ppv = _undefined("undefined: no detection at the threshold", 0)
    false = np.bincount(patient[kept & ~found.hit], minlength=data.num_patients)
    images = np.bincount(data.patient, minlength=data.num_patients)
    value = float(false.sum() / images.sum())
    if value == 0:
        # Every resample has none, which proves nothing: the Poisson limit of no event, patients being the trials.
        high = -math.log((1 - metrics.LEVEL) / 2) / data.num_patients
        rate = Estimate(
            value=0.0, low=0.0, high=high, n=data.num_images, method="Poisson, n = patients (none)"
        )
    else:
        sums = metrics._sums(weights, np.column_stack([false, images]).astype(np.float64))
        part = metrics._replicated(
            "false_positives_per_image",
            np.array([value]),
            sums[:, 0] / sums[:, 1],
            data.num_images,
            data.num_patients,
        )
        rate = part.estimate
    return {"lesion_sensitivity": sensitivity, "lesion_ppv": ppv, "false_positives_per_image": rate}
