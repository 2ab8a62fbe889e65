"""Classification: probabilities and calls against labels, in numbers and in pictures."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cadx.datasets import DatasetFolder
from cadx.evaluating import decisions
from cadx.evaluating.evaluation import Aggregation, Evaluation, Settings, described, dump
from cadx.explaining import (
    draw_band,
    next_at,
    overlay,
    patient_band,
    roc_heights,
    show_subgroups,
    square,
    title,
)
from cadx.metrics import (
    METRICS,
    Scores,
    calibration_curve,
    precision_recall,
    roc,
    score,
    score_subgroups,
    subgroup_gaps,
)
from cadx.predicting import (
    Arrays,
    PredictionsInfo,
    Predictor,
    answer_table,
    arrays,
    decide,
    subgroups,
)
from cadx.reporting import INK, MUTED, PALETTE, Page, panels
from cadx.types import RawImage

NUM_MISTAKES = 6
ROC_POINTS = 101
HEADLINES = {
    "binary": ("auc", "sensitivity", "specificity", "ppv", "npv", "calibration_slope"),
    "multiclass": ("auc", "accuracy", "balanced_accuracy", "f1", "brier", "calibration_slope"),
    "multilabel": ("auc", "average_precision", "sensitivity", "specificity", "f1", "calibration_slope"),
}


class Mistake(NamedTuple):
    """A wrong answer about one class."""

    sample_id: str
    name: str
    probability: float


class Classification(Evaluation):
    """Probabilities and calls of one or several classes."""

    def __init__(self, frame: pd.DataFrame, info: PredictionsInfo, settings: Settings) -> None:
        self.aggregate, self.info = settings.aggregate, info
        self.frame = frame if self.aggregate == "none" else by_patient(frame, info, self.aggregate)
        self.rows = arrays(self.frame, info)
        what: dict[str, Any] = {"task": info.task, "classes": info.classes, "positive": info.positive}
        self.scores = score(
            *self.rows[:3], **what, patients=self.rows.patients, resamples=settings.resamples, seed=info.seed
        )
        self.n, self.n_patients = self.scores.n, self.scores.n_patients
        groups = subgroups(self.frame, settings.subgroups)
        what |= {"patients": self.rows.patients, "minimum_n": settings.minimum_n}
        self.by_subgroup = score_subgroups(
            *self.rows[:3], groups, **what, resamples=settings.resamples, seed=info.seed
        )
        self.gaps = subgroup_gaps(*self.rows[:3], groups, **what)
        self.operating_point = decisions.operating_point(info, self.rows)
        self.predictive_values = {
            name: decisions.at_other_prevalences(self.scores.by_class[name])
            for name in decisions.called_classes(info)
        }
        self.net_benefit = decisions.net_benefit(info, self.rows, _of_interest(info))
        # Sets are promised for images, whatever becomes of a patient's.
        self.coverage = decisions.coverage(info, arrays(frame, info), frame["site"].astype(str).tolist())

    @staticmethod
    def predict(predictor: Predictor, folder: DatasetFolder, sample_ids: Sequence[str]) -> pd.DataFrame:
        """The rows of the predictions file."""
        manifest = predictor.bundle.manifest
        probabilities = predictor.probabilities(predictor.stored(folder, sample_ids))
        answers = answer_table(
            probabilities, predictor.decide(probabilities), manifest.task, manifest.classes
        )
        return pd.concat([described(folder, sample_ids), answers], axis=1)

    def record(self) -> dict[str, Any]:
        """Metrics, by class, by subgroup and their gaps, the confusion matrix, and what the decisions are worth."""
        return {
            "aggregate": self.aggregate,
            "metrics": dump(self.scores.metrics),
            "by_class": {name: dump(values) for name, values in self.scores.by_class.items()},
            "by_subgroup": {attribute: dump(groups) for attribute, groups in self.by_subgroup.items()},
            "gaps": decisions.gaps_record(self.gaps),
            "confusion": self.scores.confusion.model_dump(mode="json"),
            "operating_point": {name: dump(parts) for name, parts in self.operating_point.items()},
            "predictive_values": {
                name: {prevalence: dump(values) for prevalence, values in found.items()}
                for name, found in self.predictive_values.items()
            },
            "decision_curve": self.net_benefit,
            "conformal": decisions.coverage_record(self.coverage),
            "roc": self._roc(),
        }

    def _roc(self) -> dict[str, list[float]] | None:
        """At most `ROC_POINTS` points of the positive class's curve, for pages that draw it; None without one."""
        if self.info.positive is None:
            return None
        column = self.info.classes.index(self.info.positive)
        curve = roc(self.rows.labels[:, column], self.rows.probabilities[:, column])
        places = np.linspace(0, len(curve.threshold) - 1, min(ROC_POINTS, len(curve.threshold)))
        rows = places.round().astype(int)
        return {
            "false_positive_rate": curve.false_positive_rate[rows].tolist(),
            "sensitivity": curve.sensitivity[rows].tolist(),
            # The first point calls nobody: its threshold is infinite, which JSON does not know.
            "threshold": np.minimum(curve.threshold[rows], 1.0).tolist(),
        }

    def show_answer(self, page: Page) -> None:
        """Add the headline."""
        _answer(page, self.info, self.scores, self.aggregate)

    def show_numbers(self, page: Page) -> None:
        """Add metrics, curves, decisions and subgroups."""
        _metrics(page, self.info, self.scores)
        decisions.show_calibration(page, self.scores)
        _curves(page, self.info, self.rows)
        _calls(page, self.info, self.rows, self.scores)
        decisions.show_operating_point(page, self.operating_point, self.scores.by_class)
        for name, values in self.predictive_values.items():
            decisions.show_prevalences(page, name, values)
        decisions.show_net_benefit(page, self.info, self.net_benefit)
        decisions.show_coverage(page, self.info, self.coverage)
        show_subgroups(page, self.by_subgroup, self.scores.metrics)
        decisions.show_gaps(page, self.gaps)

    def show_mistakes(self, page: Page, folder: DatasetFolder, predictor: Predictor) -> None:
        """Add the worst misses and false alarms."""
        _mistakes(page, self.info, self.rows, self.frame["sample_id"].tolist(), folder, predictor)


def by_patient(frame: pd.DataFrame, info: PredictionsInfo, how: Aggregation) -> pd.DataFrame:
    """Rows of a predictions file with one row a patient, decided anew at the same thresholds.

    A patient has a finding if any image has it, and the highest or the mean probability of the images. sample_id is
    the image with the highest probability; a site, scanner, age or sex that differs between images is unknown.

    Raises:
        ValueError: if the source names no patients, or in a multiclass task a patient's images differ in class.
    """
    if not info.clustered:
        raise ValueError("aggregate: the source names no patients; set evaluate.aggregate to none")
    labels, answers = [f"label_{name}" for name in info.classes], [f"prob_{name}" for name in info.classes]
    patients = frame.groupby("patient", sort=True)
    if (
        info.task == "multiclass"
        and (patients[labels].max() - patients[labels].min()).to_numpy().max(initial=0) > 0
    ):
        raise ValueError(
            "aggregate: images of a patient differ in class; set evaluate.aggregate to none for this multiclass task"
        )
    truth, probabilities = patients[labels].max(), getattr(patients[answers], how)()
    if info.task == "binary":
        (other,) = (name for name in info.classes if name != info.positive)
        truth[f"label_{other}"] = 1 - truth[f"label_{info.positive}"]
        probabilities[f"prob_{other}"] = 1 - probabilities[f"prob_{info.positive}"]
    elif info.task == "multiclass":
        probabilities = probabilities.div(probabilities.sum(axis=1), axis=0)
    p = probabilities.to_numpy(np.float64)
    calls = decide(p, info.thresholds, info.task, info.classes, info.positive)
    strongest = frame[f"prob_{info.positive}"] if info.positive else frame[answers].max(axis=1)
    first = frame.loc[strongest.groupby(frame["patient"], sort=True).idxmax()].set_index("patient")
    whose = first[["sample_id", "site", "scanner", "age", "sex"]].copy()
    for column, unknown in (("site", ""), ("scanner", ""), ("sex", ""), ("age", np.nan)):
        differs = patients[column].nunique() > 1  # noqa: PD101 - of each patient, not of a column
        whose.loc[differs, column] = unknown
    answered = answer_table(p, calls, info.task, info.classes)
    return pd.concat([whose.join(truth).reset_index(), answered], axis=1)[info.columns]


def _of_interest(info: PredictionsInfo) -> list[str]:
    """The classes that curves are drawn of: the positive one, or all."""
    return [info.positive] if info.positive else list(info.classes)


def _answer(page: Page, info: PredictionsInfo, scores: Scores, aggregate: Aggregation) -> None:
    page.facts([(title(name), scores.metrics[name]) for name in HEADLINES[info.task]])
    about = f"the class {info.positive!r}" if info.positive else "the mean over classes"
    cases = f"{scores.n:,} labelled images" + (
        f" of {scores.n_patients:,} patients" if info.clustered else ""
    )
    if aggregate != "none":
        word = "highest" if aggregate == "max" else "mean"
        cases = f"{scores.n:,} labelled patients, each with the {word} probability of the images,"
    page.text(
        f"{cases} of the {info.split} split; the numbers speak of {about}. In brackets: 95 % confidence intervals. "
        "An estimate is called too few where errors or patients are so few that its interval is only roughly "
        "one of 95 %."
    )
    if aggregate != "none" and info.thresholds:
        page.callout("warn", "The threshold was chosen on images, and is applied to patients here.")


def _metrics(page: Page, info: PredictionsInfo, scores: Scores) -> None:
    page.section("Metrics")
    page.table(
        [
            {
                "metric": title(name),
                "value (95 % interval)": estimate,
                "n": estimate.n,
                "how the interval was made": estimate.method,
            }
            for name, estimate in scores.metrics.items()
        ],
        "n counts the cases in the value's denominator.",
    )
    with page.details("What each metric is"):
        page.table([{"metric": title(name), "what it is": METRICS[name].meaning} for name in scores.metrics])
    if len(info.classes) > 2 or info.task == "multilabel":
        shown = ("auc", "sensitivity", "specificity")
        page.table(
            [
                {"class": name, **{title(m): estimates[m] for m in shown if m in estimates}}
                for name, estimates in scores.by_class.items()
            ],
            "Each class against the rest.",
        )


def _precision_heights(labels: np.ndarray, scores: np.ndarray, grid: np.ndarray) -> np.ndarray | None:
    """Precision at the recalls of `grid`; None where there is no positive."""
    curve = precision_recall(labels, scores)
    return next_at(curve.recall, curve.precision, grid) if len(curve.recall) else None


def _curves(page: Page, info: PredictionsInfo, rows: Arrays) -> None:
    page.section("Curves")
    drawing, (roc_axes, precision_axes, calibration_axes) = panels(8.6, 2.9, columns=3)
    for name in _of_interest(info):
        column = info.classes.index(name)
        known = ~np.isnan(rows.labels[:, column])
        labels, scores = rows.labels[known, column], rows.probabilities[known, column]
        patients = None if rows.patients is None else rows.patients[known]
        curve, precision = roc(labels, scores), precision_recall(labels, scores)
        if band := patient_band(roc_heights, labels, scores[None], patients, seed=info.seed):
            draw_band(roc_axes, band, name, drawn_as=(curve.false_positive_rate, curve.sensitivity))
        if band := patient_band(_precision_heights, labels, scores[None], patients, seed=info.seed):
            draw_band(precision_axes, band, name, drawn_as=(precision.recall, precision.precision))
        bins = calibration_curve(labels, scores)
        calibration_axes.errorbar(
            bins.probability,
            bins.observed,
            yerr=np.abs(np.stack([bins.low, bins.high]) - bins.observed),
            marker="o",
            markersize=4,
            linewidth=1.2,
            elinewidth=1,
            label=name,
        )
        called = rows.decisions[known, column]
        if info.task != "multiclass" and called.any() and 0 < labels.sum() < len(labels):
            sensitivity, fall_out = called[labels == 1].mean(), called[labels == 0].mean()
            roc_axes.plot(fall_out, sensitivity, "o", color=INK, markersize=5)
            precision_axes.plot(sensitivity, labels[called].mean(), "o", color=INK, markersize=5)
    for axes in (roc_axes, calibration_axes):
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    square(roc_axes, "1 - specificity", "sensitivity")
    square(precision_axes, "recall (sensitivity)", "precision (PPV)")
    square(calibration_axes, "predicted probability", "observed share")
    for axes, heading in (
        (roc_axes, "ROC"),
        (precision_axes, "Precision-recall"),
        (calibration_axes, "Calibration"),
    ):
        axes.set_title(heading)
    if len(_of_interest(info)) > 1:
        roc_axes.legend(loc="lower right", fontsize=8)
    dot = "" if info.task == "multiclass" else "the black dot is the operating point; "
    page.figure(
        drawing,
        f"Bands: pointwise 95 % limits, bootstrap of {'patients' if info.clustered else 'images'}; {dot}"
        "calibration in ten bins with Wilson limits.",
        alt=f"ROC, precision-recall and calibration curves of {', '.join(_of_interest(info))}",
    )


def _calls(page: Page, info: PredictionsInfo, rows: Arrays, scores: Scores) -> None:
    page.section("Decisions")
    page.text(_rule(info))
    if info.task == "multilabel":
        page.table(
            [
                {
                    "class": name,
                    "threshold": info.thresholds[name],
                    "found": tp,
                    "missed": fn,
                    "false alarms": fp,
                    "rest": tn,
                }
                for name, ((tn, fp), (fn, tp)) in zip(
                    info.classes, scores.confusion.at_operating_point, strict=True
                )
            ],
            "Calls at the operating point.",
        )
        return
    if info.task == "multiclass":
        size = min(8.6, 2.2 + 0.8 * len(info.classes))
        drawing, (confusion_axes,) = panels(size, size - 0.8, columns=1)
    else:
        drawing, (confusion_axes, score_axes) = panels(8.6, 3.2, columns=2)
        _draw_scores(score_axes, info, rows)
    _draw_confusion(confusion_axes, np.array(scores.confusion.at_operating_point), info.classes)
    page.figure(
        drawing,
        "Counts, and shares of the true class."
        + (" Histogram: the dashed line is the threshold, calls lie to its right." if info.positive else ""),
        alt="Confusion matrix at the operating point"
        + (" and histogram of probabilities" if info.positive else ""),
    )


def _rule(info: PredictionsInfo) -> str:
    if info.task == "multiclass":
        return "The most probable class is called."
    rules = ", ".join(
        f"{name!r} is called at a probability of {value:.4f} or more"
        for name, value in info.thresholds.items()
    )
    return f"{rules}. Chosen on the calibration split, and frozen in the bundle."


def _draw_confusion(axes: Any, matrix: np.ndarray, classes: Sequence[str]) -> None:
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(
            column,
            row,
            f"{matrix[row, column]:,.0f}\n{share:.1%}",
            ha="center",
            va="center",
            color="white" if share > 0.6 else INK,
        )
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes, rotation=90, va="center")
    axes.set(title="Confusion matrix", xlabel="called", ylabel="truth")
    axes.tick_params(length=0)
    axes.grid(visible=False)


def _draw_scores(axes: Any, info: PredictionsInfo, rows: Arrays) -> None:
    assert info.positive is not None
    column = info.classes.index(info.positive)
    bins = np.linspace(0, 1, 41)
    for value, colour in ((0, PALETTE[0]), (1, PALETTE[1])):
        name = info.positive if value else next(c for c in info.classes if c != info.positive)
        chosen = rows.probabilities[rows.labels[:, column] == value, column]
        axes.hist(chosen, bins, color=colour, alpha=0.25)
        axes.hist(
            chosen, bins, color=colour, histtype="step", linewidth=1.4, label=f"{name} (n = {len(chosen):,})"
        )
    axes.axvline(info.thresholds[info.positive], color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(
        title="Scores", xlabel=f"probability of {info.positive}", ylabel="images (log scale)", xlim=(0, 1)
    )
    axes.legend(loc="upper center", fontsize=8)


def _mistakes(
    page: Page,
    info: PredictionsInfo,
    rows: Arrays,
    sample_ids: Sequence[str],
    folder: DatasetFolder,
    predictor: Predictor,
) -> None:
    page.section("Worst mistakes")
    with_attention = folder.info.kind == "image"
    page.text(
        "Each picture shows the "
        + (
            "image, and the same with the attention that the prediction pools by"
            if with_attention
            else "sample"
        )
        + "; below it stands the calibrated probability of the class."
    )
    for heading, mistakes in _mistakes_by_kind(info, rows, sample_ids).items():
        if not mistakes:
            page.callout("ok", f"{heading}: none.")
            continue
        shown = mistakes[:NUM_MISTAKES]
        pictures = [folder.preview(mistake.sample_id) for mistake in shown]
        if with_attention:
            pictures = _beside_their_attention(pictures, predictor)
        pairs = [
            (picture, f"{mistake.sample_id}: {mistake.name} {mistake.probability:.3f}")
            for mistake, picture in zip(shown, pictures, strict=True)
        ]
        rest = "" if len(shown) == len(mistakes) else f" of {len(mistakes)}"
        page.text(f"{heading}: {len(shown)}{rest}, the most confident first.")
        page.images(pairs, max_px=360)


def _beside_their_attention(pictures: list[np.ndarray], predictor: Predictor) -> list[np.ndarray]:
    answers = predictor.predict_many([RawImage(pixels) for pixels in pictures], attention=True)
    pairs = []
    for pixels, answer in zip(pictures, answers, strict=True):
        assert answer.attention is not None
        plain = overlay(pixels, np.zeros(pixels.shape[:2]))
        pairs.append(np.concatenate([plain, overlay(pixels, answer.attention)], axis=1))
    return pairs


def _mistakes_by_kind(
    info: PredictionsInfo, rows: Arrays, sample_ids: Sequence[str]
) -> dict[str, list[Mistake]]:
    """Misses and false alarms, the most confident first."""
    found: dict[str, list[Mistake]] = {"Missed": [], "False alarms": []}
    for name in _of_interest(info):
        column = info.classes.index(name)
        for heading, label in (("Missed", 1), ("False alarms", 0)):
            wrong = (rows.labels[:, column] == label) & (rows.decisions[:, column] != label)
            found[heading].extend(
                Mistake(sample_ids[i], name, float(rows.probabilities[i, column]))
                for i in np.flatnonzero(wrong).tolist()
            )
    found["Missed"].sort(key=lambda mistake: (mistake.probability, mistake.sample_id))
    found["False alarms"].sort(key=lambda mistake: (-mistake.probability, mistake.sample_id))
    return found
