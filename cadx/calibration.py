"""What turns logits into probabilities that mean what they say, and probabilities into decisions.

Everything here is fitted on the calibration split and frozen in the bundle. Float64 throughout: at 2.2e-16
of 1 a float32 probability has long been 1.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from cadx.metrics.estimates import patient_codes, resample
from cadx.types import Knots, Task

FloatArray = NDArray[np.float64]

MIN_TEMPERATURE = 0.05
MAX_TEMPERATURE = 20.0
"""Bounds of the fitted temperature. Logits that separate the classes would have it fall to 0, so that every
probability is 0 or 1; logits that say nothing would have it rise without end."""

MAX_BIAS = 20.0
"""Bound of a fitted bias, in logits."""


def fit_temperature(logits: ArrayLike, labels: ArrayLike, task: Task) -> float:
    """The temperature, within 0.05..20, that makes the labels likeliest given logits / temperature.

    Args:
        logits: N K.
        labels: N K of 0 and 1, NaN = unlabelled; one-hot in binary and multiclass tasks.
        task: binary and multiclass take the softmax, multilabel the sigmoid of each column.

    Raises:
        ValueError: if shapes differ, a logit is not finite, or nothing is labelled.

    Source: Guo et al. 2017, ICML, section 4.2. The likelihood is concave in 1 / temperature, so the root of
    its derivative is the one maximum; bracketing finds it to the last digits, without a start to choose.

    >>> fit_temperature([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]], [[1, 0], [1, 0], [0, 1]], "binary").__round__(4)
    2.8854
    """
    z, y = _checked(logits, labels)
    known = np.isfinite(y) if task == "multilabel" else np.isfinite(y).all(axis=1)
    z, y = z[known], y[known]
    if z.size == 0:
        raise ValueError("labels: no labelled case to fit a temperature on; give a larger calibration split")

    def slope(sharpness: float) -> float:
        excess = apply(z, 1 / sharpness, task) - y
        return float((excess * z).sum()) / len(z)

    flattest, sharpest = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    if slope(sharpest) <= 0:
        return MIN_TEMPERATURE
    if slope(flattest) >= 0:
        return MAX_TEMPERATURE
    return 1 / float(scipy.optimize.brentq(slope, flattest, sharpest, xtol=1e-14, rtol=1e-14))


def fit_temperature_and_bias(logits: ArrayLike, labels: ArrayLike, task: Task) -> tuple[float, FloatArray]:
    """The temperature, and a bias per class (K), that make the labels likeliest given logits / temperature + bias.

    A balanced sampler teaches that all classes are equally frequent. A temperature cannot undo that shift; a
    bias does. Binary and multiclass biases sum to 0, since the softmax knows only their differences.

    Args:
        logits: N K.
        labels: N K of 0 and 1, NaN = unlabelled; one-hot in binary and multiclass tasks. Each class needs a
            case with and one without it, or its bias runs to the bound of 20.
        task: as in `fit_temperature`.

    Raises:
        ValueError: as `fit_temperature`.

    Source: Alexandari, Kundaje and Shrikumar 2020, ICML, "Maximum Likelihood with Bias-Corrected Calibration is
    Hard-To-Beat at Label Shift Adaptation", section 3; for two classes it is Platt 1999. Concave, so that the
    start, the best temperature alone, decides nothing.
    """
    start = np.concatenate([[1 / fit_temperature(logits, labels, task)], np.zeros(np.shape(logits)[1])])
    z, y = _checked(logits, labels)
    known = np.isfinite(y) if task == "multilabel" else np.isfinite(y).all(axis=1, keepdims=True) & (y == y)
    target = np.where(known, y, 0.0)

    def loss(parameters: FloatArray) -> tuple[float, FloatArray]:
        sharpness, bias = parameters[0], parameters[1:]
        scaled = sharpness * z + bias
        if task == "multilabel":
            terms = -scipy.special.log_expit(np.where(target > 0, scaled, -scaled))
            excess = scipy.special.expit(scaled) - target
        else:
            terms = -target * scipy.special.log_softmax(scaled, axis=1)
            excess = scipy.special.softmax(scaled, axis=1) - target
        excess = np.where(known, excess, 0.0)
        gradient = np.concatenate([[(excess * z).sum()], excess.sum(axis=0)]) / len(z)
        return float(np.where(known, terms, 0.0).sum()) / len(z), gradient

    bounds = [(1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE), *[(-MAX_BIAS, MAX_BIAS)] * (len(start) - 1)]
    found = scipy.optimize.minimize(
        loss,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000},
    ).x
    bias: FloatArray = found[1:] if task == "multilabel" else found[1:] - found[1:].mean()
    return float(1 / found[0]), bias


def apply(logits: ArrayLike, temperature: float, task: Task, bias: ArrayLike = ()) -> FloatArray:
    """Probabilities float64 of the shape of `logits`: softmax over the last axis, or sigmoid for multilabel.

    Args:
        logits: ... K.
        temperature: by which they are divided.
        task: what becomes of them.
        bias: K, added to each class's scaled logit; empty for none.

    Raises:
        ValueError: if the temperature is not positive.

    >>> apply([[2.0, 0.0]], 2.0, "binary").round(3).tolist()
    [[0.731, 0.269]]
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: must be above 0; fit it again")
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    if np.size(bias):
        scaled = scaled + np.asarray(bias, dtype=np.float64)
    probabilities: FloatArray = (
        scipy.special.expit(scaled) if task == "multilabel" else scipy.special.softmax(scaled, axis=-1)
    )
    return probabilities


def fit_isotonic(
    probabilities: ArrayLike, labels: ArrayLike, task: Task, classes: Sequence[str], positive: str | None
) -> dict[str, Knots]:
    """The rising curve of each class that fits its observed shares best: of the positive class in binary tasks.

    It bends where a temperature cannot, and wants more data: some hundred cases of each class.

    Args:
        probabilities: N K, of `apply`.
        labels: N K of 0 and 1, NaN = unlabelled.
        task: in multiclass tasks each class is fitted against the rest, and the results brought to a sum of 1.
        classes: K names.
        positive: the positive class of a binary task.

    Raises:
        ValueError: if a class has no labelled case.

    Source: Zadrozny and Elkan 2002, KDD, "Transforming classifier scores into accurate multiclass probability
    estimates". A case with and one without the class are added at the lowest and at the highest probability, so that
    for n cases alike at an end it says 1 / (n + 2) or its complement (Laplace's rule): no data proves a probability
    of 0, and few do not come near.

    >>> knots = fit_isotonic([[0.9, 0.1], [0.2, 0.8]], [[1, 0], [0, 1]], "binary", ["well", "sick"], "sick")
    >>> knots["sick"].calibrated
    (0.3333333333333333, 0.6666666666666666)
    """
    from sklearn.isotonic import IsotonicRegression

    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    knots = {}
    for column, name in enumerate(classes):
        if task == "binary" and name != positive:
            continue
        known = ~np.isnan(y[:, column])
        if not known.any():
            raise ValueError(f"labels: no labelled case of class {name!r} to fit a curve on")
        x = p[known, column]
        fit = IsotonicRegression().fit(
            [*x, x.min(), x.min(), x.max(), x.max()], [*y[known, column], 0, 1, 0, 1]
        )
        knots[name] = Knots(probability=fit.X_thresholds_.tolist(), calibrated=fit.y_thresholds_.tolist())
    return knots


def apply_isotonic(
    probabilities: ArrayLike, knots: Mapping[str, Knots], task: Task, classes: Sequence[str]
) -> FloatArray:
    """Probabilities ... K after the curves of `fit_isotonic`; unless multilabel they sum to 1 again.

    >>> knots = {"sick": Knots(probability=[0.2, 0.4], calibrated=[0.1, 0.9])}
    >>> apply_isotonic([[0.7, 0.3]], knots, "binary", ["well", "sick"]).round(3).tolist()
    [[0.5, 0.5]]
    """
    p = np.array(probabilities, dtype=np.float64)
    for column, name in enumerate(classes):
        if name in knots:
            p[..., column] = np.interp(p[..., column], knots[name].probability, knots[name].calibrated)
    if task == "binary":
        (positive,) = (list(classes).index(name) for name in knots)
        p[..., 1 - positive] = 1 - p[..., positive]
    elif task == "multiclass":
        p /= p.sum(axis=-1, keepdims=True)
    return p


def at_prevalence(
    probabilities: ArrayLike,
    before: Mapping[str, float],
    after: Mapping[str, float],
    task: Task,
    classes: Sequence[str],
) -> FloatArray:
    """Probabilities ... K for a population in which the classes have other shares; what they look like stays.

    A classifier that was calibrated where a tenth is ill says too much where a hundredth is.

    Args:
        probabilities: calibrated where the classes have the shares `before`.
        before: class -> share of cases, above 0 and below 1.
        after: class -> share, of all classes, which sum to 1, or of some in multilabel tasks.
        task: in multilabel tasks each class stands alone, against its absence.
        classes: K names.

    Raises:
        ValueError: if a class is unknown, or a share is not between 0 and 1.

    Source: Saerens, Latinne and Decaestecker 2002, Neural Comput 14:21, eq. 2.4.

    >>> even, rare = {"well": 0.5, "ill": 0.5}, {"well": 0.9, "ill": 0.1}
    >>> at_prevalence([[0.5, 0.5]], even, rare, "binary", ["well", "ill"]).tolist()
    [[0.9, 0.1]]
    """
    p = np.array(probabilities, dtype=np.float64)
    for name, share in after.items():
        if name not in classes or name not in before:
            raise ValueError(f"prevalence: no class {name!r}; the classes are {', '.join(classes)}")
        if not (0 < share < 1 and 0 < before[name] < 1):
            raise ValueError(
                f"prevalence of {name!r}: {share:g} for {before[name]:g}; both must lie between 0 and 1"
            )
    if task != "multilabel":
        weighted: FloatArray = p * np.array([after[name] / before[name] for name in classes])
        return weighted / weighted.sum(axis=-1, keepdims=True)
    for name, share in after.items():
        column = list(classes).index(name)
        p[..., column] = shifted(p[..., column], before[name], share)
    return p


def shifted(probability: ArrayLike, before: float, after: float) -> FloatArray:
    """One class's probability, or its threshold, where its share is `after` instead of `before`.

    >>> float(shifted(0.5, 0.5, 0.1).round(6))
    0.1
    """
    p = np.asarray(probability, dtype=np.float64)
    ill, well = p * after / before, (1 - p) * (1 - after) / (1 - before)
    return np.asarray(ill / (ill + well), dtype=np.float64)


def resampled_thresholds(
    scores: ArrayLike,
    labels: ArrayLike,
    patients: ArrayLike | None = None,
    *,
    sensitivity: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> FloatArray:
    """The thresholds that resamples of the patients would have chosen; resamples without positives are left out.

    Their spread says how much of the operating point is the luck of the calibration split.

    Args:
        scores: N probabilities.
        labels: N of 0 and 1, NaN = unlabelled, left out.
        patients: N, anything that tells patients apart; None = all differ.
        sensitivity: as in `operating_threshold`.
        resamples: of patients.
        seed: of the resampling.

    Raises:
        ValueError: as `operating_threshold`.

    >>> resampled_thresholds([0.1, 0.4, 0.6, 0.9], [0, 1, 0, 1], resamples=3).shape
    (3,)
    """
    operating_threshold(scores, labels, sensitivity=sensitivity)  # refuses what it cannot use
    p, y = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    code = patient_codes(patients, np.ones(p.size, dtype=bool))
    found = []
    for weights in resample(int(code.max()) + 1, resamples, seed):
        rows = np.repeat(np.arange(p.size), weights[code])
        if (y[rows] == 1).any():
            found.append(operating_threshold(p[rows], y[rows], sensitivity=sensitivity))
    return np.array(found)


def operating_threshold(scores: ArrayLike, labels: ArrayLike, *, sensitivity: float = 0.95) -> float:
    """The largest threshold that still reaches `sensitivity` here; positive is score >= threshold.

    It lies midway between the lowest score that must be positive and the next lower score (or 0), so that
    the last digits of a score, which differ between machines, decide nothing. Multilabel tasks call it on
    the column of each class.

    Args:
        scores: N probabilities.
        labels: N of 0 and 1, NaN = unlabelled, left out.
        sensitivity: to reach, above 0 and at most 1.

    Raises:
        ValueError: if there is no positive, or an argument is out of range.

    >>> operating_threshold([0.1, 0.4, 0.6, 0.9], [0, 1, 0, 1], sensitivity=1.0)
    0.25
    """
    if not 0 < sensitivity <= 1:
        raise ValueError(f"sensitivity {sensitivity}: must be above 0 and at most 1")
    p, positive = _outcomes(scores, labels)
    found = np.sort(p[positive])[::-1]
    if found.size == 0:
        raise ValueError(
            "labels: no positive to choose an operating point on; give a larger calibration split"
        )
    # 0.07 * 100 is 7.000000000000001: without the margin one positive too many.
    lowest = float(found[max(math.ceil(sensitivity * found.size - 1e-9), 1) - 1])
    below = float(p[p < lowest].max(initial=0.0))
    middle = (lowest + below) / 2
    return middle if middle > below else lowest


def _checked(logits: ArrayLike, labels: ArrayLike) -> tuple[FloatArray, FloatArray]:
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if z.ndim != 2 or z.shape != y.shape:
        raise ValueError(f"logits: shape {z.shape}, but labels have {y.shape}; give N K of both")
    if not np.isfinite(z).all():
        raise ValueError(
            f"logits: row {np.argwhere(~np.isfinite(z))[0][0]} is not finite; the network has diverged"
        )
    return z, y


def _outcomes(scores: ArrayLike, labels: ArrayLike) -> tuple[FloatArray, NDArray[np.bool_]]:
    p, y = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if p.ndim != 1 or p.shape != y.shape:
        raise ValueError(f"scores: shape {p.shape}, but labels have {y.shape}; give N of both")
    known = ~np.isnan(y)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("scores: a value is not within 0..1; apply the temperature to logits first")
    if bool(np.any((y[known] != 0) & (y[known] != 1))):
        raise ValueError("labels: a value is neither 0 nor 1 nor NaN (unlabelled); give 1 for positives")
    return p[known], y[known] == 1
