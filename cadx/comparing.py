"""Two models side by side on the same patients: paired differences, a test of each, and a page to read.

    AUC                          DeLong's paired difference, for patients with several images Obuchowski's
    shares (sensitivity, ...)    Tango's interval and McNemar's p value, with the effective number of patients
    boxes (AP, AP50, FROC)       bootstrap of patients, each resample applied to both models

A difference is A minus B. Two intervals that overlap say little about it: both models saw the same patients, which is
why the cases that they answer differently decide.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd

from cadx import detection
from cadx.doubts import doubts_of
from cadx.evaluating import by_patient, judged_on, show_glossary
from cadx.explaining import draw_band, patient_band, roc_heights, square, title
from cadx.metrics import Difference, delong_difference, doubted, roc, score, tango_difference
from cadx.predicting.table import PredictionsInfo, arrays, box_table, read_predictions
from cadx.reporting import LEGEND, MARK, MISSING, MUTED, PALETTE, Page, estimate_text, panels
from cadx.types import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ComparedMetric = Literal[
    "auc", "sensitivity", "specificity", "accuracy_at_operating_point", "ap", "ap50", "froc"
]
"""The metrics whose paired difference has an interval; the last three are those of boxes."""
_OF_BOXES: tuple[ComparedMetric, ...] = ("ap", "ap50", "froc")


class Scored(NamedTuple):
    """A predictions file: its rows, what they are, and where it lies."""

    frame: pd.DataFrame
    info: PredictionsInfo
    path: Path


class Comparison(NamedTuple):
    """One metric of two models.

    Attributes:
        metric: its name in metrics.json.
        of: the class, "" where it is of all, or of the positive one.
        a: the first model's.
        b: the second model's.
        difference: A minus B, on the same cases.
    """

    metric: ComparedMetric
    of: str
    a: Estimate
    b: Estimate
    difference: Difference


class Agreement(NamedTuple):
    """How many cases two models answer rightly at their operating points."""

    both: int
    only_a: int
    only_b: int
    neither: int


def read_scored(path: Path) -> Scored:
    """A predictions file, or the one in a folder of reports.

    Raises:
        ValueError: if there is none, or it holds no row.
    """
    file = path / "predictions.parquet" if path.is_dir() else path
    scored = Scored(*read_predictions(file), file)
    if scored.frame.empty:
        raise ValueError(f"{file}: holds no row; write it again with `cadx evaluate`")
    return scored


def paired(a: Scored, b: Scored) -> Scored:
    """`b` with its rows in the order of `a`: the same samples and patients, the same truth, the same aggregation.

    Raises:
        ValueError: if they are not.
    """
    if (a.info.task, a.info.classes) != (b.info.task, b.info.classes):
        raise ValueError("the two have other classes or another task: nothing to be compared")
    if a.info.aggregate != b.info.aggregate:
        raise ValueError(
            f"the first declares evaluate.aggregate {a.info.aggregate}, the second {b.info.aggregate}: they are of "
            "other cases; score both with the same (files of older versions declare none)"
        )
    rows = pd.Index(b.frame["sample_id"]).get_indexer(a.frame["sample_id"])
    if len(a.frame) != len(b.frame) or (rows < 0).any():
        shared = int((rows >= 0).sum())
        raise ValueError(
            f"the two were scored on other images: {len(a.frame):,} and {len(b.frame):,}, of which they share "
            f"{shared:,}; score both on the same split"
        )
    ordered = b.frame.iloc[rows].reset_index(drop=True)
    truths = [_truth(one, a.info) for one in (a.frame, ordered)]
    if not all(mine.equals(theirs) for mine, theirs in zip(*truths, strict=True)):
        raise ValueError(
            "the two know other labels, lesions or patients of the same images; score both on one dataset"
        )
    return b._replace(frame=ordered)


def as_declared(scored: Scored) -> Scored:
    """One row a patient where the predictions declare that images are aggregated, else the rows as they are.

    Of two that are `paired` the patients come in the same order.
    """
    if scored.info.aggregate == "none":
        return scored
    return scored._replace(frame=by_patient(scored.frame, scored.info, scored.info.aggregate))


def all_paired(scored: Sequence[Scored]) -> list[Scored]:
    """Each with its rows in the order of the first, as `paired`.

    Raises:
        ValueError: as `paired`; it names the files.
    """
    first, *others = scored
    found = [first]
    for other in others:
        try:
            found.append(paired(first, other))
        except ValueError as error:
            raise ValueError(f"{first.path}, {other.path}: {error}") from None
    return found


def _truth(frame: pd.DataFrame, info: PredictionsInfo) -> list[pd.DataFrame]:
    """What is known of the samples, without what was answered."""
    known = frame[["patient", *(f"label_{name}" for name in info.classes)]].reset_index(drop=True)
    if info.task != "detection":
        return [known]
    lesions = box_table(frame, "lesions")
    return [known, lesions.sort_values(list(lesions.columns), ignore_index=True)]


def compare_metrics(
    a: Scored, b: Scored, metrics: Sequence[ComparedMetric] | None = None
) -> list[Comparison]:
    """Each of `metrics` of both models with its paired difference; of every class where none is the positive one.

    It is of patients where both predictions declare that images are aggregated.

    Raises:
        ValueError: if the two are not of the same cases (`paired`), or a metric is not one of their task.
    """
    info, a, b = a.info, as_declared(a), as_declared(paired(a, b))
    known = [name for name in get_args(ComparedMetric) if (name in _OF_BOXES) == (info.task == "detection")]
    metrics = known if metrics is None else metrics
    if unknown := [name for name in metrics if name not in known]:
        raise ValueError(
            f"no paired interval of {unknown[0]} in {info.task} tasks; known: {', '.join(known)}"
        )
    if info.task == "detection":
        return _compare_boxes(a, b, metrics)
    first, second = arrays(a.frame, a.info), arrays(b.frame, b.info)
    scores = [
        score(
            *rows[:3],
            task=info.task,
            classes=info.classes,
            positive=info.positive,
            patients=rows.patients,
            resamples=0,
        )
        for rows in (first, second)
    ]
    patients = np.arange(len(first.labels)) if first.patients is None else first.patients
    found = []
    for name in [info.positive] if info.positive else info.classes:
        column = info.classes.index(name)
        labels = first.labels[:, column]
        known = ~np.isnan(labels)
        right = [rows.decisions[:, column] == (labels == 1) for rows in (first, second)]
        among = {
            "sensitivity": labels == 1,
            "specificity": labels == 0,
            "accuracy_at_operating_point": known,
        }
        for metric in metrics:
            if metric == "auc":
                of_first, of_second = (rows.probabilities[:, column] for rows in (first, second))
                difference = delong_difference(labels, of_first, of_second, patients)
            else:
                which = among[metric]
                difference = tango_difference(right[0][which], right[1][which], patients[which])
            of_a, of_b = (one.by_class[name][metric] for one in scores)
            difference = doubted(difference, of_a, of_b)
            found.append(Comparison(metric, "" if info.positive else name, of_a, of_b, difference))
    return found


def _compare_boxes(a: Scored, b: Scored, metrics: Sequence[ComparedMetric]) -> list[Comparison]:
    boxes_a, boxes_b = (box_table(one.frame, "boxes") for one in (a, b))
    lesions, sample_ids = box_table(a.frame, "lesions"), a.frame["sample_id"].tolist()
    patients = a.frame["patient"].to_numpy(object) if a.info.clustered else None
    settings: dict[str, Any] = {"classes": a.info.classes, "patients": patients}
    of_a, of_b = (
        detection.calculate_detection_metrics(
            boxes, lesions, sample_ids, score_threshold=one.info.thresholds, **settings
        ).metrics
        for boxes, one in ((boxes_a, a), (boxes_b, b))
    )
    differences = detection.paired_differences(boxes_a, boxes_b, lesions, sample_ids, **settings)
    return [Comparison(name, "", of_a[name], of_b[name], differences[name]) for name in metrics]


def agreement(a: Scored, b: Scored) -> Agreement:
    """How many labelled cases both, one or none of two models answers rightly, in every class.

    A case is a patient where both predictions declare that images are aggregated.
    """
    a, b = as_declared(a), as_declared(paired(a, b))
    first, second = arrays(a.frame, a.info), arrays(b.frame, b.info)
    labelled = ~np.isnan(first.labels).all(axis=1)
    unknown = np.isnan(first.labels)
    right_a, right_b = (
        ((rows.decisions == (first.labels == 1)) | unknown).all(axis=1)[labelled] for rows in (first, second)
    )
    return Agreement(
        int((right_a & right_b).sum()),
        int((right_a & ~right_b).sum()),
        int((right_b & ~right_a).sum()),
        int((~right_a & ~right_b).sum()),
    )


def compare_files(a: Path, b: Path, page: Path) -> None:
    """Print two models side by side, and write the page with the figure.

    Args:
        a: a predictions file, or the folder of reports that holds one.
        b: another, of the same cases.
        page: the HTML file to write.

    Raises:
        ValueError: as `compare_metrics`.
    """
    from rich.console import Console
    from rich.table import Column, Table

    first = read_scored(a)
    second = paired(first, read_scored(b))
    found, counts = compare_metrics(first, second), agreement(first, second)
    rows = [_row(one) for one in found]
    headings = [Column(name, overflow="fold") for name in rows[0]]
    table = Table(*headings, title=f"A {_named(a, first)}, B {_named(b, second)}")
    for row in rows:
        table.add_row(*row.values())
    console = Console()
    console.print(table)
    if any(MARK in text for row in rows for text in row.values()):
        console.print(LEGEND, highlight=False)
    _page(a, b, first, second, found, counts).write(page)
    console.print(f"open   {page}", highlight=False)


def difference_text(difference: Difference) -> str:
    """A difference with its interval, signed, and a mark where the interval is only rough.

    >>> difference_text(Difference(value=0.01, low=-0.02, high=0.04, p=0.5, n=9, method=""))
    '+0.010 (-0.020 to +0.040)'
    """
    if difference.value is None:
        return f"unknown: {difference.method}"
    if difference.low is None or difference.high is None:
        return f"{difference.value:+.3f}, no interval: {difference.method}"
    mark = f" {MARK}" if doubts_of(difference.method) else ""
    return f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f}){mark}"


def _row(one: Comparison) -> dict[str, str]:
    p = one.difference.p
    return {
        "metric": _name(one),
        "A (95 % interval)": estimate_text(one.a),
        "B (95 % interval)": estimate_text(one.b),
        "A - B (95 % interval)": difference_text(one.difference),
        "p": MISSING if p is None else "<0.001" if p < 0.001 else f"{p:.3f}",
        "method": one.difference.method,
    }


def _name(one: Comparison) -> str:
    return f"{title(one.metric)}, {one.of}" if one.of else title(one.metric)


def _named(path: Path, scored: Scored) -> str:
    return f"{scored.info.experiment}, seed {scored.info.seed} ({path})"


def _page(
    a: Path, b: Path, first: Scored, second: Scored, found: Sequence[Comparison], counts: Agreement
) -> Page:
    info = first.info
    page = Page("Two models on the same patients", f"A: {_named(a, first)}; B: {_named(b, second)}")
    page.facts([(f"{_name(one)}, A - B", difference_text(one.difference)) for one in found[:3]])
    page.section("Differences")
    patients = f" of {first.frame['patient'].nunique():,} patients" if info.clustered else ""
    aggregated = (
        f" Each patient is one case, with the {'highest' if info.aggregate == 'max' else 'mean'} probability of its "
        "images."
        if info.aggregate != "none"
        else ""
    )
    page.text(
        f"Both models answered the same {len(first.frame):,} images{patients} of {judged_on(info.split)}.{aggregated} "
        "An interval "
        "of A - B that leaves out 0 speaks for one of them; one that holds 0 says that these patients cannot tell "
        "them apart, not that they are alike. Where many metrics are compared, some differ by chance."
    )
    page.table(
        [
            {
                name: text.replace(" ", "\u00a0") if "interval" in name else text
                for name, text in _row(one).items()
                if name != "method"
            }
            for one in found
        ]
    )
    page.table([{"metric": _name(one), "method of A - B": one.difference.method} for one in found])
    page.figure(
        _drawn(first, second, found),
        ("Left: the ROC curves with 95 % bands. Right: " if info.positive else "")
        + "A - B with its 95 % interval; to the right of the line A is better."
        + (f" Hollow squares: {MARK}." if any(doubts_of(one.difference.method) for one in found) else ""),
    )
    page.section("Cases")
    page.table(
        [
            {"answered rightly by": who, "images" if info.aggregate == "none" else "patients": count}
            for who, count in zip(
                ("both", "A alone", "B alone", "neither"),
                counts,
                strict=True,
            )
        ],
        "At each model's own operating point. Only the second and third row tell the models apart.",
    )
    page.section("Models")
    page.table(
        [
            {
                "": letter,
                "experiment": one.info.experiment,
                "seed": str(one.info.seed),
                "bundle": one.info.bundle[7:23],
                "thresholds": ", ".join(f"{name} {value:.4f}" for name, value in one.info.thresholds.items()),
            }
            for letter, one in (("A", first), ("B", second))
        ],
        "Of each bundle the first 16 digits of its digest.",
    )
    for warning in dict.fromkeys((*first.info.warnings, *second.info.warnings)):
        page.callout("warn", warning)
    show_glossary(page)
    return page


def _drawn(first: Scored, second: Scored, found: Sequence[Comparison]) -> "Figure":
    info = first.info
    columns = 2 if info.positive else 1
    drawing, axes = panels(8.6, max(3.6, 0.9 + 0.28 * len(found)), columns=columns)
    if info.positive:
        column = info.classes.index(info.positive)
        for letter, scored in (("A", first), ("B", second)):
            rows = arrays(as_declared(scored).frame, scored.info)
            labels, scores = rows.labels[:, column], rows.probabilities[:, column]
            known = ~np.isnan(labels)
            labels, scores = labels[known], scores[known]
            patients = None if rows.patients is None else rows.patients[known]
            curve = roc(labels, scores)
            if (band := patient_band(roc_heights, labels, scores[None], patients)) is not None:
                draw_band(axes[0], band, letter, drawn_as=(curve.false_positive_rate, curve.sensitivity))
        square(axes[0], "1 - specificity", "sensitivity")
        axes[0].set_title("ROC")
        if axes[0].lines:
            axes[0].legend(loc="lower right")
    forest = axes[-1]
    forest.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    for height, one in enumerate(found):
        value, low, high = one.difference.value, one.difference.low, one.difference.high
        if value is None:
            continue
        if low is not None and high is not None:
            forest.plot([low, high], [-height, -height], color=PALETTE[0], linewidth=1.6)
        forest.plot(
            [value],
            [-height],
            marker="s",
            markersize=4.5,
            color=PALETTE[0],
            markerfacecolor="white" if doubts_of(one.difference.method) else PALETTE[0],
        )
    forest.set_yticks([-height for height in range(len(found))], [_name(one) for one in found])
    forest.set(ylim=(0.6 - len(found), 0.6), xlabel="A - B", title="Differences")
    forest.grid(visible=False, axis="y")
    return drawing
