"""Classification: probabilities and calls against labels, in numbers and in pictures."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cadx.datasets import DatasetFolder
from cadx.evaluating import decisions
from cadx.evaluating.evaluation import (
    LESION_COLOUR,
    Evaluation,
    Mistake,
    Settings,
    described,
    dump,
    judged_on,
    show_metrics,
)
from cadx.evaluating.lesion_sizes import largest_lesions, only_sized, size_groups, with_reasons
from cadx.evaluating.uncertainty import disagreement, show_uncertainty, uncertainty, uncertainty_record
from cadx.explaining import (
    draw_band,
    next_at,
    patient_band,
    roc_heights,
    show_subgroups,
    square,
    title,
)
from cadx.metrics import (
    METRICS,
    Gap,
    Scores,
    Subgroup,
    calibration_curve,
    precision_recall,
    roc,
    score,
    score_subgroups,
    subgroup_gaps,
)
from cadx.predicting.table import Arrays, PredictionsInfo, answer_table, arrays, decide, subgroups
from cadx.reporting import INK, MUTED, PALETTE, Page, draw_boxes, panels
from cadx.types import Aggregation, Estimate, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cadx.predicting.predictor import Predictor

ROC_POINTS = 101
HEADLINES: dict[Task, tuple[str, ...]] = {
    "binary": ("auc", "sensitivity", "specificity", "ppv", "npv", "calibration_slope"),
    "multiclass": ("auc", "accuracy", "balanced_accuracy", "f1", "brier", "calibration_slope"),
    "multilabel": ("auc", "average_precision", "sensitivity", "specificity", "f1", "calibration_slope"),
}


class Classification(Evaluation):
    """Probabilities and calls of one or several classes.

    Attributes:
        seeds: whose answers are scored.
        infos: what the rows of each seed are; `info` is the first one.
        frame: rows of the first seed, one a patient where they are aggregated.
        rows: the same by what they mean.
        joined: those of all seeds: S N K.
    """

    frames = (
        "Lesions are framed where they are known; below each stands the calibrated probability of the class."
    )
    picture_px = 240

    def __init__(
        self,
        frame: pd.DataFrame,
        info: PredictionsInfo,
        settings: Settings,
        others: Sequence[tuple[pd.DataFrame, PredictionsInfo]] = (),
    ) -> None:
        self.check(frame, info, settings)
        read = [(frame, info), *others]
        self.info, self.infos = info, [one for _, one in read]
        self.seeds = [one.seed for one in self.infos]
        self.aggregate, self._settings = settings.aggregate, settings
        # Sets are promised for images, whatever becomes of a patient's.
        self._images, self._sites = _joined(read), frame["site"].astype(str).tolist()
        if self.aggregate != "none":
            read = [(by_patient(rows, one, self.aggregate), one) for rows, one in read]
        self.frame, self.rows, self.joined = read[0][0], arrays(read[0][0], info), _joined(read)
        self._groups = subgroups(self.frame, settings.subgroups)
        if info.positive is not None:
            ill = self.rows.labels[:, info.classes.index(info.positive)] == 1
            self._groups |= size_groups(self.frame, ill)
        self._what: dict[str, Any] = {
            "task": info.task,
            "classes": info.classes,
            "positive": info.positive,
            "patients": self.rows.patients,
        }

    @staticmethod
    def check(samples: pd.DataFrame, info: PredictionsInfo, settings: Settings) -> None:
        """Refuse images without patients, or of patients of several classes, that are to be aggregated."""
        if settings.aggregate == "none":
            return
        if not info.clustered:
            raise ValueError("the source names no patients to aggregate images by; set aggregate to none")
        classes = samples.groupby("patient")[[f"label_{name}" for name in info.classes]]
        if info.task == "multiclass" and (classes.max() - classes.min()).to_numpy().max(initial=0) > 0:
            raise ValueError(
                "aggregate: images of a patient differ in class; set aggregate to none for this multiclass task"
            )

    @cached_property
    def scores(self) -> Scores:
        """Every metric."""
        return score(*self.joined[:3], **self._what, resamples=self._settings.resamples)

    @cached_property
    def by_subgroup(self) -> dict[str, dict[str, Subgroup]]:
        """Attribute -> value -> its metrics."""
        found = score_subgroups(
            *self.joined[:3],
            self._groups,
            **self._what,
            minimum_n=self._settings.minimum_n,
            resamples=self._settings.resamples,
        )
        return with_reasons(only_sized(found))

    @cached_property
    def gaps(self) -> dict[str, dict[str, dict[str, Gap]]]:
        """Attribute -> value -> how far it is from all others."""
        found = subgroup_gaps(
            *self.joined[:3], self._groups, **self._what, minimum_n=self._settings.minimum_n
        )
        return only_sized(found)

    @cached_property
    def uncertainty(self) -> dict[str, Any]:
        """See `uncertainty.uncertainty`; empty where nothing was kept of the members."""
        return uncertainty(self.info, self.rows, self.frame)

    @cached_property
    def operating_point(self) -> dict[str, dict[str, Estimate]]:
        """See `decisions.operating_point`."""
        return decisions.operating_point(self.infos, self.joined)

    @cached_property
    def predictive_values(self) -> dict[str, dict[str, dict[str, Estimate]]]:
        """Class -> prevalence -> PPV and NPV there."""
        return {
            name: decisions.at_other_prevalences(self.scores.by_class[name])
            for name in decisions.called_classes(self.info)
        }

    @cached_property
    def net_benefit(self) -> dict[str, Any]:
        """Class -> its decision curve."""
        return decisions.net_benefit(self.info, self.joined, _of_interest(self.info))

    @cached_property
    def coverage(self) -> dict[str, Any]:
        """See `decisions.coverage`."""
        return decisions.coverage(self.infos, self._images, self._sites)

    @staticmethod
    def predict(predictor: "Predictor", folder: DatasetFolder, sample_ids: Sequence[str]) -> pd.DataFrame:
        """The rows of the predictions file; columns beyond its own are for this evaluation alone."""
        manifest = predictor.bundle.manifest
        logits, features = predictor.logits(predictor.stored(folder, sample_ids))
        probabilities = predictor.calibrated(logits)
        answers = answer_table(
            probabilities, predictor.decide(probabilities), manifest.task, manifest.classes
        )
        beside = {**largest_lesions(folder, sample_ids), **disagreement(predictor, logits, features)}
        return pd.concat([described(folder, sample_ids), answers, pd.DataFrame(beside)], axis=1)

    def record(self) -> dict[str, Any]:
        """Metrics, by class, by subgroup and their gaps, the confusion matrix, and what the decisions are worth."""
        several = {"by_seed": self.scores.by_seed, "between_seed_sd": self.scores.between_seed_sd}
        return {
            "aggregate": self.aggregate,
            "metrics": dump(self.scores.metrics),
            **(several if len(self.seeds) > 1 else {}),
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
            "uncertainty": uncertainty_record(self.uncertainty),
            "roc": self._roc(),
        }

    def _roc(self) -> dict[str, list[float]] | None:
        """At most `ROC_POINTS` points of the positive class's curve, for pages that draw it; None without one.

        None of several seeds, too: the mean of their curves has no thresholds.
        """
        if self.info.positive is None or len(self.seeds) > 1:
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
        self._show_answer(page)

    def show_numbers(self, page: Page) -> None:
        """Add metrics, curves, decisions and subgroups."""
        show_metrics(page, self.scores, self.seeds, METRICS, "n counts the cases in the value's denominator.")
        self._show_classes(page)
        decisions.show_calibration(page, self.scores)
        self._show_curves(page)
        self._show_calls(page)
        decisions.show_operating_point(page, self.operating_point, self.scores.by_class)
        for name, values in self.predictive_values.items():
            decisions.show_prevalences(page, name, values)
        decisions.show_net_benefit(page, self.infos, self.net_benefit)
        decisions.show_coverage(page, self.coverage)
        show_uncertainty(page, self.uncertainty)
        show_subgroups(page, self.by_subgroup, self.scores.metrics)
        decisions.show_gaps(page, self.gaps)

    def draw_curve(self, axes: "Axes") -> bool:
        """Draw ROC curves: of the positive class, or of each; False where a class is missing."""
        drawn = False
        for name in _of_interest(self.info):
            labels, scores, patients = self._of_class(name)
            if band := patient_band(roc_heights, labels, scores, patients):
                curve = roc(labels, scores[0])
                exact = (curve.false_positive_rate, curve.sensitivity) if len(scores) == 1 else None
                draw_band(axes, band, name, drawn_as=exact)
                drawn = True
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        square(axes, "1 - specificity", "sensitivity")
        axes.set_title("ROC")
        if len(_of_interest(self.info)) > 1:
            axes.legend(loc="lower right", fontsize=8)
        return drawn

    def mistakes(self) -> dict[str, list[Mistake]]:
        """Misses and false alarms of the first seed, the most confident first."""
        info, rows = self.info, self.rows
        found: dict[str, list[Mistake]] = {"Missed": [], "False alarms": []}
        for name in _of_interest(info):
            column = info.classes.index(name)
            for heading, label in (("Missed", 1), ("False alarms", 0)):
                wrong = (rows.labels[:, column] == label) & (rows.decisions[:, column] != label)
                found[heading].extend(
                    Mistake(
                        str(self.frame["sample_id"].iloc[row]),
                        self._named(rows.labels[row] == 1, name),
                        self._named(rows.decisions[row], name),
                        float(rows.probabilities[row, column]),
                    )
                    for row in np.flatnonzero(wrong).tolist()
                )
        found["Missed"].sort(key=lambda mistake: (mistake.score, mistake.sample_id))
        found["False alarms"].sort(key=lambda mistake: (-(mistake.score or 0), mistake.sample_id))
        return found

    def picture(self, mistake: Mistake, folder: DatasetFolder) -> np.ndarray:
        """The mistake's sample as one picture, with lesions framed where they are known."""
        pixels = folder.preview(mistake.sample_id)
        lesions = folder.boxes.loc[folder.boxes["sample_id"] == mistake.sample_id, ["x0", "y0", "x1", "y1"]]
        if folder.info.kind != "image" or lesions.empty:
            return pixels
        return draw_boxes(pixels, [(lesions.to_numpy(np.float64), LESION_COLOUR)])

    def show_explanations(self, page: Page, folder: DatasetFolder, predictor: "Predictor") -> None:
        """Add maps of hits, misses and false alarms, each with its scores."""
        from cadx.evaluating.explanations import cases_of, explain, show_explanations

        cases = cases_of(self.info, self.rows, self.frame["sample_id"].tolist())
        show_explanations(page, explain(predictor, folder, cases))

    def _of_class(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Labels (n), probabilities (S n) and patients of the cases that are labelled in a class."""
        column, rows = self.info.classes.index(name), self.joined
        known = ~np.isnan(rows.labels[:, column])
        patients = None if rows.patients is None else rows.patients[known]
        return rows.labels[known, column], rows.probabilities[:, known, column], patients

    def _named(self, held: np.ndarray, name: str) -> str:
        """One row's truth or call in words; in multilabel tasks as to one class."""
        if self.info.task == "multilabel":
            return name if held[self.info.classes.index(name)] else f"no {name}"
        return self.info.classes[int(held.argmax())]

    def _show_answer(self, page: Page) -> None:
        info, scores = self.info, self.scores
        page.facts([(title(name), scores.metrics[name]) for name in HEADLINES[info.task]])
        about = f"the class {info.positive!r}" if info.positive else "the mean over classes"
        cases = f"{scores.n:,} labelled images" + (
            f" of {scores.n_patients:,} patients" if info.clustered else ""
        )
        if self.aggregate != "none":
            word = "highest" if self.aggregate == "max" else "mean"
            cases = f"{scores.n:,} labelled patients, each with the {word} probability of the images,"
        joined = f", scored by the bundles of {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        page.text(
            f"{cases} of {judged_on(info.split)}{joined}; the numbers speak of {about}. In brackets: 95 % confidence "
            "intervals."
        )
        if self.aggregate != "none" and info.thresholds:
            page.callout("warn", "The threshold was chosen on images, and is applied to patients here.")

    def _show_classes(self, page: Page) -> None:
        if len(self.info.classes) == 2 and self.info.task != "multilabel":
            return
        shown = ("auc", "sensitivity", "specificity")
        page.table(
            [
                {"class": name, **{title(m): estimates[m] for m in shown if m in estimates}}
                for name, estimates in self.scores.by_class.items()
            ],
            "Each class against the rest.",
        )

    def _show_curves(self, page: Page) -> None:
        info, several = self.info, len(self.seeds) > 1
        page.section("Curves")
        drawing, (roc_axes, precision_axes, calibration_axes) = panels(8.6, 2.9, columns=3)
        self.draw_curve(roc_axes)
        for name, colour in zip(_of_interest(info), PALETTE * len(info.classes), strict=False):
            labels, scores, patients = self._of_class(name)
            if band := patient_band(_precision_heights, labels, scores, patients):
                precision = precision_recall(labels, scores[0])
                exact = None if several else (precision.recall, precision.precision)
                draw_band(precision_axes, band, name, drawn_as=exact)
            bins = calibration_curve(labels, scores, patients)
            calibration_axes.errorbar(
                bins.probability,
                bins.observed,
                yerr=np.abs(np.stack([bins.low, bins.high]) - bins.observed),
                marker="o",
                markersize=4,
                linewidth=1.2,
                elinewidth=1,
                color=colour,
            )
            self._draw_operating_points(roc_axes, precision_axes, name)
        calibration_axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        square(precision_axes, "recall (sensitivity)", "precision (PPV)")
        square(calibration_axes, "predicted probability", "observed share")
        precision_axes.set_title("Precision-recall")
        calibration_axes.set_title("Calibration")
        dots = "" if info.task == "multiclass" else "Black dots: operating points. "
        effective = self.scores.clustered or several
        on_patients = ", on the effective number of cases over patients" if effective else ""
        page.figure(
            drawing,
            ("Lines: means over seeds. " if several else "")
            + "Bands: pointwise 95 % limits, bootstrap of "
            + ("patients" if info.clustered else "images")
            + (", each resample applied to all seeds. " if several else ". ")
            + "Precision's are too narrow below a recall of 0.2, where few cases are called. "
            + dots
            + f"Calibration in ten bins with Wilson limits{on_patients}.",
            alt=f"ROC, precision-recall and calibration curves of {', '.join(_of_interest(info))}",
        )

    def _draw_operating_points(self, roc_axes: "Axes", precision_axes: "Axes", name: str) -> None:
        column = self.info.classes.index(name)
        labels = self.joined.labels[:, column]
        for calls in self.joined.decisions[..., column]:
            called, known = calls[~np.isnan(labels)], labels[~np.isnan(labels)]
            if self.info.task == "multiclass" or not called.any() or not 0 < known.sum() < len(known):
                continue
            sensitivity, fall_out = called[known == 1].mean(), called[known == 0].mean()
            for axes, point in (
                (roc_axes, (fall_out, sensitivity)),
                (precision_axes, (sensitivity, known[called].mean())),
            ):
                axes.plot(*point, "o", color=INK, markersize=5, clip_on=False, zorder=3)

    def _show_calls(self, page: Page) -> None:
        info, confusion = self.info, self.scores.confusion.at_operating_point
        counts = "Means over seeds of the counts" if len(self.seeds) > 1 else "Counts"
        page.section("Decisions")
        page.text(self._rule())
        if info.task == "multilabel":
            page.table(
                [
                    {
                        "class": name,
                        "threshold": float(np.mean([seed.thresholds[name] for seed in self.infos])),
                        "found": tp,
                        "missed": fn,
                        "false alarms": fp,
                        "rest": tn,
                    }
                    for name, ((tn, fp), (fn, tp)) in zip(info.classes, confusion, strict=True)
                ],
                f"{counts} of calls at the operating point.",
            )
            return
        if info.task == "multiclass":
            size = min(8.6, 2.2 + 0.8 * len(info.classes))
            drawing, (confusion_axes,) = panels(size, size - 0.8, columns=1)
        else:
            drawing, (confusion_axes, score_axes) = panels(8.6, 3.2, columns=2)
            self._draw_scores(score_axes)
        _draw_confusion(confusion_axes, np.array(confusion), info.classes)
        of_each = " of each seed" if len(self.seeds) > 1 else ""
        dashed = f" Dashed: the threshold{of_each}; calls lie to its right." if info.positive else ""
        page.figure(
            drawing,
            f"{counts}, and shares of the true class." + dashed,
            alt="Confusion matrix at the operating point"
            + (" and histogram of probabilities" if info.positive else ""),
        )

    def _rule(self) -> str:
        if self.info.task == "multiclass":
            return "The most probable class is called."
        several = len(self.seeds) > 1
        rules = []
        for name in decisions.called_classes(self.info):
            at = [
                f"{one.thresholds[name]:.4f}" + (f" (seed {one.seed})" if several else "")
                for one in self.infos
            ]
            rules.append(f"{name!r} is called at a probability of {', '.join(at)} or more")
        return f"{'; '.join(rules)}. {'Each' if several else 'The'} threshold is frozen in its bundle."

    def _draw_scores(self, axes: "Axes") -> None:
        info = self.info
        assert info.positive is not None
        labels, scores, _ = self._of_class(info.positive)
        bins: Any = np.linspace(0, 1, 41)
        for value, colour in ((0, PALETTE[0]), (1, PALETTE[1])):
            name = info.positive if value else next(c for c in info.classes if c != info.positive)
            chosen = scores[:, labels == value].ravel()
            n = int((labels == value).sum())
            weights = np.full(chosen.size, 1 / len(scores))  # of several seeds the mean count
            axes.hist(chosen, bins, weights=weights, color=colour, alpha=0.25)
            axes.hist(
                chosen,
                bins,
                weights=weights,
                color=colour,
                histtype="step",
                linewidth=1.4,
                label=f"{name} (n = {n:,})",
            )
        for one in self.infos:
            axes.axvline(one.thresholds[info.positive], color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, None)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(
            title="Scores", xlabel=f"probability of {info.positive}", ylabel="images (log scale)", xlim=(0, 1)
        )
        # Below the axes: thresholds are drawn through them.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=8)


def by_patient(frame: pd.DataFrame, info: PredictionsInfo, how: Aggregation) -> pd.DataFrame:
    """Rows of a predictions file with one row a patient, decided anew at the same thresholds.

    A patient has a finding if any image has it, and the highest or the mean probability of the images. Where none has
    it and any is unlabelled, it is unknown (NaN): the finding may be on that one, whose probability counts too. In
    multiclass tasks all images are of one class, which a labelled one tells. sample_id is the image with the highest
    probability; a site, scanner, age or sex that differs between images is unknown. Whether it can be done,
    `Classification.check` says.
    """
    labels, answers = [f"label_{name}" for name in info.classes], [f"prob_{name}" for name in info.classes]
    patients = frame.groupby("patient", sort=True)
    truth, probabilities = patients[labels].max(), getattr(patients[answers], how)()
    if info.task != "multiclass":
        complete = frame[labels].notna().groupby(frame["patient"], sort=True).all()
        truth = truth.where(complete | (truth == 1))
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


def _joined(read: Sequence[tuple[pd.DataFrame, PredictionsInfo]]) -> Arrays:
    """The answers of several seeds on the same samples: S N K."""
    each = [arrays(frame, info) for frame, info in read]
    return each[0]._replace(
        probabilities=np.stack([one.probabilities for one in each]),
        decisions=np.stack([one.decisions for one in each]),
    )


def _of_interest(info: PredictionsInfo) -> list[str]:
    """The classes that curves are drawn of: the positive one, or all."""
    return [info.positive] if info.positive else list(info.classes)


def _precision_heights(labels: np.ndarray, scores: np.ndarray, grid: np.ndarray) -> np.ndarray | None:
    """Precision at the recalls of `grid`; None where there is no positive."""
    curve = precision_recall(labels, scores)
    return next_at(curve.recall, curve.precision, grid) if len(curve.recall) else None


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
