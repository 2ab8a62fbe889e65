"""Boxes of a set of images, and which detection found which lesion."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from cadx.metrics.estimates import BoolArray, FloatArray, IntArray, patient_codes

AREAS_PX2 = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
"""COCO's area ranges, in stored pixels, ends included; a lesion outside of the range counts neither way."""
_PAIRS_AT_ONCE = 1 << 20
_DETECTION_COLUMNS = ("sample_id", "class", "x0", "y0", "x1", "y1", "score")
_LESION_COLUMNS = _DETECTION_COLUMNS[:-1]
_COORDINATES = ["x0", "y0", "x1", "y1"]


class Boxes(NamedTuple):
    """B boxes: which image and class each belongs to, 0-based, its corners and its score."""

    image: IntArray
    column: IntArray
    xyxy: FloatArray
    score: FloatArray

    def take(self, which: IntArray | BoolArray) -> "Boxes":
        """Some of them."""
        return Boxes(self.image[which], self.column[which], self.xyxy[which], self.score[which])

    @property
    def area_px2(self) -> FloatArray:
        """B."""
        return (self.xyxy[:, 2] - self.xyxy[:, 0]) * (self.xyxy[:, 3] - self.xyxy[:, 1])


@dataclass(frozen=True)
class ImageSet:
    """Checked inputs; detections by falling score, ties by image, those of the highest scores alone.

    Attributes:
        detections: of all classes.
        lesions: of all classes, their scores 1.
        classes: their names.
        patient: N, 0..num_patients-1.
        num_patients: how many.
    """

    detections: Boxes
    lesions: Boxes
    classes: tuple[str, ...]
    patient: IntArray
    num_patients: int

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.patient)

    def by_patient(self, image: IntArray) -> IntArray:
        """P: how many things, each in an image, each patient has."""
        counts: IntArray = np.bincount(self.patient[image], minlength=self.num_patients)
        return counts


def read_boxes(
    detections: pd.DataFrame,
    ground_truths: pd.DataFrame,
    sample_ids: Sequence[str],
    classes: Sequence[str],
    patients: ArrayLike | None,
    max_detections: int,
) -> ImageSet:
    """The tables of `calculate_detection_metrics`, checked.

    Raises:
        ValueError: if a table lacks a column, or names another sample or class, a box has no area or a score is not
            within 0..1, images or classes are none or not unique, or a number is out of range.
    """
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
    return ImageSet(
        detections=found.take(rank_in(group) < max_detections),
        lesions=lesions,
        classes=tuple(map(str, names)),
        patient=patient,
        num_patients=int(patient.max()) + 1,
    )


def rank_in(group: IntArray) -> IntArray:
    """How many things of its group stand before each."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    rank = np.empty(len(order), np.intp)
    rank[order] = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return rank


def _table(
    what: str, frame: pd.DataFrame, columns: Sequence[str], images: "pd.Index[Any]", names: "pd.Index[Any]"
) -> Boxes:
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
    return Boxes(image.astype(np.intp), column.astype(np.intp), xyxy, score)


def check_iou(iou_threshold: float) -> None:
    """Accept what an overlap can reach.

    Raises:
        ValueError: if it is not above 0 and at most 1.
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold {iou_threshold}: must be above 0 and at most 1")


@dataclass(frozen=True)
class Matches:
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

    detections: Boxes
    near: IntArray
    hit: BoolArray
    absorbed: BoolArray
    in_area: BoolArray
    lesion_image: IntArray
    lesion_counts: BoolArray
    finder: IntArray


def match_classes(
    data: ImageSet, iou_thresholds: Sequence[float], areas_px2: Sequence[tuple[float, float]]
) -> list[Matches]:
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
    rank = rank_in(group[near])[number]
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
            Matches(
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


def _overlaps(data: ImageSet, least: float) -> tuple[IntArray, IntArray, FloatArray]:
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
    check_iou(iou_threshold)
    data = read_boxes(detections, ground_truths, sample_ids, classes, None, max_detections)
    names = np.asarray(sample_ids, dtype=object)

    def table(boxes: Boxes, name: str) -> pd.DataFrame:
        frame = pd.DataFrame(boxes.xyxy, columns=_COORDINATES)
        frame.insert(0, "sample_id", names[boxes.image])
        frame.insert(1, "class", name)
        return frame

    found, lesions = [], []
    for column, (name, part) in enumerate(
        zip(data.classes, match_classes(data, (iou_threshold,), (AREAS_PX2["all"],)), strict=True)
    ):
        scores = part.detections.score
        hit = np.zeros(len(scores), bool)
        hit[part.near] = part.hit[0, 0]
        found.append(table(part.detections, name).assign(score=scores, hit=hit))
        own = data.lesions.take(data.lesions.column == column)
        best = np.append(scores, np.nan)[part.finder]
        lesions.append(table(own, name).assign(score=best))
    return pd.concat(found, ignore_index=True), pd.concat(lesions, ignore_index=True)
