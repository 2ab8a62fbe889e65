"""Whether a probability means what it says: calibration curve, slope, intercept and error, Brier score, log loss."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike

from cadx.metrics.estimates import (
    EPSILON,
    BoolArray,
    Cases,
    FloatArray,
    IntArray,
    Part,
    Weights,
    Z,
    chunks,
    estimate_of,
    missing_class,
    nothing,
    one_score,
    replicated,
    require_probabilities,
    resampled_sums,
    undefined,
)
from cadx.metrics.proportions import share
from cadx.types import Estimate

CALIBRATION_BINS = 10
"""Bins of equal width over 0..1, the last one closed, in the calibration curve and its error."""
_CALIBRATED_DRAWS = 200


class CalibrationCurve(NamedTuple):
    """One entry per bin that holds a case: mean probability, observed share, its Wilson limits, cases (of a model)."""

    probability: FloatArray
    observed: FloatArray
    low: FloatArray
    high: FloatArray
    n: IntArray


def calibration_curve(
    labels: ArrayLike, probabilities: ArrayLike, patients: ArrayLike | None = None
) -> CalibrationCurve:
    """Observed share of positives against mean probability, in `CALIBRATION_BINS` bins of equal width.

    Where patients have several cases the limits are Wilson's on the effective number of cases, as `share` has it. Of
    several models each bin holds the mean of those that have a case in it, and a case counts once: the limits are as
    wide as the patients allow, however many models answer about them.

    Args:
        labels: N of 0 and 1; NaN = unlabelled, left out.
        probabilities: N, or S N of S models.
        patients: N, as in `auc`.

    Raises:
        ValueError: as `auc`, or if a probability lies outside 0..1.

    >>> calibration_curve([0, 1, 1], [0.01, 0.95, 0.99]).observed.tolist()
    [0.0, 1.0]
    """
    models = [one_score(labels, row, patients) for row in np.atleast_2d(probabilities)]
    cases, p = models[0], np.concatenate([one.p for one in models])
    for row in p:
        require_probabilities(row)
    bins, rows, n = _bins(p), [], []
    for number in np.unique(bins):
        among = bins == number
        held = among.any(axis=1)
        among = among[held]
        observed = share(cases, np.broadcast_to(cases.y, among.shape), among, "no cases").estimate
        mean = np.average(p[held], axis=1, weights=among).mean()
        rows.append((mean, observed.value, observed.low, observed.high))
        n.append(observed.n)
    probability, value, low, high = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return CalibrationCurve(probability, value, low, high, np.array(n, dtype=np.intp))


def _logistic(design: FloatArray, y: BoolArray, offset: FloatArray) -> tuple[FloatArray, FloatArray] | None:
    """Coefficients (q) of a logistic regression by damped Newton steps, and the influence of each case (n q).

    None if there is no maximum, or none within the reach of float64.
    """

    def loss(coefficients: FloatArray) -> float:
        linear = design @ coefficients + offset
        return float(np.logaddexp(0, np.where(y, -linear, linear)).sum())

    coefficients = np.zeros(design.shape[1])
    now = loss(coefficients)
    for _ in range(100):
        fitted = scipy.special.expit(design @ coefficients + offset)
        gradient = design * (y - fitted)[:, None]
        hessian = design.T @ (design * (fitted * (1 - fitted))[:, None])
        if not np.linalg.cond(hessian) < 1 / EPSILON:
            return None
        step = np.linalg.solve(hessian, gradient.sum(axis=0))
        if np.abs(step).max() <= 1e-9 * max(1.0, float(np.abs(coefficients).max())):
            return coefficients, np.linalg.solve(hessian, gradient.T).T
        # Far from the maximum a full step overshoots.
        while not (then := loss(coefficients + step)) <= now * (1 + 1e-12):
            step = step / 2
        coefficients, now = coefficients + step, then
    return None


def calibration_intercept(cases: Cases) -> Part:
    """Intercept of a logistic regression of the outcome on the logit of the probability, with slope 1.

    Source: Cox 1958, Biometrika 45:562; "in the large" in Van Calster et al. 2019, BMC Med 17:230.
    """
    if missing := missing_class(cases):
        return undefined(missing, cases.y.size, nothing(cases))
    ones = np.ones((cases.y.size, 1))
    return _wald(cases, [_logistic(ones, cases.y, logit) for logit in _logits(cases.p)])


def calibration_slope(cases: Cases) -> Part:
    """Slope of a logistic regression of the outcome on the logit of the probability, intercept free.

    Source: as the intercept.
    """
    if missing := missing_class(cases):
        return undefined(missing, cases.y.size, nothing(cases))
    fits = []
    for logit in _logits(cases.p):
        positive, negative = logit[cases.y], logit[~cases.y]
        if logit.min() == logit.max():
            return undefined("undefined: constant probabilities", cases.y.size, nothing(cases))
        if positive.min() >= negative.max() or negative.min() >= positive.max():
            return undefined("undefined: the classes are separated", cases.y.size, nothing(cases))
        # Scaled, so that probabilities that barely differ do not make the matrix singular.
        centre, spread = logit.mean(), logit.std()
        design = np.column_stack([(logit - centre) / spread, np.ones_like(logit)])
        fit = _logistic(design, cases.y, np.zeros_like(logit))
        fits.append(fit and (fit[0] / spread, fit[1] / spread))
    return _wald(cases, fits)


def _logits(p: FloatArray) -> FloatArray:
    # Probabilities saturate at 1 - 2.2e-16 and may be 0: what lies beyond has no finite logit.
    logits: FloatArray = scipy.special.logit(np.clip(p, EPSILON, 1 - EPSILON))
    return logits


def _wald(cases: Cases, fits: Sequence[tuple[FloatArray, FloatArray] | None]) -> Part:
    """The first coefficient of one fit per seed, with the sandwich variance over patients."""
    n, patients = cases.y.size, np.unique(cases.patient).size
    found = [fit for fit in fits if fit is not None]
    if len(found) < len(fits):
        return undefined("undefined: the fit does not converge", n, nothing(cases))
    by_seed = np.array([coefficients[0] for coefficients, _ in found])
    influence = cases.by_patient(np.mean([shares[:, 0] for _, shares in found], axis=0))
    value = float(by_seed.mean())
    if patients < 2:
        why = "no interval: 1 patient"
        return Part(Estimate(value=value, low=None, high=None, n=n, method=why), by_seed)
    half = Z * math.sqrt(float(influence @ influence) * patients / (patients - 1))
    method = "Wald (sandwich over patients)"
    return Part(estimate_of(value, value - half, value + half, n, method), by_seed, influence=influence)


def probability_scores(cases: Cases, weights: Weights) -> dict[str, Part]:
    """Brier score, log loss and calibration error: functions of sums, so that one matrix product resamples them all."""
    n = cases.y.size
    names = ("brier", "log_loss", "expected_calibration_error")
    if n == 0:
        return {name: undefined("too few: no cases", 0, nothing(cases)) for name in names}
    values: dict[str, list[FloatArray]] = {name: [] for name in names}
    for p in cases.p:
        bins = _bins(p)
        columns = [
            np.ones(n),
            (p - cases.y) ** 2,
            surprise(np.where(cases.y, p, 1 - p)),
            *(np.where(bins == b, p - cases.y, 0.0) for b in range(CALIBRATION_BINS)),
        ]
        totals = np.column_stack([cases.by_patient(column) for column in columns])
        # The first row is the set itself.
        rows = np.vstack([totals.sum(axis=0), resampled_sums(weights, totals)])
        count, square, nats = rows[:, :3].T
        values["brier"].append(square / count)
        values["log_loss"].append(nats / count)
        values["expected_calibration_error"].append(np.abs(rows[:, 3:]).sum(axis=1) / count)
    patients = cases.effective_patients(np.ones(n, dtype=bool))
    tables = {name: np.array(found) for name, found in values.items()}
    parts = {
        name: replicated(name, table[:, 0], table[:, 1:].mean(axis=0), n, patients)
        for name, table in tables.items()
    }
    # A sum of absolute gaps lies above the true one, most where that is small: no limits around it hold the truth.
    error = parts["expected_calibration_error"]
    method = f"{error.estimate.method}; the spread of a value that lies above the true error: see ece_if_calibrated"
    parts["expected_calibration_error"] = replace(
        error, estimate=error.estimate.model_copy(update={"method": method})
    )
    return parts


def surprise(probability: FloatArray) -> FloatArray:
    """Negative logarithms of probabilities in nats, with the floor that scikit-learn's log_loss has."""
    nats: FloatArray = -np.log(np.maximum(probability, EPSILON))
    return nats


def _bins(p: FloatArray) -> IntArray:
    return np.minimum((p * CALIBRATION_BINS).astype(np.intp), CALIBRATION_BINS - 1)


def ece_if_calibrated(cases: Cases) -> Part:
    """Mean and central 95 % of the calibration error when outcomes are drawn from the probabilities.

    A patient's cases hang together as they do in the data: with a chance that follows from `_shared` each takes the
    patient's random number, else one of its own. So each outcome still has its probability, and copies of an image
    count once.

    Source: consistency resampling, Broecker and Smith 2007, Weather Forecast 22:651, which draws cases independently
    of each other, as is done here where no patient has several. The dependence within patients is our own addition;
    `docs/evidence.md` has its false alarms in simulated sets.
    """
    n = cases.y.size
    if n == 0:
        return undefined("too few: no cases", 0, nothing(cases))
    errors = np.empty((cases.p.shape[0], _CALIBRATED_DRAWS))
    for s, p in enumerate(cases.p):
        generator = np.random.default_rng(0)  # the same for each seed: they share their cases
        order = np.argsort(p, kind="stable")
        starts = np.flatnonzero(np.diff(_bins(p[order]), prepend=-1))
        # Both of a pair must take the patient's number: that has the square of one's chance.
        chance = math.sqrt(_shared(cases, p)) if cases.clustered else 0.0
        for rows in chunks(_CALIBRATED_DRAWS, n):
            draws = rows.stop - rows.start
            random = generator.random((draws, n), dtype=np.float32)
            if chance > 0:
                of_patients = generator.random((draws, cases.num_patients), dtype=np.float32)
                takes = generator.random((draws, n), dtype=np.float32) < chance
                random = np.where(takes, of_patients[:, cases.patient], random)
            gaps = np.add.reduceat((p - (random < p))[:, order], starts, axis=1)
            errors[s, rows] = np.abs(gaps).sum(axis=1) / n
    part = replicated("ece_if_calibrated", errors.mean(axis=1), errors.mean(axis=0), n, n)
    if not cases.clustered:
        return part
    method = f"{part.estimate.method}, dependent within patients as the cases are"
    return replace(part, estimate=part.estimate.model_copy(update={"method": method}))


def _shared(cases: Cases, p: FloatArray) -> float:
    """How dependent the outcomes of a patient are, within 0..1: 0 as if of different patients, 1 as if copies.

    The covariance of residuals over the pairs of a patient's cases, as a share of the largest that their
    probabilities allow, min(p, q) - p q. Only pairs in one bin count: the calibration error adds up within bins.
    Miscalibration makes residuals alike too, so it errs towards more dependence, and a wider reference. Without such
    pairs nothing is known, and nothing depends on it within bins: 1.

    Source: the largest covariance is the upper bound of Frechet and Hoeffding, as in Nelsen 2006, An Introduction to
    Copulas, section 2.5; the estimate is by moments.
    """
    _, group = np.unique(cases.patient * CALIBRATION_BINS + _bins(p), return_inverse=True)
    order = np.lexsort((p, group))
    sizes = np.bincount(group)
    first = (np.cumsum(sizes) - sizes)[group[order]]
    larger = sizes[group[order]] - 1 - (np.arange(p.size) - first)  # of each case, how many partners are

    def products(values: FloatArray) -> float:
        sums = np.bincount(group, values)
        return float(sums @ sums - values @ values) / 2

    largest = float(p[order] @ larger) - products(p)
    if largest <= EPSILON * p.size:
        return 1.0
    return min(max(products(cases.y - p) / largest, 0.0), 1.0)
