"""Prediction sets: their coverage over random halves of a test split, and after the true shift from calibration to it.

A simulation, with the model frozen: answers to the test split that were scored before are cut in two halves of
patients, sets are fitted on one and judged on the other. There patients are exchangeable, as split conformal sets take
for granted, so that coverage must be what was declared. Beside it stands what the bundle's own quantiles, from its
calibration split, cover of the whole test split: what a hospital sees whose patients differ. Writes a section of
docs/coverage.md.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np

from benchmarks._claim import claim, put_section
from benchmarks.coverage import PAGE, SETS
from cadx import conformal
from cadx.metrics.decisions import mean_share_of
from cadx.metrics.estimates import patient_codes
from cadx.predicting.table import Arrays, PredictionsInfo, arrays, read_predictions
from cadx.types import Conformal, Estimate

HALVES = 20
COVERAGE = 0.9
WITHIN = 0.015
EXPERIMENTS = ("pneumoniamnist", "phantom-xray")
REPORTS = Path(__file__).parent.parent / "data" / "reports"


class Row(NamedTuple):
    """One class of an experiment, over its seeds.

    Attributes:
        halves: the mean coverage of the judged halves, each patient weighing one.
        fitted: patients of the class in a half, on average.
        between: the standard deviation over halves, of the mean over seeds.
        shifted: coverage on test by the quantiles of the calibration split; None where the files name none.
        cases: of the class in the test split.
    """

    experiment: str
    name: str
    seeds: int
    halves: float
    fitted: float
    between: float
    shifted: list[Estimate] | None
    cases: int

    @property
    def beyond(self) -> float:
        """How far the coverage lies outside of what split conformal sets promise: at most 1 / (n + 1) above."""
        most = COVERAGE + 1 / (self.fitted + 1)
        return max(COVERAGE - self.halves, self.halves - most, 0.0)


def claims() -> Iterator[dict[str, Any]]:
    """Over 20 random halves each class is covered as often as promised, give or take 1.5 points."""
    rows: list[Row] = []
    lines: list[str] = []
    for experiment in EXPERIMENTS:
        files = sorted((REPORTS / experiment).glob("*/predictions.parquet"))
        if files:
            measured = measure(experiment, [read_predictions(file) for file in files])
            rows += measured
            lines += map(_line, measured)
        else:
            print(f"conformal: no predictions of {experiment}; `make reproduce` makes them", file=sys.stderr)
            page = PAGE.read_text(encoding="utf-8").splitlines()
            lines += [line for line in page if line.startswith(f"| {experiment} |")]  # of another day
    if not rows:
        return
    put_section(PAGE, SETS, _text(lines))
    for experiment in dict.fromkeys(row.experiment for row in rows):
        worst = max(row.beyond for row in rows if row.experiment == experiment)
        unit = f"largest distance of a class's coverage from what is promised, over {HALVES} halves (peer: the limit)"
        yield claim(f"conformal.{experiment}", worst, WITHIN, unit, ratio=WITHIN / max(worst, WITHIN / 10))


def measure(experiment: str, read: list[tuple[Any, PredictionsInfo]]) -> list[Row]:
    """The coverage of each class, the halves being the same for all seeds."""
    infos = [info for _, info in read]
    each = [arrays(frame, info) for frame, info in read]
    classes = infos[0].classes
    code = patient_codes(each[0].patients, np.ones(len(each[0].labels), dtype=bool))
    rng = np.random.default_rng(0)
    found = np.empty((HALVES, len(each), len(classes)))
    for half in range(HALVES):
        fitting = np.zeros(code.max() + 1, dtype=bool)
        fitting[rng.permutation(len(fitting))[: len(fitting) // 2]] = True
        for seed, rows in enumerate(each):
            found[half, seed] = _covered(rows, infos[seed], fitting[code])
    return [
        Row(
            experiment,
            name,
            len(each),
            float(found[:, :, column].mean()),
            np.unique(code[each[0].labels[:, column] == 1]).size / 2,
            float(found[:, :, column].mean(axis=1).std(ddof=1)),
            [_shifted(rows, info, column) for rows, info in zip(each, infos, strict=True)]
            if infos[0].conformal
            else None,
            int((each[0].labels[:, column] == 1).sum()),
        )
        for column, name in enumerate(classes)
    ]


def _covered(rows: Arrays, info: PredictionsInfo, fitting: np.ndarray) -> np.ndarray:
    """By class: sets are fitted on some cases, and judged on the others."""
    patients = None if rows.patients is None else rows.patients[fitting]
    made = conformal.fit(
        rows.probabilities[fitting],
        rows.labels[fitting],
        info.task,
        info.classes,
        coverage=COVERAGE,
        patients=patients,
    )
    judged = [_share(rows, made, info, column, ~fitting).value for column in range(len(info.classes))]
    return np.array(judged, dtype=np.float64)


def _shifted(rows: Arrays, info: PredictionsInfo, column: int) -> Estimate:
    assert info.conformal is not None
    return _share(rows, info.conformal, info, column, np.ones(len(rows.labels), dtype=bool))


def _share(rows: Arrays, made: Conformal, info: PredictionsInfo, column: int, which: np.ndarray) -> Estimate:
    """How often sets hold a class that is there, each patient weighing one."""
    which = which & (rows.labels[:, column] == 1)
    there = conformal.possible(rows.probabilities[which], made, info.classes)[:, column]
    patients = None if rows.patients is None else rows.patients[which]
    return mean_share_of(there[None], patients, each_patient=True)


def _text(lines: list[str]) -> str:
    prose = (
        f"Written by `python -m benchmarks conformal`. A simulation: answers to the test split, scored before, in "
        f"{HALVES} random halves of patients; sets are fitted on one half and judged on the other, with the model "
        f"frozen. There patients are alike, and each class must be covered in {COVERAGE:.0%} of its cases, each "
        "patient weighing one, or more by as much as one patient is of those that sets were fitted on, within "
        f"{100 * WITHIN:g} points. The last column is no simulation: the bundle's own quantiles, from the calibration "
        "split, on the whole test split. How far it is from what was declared is the true shift between the two, which "
        "no method undoes without labels from there."
    )
    columns = "experiment", "class", "cases", "over halves", "SD of halves", "as promised"
    head = f"| {' | '.join(columns)} | from calibration to test, by seed |"
    return "\n".join([fill(prose, 120), "", head, "|---|---|---|---|---|---|---|", *lines])


def _line(row: Row) -> str:
    held = "yes" if row.beyond <= WITHIN else "**no**"
    shifted = (
        "its files name no quantiles"
        if row.shifted is None
        else "; ".join(
            f"{100 * (one.value or 0):.1f} ({100 * (one.low or 0):.1f} to {100 * (one.high or 0):.1f})"
            for one in row.shifted
        )
    )
    numbers = f"{row.cases} | {100 * row.halves:.1f} | {100 * row.between:.1f}"
    return f"| {row.experiment} | {row.name} | {numbers} | {held} | {shifted} |"
