"""Whether a served model still answers right, once labels have come: live metrics against what was declared."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy

from cadx.drift import called
from cadx.metrics import LEVEL, score, share_of
from cadx.types import Estimate, Task

OUTCOMES = ("sensitivity", "specificity", "ppv", "npv", "auc", "calibration_slope", "calibration_intercept")
"""Metrics that have an interval in closed form: a watch must not wait for a bootstrap."""
COVERAGE = "coverage"
SHARES = ("sensitivity", "specificity", "ppv", "npv", COVERAGE)


class Outcome(NamedTuple):
    """One live metric of one class.

    Attributes:
        name: in `OUTCOMES`, or "coverage": the share of conformal sets that hold the class, of the images that are
            of that class. It is what such sets promise where patients have one image each.
        of: the class.
        estimate: with its 95 % interval; images are taken as independent.
        at_least: the lowest declared value; None where nothing was declared.
        at_most: the highest.
        broken: whether what was seen excludes what was declared, allowing for the number of declared values: a share
            by the exact binomial test, any other metric by its interval, widened.
    """

    name: str
    of: str
    estimate: Estimate
    at_least: float | None
    at_most: float | None
    broken: bool


def live_outcomes(
    answers: pd.DataFrame,
    *,
    task: Task,
    classes: Sequence[str],
    positive: str | None,
    at_least: Mapping[str, float],
    at_most: Mapping[str, float],
    alpha: float,
) -> list[Outcome]:
    """The metrics of answered requests whose labels are known.

    Args:
        answers: rows of `request_log.read_requests` with `label_<class>` beside them.
        task: the model's. Of a detector, an image counts as positive for a class if any box of it should be there.
        classes: the model's.
        positive: of a binary task, whose metrics are those of this class alone.
        at_least: metric -> what is declared, of each class.
        at_most: likewise.
        alpha: share of looks in which any declared value, though it holds, may count as broken. The intervals
            are widened to that (Bonferroni), each distance from the estimate in proportion.
    """
    labels = np.column_stack([answers[f"label_{name}"] for name in classes]).astype(np.float64)
    if task in ("binary", "multiclass"):  # half a label is none
        labels[np.isnan(labels).any(axis=1)] = np.nan
    scored_as: Task = "multilabel" if task == "detection" else task
    scores = score(
        labels,
        np.column_stack([answers[f"prob_{name}"] for name in classes]),
        np.column_stack([called(answers, name) for name in classes]),
        task=scored_as,
        classes=classes,
        positive=positive,
        resamples=0,
    )
    found = [
        (name, of, scores.by_class[of][name])
        for of in ([positive] if positive else classes)
        for name in OUTCOMES
        # A box's score is no probability.
        if not (task == "detection" and name.startswith("calibration"))
    ]
    if answers["prediction_set"].notna().any():
        found += [(COVERAGE, name, _coverage(answers, name)) for name in classes]
    declared = sum((name in at_least) + (name in at_most) for name, _, _ in found)
    widening = scipy.special.ndtri(1 - alpha / max(declared, 1)) / scipy.special.ndtri(0.5 + LEVEL / 2)
    return [
        Outcome(
            name,
            of,
            estimate,
            at_least.get(name),
            at_most.get(name),
            _is_share_broken(estimate, at_least.get(name), alpha / max(declared, 1))
            if name in SHARES
            else _is_broken(estimate, at_least.get(name), at_most.get(name), float(widening)),
        )
        for name, of, estimate in found
    ]


def _coverage(answers: pd.DataFrame, name: str) -> Estimate:
    """Of the cases that have a set and are of the class: the share whose set holds it."""
    sets = answers.loc[answers["prediction_set"].notna() & (answers[f"label_{name}"] == 1), "prediction_set"]
    return share_of([name in said for said in sets])


def _is_share_broken(estimate: Estimate, at_least: float | None, level: float) -> bool:
    # Exactly: of ten positives, Wilson's interval excludes .95 at eight hits, which chance gives once in twelve.
    if at_least is None or estimate.value is None:
        return False
    return bool(scipy.stats.binom.cdf(round(estimate.value * estimate.n), estimate.n, at_least) < level)


def _is_broken(estimate: Estimate, at_least: float | None, at_most: float | None, widening: float) -> bool:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return False
    highest = estimate.value + (estimate.high - estimate.value) * widening
    lowest = estimate.value - (estimate.value - estimate.low) * widening
    return (at_least is not None and highest < at_least) or (at_most is not None and lowest > at_most)
