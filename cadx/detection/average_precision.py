"""COCO's average precision and recall, of a set of images and of its resamples."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy

from cadx.detection.matching import AREAS_PX2, ImageSet, Matches, match_classes, read_boxes
from cadx.metrics.estimates import FloatArray, IntArray, Weights, chunks

IOU_THRESHOLDS: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
_RECALLS = np.linspace(0.0, 1.0, 101)  # not j / 100: COCO's own numbers, one last digit above it for some j


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
    data = read_boxes(detections, ground_truths, sample_ids, classes, None, max_detections)
    if not iou_thresholds or not all(0 < threshold <= 1 for threshold in iou_thresholds):
        raise ValueError(f"iou_thresholds {tuple(iou_thresholds)}: must lie above 0 and up to 1")
    itself = np.ones((1, data.num_patients), np.uint8)
    tables = [
        coco_tables(part, data, itself)
        for part in match_classes(data, iou_thresholds, tuple(AREAS_PX2.values()))
    ]
    names = coco_parts(iou_thresholds)
    by_class = {
        name: {metric: _rounded(mean_of(table, *names[metric])[0]) for metric in names}
        for name, table in zip(data.classes, tables, strict=True)
    }
    overall: dict[str, float | None] = {}
    for metric in names:
        defined = [value for parts in by_class.values() if (value := parts[metric]) is not None]
        overall[metric] = _rounded(float(np.mean(defined))) if defined else None
    return {"": overall, **by_class}


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 12)


def coco_parts(iou_thresholds: Sequence[float]) -> dict[str, tuple[str, list[int], int]]:
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


class CocoTables(NamedTuple):
    """Of one class, in each resample: NaN where it has no lesion.

    Attributes:
        precision: R A T, average precision.
        recall: R A T, share of lesions found at any score.
    """

    precision: FloatArray
    recall: FloatArray


def coco_tables(matches: Matches, data: ImageSet, weights: Weights) -> CocoTables:
    """Average precision and recall of one class in each resample.

    Args:
        matches: of the class, for T IoU thresholds and A area ranges.
        data: the images they are of.
        weights: R P.
    """
    num_areas, num_thresholds, num_near = matches.hit.shape
    tables = CocoTables(*np.full((2, len(weights), num_areas, num_thresholds), np.nan))
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
            before = counted(np.searchsorted(matches.near, far), patient[far], num_near, drawn)
            is_inside = matches.in_area[area][matches.near]
            for threshold in range(num_thresholds):
                is_hit = matches.hit[area, threshold]
                hit = np.flatnonzero(is_hit)
                false = np.flatnonzero(is_inside & ~is_hit & ~matches.absorbed[area, threshold])
                hits = np.cumsum(drawn[patient[matches.near[hit]]], axis=0)
                misses = before[hit] + counted(
                    np.searchsorted(hit, false), patient[matches.near[false]], len(hit), drawn
                )
                tables.precision[rows, area, threshold] = _interpolated(hits, misses, num_lesions)
                found = hits[-1] if len(hits) else np.zeros(len(num_lesions))
                with np.errstate(invalid="ignore"):
                    tables.recall[rows, area, threshold] = found / num_lesions
    return tables


def mean_of(table: CocoTables, what: str, thresholds: list[int], area: int) -> FloatArray:
    """R: one metric of `coco_parts`; NaN where it is undefined."""
    if not thresholds:
        return np.full(len(table.precision), np.nan)
    values: FloatArray = getattr(table, what)[:, area, thresholds].mean(axis=1)
    return values


def counted(row: IntArray, patient: IntArray, num_rows: int, drawn: FloatArray) -> FloatArray:
    """num_rows R: how many of the things, each with a row and a patient, lie in a row or above it, per resample."""
    kept = row < num_rows
    counts = scipy.sparse.csr_matrix(
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
