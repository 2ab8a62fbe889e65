"""Sets of classes that hold the truth as often as was declared: split conformal prediction.

A set is made of every class that the calibration split does not contradict: class k belongs to it unless the
probability of k is lower than that of nearly all calibration cases that truly are k. One quantile per class
(class-conditional, or Mondrian): the rare class is covered as often as the frequent one, and a shift of prevalence
alone changes nothing.

    Source: Vovk, Gammerman and Shafer 2005, Algorithmic Learning in a Random World, section 4.5; as score 1 - p
    (least ambiguous sets): Sadinle, Lei and Wasserman 2019, JASA 114:223.

What holds. A new patient from where the calibration patients came, and an image of class k drawn from those of that
patient: the set holds k with a probability of at least `coverage`, over the draw of both splits. Images of one
patient are alike, so patients are what is counted: each has the weight 1, shared out among the images
(Lee, Barber and Willett 2023, "Distribution-free inference with hierarchical data", section 3; with one image a patient
it is the usual rule). It does not hold at another site, for one patient in particular, or within one calibration: with
n patients the share that is covered later varies as Beta(k, n + 1 - k) with k = ceil((n + 1) coverage).
"""

import math
from collections.abc import Sequence

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from cadx.metrics.estimates import patient_codes
from cadx.types import Conformal, Task

BoolArray = NDArray[np.bool_]


def fit(
    probabilities: ArrayLike,
    labels: ArrayLike,
    task: Task,
    classes: Sequence[str],
    *,
    coverage: float = 0.9,
    patients: ArrayLike | None = None,
) -> Conformal:
    """The quantiles of each class, from the calibration split.

    Args:
        probabilities: N K, calibrated.
        labels: N K of 0 and 1, NaN = unlabelled.
        task: multilabel tasks get two quantiles a class, of its presence and of its absence.
        classes: K names.
        coverage: above 0 and below 1.
        patients: N, anything that tells patients apart; None = all differ.

    Raises:
        ValueError: if shapes differ.

    >>> fit([[0.8, 0.2], [0.4, 0.6], [0.1, 0.9]], [[1, 0], [0, 1], [0, 1]], "binary", "ab", coverage=0.6).quantiles
    {'a': 1.0, 'b': 0.4}
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if p.ndim != 2 or p.shape != y.shape or p.shape[1] != len(classes):
        raise ValueError(f"probabilities: shape {p.shape}, labels {y.shape}; give N {len(classes)} of both")
    code = patient_codes(patients, np.ones(len(p), dtype=bool))
    quantiles, absent, counts, images = {}, {}, {}, {}
    for column, name in enumerate(classes):
        present = y[:, column] == 1
        quantiles[name] = _quantile(1 - p[present, column], code[present], coverage)
        counts[name], images[name] = np.unique(code[present]).size, int(present.sum())
        if task == "multilabel":
            missing = y[:, column] == 0
            absent[name] = _quantile(p[missing, column], code[missing], coverage)
    return Conformal(coverage=coverage, quantiles=quantiles, absent=absent, patients=counts, images=images)


def possible(probabilities: ArrayLike, conformal: Conformal, classes: Sequence[str]) -> BoolArray:
    """Which classes cannot be ruled out, N K bool: the prediction sets.

    >>> possible([[0.7, 0.3]], Conformal(coverage=0.9, quantiles={"a": 0.4, "b": 0.6}), ["a", "b"]).tolist()
    [[True, False]]
    """
    quantiles = np.array([conformal.quantiles[name] for name in classes])
    return np.asarray(1 - np.asarray(probabilities, dtype=np.float64) <= quantiles, dtype=bool)


def refers(
    probabilities: ArrayLike, decisions: ArrayLike, conformal: Conformal, classes: Sequence[str]
) -> BoolArray:
    """Which of N cases a person must look at, because the sets do not say what was decided, and nothing else.

    In single-label tasks that is where the set is not the called class alone; in multilabel ones where of any class
    both or neither of presence and absence are possible, or the one that was not decided.

    Args:
        probabilities: N K.
        decisions: N K bool.
        conformal: what `fit` gave.
        classes: K names.

    >>> sets = Conformal(coverage=0.9, quantiles={"a": 0.4, "b": 0.6})
    >>> refers([[0.7, 0.3], [0.6, 0.4]], [[True, False], [True, False]], sets, ["a", "b"]).tolist()
    [False, True]
    """
    there = possible(probabilities, conformal, classes)
    called = np.asarray(decisions, dtype=bool)
    contradicted = there != called
    if conformal.absent:
        limits = np.array([conformal.absent[name] for name in classes])
        contradicted |= (np.asarray(probabilities, dtype=np.float64) <= limits) == called
    return np.asarray(contradicted.any(axis=1), dtype=bool)


def expected_range(patients: int, coverage: float) -> tuple[float, float]:
    """Where the coverage of one calibration on so many patients lies in 95 of 100: (low, high).

    Source: Vovk 2012, ACML, "Conditional validity of inductive conformal predictors", Proposition 2a, for one image a
    patient and no ties; (1, 1) where the patients are too few to rule anything out.

    >>> [round(limit, 2) for limit in expected_range(100, 0.9)]
    [0.84, 0.95]
    """
    rank = math.ceil((patients + 1) * coverage - 1e-9)
    if rank > patients:
        return 1.0, 1.0
    low, high = scipy.special.betaincinv(rank, patients + 1 - rank, [0.025, 0.975])
    return float(low), float(high)


def _quantile(scores: NDArray[np.float64], code: NDArray[np.intp], coverage: float) -> float:
    """The least score that, with all lower ones, holds `coverage` of the patients and one more; 1 where none does."""
    _, which, size = np.unique(code, return_inverse=True, return_counts=True)
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum((1 / size[which])[order])
    # The patient to come counts as one whose scores are beyond all others.
    enough = np.flatnonzero(reached >= coverage * (size.size + 1) - 1e-9)
    return float(scores[order][enough[0]]) if enough.size else 1.0
