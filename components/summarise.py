"""Join the seeds of an experiment: what the recipe reaches, not what one lucky run did."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from cadx.explaining import draw_band, patient_band, roc_heights, show_subgroups, square, title
from cadx.files import write_json
from cadx.metrics import METRICS, Scores, roc, score, score_subgroups
from cadx.predicting import Arrays, PredictionsInfo, arrays, read_predictions, subgroups
from cadx.reporting import MUTED, Page, panels
from components.contract import Ins, Out, Params, step


class SummariseParams(Params):
    """How finely the seeds are joined."""

    resamples: int = Field(
        default=1000, ge=0, description="bootstrap resamples of patients, each applied to all seeds"
    )
    subgroups: tuple[Literal["site", "sex", "age", "scanner"], ...] = ("site", "sex", "age", "scanner")
    minimum_n: int = Field(default=20, ge=1, description="patients that an estimate in a subgroup needs")


@step
def summarise(*, predictions: Ins, metrics: Out, report: Out, params: SummariseParams) -> None:
    """Join the predictions of all seeds; write joint metrics with intervals, and a report.

    The value is the mean over seeds; its interval covers the sampling of patients, each resample of whom
    is applied to all seeds. How far the seeds differ stands beside it.

    Raises:
        ValueError: if the files are not of one experiment and split, or not of the same samples.
    """
    frame, infos, rows = _read(predictions)
    info = infos[0]
    what: dict[str, Any] = {"task": info.task, "classes": info.classes, "positive": info.positive}
    scores = score(*rows[:3], **what, patients=rows.patients, resamples=params.resamples)
    by_subgroup = score_subgroups(
        *rows[:3],
        subgroups(frame, params.subgroups),
        **what,
        patients=rows.patients,
        minimum_n=params.minimum_n,
    )
    seeds = [one.seed for one in infos]
    write_json(
        metrics,
        {
            "schema": 1,
            "experiment": info.experiment,
            "seeds": seeds,
            "split": info.split,
            "bundles": [one.bundle for one in infos],
            "n": scores.n,
            "n_patients": scores.n_patients,
            "clustered": info.clustered,
            "warnings": list(info.warnings),
            "metrics": _dump(scores.metrics),
            "by_seed": scores.by_seed,
            "between_seed_sd": scores.between_seed_sd,
            "by_class": {name: _dump(values) for name, values in scores.by_class.items()},
            "by_subgroup": {attribute: _dump(groups) for attribute, groups in by_subgroup.items()},
            "confusion": scores.confusion.model_dump(mode="json"),
        },
    )
    plural = "seed" if len(seeds) == 1 else "seeds"
    page = Page(f"{info.experiment}: {info.split} split", f"{len(seeds)} training {plural} joined")
    _metrics(page, info, scores, seeds)
    _curves(page, info, rows, seeds)
    show_subgroups(page, by_subgroup, scores.metrics, note="Means over seeds.")
    page.section("Assumptions")
    for assumption in info.assumptions or (
        "The source says all that was needed: nothing was taken as given.",
    ):
        page.text(assumption)
    page.write(report)


def _read(paths: Sequence[Path]) -> tuple[pd.DataFrame, list[PredictionsInfo], Arrays]:
    """The common columns, what each file is, labels N K, probabilities and decisions S N K, by seed."""
    read = sorted(((*read_predictions(path), path) for path in paths), key=lambda one: one[1].seed)
    first, info, first_path = read[0]
    shared = ["sample_id", "patient", *(f"label_{name}" for name in info.classes)]
    for (frame, other, path), (_, before, before_path) in zip(read[1:], read, strict=False):
        for field in ("experiment", "split", "task", "classes", "positive", "clustered"):
            if getattr(other, field) != getattr(info, field):
                raise ValueError(
                    f"{path}: {field} is {getattr(other, field)!r}, "
                    f"but {first_path} has {getattr(info, field)!r}; join seeds of one experiment and split"
                )
        if other.seed == before.seed:
            raise ValueError(f"{path}: seed {other.seed} again, as in {before_path}; give each seed once")
        if not frame["sample_id"].equals(first["sample_id"]):
            raise ValueError(
                f"{path}: other samples than {first_path}; evaluate all seeds on the same splits"
            )
        if not frame[shared].equals(first[shared]):
            raise ValueError(
                f"{path}: other labels or patients than {first_path}; evaluate all seeds on one dataset"
            )
    each = [arrays(frame, one) for frame, one, _ in read]
    return (
        first,
        [one for _, one, _ in read],
        Arrays(
            each[0].labels,
            np.stack([one.probabilities for one in each]),
            np.stack([one.decisions for one in each]),
            each[0].patients,
        ),
    )


def _dump(records: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record.model_dump(mode="json") for name, record in records.items()}


def _metrics(page: Page, info: PredictionsInfo, scores: Scores, seeds: Sequence[int]) -> None:
    shown = ("auc", "sensitivity", "specificity") if info.task == "binary" else ("auc", "accuracy", "f1")
    page.facts([(title(name), scores.metrics[name]) for name in shown if name in scores.metrics])
    about = f"the class {info.positive!r}" if info.positive else "the mean over classes"
    patients = f" of {scores.n_patients:,} patients" if info.clustered else ""
    page.text(
        f"{scores.n:,} labelled images{patients} of the {info.split} split, scored by {len(seeds)} bundles; "
        f"the numbers speak of {about}. In brackets: 95 % confidence intervals."
    )
    for warning in info.warnings:
        page.callout("warn", warning)
    page.section("Metrics")
    page.table(
        [
            {
                "metric": title(name),
                "mean (95 % interval)": estimate,
                **{f"seed {seed}": value for seed, value in zip(seeds, scores.by_seed[name], strict=True)},
                "SD of seeds": scores.between_seed_sd[name],
            }
            for name, estimate in scores.metrics.items()
        ],
        "The interval is over patients; the standard deviation says how far training runs differ.",
    )
    with page.details("What each metric is, and how its interval was made"):
        page.table(
            [
                {
                    "metric": title(name),
                    "what it is": METRICS[name].meaning,
                    "how the interval was made": estimate.method,
                }
                for name, estimate in scores.metrics.items()
            ]
        )


def _curves(page: Page, info: PredictionsInfo, rows: Arrays, seeds: Sequence[int]) -> None:
    page.section("ROC")
    names = [info.positive] if info.positive else list(info.classes)
    drawing, (axes,) = panels(4.6, 4.2, columns=1)
    for name in names:
        column = info.classes.index(name)
        known = ~np.isnan(rows.labels[:, column])
        labels, scores = rows.labels[known, column], rows.probabilities[:, known, column]
        patients = None if rows.patients is None else rows.patients[known]
        if band := patient_band(roc_heights, labels, scores, patients):
            draw_band(axes, band, "mean" if info.positive else name)
        if info.positive:
            for seed, row in zip(seeds, scores, strict=True):
                curve = roc(labels, row)
                axes.plot(curve.false_positive_rate, curve.sensitivity, linewidth=0.9, label=f"seed {seed}")
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    square(axes, "1 - specificity", "sensitivity")
    axes.legend(loc="lower right", fontsize=8)
    page.figure(
        drawing,
        "The mean over seeds with pointwise 95 % limits: bootstrap of "
        f"{'patients' if info.clustered else 'images'}, each resample applied to all seeds.",
        alt=f"ROC curves of {', '.join(names)}",
    )
