"""How well a score ranks positives above negatives: ROC and precision-recall curves, and the areas under them."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

from cadx.metrics.estimates import (
    LEVEL,
    BoolArray,
    Cases,
    Difference,
    FloatArray,
    IntArray,
    Part,
    Weights,
    Z,
    chunks,
    critical_value,
    estimate_of,
    missing_class,
    nothing,
    one_score,
    replicated,
    undefined,
)
from cadx.types import Estimate

_NO_VARIANCE = 1e-20  # rounding alone makes this much of placements that are all equal


MIN_PER_CLASS = 50
"""Patients of the rarer class below which an AUC's interval holds the truth more, or less, often than it says
(`docs/coverage.md`)."""


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


def auc(labels: ArrayLike, scores: ArrayLike, patients: ArrayLike | None = None) -> Estimate:
    """The area under the ROC curve with DeLong's, for clusters Obuchowski's, interval.

    Args:
        labels: N of 0 and 1; NaN = unlabelled, left out.
        scores: N, higher means more likely positive; ties count half.
        patients: N, anything that tells patients apart; None = all differ.

    Raises:
        ValueError: if lengths differ, a label is neither 0 nor 1, or a score is not finite.

    >>> auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]).value
    0.75
    """
    return area(one_score(labels, scores, patients)).estimate


def delong_difference(
    labels: ArrayLike, scores_a: ArrayLike, scores_b: ArrayLike, patients: ArrayLike | None = None
) -> Difference:
    """AUC of `scores_a` minus AUC of `scores_b` on the same cases, with interval and p value.

    Args:
        labels: N of 0 and 1; NaN = unlabelled, left out.
        scores_a: N.
        scores_b: N.
        patients: N, as in `auc`.

    Raises:
        ValueError: as `auc`.

    Source: DeLong et al. 1988, Biometrics 44:837; with several images a patient Obuchowski 1997, eq. 5.

    >>> delong_difference([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], [0.1, 0.2, 0.35, 0.8]).value
    -0.25
    """
    first, second = one_score(labels, scores_a, patients), one_score(labels, scores_b, patients)
    n = first.y.size
    if missing := missing_class(first):
        return Difference(value=None, low=None, high=None, p=None, n=n, method=missing)
    (auc_a, part_a), (auc_b, part_b) = _placements(first), _placements(second)
    value = float(auc_a.mean() - auc_b.mean())
    variance = _auc_variance(part_a - part_b, first)
    name = "Obuchowski, paired" if first.clustered else "DeLong, paired"
    if variance <= _NO_VARIANCE:
        if value == 0:
            return Difference(value=0.0, low=0.0, high=0.0, p=1.0, n=n, method=f"{name}: equal rankings")
        return Difference(value=value, low=None, high=None, p=None, n=n, method="too few: no variance")
    error = math.sqrt(variance)
    freedom = np.unique(first.patient).size - 1 if first.clustered else math.inf
    p = float(2 * stats.t.sf(abs(value) / error, freedom))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * error
    low, high = max(value - half, -1.0), min(value + half, 1.0)
    return Difference(value=value, low=low, high=high, p=p, n=n, method=name)


def roc(labels: ArrayLike, scores: ArrayLike) -> RocCurve:
    """The ROC curve; empty arrays where a class is missing.

    Raises:
        ValueError: as `auc`.

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
        ValueError: as `auc`.

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


def _placements(cases: Cases) -> tuple[FloatArray, FloatArray]:
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


def _auc_variance(share: FloatArray, cases: Cases) -> float:
    """The variance of the AUC whose shares by case these are; 0 where one patient holds all of a class.

    Source: Obuchowski 1997, eq. 3-5; without clusters it is DeLong's.
    """
    with_positives, with_negatives = cases.count_patients(cases.y), cases.count_patients(~cases.y)
    if min(with_positives, with_negatives) < 2:
        return 0.0
    positive, negative = cases.by_patient(share, cases.y), cases.by_patient(share, ~cases.y)
    patients = np.unique(cases.patient).size
    return (
        float(positive @ positive) * with_positives / (with_positives - 1)
        + float(negative @ negative) * with_negatives / (with_negatives - 1)
        + 2 * float(positive @ negative) * patients / (patients - 1)
    )


def area(cases: Cases) -> Part:
    """The AUC of one class against the rest."""
    n = cases.y.size
    if missing := missing_class(cases):
        return undefined(missing, n, nothing(cases))
    areas, share = _placements(cases)
    variance = _auc_variance(share, cases)
    value = float(areas.mean())
    if variance <= _NO_VARIANCE or not 0 < value < 1:
        low, high = _newcombe(value, cases.count_patients(cases.y), cases.count_patients(~cases.y))
        method = "Newcombe score (no variance between cases)"
    else:
        critical = critical_value(np.unique(cases.patient).size) if cases.clustered else Z
        half = critical * math.sqrt(variance) / (value * (1 - value))
        low, high = special.expit(special.logit(value) - half), special.expit(special.logit(value) + half)
        method = "Obuchowski (logit)" if cases.clustered else "DeLong (logit)"
    fewest = min(cases.count_patients(cases.y), cases.count_patients(~cases.y))
    if fewest < MIN_PER_CLASS:
        method += f"; too few ({fewest} in the rarer class): may be conservative"
    return Part(estimate_of(value, low, high, n, method), areas, influence=cases.by_patient(share))


def _newcombe(value: float, num_positive: int, num_negative: int) -> tuple[float, float]:
    """Score limits of an AUC from Hanley and McNeil's variance under the limit itself.

    Source: Newcombe 2006, Stat Med 25:559, method 5. With patients counted, not images, it is conservative.
    """
    extra = (num_positive + num_negative) / 2 - 1

    def excess(theta: float) -> float:
        variance = theta * (1 - theta) * (1 + extra * ((1 - theta) / (2 - theta) + theta / (1 + theta)))
        return float((value - theta) ** 2 - Z**2 * variance / (num_positive * num_negative))

    def limit(end: float) -> float:
        # At `value` itself the excess is negative, at the end positive, unless `value` is the end.
        inside = value + math.copysign(1e-9, end - value)
        return end if abs(end - value) < 1e-9 else float(optimize.brentq(excess, inside, end, xtol=1e-12))

    return limit(0.0), limit(1.0)


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
    return replicated("average_precision", by_seed, replicates, n, cases.count_patients(cases.y))
