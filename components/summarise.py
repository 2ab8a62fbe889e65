"""Join the seeds of an experiment: what the recipe reaches, not what one lucky run did."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from cadx.evaluating import Attribute, Detection, Settings, show_assumptions
from cadx.evaluating.evaluation import dump
from cadx.explaining import draw_band, patient_band, roc_heights, show_subgroups, square, title
from cadx.files import write_json
from cadx.metrics import METRICS, Scores, roc, score, score_subgroups
from cadx.predicting import Arrays, PredictionsInfo, arrays, box_table, read_predictions, subgroups
from cadx.reporting import MUTED, Page, panels
from components.contract import Ins, Out, Params, step


class SummariseParams(Params):
    """How finely the seeds are joined."""

    resamples: int = Field(
        default=1000, ge=0, description="bootstrap resamples of patients, each applied to all seeds"
    )
    subgroups: tuple[Attribute, ...] = ("site", "sex", "age", "scanner")
    minimum_n: int = Field(default=20, ge=1, description="patients that an estimate in a subgroup needs")


@step
def summarise(*, predictions: Ins, metrics: Out, report: Out, params: SummariseParams) -> None:
    """Join the predictions of all seeds; write joint metrics with intervals, and a report.

    The value is the mean over seeds; its interval covers the sampling of patients, each resample of whom
    is applied to all seeds. How far the seeds differ stands beside it.

    Raises:
        ValueError: if the files are not of one experiment and split, or not of the same samples.
    """
    read = _read(predictions)
    frame, info = read[0]
    settings = Settings(resamples=params.resamples, subgroups=params.subgroups, minimum_n=params.minimum_n)
    joined = (
        Detection(frame, info, settings, read[1:]) if info.task == "detection" else _Labels(read, settings)
    )
    write_json(
        metrics,
        {
            "schema": 1,
            "experiment": info.experiment,
            "seeds": [one.seed for _, one in read],
            "split": info.split,
            "bundles": [one.bundle for _, one in read],
            "n": joined.n,
            "n_patients": joined.n_patients,
            "clustered": info.clustered,
            "warnings": list(info.warnings),
            **joined.record(),
        },
    )
    plural = "seed" if len(read) == 1 else "seeds"
    page = Page(f"{info.experiment}: {info.split} split", f"{len(read)} training {plural} joined")
    joined.show_answer(page)
    for warning in info.warnings:
        page.callout("warn", warning)
    joined.show_numbers(page)
    show_assumptions(page, info)
    page.write(report)


class _Labels:
    """Probabilities and calls of several seeds, joined."""

    def __init__(self, read: Sequence[tuple[pd.DataFrame, PredictionsInfo]], settings: Settings) -> None:
        frame, self.info = read[0]
        self.seeds = [one.seed for _, one in read]
        each = [arrays(rows, info) for rows, info in read]
        self.rows = Arrays(
            each[0].labels,
            np.stack([one.probabilities for one in each]),
            np.stack([one.decisions for one in each]),
            each[0].patients,
        )
        what: dict[str, Any] = {
            "task": self.info.task,
            "classes": self.info.classes,
            "positive": self.info.positive,
            "patients": self.rows.patients,
        }
        self.scores = score(*self.rows[:3], **what, resamples=settings.resamples)
        self.n, self.n_patients = self.scores.n, self.scores.n_patients
        self.by_subgroup = score_subgroups(
            *self.rows[:3], subgroups(frame, settings.subgroups), **what, minimum_n=settings.minimum_n
        )

    def record(self) -> dict[str, Any]:
        """What metrics.json says beside the facts that every kind shares."""
        return {
            "metrics": dump(self.scores.metrics),
            "by_seed": self.scores.by_seed,
            "between_seed_sd": self.scores.between_seed_sd,
            "by_class": {name: dump(values) for name, values in self.scores.by_class.items()},
            "by_subgroup": {attribute: dump(groups) for attribute, groups in self.by_subgroup.items()},
            "confusion": self.scores.confusion.model_dump(mode="json"),
        }

    def show_answer(self, page: Page) -> None:
        """Add the headline."""
        _answer(page, self.info, self.scores, self.seeds)

    def show_numbers(self, page: Page) -> None:
        """Add metrics, curves and subgroups."""
        _metrics(page, self.scores, self.seeds)
        _curves(page, self.info, self.rows, self.seeds)
        show_subgroups(page, self.by_subgroup, self.scores.metrics, note="Means over seeds.")


def _read(paths: Sequence[Path]) -> list[tuple[pd.DataFrame, PredictionsInfo]]:
    """Each file's rows and what they are, by seed; of the same samples with the same truth."""
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
        same = frame[shared].equals(first[shared])
        if info.task == "detection":
            same &= box_table(frame, "lesions").equals(box_table(first, "lesions"))
        if not same:
            raise ValueError(
                f"{path}: other labels or patients than {first_path}; evaluate all seeds on one dataset"
            )
    return [(frame, one) for frame, one, _ in read]


def _answer(page: Page, info: PredictionsInfo, scores: Scores, seeds: Sequence[int]) -> None:
    shown = ("auc", "sensitivity", "specificity") if info.task == "binary" else ("auc", "accuracy", "f1")
    page.facts([(title(name), scores.metrics[name]) for name in shown if name in scores.metrics])
    about = f"the class {info.positive!r}" if info.positive else "the mean over classes"
    patients = f" of {scores.n_patients:,} patients" if info.clustered else ""
    page.text(
        f"{scores.n:,} labelled images{patients} of the {info.split} split, scored by {len(seeds)} bundles; "
        f"the numbers speak of {about}. In brackets: 95 % confidence intervals."
    )


def _metrics(page: Page, scores: Scores, seeds: Sequence[int]) -> None:
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
