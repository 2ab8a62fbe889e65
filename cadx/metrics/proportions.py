"""Shares of cases: sensitivity, specificity, predictive values; and the difference of two models' shares."""

import math
from dataclasses import replace

import numpy as np
import scipy
from numpy.typing import ArrayLike

from cadx.doubts import ROUGHLY
from cadx.metrics.estimates import (
    BoolArray,
    Cases,
    Difference,
    Part,
    Weights,
    Z,
    critical_value,
    effective_patients,
    estimate_of,
    nothing,
    one_score,
    patient_codes,
    replicated,
    resampled_sums,
    undefined,
    wilson_limits,
)
from cadx.metrics.limits import mean_of_parts
from cadx.types import Estimate

MIN_ERRORS = 5
"""Errors below which a share's interval holds the truth more, or less, often than it says (`docs/coverage.md`)."""

MIN_PATIENTS = 30
"""Effective patients with several cases each below which the same holds.

Of 25, images being copies, 98 of 100 intervals held the truth; of 200 with a long tail of images, worth 19, 92 did.
"""


def at_threshold(
    labels: ArrayLike, scores: ArrayLike, threshold: float, patients: ArrayLike | None = None
) -> dict[str, Estimate]:
    """Sensitivity, specificity, PPV and NPV of calling score >= threshold positive.

    Args:
        labels: N of 0 and 1; NaN = unlabelled, left out.
        scores: N.
        threshold: the lowest score that is called positive.
        patients: N, as in `auc`.

    Raises:
        ValueError: as `auc`.

    >>> at_threshold([0, 1, 0, 1], [0.1, 0.4, 0.6, 0.9], 0.5)["sensitivity"].value
    0.5
    """
    cases = one_score(labels, scores, patients)
    parts = call_metrics(replace(cases, called=cases.p >= threshold))
    return {name: part.estimate for name, part in parts.items()}


def tango_difference(right_a: ArrayLike, right_b: ArrayLike, patients: ArrayLike | None = None) -> Difference:
    """Share of `right_a` minus share of `right_b` on the same cases: Tango's interval, McNemar's p value.

    The two agree: the interval leaves out 0 exactly where p is below 0.05. Patients with several cases shrink all
    counts by the design effect, the difference's variance over (effective) patients divided by that over cases.

    Args:
        right_a: N of true and false, say whether model A calls each positive (so that the share is its sensitivity).
        right_b: N, the same of model B.
        patients: N, anything that tells patients apart; None = all differ.

    Raises:
        ValueError: if lengths differ.

    Source: Tango 1998, Stat Med 17:891, eq. 11-17; McNemar 1947, Psychometrika 12:153, without continuity correction,
    which is Tango's statistic at 0; the design effect as in Rao and Scott 1992, Biometrics 48:577.

    >>> tango_difference([True] * 48 + [False] * 2, [True] * 36 + [False] * 12 + [True] * 2).low.__round__(3)
    0.061
    """
    a, b = np.asarray(right_a, dtype=bool), np.asarray(right_b, dtype=bool)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            f"right_b: shape {b.shape}, but right_a has {a.shape}; give N of both, of the same cases"
        )
    n = a.size
    if n == 0:
        return Difference(value=None, low=None, high=None, p=None, n=0, method="too few: no cases")
    code = patient_codes(patients, np.ones(n, dtype=bool))
    num_patients = int(code.max()) + 1
    gap = a.astype(np.float64) - b
    value = float(gap.mean())
    effect, critical, freedom = 1.0, Z, math.inf
    if num_patients < n:
        independent = float(((gap - value) ** 2).sum())
        by_patient = np.bincount(code, gap - value)
        patients_worth = effective_patients(code)
        freedom = max(patients_worth - 1, 1)
        clustered = float(by_patient @ by_patient) * patients_worth / freedom
        # Without any variance the cases of a patient count as one.
        effect = max(1.0, clustered / independent) if independent > 0 else n / patients_worth
        critical = critical_value(patients_worth)
    only_a, only_b, size = float((a & ~b).sum()) / effect, float((b & ~a).sum()) / effect, n / effect
    low, high = tango_limits(only_a, only_b, size, critical)
    p = 1.0
    if only_a != only_b:
        statistic = abs(only_a - only_b) / math.sqrt(only_a + only_b)
        p = float(2 * scipy.special.stdtr(freedom, -statistic))
    method = "Tango, McNemar" if num_patients == n else "Tango, McNemar, effective n over patients"
    return Difference(value=value, low=min(low, value), high=max(high, value), p=p, n=n, method=method)


def tango_limits(only_a: float, only_b: float, n: float, critical: float = Z) -> tuple[float, float]:
    """The score limits of (only_a - only_b) / n, the counts being the discordant pairs of n; fractions will do.

    Source: Tango 1998, Stat Med 17:891, eq. 14-17.
    """

    def statistic(delta: float) -> float:
        linear = -only_a - only_b + (2 * n - only_a + only_b) * delta
        constant = -only_b * delta * (1 - delta)
        root = math.sqrt(max(linear * linear - 8 * n * constant, 0.0))
        variance = n * ((root - linear) / (2 * n) + delta * (1 - delta))
        return (only_a - only_b - n * delta) / math.sqrt(max(variance, 1e-300))

    value = (only_a - only_b) / n

    def limit(end: float) -> float:
        if abs(value - end) < 1e-12:
            return end
        # At `value` the statistic is 0; just inside the end it is as large as it gets.
        inside, target = end * (1 - 1e-9), -end * critical
        if (statistic(inside) - target) * -end < 0:
            return end
        return float(
            scipy.optimize.brentq(lambda delta: statistic(delta) - target, inside, value, xtol=1e-12)
        )

    return limit(-1.0), limit(1.0)


def predictive_values(sensitivity: Estimate, specificity: Estimate, prevalence: float) -> dict[str, Estimate]:
    """PPV and NPV where a share `prevalence` of cases is positive, from sensitivity and specificity found elsewhere.

    It holds where the classes look there as they do here, and only their shares differ. The interval is that of the
    likelihood ratio, joined from the two intervals by MOVER, and carried through Bayes' rule.

    Args:
        sensitivity: with its interval.
        specificity: with its interval, of other patients than the sensitivity, or nearly.
        prevalence: within 0..1, known, not estimated.

    Raises:
        ValueError: if the prevalence lies outside of 0..1.

    Source: Mercaldo, Lau and Zhou 2007, Stat Med 26:2170; MOVER for a ratio: Donner and Zou 2012, Stat
    Methods Med Res 21:347, eq. 8.

    >>> from cadx.metrics import at_threshold
    >>> found = at_threshold([0] * 90 + [1] * 10, [0.1] * 81 + [0.9] * 18 + [0.1], 0.5)
    >>> round(predictive_values(found["sensitivity"], found["specificity"], 0.01)["ppv"].value, 3)
    0.083
    """
    if not 0 < prevalence < 1:
        raise ValueError(f"prevalence {prevalence}: it must lie between 0 and 1")
    return {
        "ppv": _posterior("ppv", sensitivity, _complement(specificity), prevalence),
        "npv": _posterior("npv", specificity, _complement(sensitivity), 1 - prevalence),
    }


def _complement(estimate: Estimate) -> Estimate:
    value, low, high = (None if x is None else 1 - x for x in (estimate.value, estimate.high, estimate.low))
    return estimate.model_copy(update={"value": value, "low": low, "high": high})


def _posterior(name: str, hit: Estimate, alarm: Estimate, prior: float) -> Estimate:
    """Bayes' rule: prior * hit / (prior * hit + (1 - prior) * alarm), with the limits of the ratio hit / alarm."""
    n = hit.n + alarm.n
    for part in (hit, alarm):
        if part.value is None or part.low is None or part.high is None:
            return Estimate(value=None, low=None, high=None, n=n, method=part.method)
    assert hit.value is not None
    assert alarm.value is not None
    share, total = prior * hit.value, prior * hit.value + (1 - prior) * alarm.value
    if total == 0:
        return Estimate(value=None, low=None, high=None, n=n, method=f"undefined: {name} of no calls")

    def at(ratio: float) -> float:
        return 1.0 if math.isinf(ratio) else prior * ratio / (prior * ratio + 1 - prior)

    low, high = _ratio_limits(hit, alarm)
    method = f"MOVER of the likelihood ratio, at a prevalence of {prior if name == 'ppv' else 1 - prior:g}"
    doubts = [part.method.partition("; ")[2] for part in (hit, alarm) if "too few" in part.method]
    method = "; ".join([method, *dict.fromkeys(doubts)])
    return estimate_of(share / total, at(low), at(high), n, method)


def _ratio_limits(above: Estimate, below: Estimate) -> tuple[float, float]:
    # The sources' fractions, turned round so that nothing is divided by 0 but where the ratio has no upper limit.
    assert above.value is not None
    assert above.low is not None
    assert above.high is not None
    assert below.value is not None
    assert below.low is not None
    assert below.high is not None
    product = above.value * below.value
    top, bottom = above.low * (2 * above.value - above.low), below.high * (2 * below.value - below.high)
    under = product + math.sqrt(max(product**2 - top * bottom, 0.0))
    low = top / under if under > 0 else 0.0
    top, bottom = above.high * (2 * above.value - above.high), below.low * (2 * below.value - below.low)
    over = product + math.sqrt(max(product**2 - top * bottom, 0.0))
    return low, over / bottom if bottom > 0 else math.inf


def share(
    cases: Cases,
    right: BoolArray,
    among: BoolArray,
    empty: str,
    *,
    added_variance: float = 0.0,
    each_patient: bool = False,
) -> Part:
    """The share of `right` among `among` (both S n), with Wilson's interval on the effective sample size.

    Effective n is p (1 - p) / variance, with the ratio estimator's variance over patients, or over cases
    where that is larger: few patients may look more alike than they are. Where all calls are right, or all
    wrong, there is no variance, and n is the number of patients. Patients count as `Cases.effective_patients` does:
    by their heads, 200 patients with a long tail of images had intervals that held the truth in 89 of 100 sets.

    `added_variance` is that of another source of doubt, such as the choice of a threshold. With `each_patient` every
    patient weighs one, shared out among the cases, and otherwise every case.

    Source: Rao and Scott 1992, eq. 2; with seeds a case contributes the mean of its calls.
    """
    n = round(float(among.sum(axis=1).mean()))
    weight = among.astype(np.float64)
    if each_patient:
        of_patient = np.stack([cases.by_patient(one)[cases.patient] for one in weight])
        weight /= np.maximum(of_patient, 1)
    size = weight.sum(axis=1)
    with np.errstate(invalid="ignore"):
        by_seed = (right * weight).sum(axis=1) / size
    if not size.all():
        return undefined(f"undefined: {empty}", n, by_seed)
    part_of = (weight * (right - by_seed[:, None]) / size[:, None]).mean(axis=0)
    influence = cases.by_patient(part_of)
    value = float(by_seed.mean())
    which = np.asarray(among.any(axis=0))
    patients = float(cases.count_patients(which)) if each_patient else cases.effective_patients(which)
    if not cases.clustered and size.size == 1:
        effective, critical, method = float(n), Z, "Wilson"
    else:
        over_patients = float(influence @ influence) * patients / max(patients - 1, 1)
        variance = max(over_patients, float(part_of @ part_of))
        effective = value * (1 - value) / variance if variance > 0 else patients
        critical, method = critical_value(patients), "Wilson, effective n over patients"
        if each_patient:
            method += ", each weighing one"
    if added_variance > 0:
        # Towards one half (Agresti and Coull 1998), so that a share of 1 does not hide the other doubt.
        inner = (value * effective + 2) / (effective + 4)
        effective = 1 / (1 / effective + added_variance / (inner * (1 - inner)))
    low, high = wilson_limits(value, effective, critical)
    if (errors := min(value, 1 - value) * (patients if cases.clustered else n)) < MIN_ERRORS - 1e-9:
        method += f"; too few errors ({errors:.3g}): {ROUGHLY if cases.clustered else 'may be conservative'}"
    elif cases.clustered and patients < MIN_PATIENTS:
        method += f"; too few effective patients ({patients:.3g}): {ROUGHLY}"
    return Part(estimate_of(value, low, high, n, method), by_seed, influence=influence)


def share_of(right: ArrayLike, patients: ArrayLike | None = None) -> Estimate:
    """The share of N cases that are right, or of S N for S models, with the interval of `share`.

    >>> share_of([True, True, False, True]).value
    0.75
    """
    calls = np.atleast_2d(np.asarray(right, dtype=bool))
    cases = replace(
        one_score(np.ones(calls.shape[1]), calls[0], patients), p=calls.astype(float), called=calls
    )
    return share(cases, calls, np.ones_like(calls), "no cases").estimate


def call_metrics(cases: Cases) -> dict[str, Part]:
    """What is said of calls alone."""
    truth = np.broadcast_to(cases.y, cases.called.shape)
    return {
        "sensitivity": sensitivity(cases),
        "specificity": specificity(cases),
        "ppv": share(cases, truth, cases.called, "no case is called positive"),
        "npv": share(cases, ~truth, ~cases.called, "no case is called negative"),
    }


def sensitivity(cases: Cases) -> Part:
    """The share of positives that are called."""
    return share(cases, cases.called, np.broadcast_to(cases.y, cases.called.shape), "no positives")


def specificity(cases: Cases) -> Part:
    """The share of negatives that are not called."""
    return share(cases, ~cases.called, np.broadcast_to(~cases.y, cases.called.shape), "no negatives")


def balanced(found: Part, spared: Part) -> Part:
    """The mean of a sensitivity and a specificity."""
    for part in (found, spared):
        if part.estimate.value is None:
            return part
    return mean_of_parts("balanced_accuracy", [found, spared], "mean of sensitivity and specificity")


def f1(cases: Cases, weights: Weights) -> Part:
    """Twice the hits over the positives and the calls together."""
    n = cases.y.size
    if n == 0:
        return undefined("too few: no cases", 0, nothing(cases))
    values = []
    for called in cases.called:
        hits, either = (cases.y & called).astype(np.float64), cases.y.astype(np.float64) + called
        totals = np.column_stack([cases.by_patient(hits), cases.by_patient(either)])
        # The first row is the set itself.
        sums = np.vstack([totals.sum(axis=0), resampled_sums(weights, totals)])
        with np.errstate(invalid="ignore"):
            values.append(2 * sums[:, 0] / sums[:, 1])
    table = np.array(values)
    if np.isnan(table[:, 0]).any():
        return undefined("undefined: no positives and none called", n, table[:, 0])
    return replicated(
        "f1", table[:, 0], table[:, 1:].mean(axis=0), n, max(1, cases.effective_patients(cases.y))
    )
