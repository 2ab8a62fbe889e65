"""What every metric is made with: cases and their patients, resamples of patients, limits, means over classes.

A metric of one class is a `Part`: its estimate, and what a mean over classes or a difference needs of it.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from cadx.types import Config, Estimate

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.intp]
Weights = NDArray[np.uint8]
"""R P: how often each resample holds each patient."""

LEVEL = 0.95
TAILS = (50 - 50 * LEVEL, 50 + 50 * LEVEL)
"""Percentiles that an interval lies between."""
Z = 1.959963984540054
"""Quantile of the standard normal distribution at 0.5 + LEVEL / 2; written out, as scipy.special is slow to import."""
EPSILON = float(np.finfo(np.float64).eps)

# A resample without positives has no average precision. Up to this share they are left out.
_MAX_UNDEFINED_RESAMPLES = 0.05
_CHUNK_ELEMENTS = 1 << 21


class Meaning(NamedTuple):
    """What a metric says, in a line, and which values are better."""

    meaning: str
    better: Literal["higher", "lower", "near 0", "near 1", ""]


class Difference(Config):
    """A difference of two estimates with its 95 % interval and two-sided p value; None where undefined."""

    value: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    method: str


def difference_of(a: Estimate, b: Estimate) -> Difference:
    """Estimate `a` minus estimate `b` of other patients, with the limits that their own intervals imply (MOVER).

    p is below 0.05 exactly where the interval leaves out 0. Patients that are in both make it conservative.

    Source: Newcombe 1998, Stat Med 17:873, method 10; for any pair of intervals Zou and Donner 2008, eq. 3.

    >>> whole = Estimate(value=0.9, low=0.8, high=0.95, n=50, method="")
    >>> round(difference_of(whole, whole).low, 3)
    -0.112
    """
    n = a.n + b.n
    for part in (a, b):
        if part.value is None or part.low is None or part.high is None:
            return Difference(value=None, low=None, high=None, p=None, n=n, method=part.method)
    assert a.value is not None and a.low is not None and a.high is not None  # noqa: PT018
    assert b.value is not None and b.low is not None and b.high is not None  # noqa: PT018
    value = a.value - b.value
    down = math.hypot(a.value - a.low, b.high - b.value)
    up = math.hypot(a.high - a.value, b.value - b.low)
    towards_zero = down if value > 0 else up
    p = (
        1.0
        if value == 0
        else float(2 * scipy.special.ndtr(-abs(value) / towards_zero * Z))
        if towards_zero
        else 0.0
    )
    return Difference(value=value, low=value - down, high=value + up, p=p, n=n, method="MOVER")


@dataclass(frozen=True)
class Cases:
    """One class against the rest on its labelled cases, for S models.

    Attributes:
        y: n, whether positive.
        p: S n, probability or score.
        called: S n, call at the operating point.
        likeliest: S n, call at argmax or 0.5.
        patient: n, 0..num_patients-1.
        num_patients: of the whole set, so that sums by patient of different classes line up.
        clustered: whether any patient of the whole set has several cases.
    """

    y: BoolArray
    p: FloatArray
    called: BoolArray
    likeliest: BoolArray
    patient: IntArray
    num_patients: int
    clustered: bool

    def by_patient(self, values: FloatArray, which: BoolArray | None = None) -> FloatArray:
        """Sums of n values by patient, over all or some of the cases."""
        patient = self.patient
        if which is not None:
            patient, values = patient[which], values[which]
        return np.bincount(patient, values, self.num_patients).astype(np.float64)

    def count_patients(self, which: BoolArray) -> int:
        """Patients among some of the cases."""
        return np.unique(self.patient[which]).size if self.clustered else int(which.sum())

    def effective_patients(self, which: BoolArray) -> float:
        """As `effective_patients`, of some of the cases."""
        return effective_patients(self.patient[which])


def one_score(labels: ArrayLike, scores: ArrayLike, patients: ArrayLike | None) -> Cases:
    """One score against one outcome as cases; the calls play no part.

    Raises:
        ValueError: if lengths differ, a label is neither 0 nor 1, or a score is not finite.
    """
    y, p = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if y.ndim != 1 or p.shape != y.shape:
        raise ValueError(f"scores: shape {p.shape}, but labels have {y.shape}; give N of both")
    if not np.isfinite(p).all():
        raise ValueError(f"scores: row {np.argmax(~np.isfinite(p))} is not a finite number")
    labelled = ~np.isnan(y)
    if np.any((y[labelled] != 0) & (y[labelled] != 1)):
        raise ValueError("labels: a value is neither 0 nor 1 nor NaN (unlabelled); give 1 for positives")
    code = patient_codes(patients, labelled)
    num_patients, none = int(code.max(initial=-1)) + 1, np.zeros((1, code.size), dtype=bool)
    return Cases(
        y[labelled] == 1, p[None, labelled], none, none, code, num_patients, num_patients < code.size
    )


def patient_codes(patients: ArrayLike | None, labelled: BoolArray) -> IntArray:
    """The labelled cases' patients as 0, 1, ..."""
    if patients is None:
        return np.arange(labelled.sum())
    names = np.asarray(patients)
    if names.shape != labelled.shape:
        raise ValueError(f"patients: {names.size} values for {labelled.size} cases; give one each")
    codes: IntArray = np.unique(names[labelled], return_inverse=True)[1]
    return codes


def effective_patients(patient: IntArray) -> float:
    """Patients with equally many cases each that are worth these: their number, if all have equally many.

    Args:
        patient: n, the number of each case's patient.

    Source: Kish 1965, Survey Sampling, section 11.7: (sum w)^2 / sum w^2, with a patient's cases as its weight.

    >>> effective_patients(np.array([0, 0, 1, 1])), effective_patients(np.array([0, 0, 0, 1, 2, 3]))
    (2.0, 3.0)
    """
    cases = np.bincount(patient).astype(np.float64)
    return float(cases.sum() ** 2 / (cases @ cases)) if cases.size else 0.0


def require_probabilities(p: FloatArray) -> None:
    """Accept numbers within 0..1.

    Raises:
        ValueError: naming the first row that holds another.
    """
    bad = ~((p >= 0) & (p <= 1 + 1e-6))
    if bad.any():
        row = np.argwhere(bad)[0][1 if p.ndim == 3 else 0]
        raise ValueError(f"probabilities: row {row} is not within 0..1; apply softmax or sigmoid first")


@dataclass(frozen=True)
class Part:
    """A metric with what an average over classes needs of it.

    Attributes:
        estimate: as reported.
        by_seed: S, NaN where undefined.
        influence: by patient, the first-order share of each in the value's error; for closed forms.
        replicates: the value in each resample, NaN where undefined; for the others.
        patients: effective ones, that the replicates rest on.
    """

    estimate: Estimate
    by_seed: FloatArray
    influence: FloatArray | None = None
    replicates: FloatArray | None = None
    patients: float = 0

    @property
    def seed_values(self) -> tuple[float | None, ...]:
        """The value of each seed, None where undefined."""
        return tuple(None if math.isnan(value) else float(value) for value in self.by_seed)

    @property
    def seed_sd(self) -> float | None:
        """The standard deviation over seeds (n - 1), None for a single one or where one is undefined."""
        if self.by_seed.size < 2 or np.isnan(self.by_seed).any():
            return None
        return float(self.by_seed.std(ddof=1))


def undefined(why: str, n: int, by_seed: FloatArray) -> Part:
    """A part without a value; `why` becomes its method."""
    return Part(Estimate(value=None, low=None, high=None, n=n, method=why), by_seed)


def missing_class(cases: Cases) -> str:
    """Why nothing can be said that needs positives and negatives; "" where there are both."""
    if cases.y.size == 0:
        return "too few: no cases"
    return "" if 0 < cases.y.sum() < cases.y.size else "too few: 1 class"


def nothing(cases: Cases) -> FloatArray:
    """S values that are undefined."""
    return np.full(cases.p.shape[0], np.nan)


def wilson(successes: ArrayLike, n: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Lower and upper 95 % limits of proportions, (0, 1) where n is 0.

    Source: Wilson 1927, JASA 22:209, as in Newcombe 1998, Stat Med 17:857, method 3.

    >>> low, high = wilson(9, 10)
    >>> round(float(low), 3), round(float(high), 3)
    (0.596, 0.982)
    """
    total = np.asarray(n, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        proportion = np.where(total > 0, np.asarray(successes, dtype=np.float64) / total, 0.5)
    return wilson_limits(proportion, total, Z)


def wilson_limits(proportion: ArrayLike, n: ArrayLike, critical: float) -> tuple[FloatArray, FloatArray]:
    """Wilson's limits of proportions out of `n`, which may be fractional, for any critical value."""
    p, total = np.asarray(proportion, dtype=np.float64), np.asarray(n, dtype=np.float64)
    square = critical**2
    # Multiplied through by n, so that n = 0 gives (0, 1) instead of a division by zero.
    centre = p * total + square / 2
    half = critical * np.sqrt(p * (1 - p) * total + square / 4)
    low, high = (centre - half) / (total + square), (centre + half) / (total + square)
    return np.where(p <= 0, 0.0, np.maximum(low, 0.0)), np.where(p >= 1, 1.0, np.minimum(high, 1.0))


def critical_value(patients: float) -> float:
    """Student's t, for a variance that was estimated over so many (effective) patients."""
    return float(scipy.special.stdtrit(max(patients - 1, 1), 0.5 + LEVEL / 2))


def estimate_of(value: float, low: Any, high: Any, n: int, method: str) -> Estimate:
    """An estimate whose limits lie around its value."""
    # A limit may pass the value by rounding alone.
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value), n=n, method=method)


def resample(num_patients: int, resamples: int, seed: int) -> Weights:
    """Multiplicities of patients drawn with replacement."""
    weights = np.empty((resamples, num_patients), dtype=np.uint8)
    generator = np.random.default_rng(seed)
    for row in weights:
        # A byte suffices: that a patient is drawn 256 times has a chance below 1e-500.
        drawn = generator.integers(max(num_patients, 1), size=num_patients, dtype=np.int32)
        row[:] = np.bincount(drawn, minlength=num_patients)
    return weights


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows of a table, each small enough for memory."""
    size = max(1, _CHUNK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def resampled_sums(weights: Weights, totals: FloatArray) -> FloatArray:
    """R J: sums over each resample of J totals by patient (P J)."""
    sums = np.empty((len(weights), totals.shape[1]))
    for rows in chunks(*weights.shape):
        sums[rows] = weights[rows].astype(np.float64) @ totals
    return sums


def replicated(name: str, by_seed: FloatArray, replicates: FloatArray, n: int, patients: float) -> Part:
    """A part with percentile limits of its replicates.

    Args:
        name: of the metric.
        by_seed: S values.
        replicates: R values of the mean over seeds, NaN where a resample leaves the metric undefined.
        n: cases.
        patients: effective ones, that the value rests on.
    """
    value = float(by_seed.mean())

    def part(low: float | None, high: float | None, method: str) -> Part:
        estimate = Estimate(value=value, low=low, high=high, n=n, method=method)
        return Part(estimate, by_seed, replicates=replicates, patients=patients)

    defined = replicates[~np.isnan(replicates)]
    method = f"patient bootstrap, percentile, {replicates.size} resamples"
    if name == "ece_if_calibrated":
        method = f"{replicates.size} outcomes drawn from the probabilities"
    elif replicates.size == 0:
        return part(None, None, "no interval: 0 resamples")
    elif defined.size < (1 - _MAX_UNDEFINED_RESAMPLES) * replicates.size:
        missing = replicates.size - defined.size
        return part(None, None, f"too few: undefined in {missing} of {replicates.size} resamples")
    elif name in ("f1", "average_precision") and value in (0.0, 1.0):
        # Every resample of a perfect set is perfect, which proves nothing.
        low, high = wilson_limits(value, patients, Z)
        return part(float(low), float(high), "Wilson, n = patients with positives (all resamples agree)")
    elif patients < 2:
        return part(None, None, f"too few: {patients:.3g} effective patients")
    elif name == "expected_calibration_error":
        # Resampling adds noise, and to a sum of absolute gaps noise only adds: shift it back.
        defined = np.maximum(defined - defined.mean() + value, 0.0)
        method += ", centred"
    low, high = np.percentile(defined, TAILS)
    return part(min(float(low), value), max(float(high), value), method)


def average(name: str, parts: Sequence[Part], what: str | None = None) -> Part:
    """The unweighted mean of the parts that are defined, with its interval; `what` says of what.

    Closed forms are joined by MOVER: (mean - low)^2 = sum_ij r_ij (v_i - low_i) (v_j - low_j) / K^2, and so
    for the upper limit.

    Source: Zou and Donner 2008, eq. 3; for correlated parts Zou 2008, Am J Epidemiol 168:212.
    """
    defined = [part for part in parts if part.estimate.value is not None]
    if not defined:
        return parts[0]
    if what is None:
        missing = len(parts) - len(defined)
        what = f"mean of {len(defined)} classes" + (f" ({missing} undefined)" if missing else "")
    by_seed = np.mean([part.by_seed for part in defined], axis=0)
    value, n = float(by_seed.mean()), max(part.estimate.n for part in defined)
    resampled = [part.replicates for part in defined if part.replicates is not None]
    if len(resampled) == len(defined):
        replicates = np.mean(resampled, axis=0)
        joined = replicated(name, by_seed, replicates, n, min(part.patients for part in defined))
        method = f"{what}; {joined.estimate.method}"
        return replace(joined, estimate=joined.estimate.model_copy(update={"method": method}))
    limits = [(part.estimate.low, part.estimate.high) for part in defined]
    if any(part.influence is None for part in defined) or any(low is None for low, _ in limits):
        method = f"{what}; no interval: one of them has none"
        return Part(Estimate(value=value, low=None, high=None, n=n, method=method), by_seed)
    influence = np.array([part.influence for part in defined])
    scale = np.linalg.norm(influence, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        # A part without variance (a sensitivity of 1) correlates with nothing.
        correlation = np.nan_to_num(influence @ influence.T / np.outer(scale, scale), posinf=0.0, neginf=0.0)
    np.fill_diagonal(correlation, 1.0)
    values = np.array([part.by_seed.mean() for part in defined])
    low, high = (
        value + sign * math.sqrt(max(0.0, float(away @ correlation @ away))) / len(defined)
        for sign, away in zip((-1, 1), (values - np.array(limits).T), strict=True)
    )
    usual, _ = Counter(part.estimate.method.split(";")[0] for part in defined).most_common(1)[0]
    method = f"{what}; MOVER of {usual}"
    return Part(estimate_of(value, low, high, n, method), by_seed, influence=influence.mean(axis=0))
