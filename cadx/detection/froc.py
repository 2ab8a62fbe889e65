"""Lesions found against false positives per image: the curve, its limits, and a threshold chosen on it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from cadx.detection.average_precision import counted
from cadx.detection.matching import AREAS_PX2, ImageSet, Matches, check_iou, match_classes, read_boxes
from cadx.metrics import ranking
from cadx.metrics.areas import patients_worth
from cadx.metrics.estimates import (
    BoolArray,
    FloatArray,
    IntArray,
    Weights,
    chunks,
    resample,
)
from cadx.metrics.limits import part_of_boxes

FROC_RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
"""False positives per image at which sensitivity is read (LUNA16: Setio et al. 2017, Med Image Anal 42:1)."""
_ABOVE_ALL = math.nextafter(1.0, 2.0)  # and finite: JSON knows no infinity


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
    data = read_boxes(detections, ground_truths, sample_ids, classes, None, max_detections)
    check_iou(iou_threshold)
    found = pool_classes(match_classes(data, (iou_threshold,), (AREAS_PX2["all"],)))
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


def count_holders(data: ImageSet, image: IntArray) -> float:
    """Patients that hold lesions, of which each one's image is given; `patients_worth` where few hold most of them."""
    return patients_worth(data.patient[image])


def froc_limits(
    detections: Sequence[pd.DataFrame],
    ground_truths: pd.DataFrame,
    sample_ids: Sequence[str],
    rates: Sequence[float],
    *,
    classes: Sequence[str],
    patients: ArrayLike | None = None,
    resamples: int = 1000,
    seed: int = 0,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
) -> tuple[FloatArray, FloatArray, FloatArray] | None:
    """Sensitivity at false positives per image `rates`, the mean over seeds, and its pointwise 95 % limits.

    None without lesions. Arguments as in `calculate_detection_metrics`, whose limits these are; detections are a table
    for each seed. Limits are NaN where there is no interval.

    Raises:
        ValueError: as `calculate_detection_metrics`.
    """
    check_iou(iou_threshold)
    seeds = [
        read_boxes(one, ground_truths, sample_ids, classes, patients, max_detections) for one in detections
    ]
    data = seeds[0]
    pools = [pool_classes(match_classes(one, (iou_threshold,), (AREAS_PX2["all"],))) for one in seeds]
    if not pools[0].num_lesions:
        return None
    weights = resample(data.num_patients, resamples, seed)
    value, drawn = (
        np.stack([sensitivities(data, found, rows, rates) for found in pools])
        for rows in (np.ones((1, data.num_patients), np.uint8), weights)
    )  # S 1 J, S R J
    num_holders = count_holders(data, pools[0].lesion_image)
    parts = [
        part_of_boxes(by_seed, replicates, pools[0].num_lesions, num_holders)
        for by_seed, replicates in zip(value[:, 0].T, drawn.mean(axis=0).T, strict=True)
    ]
    low, high = (
        np.array([getattr(part.estimate, end) for part in parts], np.float64) for end in ("low", "high")
    )
    return value[:, 0].mean(axis=0), low, high


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


class Pool(NamedTuple):
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
        """L."""
        return len(self.lesion_image)


def pool_classes(
    matches: Sequence[Matches], thresholds: Sequence[float] | None = None, area: int = 0
) -> Pool:
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
    return Pool(
        score=score[order],
        image=np.concatenate([part.detections.image for part in matches])[order],
        hit=np.concatenate(hits)[order],
        called=called[order],
        lesion_image=np.concatenate([part.lesion_image[part.lesion_counts[area]] for part in matches]),
    )


def sensitivities(data: ImageSet, found: Pool, weights: Weights, rates: Sequence[float]) -> FloatArray:
    """R J: for each resample the sensitivity at each of J false positives per image; NaN without lesions."""
    patient = data.patient[found.image]
    # Scores at which a lesion is found, falling: only there sensitivity rises.
    steps = -np.unique(-found.score[found.hit])
    row = np.searchsorted(-steps, -found.score, side="left")
    result = np.empty((len(weights), len(rates)))
    for rows in chunks(len(weights), max(data.num_patients, len(steps))):
        drawn = np.ascontiguousarray(weights[rows].T, np.float64)  # P R
        hits, misses = (
            counted(row[which], patient[which], len(steps), drawn) for which in (found.hit, ~found.hit)
        )
        images, lesions = (
            np.bincount(patients, minlength=data.num_patients) @ drawn
            for patients in (data.patient, data.patient[found.lesion_image])
        )
        padded = np.vstack([np.zeros_like(images), hits])
        for column, rate in enumerate(rates):
            num_steps = (misses <= rate * images).sum(axis=0)
            with np.errstate(invalid="ignore"):
                result[rows, column] = padded[num_steps, np.arange(len(images))] / lesions
    return result
