"""Classification metrics, each with a 95 % interval that knows which images share a patient.

How an interval is made (`Estimate.method` says which one it was):

    proportions   Wilson's score interval (Wilson 1927, JASA 22:209). Patients with several images, or
                  several seeds, enter through the effective sample size: the variance of the ratio
                  estimator over patients (Rao and Scott 1992, Biometrics 48:577; Saha, Miller and Wang
                  2016, Int J Biostat 12), with Student's t on the number of patients less one.
    AUC           DeLong's variance (DeLong et al. 1988, Biometrics 44:837), for clusters Obuchowski's (1997,
                  Biometrics 53:567) with t as above, on the logit scale (Pepe 2003, section 5.2). Where it
                  vanishes (an AUC of 0 or 1, constant scores, a single positive) Newcombe's score interval
                  (2006, Stat Med 25:559, method 5).
    means         of these (macro averages, balanced accuracy): MOVER, the limits of the parts joined by the
                  correlation of the parts over patients (Zou and Donner 2008, Stat Med 27:1693).
    calibration   slope and intercept: Wald with the sandwich variance over patients (Liang and Zeger 1986,
                  Biometrika 73:13).
    the rest      bootstrap of whole patients, percentile (Rutter 2000, Acad Radiol 7:413; Field and Welsh
                  2007, JRSS B 69:369). Not stratified by outcome: in a cohort the number of positives is
                  itself random, and a patient with images of both outcomes belongs to no stratum.

Several seeds are several models scored on the same patients. The value is the mean over seeds; the
interval covers the sampling of patients, which is the same for all seeds; the spread between seeds is
reported beside it, never inside it. Closed forms serve seeds too, because percentiles fail near 1: with 3
seeds, 60 positives and a sensitivity of .95 they cover .89 to .91, Wilson on the effective n .93 to .95
(20,000 simulated sets, correlation between seeds .3 to .9).

Invariants: what is undefined has the value None and a method that says why, never NaN; equal inputs and
seed give equal output.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from cadx.types import Config, Estimate, Task

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.intp]

LEVEL = 0.95
CALIBRATION_BINS = 10
"""Bins of equal width over 0..1, the last one closed, in the calibration curve and its error."""

_Z = float(special.ndtri(0.5 + LEVEL / 2))
_TAILS = (50 - 50 * LEVEL, 50 + 50 * LEVEL)
_EPSILON = float(np.finfo(np.float64).eps)
_NO_VARIANCE = 1e-20  # rounding alone makes this much of placements that are all equal
# A resample without positives has no average precision. Up to this share they are left out.
_MAX_UNDEFINED_RESAMPLES = 0.05
_CALIBRATED_DRAWS = 200
_CHUNK_ELEMENTS = 1 << 21


class Meaning(NamedTuple):
    """What a metric says, in a line, and which values are better."""

    meaning: str
    better: Literal["higher", "lower", "near 0", "near 1", ""]


METRICS: dict[str, Meaning] = {
    "auc": Meaning("probability that a random positive scores above a random negative", "higher"),
    "average_precision": Meaning(
        "precision averaged over recall steps; chance gives the prevalence", "higher"
    ),
    "sensitivity": Meaning("share of positives that are called positive at the operating point", "higher"),
    "specificity": Meaning("share of negatives that are called negative at the operating point", "higher"),
    "ppv": Meaning("share of positive calls that are right, at this prevalence", "higher"),
    "npv": Meaning("share of negative calls that are right, at this prevalence", "higher"),
    "accuracy": Meaning("share right when the likeliest class is called (multilabel: at 0.5)", "higher"),
    "accuracy_at_operating_point": Meaning("share right at the operating point", "higher"),
    "balanced_accuracy": Meaning("mean share right per class at the operating point", "higher"),
    "exact_match": Meaning("multilabel: share of cases with every labelled class right at 0.5", "higher"),
    "f1": Meaning("harmonic mean of sensitivity and PPV at the operating point", "higher"),
    "brier": Meaning("mean squared gap of probability and outcome (multiclass: over all classes)", "lower"),
    "log_loss": Meaning("mean negative log-likelihood in nats", "lower"),
    "calibration_slope": Meaning("slope of outcome on the logit: below 1 is overconfident", "near 1"),
    "calibration_intercept": Meaning("calibration in the large: above 0 is underestimated risk", "near 0"),
    "expected_calibration_error": Meaning("mean gap of observed share and probability over 10 bins", "lower"),
    "ece_if_calibrated": Meaning("what that error would be by chance if the probabilities were true", ""),
}
"""Every metric by its name in metrics.json, in the order of reports.

For multiclass and multilabel the overall value is the unweighted mean over classes, one against the
rest, except accuracy, exact_match, and the multiclass brier and log_loss, which count cases.
"""


class Confusion(Config):
    """Counts; rows are the truth, columns the call, in the order of `classes`. Means over seeds.

    Multilabel tasks have one 2 x 2 table [[tn, fp], [fn, tp]] per class instead.

    Attributes:
        classes: the order.
        at_operating_point: calls as decided.
        at_argmax: calls of the likeliest class (multilabel: at 0.5).
    """

    classes: tuple[str, ...]
    at_operating_point: tuple[Any, ...]
    at_argmax: tuple[Any, ...]


class Scores(Config):
    """Everything that `score` says of one set of cases.

    Attributes:
        n: labelled cases.
        n_patients: patients among them.
        clustered: whether any patient has several cases.
        metrics: metric -> estimate, over all classes; the positive class's in binary tasks.
        by_class: class -> metric -> estimate, one against the rest.
        by_seed: metric -> its value for each seed, None where undefined.
        between_seed_sd: metric -> standard deviation over seeds (n - 1), None for a single seed.
        confusion: counts.
    """

    n: int
    n_patients: int
    clustered: bool
    metrics: dict[str, Estimate]
    by_class: dict[str, dict[str, Estimate]]
    by_seed: dict[str, tuple[float | None, ...]]
    between_seed_sd: dict[str, float | None]
    confusion: Confusion


class Subgroup(Config):
    """What is reported of the cases that share one value of one attribute."""

    n: int
    n_positive: int
    sensitivity: Estimate
    specificity: Estimate
    auc: Estimate


class Difference(Config):
    """A paired difference of two AUCs with its 95 % interval and two-sided p value; None where undefined."""

    value: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    method: str


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


class CalibrationCurve(NamedTuple):
    """One entry per bin that holds a case: mean probability, observed share, its Wilson limits, cases."""

    probability: FloatArray
    observed: FloatArray
    low: FloatArray
    high: FloatArray
    n: IntArray


# --- Public measures of one score against one outcome -------------------------------------------------


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
    return _auc(_single(labels, scores, patients)).estimate


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
    first, second = _single(labels, scores_a, patients), _single(labels, scores_b, patients)
    n = first.y.size
    if missing := _missing_class(first):
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
    cases = _single(labels, scores, patients)
    parts = _calls(replace(cases, called=cases.p >= threshold))
    return {name: part.estimate for name, part in parts.items()}


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
    return _wilson(proportion, total, _Z)


def roc(labels: ArrayLike, scores: ArrayLike) -> RocCurve:
    """The ROC curve; empty arrays where a class is missing.

    Raises:
        ValueError: as `auc`.

    >>> roc([0, 1, 1], [0.2, 0.2, 0.9]).sensitivity.tolist()
    [0.0, 0.5, 1.0]
    """
    cases = _single(labels, scores, None)
    if _missing_class(cases):
        return RocCurve(np.empty(0), np.empty(0), np.empty(0))
    threshold, hits, calls = _thresholds(cases.y, cases.p[0])
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
    cases = _single(labels, scores, None)
    if not cases.y.any():
        return PrecisionRecallCurve(np.empty(0), np.empty(0), np.empty(0))
    threshold, hits, calls = _thresholds(cases.y, cases.p[0])
    return PrecisionRecallCurve(hits / hits[-1], hits / calls, threshold)


def calibration_curve(labels: ArrayLike, probabilities: ArrayLike) -> CalibrationCurve:
    """Observed share of positives against mean probability, in `CALIBRATION_BINS` bins of equal width.

    The limits take the cases of a bin as independent.

    Raises:
        ValueError: as `auc`, or if a probability lies outside 0..1.

    >>> calibration_curve([0, 1, 1], [0.01, 0.95, 0.99]).observed.tolist()
    [0.0, 1.0]
    """
    cases = _single(labels, probabilities, None)
    _require_probabilities(cases.p)
    bins = _bins(cases.p[0])
    n = np.bincount(bins, minlength=CALIBRATION_BINS)
    held = n > 0
    positives = np.bincount(bins, cases.y, CALIBRATION_BINS)[held]
    total = np.bincount(bins, cases.p[0], CALIBRATION_BINS)[held]
    low, high = wilson(positives, n[held])
    return CalibrationCurve(total / n[held], positives / n[held], low, high, n[held])


# --- All metrics at once ------------------------------------------------------------------------------


def score(
    labels: ArrayLike,
    probabilities: ArrayLike,
    decisions: ArrayLike,
    *,
    task: Task,
    classes: Sequence[str],
    positive: str | None = None,
    patients: ArrayLike | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Scores:
    """Every metric of `METRICS` with its interval, overall and by class.

    Args:
        labels: N K of 0 and 1, NaN = unlabelled. One-hot in binary and multiclass tasks, where an unlabelled
            case is a row of NaN.
        probabilities: N K, or S N K for S seeds scored on the same cases.
        decisions: of the same shape, bool, the calls at the operating point. Multiclass rows name exactly
            one class; in binary tasks the positive class's column decides.
        task: binary, multiclass or multilabel.
        classes: K names.
        positive: the positive class of a binary task.
        patients: N, anything that tells patients apart; None = all differ.
        resamples: of patients, for the metrics without a closed form; 0 leaves those without interval.
        seed: of the resampling. The same resamples serve all metrics, classes and seeds.

    Raises:
        ValueError: if shapes, labels, probabilities or decisions contradict the above.
    """
    data = _read(labels, probabilities, decisions, task, classes, positive, patients)
    weights = _resample(data.num_patients, resamples, seed)
    parts = {name: _by_class(data.cases(column), weights) for column, name in enumerate(data.classes)}
    overall = _overall(data, parts, positive, weights)
    return Scores(
        n=data.patient.size,
        n_patients=data.num_patients,
        clustered=data.clustered,
        metrics={name: part.estimate for name, part in overall.items()},
        by_class={c: {name: part.estimate for name, part in metrics.items()} for c, metrics in parts.items()},
        by_seed={name: _plain(part.by_seed) for name, part in overall.items()},
        between_seed_sd={name: _sd(part.by_seed) for name, part in overall.items()},
        confusion=_confusion(data),
    )


def score_subgroups(
    labels: ArrayLike,
    probabilities: ArrayLike,
    decisions: ArrayLike,
    groups: Mapping[str, ArrayLike],
    *,
    task: Task,
    classes: Sequence[str],
    positive: str | None = None,
    patients: ArrayLike | None = None,
    minimum_n: int = 20,
) -> dict[str, dict[str, Subgroup]]:
    """Sensitivity, specificity and AUC for each value of each attribute, by attribute and value.

    Args:
        labels: as in `score`; so are probabilities, decisions, task, classes, positive and patients.
        probabilities: see labels.
        decisions: see labels.
        groups: attribute -> N values, compared as text; "" and NaN become "unknown". A DataFrame of such
            columns will do. Ages are cut into bands first.
        task: see labels.
        classes: see labels.
        positive: see labels.
        patients: see labels.
        minimum_n: patients that sensitivity needs among the positives, specificity among the negatives, and
            AUC among both; below it the estimate says "too few". Multiclass and multilabel tasks average
            over the classes that have enough; `n_positive` is then that of the rarest class.

    Raises:
        ValueError: as `score`, or if an attribute has another length.
    """
    data = _read(labels, probabilities, decisions, task, classes, positive, patients)
    report: dict[str, dict[str, Subgroup]] = {}
    for attribute in groups:
        values = np.asarray(groups[attribute], dtype=object)
        if values.shape != data.labelled.shape:
            raise ValueError(
                f"subgroup {attribute}: {values.size} values for {data.labelled.size} cases; give one each"
            )
        words = np.array([_word(value) for value in values[data.labelled]], dtype=object)
        report[attribute] = {
            str(word): _subgroup(data, np.asarray(words == word, dtype=bool), positive, minimum_n)
            for word in sorted(set(words))
        }
    return report


def calculate_medical_classification_metrics(
    y_true: ArrayLike, y_pred: ArrayLike, y_prob: ArrayLike | None = None
) -> dict[str, Any]:
    """Plain values of the usual metrics, for binary, multiclass and multilabel calls; None = undefined.

    Binary metrics are those of class 1; the others are means over classes. `score` gives intervals too.

    Args:
        y_true: N integers 0..K-1, or N K of 0 and 1 for multilabel.
        y_pred: the calls, of the same shape.
        y_prob: N K; for binary tasks also N, the probability of class 1. Without it auc and
            average_precision are None.

    Returns:
        accuracy, precision, recall, f1, sensitivity, specificity, ppv, npv, auc, average_precision, and
        confusion_matrix as an integer array: K K with rows = truth, or K 2 2 for multilabel.

    Raises:
        ValueError: if shapes differ or a label is no class.

    >>> calculate_medical_classification_metrics([0, 1, 2, 2], [0, 1, 2, 1])["accuracy"]
    0.75
    """
    truth, calls = np.asarray(y_true), np.asarray(y_pred)
    if truth.shape != calls.shape:
        raise ValueError(f"y_pred: shape {calls.shape}, but y_true has {truth.shape}; give a call per label")
    given = None if y_prob is None else np.asarray(y_prob, dtype=np.float64)
    if truth.ndim == 2:
        task: Task = "multilabel"
        labels, decisions = truth, calls.astype(bool)
    else:
        whole = np.concatenate([truth, calls])
        if whole.size and (np.any(whole != np.floor(whole)) or whole.min() < 0):
            raise ValueError("y_true, y_pred: classes must be the integers 0..K-1; encode them first")
        columns = given.shape[1] if given is not None and given.ndim == 2 else 0
        num_classes = max(2, int(whole.max(initial=0)) + 1, columns)
        task = "binary" if num_classes == 2 else "multiclass"
        labels, decisions = (np.eye(num_classes)[part.astype(int)] for part in (truth, calls))
        decisions = decisions.astype(bool)
    if given is not None and task == "binary" and (given.ndim == 1 or given.shape[1] == 1):
        given = np.column_stack([1 - given.ravel(), given.ravel()])
    classes = [str(column) for column in range(labels.shape[1])]
    scores = score(
        labels,
        decisions.astype(np.float64) if given is None else given,
        decisions,
        task=task,
        classes=classes,
        positive="1" if task == "binary" else None,
        resamples=0,
    )
    values = {name: estimate.value for name, estimate in scores.metrics.items()}
    return {
        "accuracy": values["accuracy_at_operating_point"],
        "precision": values["ppv"],
        "recall": values["sensitivity"],
        "f1": values["f1"],
        "sensitivity": values["sensitivity"],
        "specificity": values["specificity"],
        "ppv": values["ppv"],
        "npv": values["npv"],
        "auc": None if given is None else values["auc"],
        "average_precision": None if given is None else values["average_precision"],
        "confusion_matrix": np.array(scores.confusion.at_operating_point, dtype=int),
    }


# --- Reading ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cases:
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


@dataclass(frozen=True)
class _Data:
    """Checked inputs: cases with at least one label."""

    y: FloatArray  # N K, NaN = unlabelled
    p: FloatArray  # S N K
    called: BoolArray  # S N K
    likeliest: BoolArray  # S N K
    patient: IntArray  # N
    num_patients: int
    clustered: bool
    task: Task
    classes: tuple[str, ...]
    labelled: BoolArray  # of the cases as given

    def cases(self, column: int, which: BoolArray | None = None) -> _Cases:
        """One class against the rest, on all or some of the cases."""
        known = ~np.isnan(self.y[:, column])
        if which is not None:
            known &= which
        return _Cases(
            y=self.y[known, column] == 1,
            p=self.p[:, known, column],
            called=self.called[:, known, column],
            likeliest=self.likeliest[:, known, column],
            patient=self.patient[known],
            num_patients=self.num_patients,
            clustered=self.clustered,
        )

    def rows(self) -> _Cases:
        """All cases, for what is counted by case and not by class; its y says nothing."""
        none = np.zeros((self.p.shape[0], self.patient.size), dtype=bool)
        return _Cases(none[0], self.p[:, :, 0], none, none, self.patient, self.num_patients, self.clustered)


def _read(
    labels: ArrayLike,
    probabilities: ArrayLike,
    decisions: ArrayLike,
    task: Task,
    classes: Sequence[str],
    positive: str | None,
    patients: ArrayLike | None,
) -> _Data:
    y = np.asarray(labels, dtype=np.float64)
    p = np.asarray(probabilities, dtype=np.float64)
    called = np.asarray(decisions)
    if task not in ("binary", "multiclass", "multilabel"):
        raise ValueError(f"task {task}: it must be binary, multiclass or multilabel")
    if y.ndim != 2 or y.shape[1] != len(classes):
        raise ValueError(
            f"labels: shape {y.shape}, but there are {len(classes)} classes; give a column for each"
        )
    if p.ndim not in (2, 3) or p.shape[-2:] != y.shape or p.shape[0] == 0 < y.shape[0]:
        raise ValueError(f"probabilities: shape {p.shape}, but labels have {y.shape}; give N K or S N K")
    if called.shape != p.shape or called.dtype != np.bool_:
        raise ValueError(f"decisions: {called.dtype} of shape {called.shape}; give bool of shape {p.shape}")
    if task == "binary" and (len(classes) != 2 or positive not in classes):
        raise ValueError(
            f"positive {positive!r}: a binary task has two classes and names one of {list(classes)}"
        )
    if bool(np.any((y != 0) & (y != 1) & ~np.isnan(y))):
        raise ValueError("labels: a value is neither 0 nor 1 nor NaN (unlabelled); correct the label columns")
    _require_probabilities(p)
    if p.ndim == 2:
        p, called = p[None], called[None]

    labelled: BoolArray = np.asarray(~np.isnan(y).all(axis=1))
    if task != "multilabel":
        wrong = labelled & (y.sum(axis=1) != 1)  # NaN beside a label makes the sum NaN: wrong, too
        if wrong.any():
            raise ValueError(
                f"labels: row {np.argmax(wrong)} does not have exactly one class, as {task} tasks need"
            )
    if task == "binary":
        assert positive is not None
        column = list(classes).index(positive)
        called = np.stack([called[..., column]] * 2, axis=-1)
        called[..., 1 - column] = ~called[..., column]
    elif task == "multiclass":
        unclear = (called.sum(axis=2) != 1).any(axis=0)
        if unclear.any():
            row = np.argmax(unclear)
            raise ValueError(
                f"decisions: row {row} does not name exactly one class, as multiclass tasks need"
            )
    likeliest = p >= 0.5 if task == "multilabel" else np.arange(y.shape[1]) == p.argmax(axis=2)[..., None]
    code = _patient_codes(patients, labelled)
    num_patients = int(code.max(initial=-1)) + 1
    return _Data(
        y=y[labelled],
        p=np.minimum(p[:, labelled], 1.0),
        called=called[:, labelled],
        likeliest=likeliest[:, labelled],
        patient=code,
        num_patients=num_patients,
        clustered=num_patients < code.size,
        task=task,
        classes=tuple(classes),
        labelled=labelled,
    )


def _single(labels: ArrayLike, scores: ArrayLike, patients: ArrayLike | None) -> _Cases:
    """One score against one outcome; the calls play no part."""
    y, p = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if y.ndim != 1 or p.shape != y.shape:
        raise ValueError(f"scores: shape {p.shape}, but labels have {y.shape}; give N of both")
    if not np.isfinite(p).all():
        raise ValueError(f"scores: row {np.argmax(~np.isfinite(p))} is not a finite number")
    labelled = ~np.isnan(y)
    if np.any((y[labelled] != 0) & (y[labelled] != 1)):
        raise ValueError("labels: a value is neither 0 nor 1 nor NaN (unlabelled); give 1 for positives")
    code = _patient_codes(patients, labelled)
    num_patients, none = int(code.max(initial=-1)) + 1, np.zeros((1, code.size), dtype=bool)
    return _Cases(
        y[labelled] == 1, p[None, labelled], none, none, code, num_patients, num_patients < code.size
    )


def _patient_codes(patients: ArrayLike | None, labelled: BoolArray) -> IntArray:
    """The labelled cases' patients as 0, 1, ..."""
    if patients is None:
        return np.arange(labelled.sum())
    names = np.asarray(patients)
    if names.shape != labelled.shape:
        raise ValueError(f"patients: {names.size} values for {labelled.size} cases; give one each")
    codes: IntArray = np.unique(names[labelled], return_inverse=True)[1]
    return codes


def _require_probabilities(p: FloatArray) -> None:
    bad = ~((p >= 0) & (p <= 1 + 1e-6))
    if bad.any():
        row = np.argwhere(bad)[0][1 if p.ndim == 3 else 0]
        raise ValueError(f"probabilities: row {row} is not within 0..1; apply softmax or sigmoid first")


def _word(value: Any) -> str:
    return "unknown" if value is None or value != value or str(value) == "" else str(value)


def _thresholds(y: BoolArray, scores: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Distinct scores, falling, and how many positives and how many cases reach each."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    return ordered[ends], np.cumsum(y[order])[ends].astype(np.float64), (ends + 1).astype(np.float64)


# --- Parts: a metric of one class, before it is averaged ----------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A metric with what an average over classes needs of it.

    Attributes:
        estimate: as reported.
        by_seed: S, NaN where undefined.
        influence: by patient, the first-order share of each in the value's error; for closed forms.
        replicates: the value in each resample, NaN where undefined; for the others.
        patients: that the replicates rest on.
    """

    estimate: Estimate
    by_seed: FloatArray
    influence: FloatArray | None = None
    replicates: FloatArray | None = None
    patients: int = 0


def _undefined(why: str, n: int, by_seed: FloatArray) -> _Part:
    return _Part(Estimate(value=None, low=None, high=None, n=n, method=why), by_seed)


def _missing_class(cases: _Cases) -> str:
    if cases.y.size == 0:
        return "too few: no cases"
    return "" if 0 < cases.y.sum() < cases.y.size else "too few: 1 class"


def _nothing(cases: _Cases) -> FloatArray:
    return np.full(cases.p.shape[0], np.nan)


def _wilson(proportion: ArrayLike, n: ArrayLike, critical: float) -> tuple[FloatArray, FloatArray]:
    p, total = np.asarray(proportion, dtype=np.float64), np.asarray(n, dtype=np.float64)
    square = critical**2
    # Multiplied through by n, so that n = 0 gives (0, 1) instead of a division by zero.
    centre = p * total + square / 2
    half = critical * np.sqrt(p * (1 - p) * total + square / 4)
    low, high = (centre - half) / (total + square), (centre + half) / (total + square)
    return np.where(p <= 0, 0.0, np.maximum(low, 0.0)), np.where(p >= 1, 1.0, np.minimum(high, 1.0))


def _ratio(cases: _Cases, right: BoolArray, among: BoolArray, empty: str) -> _Part:
    """The share of `right` among `among` (both S n), with Wilson's interval on the effective sample size.

    Effective n is p (1 - p) / variance, with the ratio estimator's variance over patients, or over cases
    where that is larger: few patients may look more alike than they are. Where all calls are right, or all
    wrong, there is no variance, and n is the number of patients.

    Source: Rao and Scott 1992, eq. 2; with seeds a case contributes the mean of its calls.
    """
    size = among.sum(axis=1)
    hits = (right & among).sum(axis=1)
    with np.errstate(invalid="ignore"):
        by_seed = hits / size
    n = round(float(size.mean()))
    if not size.all():
        return _undefined(f"undefined: {empty}", n, by_seed)
    share = (((right & among) - by_seed[:, None] * among) / size[:, None]).mean(axis=0)
    influence = cases.by_patient(share)
    value = float(by_seed.mean())
    if not cases.clustered and size.size == 1:
        low, high = _wilson(value, n, _Z)
        method = "Wilson"
    else:
        patients = cases.count_patients(np.asarray(among.any(axis=0)))
        variance = max(float(influence @ influence) * patients / max(patients - 1, 1), float(share @ share))
        effective = value * (1 - value) / variance if variance > 0 else patients
        low, high = _wilson(value, effective, _critical(patients))
        method = "Wilson, effective n over patients"
    return _Part(_estimate(value, low, high, n, method), by_seed, influence=influence)


def _critical(patients: int) -> float:
    """Student's t, for a variance that was estimated over so many patients."""
    return float(stats.t.ppf(0.5 + LEVEL / 2, max(patients - 1, 1)))


def _estimate(value: float, low: Any, high: Any, n: int, method: str) -> Estimate:
    # A limit may pass the value by rounding alone.
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value), n=n, method=method)


def _placements(cases: _Cases) -> tuple[FloatArray, FloatArray]:
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


def _auc_variance(share: FloatArray, cases: _Cases) -> float:
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


def _auc(cases: _Cases) -> _Part:
    n = cases.y.size
    if missing := _missing_class(cases):
        return _undefined(missing, n, _nothing(cases))
    areas, share = _placements(cases)
    variance = _auc_variance(share, cases)
    value = float(areas.mean())
    if variance <= _NO_VARIANCE or not 0 < value < 1:
        low, high = _newcombe(value, cases.count_patients(cases.y), cases.count_patients(~cases.y))
        method = "Newcombe score (no variance between cases)"
    else:
        critical = _critical(np.unique(cases.patient).size) if cases.clustered else _Z
        half = critical * math.sqrt(variance) / (value * (1 - value))
        low, high = special.expit(special.logit(value) - half), special.expit(special.logit(value) + half)
        method = "Obuchowski (logit)" if cases.clustered else "DeLong (logit)"
    return _Part(_estimate(value, low, high, n, method), areas, influence=cases.by_patient(share))


def _newcombe(value: float, num_positive: int, num_negative: int) -> tuple[float, float]:
    """Score limits of an AUC from Hanley and McNeil's variance under the limit itself.

    Source: Newcombe 2006, Stat Med 25:559, method 5. With patients counted, not images, it is conservative.
    """
    extra = (num_positive + num_negative) / 2 - 1

    def excess(theta: float) -> float:
        variance = theta * (1 - theta) * (1 + extra * ((1 - theta) / (2 - theta) + theta / (1 + theta)))
        return float((value - theta) ** 2 - _Z**2 * variance / (num_positive * num_negative))

    def limit(end: float) -> float:
        # At `value` itself the excess is negative, at the end positive, unless `value` is the end.
        inside = value + math.copysign(1e-9, end - value)
        return end if abs(end - value) < 1e-9 else float(optimize.brentq(excess, inside, end, xtol=1e-12))

    return limit(0.0), limit(1.0)


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
        fitted = special.expit(design @ coefficients + offset)
        gradient = design * (y - fitted)[:, None]
        hessian = design.T @ (design * (fitted * (1 - fitted))[:, None])
        if not np.linalg.cond(hessian) < 1 / _EPSILON:
            return None
        step = np.linalg.solve(hessian, gradient.sum(axis=0))
        if np.abs(step).max() <= 1e-9 * max(1.0, float(np.abs(coefficients).max())):
            return coefficients, np.linalg.solve(hessian, gradient.T).T
        # Far from the maximum a full step overshoots.
        while not (then := loss(coefficients + step)) <= now * (1 + 1e-12):
            step = step / 2
        coefficients, now = coefficients + step, then
    return None


def _calibration_intercept(cases: _Cases) -> _Part:
    """Intercept of a logistic regression of the outcome on the logit of the probability, with slope 1.

    Source: Cox 1958, Biometrika 45:562; "in the large" in Van Calster et al. 2019, BMC Med 17:230.
    """
    if missing := _missing_class(cases):
        return _undefined(missing, cases.y.size, _nothing(cases))
    ones = np.ones((cases.y.size, 1))
    return _wald(cases, [_logistic(ones, cases.y, logit) for logit in _logits(cases.p)])


def _calibration_slope(cases: _Cases) -> _Part:
    """Slope of a logistic regression of the outcome on the logit of the probability, intercept free.

    Source: as the intercept.
    """
    if missing := _missing_class(cases):
        return _undefined(missing, cases.y.size, _nothing(cases))
    fits = []
    for logit in _logits(cases.p):
        positive, negative = logit[cases.y], logit[~cases.y]
        if logit.min() == logit.max():
            return _undefined("undefined: constant probabilities", cases.y.size, _nothing(cases))
        if positive.min() >= negative.max() or negative.min() >= positive.max():
            return _undefined("undefined: the classes are separated", cases.y.size, _nothing(cases))
        # Scaled, so that probabilities that barely differ do not make the matrix singular.
        centre, spread = logit.mean(), logit.std()
        design = np.column_stack([(logit - centre) / spread, np.ones_like(logit)])
        fit = _logistic(design, cases.y, np.zeros_like(logit))
        fits.append(fit and (fit[0] / spread, fit[1] / spread))
    return _wald(cases, fits)


def _logits(p: FloatArray) -> FloatArray:
    # Probabilities saturate at 1 - 2.2e-16 and may be 0: what lies beyond has no finite logit.
    logits: FloatArray = special.logit(np.clip(p, _EPSILON, 1 - _EPSILON))
    return logits


def _wald(cases: _Cases, fits: Sequence[tuple[FloatArray, FloatArray] | None]) -> _Part:
    """The first coefficient of one fit per seed, with the sandwich variance over patients."""
    n, patients = cases.y.size, np.unique(cases.patient).size
    found = [fit for fit in fits if fit is not None]
    if len(found) < len(fits):
        return _undefined("undefined: the fit does not converge", n, _nothing(cases))
    by_seed = np.array([coefficients[0] for coefficients, _ in found])
    influence = cases.by_patient(np.mean([shares[:, 0] for _, shares in found], axis=0))
    value = float(by_seed.mean())
    if patients < 2:
        why = "no interval: 1 patient"
        return _Part(Estimate(value=value, low=None, high=None, n=n, method=why), by_seed)
    half = _Z * math.sqrt(float(influence @ influence) * patients / (patients - 1))
    method = "Wald (sandwich over patients)"
    return _Part(_estimate(value, value - half, value + half, n, method), by_seed, influence=influence)


# --- Parts that are resampled -------------------------------------------------------------------------

Weights = NDArray[np.uint8]
"""R P: how often each resample holds each patient."""


def _resample(num_patients: int, resamples: int, seed: int) -> Weights:
    """Multiplicities of patients drawn with replacement."""
    weights = np.empty((resamples, num_patients), dtype=np.uint8)
    generator = np.random.default_rng(seed)
    for row in weights:
        # A byte suffices: that a patient is drawn 256 times has a chance below 1e-500.
        drawn = generator.integers(max(num_patients, 1), size=num_patients, dtype=np.int32)
        row[:] = np.bincount(drawn, minlength=num_patients)
    return weights


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, _CHUNK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _sums(weights: Weights, totals: FloatArray) -> FloatArray:
    """R J: sums over each resample of J totals by patient (P J)."""
    sums = np.empty((len(weights), totals.shape[1]))
    for rows in _chunks(*weights.shape):
        sums[rows] = weights[rows].astype(np.float64) @ totals
    return sums


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
        for rows in _chunks(len(weights), self._patient.size):
            drawn = np.take(weights[rows], self._patient, axis=1)
            calls = np.cumsum(drawn, axis=1, dtype=np.int32)[:, self._ends]
            hits = np.cumsum(drawn[:, self._positives], axis=1, dtype=np.int32)[:, self._hits]
            gained = np.diff(hits, axis=1, prepend=0)
            with np.errstate(invalid="ignore"):
                result[rows] = (gained * (hits / np.maximum(calls, 1))).sum(axis=1) / hits[:, -1]
        return result


def _average_precision(cases: _Cases, weights: Weights) -> _Part:
    """The sum of precision times gain in recall over distinct scores; ties enter together."""
    n = cases.y.size
    if not cases.y.any():
        return _undefined("undefined: no positives" if n else "too few: no cases", n, _nothing(cases))
    rankings = [_Ranking(cases.y, scores, cases.patient) for scores in cases.p]
    everyone = np.ones((1, cases.num_patients), dtype=np.uint8)
    by_seed = np.concatenate([ranking.average_precision(everyone) for ranking in rankings])
    replicates = np.mean([ranking.average_precision(weights) for ranking in rankings], axis=0)
    return _replicated("average_precision", by_seed, replicates, n, cases.count_patients(cases.y))


def _summed(cases: _Cases, weights: Weights) -> dict[str, _Part]:
    """The metrics that are functions of sums over cases: one matrix product resamples them all."""
    n = cases.y.size
    names = ("f1", "brier", "log_loss", "expected_calibration_error")
    if n == 0:
        return {name: _undefined("too few: no cases", 0, _nothing(cases)) for name in names}
    values: dict[str, list[FloatArray]] = {name: [] for name in names}
    for p, called in zip(cases.p, cases.called, strict=True):
        bins = _bins(p)
        columns = [
            np.ones(n),
            (cases.y & called).astype(np.float64),
            cases.y.astype(np.float64) + called,
            (p - cases.y) ** 2,
            _surprise(np.where(cases.y, p, 1 - p)),
            *(np.where(bins == b, p - cases.y, 0.0) for b in range(CALIBRATION_BINS)),
        ]
        totals = np.column_stack([cases.by_patient(column) for column in columns])
        # The first row is the set itself.
        rows = np.vstack([totals.sum(axis=0), _sums(weights, totals)])
        count, hits, either, square, surprise = rows[:, :5].T
        with np.errstate(invalid="ignore"):
            values["f1"].append(2 * hits / either)
            values["brier"].append(square / count)
            values["log_loss"].append(surprise / count)
            values["expected_calibration_error"].append(np.abs(rows[:, 5:]).sum(axis=1) / count)
    parts = {}
    patients = cases.count_patients(np.ones(n, dtype=bool))
    for name in names:
        table = np.array(values[name])
        by_seed, replicates = table[:, 0], table[:, 1:].mean(axis=0)
        if np.isnan(by_seed).any():
            parts[name] = _undefined("undefined: no positives and none called", n, by_seed)
        else:
            informative = max(1, cases.count_patients(cases.y)) if name == "f1" else patients
            parts[name] = _replicated(name, by_seed, replicates, n, informative)
    return parts


def _surprise(probability: FloatArray) -> FloatArray:
    # The same floor as scikit-learn's log_loss.
    surprise: FloatArray = -np.log(np.maximum(probability, _EPSILON))
    return surprise


def _bins(p: FloatArray) -> IntArray:
    return np.minimum((p * CALIBRATION_BINS).astype(np.intp), CALIBRATION_BINS - 1)


def _ece_if_calibrated(cases: _Cases) -> _Part:
    """Mean and central 95 % of the calibration error when outcomes are drawn from the probabilities.

    Cases are drawn independently of each other.

    Source: consistency resampling, Broecker and Smith 2007, Weather Forecast 22:651.
    """
    n = cases.y.size
    if n == 0:
        return _undefined("too few: no cases", 0, _nothing(cases))
    errors = np.empty((cases.p.shape[0], _CALIBRATED_DRAWS))
    for s, p in enumerate(cases.p):
        generator = np.random.default_rng(0)  # the same for each seed: they share their cases
        order = np.argsort(p, kind="stable")
        starts = np.flatnonzero(np.diff(_bins(p[order]), prepend=-1))
        for rows in _chunks(_CALIBRATED_DRAWS, n):
            drawn = generator.random((rows.stop - rows.start, n), dtype=np.float32) < p
            gaps = np.add.reduceat((p - drawn)[:, order], starts, axis=1)
            errors[s, rows] = np.abs(gaps).sum(axis=1) / n
    return _replicated("ece_if_calibrated", errors.mean(axis=1), errors.mean(axis=0), n, n)


def _replicated(name: str, by_seed: FloatArray, replicates: FloatArray, n: int, patients: int) -> _Part:
    """A part with percentile limits of its replicates.

    Args:
        name: of the metric.
        by_seed: S values.
        replicates: R values of the mean over seeds, NaN where a resample leaves the metric undefined.
        n: cases.
        patients: that the value rests on.
    """
    value = float(by_seed.mean())

    def part(low: float | None, high: float | None, method: str) -> _Part:
        estimate = Estimate(value=value, low=low, high=high, n=n, method=method)
        return _Part(estimate, by_seed, replicates=replicates, patients=patients)

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
        low, high = _wilson(value, patients, _Z)
        return part(float(low), float(high), "Wilson, n = patients with positives (all resamples agree)")
    elif patients < 2:
        return part(None, None, "too few: 1 patient")
    elif name == "expected_calibration_error":
        # Resampling adds noise, and to a sum of absolute gaps noise only adds: shift it back.
        defined = np.maximum(defined - defined.mean() + value, 0.0)
        method += ", centred"
    low, high = np.percentile(defined, _TAILS)
    return part(min(float(low), value), max(float(high), value), method)


# --- From parts to a report ---------------------------------------------------------------------------


def _by_class(cases: _Cases, weights: Weights) -> dict[str, _Part]:
    """Every metric of one class against the rest, in the order of `METRICS`."""
    everything = np.ones_like(cases.called)
    truth = np.broadcast_to(cases.y, cases.called.shape)
    calls = _calls(cases)
    parts = {
        "auc": _auc(cases),
        "average_precision": _average_precision(cases, weights),
        **calls,
        "accuracy": _ratio(cases, cases.likeliest == truth, everything, "no cases"),
        "accuracy_at_operating_point": _ratio(cases, cases.called == truth, everything, "no cases"),
        "balanced_accuracy": _balanced(calls["sensitivity"], calls["specificity"]),
        **_summed(cases, weights),
        "calibration_slope": _calibration_slope(cases),
        "calibration_intercept": _calibration_intercept(cases),
        "ece_if_calibrated": _ece_if_calibrated(cases),
    }
    return {name: parts[name] for name in METRICS if name in parts}


def _calls(cases: _Cases) -> dict[str, _Part]:
    """What is said of calls alone."""
    truth = np.broadcast_to(cases.y, cases.called.shape)
    return {
        "sensitivity": _sensitivity(cases),
        "specificity": _specificity(cases),
        "ppv": _ratio(cases, truth, cases.called, "no case is called positive"),
        "npv": _ratio(cases, ~truth, ~cases.called, "no case is called negative"),
    }


def _sensitivity(cases: _Cases) -> _Part:
    return _ratio(cases, cases.called, np.broadcast_to(cases.y, cases.called.shape), "no positives")


def _specificity(cases: _Cases) -> _Part:
    return _ratio(cases, ~cases.called, np.broadcast_to(~cases.y, cases.called.shape), "no negatives")


def _balanced(sensitivity: _Part, specificity: _Part) -> _Part:
    for part in (sensitivity, specificity):
        if part.estimate.value is None:
            return part
    return _average("balanced_accuracy", [sensitivity, specificity], "mean of sensitivity and specificity")


def _overall(
    data: _Data, by_class: dict[str, dict[str, _Part]], positive: str | None, weights: Weights
) -> dict[str, _Part]:
    """Every metric of the task, in the order of `METRICS`."""
    if data.task == "binary":
        assert positive is not None
        return by_class[positive]
    names = list(next(iter(by_class.values())))
    overall = {name: _average(name, [parts[name] for parts in by_class.values()]) for name in names}
    cases = data.rows()
    everything = np.ones_like(cases.called)
    if data.task == "multilabel":
        right = ((data.likeliest == (data.y == 1)) | np.isnan(data.y)).all(axis=2)
        overall["exact_match"] = _ratio(cases, right, everything, "no cases")
    elif cases.y.size:
        truth = data.y == 1
        for name, calls in (("accuracy", data.likeliest), ("accuracy_at_operating_point", data.called)):
            overall[name] = _ratio(cases, (calls & truth).any(axis=2), everything, "no cases")
        overall["balanced_accuracy"] = overall["sensitivity"]
        square = ((data.p - data.y) ** 2).sum(axis=2)
        surprise = _surprise((data.p * data.y).sum(axis=2))
        for name, values in (("brier", square), ("log_loss", surprise)):
            totals = np.stack([cases.by_patient(row) for row in values], axis=1)
            count = cases.by_patient(np.ones(cases.y.size))[:, None]
            sums = _sums(weights, np.hstack([totals, count]))
            replicates = (sums[:, :-1] / sums[:, -1:]).mean(axis=1)
            by_seed = values.mean(axis=1)
            overall[name] = _replicated(name, by_seed, replicates, cases.y.size, data.num_patients)
    return {name: overall[name] for name in METRICS if name in overall}


def _average(name: str, parts: Sequence[_Part], what: str | None = None) -> _Part:
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
        joined = _replicated(name, by_seed, replicates, n, min(part.patients for part in defined))
        method = f"{what}; {joined.estimate.method}"
        return replace(joined, estimate=joined.estimate.model_copy(update={"method": method}))
    limits = [(part.estimate.low, part.estimate.high) for part in defined]
    if any(part.influence is None for part in defined) or any(low is None for low, _ in limits):
        method = f"{what}; no interval: one of them has none"
        return _Part(Estimate(value=value, low=None, high=None, n=n, method=method), by_seed)
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
    usual, _ = Counter(part.estimate.method for part in defined).most_common(1)[0]
    method = f"{what}; MOVER of {usual}"
    return _Part(_estimate(value, low, high, n, method), by_seed, influence=influence.mean(axis=0))


def _subgroup(data: _Data, which: BoolArray, positive: str | None, minimum_n: int) -> Subgroup:
    columns = range(len(data.classes)) if positive is None else [data.classes.index(positive)]
    parts: dict[str, list[_Part]] = {"sensitivity": [], "specificity": [], "auc": []}
    num_positive = []
    for column in columns:
        cases = data.cases(column, which)
        num_positive.append(int(cases.y.sum()))
        held = {"positives": cases.count_patients(cases.y), "negatives": cases.count_patients(~cases.y)}
        for name, measure, needed in (
            ("sensitivity", _sensitivity, ("positives",)),
            ("specificity", _specificity, ("negatives",)),
            ("auc", _auc, ("positives", "negatives")),
        ):
            short = [word for word in needed if held[word] < minimum_n]
            if short:
                why = f"too few: {held[short[0]]} patients with {short[0]}, {minimum_n} needed"
                parts[name].append(_undefined(why, cases.y.size, _nothing(cases)))
            else:
                parts[name].append(measure(cases))
    joined = {name: found[0] if len(found) == 1 else _average(name, found) for name, found in parts.items()}
    return Subgroup(
        n=int(which.sum()),
        n_positive=min(num_positive),
        sensitivity=joined["sensitivity"].estimate,
        specificity=joined["specificity"].estimate,
        auc=joined["auc"].estimate,
    )


def _confusion(data: _Data) -> Confusion:
    def table(calls: BoolArray) -> tuple[Any, ...]:
        if data.task == "multilabel":
            truths = (data.y == 0, data.y == 1)
            cells = [[(truth & call).sum(axis=1) for call in (~calls, calls)] for truth in truths]
            counts = np.array(cells).transpose(2, 3, 0, 1)
        else:
            counts = np.einsum("nt,snc->stc", (data.y == 1).astype(np.int64), calls.astype(np.int64))
        single: list[Any] = (counts[0] if len(counts) == 1 else counts.mean(axis=0)).tolist()
        return tuple(single)

    called, likeliest = table(data.called), table(data.likeliest)
    return Confusion(classes=data.classes, at_operating_point=called, at_argmax=likeliest)


def _plain(by_seed: FloatArray) -> tuple[float | None, ...]:
    return tuple(None if math.isnan(value) else float(value) for value in by_seed)


def _sd(by_seed: FloatArray) -> float | None:
    return float(by_seed.std(ddof=1)) if by_seed.size > 1 and not np.isnan(by_seed).any() else None
