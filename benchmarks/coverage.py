"""Coverage: how often the 95 % intervals hold the truth, in simulated test sets; writes docs/coverage.md."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, special, stats

from benchmarks._claim import claim
from benchmarks._coverage import each
from cadx.calibration import resampled_thresholds
from cadx.metrics import (
    Difference,
    Estimate,
    at_threshold,
    auc,
    delong_difference,
    predictive_values,
    tango_difference,
    with_chosen_threshold,
)
from cadx.metrics.areas import patients_of_rarer_class
from cadx.metrics.estimates import one_score, resample
from cadx.metrics.limits import on_scale
from cadx.metrics.proportions import f1, share
from cadx.metrics.ranking import average_precision
from cadx.metrics.reliability import calibration_intercept, calibration_slope, probability_scores
from cadx.metrics.scoring import with_doubts

REPEATS = 2000
IMAGES = (60, 200, 600)
PREVALENCES = (0.1, 0.3)
AREAS = (0.8, 0.95)
IMAGES_PER_PATIENT = (1, 3)
LONG_TAIL = (200, 600, 2000)  # images of the sets in which few patients have many and most have one
TARGET = 0.9  # the sensitivity at the operating point
ELSEWHERE = 0.05  # another prevalence
MIN_CASES, MIN_ERRORS = 50, 5
WITHIN = (0.93, 0.97)
PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
CHOICE = "The operating point"  # the section of the page on thresholds
SETS = "Prediction sets"  # the section of the page that `benchmarks/conformal.py` writes

_PATIENT_SHARE = 0.5  # of the variance of a score lies between patients
_MOST = 10  # the part of all images that one patient of the long tail has at most
_WORSE = 0.05  # by how much the second model's AUC and sensitivity are lower
_RESAMPLES = 200
_CHOICE_REPEATS, _CHOICES = 2000, 60
_TITLES = {
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ppv": "PPV",
    "npv": "NPV",
    "ppv_elsewhere": f"PPV at {ELSEWHERE:.0%}",
    "auc": "AUC",
    "auc_difference": "difference of AUCs",
    "sensitivity_difference": "difference of sensitivities",
    "calibration_slope": "calibration slope",
    "calibration_intercept": "calibration intercept",
    "brier": "Brier score",
    "log_loss": "log loss",
    "average_precision": "average precision",
    "f1": "F1",
}


class Cell(NamedTuple):
    """One setting of the grid; `per_patient` is 0 where images a patient have a long tail."""

    images: int
    per_patient: int
    prevalence: float
    area: float

    @property
    def images_of_a_patient(self) -> str:
        """As the page says it."""
        return str(self.per_patient or f"1 to {self.images // _MOST}")


class Row(NamedTuple):
    """What was found in a cell.

    Attributes:
        cell: the setting.
        coverage: metric -> the share of intervals that hold the truth.
        enough: metric -> whether the sets are large enough for a promise.
        warned: metric -> the share of sets whose own report says "too few", or has no interval.
    """

    cell: Cell
    coverage: dict[str, float]
    enough: dict[str, bool]
    warned: dict[str, float]

    def within(self, name: str) -> bool:
        """Whether a metric's coverage lies where it should."""
        return WITHIN[0] <= self.coverage[name] <= WITHIN[1]


def claims() -> Iterator[dict[str, Any]]:
    """Every cell with enough cases and errors covers the truth in 93 to 97 of 100 sets."""
    rows = each(measure, grid(), "Intervals of one and two models")
    some = [
        cell
        for cell in grid()
        if cell.prevalence == 0.3 and cell.area == 0.8 and cell.images > 60 and cell.per_patient
    ]
    chosen = each(measure_choice, some, "The operating point")
    write_page(rows, chosen)
    judged = [row.within(name) for row in rows for name in row.coverage if row.enough[name]]
    held = sum(judged)
    unit = f"cells and metrics within 93 to 97 % (peer: all that have {MIN_CASES} cases a class, {MIN_ERRORS} errors)"
    yield claim("coverage.within", held, len(judged), unit, goal=1.0)


def grid() -> list[Cell]:
    """All settings."""
    return [
        Cell(images, per_patient, prevalence, area)
        for per_patient in IMAGES_PER_PATIENT
        for images in IMAGES
        for prevalence in PREVALENCES
        for area in AREAS
    ] + [Cell(images, 0, 0.3, area) for images in LONG_TAIL for area in AREAS]


def draw(
    cell: Cell, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    """Labels, the scores of two models and patients of one set.

    Scores are normal within a class. Half of their variance lies between patients, and a patient's images tend to be of
    one class: the share of positives is drawn from Beta(2 pi, 2 (1 - pi)) for each. The models' errors correlate by .6.
    In a long tail the images of a patient follow a Pareto distribution of index 1.1, up to a tenth of all.
    """
    sizes = np.full(cell.images, cell.per_patient)
    if not cell.per_patient:
        sizes = np.minimum(1 + rng.pareto(1.1, cell.images), cell.images // _MOST).astype(np.intp)
    patients = np.repeat(np.arange(cell.images), sizes)[: cell.images]
    num_patients = patients[-1] + 1
    pi = cell.prevalence
    chance = (
        rng.beta(2 * pi, 2 * (1 - pi), num_patients) if cell.per_patient != 1 else np.full(num_patients, pi)
    )
    y = (rng.random(cell.images) < chance[patients]).astype(np.int64)

    def noise() -> NDArray[np.float64]:
        between, within = rng.normal(size=num_patients), rng.normal(size=cell.images)
        mixed: NDArray[np.float64] = (
            np.sqrt(_PATIENT_SHARE) * between[patients] + np.sqrt(1 - _PATIENT_SHARE) * within
        )
        return mixed

    shared, own_a, own_b = noise(), noise(), noise()
    a, b = (np.sqrt(0.6) * shared + np.sqrt(0.4) * own for own in (own_a, own_b))
    return y, a + shift(cell.area) * y, b + shift(cell.area - _WORSE) * y, patients


def shift(area: float) -> float:
    """How far the classes' means are apart, in standard deviations, for an AUC."""
    return float(np.sqrt(2) * special.ndtri(area))


def truths(cell: Cell) -> dict[str, float]:
    """The values that the intervals should hold."""
    delta, pi = shift(cell.area), cell.prevalence
    cut = delta - special.ndtri(TARGET)
    specificity = float(special.ndtr(cut))

    def ppv(prevalence: float) -> float:
        hits, alarms = prevalence * TARGET, (1 - prevalence) * (1 - specificity)
        return hits / (hits + alarms)

    def precision_times_density(x: float) -> float:
        hits, alarms = pi * stats.norm.sf(x - delta), (1 - pi) * stats.norm.sf(x)
        return float(hits / (hits + alarms) * stats.norm.pdf(x - delta))

    def squared_error(x: float) -> float:
        p = float(probability(np.array(x), cell))
        return float(pi * stats.norm.pdf(x - delta) * (1 - p) ** 2 + (1 - pi) * stats.norm.pdf(x) * p**2)

    def surprise(x: float) -> float:
        p = float(probability(np.array(x), cell))
        return float(
            -pi * stats.norm.pdf(x - delta) * np.log(p) - (1 - pi) * stats.norm.pdf(x) * np.log1p(-p)
        )

    return {
        "sensitivity": TARGET,
        "specificity": specificity,
        "ppv": ppv(pi),
        "npv": (1 - pi) * specificity / ((1 - pi) * specificity + pi * (1 - TARGET)),
        "ppv_elsewhere": ppv(ELSEWHERE),
        "auc": cell.area,
        "auc_difference": _WORSE,
        "sensitivity_difference": _WORSE,
        "calibration_slope": 1.0,
        "calibration_intercept": 0.0,
        "brier": integrate.quad(squared_error, -8, delta + 8)[0],
        "log_loss": integrate.quad(surprise, -8, delta + 8)[0],
        "f1": 2 * pi * TARGET / (pi + pi * TARGET + (1 - pi) * (1 - specificity)),
        "average_precision": integrate.quad(precision_times_density, -8, delta + 8)[0],
    }


def accuracy(cell: Cell) -> float:
    """The share of right calls at a probability of one half."""
    delta, pi = shift(cell.area), cell.prevalence
    half = delta / 2 - special.logit(pi) / delta  # the score whose probability that is
    return float(pi * special.ndtr(delta - half) + (1 - pi) * special.ndtr(half))


def probability(x: NDArray[np.float64], cell: Cell) -> NDArray[np.float64]:
    """The true probability of a score."""
    delta = shift(cell.area)
    p: NDArray[np.float64] = special.expit(delta * x - delta**2 / 2 + special.logit(cell.prevalence))
    return p


def measure(cell: Cell) -> Row:
    """The coverage of every metric in one cell."""
    rng = np.random.default_rng(
        [cell.images, cell.per_patient, round(100 * cell.prevalence), round(100 * cell.area)]
    )
    true = truths(cell)
    held, told, warned = (dict.fromkeys(_TITLES, 0) for _ in range(3))
    fewest = 0.0
    for _ in range(REPEATS):
        drawn = draw(cell, rng)
        fewest += patients_of_rarer_class(one_score(drawn[0], drawn[1], drawn[3])) / REPEATS
        for name, found in _intervals(cell, *drawn).items():
            if found.low is not None and found.high is not None:
                told[name] += 1
                held[name] += found.low <= true[name] <= found.high
            warned[name] += found.low is None or "too few" in found.method
    positives, negatives = cell.images * cell.prevalence, cell.images * (1 - cell.prevalence)
    called = positives * TARGET + negatives * (1 - true["specificity"])
    errors = {
        "sensitivity": positives * (1 - TARGET),
        "specificity": negatives * (1 - true["specificity"]),
        "ppv": called * min(true["ppv"], 1 - true["ppv"]),
        "npv": positives * (1 - TARGET),
    }
    errors["f1"] = errors["sensitivity"] + errors["specificity"]
    errors["brier"] = errors["log_loss"] = cell.images * (1 - accuracy(cell))
    # Of the difference of AUCs the report tells when less than one patient is expected to be outranked.
    errors["auc_difference"] = MIN_ERRORS * min(positives, negatives) * (1 - cell.area)
    errors["ppv_elsewhere"] = min(errors["sensitivity"], errors["specificity"])
    errors["sensitivity_difference"] = errors["sensitivity"]
    # A set of a long tail is as large as its effective patients.
    large = (min(positives, negatives) if cell.per_patient else fewest) >= MIN_CASES
    return Row(
        cell,
        {name: held[name] / max(told[name], 1) for name in _TITLES},
        {name: bool(large and errors.get(name, MIN_ERRORS) >= MIN_ERRORS) for name in _TITLES},
        # The page of a difference of sensitivities repeats what these say.
        {name: warned[name.replace("sensitivity_difference", "sensitivity")] / REPEATS for name in _TITLES},
    )


def _intervals(
    cell: Cell,
    y: NDArray[np.int64],
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    patients: NDArray[np.intp],
) -> dict[str, Estimate | Difference]:
    cut = shift(cell.area) - special.ndtri(TARGET)
    cut_b = shift(cell.area - _WORSE) - special.ndtri(TARGET - _WORSE)
    found: dict[str, Estimate | Difference] = {
        **at_threshold(y, a, cut, patients),
        "auc": auc(y, a, patients),
    }
    sensitivity, specificity = found["sensitivity"], found["specificity"]
    assert isinstance(sensitivity, Estimate)
    assert isinstance(specificity, Estimate)
    found["ppv_elsewhere"] = predictive_values(sensitivity, specificity, ELSEWHERE)["ppv"]
    found["auc_difference"] = delong_difference(y, a, b, patients)
    ill = y == 1
    found["sensitivity_difference"] = tango_difference(a[ill] >= cut, b[ill] >= cut_b, patients[ill])
    cases = replace(one_score(y, probability(a, cell), patients), called=(a >= cut)[None])
    weights = resample(cases.num_patients, _RESAMPLES, 0)
    right, everything = cases.y[None], np.ones((1, y.size), bool)
    parts = {
        "accuracy": share(cases, (cases.p >= 0.5) == right, everything, "no cases"),
        "accuracy_at_operating_point": share(cases, cases.called == right, everything, "no cases"),
        "calibration_slope": calibration_slope(cases),
        "calibration_intercept": calibration_intercept(cases),
        **probability_scores(cases, weights),
        "average_precision": average_precision(cases, weights),
        "f1": f1(cases, weights),
    }
    rest = with_doubts(
        {name: on_scale(name, part) for name, part in parts.items()}, patients_of_rarer_class(cases)
    )
    return found | {name: part.estimate for name, part in rest.items() if name in _TITLES}


def measure_choice(cell: Cell) -> tuple[Cell, dict[str, float]]:
    """Coverage of the sensitivity that a threshold will reach, chosen on a calibration split as large as the test set.

    What should be held is the target itself: the sensitivity of the recipe, over calibration splits. Beside it the same
    with the threshold taken as fixed.
    """
    rng = np.random.default_rng([7, cell.images, cell.per_patient, round(100 * cell.area)])
    held = {"threshold fixed": 0, "its choice counted": 0}
    for _ in range(_CHOICE_REPEATS):
        y, a, _, patients = draw(cell, rng)
        p = probability(a, cell)
        choices = resampled_thresholds(p, y, patients, sensitivity=TARGET, resamples=_CHOICES)
        threshold = float(np.median(choices))
        y, a, _, patients = draw(cell, rng)
        p = probability(a, cell)
        for name, found in (
            ("threshold fixed", at_threshold(y, p, threshold, patients)["sensitivity"]),
            (
                "its choice counted",
                with_chosen_threshold(y, p, threshold, choices.tolist(), patients)["sensitivity"],
            ),
        ):
            assert found.low is not None
            assert found.high is not None
            held[name] += found.low <= TARGET <= found.high
    return cell, {name: count / _CHOICE_REPEATS for name, count in held.items()}


def write_page(rows: list[Row], chosen: list[tuple[Cell, dict[str, float]]]) -> None:
    """Write docs/coverage.md."""
    judged = [row.within(name) for row in rows for name in _TITLES if row.enough[name]]
    outside = [(row, name) for row in rows for name in _TITLES if not row.within(name)]
    bold = [f"{row.warned[name]:.0%}" for row, name in outside if row.enough[name]]
    beyond = [(row.warned[name], name) for row, name in outside if not row.enough[name]]
    silent = [_TITLES[name] for name in _TITLES if any(share < 0.5 for share, of in beyond if of == name)]
    warned = [share for share, name in beyond if _TITLES[name] not in silent]
    prose = (
        f"Written by `python -m benchmarks coverage`: {REPEATS:,} simulated test sets a line, and for each the share "
        "of 95 % intervals that hold the true value, in per cent. A share itself is known to within 1 point. Scores "
        "are normal within a class; with 3 images a patient half of their variance lies between patients, and a "
        f"patient's images tend to be of one class. In the last {len(AREAS) * len(LONG_TAIL)} lines most patients have "
        f"one image and a few up to a tenth of all (Pareto, index 1.1). The operating point has a true sensitivity of "
        f"{TARGET:g}."
    )
    promise = (
        f"Where there are at least {MIN_CASES} images of each class (in a long tail, effective patients) and "
        f"{MIN_ERRORS} expected errors, a share should lie within 93 to 97: {sum(judged)} of {len(judged)} do, and "
        "those that do not are **bold**"
        + (f' (of their reports {", ".join(bold)} say "too few", in the order of the table)' if bold else "")
        + f". Elsewhere (in brackets) nothing is promised, and {len(beyond)} shares lie outside; there "
        f'{np.mean(warned or [1]):.0%} of the reports say "too few" beside the interval, and '
        f"{min(warned, default=1):.0%} in the cell where fewest do"
        + (f", but nothing of {', '.join(silent)}" if silent else "")
        + ". Above 95: conservative, the interval is wider than it need be."
    )
    lines = [
        "# How often the intervals hold the truth",
        "",
        fill(prose, 120),
        "",
        fill(promise, 120),
        "",
        "| images | a patient | positives | AUC | " + " | ".join(_TITLES.values()) + " |",
        "|" + "---|" * (4 + len(_TITLES)),
    ]
    for row in rows:
        cells = []
        for name in _TITLES:
            text = f"{100 * row.coverage[name]:.1f}"
            if not row.enough[name]:
                text = f"({text})"
            elif not row.within(name):
                text = f"**{text}**"
            cells.append(text)
        setting = (
            f"| {row.cell.images} | {row.cell.images_of_a_patient} | {row.cell.prevalence:.0%} | "
            f"{row.cell.area:g} | "
        )
        lines.append(setting + " | ".join(cells) + " |")
    lines += [
        "",
        f"## {CHOICE}",
        "",
        "A threshold is chosen on a calibration split for a sensitivity of "
        f"{TARGET:g}, and scored on a test set of the same size.",
        f"How often the interval of the test set holds {TARGET:g}: with the threshold taken as fixed, and "
        "with its choice counted.",
        "",
        "| images | a patient | positives | AUC | threshold fixed | its choice counted |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {cell.images} | {cell.per_patient} | {cell.prevalence:.0%} | {cell.area:g} | "
        + " | ".join(f"{100 * share:.1f}" for share in held.values())
        + " |"
        for cell, held in chosen
    ]
    # Sections that other benchmarks write stay.
    _, *others = PAGE.read_text(encoding="utf-8").split("\n\n## ")
    kept = [other.rstrip("\n") for other in others if not other.startswith(f"{CHOICE}\n")]
    PAGE.write_text("\n\n## ".join(["\n".join(lines), *kept]) + "\n", encoding="utf-8")
