"""How well a score ranks positives above negatives: ROC and precision-recall curves, placements, average precision."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from cadx.metrics.estimates import (
    BoolArray,
    Cases,
    FloatArray,
    IntArray,
    Part,
    Weights,
    chunks,
    missing_class,
    nothing,
    one_score,
    replicated,
    undefined,
)


class RocCurve(NamedTuple):
    """From (0, 0) to (1, 1); calling positive at score >= threshold[i] gives point i."""

    false_positive_rate: FloatArray
    sensitivity: FloatArray
    threshold: FloatArray


class PrecisionRecallCurve(NamedTuple):
    """By falling threshold, so rising recall; calling positive at score >= threshold[i] gives point i."""

    recall: FloatArray
    precision: FloatArray
    threshold: FloatArray


def roc(labels: ArrayLike, scores: ArrayLike) -> RocCurve:
    """The ROC curve; empty arrays where a class is missing.

    Raises:
        ValueError: as `auc_value`.

    >>> roc([0, 1, 1], [0.2, 0.2, 0.9]).sensitivity.tolist()
    [0.0, 0.5, 1.0]
    """
    cases = one_score(labels, scores, None)
    if missing_class(cases):
        return RocCurve(np.empty(0), np.empty(0), np.empty(0))
    threshold, hits, calls = by_threshold(cases.y, cases.p[0])
    misses = calls - hits
    return RocCurve(
        np.concatenate([[0.0], misses / misses[-1]]),
        np.concatenate([[0.0], hits / hits[-1]]),
        np.concatenate([[np.inf], threshold]),
    )


def precision_recall(labels: ArrayLike, scores: ArrayLike) -> PrecisionRecallCurve:
    """The precision-recall curve; empty arrays where there are no positives.

    Raises:
        ValueError: as `auc_value`.

    >>> precision_recall([0, 1, 1], [0.5, 0.2, 0.9]).precision.round(2).tolist()
    [1.0, 0.5, 0.67]
    """
    cases = one_score(labels, scores, None)
    if not cases.y.any():
        return PrecisionRecallCurve(np.empty(0), np.empty(0), np.empty(0))
    threshold, hits, calls = by_threshold(cases.y, cases.p[0])
    return PrecisionRecallCurve(hits / hits[-1], hits / calls, threshold)


def by_threshold(y: BoolArray, scores: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Distinct scores, falling, and how many positives and how many cases reach each."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    return ordered[ends], np.cumsum(y[order])[ends].astype(np.float64), (ends + 1).astype(np.float64)


def auc_value(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """The area under the ROC curve without an interval, for training to watch; None where a class is missing.

    Args:
        labels: N of 0 and 1; NaN = unlabelled, left out.
        scores: N, higher means more likely positive; ties count half.

    Raises:
        ValueError: if lengths differ, a label is neither 0 nor 1, or a score is not finite.

    >>> auc_value([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.75
    """
    cases = one_score(labels, scores, None)
    return None if missing_class(cases) else float(placements(cases)[0].mean())


def placements(cases: Cases) -> tuple[FloatArray, FloatArray]:
    """AUC by seed, and by case its first-order share in the error of their mean.

    Source: DeLong et al. 1988, eq. 4-5 (placement values); by sorting, as in Sun and Xu 2014, IEEE Signal
    Process Lett 21:1389.
    """
    num_positive = int(cases.y.sum())
    num_negative = cases.y.size - num_positive
    areas, share = np.empty(cases.p.shape[0]), np.zeros(cases.y.size)
    for s, scores in enumerate(cases.p):
        positive, negative = scores[cases.y], scores[~cases.y]
        beaten = _rank_among(positive, np.sort(negative)) / num_negative
        losing = 1 - _rank_among(negative, np.sort(positive)) / num_positive
        areas[s] = beaten.mean()
        share[cases.y] += (beaten - areas[s]) / num_positive
        share[~cases.y] += (losing - areas[s]) / num_negative
    return areas, share / len(areas)


def _rank_among(values: FloatArray, others: FloatArray) -> FloatArray:
    # In sorted order the searches walk through memory instead of jumping: three times as fast.
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    rank = np.empty(values.size)
    rank[order] = (np.searchsorted(others, ordered, "left") + np.searchsorted(others, ordered, "right")) / 2
    return rank


class _Ranking:
    """Cases sorted by falling score once, so that a resample costs two running sums and no sort."""

    def __init__(self, y: BoolArray, scores: FloatArray, patient: IntArray) -> None:
        order = np.argsort(-scores, kind="stable")
        ordered, positives = scores[order], np.flatnonzero(y[order])
        ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
        # Precision is read at the last case of each run of ties that holds a positive.
        self._ends = ends[np.unique(np.searchsorted(ends, positives))]
        self._hits = np.searchsorted(positives, self._ends, side="right") - 1
        self._patient = patient[order][: self._ends[-1] + 1]
        self._positives = positives

    def average_precision(self, weights: Weights) -> FloatArray:
        """R: average precision of each resample, NaN without positives."""
        result = np.empty(len(weights))
        for rows in chunks(len(weights), self._patient.size):
            drawn = np.take(weights[rows], self._patient, axis=1)
            calls = np.cumsum(drawn, axis=1, dtype=np.int32)[:, self._ends]
            hits = np.cumsum(drawn[:, self._positives], axis=1, dtype=np.int32)[:, self._hits]
            gained = np.diff(hits, axis=1, prepend=0)
            with np.errstate(invalid="ignore"):
                result[rows] = (gained * (hits / np.maximum(calls, 1))).sum(axis=1) / hits[:, -1]
        return result


def average_precision(cases: Cases, weights: Weights) -> Part:
    """The sum of precision times gain in recall over distinct scores; ties enter together."""
    n = cases.y.size
    if not cases.y.any():
        return undefined("undefined: no positives" if n else "too few: no cases", n, nothing(cases))
    rankings = [_Ranking(cases.y, scores, cases.patient) for scores in cases.p]
    everyone = np.ones((1, cases.num_patients), dtype=np.uint8)
    by_seed = np.concatenate([ranking.average_precision(everyone) for ranking in rankings])
    replicates = np.mean([ranking.average_precision(weights) for ranking in rankings], axis=0)
    return replicated("average_precision", by_seed, replicates, n, cases.effective_patients(cases.y))
