"""All metrics of a set of predictions at once: overall, by class, and by subgroup."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from cadx.doubts import HOLDS_LESS, ROUGHLY
from cadx.metrics.areas import MIN_PER_CLASS, area, patients_of_rarer_class
from cadx.metrics.estimates import (
    BoolArray,
    Cases,
    Difference,
    FloatArray,
    IntArray,
    Meaning,
    Part,
    Weights,
    difference_of,
    nothing,
    patient_codes,
    replicated,
    require_probabilities,
    resample,
    resampled_sums,
    undefined,
)
from cadx.metrics.limits import doubted, mean_of_parts, on_scale, with_doubt
from cadx.metrics.multiplicity import holm
from cadx.metrics.proportions import (
    MIN_ERRORS,
    balanced,
    call_metrics,
    f1,
    sensitivity,
    share,
    specificity,
)
from cadx.metrics.ranking import average_precision
from cadx.metrics.reliability import (
    calibration_intercept,
    calibration_slope,
    ece_if_calibrated,
    probability_scores,
    surprise,
)
from cadx.types import Config, Estimate, Task

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
    """What is reported of the cases that share one value of one attribute; `metrics` holds all the others."""

    n: int
    n_positive: int
    sensitivity: Estimate
    specificity: Estimate
    auc: Estimate
    metrics: dict[str, Estimate] = Field(default_factory=dict)


class Gap(Difference):
    """How far one subgroup is from all others of its attribute: its value minus theirs.

    `p_adjusted` is Holm's, over all gaps of a report.
    """

    p_adjusted: float | None = None


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
    weights = resample(data.num_patients, resamples, seed)
    parts = {name: _by_class(data.cases(column), weights) for column, name in enumerate(data.classes)}
    overall = _overall(data, parts, positive, weights)
    return Scores(
        n=data.patient.size,
        n_patients=data.num_patients,
        clustered=data.clustered,
        metrics={name: part.estimate for name, part in overall.items()},
        by_class={c: {name: part.estimate for name, part in metrics.items()} for c, metrics in parts.items()},
        by_seed={name: part.seed_values for name, part in overall.items()},
        between_seed_sd={name: part.seed_sd for name, part in overall.items()},
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
    resamples: int = 0,
    seed: int = 0,
) -> dict[str, dict[str, Subgroup]]:
    """Every metric for each value of each attribute, by attribute and value.

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
        resamples: of patients, as in `score`.
        seed: of the resampling.

    Raises:
        ValueError: as `score`, or if an attribute has another length.
    """
    data = _read(labels, probabilities, decisions, task, classes, positive, patients)
    weights = resample(data.num_patients, resamples, seed)
    return {
        attribute: {
            word: _subgroup(data, which, positive, minimum_n, weights) for word, which in members.items()
        }
        for attribute, members in _members(data, groups).items()
    }


def subgroup_gaps(
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
) -> dict[str, dict[str, dict[str, Gap]]]:
    """How sensitivity, specificity and AUC of each group differ from those of all others, by attribute and value.

    Of an attribute with two values one is compared. Where either side is too small there is no difference, and
    `method` says why. Cases of unknown value are no group, and no others.

    Args:
        labels: as in `score_subgroups`; so are all the rest.
        probabilities: see labels.
        decisions: see labels.
        groups: see labels.
        task: see labels.
        classes: see labels.
        positive: see labels.
        patients: see labels.
        minimum_n: see labels.

    Raises:
        ValueError: as `score_subgroups`.
    """
    data = _read(labels, probabilities, decisions, task, classes, positive, patients)
    found: dict[str, dict[str, dict[str, Difference]]] = {}
    for attribute, members in _members(data, groups).items():
        known = {word: which for word, which in members.items() if word != "unknown"}
        everyone = np.logical_or.reduce(list(known.values())) if known else np.zeros(0, dtype=bool)
        for word, which in list(known.items())[: 1 if len(known) == 2 else None]:
            if len(known) == 1:
                continue
            here, others = (_judged(data, rows, positive, minimum_n) for rows in (which, everyone & ~which))
            found.setdefault(attribute, {})[word] = {
                name: gap_between(here[name].estimate, others[name].estimate) for name in here
            }
    return corrected(found)


def gap_between(here: Estimate, others: Estimate) -> Difference:
    """`estimates.difference_of` one group and the others, with what either doubts of its own interval."""
    return doubted(difference_of(here, others), here, others)


def corrected(
    found: Mapping[str, Mapping[str, Mapping[str, Difference]]],
) -> dict[str, dict[str, dict[str, Gap]]]:
    """Differences by attribute, value and metric as gaps, with Holm's p value over all of them."""
    flat = [gap for groups_of in found.values() for gaps in groups_of.values() for gap in gaps.values()]
    adjusted = iter(holm([gap.p for gap in flat if gap.p is not None]))
    return {
        attribute: {
            word: {
                name: Gap(**gap.model_dump(), p_adjusted=None if gap.p is None else next(adjusted))
                for name, gap in gaps.items()
            }
            for word, gaps in groups_of.items()
        }
        for attribute, groups_of in found.items()
    }


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

    def cases(self, column: int, which: BoolArray | None = None) -> Cases:
        """One class against the rest, on all or some of the cases."""
        known = ~np.isnan(self.y[:, column])
        if which is not None:
            known &= which
        return Cases(
            y=self.y[known, column] == 1,
            p=self.p[:, known, column],
            called=self.called[:, known, column],
            likeliest=self.likeliest[:, known, column],
            patient=self.patient[known],
            num_patients=self.num_patients,
            clustered=self.clustered,
        )

    def rows(self) -> Cases:
        """All cases, for what is counted by case and not by class; its y says nothing."""
        none = np.zeros((self.p.shape[0], self.patient.size), dtype=bool)
        return Cases(none[0], self.p[:, :, 0], none, none, self.patient, self.num_patients, self.clustered)


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
    require_probabilities(p)
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
    code = patient_codes(patients, labelled)
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


def _members(data: _Data, groups: Mapping[str, ArrayLike]) -> dict[str, dict[str, BoolArray]]:
    """Attribute -> value -> which of the labelled cases have it."""
    found = {}
    for attribute in groups:
        values = np.asarray(groups[attribute], dtype=object)
        if values.shape != data.labelled.shape:
            raise ValueError(
                f"subgroup {attribute}: {values.size} values for {data.labelled.size} cases; give one each"
            )
        words = np.array([_word(value) for value in values[data.labelled]], dtype=object)
        found[attribute] = {str(word): np.asarray(words == word, dtype=bool) for word in sorted(set(words))}
    return found


def _word(value: Any) -> str:
    return "unknown" if value is None or value != value or str(value) == "" else str(value)


def _by_class(cases: Cases, weights: Weights) -> dict[str, Part]:
    """Every metric of one class against the rest, in the order of `METRICS`."""
    everything = np.ones_like(cases.called)
    truth = np.broadcast_to(cases.y, cases.called.shape)
    calls = call_metrics(cases)
    parts = {
        "auc": area(cases),
        "average_precision": average_precision(cases, weights),
        **calls,
        "accuracy": share(cases, cases.likeliest == truth, everything, "no cases"),
        "accuracy_at_operating_point": share(cases, cases.called == truth, everything, "no cases"),
        "balanced_accuracy": balanced(calls["sensitivity"], calls["specificity"]),
        "f1": f1(cases, weights),
        **probability_scores(cases, weights),
        "calibration_slope": calibration_slope(cases),
        "calibration_intercept": calibration_intercept(cases),
        "ece_if_calibrated": ece_if_calibrated(cases),
    }
    found = {name: on_scale(name, parts[name]) for name in METRICS if name in parts}
    return with_doubts(found, patients_of_rarer_class(cases))


_OF_BOTH_CLASSES = {
    "average_precision",
    "f1",
    "brier",
    "log_loss",
    "calibration_slope",
    "calibration_intercept",
}
"""Metrics whose intervals hold the truth less often than they say where a class is small; shares and AUC say so
themselves."""

_ERRORS_OF = {"f1": "accuracy_at_operating_point", "brier": "accuracy", "log_loss": "accuracy"}
"""Metric that errors make -> the share of calls that are right."""

MIN_WRONG_CALLS = 10
"""Errors below which the intervals of these are only rough. Of 200 images with fewer than `MIN_ERRORS` the Brier
score's held the truth in 74 to 78 of 100 sets and the log loss's in 61 to 62."""


def _errors(right: Estimate) -> float:
    """Calls that are wrong, from the share that is right."""
    return math.inf if right.value is None else (1 - right.value) * right.n


def with_doubts(parts: dict[str, Part], fewest: float) -> dict[str, Part]:
    """The parts, with a word in the method of those that rest on few patients, or on few errors.

    Args:
        parts: metric -> part, as `limits.on_scale` gives it.
        fewest: `areas.patients_of_rarer_class`.
    """

    def told(name: str, part: Part) -> Part:
        if name not in _OF_BOTH_CLASSES or "too few" in part.estimate.method:
            return part  # "too few": a mean over classes, of which one says so
        if fewest < MIN_PER_CLASS:
            return with_doubt(part, f"too few ({fewest:.3g} in the rarer class): {HOLDS_LESS}")
        right = parts.get(_ERRORS_OF.get(name, ""))
        if right and (errors := _errors(right.estimate)) < MIN_WRONG_CALLS - 1e-9:
            word = HOLDS_LESS if errors < MIN_ERRORS - 1e-9 else ROUGHLY
            return with_doubt(part, f"too few errors ({errors:.3g}): {word}")
        return part

    return {name: told(name, part) for name, part in parts.items()}


def _overall(
    data: _Data, by_class: dict[str, dict[str, Part]], positive: str | None, weights: Weights
) -> dict[str, Part]:
    """Every metric of the task, in the order of `METRICS`.

    A mean over classes says so where it leaves out one of which there are no cases: it is not what was asked for.
    """
    if data.task == "binary":
        assert positive is not None
        return by_class[positive]
    fewest = {name: patients_of_rarer_class(data.cases(k)) for k, name in enumerate(data.classes)}

    def mean(metric: str) -> Part:
        parts = {name: found[metric] for name, found in by_class.items()}
        left_out = sum(not fewest[name] and part.estimate.value is None for name, part in parts.items())
        told = f"too few (0 positives or negatives of {left_out} of {len(parts)} classes): {HOLDS_LESS}"
        return with_doubt(mean_of_parts(metric, list(parts.values())), told if left_out else "")

    names = list(next(iter(by_class.values())))
    overall = {name: mean(name) for name in names}
    cases = data.rows()
    everything = np.ones_like(cases.called)
    if data.task == "multilabel":
        right = ((data.likeliest == (data.y == 1)) | np.isnan(data.y)).all(axis=2)
        overall["exact_match"] = share(cases, right, everything, "no cases")
    elif cases.y.size:
        truth = data.y == 1
        for name, calls in (("accuracy", data.likeliest), ("accuracy_at_operating_point", data.called)):
            overall[name] = share(cases, (calls & truth).any(axis=2), everything, "no cases")
        overall["balanced_accuracy"] = overall["sensitivity"]
        square = ((data.p - data.y) ** 2).sum(axis=2)
        nats = surprise((data.p * data.y).sum(axis=2))
        for name, values in (("brier", square), ("log_loss", nats)):
            totals = np.stack([cases.by_patient(row) for row in values], axis=1)
            count = cases.by_patient(np.ones(cases.y.size))[:, None]
            sums = resampled_sums(weights, np.hstack([totals, count]))
            replicates = (sums[:, :-1] / sums[:, -1:]).mean(axis=1)
            by_seed = values.mean(axis=1)
            overall[name] = replicated(name, by_seed, replicates, cases.y.size, data.num_patients)
    # The squared errors of all classes add up to 2 where another one is certain.
    largest = {"brier": 2.0} if data.task == "multiclass" else {}
    found = {
        name: on_scale(name, overall[name], largest.get(name, 1.0)) for name in METRICS if name in overall
    }
    return with_doubts(found, min((patients for patients in fewest.values() if patients), default=0))


_JUDGED = {
    "sensitivity": (sensitivity, ("positives",)),
    "specificity": (specificity, ("negatives",)),
    "auc": (area, ("positives", "negatives")),
}
"""What is reported of every subgroup: how it is measured, and of which cases it needs enough."""


def _columns(data: _Data, positive: str | None) -> Sequence[int]:
    return range(len(data.classes)) if positive is None else [data.classes.index(positive)]


def _short(cases: Cases, needed: Sequence[str], minimum_n: int) -> str:
    """Why a subgroup is too small, "" if it is not."""
    held = {"positives": cases.count_patients(cases.y), "negatives": cases.count_patients(~cases.y)}
    for word in needed:
        if held[word] < minimum_n:
            return f"too few: {held[word]} patients with {word}, {minimum_n} needed"
    return ""


def _judged(data: _Data, which: BoolArray, positive: str | None, minimum_n: int) -> dict[str, Part]:
    """Sensitivity, specificity and AUC of some of the cases, means over classes where there are several."""
    parts: dict[str, list[Part]] = {name: [] for name in _JUDGED}
    for column in _columns(data, positive):
        cases = data.cases(column, which)
        for name, (measure, needed) in _JUDGED.items():
            if why := _short(cases, needed, minimum_n):
                parts[name].append(undefined(why, cases.y.size, nothing(cases)))
            else:
                parts[name].append(measure(cases))
    return _joined(parts)


def _joined(parts: Mapping[str, Sequence[Part]]) -> dict[str, Part]:
    return {
        name: found[0] if len(found) == 1 else on_scale(name, mean_of_parts(name, found))
        for name, found in parts.items()
    }


def _subgroup(
    data: _Data, which: BoolArray, positive: str | None, minimum_n: int, weights: Weights
) -> Subgroup:
    judged = _judged(data, which, positive, minimum_n)
    num_positive, others = [], []
    for column in _columns(data, positive):
        cases = data.cases(column, which)
        num_positive.append(int(cases.y.sum()))
        if not _short(cases, ("positives", "negatives"), minimum_n):
            others.append(_by_class(cases, weights))
    rest = _joined({name: [parts[name] for parts in others] for name in others[0]}) if others else {}
    return Subgroup(
        n=int(which.sum()),
        n_positive=min(num_positive),
        **{name: part.estimate for name, part in judged.items()},
        metrics={name: part.estimate for name, part in rest.items() if name not in judged},
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
