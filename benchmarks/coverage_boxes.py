"""Coverage of the intervals of detections: AP, AR, FROC, shares of lesions and boxes.

Writes a section of docs/coverage.md.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from benchmarks._claim import claim, put_section
from benchmarks._coverage import PAGE, REPEATS, Held, Tally, each, summary, table
from cadx.detection import METRICS, calculate_detection_metrics, paired_differences
from cadx.metrics import Difference, Estimate

SECTION = "Boxes"

LONG_TAIL_REPEATS = 300
"""Sets of a line in which few patients have many images and most have one: a share is known to within 2.5 points."""

RESAMPLES = 1000
"""As a report's: the correction of the bias is a mean over them."""
_TRUTH_IMAGES = 200_000
_THRESHOLD = 0.6  # the score from which a box is called
_FALSE = 4.0  # false boxes an image
_SKILL, _LESS = 1.5, 0.5  # of the two detectors: how far lesions' logits lie above 0, and by how much less
_SIDES_PX, _SHARES = (20.0, 60.0, 150.0), (0.3, 0.4, 0.3)  # of lesions: small, medium and large ones
_OFFSET = 0.25  # the most that a box is moved, in parts of its side: an IoU of 0.6 to 1
_MOST = 10  # the part of all images that one patient of the long tail has at most
_CLASS = "lesion"

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]


class Cell(NamedTuple):
    """One setting; `per_patient` is 0 where images a patient have a long tail."""

    images: int
    per_patient: int

    @property
    def images_of_a_patient(self) -> str:
        """As the page says it."""
        return str(self.per_patient or f"1 to {self.images // _MOST}")

    @property
    def repeats(self) -> int:
        """Simulated sets."""
        return REPEATS if self.per_patient else LONG_TAIL_REPEATS


# Dear (ten minutes each), hence few. The sets of a long tail have about 60 patients, and 150.
_CELLS = (Cell(60, 1), Cell(200, 1), Cell(200, 2), Cell(300, 3), Cell(200, 0), Cell(600, 0))
_PAIRED_CELLS = (Cell(200, 1), Cell(300, 3))


class Drawn(NamedTuple):
    """One test set: the boxes of two detectors, the lesions, and whose the images are."""

    found: pd.DataFrame
    found_by_other: pd.DataFrame
    lesions: pd.DataFrame
    patients: IntArray


def claims() -> Iterator[dict[str, Any]]:
    """Every interval that a report gives without "too few" covers the truth in 93 to 97 of 100 sets."""
    true, gaps = truths()
    one = list(zip(_CELLS, each(partial(measure, true=true), _CELLS, "One detector"), strict=True))
    held = each(partial(measure_differences, true=gaps), _PAIRED_CELLS, "Two detectors")
    two = list(zip(_PAIRED_CELLS, held, strict=True))
    put_section(PAGE, SECTION, "\n".join(_text(one, two)))
    promised = [share for _, held in (*one, *two) for share in held.values() if share.is_promised]
    unit = "cells and metrics within 93 to 97 % (peer: all whose reports do not say 'too few')"
    yield claim("coverage_boxes.within", sum(share.is_within for share in promised), len(promised), unit)


def draw(cell: Cell, rng: np.random.Generator) -> Drawn:
    """Half of the images hold lesions, 1.5 each; one in ten is found at no score.

    A patient's images tend to be alike in whether they hold any, in how well lesions score, and in false boxes.
    In a long tail the images of a patient follow a Pareto distribution of index 1.1, up to a tenth of all.
    """
    image = np.arange(cell.images)
    if cell.per_patient:
        patients = image // cell.per_patient
    else:
        sizes = np.minimum(1 + rng.pareto(1.1, cell.images), cell.images // _MOST).astype(np.intp)
        patients = np.repeat(image, sizes)[: cell.images]
    size = int(patients[-1]) + 1
    chance = rng.beta(1, 1, size)[patients] if cell.per_patient != 1 else np.full(cell.images, 0.5)
    count = (rng.random(cell.images) < chance) * (1 + rng.poisson(0.5, cell.images))
    owner = np.repeat(image, count)
    place = np.arange(owner.size) - np.repeat(np.cumsum(count) - count, count)
    side = _sides(owner.size, rng)
    left = 300.0 * place.astype(np.float64)
    lesions = _frame(owner, left, np.zeros(owner.size), side)
    seen = np.sqrt(0.5) * (rng.normal(size=size)[patients[owner]] + rng.normal(size=owner.size))
    false = rng.poisson(_FALSE * rng.gamma(2, 0.5, size)[patients])

    def detector(skill: float) -> pd.DataFrame:
        moved = _OFFSET * side * rng.random(owner.size)
        # Half of the variance of what a lesion scores is the same for both detectors.
        logits = skill + np.sqrt(0.5) * (seen + rng.normal(size=owner.size))
        hits = _frame(owner, left + moved, np.zeros(owner.size), side)
        hits["score"] = special.expit(logits)
        where = np.repeat(image, false)
        misses = _frame(where, np.zeros(where.size), np.full(where.size, 1000.0), _sides(where.size, rng))
        misses["score"] = special.expit(rng.normal(-0.5, 1, where.size))
        return pd.concat([hits[rng.random(owner.size) < 0.9], misses], ignore_index=True)

    return Drawn(detector(_SKILL), detector(_SKILL - _LESS), lesions, patients)


def _sides(size: int, rng: np.random.Generator) -> FloatArray:
    return np.array(_SIDES_PX)[rng.choice(len(_SIDES_PX), size, p=_SHARES)]


def _names(images: int) -> list[str]:
    return list(map(str, range(images)))


def _frame(image: IntArray, x0: FloatArray, y0: FloatArray, side: FloatArray) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "sample_id": image.astype(str),
            "class": _CLASS,
            "x0": x0,
            "y0": y0,
            "x1": x0 + side,
            "y1": y0 + side,
        }
    )


def truths() -> tuple[dict[str, float], dict[str, float]]:
    """The values of the first detector, and of the difference of the two, in a very large set.

    Its images are each of another patient: that leaves values as they are.
    """
    drawn = draw(Cell(_TRUTH_IMAGES, 1), np.random.default_rng(0))
    first, second = (
        calculate_detection_metrics(
            found,
            drawn.lesions,
            _names(_TRUTH_IMAGES),
            classes=[_CLASS],
            score_threshold=_THRESHOLD,
            resamples=0,
        ).metrics
        for found in (drawn.found, drawn.found_by_other)
    )
    true = {name: one.value for name, one in first.items() if one.value is not None}
    others = {name: one.value for name, one in second.items() if one.value is not None}
    return true, {name: true[name] - others[name] for name in ("ap", "ap50", "froc")}


def measure(cell: Cell, true: dict[str, float]) -> dict[str, Held]:
    """The coverage of every metric of one detector in one cell."""

    def told(drawn: Drawn) -> Mapping[str, Estimate]:
        return calculate_detection_metrics(
            drawn.found,
            drawn.lesions,
            _names(cell.images),
            classes=[_CLASS],
            patients=drawn.patients,
            score_threshold=_THRESHOLD,
            resamples=RESAMPLES,
        ).metrics

    return _measure(cell, 1, told, {name: true[name] for name in METRICS})


def measure_differences(cell: Cell, true: dict[str, float]) -> dict[str, Held]:
    """The coverage of the differences of two detectors in one cell."""

    def told(drawn: Drawn) -> Mapping[str, Difference]:
        return paired_differences(
            drawn.found,
            drawn.found_by_other,
            drawn.lesions,
            _names(cell.images),
            classes=[_CLASS],
            patients=drawn.patients,
            resamples=RESAMPLES,
        )

    return _measure(cell, 2, told, true)


def _measure(
    cell: Cell,
    stream: int,
    told: Callable[[Drawn], Mapping[str, Estimate | Difference]],
    true: dict[str, float],
) -> dict[str, Held]:
    """How often what is told of drawn sets holds what is true; `stream` keeps their random numbers apart."""
    rng, tally = np.random.default_rng([stream, *cell]), Tally()
    for _ in range(cell.repeats):
        tally.add(told(draw(cell, rng)))
    return {name: tally.held(name, value) for name, value in true.items()}


def _text(one: list[tuple[Cell, dict[str, Held]]], two: list[tuple[Cell, dict[str, Held]]]) -> list[str]:
    everything = [
        *((_title(name), share) for _, held in one for name, share in held.items()),
        *((f"difference of {_title(name)}", share) for _, held in two for name, share in held.items()),
    ]
    prose = (
        f"Written by `python -m benchmarks coverage_boxes`: {REPEATS:,} simulated test sets a line, {RESAMPLES} "
        "resamples a set. Half of the images hold lesions, 1.5 each, of all three sizes; there are "
        f"{_FALSE:g} false boxes an image. In the last 2 lines, of {LONG_TAIL_REPEATS} sets each, most patients have "
        "one image and a few up to a tenth of all (Pareto, index 1.1): about 60 patients, and 150. True values are "
        f"those of a set of {_TRUTH_IMAGES:,} images. A share is "
        'promised where fewer than half of the reports say "too few" beside the interval, or give none; elsewhere it '
        f"stands in brackets. {summary(everything)}"
    )
    groups: dict[str, list[str]] = {"AP and AR": [], "FROC": [], "At the operating point, and of images": []}
    ap, froc, rest = groups.values()
    for name in METRICS:
        group = ap if name.startswith(("ap", "ar")) else froc if "froc" in name or "_fp" in name else rest
        group.append(name)
    bias = (
        "AP of a finite set lies above that of all patients, since precision at a recall is the best at this or any "
        "higher recall, and that of a resample higher still. What chance adds to the best of equals grows as its "
        "standard deviation, and a resample doubles the variance: the bias is 1 + sqrt(2) times what resamples show. "
        "The limits of AP are moved down by that, and the correction counts as an error of its own; those of AR and "
        "FROC are moved by what resamples show. Percentiles alone held the AP in 87.4 of 100 sets of 200 images."
    )
    lines = [fill(prose, 120), "", fill(bias, 120)]
    for heading, names in groups.items():
        lines += ["", f"### {heading}", "", *_table(names, one)]
    if two:
        lines += [
            "",
            "### Differences of two detectors",
            "",
            fill(
                f"On the same images; the second one's lesions score {_LESS:g} lower on the logit. The intervals are "
                "those of `cadx compare` and of the gate's margins.",
                120,
            ),
            "",
            *_table(list(two[0][1]), two),
        ]
    return lines


def _table(names: list[str], cells: list[tuple[Cell, dict[str, Held]]]) -> list[str]:
    return table(
        ("images", "a patient", *map(_title, names)),
        [(cell.images, cell.images_of_a_patient, *(held[name] for name in names)) for cell, held in cells],
    )


def _title(name: str) -> str:
    short = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ar": "AR", "froc": "FROC", "image_auc": "image AUC"}
    return short.get(name, name.replace("ap_", "AP ").replace("_fp", " FP").replace("_", " "))
