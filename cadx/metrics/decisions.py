"""What a threshold is worth: its net benefit, and what it reaches if chosen again on other patients."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from cadx.doubts import gravest_doubt
from cadx.metrics.estimates import (
    TAILS,
    Cases,
    FloatArray,
    average,
    one_score,
    require_probabilities,
    resample,
    resampled_sums,
)
from cadx.metrics.limits import with_doubt
from cadx.metrics.proportions import share
from cadx.types import Estimate

GRID = tuple(round(0.02 * step, 2) for step in range(1, 50))
"""Thresholds at which a decision curve is drawn."""


class DecisionCurve(NamedTuple):
    """Net benefit per case at each threshold, in true positives; calling nobody has a net benefit of 0.

    `low` and `high` are pointwise 95 % limits of `model`; `everyone` is the net benefit of calling all cases.
    """

    threshold: FloatArray
    model: FloatArray
    low: FloatArray
    high: FloatArray
    everyone: FloatArray


def decision_curve(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    thresholds: Sequence[float] = GRID,
    patients: ArrayLike | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> DecisionCurve:
    """The net benefit of calling probability >= threshold: TP/n - FP/n * threshold / (1 - threshold).

    Who acts at a threshold of 0.1 accepts nine false alarms for each case found: that is the rate at which false
    positives are subtracted. The limits come from a bootstrap of whole patients. Of several models it is the mean.

    Args:
        labels: N of 0 and 1; NaN = unlabelled, left out.
        probabilities: N, or S N for S models.
        thresholds: above 0 and below 1.
        patients: N, as in `auc`.
        resamples: of patients; with 0 the limits are NaN.
        seed: of the resampling.

    Raises:
        ValueError: as `auc`, if a probability lies outside 0..1, or a threshold is not inside.

    Source: Vickers and Elkin 2006, Med Decis Making 26:565.

    >>> decision_curve([0, 1, 1], [0.2, 0.4, 0.9], thresholds=[0.5], resamples=0).model.round(3).tolist()
    [0.333]
    """
    cases = _of_models(labels, probabilities, patients)
    require_probabilities(cases.p)
    at = np.asarray(thresholds, dtype=np.float64)
    if not ((at > 0) & (at < 1)).all():
        raise ValueError(f"thresholds {list(thresholds)}: give numbers above 0 and below 1")
    odds = at / (1 - at)
    called = (cases.p[..., None] >= at).mean(axis=0)  # the share of the models that call a case
    y = cases.y[:, None]
    worth = np.hstack([called * y - odds * (called * ~y), y - odds * ~y, np.ones_like(y)])
    totals = np.stack([cases.by_patient(column) for column in worth.T], axis=1)
    whole = totals.sum(axis=0)
    with np.errstate(invalid="ignore"):
        model, everyone = np.split(whole[:-1] / whole[-1], 2)
    low = high = np.full(at.size, np.nan)
    if resamples and cases.y.size:
        wanted = [*range(at.size), totals.shape[1] - 1]
        drawn = resampled_sums(resample(cases.num_patients, resamples, seed), totals[:, wanted])
        low, high = np.percentile(drawn[:, :-1] / drawn[:, -1:], TAILS, axis=0)
    return DecisionCurve(at, model, low, high, everyone)


def with_chosen_threshold(
    labels: ArrayLike,
    scores: ArrayLike,
    threshold: ArrayLike,
    choices: ArrayLike,
    patients: ArrayLike | None = None,
) -> dict[str, Estimate]:
    """Sensitivity and specificity at `threshold`, with intervals that count how it might have been chosen otherwise.

    The variance over `choices` of each share, on these very cases, is added to the share's own: both parts are
    independent, since the threshold was chosen on other patients. Of several models it is the mean share, and each
    resample of the calibration split chooses for all of them.

    Args:
        labels: N of 0 and 1; NaN = unlabelled, left out.
        scores: N, or S N for S models.
        threshold: the one in use, or S.
        choices: R that resamples of the calibration split would have chosen (`calibration.resampled_thresholds`), or
            S R.
        patients: N, as in `auc`.

    Raises:
        ValueError: as `auc`.

    >>> found = with_chosen_threshold([0, 1, 0, 1], [0.1, 0.4, 0.6, 0.9], 0.3, [0.2, 0.3, 0.7])
    >>> found["sensitivity"].method.split(";")[1]
    " the threshold's choice counted"
    """
    cases = _of_models(labels, scores, patients)
    cases = replace(cases, called=cases.p >= np.asarray(threshold).reshape(-1, 1))
    chosen = np.atleast_2d(choices)
    found = {}
    for name, right, among, empty in (
        ("sensitivity", cases.called, cases.y, "no positives"),
        ("specificity", ~cases.called, ~cases.y, "no negatives"),
    ):
        ordered = np.sort(cases.p[:, among], axis=1)
        ranks = [np.searchsorted(one, at, side="left") for one, at in zip(ordered, chosen, strict=True)]
        below = np.mean(ranks, axis=0) / max(int(among.sum()), 1)
        variance = float(np.var(below, ddof=1)) if chosen.shape[1] > 1 else 0.0
        part = share(cases, right, np.broadcast_to(among, right.shape), empty, added_variance=variance)
        method = part.estimate.method.split(";")
        if part.estimate.value is not None:
            method.insert(1, " the threshold's choice counted")
        found[name] = part.estimate.model_copy(update={"method": ";".join(method)})
    return found


def mean_share_of(
    right: ArrayLike, patients: ArrayLike | None = None, *, each_patient: bool = False
) -> Estimate:
    """The share of N cases that are right, the mean over S models, with the interval of `share`.

    Args:
        right: S N, bool.
        patients: N, as in `auc`.
        each_patient: whether every patient weighs one, shared out among the cases, and not every case.

    >>> mean_share_of([[True, True, False, True], [True, False, False, True]]).value
    0.625
    >>> mean_share_of([[True, False, False]], ["a", "b", "b"], each_patient=True).value
    0.5
    """
    calls = np.asarray(right, dtype=bool)
    cases = replace(_of_models(np.ones(calls.shape[1]), calls, patients), called=calls)
    return share(cases, calls, np.ones_like(calls), "no cases", each_patient=each_patient).estimate


def mean_size_of(sizes: ArrayLike, largest: int, patients: ArrayLike | None = None) -> Estimate:
    """The mean of N sizes of sets, and over S models, with its interval.

    A mean size is the sum, over j = 1, 2, ..., `largest`, of the share of sets that hold at least j: their intervals
    (those of `share`) are joined by MOVER. So sets that are all of one size do not make it certain.

    Args:
        sizes: S N, whole numbers of 0..largest.
        largest: that a set can be, at least 1.
        patients: N, as in `auc`.

    >>> found = mean_size_of([[1, 1, 2, 1]], 2)
    >>> found.value, round(found.low, 2), round(found.high, 2)
    (1.25, 0.72, 1.7)
    """
    held = np.asarray(sizes)
    cases = _of_models(np.ones(held.shape[1]), held, patients)
    everything = np.ones(held.shape, dtype=bool)
    parts = [share(cases, held >= least, everything, "no cases") for least in range(1, largest + 1)]
    # The interval is about as wide as the widest of theirs, and as doubtful.
    widest = max((part.estimate for part in parts), key=lambda one: (one.high or 0) - (one.low or 0))
    mean = with_doubt(
        average("set_size", parts, "sum of the shares of sets of at least so many"), gravest_doubt([widest])
    ).estimate
    low, value, high = (None if end is None else largest * end for end in (mean.low, mean.value, mean.high))
    return mean.model_copy(update={"value": value, "low": low, "high": high})


def _of_models(labels: ArrayLike, scores: ArrayLike, patients: ArrayLike | None) -> Cases:
    """As `one_score`, for the scores of one model (N) or of several (S N)."""
    rows = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    each = [one_score(labels, row, patients) for row in rows]
    return replace(each[0], p=np.concatenate([one.p for one in each]))
