"""Coverage of what `coverage` leaves out: accuracy, calibration error, several models, classes and groups.

Writes a section of docs/coverage.md.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, special, stats

from benchmarks import coverage
from benchmarks._claim import claim, put_section
from benchmarks._coverage import PAGE, REPEATS, RESAMPLES, Held, Tally, each, summary, table
from benchmarks.coverage import TARGET, Cell, draw, probability, shift
from cadx.metrics import METRICS, score, subgroup_gaps
from cadx.metrics.estimates import one_score, resample
from cadx.metrics.proportions import balanced, sensitivity, share, specificity
from cadx.metrics.reliability import CALIBRATION_BINS, probability_scores
from cadx.types import Estimate, Task

SECTION = "Accuracy, calibration error, several models, classes and groups"

_IMAGES = (200, 600)
_SHARP = 2.0  # what logits are multiplied by where two classes are miscalibrated
_SHARP_SEVERAL = 1.25  # the same where there are several
_CLASSES = ("a", "b", "c", "d")
_SETS_SEVERAL = ((600, 1), (600, 3))  # images, and how many a patient: the dearest sets, hence few
_AREA_SEVERAL = 0.8  # of the labels; of classes it comes out higher
_SHARES = np.array([0.4, 0.3, 0.2, 0.1])  # of the classes; of the positives of each label
_COMMON = 0.3  # of the variance of scores is common to all labels; so often labels share a random number
_TRUTH_IMAGES = 300_000
_MODELS = 3
_GROUP_IMAGES = (200, 600, 2000)
_GROUP_SHARE = 0.3  # of the patients are in the smaller group
_GROUP_AREA, _LESS = 0.9, 0.1  # AUC, and by how much it is lower in the smaller group

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.intp]


class Several(NamedTuple):
    """A setting with several classes."""

    task: Task
    images: int
    per_patient: int
    area: float


class Line(NamedTuple):
    """A row of a table: its setting, as text, and what was found there."""

    setting: tuple[str, ...]
    held: dict[str, Held]


def claims() -> Iterator[dict[str, Any]]:
    """Every interval that a report gives without "too few" covers the truth in 93 to 97 of 100 sets."""
    found = [two_classes(), several_models(), *several_classes(), groups()]
    put_section(PAGE, SECTION, "\n".join(_text(found)))
    promised = [
        one
        for lines in found
        for line in lines
        for name, one in line.held.items()
        if one.is_promised and name != _ECE_MEAN
    ]
    unit = "cells and metrics within 93 to 97 % (peer: all whose reports do not say 'too few')"
    yield claim("coverage_tasks.within", sum(one.is_within for one in promised), len(promised), unit)


# --- Two classes --------------------------------------------------------------------------------------

_ECE, _ECE_TRUE, _ECE_MEAN = "expected_calibration_error", "ece_of_true", "ece_of_true_mean"
_OF_TWO = {
    "accuracy": "accuracy",
    "accuracy_at_operating_point": "accuracy at operating point",
    "balanced_accuracy": "balanced accuracy",
    _ECE: "calibration error, logits twice too large",
    _ECE_TRUE: "calibration error, probabilities true: 0",
    _ECE_MEAN: "the same: the mean over sets",
}


def two_classes() -> list[Line]:
    """Accuracies and calibration errors over the grid of `coverage`."""
    cells = coverage.grid()
    return list(map(Line, map(_setting, cells), each(of_two_classes, cells, "Two classes")))


def _setting(cell: Cell) -> tuple[str, ...]:
    return f"{cell.images}", f"{cell.per_patient}", f"{cell.prevalence:.0%}", f"{cell.area:g}"


def of_two_classes(cell: Cell) -> dict[str, Held]:
    """Coverage in one cell."""
    rng, tally = _generator(1, *cell), Tally()
    cut = shift(cell.area) - special.ndtri(TARGET)
    for _ in range(REPEATS):
        y, a, _, patients = draw(cell, rng)
        p = probability(a, cell)
        cases = replace(one_score(y, p, patients), called=(a >= cut)[None], likeliest=(p >= 0.5)[None])
        sharp = one_score(y, _sharper(p), patients)
        truth, everything = cases.y[None], np.ones((1, y.size), bool)
        weights = resample(cases.num_patients, RESAMPLES, 0)
        parts = {
            "accuracy": share(cases, cases.likeliest == truth, everything, "no cases"),
            "accuracy_at_operating_point": share(cases, cases.called == truth, everything, "no cases"),
            "balanced_accuracy": balanced(sensitivity(cases), specificity(cases)),
            _ECE: probability_scores(sharp, weights)[_ECE],
            _ECE_TRUE: probability_scores(cases, weights)[_ECE],
        }
        tally.add({name: part.estimate for name, part in parts.items()})
    found = {name: tally.held(name, true) for name, true in _truths_of_two(cell).items()}
    return found | {_ECE_MEAN: tally.held(_ECE_TRUE, tally.mean(_ECE_TRUE))}


def _sharper(p: FloatArray) -> FloatArray:
    sharp: FloatArray = special.expit(_SHARP * special.logit(p))
    return sharp


def _truths_of_two(cell: Cell) -> dict[str, float]:
    delta, pi = shift(cell.area), cell.prevalence
    spared = coverage.truths(cell)["specificity"]

    def gap(x: float) -> float:
        p = probability(np.array(x), cell)
        density = pi * stats.norm.pdf(x - delta) + (1 - pi) * stats.norm.pdf(x)
        return float(density * (_sharper(p) - p))

    # The ends of the bins as scores.
    logits = special.logit(np.arange(1, CALIBRATION_BINS) / CALIBRATION_BINS) / _SHARP
    inner = (logits - special.logit(pi) + delta**2 / 2) / delta
    ends = [-9.0, *inner.clip(-9, delta + 9).tolist(), delta + 9]
    return {
        "accuracy": coverage.accuracy(cell),
        "accuracy_at_operating_point": pi * TARGET + (1 - pi) * spared,
        "balanced_accuracy": (TARGET + spared) / 2,
        _ECE: sum(abs(integrate.quad(gap, low, high)[0]) for low, high in pairwise(ends)),
        _ECE_TRUE: 0.0,
    }


# --- Several models -----------------------------------------------------------------------------------

_OF_MODELS = [name for name in METRICS if name not in ("exact_match", _ECE, "ece_if_calibrated")]


def several_models() -> list[Line]:
    """Every metric as the mean over several models."""
    cells = [
        cell
        for cell in coverage.grid()
        if cell.images in _IMAGES and cell.prevalence == 0.3 and cell.area == 0.8
    ]
    return list(map(Line, map(_setting, cells), each(of_models, cells, "Several models")))


def of_models(cell: Cell) -> dict[str, Held]:
    """Coverage in one cell; the models answer about the same images, and their errors correlate by .6."""
    rng, tally = _generator(2, *cell), Tally()
    delta = shift(cell.area)
    cut = float(probability(np.array(delta - special.ndtri(TARGET)), cell))
    for _ in range(REPEATS):
        y, _, _, patients = draw(cell, rng)
        shared = _noise(patients, rng)
        scores = [
            np.sqrt(0.6) * shared + np.sqrt(0.4) * _noise(patients, rng) + delta * y for _ in range(_MODELS)
        ]
        p = np.stack([_two_columns(probability(one, cell)) for one in scores])
        tally.add(_scored(np.eye(2)[y], p, p >= np.array([1 - cut, cut]), "binary", ("no", "yes"), patients))
    true = coverage.truths(cell) | _truths_of_two(cell)
    return {name: tally.held(name, true[name]) for name in _OF_MODELS}


def _two_columns(p: FloatArray) -> FloatArray:
    return np.column_stack([1 - p, p])


def _noise(patients: IntArray, rng: np.random.Generator) -> FloatArray:
    """N standard normal numbers, half of their variance between patients."""
    between, within = rng.normal(size=int(patients[-1]) + 1), rng.normal(size=patients.size)
    noise: FloatArray = np.sqrt(0.5) * (between[patients] + within)
    return noise


def _scored(
    labels: FloatArray,
    p: FloatArray,
    called: BoolArray,
    task: Task,
    classes: tuple[str, ...],
    patients: IntArray,
    resamples: int = RESAMPLES,
) -> dict[str, Estimate]:
    return score(
        labels,
        p,
        called,
        task=task,
        classes=classes,
        positive=classes[1] if task == "binary" else None,
        patients=patients,
        resamples=resamples,
    ).metrics


# --- Several classes ----------------------------------------------------------------------------------


def several_classes() -> list[list[Line]]:
    """Every metric over all classes, of multi-class tasks, then of multi-label ones."""
    found: list[list[Line]] = []
    tasks: tuple[Task, ...] = ("multiclass", "multilabel")
    for task in tasks:
        cells = [Several(task, *of_set, _AREA_SEVERAL) for of_set in _SETS_SEVERAL]
        told = zip(cells, each(of_several, cells, f"Several classes, {task}"), strict=True)
        found.append(
            [
                Line((f"{cell.images}", f"{cell.per_patient}", f"{area:.2f}"), held)
                for cell, (held, area) in told
            ]
        )
    return found


def of_several(cell: Several) -> tuple[dict[str, Held], float]:
    """Coverage in one cell, and the true AUC there."""
    rng, tally, true = _generator(3, len(cell.task), *cell[1:]), Tally(), truths_of_several(cell)
    for _ in range(REPEATS):
        tally.add(_scored(*draw_several(cell, rng)))
    return {name: tally.held(name, true[name]) for name in _of_task(cell.task)}, true["auc"]


def truths_of_several(cell: Several) -> dict[str, float]:
    """The values of a very large set with as many images a patient: which labels come together depends on that."""
    large = cell._replace(images=_TRUTH_IMAGES)
    found = _scored(*draw_several(large, _generator(4, len(cell.task), *cell[2:])), resamples=0)
    return {name: one.value for name, one in found.items() if one.value is not None}


def _of_task(task: Task) -> list[str]:
    left_out = ("ece_if_calibrated", "exact_match") if task == "multiclass" else ("ece_if_calibrated",)
    return [name for name in METRICS if name not in left_out]


def draw_several(
    cell: Several, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray, BoolArray, Task, tuple[str, ...], IntArray]:
    """Labels, probabilities, calls, task, classes and patients of one set.

    A score for each class is normal, and higher where the class is there. Logits are too large by a quarter. A
    patient's images tend to be of one class, or to have the same labels.
    """
    patients = np.arange(cell.images) // cell.per_patient
    num_patients, delta = int(patients[-1]) + 1, shift(cell.area)
    noise = np.column_stack([_noise(patients, rng) for _ in _CLASSES])
    chance = np.broadcast_to(_SHARES, (num_patients, _SHARES.size))
    if cell.task == "multiclass":
        if cell.per_patient > 1:
            chance = rng.dirichlet(2 * _SHARES, num_patients)
        below = rng.random(cell.images)[:, None] >= np.cumsum(chance, axis=1)[patients, :-1]
        y = np.eye(_SHARES.size)[below.sum(axis=1)]
        logits = delta * (noise + delta * y) + np.log(_SHARES)
        p = special.softmax(_SHARP_SEVERAL * logits, axis=1)
        called = (p / _SHARES).argmax(axis=1)[:, None] == np.arange(_SHARES.size)
        return y, p, called, cell.task, _CLASSES, patients
    if cell.per_patient > 1:
        chance = rng.beta(2 * _SHARES, 2 * (1 - _SHARES), (num_patients, _SHARES.size))
    shared = rng.random((cell.images, 1)) < _COMMON
    random = np.where(shared, rng.random((cell.images, 1)), rng.random((cell.images, _SHARES.size)))
    y = (random < chance[patients]).astype(np.float64)
    mixed = np.sqrt(_COMMON) * _noise(patients, rng)[:, None] + np.sqrt(1 - _COMMON) * noise
    scores = mixed + delta * y
    p = special.expit(_SHARP_SEVERAL * (delta * scores - delta**2 / 2 + special.logit(_SHARES)))
    return y, p, scores >= delta - special.ndtri(TARGET), cell.task, _CLASSES, patients


# --- Groups -------------------------------------------------------------------------------------------

_OF_GROUPS = ("sensitivity", "specificity", "auc")


def groups() -> list[Line]:
    """The gap between two groups of patients, where there is none and where there is one."""
    lines: list[Line] = []
    cells = [
        Cell(images, per_patient, 0.3, _GROUP_AREA)
        for per_patient in coverage.IMAGES_PER_PATIENT
        for images in _GROUP_IMAGES
    ]
    for less in (0.0, _LESS):
        kind = "alike" if not less else f"AUC lower by {less:g}"
        held = each(partial(of_groups, less=less), cells, f"Two groups, {kind}")
        settings = [(f"{cell.images}", f"{cell.per_patient}", kind) for cell in cells]
        lines.extend(map(Line, settings, held))
    return lines


def of_groups(cell: Cell, less: float) -> dict[str, Held]:
    """Coverage in one cell; the cutoff is that of the larger group."""
    rng, tally = _generator(5, *cell, less), Tally()
    above, below = shift(cell.area), shift(cell.area - less)
    cut = above - special.ndtri(TARGET)
    for _ in range(REPEATS):
        y, scores, _, patients = draw(cell, rng)
        is_small = (rng.random(int(patients[-1]) + 1) < _GROUP_SHARE)[patients]
        scores = scores - np.where(is_small, above - below, 0.0) * y
        p = _two_columns(special.expit(scores))
        called = np.column_stack([scores < cut, scores >= cut])
        gaps = subgroup_gaps(
            np.eye(2)[y],
            p,
            called,
            {"group": np.where(is_small, "a", "b")},
            task="binary",
            classes=("no", "yes"),
            positive="yes",
            patients=patients,
        )["group"]["a"]
        tally.add(gaps)
    true = {
        "sensitivity": float(special.ndtr(below - cut)) - TARGET,
        "specificity": 0.0,
        "auc": -less,
    }
    return {name: tally.held(name, true[name]) for name in _OF_GROUPS}


def _generator(*key: float) -> np.random.Generator:
    return np.random.default_rng([round(100 * part) for part in key])


# --- The page -----------------------------------------------------------------------------------------


def _text(found: list[list[Line]]) -> list[str]:
    two, models, classes, labels, gaps = found
    setting = ("images", "a patient")
    everything = [
        (_OF_TWO[name] if lines is two else _title(name), one)
        for lines in found
        for line in lines
        for name, one in line.held.items()
        if name != _ECE_MEAN
    ]
    of_models = [_title(name) for name in _OF_MODELS]
    return [
        fill(
            f"Written by `python -m benchmarks coverage_tasks`: {REPEATS:,} simulated test sets a line, {RESAMPLES} "
            'resamples a set. A share is promised where fewer than half of the reports say "too few", or that a value '
            "lies above the truth, beside the interval, or give none; elsewhere it stands in brackets. "
            f"{summary(everything)}",
            120,
        ),
        "",
        "### Two classes",
        "",
        fill(
            "Scores as above. The calibration error of a finite set lies above that of all patients: where all "
            "probabilities are true it is still not 0, and its interval, which is centred at the value found, does not "
            "reach down to 0. What it holds is the mean over sets of that size (the last column, which is not "
            "counted). Hence a report of two classes says so beside the interval, and sets the error beside what it "
            "would be by chance.",
            120,
        ),
        "",
        *_table((*setting, "positives", "AUC"), list(_OF_TWO.values()), two),
        "",
        "### The mean of three models",
        "",
        fill(
            "Three models answer about the same images, and their errors correlate by 0.6: the mean over models of "
            "each metric.",
            120,
        ),
        "",
        *_table((*setting, "positives", "AUC"), of_models, models),
        "",
        "### Means over classes",
        "",
        fill(
            f"Four classes, of which {', '.join(f'{part:.0%}' for part in _SHARES)} of the images are; then four "
            "labels that as many images have. AUC is the mean over classes; logits are too large by a quarter. True "
            f"values are those of a set of {_TRUTH_IMAGES:,} images, as many of them a patient.",
            120,
        ),
        "",
        *_table((*setting, "AUC, multi-class"), [_title(name) for name in _of_task("multiclass")], classes),
        "",
        *_table((*setting, "AUC, multi-label"), [_title(name) for name in _of_task("multilabel")], labels),
        "",
        "### Gaps between groups",
        "",
        fill(
            f"{_GROUP_SHARE:.0%} of the patients are in one group, the others in another; 30% of the images are "
            f"positive, with an AUC of {_GROUP_AREA:g} in the larger group. What is compared is the smaller group's "
            "value minus the other's, at one threshold for both.",
            120,
        ),
        "",
        *_table((*setting, "smaller group"), [_title(name) for name in _OF_GROUPS], gaps),
    ]


def _table(head: tuple[str, ...], titles: list[str], lines: list[Line]) -> list[str]:
    return table((*head, *titles), [(*line.setting, *line.held.values()) for line in lines])


def _title(name: str) -> str:
    return {
        "auc": "AUC",
        "ppv": "PPV",
        "npv": "NPV",
        "f1": "F1",
        "brier": "Brier score",
        _ECE: "calibration error",
    }.get(name, name.replace("_", " "))
